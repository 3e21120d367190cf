"""Can a gate route movies and books? Prompts of two domains, a hidden reward profile for each, fits, and the gate.

No learner sees the domain but the one that is called `oracle`. Two kinds of prompts: titles of well-known works in
templates that name neither domain, or the first words of real reviews.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset

from ..data.pairs import Pairs
from ..elbo import keep_top_s
from ..evaluation import prompt_accuracy
from ..experts.heads import HeadExperts
from ..gates.contract import Gate
from ..gates.prompt import ContextGate
from ..gates.user import given_gate
from ..gates.weights import LearnedWeights
from ..learning.config import FitConfig
from ..policy.mixture import MixturePolicy
from ..store import MixDPOError, hash_seed
from .candidates import CandidateConfig, sample_candidates, usable
from .domain_prompts import DomainPrompts, TwoDomainsConfig
from .fits import Fitted, Study, choose
from .simulated_people import is_flipped, label_temperature, untied_pairs
from .titles import DOMAINS

PROFILES: dict[str, dict[str, float]] = {
    "film": {"sentiment": 1.0, "informativeness": -1.0},
    "book": {"sentiment": -1.0, "informativeness": 1.0},
}


def two_domains_config(**values: Any) -> TwoDomainsConfig:
    """A `TwoDomainsConfig` from flat values, each named as the field it sets (`n_titles`, `passes`, ...).

    >>> two_domains_config(n_titles=20, passes=1.0).fit.passes
    1.0
    """
    return choose(TwoDomainsConfig(), values)


def domain_preferences(
    prompts: pd.DataFrame, candidates: pd.DataFrame, rewards: pd.DataFrame, config: TwoDomainsConfig
) -> dict[str, Dataset]:
    """train, validation (noisy answers by each domain's profile) and test (noise-free). `group` is the domain.

    Parameters
    ----------
    prompts : item, domain, part and prompt of each prompt; a column `read` is what a gate shall read of it.
    candidates : prompt_id, prompt, response. rewards : of every candidate under each domain's profile.
    """
    rng = np.random.default_rng(hash_seed(config.seed, "labels"))
    of = prompts.loc[candidates["prompt_id"]].reset_index(drop=True)
    gaps: dict[str, list[tuple[int, int, float]]] = {domain: [] for domain in DOMAINS}
    for rows in candidates.groupby("prompt_id").indices.values():
        domain = of["domain"].iat[rows[0]]
        value = rewards[domain].to_numpy()
        for a, b in untied_pairs(value, rows.tolist()):
            gaps[domain].append((a, b, float(value[a] - value[b])))
    out: dict[str, list[dict[str, Any]]] = {"train": [], "validation": [], "test": []}
    for domain in DOMAINS:
        train = np.array([g for a, _, g in gaps[domain] if of["part"].iat[a] == "train"])
        t = label_temperature(train, config.flip_rate)
        for better, worse, gap in gaps[domain]:
            part = of["part"].iat[better]
            for _ in range(1 if part == "test" else config.labels_per_pair):
                flipped = is_flipped(gap, t, None if part == "test" else rng)
                a, b = (worse, better) if flipped else (better, worse)
                out[part].append(
                    {
                        "prompt": candidates["prompt"].iat[a],
                        "chosen": candidates["response"].iat[a],
                        "rejected": candidates["response"].iat[b],
                        "ended": False,
                        "domain": domain,
                        "group": domain,
                        "prompt_id": int(candidates["prompt_id"].iat[a]),
                        "item": int(of["item"].iat[a]),
                        "gap": gap,
                        "read": of["read"].iat[a],
                        "flipped": flipped,
                    }
                )
    for part, rows_of in out.items():
        empty = set(DOMAINS) - {row["domain"] for row in rows_of}
        if empty:
            raise MixDPOError(f"no {part} pairs for {sorted(empty)}: ask for more prompts")
    return {part: Dataset.from_list(rows) for part, rows in out.items()}


class TwoDomains(Study):
    """Prompts about films and books, answered by a hidden profile for each domain."""

    unit, group_column, groups, designs = None, "domain", DOMAINS, ("",)

    default = TwoDomainsConfig()
    config: TwoDomainsConfig

    def __init__(self, config: TwoDomainsConfig | None = None) -> None:
        super().__init__(config or self.default)

    @cached_property
    def asked(self) -> DomainPrompts:
        """Works, prompts, and what a gate reads of them."""
        return DomainPrompts(self.config, self.base)

    @property
    def prompts(self) -> pd.DataFrame:
        """One row a prompt with candidates: item, domain, part, prompt."""
        return self.asked.prompts

    @cached_property
    def candidates(self) -> pd.DataFrame:  # type: ignore[override]
        """Continuations of the prompts by the base, without the unusable ones."""
        config = CandidateConfig(
            n_prompts=len(self.prompts),
            n_candidates=self.config.n_candidates,
            seed=self.config.seed,
            response_tokens=self.config.response_tokens,
        )
        return usable(sample_candidates(self.base, self.prompts["prompt"].tolist(), config))

    @cached_property
    def rewards(self) -> pd.DataFrame:
        """The hidden reward of every candidate under each domain's profile, in standard deviations."""
        scores = (self.scores - self.scores.mean()) / self.scores.std().replace(0, 1)
        return pd.DataFrame(
            {
                domain: sum(weight * scores[reward] for reward, weight in profile.items())
                for domain, profile in PROFILES.items()
            }
        )

    def preferences(self, design: str = "", seed: int = 0) -> Mapping[str, Dataset]:
        """See `domain_preferences`; the same for every seed."""
        read = self.prompts["prompt"].map(self.asked.gate_prompt)
        return domain_preferences(
            self.prompts.assign(read=read), self.candidates, self.rewards, self.config
        )

    # -------------------------------------------------------------------------------------------------------- fits

    @property
    def methods(self) -> dict[str, tuple[int, int]]:
        """Experts and rank of each method; `dpo_rank_2r` has all experts' parameters in one policy.

        `oracle` is the mixture whose gate is given the domain; no other method reads it.
        """
        k, r = self.config.n_experts, self.config.rank
        return {
            "dpo": (1, r),
            f"dpo_rank_{k}r": (1, k * r),
            "mix_dpo": (k, r),
            "moe_dpo": (k, r),
            "oracle": (k, r),
        }

    def new_policy(self, method: str, train: Pairs) -> MixturePolicy:
        """An untrained policy of a method."""
        config, (k, rank) = self.config, self.methods[method]
        gate: Gate = LearnedWeights(k)
        if method == "moe_dpo":
            gate = ContextGate.from_prompts(
                self.base,
                train.rows["read"],
                k,
                suffix=self.asked.suffix,
                layer=config.layer,
                weight_scale=config.weight_scale,
                column="read",
            )
        elif method == "oracle":
            gate = given_gate("domain", DOMAINS, k)
        return MixturePolicy(
            HeadExperts(self.base, k, rank, min_count=config.min_count, sharpness=config.sharpness),
            gate,
            config.beta,
        )

    def fit_config(self, method: str, seed: int) -> FitConfig:
        """The study's; where a gate can say nothing of a prompt, there are no clusters to start from."""
        config = replace(self.config.fit, seed=seed)
        if method == "moe_dpo":
            return config
        kind = "none" if method == "oracle" else "random_responsibilities"
        return config.change(latent="pair", start__kind=kind, start__together="")

    # -------------------------------------------------------------------------------------------------- evaluation

    def accuracy_by_prompt(self, fits: Sequence[Fitted], last: bool = False) -> pd.DataFrame:
        """Test accuracy by domain (`group`) and prompt: sum_k w_k(x) sigma(D_k) > 0.5 by each policy's own gate.

        `moe_dpo_top_1` : the same fit, where each prompt is answered by the expert of largest weight alone.

        Parameters
        ----------
        last : after the last step instead of the best one on validation; methods are then called `..._last_step`.
        """
        test, parts = self.pairs()["test"], []
        one = {domain: torch.zeros(1, 1) for domain in DOMAINS}
        for f in fits:
            f.result.restore(f.policy, "last" if last else "best")
            loglik, log_w = (
                f.policy.loglik(test, None if last else f.rewards),
                f.policy.log_w(test).detach(),
            )
            f.result.restore(f.policy)
            weights = {f"{f.method}_last_step" if last else f.method: log_w}
            if f.method == "moe_dpo" and not last:
                weights["moe_dpo_top_1"] = keep_top_s(log_w, 1)
            for name, own in weights.items():
                table = prompt_accuracy(
                    f.policy, test, one, (loglik + own.log_softmax(-1)).logsumexp(1, keepdim=True)
                )
                parts.append(table.assign(method=name, seed=f.seed))
        return pd.concat(parts, ignore_index=True)
