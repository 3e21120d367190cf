"""All judges together: fitted, kept, asked."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset
from safetensors.numpy import load_file, save_file

from ...store import MixDPOError, cached, progress, read_json
from ..reviews import dataset_key, load_reviews
from .contract import ROLES, Judge, JudgeConfig, check_texts, split_reviews
from .grammar import GrammarEvaluation, GrammarTraining
from .informativeness import InformativenessEvaluation, InformativenessTraining
from .sentiment import SentimentEvaluation, SentimentTraining

VERSION = 5
_TRAINING: tuple[type[Judge], ...] = (SentimentTraining, InformativenessTraining, GrammarTraining)
_EVALUATION: tuple[type[Judge], ...] = (SentimentEvaluation, InformativenessEvaluation, GrammarEvaluation)


@dataclass(frozen=True)
class Judges:
    """`training["sentiment"]`, `evaluation["grammar"]`, ...: one judge a reward and role."""

    training: Mapping[str, Judge]
    evaluation: Mapping[str, Judge]
    config: JudgeConfig

    def save(self, folder: str | Path) -> None:
        """One .safetensors and one .json a judge, and `judges.json`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for judge in [*self.training.values(), *self.evaluation.values()]:
            arrays, values = judge.state()
            stem = folder / judge.name.replace("/", "_")
            save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, stem.with_suffix(".safetensors"))
            stem.with_suffix(".json").write_text(json.dumps(values), encoding="utf-8")
        (folder / "judges.json").write_text(json.dumps(dataclasses.asdict(self.config)), encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> Judges:
        """What `save` wrote. A missing or damaged file gives a MixDPOError that names it."""
        folder = Path(folder)
        made: dict[str, dict[str, Judge]] = {role: {} for role in ROLES}
        for kind in (*_TRAINING, *_EVALUATION):
            stem = folder / f"{kind.reward}_{kind.role}"
            try:
                judge = kind.from_state(
                    load_file(stem.with_suffix(".safetensors")), read_json(stem.with_suffix(".json"))
                )
            except (OSError, KeyError, TypeError, ValueError) as error:
                raise MixDPOError(
                    f"{stem}: found no readable judge ({error}); expected .safetensors and .json as written by "
                    "Judges.save; delete the folder and fit the judges again"
                ) from error
            made[kind.role][kind.reward] = judge
        return cls(**made, config=JudgeConfig(**read_json(folder / "judges.json")))


def fit_judges(reviews: Dataset, config: JudgeConfig | None = None) -> Judges:
    """Fit every judge on its own part of `reviews` (columns text, label; see `split_reviews`). About a minute."""
    config = config or JudgeConfig()
    parts = split_reviews(reviews, config=config)
    kinds = [(kind, "training_judge") for kind in _TRAINING] + [(kind, "evaluation_judge") for kind in _EVALUATION]
    made: dict[str, dict[str, Judge]] = {role: {} for role in ROLES}
    for done, (kind, part) in enumerate(kinds):
        progress("judges", done, len(kinds), f"fitting {kind.reward}/{kind.role} on {len(parts[part]):,} reviews")
        made[kind.role][kind.reward] = kind.fit(parts[part], config)  # type: ignore[attr-defined]
    progress("judges", len(kinds), len(kinds), "fitted")
    return Judges(**made, config=config)


def judges(source: str | os.PathLike[str] = "imdb-packaged", config: JudgeConfig | None = None) -> Judges:
    """The judges fitted on `source`, from the cache where they are there, fitted and kept where they are not."""
    config = config or JudgeConfig()
    reviews = load_reviews(source)
    folder = cached(
        "judges", VERSION, dataclasses.asdict(config), lambda path: fit_judges(reviews, config).save(path),
        inputs=[dataset_key(reviews)],
    )  # fmt: skip
    return Judges.load(folder)


def score_texts(texts: Sequence[Any], by: Mapping[str, Judge]) -> pd.DataFrame:
    """Every text by every judge of `by` (for example `judges.training`): one column a reward, one row a text.

    Raises
    ------
    ValueError : an empty or non-text row (its number is named), or a score that is not finite.
    """
    texts = check_texts(texts, "score_texts")
    return pd.DataFrame({reward: judge.score(texts) for reward, judge in by.items()})
