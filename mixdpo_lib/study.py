"""Which arrows make up the movie-review study? reviews -> prompts -> candidates -> scores -> pairs -> features -> fits -> texts.

Every arrow is a method of `Study` whose result is kept in the cache, so that each notebook opens on its own and none
computes what another has computed.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .elbo import log_responsibilities
from .evaluation import align, prefix_kl, prompt_accuracy, recovery, text_table, user_groups
from .experts import HeadExperts
from .features import PairFeatures, Text, TextStore, pair_features, text_store
from .gating import LearnedWeights
from .mixture import MixturePolicy
from .preferences import (
    GROUPS,
    CandidateConfig,
    DesignConfig,
    hash_seed,
    review_prompts,
    sample_candidates,
    simulate_preferences,
    split_prompts,
    usable,
)  # fmt: skip
from .rewards import JudgeConfig, Judges, judges, score_texts, split_reviews
from .sources import Base, load_base, load_reviews
from .store import artefact_key, cache_folder, cached, read_json, write_json_atomic
from .trainer import FitConfig, FitResult, fit

VERSION = 1
EXPERT_OF = {f"expert_{group}": group for group in GROUPS}


@dataclass(frozen=True)
class Method:
    """A way to learn from mixed preferences: K experts of a rank, with one latent a user or a comparison."""

    n_experts: int
    rank: int
    latent: str


def study_methods(n_experts: int, rank: int) -> dict[str, Method]:
    """The methods that are compared. `dpo_rank_3r` is the control with the parameters of all experts in one policy."""
    return {
        "dpo": Method(1, rank, "unit"),
        "dpo_rank_3r": Method(1, rank * n_experts, "unit"),
        "mix_dpo": Method(n_experts, rank, "unit"),
        "mix_dpo_pair": Method(n_experts, rank, "pair"),
    }


@dataclass(frozen=True)
class StudyConfig:
    """Every choice of the study. Profiles set these through the notebooks' parameters."""

    base: str = "smollm2-135m"
    reviews: str = "imdb-packaged"
    candidates: CandidateConfig = field(default_factory=CandidateConfig)
    judges: JudgeConfig = field(default_factory=JudgeConfig)
    designs: tuple[DesignConfig, ...] = (DesignConfig(), DesignConfig(name="clean"))
    n_experts: int = 3
    rank: int = 8
    beta: float = 0.1
    fit: FitConfig = field(default_factory=FitConfig)


@dataclass(frozen=True)
class Fitted:
    """A fitted method: the policy at its best validation step, its history, and the users' weights under it."""

    policy: MixturePolicy
    result: FitResult
    method: str
    seed: int
    user_log_q: Tensor  # (users, experts) from each user's own training pairs
    users: list[str]
    order: list[int]  # expert of each of GROUPS, aligned by training users' responsibilities


class Study:
    """The arrows of the study, each computed once."""

    def __init__(self, config: StudyConfig | None = None) -> None:
        self.config = config or StudyConfig()
        self._designs = {design.name: design for design in self.config.designs}
        self._pairs: dict[str, dict[str, PairFeatures]] = {}
        self.methods = study_methods(self.config.n_experts, self.config.rank)

    @cached_property
    def base(self) -> Base:
        """The frozen base model."""
        return load_base(self.config.base)

    @cached_property
    def judges(self) -> Judges:
        """The three rewards, each with a training and an evaluation judge."""
        return judges(self.config.reviews, self.config.judges)

    @cached_property
    def prompts(self) -> list[str]:
        """First tokens of reviews that no judge was fitted on."""
        reviews = split_reviews(load_reviews(self.config.reviews), config=self.config.judges)["prompts"]
        return review_prompts(self.base, reviews["text"], self.config.candidates)

    @cached_property
    def candidates(self) -> pd.DataFrame:
        """Continuations of the prompts by the base, without the unusable ones."""
        return usable(sample_candidates(self.base, self.prompts, self.config.candidates))

    @cached_property
    def scores(self) -> pd.DataFrame:
        """What the training judges say of prompt and response together: the hidden rewards."""
        return score_texts(self._whole(self.candidates["prompt"], self.candidates["response"]), self.judges.training)

    @staticmethod
    def _whole(prompts, responses) -> list[str]:
        return [p + r for p, r in zip(prompts, responses, strict=True)]

    @cached_property
    def texts(self) -> TextStore:
        """Features of all candidates."""
        table = self.candidates
        return text_store(self.base, (Text(p, r, False) for p, r in zip(table["prompt"], table["response"], strict=True)))

    def preferences(self, design: str) -> datasets.DatasetDict:
        """The preference sets of a design: train, validation, context, test."""
        return simulate_preferences(self.candidates, self.scores, self._designs[design])

    def pairs(self, design: str) -> dict[str, PairFeatures]:
        """The preference sets of a design with their features."""
        if design not in self._pairs:
            sets = self.preferences(design)
            self._pairs[design] = {name: pair_features(self.base, rows, self.texts) for name, rows in sets.items()}
        return self._pairs[design]

    # ------------------------------------------------------------------------------------------------------- fits

    def new_policy(self, method: str) -> MixturePolicy:
        """An untrained policy of a method."""
        m = self.methods[method]
        return MixturePolicy(HeadExperts(self.base, m.n_experts, m.rank), LearnedWeights(m.n_experts), self.config.beta)

    def fitted(self, design: str, method: str, seed: int) -> Fitted:
        """Fit a method on a design's training pairs, or read the fit from the cache."""
        m, sets = self.methods[method], self.pairs(design)
        config = replace(self.config.fit, seed=seed, latent=m.latent)
        digest = artefact_key("pairs", VERSION, {n: s.rows.to_dict() for n, s in sets.items() if n in ("train", "validation")})
        parameters = {"method": asdict(m), "beta": self.config.beta, "fit": asdict(config), "pairs": digest}
        inputs = [self.texts.features.key]
        policy = self.new_policy(method)
        policy.experts.activate_responses(sets["train"])

        def build(folder: Path) -> None:
            checkpoints = cache_folder() / "checkpoints" / artefact_key("fit", VERSION, parameters, inputs)
            result = fit(policy, sets["train"], config, sets["validation"], folder=checkpoints)
            result.history.to_csv(folder / "history.csv", index=False)
            result.restarts.to_csv(folder / "restarts.csv", index=False)
            write_json_atomic(folder / "result.json", {"stop_reason": result.stop_reason, "best_step": result.best_step})
            save_file(
                {f"{s}/{k}": v.clone() for s, state in result.snapshots.items() for k, v in state.items() if "active" not in k},
                folder / "snapshots.safetensors",
            )
            shutil.rmtree(checkpoints, ignore_errors=True)

        folder = cached("fit", VERSION, parameters, build, inputs=inputs)
        facts = read_json(folder / "result.json")
        snapshots: dict[int, dict[str, Tensor]] = {}
        for name, value in load_file(folder / "snapshots.safetensors").items():
            step, key = name.split("/", 1)
            snapshots.setdefault(int(step), {})[key] = value
        result = FitResult(
            pd.read_csv(folder / "history.csv"), facts["stop_reason"], facts["best_step"],
            pd.read_csv(folder / "restarts.csv"), snapshots,
        )  # fmt: skip
        policy.load_state_dict(snapshots[result.best_step], strict=False)
        train = sets["train"]
        ids, users = train.units("user")
        log_q = log_responsibilities(policy.loglik(train), policy.gate(), ids, n_units=len(users))
        groups = user_groups(train)
        order = align(log_q.exp().numpy(), [groups[u] for u in users], GROUPS)
        return Fitted(policy, result, method, seed, log_q, users, order)

    # ------------------------------------------------------------------------------------------------- evaluation

    def accuracy(self, design: str, fitted: Fitted) -> pd.DataFrame:
        """Test accuracy by group and prompt, for every routing and for seen and new users (see `prompt_accuracy`)."""
        sets, policy = self.pairs(design), fitted.policy
        rewards = policy.text_rewards(self.texts.features)
        test_loglik = policy.loglik(sets["test"], rewards)
        groups = user_groups(sets["train"])
        context = sets["context"]
        ids, new_users = context.units("user")
        new_groups = user_groups(context)
        new_log_q = log_responsibilities(policy.loglik(context, rewards), policy.gate(), ids, n_units=len(new_users))
        one = torch.full((fitted.policy.n_experts,), -torch.inf)
        parts = []
        for who, names, of, log_q in (
            ("seen", fitted.users, groups, fitted.user_log_q), ("new", new_users, new_groups, new_log_q)
        ):  # fmt: skip
            routings: dict[str, dict[str, Tensor]] = {}
            if policy.n_experts == 1:
                routings["none"] = {g: policy.gate()[None] for g in GROUPS}
            else:
                routings["prior"] = {g: policy.gate()[None] for g in GROUPS}
                routings["own_pairs"] = {g: log_q[[i for i, u in enumerate(names) if of[u] == g]] for g in GROUPS}
                routings["oracle"] = {
                    g: one.index_fill(0, torch.tensor([k]), 0.0)[None] if k >= 0 else policy.gate()[None]
                    for g, k in zip(GROUPS, fitted.order, strict=True)
                }
            for routing, weights in routings.items():
                table = prompt_accuracy(policy, sets["test"], weights, test_loglik)
                parts.append(table.assign(design=design, method=fitted.method, routing=routing, seed=fitted.seed, users=who))
        return pd.concat(parts, ignore_index=True)

    def responsibilities(self, design: str, fitted: Fitted) -> pd.DataFrame:
        """Tidy responsibilities of the training users, experts in the order of the groups they serve."""
        of = user_groups(self.pairs(design)["train"])
        names = {k: g for g, k in zip(GROUPS, fitted.order, strict=True) if k >= 0}
        q = fitted.user_log_q.exp()
        rows = [
            {"design": design, "method": fitted.method, "seed": fitted.seed, "user": u, "group": of[u], "expert": k,
             "expert_serves": names.get(k, f"unmatched {k}"), "responsibility": float(q[i, k])}
            for i, u in enumerate(fitted.users) for k in range(q.shape[1])
        ]  # fmt: skip
        return pd.DataFrame(rows)

    def recovery(self, design: str, fitted: Fitted) -> dict[str, object]:
        """How well the responsibilities recover the hidden groups (training users)."""
        of = user_groups(self.pairs(design)["train"])
        q = pd.DataFrame(fitted.user_log_q.exp().numpy())
        return {"design": design, "method": fitted.method, "seed": fitted.seed, **recovery(q, [of[u] for u in fitted.users])}

    # ------------------------------------------------------------------------------------------------------ texts

    def checkpoint_kl(self, fitted: Fitted) -> pd.DataFrame:
        """KL to the reference of every checkpoint and expert on the prefixes of validation candidates (`prefix_kl`)."""
        rows = self.candidates.index[self.candidates["prompt_id"].isin(split_prompts(len(self.prompts))["validation"])]
        ids = torch.from_numpy(np.asarray(rows))
        best = {k: v.clone() for k, v in fitted.policy.state_dict().items()}
        out = []
        for step, state in fitted.result.snapshots.items():
            fitted.policy.load_state_dict(state, strict=False)
            for k, value in enumerate(prefix_kl(fitted.policy, self.texts.features, ids)):
                out.append({"seed": fitted.seed, "method": fitted.method, "step": step, "expert": k, "prefix_kl": value})
        fitted.policy.load_state_dict(best)
        return pd.DataFrame(out)

    def sample_texts(self, fitted: Fitted, expert: int, step: int, policy_name: str, n_texts: int, max_new_tokens: int) -> pd.DataFrame:  # fmt: skip
        """Texts of one expert at one checkpoint on test prompts, scored by the evaluation judges."""
        test = list(split_prompts(len(self.prompts))["test"])
        prompt_ids = [test[i % len(test)] for i in range(n_texts)]
        prompts = [self.prompts[i] for i in prompt_ids]
        policy = self.new_policy(fitted.method)
        policy.experts.activate(fitted.policy.experts.active_ids)
        policy.load_state_dict(fitted.result.snapshots[step], strict=False)
        state = {k: v.double().sum().item() for k, v in policy.state_dict().items()}
        parameters = {
            "state": state, "expert": expert, "prompts": prompts, "n": max_new_tokens, "seed": fitted.seed,
            "base": self.base.fingerprint,
        }  # fmt: skip

        def build(folder: Path) -> None:
            out = policy.generate(
                prompts, expert=[expert] * len(prompts), max_new_tokens=max_new_tokens,
                seed=hash_seed(fitted.seed, "texts", policy_name),
            )  # fmt: skip
            pd.DataFrame(asdict(out)).to_json(folder / "texts.jsonl", orient="records", lines=True)

        folder = cached("texts", VERSION, parameters, build)
        table = pd.read_json(folder / "texts.jsonl", orient="records", lines=True, dtype=False, convert_dates=False)
        from .mixture import Generated

        generated = Generated(**{c: table[c].tolist() for c in table})
        scores = score_texts(self._whole(prompts, generated.text), self.judges.evaluation)
        return text_table(generated, prompts, prompt_ids, scores).assign(policy=policy_name, seed=fitted.seed)
