"""How good is this text? Sentiment, informativeness and grammar, each by two instruments, each with a report card.

A *training* judge makes the preference labels; an *evaluation* judge, of another family and fitted on other reviews,
says what a policy's text is worth. Optimising against one judge and believing the same judge is how rewards get hacked.
Judges are arrays and JSON on disk. Nothing here knows a policy.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, ClassVar

import harper
import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from jaxtyping import Float
from safetensors.numpy import load_file, save_file
from scipy.sparse import csr_matrix, diags
from scipy.stats import rankdata
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, CountVectorizer, TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn import functional as F

from .nets import (
    AveragingNet,
    Encoder,
    TextNet,
    apply_net,
    fit_averaging_net,
    fit_net,
    load_arrays,
    net_arrays,
    pad,
    tokens_of,
)
from .probes import (
    CORRUPTIONS,
    DAMAGE,
    EMOJI,
    FILLER_FIT,
    PROBES,
    STAND_INS_FIT,
    SYMBOLS,
    WORD,
    diluted,
    generic,
    negated_pairs,
    padded,
    piece,
    repeated,
    sentences,
    wants_an,
    written_pairs,
)
from .sources import dataset_key, load_reviews
from .store import MixDPOError, cached, progress, read_json

VERSION = 5
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


# ------------------------------------------------------------------------------------------------------------- judges
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


# ----------------------------------------------------------------------------------------------- sentiment, training
_FEATURE = r"[a-zA-Z]+(?:'[a-zA-Z]+)*|[!?]"


def _cut(texts: Iterable[str], n_pieces: int, piece_words: int, rng: Random) -> list[list[str]]:
    """Of each text: itself, its first piece, and `n_pieces - 1` from random places, 0.6 to 1.5 x `piece_words` long."""
    low, high = round(0.6 * piece_words), round(1.5 * piece_words)
    return [
        [t] + [piece(t, rng.randint(low, high), rng, start=0 if i == 0 else None) for i in range(n_pieces)]
        for t in texts
    ]


def _least(reviews: Dataset, config: JudgeConfig) -> int:
    """In how many texts a term must occur; two where there are few reviews (tests, small sources)."""
    return config.min_reviews if len(reviews) >= 1000 else min(2, config.min_reviews)


def _log_count_ratio(counts: csr_matrix, labels: np.ndarray) -> np.ndarray:
    """ln of the share of each term among the terms of positive texts over that among those of negative ones."""
    up, down = (1.0 + np.asarray((counts[labels == side] > 0).sum(0)).ravel() for side in (1, 0))
    return np.log(up / up.sum()) - np.log(down / down.sum())


class SentimentTraining(Judge):
    """Logit of a linear classifier of word 1- and 2-grams, fitted on pieces of the length that it judges.

    logit = b + sum_g a_g u_g / ||u||, u_g = (1 + ln count_g) idf_g: TF-IDF as in scikit-learn. In fitting, g is scaled
    by sqrt|r_g| + 0.1 with r_g its naive Bayes log-count ratio over whole reviews (after Wang and Manning 2012,
    "Baselines and bigrams"); on 40-token pieces this gains .01 over plain TF-IDF.
    """

    reward, role, unit, family = "sentiment", "training", "logit", "linear, word 1-2-grams"

    def __init__(self, terms: Sequence[str], idf: np.ndarray, weight: np.ndarray, bias: float) -> None:
        self.terms, self.weight, self.bias = list(terms), np.asarray(weight, np.float64), float(bias)
        self._vectorizer = TfidfVectorizer(
            vocabulary={t: i for i, t in enumerate(self.terms)}, ngram_range=(1, 2), sublinear_tf=True,
            token_pattern=_FEATURE,
        )  # fmt: skip
        self._vectorizer.idf_ = np.asarray(idf, np.float64)

    @classmethod
    def fit(cls, reviews: Dataset, config: JudgeConfig) -> SentimentTraining:
        cut = _cut(reviews["text"], config.pieces_per_review, config.piece_words, Random(config.seed))
        texts = [t for pieces in cut for t in pieces]
        labels = np.repeat(np.asarray(reviews["label"]), config.pieces_per_review + 1)
        whole = np.arange(0, len(texts), config.pieces_per_review + 1)
        if len(set(labels)) < 2:
            raise ValueError("sentiment: found reviews of one label only, expected both 0 and 1; add the other kind")
        vectorizer = TfidfVectorizer(
            ngram_range=(1, 2), min_df=_least(reviews, config), sublinear_tf=True, token_pattern=_FEATURE
        )
        x = vectorizer.fit_transform(texts)
        scale = np.sqrt(np.abs(_log_count_ratio(x[whole], labels[whole]))) + 0.1
        x = x.multiply(scale).tocsr()
        model = LogisticRegression(C=0.5, solver="liblinear", random_state=config.seed).fit(x, labels)
        return cls(vectorizer.get_feature_names_out().tolist(), vectorizer.idf_, model.coef_[0] * scale,
                   float(model.intercept_[0]))  # fmt: skip

    def _score(self, texts: list[str]) -> np.ndarray:
        return self._vectorizer.transform(texts) @ self.weight + self.bias

    def state(self) -> State:
        return {"idf": self._vectorizer.idf_, "weight": self.weight}, {"terms": self.terms, "bias": self.bias}

    @classmethod
    def from_state(cls, arrays: dict[str, np.ndarray], values: dict[str, Any]) -> SentimentTraining:
        return cls(values["terms"], arrays["idf"], arrays["weight"], values["bias"])


# ------------------------------------------------------------------------------------------ informativeness, training
_SAYS_LITTLE = frozenset(
    "movie movies film films really very quite just like good bad great thing things lot lots bit way watch watched "
    "watching seen make made makes making got get gets getting say said know think thought people time times best "
    "worst better".split()
)


def count_reviews(texts: Iterable[str]) -> Counter[str]:
    """In how many of the texts each lower-cased word occurs.

    >>> count_reviews(["A dog, a cat", "The dog"])["dog"]
    2
    """
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update({w.lower().replace("’", "'") for w in WORD.findall(text)})
    return counts


class InformativenessTraining(Judge):
    """Distinct content words, weighted by inverse document frequency, per word of the text.

    score = sum over distinct content words w of ln(N / n_w) / max(words, `shortest`); n_w of N reviews hold w. A
    content word is in at least `min_reviews` and at most 10 % of the reviews and is no stop word: a non-word, a symbol
    or a second mention counts in the length alone, so padding and repeating cost. Derived here; tested by hand.

    Limit: a bare list of rare words beats every sentence (report card: the shuffle costs nothing).
    """

    reward, role, unit, family = "informativeness", "training", "nats per word", "inverse document frequency"
    shortest = 16  # words; below, the text counts as this long: three rare words are not a review

    def __init__(self, words: Sequence[str], idf: np.ndarray) -> None:
        self.idf = dict(zip(words, np.asarray(idf, np.float64).tolist(), strict=True))

    @classmethod
    def fit(cls, reviews: Dataset, config: JudgeConfig) -> InformativenessTraining:
        counts, n = count_reviews(reviews["text"]), len(reviews)
        words = sorted(
            w for w, c in counts.items()
            if config.min_reviews <= c <= 0.1 * n and len(w) > 2 and w not in ENGLISH_STOP_WORDS | _SAYS_LITTLE
            and "'" not in w
        )  # fmt: skip
        if not words:
            raise ValueError(
                f"informativeness: {n} reviews hold no word that {config.min_reviews} of them share; "
                "give more reviews or lower JudgeConfig.min_reviews"
            )
        return cls(words, np.log(n / np.array([counts[w] for w in words])))

    def _score(self, texts: list[str]) -> np.ndarray:
        scores = []
        for text in texts:
            words = {w.lower() for w in WORD.findall(text)}
            length = max(len(text.split()), self.shortest)
            scores.append(sum(sorted(self.idf[w] for w in words if w in self.idf)) / length)
        return np.array(scores)

    def state(self) -> State:
        return {"idf": np.array(list(self.idf.values()))}, {"words": list(self.idf)}

    @classmethod
    def from_state(cls, arrays: dict[str, np.ndarray], values: dict[str, Any]) -> InformativenessTraining:
        return cls(values["words"], arrays["idf"])


# -------------------------------------------------------------------------------------------------- grammar, training
_PAIR_UNIT = re.compile(r"[A-Za-z]+(?:['’][A-Za-z]+)*|[.,;:!?()\"]")
_STRAY = re.compile(r"[^\w\s.,;:!?'\"()\-–—…/&$%’‘“”*`]+|_+|\*{2,}|[,;:]{2,}|[!?]{4,}")
_TWICE = re.compile(r"\b([A-Za-z]+(?:'[a-z]+)?)\s+\1\b", re.IGNORECASE)
_ARTICLE = re.compile(r"\b([Aa]n?)\s+([A-Za-z]+)")
# Harper has 917 rules at 10 microseconds a text each. These found something at least twice in 5,900 pieces of reviews
# (the training judge's, half of them corrupted) and samples. Matters of taste are left out, as are Harper's own rules
# for spelling, a/an and repeats.
HARPER_RULES = frozenset(
    """
    AsSoonAsPossible CapitalizePersonalPronouns CommaFixes DidPast DiscourseMarkers DoubleModal Everyone FindOut
    GoodAt HowTo IfWouldve InflectedVerbAfterTo InterestedIn IsBeenAuxSequence ItsContraction ItsPossessive
    LetsConfusion MassNouns MergeWords MissingPreposition MissingTo ModalBeAdjective ModalOf Months Myself
    NounVerbConfusion Nowhere ObsessPreposition OneOfTheSingular OpenCompounds PossessiveYour PronounContraction
    PronounInflectionBe PronounKnew PronounVerbAgreement QuantifierNeedsOf QuantifierNumeralConflict
    RegularIrregulars SentenceCapitalization SimplePastToPastParticiple SingleBe Someone Straightforward SupposedTo
    TheHowWhy TheirToThere TheirToTheyre ThenThan There ThereToTheir Therein TheyToThem ThisTypeOfThing ToTwoToo
    WellBeing WillNonLemma WinPrize WorseOrWorst Worthwhile WrongNegative
    """.split()
)
_linters = threading.local()  # a Linter belongs to one thread


def _linter() -> harper.Linter:
    """Of this thread, with the rules that count."""
    if not hasattr(_linters, "linter"):
        _linters.linter = harper.Linter()
        _linters.linter.set_lint_config({rule: rule in HARPER_RULES for rule in harper.get_default_lint_config()})
    return _linters.linter


@cache
def _threads() -> ThreadPoolExecutor:
    """Kept for the life of the process: a Linter takes a second to make. Harper lets go of the interpreter."""
    return ThreadPoolExecutor(min(4, os.cpu_count() or 1), "grammar")


@cache
def _misspelt(word: str) -> bool:
    """Not in Harper's dictionary, in any dialect: one word is English when it is there."""
    return not _linter().is_likely_english(word)


def _without_fragment(text: str) -> str:
    """A text that does not end with a sentence was cut off: its last word may be half a word and is not judged."""
    text = text.rstrip()
    return text if text[-1] in ".!?\"')”" or " " not in text else text.rsplit(" ", 1)[0]


class GrammarTraining(Judge):
    """Minus the weighted findings per word: a grammar checker, rules, and pairs of neighbours that nobody writes.

    score = -(sum of weight x count) / max(words, 8). Counted are: findings of Harper by `HARPER_RULES`;
    *non-words* (lower-case, unknown to Harper, in fewer than `min_reviews` reviews); the wrong one of a/an; a word said
    twice in a row; runs of stray symbols; and, as a small smooth part that keeps texts without a finding from tying,
    *odd neighbours*: sum over adjacent common words of min(5, max(0, ln((e + 1) / (o + 1)))), o how often the fitting
    reviews hold the pair, e how often they would by chance. A last word without a full stop is not judged. Weights were
    set on the fitting reviews: real sentences against the same corrupted.

    Limits: agreement, tense and dropped articles are seen through odd neighbours alone (report card).
    """

    reward, role, unit, family = "grammar", "training", "-findings per word", "rules and counts (Harper)"
    weights: ClassVar[dict[str, float]] = {
        "checker": 0.5,  # Harper's taste is stricter than a reviewer's: half
        "non_words": 1.5,
        "article": 2.0,  # the two rules hardly ever err
        "repetition": 2.0,
        "stray_symbols": 1.0,
        "odd_neighbours": 0.3,  # nats; a small part of the variance on samples of the base model
    }
    shortest = 8  # words

    def __init__(self, words: Sequence[str], common: Sequence[str], counts: np.ndarray, keys: np.ndarray,
                 pairs: np.ndarray, total: int) -> None:  # fmt: skip
        self.words, self.common = frozenset(words), {w: i for i, w in enumerate(common)}
        self.counts, self.keys, self.pairs = (np.asarray(a, np.int64) for a in (counts, keys, pairs))
        self.total = int(total)

    @classmethod
    def fit(cls, reviews: Dataset, config: JudgeConfig, n_common: int = 4000) -> GrammarTraining:
        words = sorted(w for w, c in count_reviews(reviews["text"]).items() if c >= config.min_reviews)
        units = [[u.lower() for u in _PAIR_UNIT.findall(t)] for t in reviews["text"]]
        counts = Counter(u for text in units for u in text)
        common = [u for u, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:n_common]]
        number = {u: i for i, u in enumerate(common)}
        found = []
        for text in units:
            i = np.array([number.get(u, -1) for u in text], np.int64)
            found.append((i[:-1] * len(common) + i[1:])[(i[:-1] >= 0) & (i[1:] >= 0)])
        keys, pairs = np.unique(np.concatenate(found), return_counts=True)
        return cls(words, common, np.array([counts[u] for u in common]), keys, pairs, sum(counts.values()))

    def odd_neighbours(self, text: str) -> float:
        """Sum over adjacent common words of min(5, max(0, ln((expected + 1) / (observed + 1)))); nats."""
        i = np.array([self.common.get(u.lower(), -1) for u in _PAIR_UNIT.findall(text)], np.int64)
        first, second = i[:-1], i[1:]
        both = (first >= 0) & (second >= 0)
        first, second = first[both], second[both]
        if not len(first):
            return 0.0
        key = first * len(self.common) + second
        at = np.minimum(np.searchsorted(self.keys, key), len(self.keys) - 1)
        observed = np.where(self.keys[at] == key, self.pairs[at], 0)
        expected = self.counts[first] * self.counts[second] / self.total
        return float(np.log((expected + 1) / (observed + 1)).clip(0, 5).sum())

    def findings(self, text: str) -> dict[str, float]:
        """What is counted in `text`, before weights; for the notebook and for tests."""
        text = _without_fragment(text)
        checker = sum(
            lint.span.end < len(text) - 1  # else: what follows was cut off
            and not (lint.span.start == 0 and lint.lint_kind == "Capitalization")  # what precedes may have been
            for lint in _linter().lint(text)
        )
        non_words = sum(
            len(w) > 1 and w.islower() and w.isalpha() and w not in self.words and _misspelt(w)
            for w in WORD.findall(text)
        )
        articles = [(m[1].lower() == "an", wants_an(m[2])) for m in _ARTICLE.finditer(text)]
        counts = {
            "checker": checker,
            "non_words": non_words,
            "article": sum(want is not None and want != is_an for is_an, want in articles),
            "repetition": sum(
                m[1].lower() not in ("had", "that") and not m[1][0].isupper() for m in _TWICE.finditer(text)
            ),
            "stray_symbols": len(_STRAY.findall(text)),
            "odd_neighbours": self.odd_neighbours(text),
        }
        return {kind: float(count) for kind, count in counts.items()}

    def _one(self, text: str) -> float:
        found = self.findings(text)
        length = max(len(_without_fragment(text).split()), self.shortest)
        return -sum(self.weights[kind] * count for kind, count in found.items()) / length

    def _score(self, texts: list[str]) -> np.ndarray:
        scores = []
        for done, value in enumerate(_threads().map(self._one, texts), start=1):
            scores.append(value)
            if len(texts) >= 1000 and (done % 200 == 0 or done == len(texts)):
                progress("grammar/training", done, len(texts), "texts judged")
        return np.array(scores)

    def state(self) -> State:
        arrays = {"counts": self.counts, "keys": self.keys, "pairs": self.pairs}
        return arrays, {"words": sorted(self.words), "common": list(self.common), "total": self.total}

    @classmethod
    def from_state(cls, arrays: dict[str, np.ndarray], values: dict[str, Any]) -> GrammarTraining:
        return cls(values["words"], values["common"], **arrays, total=values["total"])


# --------------------------------------------------------------------------------------------------------- evaluation
class SentimentEvaluation(Judge):
    """Logit of a deep averaging network over word 1- and 2-grams, fitted on other reviews than the training judge.

    Embeddings of the distinct terms are summed, divided by the square root of their number, and go through one hidden
    layer (`nets.AveragingNet`). A convolutional net fitted from nothing on as many reviews was worse (.74 on 40 tokens
    against .77). Limit: negation is seen within two words.
    """

    reward, role, unit, family = "sentiment", "evaluation", "logit", "deep averaging network"

    def __init__(self, terms: Sequence[str], net: AveragingNet) -> None:
        self.terms, self.net = list(terms), net
        self._vectorizer = CountVectorizer(
            vocabulary={t: i for i, t in enumerate(self.terms)}, ngram_range=(1, 2), binary=True, token_pattern=_FEATURE
        )

    @classmethod
    def fit(cls, reviews: Dataset, config: JudgeConfig) -> SentimentEvaluation:
        cut = _cut(reviews["text"], config.pieces_per_review, config.piece_words, Random(config.seed + 1))
        labels = np.repeat(np.asarray(reviews["label"]), config.pieces_per_review + 1)
        whole = np.arange(0, len(labels), config.pieces_per_review + 1)
        vectorizer = CountVectorizer(
            ngram_range=(1, 2), min_df=_least(reviews, config), binary=True, token_pattern=_FEATURE
        )
        counts = vectorizer.fit_transform([t for pieces in cut for t in pieces])
        net = fit_averaging_net(
            cls._scaled(counts), labels, _log_count_ratio(counts[whole], labels[whole]),
            stage="judges: sentiment/evaluation", seed=config.seed,
        )  # fmt: skip
        return cls(vectorizer.get_feature_names_out().tolist(), net)

    @staticmethod
    def _scaled(counts: csr_matrix) -> csr_matrix:
        number = np.maximum(np.asarray(counts.sum(1)).ravel(), 1)
        return csr_matrix(diags(number**-0.5) @ counts, dtype=np.float32)

    def _score(self, texts: list[str]) -> np.ndarray:
        with torch.inference_mode():
            return self.net(self._scaled(self._vectorizer.transform(texts))).double().numpy()

    def state(self) -> State:
        return net_arrays(self.net), {"terms": self.terms}

    @classmethod
    def from_state(cls, arrays: dict[str, np.ndarray], values: dict[str, Any]) -> SentimentEvaluation:
        return cls(values["terms"], load_arrays(AveragingNet(len(values["terms"])), arrays))


class _NetJudge(Judge):
    """A judge that is an encoder and a convolutional `TextNet`."""

    shape: ClassVar[dict[str, Any]]

    def __init__(self, encoder: Encoder, net: TextNet) -> None:
        self.encoder, self.net = encoder, net

    def _of_tokens(self, texts: list[str]) -> list[np.ndarray]:
        return apply_net(self.net, [self.encoder(t) for t in texts])

    def state(self) -> State:
        return net_arrays(self.net), {"words": self.encoder.words}

    @classmethod
    def from_state(cls, arrays: dict[str, np.ndarray], values: dict[str, Any]) -> Any:
        encoder = Encoder(values["words"])
        return cls(encoder, load_arrays(TextNet(encoder.n_words, **cls.shape), arrays))


class InformativenessEvaluation(_NetJudge):
    """Mean rating of the tokens by a convolutional net that ranks pieces of real reviews above worse versions of them.

    score = mean over tokens of tanh(r_t), r_t the logit of token t with its two neighbours in sight (and whether it was
    said before); between -1 and 1. Worse are: filler after or in place of a part, a part said again and again, words
    outside the 300 commonest replaced by words that say little (a random share of them, so that degrees are learned), a
    tail of symbols. Loss: -log sigmoid(15 (score(better) - score(worse))). No document frequency enters.

    Limit: it knows these ways of saying little, and no others (filler and stand-ins of the probes were not seen).
    """

    reward, role, unit, family = "informativeness", "evaluation", "mean rating, -1 to 1", "convolutional ranker"
    shape: ClassVar[dict[str, Any]] = {"width": 32, "blocks": 1, "dropout": 0.1, "per_token": True}
    n_epochs, n_common, steepness = 2, 300, 15.0  # 10 ranks as well and agrees less with the other judge

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
        texts, rng = list(reviews["text"]), Random(config.seed + 2)
        encoder = Encoder.fit(texts, _least(reviews, config))
        common = frozenset(w for w, _ in count_reviews(texts).most_common(cls.n_common))
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
            lambda: TextNet(encoder.n_words, **cls.shape), passes(), cls.n_epochs,
            stage="judges: informativeness/evaluation", seed=config.seed,
        )  # fmt: skip
        return cls(encoder, net)

    def _score(self, texts: list[str]) -> np.ndarray:
        return np.array([np.tanh(row).mean() for row in self._of_tokens(texts)])


class GrammarEvaluation(_NetJudge):
    """Mean log-probability that a word is right, by a convolutional net that was taught to find corrupted words.

    score = mean over tokens of log(1 - p_t), p_t the probability that token t was corrupted; nats per token. The net
    (`nets.TextNet`, three blocks: seven tokens to either side) is fitted on sentences and pieces of other reviews with
    none to three of the corruptions and damages of `probes`, fresh ones in each pass, the place of each known. The
    likelihood of the base model would be stronger on agreement, but it is the reference policy itself: a judge that is
    the reference would reward staying near it, whatever is written.

    Limits: it knows the kinds of corruption that it was taught; a last word without a full stop is not judged.
    """

    reward, role, unit, family = "grammar", "evaluation", "nats per token", "convolutional error detector"
    shape: ClassVar[dict[str, Any]] = {"width": 64, "blocks": 3, "dropout": 0.05, "per_token": True}
    n_epochs, per_review = 2, 3  # passes; sentences, and as many pieces, of each review

    @staticmethod
    def corrupted(text: str, rng: Random) -> tuple[str, np.ndarray]:
        """None to three corruptions of `text`, and for each token of the result whether it is one of their places."""
        kinds = {**CORRUPTIONS, **DAMAGE}
        tokens, label = tokens_of(text), np.zeros(len(tokens_of(text)), np.float32)
        for _ in range(rng.choice((0, 1, 1, 2, 3))):
            kind = rng.choices(list(kinds), [0.25 if k == "full_shuffle" else 1.0 for k in kinds])[0]
            changed = kinds[kind](text, rng)
            if changed is None:
                continue
            after, shorter, a, b = tokens_of(changed), 0, 0, 0
            shorter = min(len(tokens), len(after))
            while a < shorter and tokens[a] == after[a]:
                a += 1
            while b < shorter - a and tokens[-1 - b] == after[-1 - b]:
                b += 1
            label = np.concatenate([label[:a], np.ones(len(after) - a - b, np.float32), label[len(label) - b :]])
            if len(after) == a + b and a < len(label):  # left out: the word after the gap
                label[a] = 1
            text, tokens = changed, after
        return text, label

    @classmethod
    def fit(cls, reviews: Dataset, config: JudgeConfig) -> GrammarEvaluation:
        rng, texts = Random(config.seed + 3), []
        encoder = Encoder.fit(reviews["text"], _least(reviews, config))
        for text in reviews["text"]:
            whole = sentences(text, 6, 45)
            texts += rng.sample(whole, min(cls.per_review, len(whole)))
            texts += [
                piece(text, rng.randint(10, round(1.25 * config.piece_words)), rng) for _ in range(cls.per_review)
            ]

        def passes() -> Iterator[tuple[np.ndarray, Callable[[TextNet, np.ndarray], Tensor]]]:
            for _ in range(cls.n_epochs):
                rows = [cls.corrupted(t, rng) for t in texts]
                encoded, labels = [encoder(t) for t, _ in rows], [label for _, label in rows]

                def loss(net: TextNet, rows: np.ndarray, encoded: list = encoded, labels: list = labels) -> Tensor:
                    ids, mask = pad([encoded[r] for r in rows])
                    target = torch.from_numpy(np.concatenate([labels[r] for r in rows]))
                    return F.binary_cross_entropy_with_logits(net(ids, mask)[mask], target)

                yield np.array([len(e) for e in encoded]), loss

        net = fit_net(
            lambda: TextNet(encoder.n_words, **cls.shape), passes(), cls.n_epochs,
            stage="judges: grammar/evaluation", seed=config.seed, learning_rate=8e-3, batch_tokens=6144,
        )  # fmt: skip
        return cls(encoder, net)

    def _score(self, texts: list[str]) -> np.ndarray:
        logits = self._of_tokens([_without_fragment(t) for t in texts])
        return np.array([-np.logaddexp(0.0, row).mean() for row in logits])


class HubSentimentJudge(Judge):
    """A sentiment classifier of the hub (or of a local folder of the same form) in place of a fitted one.

    score = logit of the positive label minus that of the negative one.

    Parameters
    ----------
    name_or_folder : for `transformers.AutoModelForSequenceClassification`; two labels, or one logit.
    role : which judge it stands in for.
    positive : index of the positive label; default the one whose name begins with "pos", else the last.

    Raises
    ------
    ValueError : the model has neither one nor two labels.
    """

    reward, unit, family = "sentiment", "logit", "pretrained transformer"

    def __init__(self, name_or_folder: str | Path, role: str = "evaluation", positive: int | None = None) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self.role = role  # type: ignore[misc]
        self.name_or_folder = str(name_or_folder)
        self.tokenizer = AutoTokenizer.from_pretrained(self.name_or_folder)
        self.model = AutoModelForSequenceClassification.from_pretrained(self.name_or_folder).eval()
        n_labels = self.model.config.num_labels
        if n_labels not in (1, 2):
            raise ValueError(
                f"{self.name_or_folder}: found {n_labels} labels, expected 1 or 2; use a binary classifier"
            )
        names = {int(i): str(n).lower() for i, n in self.model.config.id2label.items()}
        named = [i for i, n in names.items() if n.startswith("pos")]
        self.positive = positive if positive is not None else (named[0] if named else n_labels - 1)

    @torch.inference_mode()
    def _score(self, texts: list[str]) -> np.ndarray:
        out = []
        for start in range(0, len(texts), 32):
            batch = self.tokenizer(
                texts[start : start + 32], padding=True, truncation=True, return_tensors="pt",
                max_length=min(512, getattr(self.model.config, "max_position_embeddings", 512)),
            )  # fmt: skip
            logits = self.model(**batch).logits.double()
            out.append(
                logits[:, 0] if logits.shape[1] == 1 else logits[:, self.positive] - logits[:, 1 - self.positive]
            )
            progress(f"{self.name} ({self.name_or_folder})", min(start + 32, len(texts)), len(texts), "texts judged")
        return torch.cat(out).numpy()

    def state(self) -> State:
        return {}, {"name_or_folder": self.name_or_folder, "role": self.role, "positive": self.positive}

    @classmethod
    def from_state(cls, arrays: dict[str, np.ndarray], values: dict[str, Any]) -> HubSentimentJudge:
        return cls(**values)


# -------------------------------------------------------------------------------------------------------- all of them
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


# -------------------------------------------------------------------------------------------------------- report card
BARS: Mapping[tuple[str, str], float] = {  # (reward, task) -> what a judge should reach; nothing is promised elsewhere
    ("sentiment", "whole reviews"): 0.88,
    ("sentiment", "first words"): 0.75,
    ("sentiment", "words anywhere"): 0.75,
    ("informativeness", "all kinds"): 0.90,
    ("grammar", "spelling"): 0.85,
    ("grammar", "article"): 0.85,
    ("grammar", "repetition"): 0.85,
    ("grammar", "all kinds"): 0.85,
}


def paired_rank(better: np.ndarray, worse: np.ndarray) -> np.ndarray:
    """1 where the better text scores higher than its own worse version, 0.5 where they tie, 0 elsewhere.

    >>> paired_rank(np.array([2.0, 1.0, 0.0]), np.array([1.0, 1.0, 1.0])).tolist()
    [1.0, 0.5, 0.0]
    """
    return (better > worse) + 0.5 * (better == worse)


def _interval(statistic: Callable[[np.ndarray], float], n: int, rng: np.random.Generator) -> tuple[float, float, float]:
    """Value and 95 % bootstrap interval of `statistic(rows)`; 200 resamples of the rows."""
    draws = [statistic(rng.integers(0, n, n)) for _ in range(200)]
    low, high = np.quantile(draws, [0.025, 0.975])
    return statistic(np.arange(n)), float(low), float(high)


def _pairs_of_content(texts: Sequence[str], reviews: Sequence[str], rng: Random) -> dict[str, list[tuple[str, str]]]:
    common = frozenset(w for w, _ in count_reviews(reviews).most_common(InformativenessEvaluation.n_common))
    return {
        "filler after it": [(t, padded(t, rng)) for t in texts],
        "half filler": [(t, diluted(t, rng)) for t in texts],
        "a part repeated": [(t, repeated(t, rng)) for t in texts],
        "generic words": [(t, generic(t, rng, common)) for t in texts],
        "hand-written": written_pairs(max(20, len(texts) // 4), rng),
    }


def report_card(judges: Judges, reviews: Dataset, n: int = 300, seed: int = 0) -> dict[str, pd.DataFrame]:
    """What each judge can and cannot do, measured on reviews that fitted none of them.

    Parameters
    ----------
    judges : fitted. reviews : columns text, label; the part "report" of `split_reviews`.
    n : pieces and sentences drawn (sentiment uses every review); 300 take about a minute.

    Returns
    -------
    tidy tables by name.
    `validity` : reward, judge, measure, task, value, low, high (95 %, bootstrap over texts), n, bar (NaN where none).
        Measures: accuracy (also of the order of written pairs that differ by one "not"); paired rank
        (how often a text beats its own worse version; ties count half); auc (the same
        against the worse versions of all texts, which is harder).
    `spread` : reward, judge, unit, mean, sd, p5, p50, p95, tied (share of texts whose score another text has too), n.
    `agreement` : first, second, kind ("one reward", "two rewards"), spearman, low, high, n; by judge name.
    `probes` : reward, judge, probe, effect (mean change of score, in sd of real pieces), low, high, size (mean absolute
        change), n.
    `scores` : text (number), reward, judge, unit, score: of `n` real pieces.

    Raises
    ------
    ValueError : fewer than 20 sentences or pieces can be drawn.
    """
    rng, draw = np.random.default_rng(seed), Random(seed)
    texts, labels = list(reviews["text"]), np.asarray(reviews["label"])
    words = judges.config.piece_words
    chosen = draw.sample(range(len(texts)), min(n, len(texts)))
    pieces = [piece(texts[i], words, draw) for i in chosen]
    real = [draw.choice(found) for i in chosen if (found := sentences(texts[i]))]
    if min(len(pieces), len(real)) < 20:
        raise ValueError(f"report_card: found {len(real)} sentences in {len(texts)} reviews, expected at least 20")
    wrong = {kind: [make(t, draw) for t in real] for kind, make in {**CORRUPTIONS, **DAMAGE}.items()}
    content = _pairs_of_content(pieces, texts, draw)
    probed = {probe: [make(t, draw) for t in pieces] for probe, make in PROBES.items()}

    validity: list[dict[str, Any]] = []
    spread: list[dict[str, Any]] = []
    probes: list[dict[str, Any]] = []
    scores: dict[str, np.ndarray] = {}
    everyone = [*judges.training.values(), *judges.evaluation.values()]
    for number, judge in enumerate(everyone):
        progress("report card", number, len(everyone), judge.name)
        who = {"reward": judge.reward, "judge": judge.role}

        def valid(measure: str, task: str, statistic: Callable, n: int, who: dict = who) -> None:
            value, low, high = _interval(statistic, n, rng)
            bar = BARS.get((who["reward"], task), np.nan)
            if who["reward"] == "grammar" and (task == "all kinds") != (who["judge"] == "evaluation"):
                bar = np.nan  # by kind for the training judge, over all kinds for the evaluation judge
            validity.append(
                {**who, "measure": measure, "task": task, "value": value, "low": low, "high": high, "n": n, "bar": bar}
            )

        scores[judge.name] = of_pieces = judge.score(pieces)
        if judge.reward == "sentiment":
            cuts = {
                "whole reviews": texts,
                "first words": [piece(t, words, draw, start=0) for t in texts],
                "words anywhere": [piece(t, words, draw) for t in texts],
            }
            for task, cut in cuts.items():
                right = ((judge.score(cut) > 0) == (labels == 1)).astype(float)
                valid("accuracy", task, lambda rows, right=right: float(right[rows].mean()), len(right))
            better, worse = (judge.score(side) for side in zip(*negated_pairs(), strict=True))
            rank = paired_rank(better, worse)
            valid("accuracy", 'one "not"', lambda rows, rank=rank: float(rank[rows].mean()), len(rank))
        elif judge.reward == "informativeness":
            ranks = {
                task: paired_rank(judge.score([a for a, _ in pairs]), judge.score([b for _, b in pairs]))
                for task, pairs in content.items()
            }
            ranks["all kinds"] = np.concatenate(list(ranks.values()))
            for task, rank in ranks.items():
                valid("paired rank", task, lambda rows, rank=rank: float(rank[rows].mean()), len(rank))
        else:
            of_real = judge.score(real)
            good: list[np.ndarray] = []
            bad: list[np.ndarray] = []
            for task, made in wrong.items():
                progress("report card", number, len(everyone), f"{judge.name}: {task}")
                have = [i for i, t in enumerate(made) if t is not None]
                a, b = of_real[have], judge.score([made[i] for i in have])  # type: ignore[misc]
                if task in CORRUPTIONS:
                    good, bad = [*good, a], [*bad, b]
                _valid_grammar(valid, task, a, b)
            _valid_grammar(valid, "all kinds", np.concatenate(good), np.concatenate(bad))

        sd = float(of_pieces.std()) or 1.0
        p5, p50, p95 = np.quantile(of_pieces, [0.05, 0.5, 0.95])
        tied = 1 - (np.unique(of_pieces, return_counts=True)[1] == 1).sum() / len(pieces)
        spread.append(
            {**who, "unit": judge.unit, "mean": of_pieces.mean(), "sd": sd, "p5": p5, "p50": p50, "p95": p95,
             "tied": tied, "n": len(pieces)}
        )  # fmt: skip
        for probe, made in probed.items():
            progress("report card", number, len(everyone), f"{judge.name}: {probe}")
            have = [i for i, t in enumerate(made) if t is not None]
            change = (judge.score([made[i] for i in have]) - of_pieces[have]) / sd  # type: ignore[misc]

            def mean_change(rows: np.ndarray, change: np.ndarray = change) -> float:
                return float(change[rows].mean())

            value, low, high = _interval(mean_change, len(change), rng)
            size = float(np.abs(change).mean())
            probes.append(
                {**who, "probe": probe, "effect": value, "low": low, "high": high, "size": size, "n": len(change)}
            )
    progress("report card", len(everyone), len(everyone), "done")
    return {
        "validity": pd.DataFrame(validity),
        "spread": pd.DataFrame(spread),
        "agreement": judge_correlations(scores, seed),
        "probes": pd.DataFrame(probes),
        "scores": pd.DataFrame(
            {"text": i, "reward": j.reward, "judge": j.role, "unit": j.unit, "score": value}
            for j in everyone
            for i, value in enumerate(scores[j.name])
        ),
    }


def _valid_grammar(valid: Callable, task: str, good: np.ndarray, bad: np.ndarray) -> None:
    rank = paired_rank(good, bad)
    valid("paired rank", task, lambda rows: float(rank[rows].mean()), len(rank))
    valid("auc", task, lambda rows: _auc(good[rows], bad[rows]), len(rank))


def _auc(good: np.ndarray, bad: np.ndarray) -> float:
    """Probability that a random good text scores above a random bad one; ties count half."""
    both = rankdata(np.concatenate([good, bad]))
    return float((both[: len(good)].sum() - len(good) * (len(good) + 1) / 2) / (len(good) * len(bad)))


def judge_correlations(scores: Mapping[str, np.ndarray], seed: int = 0) -> pd.DataFrame:
    """Spearman correlation of every two judges on the same texts; `scores` by judge name ("sentiment/training").

    Returns
    -------
    first, second, kind ("one reward", "two rewards", "itself"), spearman, low, high (95 %, bootstrap over texts), n.
    """
    rng, rows, found = np.random.default_rng(seed), [], {}
    for first, a in scores.items():
        for second, b in scores.items():

            def rho(at: np.ndarray, a: np.ndarray = a, b: np.ndarray = b) -> float:
                x, y = rankdata(a[at]), rankdata(b[at])
                return float(np.corrcoef(x, y)[0, 1]) if x.std() > 0 and y.std() > 0 else 0.0

            if (second, first) not in found:
                found[first, second] = (1.0, 1.0, 1.0) if first == second else _interval(rho, len(a), rng)
            value, low, high = found.get((first, second)) or found[second, first]
            kind = "one reward" if first.split("/")[0] == second.split("/")[0] else "two rewards"
            rows.append(
                {"first": first, "second": second, "kind": "itself" if first == second else kind, "spearman": value,
                 "low": low, "high": high, "n": len(a)}
            )  # fmt: skip
    return pd.DataFrame(rows)
