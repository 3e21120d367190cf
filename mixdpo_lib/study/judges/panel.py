"""How are all judges fitted, kept and asked together?"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset
from safetensors.numpy import load_file, save_file

from ...store import MixDPOError, cached, progress, read_json
from ..reviews import dataset_key, load_reviews
from .contract import (
    REWARDS,
    ROLES,
    Judge,
    JudgeConfig,
    check_texts,
    judge_classes,
    registered_judges,
    split_reviews,
)

VERSION = 5
for _reward in REWARDS:  # a file each, which registers its judges
    import_module(f"{__package__}.{_reward}")


@dataclass(frozen=True)
class Judges:
    """`training["sentiment"]`, `evaluation["grammar"]`, ...: one judge a reward and role."""

    training: Mapping[str, Judge]
    evaluation: Mapping[str, Judge]
    config: JudgeConfig

    @classmethod
    def of(cls, judges: Sequence[Judge], config: JudgeConfig) -> Judges:
        """These judges, each in its place."""
        by_role = {role: {j.reward: j for j in judges if j.role == role} for role in ROLES}
        return cls(**by_role, config=config)

    @property
    def everyone(self) -> list[Judge]:
        """The training judges, then the evaluation judges."""
        return [*self.training.values(), *self.evaluation.values()]

    def save(self, folder: str | Path) -> None:
        """A .safetensors and a .json a judge; `judges.json`: configuration, and who is there."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for judge in self.everyone:
            arrays, values = judge.state()
            arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
            save_file(arrays, _file(folder, judge.name, ".safetensors"))
            _file(folder, judge.name, ".json").write_text(json.dumps(values), encoding="utf-8")
        who = {judge.name: type(judge).__module__ for judge in self.everyone}
        record = {**dataclasses.asdict(self.config), "judges": who}
        (folder / "judges.json").write_text(json.dumps(record), encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> Judges:
        """The judges that `save` wrote into the folder. Nothing is imported by a name in a file.

        Raises
        ------
        MixDPOError : a file is missing or damaged (it is named), or no judge of that name is
            defined (the error says which module to import first).
        """
        folder = Path(folder)
        record = read_json(folder / "judges.json")
        first = {f"{reward}/{role}": "" for role in ROLES for reward in REWARDS}
        who = record.pop("judges", first)  # folders of before held these and did not say so
        known, made = registered_judges(), []
        for name, module in who.items():
            if name not in known:
                raise MixDPOError(
                    f"{folder}: holds the judge {name!r}, which nothing that is imported defines; "
                    f"import its module ({module}) first, then load again"
                )
            made.append(_load(known[name], folder))
        try:
            return cls.of(made, JudgeConfig(**record))
        except (TypeError, ValueError) as error:
            raise MixDPOError(
                f"{folder / 'judges.json'}: found no configuration of judges ({error}); delete the "
                "folder and fit the judges again"
            ) from error


def _file(folder: Path, name: str, ending: str) -> Path:
    return folder / (name.replace("/", "_") + ending)


def _load(kind: type[Judge], folder: Path) -> Judge:
    arrays, values = (_file(folder, kind.name, ending) for ending in (".safetensors", ".json"))
    try:
        return kind.from_state(load_file(arrays), read_json(values))
    except (MixDPOError, OSError, KeyError, TypeError, ValueError) as error:
        raise MixDPOError(
            f"{values.with_suffix('')}: found no readable judge ({error}); expected .safetensors "
            "and .json as written by Judges.save; delete the folder and fit the judges again"
        ) from error


def fit_judges(
    reviews: Dataset, config: JudgeConfig | None = None, rewards: Sequence[str] = REWARDS
) -> Judges:
    """Fit both judges of every reward, each role on its own part of `reviews`. About a minute.

    Parameters
    ----------
    reviews : columns text, label; see `split_reviews`.
    rewards : names of rewards whose judges are defined: the study's, or your own (see `Judge`).
        Their order is kept.

    Raises
    ------
    ValueError : a reward that no imported module defines, or fewer than 50 different reviews.
    """
    config = config or JudgeConfig()
    kinds, parts, made = judge_classes(rewards), split_reviews(reviews, config=config), []
    for done, kind in enumerate(kinds):
        part = parts[f"{kind.role}_judge"]
        progress("judges", done, len(kinds), f"fitting {kind.name} on {len(part):,} reviews")
        made.append(kind.fit(part, config))
    progress("judges", len(kinds), len(kinds), "fitted")
    return Judges.of(made, config)


def judges(
    source: str | os.PathLike[str] = "imdb-packaged",
    config: JudgeConfig | None = None,
    rewards: Sequence[str] = REWARDS,
) -> Judges:
    """The judges fitted on `source`: from the cache, or fitted and kept there.

    Parameters
    ----------
    source : of reviews, as for `load_reviews`. config, rewards : as for `fit_judges`.
    """
    config = config or JudgeConfig()
    parameters: dict[str, Any] = dataclasses.asdict(config)
    if tuple(rewards) != REWARDS:  # the study's own are named by VERSION
        kinds = judge_classes(rewards)
        parameters["judges"] = {kind.name: [kind.__module__, kind.version] for kind in kinds}
    reviews = load_reviews(source)
    folder = cached(
        "judges",
        VERSION,
        parameters,
        lambda path: fit_judges(reviews, config, rewards).save(path),
        inputs=[dataset_key(reviews)],
    )
    return Judges.load(folder)


def score_texts(texts: Sequence[Any], by: Mapping[str, Judge]) -> pd.DataFrame:
    """Every text by every judge of `by` (`judges.training`): one column a reward, one row a text.

    Raises
    ------
    ValueError : an empty or non-text row (its number is named), or a score that is not finite.
    """
    texts = check_texts(texts, "score_texts")
    return pd.DataFrame({reward: judge.score(texts) for reward, judge in by.items()})
