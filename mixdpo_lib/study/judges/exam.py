"""On which texts is a judge examined, and how is it marked?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

import numpy as np
from datasets import Dataset
from jaxtyping import Float, Int
from scipy.stats import rankdata

from .corruptions import CORRUPTIONS, DAMAGE
from .probes import PROBES, diluted, generic, padded, repeated, written_pairs
from .words import common_words, piece, sentences


@dataclass(frozen=True)
class Exam:
    """Texts that fitted no judge, and worse versions of them: the same for every judge.

    A version is None where its text offers no place for that kind.
    """

    texts: list[str]  # whole reviews
    labels: Int[np.ndarray, "texts"]  # of each review: 1 liked, 0 not
    piece_words: int
    pieces: list[str]  # of `piece_words` words, from random places of some of the reviews
    sentences: list[str]  # of the same reviews, one each
    corrupted: Mapping[str, list[str | None]]  # kind of corruption or damage -> of each sentence
    emptied: Mapping[str, list[tuple[str, str]]]  # kind of loss of content -> (text, worse version)
    tampered: Mapping[str, list[str | None]]  # probe -> of each piece
    rng: Random  # for what a judge draws for itself

    @classmethod
    def draw(cls, reviews: Dataset, piece_words: int, n: int, seed: int) -> Exam:
        """`n` pieces and sentences of `reviews` (columns `text`, `label`), or what there is.

        Raises
        ------
        ValueError : fewer than 20 sentences or pieces can be drawn.
        """
        rng, texts = Random(seed), list(reviews["text"])
        chosen = [texts[row] for row in rng.sample(range(len(texts)), min(n, len(texts)))]
        pieces = [piece(text, piece_words, rng) for text in chosen]
        real = [rng.choice(found) for text in chosen if (found := sentences(text))]
        if min(len(pieces), len(real)) < 20:
            raise ValueError(
                f"report_card: found {len(real)} sentences in {len(texts)} reviews, expected at "
                "least 20"
            )
        kinds = {**CORRUPTIONS, **DAMAGE}
        return cls(
            texts=texts,
            labels=np.asarray(reviews["label"]),
            piece_words=piece_words,
            pieces=pieces,
            sentences=real,
            corrupted={kind: [make(text, rng) for text in real] for kind, make in kinds.items()},
            emptied=_emptied(pieces, texts, rng),
            tampered={kind: [make(text, rng) for text in pieces] for kind, make in PROBES.items()},
            rng=rng,
        )


def _emptied(
    texts: Sequence[str], reviews: Sequence[str], rng: Random
) -> dict[str, list[tuple[str, str]]]:
    common = common_words(reviews)
    return {
        "filler after it": [(text, padded(text, rng)) for text in texts],
        "half filler": [(text, diluted(text, rng)) for text in texts],
        "a part repeated": [(text, repeated(text, rng)) for text in texts],
        "generic words": [(text, generic(text, rng, common)) for text in texts],
        "hand-written": written_pairs(max(20, len(texts) // 4), rng),
    }


class Mark(NamedTuple):
    """One thing that a judge was examined in: a share between 0 and 1, larger is better."""

    measure: str  # "accuracy", "paired rank" or "auc"
    task: str
    n: int  # texts or pairs
    statistic: Callable[[Int[np.ndarray, "drawn"]], float]  # of any rows of them: for the bootstrap

    @classmethod
    def mean(cls, measure: str, task: str, right: Float[np.ndarray, "texts"]) -> Mark:
        """The mean of what is 1 where the judge is right of a text, and 0 where it is not.

        >>> Mark.mean("accuracy", "whole reviews", np.array([1.0, 0.0])).statistic(np.arange(2))
        0.5
        """
        return cls(measure, task, len(right), lambda rows: float(right[rows].mean()))

    @classmethod
    def paired_rank(
        cls, task: str, better: Float[np.ndarray, "pairs"], worse: Float[np.ndarray, "pairs"]
    ) -> Mark:
        """How often a text scores above its own worse version; see `paired_rank`."""
        return cls.mean("paired rank", task, paired_rank(better, worse))

    @classmethod
    def auc(
        cls, task: str, better: Float[np.ndarray, "pairs"], worse: Float[np.ndarray, "pairs"]
    ) -> Mark:
        """How often a text scores above the worse version of any text; see `auc`."""
        return cls("auc", task, len(better), lambda rows: auc(better[rows], worse[rows]))


def paired_rank(
    better: Float[np.ndarray, "pairs"], worse: Float[np.ndarray, "pairs"]
) -> Float[np.ndarray, "pairs"]:
    """1 where the better text scores above its own worse version, 0.5 where they tie, else 0.

    >>> paired_rank(np.array([2.0, 1.0, 0.0]), np.array([1.0, 1.0, 1.0])).tolist()
    [1.0, 0.5, 0.0]
    """
    return (better > worse) + 0.5 * (better == worse)


def auc(good: Float[np.ndarray, "good"], bad: Float[np.ndarray, "bad"]) -> float:
    """Probability that a random good text scores above a random bad one; ties count half.

    The area under the receiver operating characteristic, by ranks (Mann and Whitney).

    >>> auc(np.array([3.0, 1.0]), np.array([2.0, 1.0]))
    0.625
    """
    both = rankdata(np.concatenate([good, bad]))
    above = both[: len(good)].sum() - len(good) * (len(good) + 1) / 2
    return float(above / (len(good) * len(bad)))
