"""Does a text praise? Two judges of sentiment."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from scipy.sparse import csr_matrix, diags
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from .contract import Judge, JudgeConfig, State, least_reviews
from .exam import Exam, Mark, paired_rank
from .nets import AveragingNet, fit_averaging_net, load_arrays, net_arrays
from .probes import negated_pairs
from .words import cut_pieces, piece

_FEATURE = r"[a-zA-Z]+(?:'[a-zA-Z]+)*|[!?]"


def _log_count_ratio(counts: csr_matrix, labels: np.ndarray) -> np.ndarray:
    """ln of the share of each term among the terms of positive texts over that among those of negative ones."""
    up, down = (1.0 + np.asarray((counts[labels == side] > 0).sum(0)).ravel() for side in (1, 0))
    return np.log(up / up.sum()) - np.log(down / down.sum())


class Sentiment(Judge):
    """What both judges are asked: does the sign of the score tell the label of a review?"""

    reward, unit = "sentiment", "logit"
    bars = {"whole reviews": 0.88, "first words": 0.75, "words anywhere": 0.75}

    def examine(self, exam: Exam) -> Iterator[Mark]:
        """Accuracy on whole reviews, their first words, and words from anywhere in them.

        Also the order of hand-written pairs of sentences that differ by one "not".
        """
        cuts = {
            "whole reviews": exam.texts,
            "first words": [piece(t, exam.piece_words, exam.rng, start=0) for t in exam.texts],
            "words anywhere": [piece(t, exam.piece_words, exam.rng) for t in exam.texts],
        }
        for task, texts in cuts.items():
            right = (self.score(texts) > 0) == (exam.labels == 1)
            yield Mark.mean("accuracy", task, right.astype(float))
        better, worse = (self.score(side) for side in zip(*negated_pairs(), strict=True))
        yield Mark.mean("accuracy", 'one "not"', paired_rank(better, worse))


class SentimentTraining(Sentiment):
    """Logit of a linear classifier of word 1- and 2-grams, fitted on pieces of the length that it judges.

    logit = b + sum_g a_g u_g / ||u||, u_g = (1 + ln count_g) idf_g: TF-IDF as in scikit-learn. In fitting, g is scaled
    by sqrt|r_g| + 0.1 with r_g its naive Bayes log-count ratio over whole reviews (after Wang and Manning 2012,
    "Baselines and bigrams"); on 40-token pieces this gains .01 over plain TF-IDF.
    """

    role, family = "training", "linear, word 1-2-grams"

    def __init__(
        self, terms: Sequence[str], idf: np.ndarray, weight: np.ndarray, bias: float
    ) -> None:
        self.terms, self.weight, self.bias = (
            list(terms),
            np.asarray(weight, np.float64),
            float(bias),
        )
        self._vectorizer = TfidfVectorizer(
            vocabulary={t: i for i, t in enumerate(self.terms)},
            ngram_range=(1, 2),
            sublinear_tf=True,
            token_pattern=_FEATURE,
        )
        self._vectorizer.idf_ = np.asarray(idf, np.float64)

    @classmethod
    def fit(cls, reviews: Dataset, config: JudgeConfig) -> SentimentTraining:
        """On whole reviews and pieces of them.

        Raises
        ------
        ValueError : reviews of one label only.
        """
        cut = cut_pieces(
            reviews["text"], config.pieces_per_review, config.piece_words, Random(config.seed)
        )
        texts = [t for pieces in cut for t in pieces]
        labels = np.repeat(np.asarray(reviews["label"]), config.pieces_per_review + 1)
        whole = np.arange(0, len(texts), config.pieces_per_review + 1)
        if len(set(labels)) < 2:
            raise ValueError(
                "sentiment: found reviews of one label only, expected both 0 and 1; add the other kind"
            )
        vectorizer = TfidfVectorizer(
            ngram_range=(1, 2),
            min_df=least_reviews(reviews, config),
            sublinear_tf=True,
            token_pattern=_FEATURE,
        )
        x = vectorizer.fit_transform(texts)
        scale = np.sqrt(np.abs(_log_count_ratio(x[whole], labels[whole]))) + 0.1
        x = x.multiply(scale).tocsr()
        model = LogisticRegression(C=0.5, solver="liblinear", random_state=config.seed).fit(
            x, labels
        )
        return cls(
            vectorizer.get_feature_names_out().tolist(),
            vectorizer.idf_,
            model.coef_[0] * scale,
            float(model.intercept_[0]),
        )

    def rate(self, texts: list[str]) -> np.ndarray:
        """The logit of each text: above 0 it praises."""
        return self._vectorizer.transform(texts) @ self.weight + self.bias

    def state(self) -> State:
        """Weights and document frequencies of the terms; the terms and the bias."""
        return {"idf": self._vectorizer.idf_, "weight": self.weight}, {
            "terms": self.terms,
            "bias": self.bias,
        }

    @classmethod
    def from_state(cls, arrays: dict[str, np.ndarray], values: dict[str, Any]) -> SentimentTraining:
        """The judge that gave this `state`."""
        return cls(values["terms"], arrays["idf"], arrays["weight"], values["bias"])


class SentimentEvaluation(Sentiment):
    """Logit of a deep averaging network over word 1- and 2-grams, fitted on other reviews than the training judge.

    Embeddings of the distinct terms are summed, divided by the square root of their number, and go through one hidden
    layer (`nets.AveragingNet`). A convolutional net fitted from nothing on as many reviews was worse (.74 on 40 tokens
    against .77). Limit: negation is seen within two words.
    """

    role, family = "evaluation", "deep averaging network"

    def __init__(self, terms: Sequence[str], net: AveragingNet) -> None:
        self.terms, self.net = list(terms), net
        self._vectorizer = CountVectorizer(
            vocabulary={t: i for i, t in enumerate(self.terms)},
            ngram_range=(1, 2),
            binary=True,
            token_pattern=_FEATURE,
        )

    @classmethod
    def fit(cls, reviews: Dataset, config: JudgeConfig) -> SentimentEvaluation:
        """On whole reviews and pieces of them."""
        cut = cut_pieces(
            reviews["text"], config.pieces_per_review, config.piece_words, Random(config.seed + 1)
        )
        labels = np.repeat(np.asarray(reviews["label"]), config.pieces_per_review + 1)
        whole = np.arange(0, len(labels), config.pieces_per_review + 1)
        vectorizer = CountVectorizer(
            ngram_range=(1, 2),
            min_df=least_reviews(reviews, config),
            binary=True,
            token_pattern=_FEATURE,
        )
        counts = vectorizer.fit_transform([t for pieces in cut for t in pieces])
        net = fit_averaging_net(
            cls._scaled(counts),
            labels,
            _log_count_ratio(counts[whole], labels[whole]),
            stage="judges: sentiment/evaluation",
            seed=config.seed,
        )
        return cls(vectorizer.get_feature_names_out().tolist(), net)

    @staticmethod
    def _scaled(counts: csr_matrix) -> csr_matrix:
        number = np.maximum(np.asarray(counts.sum(1)).ravel(), 1)
        return csr_matrix(diags(number**-0.5) @ counts, dtype=np.float32)

    def rate(self, texts: list[str]) -> np.ndarray:
        """The logit of each text: above 0 it praises."""
        with torch.inference_mode():
            return self.net(self._scaled(self._vectorizer.transform(texts))).double().numpy()

    def state(self) -> State:
        """Weights of the net; the terms."""
        return net_arrays(self.net), {"terms": self.terms}

    @classmethod
    def from_state(
        cls, arrays: dict[str, np.ndarray], values: dict[str, Any]
    ) -> SentimentEvaluation:
        """The judge that gave this `state`."""
        return cls(values["terms"], load_arrays(AveragingNet(len(values["terms"])), arrays))
