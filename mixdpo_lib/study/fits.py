"""What do the studies share? Base, judges, texts, fits that are kept, and the tables of any fit."""

from __future__ import annotations

import dataclasses
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pandas as pd
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..base.model import Base, load_base
from ..data.pairs import Pairs, Text, Texts
from ..evaluation import align
from ..learning.config import FitConfig
from ..learning.fit import fit
from ..learning.identity import fit_identity, state_hash
from ..learning.result import FitResult
from ..policy.mixture import MixturePolicy
from ..store import (
    artefact_key,
    cache_folder,
    cached,
    read_json,
    remove_folder,
    write_json_atomic,
)
from .judges.contract import REWARDS
from .judges.panel import Judges, judges, score_texts

VERSION = 8  # who has learned nothing is the base to the bit, in every family
FIT_NAMES = {  # flat names of choices that stand in a part of FitConfig
    "start_kind": "start__kind",
    "start_temperature": "start__temperature",
    "tempering_passes": "start__tempering_passes",
    "restarts": "start__restarts",
    "best_step": "stop__best",
}
_NOT_FLAT = ("seed", "name", "latent")  # said by the study itself, or ambiguous
ConfigT = TypeVar("ConfigT")


def choose(default: ConfigT, values: Mapping[str, Any]) -> ConfigT:
    """A study's configuration with other choices by flat name: of its own fields, or of those of its parts.

    Raises
    ------
    ValueError : a name that is no choice; the possible ones are listed.
    """
    places, whole = homes(default), {}
    chosen: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        if name not in places:
            possible = ", ".join(sorted(places))
            raise ValueError(f"{name}={value!r} is no choice of the study; possible are {possible}")
        if part := places[name]:
            chosen.setdefault(part, {})[FIT_NAMES.get(name, name)] = value
        else:
            whole[name] = value
    for name, inner in chosen.items():
        old: Any = getattr(default, name)
        whole[name] = old.change(**inner) if isinstance(old, FitConfig) else replace(old, **inner)
    return replace(default, **whole)  # type: ignore[type-var]


def homes(default: Any) -> dict[str, str]:
    """The part of a study's configuration in which each flat name stands; "" for its own fields."""
    own = {f.name: getattr(default, f.name) for f in fields(default)}
    parts = {name: part for name, part in own.items() if dataclasses.is_dataclass(part)}
    found = {
        f.name: name
        for name, part in parts.items()
        for f in fields(part)
        if f.name not in _NOT_FLAT
    }
    return found | dict.fromkeys(FIT_NAMES, "fit") | dict.fromkeys(set(own) - set(parts), "")


@dataclass(frozen=True)
class Fitted:
    """A fitted method: the policy at its best validation step, its history, and who is served by what.

    design : of the pairs ("" where a study has one). rewards : (texts, K) beta (log pi_k - log pi_ref) of every
    candidate. log_q : (units, K) of each unit from its own training pairs, nats. units : their names.
    order : expert of each hidden group, aligned by the training units' responsibilities; -1 where there is none.
    """

    design: str
    method: str
    seed: int
    policy: MixturePolicy
    result: FitResult
    rewards: Tensor
    log_q: Tensor
    units: list[Any]
    order: list[int]

    @property
    def sharpness(self) -> list[float]:
        """s of each expert, a pure number, see `HeadExperts`; 0 of one that has none."""
        s = getattr(self.policy.experts, "sharpness", None)
        return [0.0] * self.policy.n_experts if s is None else s.detach().tolist()

    def named(self, table: pd.DataFrame) -> pd.DataFrame:
        """The table with the columns design (where there are several), method and seed in front."""
        names = {"design": self.design} if self.design else {}
        head = pd.DataFrame({**names, "method": self.method, "seed": self.seed}, index=table.index)
        return pd.concat([head, table], axis=1)


def kept_fit(
    policy: MixturePolicy, train: Pairs, validation: Pairs, config: FitConfig, texts: Texts
) -> tuple[FitResult, Tensor, float]:
    """Fit `policy` in place, or read the fit from the cache: result, rewards (texts, K), seconds of the fit.

    The policy is left at its best validation step. All that the fit depends on is its identity, see
    `identity.fit_identity`; the checkpoints of a fit that was killed are gone on from, and removed once it is kept.
    """
    parameters = fit_identity(policy, train, validation, config)
    inputs = [texts.key]
    checkpoints = cache_folder() / "checkpoints" / artefact_key("fit", VERSION, parameters, inputs)

    def build(folder: Path) -> None:
        began = time.monotonic()
        result = fit(policy, train, config, validation=validation, folder=checkpoints)
        facts = {
            "stop_reason": result.stop_reason,
            "best_step": result.best_step,
            "summary": result.summary,
        }
        write_json_atomic(folder / "result.json", {**facts, "seconds": time.monotonic() - began})
        result.history.to_csv(folder / "history.csv", index=False)
        result.restarts.to_csv(folder / "restarts.csv", index=False)
        states = {
            f"{s}/{k}": v.clone() for s, state in result.snapshots.items() for k, v in state.items()
        }
        save_file(
            {k: v for k, v in states.items() if "active_ids" not in k},
            folder / "snapshots.safetensors",
        )
        save_file({"rewards": policy.text_rewards(texts)}, folder / "rewards.safetensors")

    folder = cached("fit", VERSION, parameters, build, inputs=inputs)
    remove_folder(checkpoints)  # the fit is in place: nobody needs them any more
    policy.experts.start(train)
    facts = read_json(folder / "result.json")
    snapshots: dict[int, dict[str, Tensor]] = {}
    for name, value in load_file(folder / "snapshots.safetensors").items():
        step, key = name.split("/", 1)
        snapshots.setdefault(int(step), {})[key] = value
    history, restarts = (pd.read_csv(folder / f"{name}.csv") for name in ("history", "restarts"))
    result = FitResult(
        history,
        facts["stop_reason"],
        facts["best_step"],
        restarts,
        snapshots,
        summary=facts["summary"],
    )
    result.restore(policy)
    return result, load_file(folder / "rewards.safetensors")["rewards"], float(facts["seconds"])


def kept_rewards(policy: MixturePolicy, texts: Texts) -> Tensor:
    """`policy.text_rewards(texts)`, kept in the cache: of a policy that no fit left as it is."""
    parameters = {
        "state": state_hash(policy),
        "experts": policy.experts.describe(),
        "base": policy.base.fingerprint,
        "beta": policy.beta,
    }

    def build(folder: Path) -> None:
        save_file({"rewards": policy.text_rewards(texts)}, folder / "rewards.safetensors")

    folder = cached("implicit_rewards", VERSION, parameters, build, inputs=[texts.key])
    return load_file(folder / "rewards.safetensors")["rewards"]


class Study(ABC):
    """The arrows of a study, each computed once and kept in the cache.

    A study gives its candidates, its preference sets, its methods' gates and configurations; base, judges, texts, fits
    and the tables of any fit are here.
    """

    unit: ClassVar[str | None]  # whose posterior aligns experts with groups; None: of each pair
    group_column: ClassVar[str]
    groups: Sequence[str]
    designs: Sequence[str]
    default: ClassVar[Any]  # the study's configuration as it is where nothing else is said

    def __init__(self, config: Any) -> None:
        self.config = config
        self._pairs: dict[tuple[str, int], dict[str, Pairs]] = {}
        self._fitted: dict[tuple[str, str, int], Fitted] = {}

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Any], **choices: Any) -> Study:
        """The study of a notebook: its own parameters, what it shares (`common`), and `choices`.

        Parameters of the notebook's own that are no choice of the study are for its display and are left out. Nothing
        else is: a name in `common` or `choices` that is no choice is an error.
        """
        own = {
            name: value
            for name, value in cls.own_parameters(parameters).items()
            if name in homes(cls.default)
        }
        return cls(choose(cls.default, {**own, **parameters.get("common", {}), **choices}))

    @classmethod
    def own_parameters(cls, parameters: Mapping[str, Any]) -> Mapping[str, Any]:
        """A notebook's own parameters by the names of the study's choices; the same, by default."""
        return parameters

    @cached_property
    def base(self) -> Base:
        """The frozen base model."""
        return load_base(self.config.base)

    @cached_property
    def judges(self) -> Judges:
        """The rewards, each with a training and an evaluation judge, fitted on reviews of films."""
        rewards = getattr(self.config, "rewards", REWARDS)
        return judges(self.config.reviews, self.config.judges, rewards)

    @property
    @abstractmethod
    def candidates(self) -> pd.DataFrame:
        """What can be answered: prompt_id, prompt, response, one row a continuation."""

    @abstractmethod
    def preferences(self, design: str, seed: int = 0) -> Mapping[str, Dataset]:
        """The preference sets of a design that fits of this seed learn from: train, validation and test among them."""

    @property
    @abstractmethod
    def methods(self) -> Mapping[str, Any]:
        """The methods that are compared, by name."""

    @abstractmethod
    def new_policy(self, method: str, train: Pairs) -> MixturePolicy:
        """An untrained policy of a method."""

    @abstractmethod
    def fit_config(self, method: str, seed: int) -> FitConfig:
        """How a method is fitted."""

    @cached_property
    def scores(self) -> pd.DataFrame:
        """What the training judges say of prompt and response together: the hidden rewards."""
        return self.judged(self.candidates["prompt"], self.candidates["response"], "training")

    def judged(self, prompts: Sequence[str], responses: Sequence[str], role: str) -> pd.DataFrame:
        """What the judges of a role ("training", "evaluation") say of each prompt and response together."""
        whole = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
        return score_texts(whole, getattr(self.judges, role))

    @cached_property
    def texts(self) -> Texts:
        """All candidates."""
        table = self.candidates
        return Texts.of(
            Text(p, r, False) for p, r in zip(table["prompt"], table["response"], strict=True)
        )

    def pairs(self, design: str = "", seed: int = 0) -> dict[str, Pairs]:
        """`preferences` of a design (of the only one, by default) and a seed, over the candidates' texts."""
        key = (design or self.designs[0], seed)
        if key not in self._pairs:
            sets = self.preferences(*key)
            self._pairs[key] = {name: Pairs.of(rows, self.texts) for name, rows in sets.items()}
        return self._pairs[key]

    # ------------------------------------------------------------------------------------------------------- fits

    def fitted(self, method: str, seed: int, design: str = "") -> Fitted:
        """Fit a method on the training pairs of a design and seed, or read the fit from the cache."""
        design = design or self.designs[0]
        if method not in self.methods:
            raise ValueError(f"method={method!r}: possible are {list(self.methods)}")
        key = (design, method, seed)
        if key not in self._fitted:
            policy, result, rewards = self.learned(method, seed, design)
            train = self.pairs(design, seed)["train"]
            log_q, units = policy.log_posterior(train, self.unit, rewards)
            of = group_of(train, self.unit, self.group_column)
            order = align(log_q.exp().numpy(), [of[unit] for unit in units], self.groups)
            self._fitted[key] = Fitted(
                design, method, seed, policy, result, rewards, log_q, units, order
            )
        return self._fitted[key]

    def learned(
        self, method: str, seed: int, design: str
    ) -> tuple[MixturePolicy, FitResult, Tensor]:
        """A method's policy, what its fit left, and the rewards (texts, K) of all candidates; from the cache if there."""
        sets = self.pairs(design, seed)
        policy, config = self.new_policy(method, sets["train"]), self.fit_config(method, seed)
        validation = sets["validation"]
        result, rewards, _ = kept_fit(policy, sets["train"], validation, config, self.texts)
        return policy, result, rewards

    def fits(self, methods: Sequence[str], seeds: Sequence[int]) -> list[Fitted]:
        """Every method on every design with every seed."""
        return [self.fitted(m, s, d) for d in self.designs for m in methods for s in seeds]

    @staticmethod
    def history(fits: Sequence[Fitted]) -> pd.DataFrame:
        """Every evaluation of every fit, one row each."""
        return pd.concat([f.named(f.result.history) for f in fits], ignore_index=True)

    @staticmethod
    def restarts(fits: Sequence[Fitted]) -> pd.DataFrame:
        """Every restart of every fit, with the kept one marked."""
        return pd.concat([f.named(f.result.restarts) for f in fits], ignore_index=True)

    @staticmethod
    def stop_reasons(fits: Sequence[Fitted]) -> dict[str, str]:
        """Why each fit ended."""
        return {
            "/".join(
                str(part) for part in (f.design, f.method, f.seed) if part != ""
            ): f.result.stop_reason
            for f in fits
        }


def group_of(data: Pairs, unit: str | None, column: str = "group") -> dict[Any, str]:
    """Hidden group of each unit of a preference set (of each pair, by its row), in order of first appearance."""
    groups = list(data.rows[column])
    units = range(len(groups)) if unit is None else data.rows[unit]
    return dict(zip(units, groups, strict=True))


def unit_log_w(policy: MixturePolicy, data: Pairs, unit: str = "user") -> tuple[Tensor, list[str]]:
    """(units, K): the gate's weights of every unit before any pair of its own counts, nats; and the units' names."""
    ids, names = data.units(unit)
    first = torch.tensor([int((ids == i).nonzero()[0]) for i in range(len(names))])
    return policy.log_w(data).detach()[first], names
