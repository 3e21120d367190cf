"""What does every judge give, which judges are there, and which reviews are they fitted on?"""

from __future__ import annotations

import dataclasses
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset
from jaxtyping import Float

from .exam import Exam, Mark

REWARDS = ("sentiment", "informativeness", "grammar")  # of the study: a file each in this folder
ROLES = ("training", "evaluation")
PARTS = ("training_judge", "evaluation_judge", "report", "prompts")
State = tuple[dict[str, np.ndarray], dict[str, Any]]  # what is kept: arrays, and plain values


@dataclass(frozen=True)
class JudgeConfig:
    """How the judges are fitted: whole numbers, at least 1 (the seed 0). Origins stand beside them.

    Raises
    ------
    ValueError : a number below its least value, by name.
    """

    piece_words: int = 32  # fitted on pieces of 0.6 to 1.5 times this; some 27 are judged
    training_reviews: int = 10_000  # 8,000 give .76 on 40-token pieces, 10,000 .77 (report card)
    evaluation_reviews: int = 9_500  # as many as are left beside the report and the prompts
    report_reviews: int = 2_000  # standard error of an accuracy of .77: .009
    pieces_per_review: int = 6  # pieces beside the whole review; 8 gain nothing
    min_reviews: int = 5  # a word is known when that many reviews use it: keeps names, drops slips
    seed: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            low, value = 0 if field.name == "seed" else 1, getattr(self, field.name)
            if value < low:
                raise ValueError(f"JudgeConfig: {field.name}={value}; expected at least {low}")


def split_reviews(
    reviews: Dataset, seed: int | None = None, config: JudgeConfig | None = None
) -> dict[str, Dataset]:
    """Four disjoint parts of the reviews, by the names in PARTS; `prompts` holds all that is left.

    The seed is `config`'s when none is given: judges and prompts must come from one split. Sizes
    are `config`'s too (25,000 reviews: 10,000, 9,500, 2,000 and about 3,400), scaled down together
    when there are too few reviews. A text that occurs twice is used once, so that no text is in two
    parts.

    Raises
    ------
    ValueError : fewer than 50 different reviews.
    """
    config = config or JudgeConfig()
    seen: dict[str, int] = {}
    for row, text in enumerate(reviews["text"]):
        seen.setdefault(text, row)
    rng = np.random.default_rng(config.seed if seed is None else seed)
    rows = rng.permutation(np.fromiter(seen.values(), int))
    wanted = np.array([config.training_reviews, config.evaluation_reviews, config.report_reviews])
    if len(rows) < 50:
        raise ValueError(
            f"split_reviews: found {len(rows)} different reviews, expected at least 50 to fit "
            "judges on"
        )
    share = min(1.0, 0.88 * len(rows) / wanted.sum())  # at least 12 % are left for prompts
    ends = np.cumsum((wanted * share).astype(int))
    return {
        name: reviews.select(sorted(part.tolist()))
        for name, part in zip(PARTS, np.split(rows, ends), strict=True)
    }


def least_reviews(reviews: Dataset, config: JudgeConfig) -> int:
    """In how many texts a term must occur; two where there are few reviews."""
    return config.min_reviews if len(reviews) >= 1000 else min(2, config.min_reviews)


def check_texts(texts: Sequence[Any], place: str = "score") -> list[str]:
    """`texts` as a list; refuses what is no text or empty, with its row number (0 is the first)."""
    if isinstance(texts, str):
        raise ValueError(f"{place}: found one text, expected a list of texts; write [text]")
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(
                f"{place}: row {row}: found {type(text).__name__}, expected a text; drop or fill "
                "that row"
            )
        if not text.strip():
            raise ValueError(
                f"{place}: row {row}: found an empty text, expected at least one word; drop "
                "that row"
            )
    return list(texts)


class Judge(ABC):
    """Gives every text one number; larger is better. Deterministic, and each text by itself.

    A reward is two such classes of different families, one for each role: the training judge makes
    the labels, the evaluation judge says what a policy's text is worth.

    A class brings `reward`, `role` ("training" or "evaluation"), `unit` (of its scores), `family`
    (what kind of instrument it is), and the five methods `fit`, `rate`, `examine`, `state` and
    `from_state`; `bars` are what is asked of it in the report card, by task. Inherited: its `name`,
    a place in `fit_judges` (which finds it by its reward), checks of texts and scores, files,
    intervals and probes in the report card. What lacks a reward or a role is a base of judges, and
    has no place.

    Raises
    ------
    TypeError : at its definition: a role that there is not, no unit or family, a reward that cannot
        name a file, or one that another class has already.
    """

    reward: ClassVar[str]
    role: ClassVar[str]
    unit: ClassVar[str]
    family: ClassVar[str]
    bars: ClassVar[Mapping[str, float]] = {}  # task -> what it should reach
    version: ClassVar[int] = 1  # of a judge outside the library: raise it when `fit` gives others
    name: ClassVar[str]  # "sentiment/training"

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if hasattr(cls, "reward") and hasattr(cls, "role"):
            _register(cls)

    @classmethod
    @abstractmethod
    def fit(cls, reviews: Dataset, config: JudgeConfig) -> Judge:
        """The judge of these reviews (columns `text`, `label`: 1 liked, 0 not).

        The same reviews and the same `config.seed` give the same judge.
        """

    @abstractmethod
    def rate(self, texts: list[str]) -> np.ndarray:
        """One number a text, in `unit`; no text is empty. `score` checks both."""

    @abstractmethod
    def examine(self, exam: Exam) -> Iterable[Mark]:
        """What it gets right of the exam: its rows of the table `validity` of the report card."""

    @abstractmethod
    def state(self) -> State:
        """Arrays and plain values that `from_state` makes the judge from."""

    @classmethod
    @abstractmethod
    def from_state(cls, arrays: dict[str, np.ndarray], values: dict[str, Any]) -> Judge:
        """The judge that gave this `state`."""

    def score(self, texts: Sequence[Any]) -> Float[np.ndarray, "texts"]:
        """One float64 a text, in `unit`; none for no texts.

        Raises
        ------
        ValueError : an empty or non-text row (its number is named), or a score that is not finite.
        """
        checked = check_texts(texts, self.name)
        values = np.asarray(self.rate(checked) if checked else [], dtype=np.float64)
        if values.shape != (len(checked),):
            raise ValueError(
                f"{self.name}: found scores of shape {values.shape} for {len(checked)} texts, "
                "expected one number a text; mend its `rate`"
            )
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            raise ValueError(
                f"{self.name}: row {bad[0]}: found {values[bad[0]]}, expected a finite score; "
                f"fit the judge anew, or drop the text {checked[bad[0]][:40]!r}"
            )
        return values

    def score_versions(
        self, own: Float[np.ndarray, "texts"], versions: Sequence[str | None]
    ) -> tuple[Float[np.ndarray, "versions"], Float[np.ndarray, "versions"]]:
        """Scores of the texts that have a version (taken from `own`), and scores of those versions.

        Parameters
        ----------
        own : scores of the texts. versions : one a text, None where it has none.
        """
        there = np.array([version is not None for version in versions], dtype=bool)
        return own[there], self.score([version for version in versions if version is not None])


_REGISTERED: dict[tuple[str, str], type[Judge]] = {}


def _register(kind: type[Judge]) -> None:
    """Give a judge its name and its place; one that is defined anew (a cell) replaces itself."""
    place = f"{kind.__module__}.{kind.__qualname__}"
    if kind.role not in ROLES:
        raise TypeError(f"{place}: role={kind.role!r}; expected one of {ROLES}")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", kind.reward):
        raise TypeError(f"{place}: reward={kind.reward!r}; expected small letters, digits and _")
    for what in ("unit", "family"):
        if not getattr(kind, what, ""):
            raise TypeError(f"{place}: no {what}; expected a few words, such as {what} = ...")
    other = _REGISTERED.get((kind.reward, kind.role), kind)
    if (other.__module__, other.__qualname__) != (kind.__module__, kind.__qualname__):
        raise TypeError(
            f"{place}: the {kind.role} judge of {kind.reward!r} is already "
            f"{other.__module__}.{other.__qualname__}; give the reward another name"
        )
    kind.name = f"{kind.reward}/{kind.role}"
    _REGISTERED[kind.reward, kind.role] = kind


def registered_judges() -> dict[str, type[Judge]]:
    """Every judge that has been defined so far, by name ("sentiment/training")."""
    return {kind.name: kind for kind in _REGISTERED.values()}


def judge_classes(rewards: Sequence[str]) -> list[type[Judge]]:
    """The training judges of the rewards, in this order, then their evaluation judges.

    Raises
    ------
    ValueError : no reward, one twice, or one of which a judge is not defined.
    """
    if isinstance(rewards, str) or not rewards or len(set(rewards)) < len(rewards):
        raise ValueError(f"rewards={rewards!r}; expected different names, such as {REWARDS}")
    for reward in rewards:
        for role in ROLES:
            if (reward, role) not in _REGISTERED:
                known = ", ".join(dict.fromkeys(reward for reward, _ in _REGISTERED))
                raise ValueError(
                    f"rewards: no {role} judge of {reward!r} is defined; known are {known}; import "
                    "the module that defines it first"
                )
    return [_REGISTERED[reward, role] for role in ROLES for reward in rewards]
