"""What does every judge give, and which reviews is it fitted on?"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset
from jaxtyping import Float

REWARDS = ("sentiment", "informativeness", "grammar")
ROLES = ("training", "evaluation")
PARTS = ("training_judge", "evaluation_judge", "report", "prompts")
State = tuple[dict[str, np.ndarray], dict[str, Any]]  # what is kept on disk: arrays, and plain values


@dataclass(frozen=True)
class JudgeConfig:
    """How the judges are fitted. Every number has its origin beside it."""

    piece_words: int = 32  # pieces of 0.6 to 1.5 times this are fitted on; the study judges about 27 words
    training_reviews: int = 10_000  # 8,000 give .76 on 40-token pieces, 10,000 give .77 (report card)
    evaluation_reviews: int = 9_500  # as many as are left beside the report and the prompts
    report_reviews: int = 2_000  # standard error of an accuracy of .77: .009
    pieces_per_review: int = 6  # pieces of 0.6 to 1.5 times piece_words beside the whole review; 8 gain nothing
    min_reviews: int = 5  # a word is in the vocabulary when that many reviews use it: keeps names, drops slips
    seed: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            low = 0 if field.name == "seed" else 1
            if getattr(self, field.name) < low:
                raise ValueError(f"JudgeConfig: {field.name}={getattr(self, field.name)}; expected at least {low}")


def split_reviews(reviews: Dataset, seed: int | None = None, config: JudgeConfig | None = None) -> dict[str, Dataset]:
    """Four disjoint parts of the reviews: `training_judge`, `evaluation_judge`, `report`, `prompts` (all that is left).

    The seed is `config`'s when none is given: judges and prompts must come from one split. Sizes are `config`'s too
    (25,000 reviews: 10,000, 9,500, 2,000 and about 3,400), scaled down together when there are too few reviews. A text
    that occurs twice is used once, so that no text is in two parts.

    Raises
    ------
    ValueError : fewer than 50 different reviews.
    """
    config = config or JudgeConfig()
    seen: dict[str, int] = {}
    for row, text in enumerate(reviews["text"]):
        seen.setdefault(text, row)
    rows = np.random.default_rng(config.seed if seed is None else seed).permutation(np.fromiter(seen.values(), int))
    wanted = np.array([config.training_reviews, config.evaluation_reviews, config.report_reviews])
    if len(rows) < 50:
        raise ValueError(f"split_reviews: found {len(rows)} different reviews, expected at least 50 to fit judges on")
    share = min(1.0, 0.88 * len(rows) / wanted.sum())  # at least 12 % are left for prompts
    ends = np.cumsum((wanted * share).astype(int))
    return {name: reviews.select(sorted(part.tolist())) for name, part in zip(PARTS, np.split(rows, ends), strict=True)}


def check_texts(texts: Sequence[Any], place: str = "score") -> list[str]:
    """`texts` as a list; refuses what is no text or has nothing in it, with its row number (0 is the first)."""
    if isinstance(texts, str):
        raise ValueError(f"{place}: found one text, expected a list of texts; write [text]")
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"{place}: row {row}: found {type(text).__name__}, expected a text; drop or fill that row")
        if not text.strip():
            raise ValueError(f"{place}: row {row}: found an empty text, expected at least one word; drop that row")
    return list(texts)


class Judge(ABC):
    """Gives every text one number; larger is better. Deterministic, independent of the other texts in the call."""

    reward: ClassVar[str]
    role: ClassVar[str]
    unit: ClassVar[str]
    family: ClassVar[str]

    @property
    def name(self) -> str:
        """For example "sentiment/training"."""
        return f"{self.reward}/{self.role}"

    def score(self, texts: Sequence[Any]) -> Float[np.ndarray, "texts"]:
        """One float64 a text, in `unit`.

        Raises
        ------
        ValueError : an empty or non-text row (its number is named), or a score that is not finite.
        """
        values = np.asarray(self._score(check_texts(texts, self.name)), dtype=np.float64)
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            raise ValueError(
                f"{self.name}: row {bad[0]}: found {values[bad[0]]}, expected a finite score; "
                f"fit the judge anew, or drop the text {texts[bad[0]][:40]!r}"
            )
        return values

    @abstractmethod
    def _score(self, texts: list[str]) -> np.ndarray: ...

    @abstractmethod
    def state(self) -> State:
        """Arrays and plain values that `from_state` makes the judge from."""

    @classmethod
    @abstractmethod
    def from_state(cls, arrays: dict[str, np.ndarray], values: dict[str, Any]) -> Judge: ...


def least_reviews(reviews: Dataset, config: JudgeConfig) -> int:
    """In how many texts a term must occur; two where there are few reviews (tests, small sources)."""
    return config.min_reviews if len(reviews) >= 1000 else min(2, config.min_reviews)
