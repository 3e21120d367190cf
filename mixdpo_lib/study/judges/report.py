"""What can each judge do, and what not? The report card."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset
from jaxtyping import Float, Int
from scipy.stats import rankdata

from ...store import progress
from .contract import Judge
from .exam import Exam
from .panel import Judges

N_DRAWS = 200  # of a bootstrap
Row = dict[str, Any]
Rows = Int[np.ndarray, "drawn"]


def report_card(
    judges: Judges, reviews: Dataset, n: int = 300, seed: int = 0
) -> dict[str, pd.DataFrame]:
    """What each judge can and cannot do, measured on reviews that fitted none of them.

    Parameters
    ----------
    judges : fitted, of any rewards. reviews : columns text, label; the part "report" of
        `split_reviews`.
    n : pieces and sentences drawn (see `Exam`); 300 take about a minute.
    seed : of the draws and the bootstrap.

    Returns
    -------
    Tidy tables by name; low and high are 95 % bootstrap intervals over texts.
    `validity` : reward, judge, measure, task, value, low, high, n, bar (NaN where nothing is
        asked). What each judge's own `examine` says. Measures: accuracy; paired rank (how often a
        text beats its own worse version; ties count half); auc (the same against the worse versions
        of all texts, which is harder). A task for which no text offers a place is left out.
    `spread` : reward, judge, unit, mean, sd, p5, p50, p95, tied (share of texts whose score another
        text has too), n.
    `agreement` : first, second, kind ("one reward", "two rewards", "itself"), spearman, low, high,
        n; by judge name.
    `probes` : reward, judge, probe, effect (mean change of score, in sd of real pieces), low, high,
        size (mean absolute change), n.
    `scores` : text (number), reward, judge, unit, score: of `n` real pieces.

    Raises
    ------
    ValueError : fewer than 20 sentences or pieces can be drawn.
    """
    exam = Exam.draw(reviews, judges.config.piece_words, n, seed)
    rng, everyone = np.random.default_rng(seed), judges.everyone
    rows: dict[str, list[Row]] = {"validity": [], "spread": [], "probes": [], "scores": []}
    scores: dict[str, np.ndarray] = {}
    for number, judge in enumerate(everyone):
        progress("report card", number, len(everyone), judge.name)
        own = scores[judge.name] = judge.score(exam.pieces)
        found = {  # in this order: all of them draw from one generator
            "validity": _validity(judge, exam, rng),
            "spread": _spread(judge, own),
            "probes": _probes(judge, exam, own, rng),
            "scores": ({"unit": judge.unit, "score": score} for score in own),
        }
        for name, of_judge in found.items():
            for row in of_judge:
                rows[name].append({"reward": judge.reward, "judge": judge.role, **row})
                progress("report card", number, len(everyone), judge.name)
    progress("report card", len(everyone), len(everyone), "done")
    tables = {name: pd.DataFrame(of_all) for name, of_all in rows.items()}
    tables["scores"].insert(0, "text", list(range(len(exam.pieces))) * len(everyone))
    return {**tables, "agreement": judge_correlations(scores, seed)}


def _validity(judge: Judge, exam: Exam, rng: np.random.Generator) -> Iterator[Row]:
    for mark in judge.examine(exam):
        if mark.n:
            found = _interval(mark.statistic, mark.n, rng)
            bar = judge.bars.get(mark.task, np.nan)
            yield {"measure": mark.measure, "task": mark.task, **found, "n": mark.n, "bar": bar}


def _spread(judge: Judge, own: Float[np.ndarray, "pieces"]) -> Iterator[Row]:
    p5, p50, p95 = np.quantile(own, [0.05, 0.5, 0.95])
    moments = {"mean": own.mean(), "sd": _sd(own), "p5": p5, "p50": p50, "p95": p95}
    alone = (np.unique(own, return_counts=True)[1] == 1).sum()
    yield {"unit": judge.unit, **moments, "tied": 1 - alone / len(own), "n": len(own)}


def _probes(
    judge: Judge, exam: Exam, own: Float[np.ndarray, "pieces"], rng: np.random.Generator
) -> Iterator[Row]:
    for probe, versions in exam.tampered.items():
        before, after = judge.score_versions(own, versions)
        if len(after):
            change = (after - before) / _sd(own)
            found = _interval(partial(_mean, change), len(change), rng, "effect")
            size = float(np.abs(change).mean())
            yield {"probe": probe, **found, "size": size, "n": len(change)}


def _sd(scores: Float[np.ndarray, "texts"]) -> float:
    return float(scores.std()) or 1.0


def _interval(
    statistic: Callable[[Rows], float], n: int, rng: np.random.Generator, name: str = "value"
) -> dict[str, float]:
    """A statistic of `n` rows by its name, and its 95 % bootstrap interval over them: low, high."""
    draws = [statistic(rng.integers(0, n, n)) for _ in range(N_DRAWS)]
    low, high = np.quantile(draws, [0.025, 0.975])
    return {name: statistic(np.arange(n)), "low": float(low), "high": float(high)}


def _mean(values: Float[np.ndarray, "texts"], rows: Rows) -> float:
    return float(values[rows].mean())


def _spearman(a: Float[np.ndarray, "texts"], b: Float[np.ndarray, "texts"], rows: Rows) -> float:
    x, y = rankdata(a[rows]), rankdata(b[rows])
    return float(np.corrcoef(x, y)[0, 1]) if x.std() > 0 and y.std() > 0 else 0.0


def judge_correlations(scores: Mapping[str, np.ndarray], seed: int = 0) -> pd.DataFrame:
    """Spearman correlation of every two judges on the same texts.

    Parameters
    ----------
    scores : by judge name ("sentiment/training"), of the same texts in the same order.
    seed : of the bootstrap.

    Returns
    -------
    first, second, kind ("one reward", "two rewards", "itself"), spearman, low, high (95 %,
    bootstrap over texts), n. A judge whose scores are all equal correlates with none: 0.
    """
    rng, rows = np.random.default_rng(seed), []
    found = {(name, name): {"spearman": 1.0, "low": 1.0, "high": 1.0} for name in scores}
    for first, a in scores.items():
        for second, b in scores.items():
            if (second, first) in found:
                found[first, second] = found[second, first]
            else:
                found[first, second] = _interval(partial(_spearman, a, b), len(a), rng, "spearman")
            kind = "one reward" if first.split("/")[0] == second.split("/")[0] else "two rewards"
            who = {"first": first, "second": second, "kind": "itself" if first == second else kind}
            rows.append({**who, **found[first, second], "n": len(a)})
    return pd.DataFrame(rows)
