"""Is a text well formed? Two judges of grammar."""

from __future__ import annotations

import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from random import Random
from typing import Any, ClassVar

import harper
import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F

from ...store import progress
from .contract import Judge, JudgeConfig, State, least_reviews
from .corruptions import CORRUPTIONS, DAMAGE
from .exam import Exam, Mark
from .nets import Encoder, NetJudge, TextNet, fit_net, pad, tokens_of
from .words import WORD, count_reviews, piece, sentences

_PAIR_UNIT = re.compile(r"[A-Za-z]+(?:['’][A-Za-z]+)*|[.,;:!?()\"]")
_STRAY = re.compile(r"[^\w\s.,;:!?'\"()\-–—…/&$%’‘“”*`]+|_+|\*{2,}|[,;:]{2,}|[!?]{4,}")
_TWICE = re.compile(r"\b([A-Za-z]+(?:'[a-z]+)?)\s+\1\b", re.IGNORECASE)
_ARTICLE = re.compile(r"\b([Aa]n?)\s+([A-Za-z]+)")
_A_THOUGH_VOWEL = re.compile(
    r"(?:uni(?!n|m)|us(?:e|a|u)|ut(?:e|i)|eu|ewe|ubi|uk|one(?!i)|once|ouija)", re.I
)  # "a user", "a one-liner"
_AN_THOUGH_CONSONANT = re.compile(r"(?:hour|honest|hono|heir)", re.I)
_EITHER = re.compile(r"(?:herb|histor|hotel)", re.I)
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
        _linters.linter.set_lint_config(
            {rule: rule in HARPER_RULES for rule in harper.get_default_lint_config()}
        )
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


def wants_an(word: str) -> bool | None:
    """Whether the indefinite article before `word` is "an"; None where spelling does not tell (acronyms, letters).

    The rule by first letter with its usual exceptions; a list made for this project.

    >>> wants_an("old"), wants_an("user"), wants_an("hour"), wants_an("film"), wants_an("uninspired"), wants_an("FBI")
    (True, False, True, False, True, None)
    """
    if len(word) < 2 or word.isupper() or _EITHER.match(word):
        return None
    if _AN_THOUGH_CONSONANT.match(word):
        return True
    return word[0].lower() in "aeiou" and not _A_THOUGH_VOWEL.match(word)


class Grammar(Judge):
    """What both judges are asked: does a sentence score above a corrupted version of itself?"""

    reward = "grammar"

    def examine(self, exam: Exam) -> Iterator[Mark]:
        """Paired rank and AUC by kind of corruption and damage, and over all corruptions."""
        own, pairs = self.score(exam.sentences), []
        for task, versions in exam.corrupted.items():
            good, bad = self.score_versions(own, versions)
            if task in CORRUPTIONS:  # damage is what samplers do, not what people write
                pairs.append((good, bad))
            yield Mark.paired_rank(task, good, bad)
            yield Mark.auc(task, good, bad)
        good, bad = (np.concatenate(side) for side in zip(*pairs, strict=True))
        yield Mark.paired_rank("all kinds", good, bad)
        yield Mark.auc("all kinds", good, bad)


class GrammarTraining(Grammar):
    """Minus the weighted findings per word: a grammar checker, rules, and pairs of neighbours that nobody writes.

    score = -(sum of weight x count) / max(words, 8). Counted are: findings of Harper by `HARPER_RULES`;
    *non-words* (lower-case, unknown to Harper, in fewer than `min_reviews` reviews); the wrong one of a/an; a word said
    twice in a row; runs of stray symbols; and, as a small smooth part that keeps texts without a finding from tying,
    *odd neighbours*: sum over adjacent common words of min(5, max(0, ln((e + 1) / (o + 1)))), o how often the fitting
    reviews hold the pair, e how often they would by chance. A last word without a full stop is not judged. Weights were
    set on the fitting reviews: real sentences against the same corrupted.

    Limits: agreement, tense and dropped articles are seen through odd neighbours alone (report card).
    """

    role, unit, family = "training", "-findings per word", "rules and counts (Harper)"
    bars = dict.fromkeys(("spelling", "article", "repetition"), 0.85)  # what rules can see
    weights: ClassVar[dict[str, float]] = {
        "checker": 0.5,  # Harper's taste is stricter than a reviewer's: half
        "non_words": 1.5,
        "article": 2.0,  # the two rules hardly ever err
        "repetition": 2.0,
        "stray_symbols": 1.0,
        "odd_neighbours": 0.3,  # nats; a small part of the variance on samples of the base model
    }
    shortest = 8  # words

    def __init__(
        self,
        words: Sequence[str],
        common: Sequence[str],
        counts: np.ndarray,
        keys: np.ndarray,
        pairs: np.ndarray,
        total: int,
    ) -> None:
        self.words, self.common = frozenset(words), {w: i for i, w in enumerate(common)}
        self.counts, self.keys, self.pairs = (
            np.asarray(a, np.int64) for a in (counts, keys, pairs)
        )
        self.total = int(total)

    @classmethod
    def fit(cls, reviews: Dataset, config: JudgeConfig, n_common: int = 4000) -> GrammarTraining:
        """Count words, and how often any two of the `n_common` commonest are neighbours."""
        words = sorted(
            w for w, c in count_reviews(reviews["text"]).items() if c >= config.min_reviews
        )
        units = [[u.lower() for u in _PAIR_UNIT.findall(t)] for t in reviews["text"]]
        counts = Counter(u for text in units for u in text)
        common = [
            u for u, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:n_common]
        ]
        number = {u: i for i, u in enumerate(common)}
        found = []
        for text in units:
            i = np.array([number.get(u, -1) for u in text], np.int64)
            found.append((i[:-1] * len(common) + i[1:])[(i[:-1] >= 0) & (i[1:] >= 0)])
        keys, pairs = np.unique(np.concatenate(found), return_counts=True)
        return cls(
            words, common, np.array([counts[u] for u in common]), keys, pairs, sum(counts.values())
        )

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
            and not (
                lint.span.start == 0 and lint.lint_kind == "Capitalization"
            )  # what precedes may have been
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
                m[1].lower() not in ("had", "that") and not m[1][0].isupper()
                for m in _TWICE.finditer(text)
            ),
            "stray_symbols": len(_STRAY.findall(text)),
            "odd_neighbours": self.odd_neighbours(text),
        }
        return {kind: float(count) for kind, count in counts.items()}

    def _one(self, text: str) -> float:
        found = self.findings(text)
        length = max(len(_without_fragment(text).split()), self.shortest)
        return -sum(self.weights[kind] * count for kind, count in found.items()) / length

    def rate(self, texts: list[str]) -> np.ndarray:
        """The score of each text, at most 0."""
        scores = []
        for done, value in enumerate(_threads().map(self._one, texts), start=1):
            scores.append(value)
            if len(texts) >= 1000 and (done % 200 == 0 or done == len(texts)):
                progress("grammar/training", done, len(texts), "texts judged")
        return np.array(scores)

    def state(self) -> State:
        """Counts of common words and of pairs of them; the words."""
        arrays = {"counts": self.counts, "keys": self.keys, "pairs": self.pairs}
        return arrays, {
            "words": sorted(self.words),
            "common": list(self.common),
            "total": self.total,
        }

    @classmethod
    def from_state(cls, arrays: dict[str, np.ndarray], values: dict[str, Any]) -> GrammarTraining:
        """The judge that gave this `state`."""
        return cls(values["words"], values["common"], **arrays, total=values["total"])


class GrammarEvaluation(NetJudge, Grammar):
    """Mean log-probability that a word is right, by a convolutional net that was taught to find corrupted words.

    score = mean over tokens of log(1 - p_t), p_t the probability that token t was corrupted; nats per token. The net
    (`nets.TextNet`, three blocks: seven tokens to either side) is fitted on sentences and pieces of other reviews with
    none to three of the corruptions and damages of `probes`, fresh ones in each pass, the place of each known. The
    likelihood of the base model would be stronger on agreement, but it is the reference policy itself: a judge that is
    the reference would reward staying near it, whatever is written.

    Limits: it knows the kinds of corruption that it was taught; a last word without a full stop is not judged.
    """

    role, unit, family = "evaluation", "nats per token", "convolutional error detector"
    bars = {"all kinds": 0.85}
    shape: ClassVar[dict[str, Any]] = {"width": 64, "blocks": 3, "dropout": 0.05, "per_token": True}
    n_epochs, per_review = 2, 3  # passes; sentences, and as many pieces, of each review

    @staticmethod
    def corrupted(text: str, rng: Random) -> tuple[str, np.ndarray]:
        """None to three corruptions of `text`, and for each token of the result whether it is one of their places."""
        kinds = {**CORRUPTIONS, **DAMAGE}
        tokens, label = tokens_of(text), np.zeros(len(tokens_of(text)), np.float32)
        for _ in range(rng.choice((0, 1, 1, 2, 3))):
            kind = rng.choices(list(kinds), [0.25 if k == "full_shuffle" else 1.0 for k in kinds])[
                0
            ]
            changed = kinds[kind](text, rng)
            if changed is None:
                continue
            after, shorter, a, b = tokens_of(changed), 0, 0, 0
            shorter = min(len(tokens), len(after))
            while a < shorter and tokens[a] == after[a]:
                a += 1
            while b < shorter - a and tokens[-1 - b] == after[-1 - b]:
                b += 1
            label = np.concatenate(
                [label[:a], np.ones(len(after) - a - b, np.float32), label[len(label) - b :]]
            )
            if len(after) == a + b and a < len(label):  # left out: the word after the gap
                label[a] = 1
            text, tokens = changed, after
        return text, label

    @classmethod
    def fit(cls, reviews: Dataset, config: JudgeConfig) -> GrammarEvaluation:
        """On sentences and pieces of the reviews, corrupted afresh in each pass."""
        rng, texts = Random(config.seed + 3), []
        encoder = Encoder.fit(reviews["text"], least_reviews(reviews, config))
        for text in reviews["text"]:
            whole = sentences(text, 6, 45)
            texts += rng.sample(whole, min(cls.per_review, len(whole)))
            texts += [
                piece(text, rng.randint(10, round(1.25 * config.piece_words)), rng)
                for _ in range(cls.per_review)
            ]

        def passes() -> Iterator[tuple[np.ndarray, Callable[[TextNet, np.ndarray], Tensor]]]:
            for _ in range(cls.n_epochs):
                rows = [cls.corrupted(t, rng) for t in texts]
                encoded, labels = [encoder(t) for t, _ in rows], [label for _, label in rows]

                def loss(
                    net: TextNet, rows: np.ndarray, encoded: list = encoded, labels: list = labels
                ) -> Tensor:
                    ids, mask = pad([encoded[r] for r in rows])
                    target = torch.from_numpy(np.concatenate([labels[r] for r in rows]))
                    return F.binary_cross_entropy_with_logits(net(ids, mask)[mask], target)

                yield np.array([len(e) for e in encoded]), loss

        net = fit_net(
            lambda: TextNet(encoder.n_words, **cls.shape),
            passes(),
            cls.n_epochs,
            stage="judges: grammar/evaluation",
            seed=config.seed,
            learning_rate=8e-3,
            batch_tokens=6144,
        )
        return cls(encoder, net)

    def rate(self, texts: list[str]) -> np.ndarray:
        """The score of each text, at most 0."""
        logits = self.of_tokens([_without_fragment(t) for t in texts])
        return np.array([-np.logaddexp(0.0, row).mean() for row in logits])
