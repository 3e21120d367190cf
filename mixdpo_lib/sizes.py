"""How much do the base and the experts' capacity matter? The same small study over bases, ranks and adapter depths.

Users, comparisons and texts are those of the movie-review study, cut to fewer prompts; every base reads the same texts.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from datasets import Dataset

from .elbo import log_responsibilities
from .evaluation import accuracy_gain, prompt_accuracy, summarise_accuracy, user_groups
from .experts import Experts, HeadExperts
from .features import PairFeatures, pair_features
from .gating import LearnedWeights
from .mixture import MixturePolicy
from .model_experts import AdapterExperts
from .preferences import GROUPS
from .sources import Base, load_base
from .store import cached, read_json, write_json_atomic
from .study import Study
from .trainer import FitConfig, fit

VERSION = 1
METHODS = ("dpo", "mix_dpo")


@dataclass(frozen=True)
class Capacity:
    """What may be changed of the base: `blocks` = 0 is a head of this rank, else adapters in so many last blocks."""

    rank: int
    blocks: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1 or self.blocks < 0:
            raise ValueError(f"rank={self.rank}, blocks={self.blocks}: expected a rank of at least 1 and blocks >= 0")

    @property
    def name(self) -> str:
        """As in tables and figures."""
        return f"head, rank {self.rank}" if self.blocks == 0 else f"adapters, {self.blocks} blocks, rank {self.rank}"

    def experts(self, base: Base, n_experts: int, min_count: int) -> Experts:
        """K experts of this capacity, which are the reference."""
        if self.blocks:
            return AdapterExperts(base, n_experts, self.rank, self.blocks)
        return HeadExperts(base, n_experts, self.rank, min_count=min_count)


def cut(rows: Dataset, n_prompts: int) -> Dataset:
    """The pairs of the first `n_prompts` prompts, by number."""
    ids = rows["prompt_id"]
    keep = set(sorted(set(ids))[:n_prompts])
    return rows.select([i for i, value in enumerate(ids) if value in keep])


class SizeStudy:
    """One small study for every base and capacity.

    Parameters
    ----------
    study, design : where pairs come from. bases : names, folders or hub ids (see `load_base`).
    n_training_prompts, n_validation_prompts, n_test_prompts : how many of each part's prompts are kept; validation
        pairs of users who have no training pair left go too.
    options : of `FitConfig`, for heads; adapters take AdamW with `adapter_learning_rate`.
    """

    def __init__(
        self, study: Study, design: str, n_training_prompts: int, n_validation_prompts: int, n_test_prompts: int,
        adapter_learning_rate: float = 1e-3, device: str = "cpu", dtype: str = "float32", **options: Any,
    ) -> None:  # fmt: skip
        sets = study.preferences(design)
        sizes = {"train": n_training_prompts, "validation": n_validation_prompts, "test": n_test_prompts}
        self.sets = {part: cut(sets[part], n) for part, n in sizes.items()}
        known = set(self.sets["train"]["user"])  # a user all of whose training pairs were cut has no latent
        rows = self.sets["validation"]
        self.sets["validation"] = rows.select([i for i, user in enumerate(rows["user"]) if user in known])
        self.study, self.adapter_learning_rate, self.options = study, adapter_learning_rate, options
        self.device, self.dtype = device, dtype
        self._base: tuple[str, Base] | None = None
        self._pairs: dict[str, PairFeatures] = {}

    def _load(self, name: str) -> Base:
        if self._base is None or self._base[0] != name:
            base = self.study.base if name == self.study.config.base and self.device == "cpu" else load_base(
                name, device=self.device, dtype=self.dtype)  # fmt: skip
            self._base = (name, base)
            self._pairs = {part: pair_features(base, rows) for part, rows in self.sets.items()}
        return self._base[1]

    def fitted(self, name: str, capacity: Capacity, method: str, seed: int) -> tuple[pd.DataFrame, dict[str, Any]]:
        """Test accuracy by group and prompt (see `prompt_accuracy`), and what it took; kept in the cache."""
        if method not in METHODS:
            raise ValueError(f"method={method!r}: possible are {METHODS}")
        base, config = self._load(name), self.study.config
        options = {**asdict(config.fit), **self.options, "seed": seed}
        if capacity.blocks:
            options |= {"optimizer": "adamw", "learning_rate": self.adapter_learning_rate}
        chosen = FitConfig(**options)
        digest = hashlib.sha256(repr([rows.to_dict() for rows in self.sets.values()]).encode()).hexdigest()
        n_experts = config.n_experts if method == "mix_dpo" else 1
        parameters = {"base": base.fingerprint, "capacity": asdict(capacity), "n_experts": n_experts, "pairs": digest,
                      "fit": asdict(chosen), "beta": config.beta, "min_count": config.min_count}  # fmt: skip

        def build(folder: Path) -> None:
            start = time.monotonic()
            experts = capacity.experts(base, n_experts, config.min_count)
            policy = MixturePolicy(experts, LearnedWeights(n_experts), config.beta)
            train, test = self._pairs["train"], self._pairs["test"]
            result = fit(policy, train, chosen, self._pairs["validation"])
            policy.load_state_dict(result.snapshots[result.best_step])
            seconds = time.monotonic() - start
            ids, users = train.units("user")
            log_w = policy.gate().detach()
            log_q = log_responsibilities(policy.loglik(train), log_w, ids, n_units=len(users))
            groups = user_groups(train)
            rows = {g: log_q[torch.tensor([groups[u] == g for u in users])] for g in GROUPS}
            prompt_accuracy(policy, test, rows).to_csv(folder / "accuracy.csv", index=False)
            best = result.history.set_index("step").loc[result.best_step]
            write_json_atomic(folder / "facts.json", {
                "parameters_an_expert": sum(p.numel() for p in experts.parameters()) // n_experts, "seconds": seconds,
                "best_step": result.best_step, "steps": int(result.history["step"].iloc[-1]),
                "validation_loglik": float(best["validation_loglik"]), "stop_reason": result.stop_reason,
            })  # fmt: skip

        folder = cached("sizes", VERSION, parameters, build)
        head = {"base": name, "capacity": capacity.name, "method": method, "seed": seed}
        return pd.read_csv(folder / "accuracy.csv").assign(**head), {**head, **read_json(folder / "facts.json")}

    def run(
        self, bases: Sequence[str], capacities: Sequence[Capacity], seeds: Sequence[int]
    ) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Every base with every capacity: test accuracy by prompt, and one row a fit of what it took."""
        done = [self.fitted(name, capacity, method, seed)
                for name in bases for capacity in capacities for method in METHODS for seed in seeds]  # fmt: skip
        return pd.concat([part for part, _ in done], ignore_index=True), pd.DataFrame([facts for _, facts in done])


def by_capacity(by_prompt: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Accuracy, and the mixture's gain over DPO with the same base and capacity; 95 % intervals over prompts."""
    keys = ["base", "capacity"]
    accuracy = summarise_accuracy(by_prompt, [*keys, "method"])
    gains = []
    for key, part in by_prompt.groupby(keys, sort=False):
        pair = [part[part["method"] == method] for method in ("mix_dpo", "dpo")]
        gains.append(accuracy_gain(*pair).assign(**dict(zip(keys, key, strict=True))))
    return accuracy, pd.concat(gains, ignore_index=True)
