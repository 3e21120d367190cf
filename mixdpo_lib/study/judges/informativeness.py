"""Does a text say something? Two judges of informativeness."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Dataset
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS
from torch import Tensor
from torch.nn import functional as F

from .contract import Judge, JudgeConfig, State, least_reviews
from .corruptions import EMOJI, SYMBOLS
from .exam import Exam, Mark, paired_rank
from .nets import Encoder, NetJudge, TextNet, fit_net, pad
from .probes import FILLER_FIT, STAND_INS_FIT, diluted, generic, padded, repeated
from .words import WORD, common_words, count_reviews, piece

_SAYS_LITTLE = frozenset(
    "movie movies film films really very quite just like good bad great thing things lot lots bit way watch watched "
    "watching seen make made makes making got get gets getting say said know think thought people time times best "
    "worst better".split()
)


class Informativeness(Judge):
    """What both judges are asked: does a text score above a version of itself that says less?"""

    reward = "informativeness"
    bars = {"all kinds": 0.90}

    def examine(self, exam: Exam) -> Iterator[Mark]:
        """Paired rank by kind of loss of content, and over all of them."""
        ranks = {
            task: paired_rank(self.score([a for a, _ in pairs]), self.score([b for _, b in pairs]))
            for task, pairs in exam.emptied.items()
        }
        ranks["all kinds"] = np.concatenate(list(ranks.values()))
        for task, rank in ranks.items():
            yield Mark.mean("paired rank", task, rank)


class InformativenessTraining(Informativeness):
    """Distinct content words, weighted by inverse document frequency, per word of the text.

    score = sum over distinct content words w of ln(N / n_w) / max(words, `shortest`); n_w of N reviews hold w. A
    content word is in at least `min_reviews` and at most 10 % of the reviews and is no stop word: a non-word, a symbol
    or a second mention counts in the length alone, so padding and repeating cost. Derived here; tested by hand.

    Limit: a bare list of rare words beats every sentence (report card: the shuffle costs nothing).
    """

    role, unit, family = "training", "nats per word", "inverse document frequency"
    shortest = 16  # words; below, the text counts as this long: three rare words are not a review

    def __init__(self, words: Sequence[str], idf: np.ndarray) -> None:
        self.idf = dict(zip(words, np.asarray(idf, np.float64).tolist(), strict=True))

    @classmethod
    def fit(cls, reviews: Dataset, config: JudgeConfig) -> InformativenessTraining:
        """Count in how many of the reviews each content word is.

        Raises
        ------
        ValueError : no content word that `config.min_reviews` of them share.
        """
        counts, n = count_reviews(reviews["text"]), len(reviews)
        words = sorted(
            w
            for w, c in counts.items()
            if config.min_reviews <= c <= 0.1 * n
            and len(w) > 2
            and w not in ENGLISH_STOP_WORDS | _SAYS_LITTLE
            and "'" not in w
        )
        if not words:
            raise ValueError(
                f"informativeness: {n} reviews hold no word that {config.min_reviews} of them share; "
                "give more reviews or lower JudgeConfig.min_reviews"
            )
        return cls(words, np.log(n / np.array([counts[w] for w in words])))

    def rate(self, texts: list[str]) -> np.ndarray:
        """The score of each text, at least 0."""
        scores = []
        for text in texts:
            words = {w.lower() for w in WORD.findall(text)}
            length = max(len(text.split()), self.shortest)
            scores.append(sum(sorted(self.idf[w] for w in words if w in self.idf)) / length)
        return np.array(scores)

    def state(self) -> State:
        """Inverse document frequencies; the words."""
        return {"idf": np.array(list(self.idf.values()))}, {"words": list(self.idf)}

    @classmethod
    def from_state(
        cls, arrays: dict[str, np.ndarray], values: dict[str, Any]
    ) -> InformativenessTraining:
        """The judge that gave this `state`."""
        return cls(values["words"], arrays["idf"])


class InformativenessEvaluation(NetJudge, Informativeness):
    """Mean rating of the tokens by a convolutional net that ranks pieces of real reviews above worse versions of them.

    score = mean over tokens of tanh(r_t), r_t the logit of token t with its two neighbours in sight (and whether it was
    said before); between -1 and 1. Worse are: filler after or in place of a part, a part said again and again, words
    outside the 300 commonest replaced by words that say little (a random share of them, so that degrees are learned), a
    tail of symbols. Loss: -log sigmoid(15 (score(better) - score(worse))). No document frequency enters.

    Limit: it knows these ways of saying little, and no others (filler and stand-ins of the probes were not seen).
    """

    role, unit, family = "evaluation", "mean rating, -1 to 1", "convolutional ranker"
    shape: ClassVar[dict[str, Any]] = {"width": 32, "blocks": 1, "dropout": 0.1, "per_token": True}
    n_epochs, steepness = 2, 15.0  # 10 ranks as well and agrees less with the other judge

    @classmethod
    def worse(cls, text: str, common: frozenset[str], rng: Random) -> str:
        """One worse version, of a kind drawn at random."""
        kind = rng.random()
        if kind < 0.15:
            return padded(text, rng, FILLER_FIT, share=rng.uniform(0.3, 1.2))
        if kind < 0.35:
            return diluted(text, rng, FILLER_FIT)
        if kind < 0.55:
            return repeated(text, rng)
        if kind < 0.65:
            words = text.split()
            kept = words[: rng.randint(len(words) // 3, max(1, len(words) - 2))]
            return " ".join(kept + [rng.choice(SYMBOLS + EMOJI) for _ in words[len(kept) :]])
        unknown = {w.lower() for w in WORD.findall(text)} - common
        spared = frozenset(w for w in sorted(unknown) if rng.random() > rng.choice((0.3, 0.6, 1.0)))
        return generic(text, rng, common | spared, STAND_INS_FIT)

    @classmethod
    def fit(cls, reviews: Dataset, config: JudgeConfig) -> InformativenessEvaluation:
        """On pieces of the reviews and worse versions of them, fresh ones in each pass."""
        texts, rng = list(reviews["text"]), Random(config.seed + 2)
        encoder = Encoder.fit(texts, least_reviews(reviews, config))
        common = common_words(texts)
        low, high = round(0.6 * config.piece_words), round(1.4 * config.piece_words)

        def passes() -> Iterator[tuple[np.ndarray, Callable[[TextNet, np.ndarray], Tensor]]]:
            for _ in range(cls.n_epochs):
                better = [piece(t, rng.randint(low, high), rng) for t in texts]
                pairs = [(encoder(t), encoder(cls.worse(t, common, rng))) for t in better]

                def loss(net: TextNet, rows: np.ndarray, pairs: list = pairs) -> Tensor:
                    ids, mask = pad([side for r in rows for side in pairs[r]])
                    score = (torch.tanh(net(ids, mask)) * mask).sum(1) / mask.sum(1)
                    better, worse = score.view(-1, 2).unbind(1)
                    return F.softplus(cls.steepness * (worse - better)).mean()

                yield np.array([len(a) + len(b) for a, b in pairs]), loss

        net = fit_net(
            lambda: TextNet(encoder.n_words, **cls.shape),
            passes(),
            cls.n_epochs,
            stage="judges: informativeness/evaluation",
            seed=config.seed,
        )
        return cls(encoder, net)

    def rate(self, texts: list[str]) -> np.ndarray:
        """The mean rating of each text's tokens."""
        return np.array([np.tanh(row).mean() for row in self.of_tokens(texts)])
