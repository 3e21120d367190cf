"""What can each judge do, and what not? The report card."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset
from scipy.stats import rankdata

from ...store import progress
from .corruptions import CORRUPTIONS, DAMAGE
from .panel import Judges
from .probes import PROBES, diluted, generic, negated_pairs, padded, repeated, written_pairs
from .words import common_words, piece, sentences

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
    common = common_words(reviews)
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
