"""How much do the base and the experts' capacity matter? The same small study over bases, ranks and adapter depths.

Users, comparisons and texts are those of the study of review users, cut to fewer prompts; every base reads the same
texts. `run_families` is a smaller one still, which every family of experts can run, whole models and tables too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset, concatenate_datasets

from ..base.model import Base, load_base
from ..data.pairs import Pairs, Text, Texts
from ..elbo import correct, predictive_probability
from ..evaluation import accuracy_gain, prompt_accuracy, summarise_accuracy
from ..experts import AdapterExperts, Experts, HeadExperts, IndependentExperts, TabularExperts
from ..gates.weights import LearnedWeights
from ..learning.config import FitConfig
from ..learning.fit import fit
from ..learning.starts import Start
from ..policy.mixture import MixturePolicy
from ..store import cached, read_json, write_json_atomic
from .fits import VERSION as FIT_VERSION
from .fits import group_of, kept_fit
from .review_users import ReviewUsers
from .simulated_people import DesignConfig, simulate_preferences

VERSION = 2
METHODS = ("dpo", "mix_dpo")


@dataclass(frozen=True)
class Capacity:
    """What may be changed of the base: `blocks` = 0 is a head of this rank, else adapters in so many last blocks."""

    rank: int
    blocks: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1 or self.blocks < 0:
            raise ValueError(
                f"rank={self.rank}, blocks={self.blocks}: expected a rank of at least 1 and blocks >= 0"
            )

    @property
    def name(self) -> str:
        """As in tables and figures."""
        blocks = f"{self.blocks} block{'s' * (self.blocks > 1)}"
        return (
            f"head, rank {self.rank}"
            if self.blocks == 0
            else f"adapters, {blocks}, rank {self.rank}"
        )

    def experts(self, base: Base, n_experts: int, min_count: int, sharpness: bool) -> Experts:
        """K experts of this capacity, which are the reference; `min_count` and `sharpness` are of heads."""
        if self.blocks:
            return AdapterExperts(base, n_experts, self.rank, self.blocks)
        return HeadExperts(base, n_experts, self.rank, min_count=min_count, sharpness=sharpness)


def cut(rows: Dataset, n_prompts: int) -> Dataset:
    """The pairs of the first `n_prompts` prompts, by number."""
    ids = rows["prompt_id"]
    keep = set(sorted(set(ids))[:n_prompts])
    return rows.select([i for i, value in enumerate(ids) if value in keep])


class SizeStudy:
    """One small study for every base and capacity.

    Parameters
    ----------
    study, design : where pairs come from; the users are those of seed 0 for every fit.
    bases : names, folders or hub ids (see `load_base`).
    n_training_prompts, n_validation_prompts, n_test_prompts : how many of each part's prompts are kept; validation
        pairs of users who have no training pair left go too.
    fit : of heads, by names of `FitConfig.change`; adapters take AdamW with `adapter_learning_rate`.
    """

    def __init__(
        self,
        study: ReviewUsers,
        design: str,
        n_training_prompts: int,
        n_validation_prompts: int,
        n_test_prompts: int,
        adapter_learning_rate: float = 5e-3,
        device: str = "cpu",
        dtype: str = "float32",
        **fit: Any,
    ) -> None:
        sets = study.preferences(design)
        sizes = {
            "train": n_training_prompts,
            "validation": n_validation_prompts,
            "test": n_test_prompts,
        }
        self.sets = {part: cut(sets[part], n) for part, n in sizes.items()}
        known = set(
            self.sets["train"]["user"]
        )  # a user all of whose training pairs were cut has no latent
        rows = self.sets["validation"]
        self.sets["validation"] = rows.select(
            [i for i, user in enumerate(rows["user"]) if user in known]
        )
        texts = Texts.of(
            Text(prompt, answer, False)
            for rows in self.sets.values()
            for side in ("chosen", "rejected")
            for prompt, answer in zip(rows["prompt"], rows[side], strict=True)
        )
        self.pairs = {part: Pairs.of(rows, texts) for part, rows in self.sets.items()}
        self.study, self.adapter_learning_rate, self.fit = study, adapter_learning_rate, fit
        self.device, self.dtype = device, dtype
        self._base: tuple[str, Base] | None = None

    def base(self, name: str) -> Base:
        """The base of this name; one at a time is held."""
        if self._base is None or self._base[0] != name:
            own = name == self.study.config.base and self.device == "cpu"
            self._base = (
                name,
                self.study.base if own else load_base(name, device=self.device, dtype=self.dtype),
            )
        return self._base[1]

    def fitted(
        self, name: str, capacity: Capacity, method: str, seed: int
    ) -> tuple[pd.DataFrame, dict[str, Any]]:
        """Test accuracy by group and prompt (see `prompt_accuracy`), and what the fit took."""
        if method not in METHODS:
            raise ValueError(f"method={method!r}: possible are {METHODS}")
        study, chosen = self.study.config, self.study.config.fit.change(seed=seed, **self.fit)
        if capacity.blocks:
            chosen = chosen.change(optimizer="adamw", learning_rate=self.adapter_learning_rate)
        n_experts = study.n_experts if method == "mix_dpo" else 1
        experts = capacity.experts(self.base(name), n_experts, study.min_count, study.sharpness)
        policy = MixturePolicy(experts, LearnedWeights(n_experts), study.beta, lapse=study.lapse)
        train, test = self.pairs["train"], self.pairs["test"]
        result, rewards, seconds = kept_fit(
            policy, train, self.pairs["validation"], chosen, train.texts
        )
        log_q, users = policy.log_posterior(train, "user", rewards)
        groups = group_of(train, "user")
        rows = {g: log_q[torch.tensor([groups[u] == g for u in users])] for g in self.study.groups}
        best = result.history.set_index("step").loc[result.best_step]
        head = {"base": name, "capacity": capacity.name, "method": method, "seed": seed}
        facts = {
            "parameters_an_expert": sum(p.numel() for p in experts.parameters()) // n_experts,
            "seconds": seconds,
            "best_step": result.best_step,
            "steps": int(result.history["step"].iloc[-1]),
            "validation_loglik": float(best["validation_loglik"]),
            "stop_reason": result.stop_reason,
        }
        table = prompt_accuracy(policy, test, rows, policy.loglik(test, rewards))
        return table.assign(**head), {**head, **facts}

    def run(
        self, bases: Sequence[str], capacities: Sequence[Capacity], seeds: Sequence[int]
    ) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Every base with every capacity: test accuracy by prompt, and one row a fit of what it took."""
        done = [
            self.fitted(name, capacity, method, seed)
            for name in bases
            for capacity in capacities
            for method in METHODS
            for seed in seeds
        ]
        return pd.concat([part for part, _ in done], ignore_index=True), pd.DataFrame(
            [facts for _, facts in done]
        )


def by_capacity(by_prompt: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Accuracy, and the mixture's gain over DPO with the same base and capacity; 95 % intervals over prompts."""
    keys = ["base", "capacity"]
    accuracy = summarise_accuracy(by_prompt, [*keys, "method"])
    gains = []
    for key, part in by_prompt.groupby(keys, sort=False):
        pair = [part[part["method"] == method] for method in ("mix_dpo", "dpo")]
        gains.append(accuracy_gain(*pair).assign(**dict(zip(keys, key, strict=True))))
    return accuracy, pd.concat(gains, ignore_index=True)


@dataclass(frozen=True)
class Family:
    """A family of experts in the comparison of families: how they are made and at which rate they learn.

    make : from base, K, rank, beta and all pairs. learning_rate : at which the training bound rises and no expert dies.
    """

    make: Callable[[Base, int, int, float, Dataset], Experts]
    learning_rate: float
    optimizer: str = "adamw"


FAMILIES: dict[str, Family] = {
    "HeadExperts": Family(
        lambda base, k, rank, beta, pairs: HeadExperts(base, k, rank, sharpness=False), 0.1, "sgd"
    ),
    "AdapterExperts": Family(
        lambda base, k, rank, beta, pairs: AdapterExperts(base, k, rank), 0.005
    ),
    "IndependentExperts": Family(
        lambda base, k, rank, beta, pairs: IndependentExperts([base] * k), 2e-5
    ),
    "TabularExperts": Family(  # all but without the prior, which no other family has here
        lambda base, k, rank, beta, pairs: TabularExperts.of(
            base, pairs, k, beta=beta, prior_scale=1e3
        ),
        0.1,
    ),
}


def run_families(
    study: ReviewUsers,
    n_prompts: int = 3,
    n_users: int = 12,
    pairs_per_user: int = 12,
    passes: float = 10.0,
    rank: int = 8,
    families: Sequence[str] = tuple(FAMILIES),
    seed: int = 0,
) -> pd.DataFrame:
    """Every family of experts on the same few comparisons: a latent per user, all pairs in each step.

    Users of the study's hidden groups answer without noise. As many new users, whom no fit has seen, are served by
    their first pairs and scored on their last ones, about the same prompts: a table knows no others.

    Parameters
    ----------
    n_prompts, pairs_per_user : the first prompts of the study, and answers about them; of a new user half serve, half
        score. passes : steps. rank : of heads and adapters.

    Returns
    -------
    One row a family: family, parameters_an_expert (trained), steps, elbo and train_accuracy (at the end, nats per pair
    and share), new_user_accuracy (share), seconds (of the fit).
    """
    few = (study.candidates["prompt_id"] < n_prompts).to_numpy()
    candidates, scores = (
        study.candidates[few].reset_index(drop=True),
        study.scores[few].reset_index(drop=True),
    )
    design = DesignConfig(
        n_users=n_users,
        n_new_users=n_users,
        pairs_per_user=pairs_per_user,
        context_pairs=pairs_per_user,
        validation_pairs_per_user=0,
        flip_rate=0.0,
        seed=seed,
    )
    world = simulate_preferences(candidates, scores, design, splits={"train": range(n_prompts)})
    train, new = world["train"], world["context"]
    turn = new.to_pandas().groupby("user").cumcount().to_numpy()
    half = pairs_per_user // 2
    first, last = (new.select(np.flatnonzero(mask)) for mask in (turn < half, turn >= half))
    base, config, rows = study.base, study.config, []
    everything = concatenate_datasets([train, new])
    for name in families:
        family = FAMILIES[name]
        options = FitConfig(
            passes=passes,
            min_steps=0,
            batch_by="pair",
            batch_size=len(train),
            evaluations_per_pass=1 / passes,
            start=Start(passes=0.25, temperature=4.0, tempering_passes=passes / 4),
            optimizer=family.optimizer,
            learning_rate=family.learning_rate,
            seed=seed,
        )
        parameters = {
            "family": name,
            "base": base.fingerprint,
            "rank": rank,
            "n_experts": config.n_experts,
            "beta": config.beta,
            "fit": options.identity(config.n_experts, reads=False),
            "rule": FIT_VERSION,
            "pairs": everything.to_dict(),
        }

        def build(folder: Path, family: Family = family, options: FitConfig = options) -> None:
            experts = family.make(base, config.n_experts, rank, config.beta, everything)
            policy = MixturePolicy(experts, LearnedWeights(config.n_experts), config.beta)
            start = time.monotonic()
            result = fit(policy, train, options)
            seconds = time.monotonic() - start
            log_q, users = policy.log_posterior(first)
            served = log_q[torch.tensor([users.index(user) for user in last["user"]])]
            right = correct(predictive_probability(policy.loglik(last), served))
            end = result.history.iloc[-1]
            facts = {
                "parameters_an_expert": sum(p.numel() for p in experts.parameters())
                // config.n_experts,
                "steps": int(end["step"]),
                "elbo": float(end["elbo"]),
                "train_accuracy": float(end["train_accuracy"]),
                "new_user_accuracy": float(right.mean()),
                "seconds": seconds,
            }
            write_json_atomic(folder / "facts.json", facts)

        rows.append(
            {
                "family": name,
                **read_json(cached("families", VERSION, parameters, build) / "facts.json"),
            }
        )
    return pd.DataFrame(rows)
