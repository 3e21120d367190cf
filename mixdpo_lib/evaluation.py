"""What came out? Tidy tables with intervals.

Intervals are 95 % bootstrap intervals over prompts: pairs and texts of one prompt are not independent, so whole prompts
are drawn, and the seeds of a method are averaged within a prompt first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from scipy.stats import t as student_t
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from torch import Tensor

from .data.pairs import Pairs
from .elbo import correct, mixture_log_likelihood
from .policy.mixture import MixturePolicy

N_BOOTSTRAP = 2000


def bootstrap_means(
    values: np.ndarray, n_bootstrap: int = N_BOOTSTRAP, seed: int = 0
) -> np.ndarray:
    """Means over resampled rows (clusters), (n_bootstrap, columns); NaN entries are left out, NaN where nothing is left."""
    rng = np.random.default_rng(seed)
    known = np.isfinite(values)
    filled = np.where(known, values, 0.0)
    draws = rng.multinomial(len(values), np.full(len(values), 1 / len(values)), size=n_bootstrap)
    n = (draws @ known).astype(float)
    return (draws @ filled) / np.where(n > 0, n, np.nan)


def interval(draws: np.ndarray) -> tuple[float, float]:
    """The 2.5 and 97.5 percentiles of bootstrap draws; those that are NaN, which drew nothing known, are left out."""
    known = draws[~np.isnan(draws)]
    low, high = np.percentile(known, [2.5, 97.5]) if len(known) else (np.nan, np.nan)
    return float(low), float(high)


def mean_bounds(values: Float[np.ndarray, "units"], sure: float = 0.99) -> tuple[float, float]:
    """What the mean over all units lies above, and below, with probability `sure` each: mean -+ t s / sqrt(n).

    t is the quantile of Student's distribution with n - 1 degrees of freedom. The ends of a percentile bootstrap of n
    units are about -+ 2.33 s sqrt(n - 1) / n at 99 %: for 20 units an eighth too close.

    Parameters
    ----------
    values : one a unit, n >= 2, any unit; sure : in (0.5, 1).

    Raises
    ------
    ValueError : fewer than two units.

    >>> low, high = mean_bounds(np.array([1.0, 2.0, 3.0, 4.0]))
    >>> round(low, 3), round(high, 3)
    (-0.431, 5.431)
    """
    if len(values) < 2:
        raise ValueError(f"values: found {len(values)} unit, expected at least 2")
    error = values.std(ddof=1) / len(values) ** 0.5
    reach = student_t.ppf(sure, len(values) - 1) * error
    return float(values.mean() - reach), float(values.mean() + reach)


def align(
    responsibilities: Float[np.ndarray, "units experts"],
    groups: Sequence[str],
    names: Sequence[str],
) -> list[int]:
    """Which expert serves which group: order[i] is the expert of names[i] (Hungarian, on summed responsibilities).

    With fewer experts than groups, or more, the unmatched are left out (-1 for a group without an expert).

    >>> align(np.array([[0.1, 0.9], [0.8, 0.2]]), ["a", "b"], ["a", "b"])
    [1, 0]
    """
    where = np.array(list(groups))
    table = np.stack([responsibilities[where == n].sum(0) for n in names])
    rows, columns = linear_sum_assignment(-table)
    order = [-1] * len(names)
    for r, c in zip(rows, columns, strict=True):
        order[r] = int(c)
    return order


def recovery(responsibilities: pd.DataFrame, groups: Sequence[str]) -> dict[str, float | int]:
    """NMI, ARI and aligned accuracy of the most responsible expert against the hidden groups of the units.

    >>> q = pd.DataFrame([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7]])
    >>> recovery(q, ["a", "a", "b"])
    {'n_users': 3, 'nmi': 1.0, 'ari': 1.0, 'aligned_accuracy': 1.0}
    """
    label = responsibilities.to_numpy().argmax(1)
    names = sorted(set(groups))
    order = align(np.eye(responsibilities.shape[1])[label], groups, names)
    hits = [label[i] == order[names.index(g)] for i, g in enumerate(groups)]
    return {
        "n_users": len(label),
        "nmi": float(normalized_mutual_info_score(list(groups), label)),
        "ari": float(adjusted_rand_score(list(groups), label)),
        "aligned_accuracy": float(np.mean(hits)),
    }


def align_circle(
    found: Float[np.ndarray, "users"], true: Float[np.ndarray, "users"]
) -> Float[np.ndarray, "users"]:
    """Angles found, turned and mirrored onto the true ones (circular Procrustes), radians in [-pi, pi).

    A circle that is turned or mirrored, with the basis turned back, is the same model. Of both orientations the turn
    that makes `|sum exp(i (true - found))|` largest is taken.

    >>> align_circle(np.array([0.5, 0.4, 0.2]), np.array([0.0, 0.1, 0.3])).round(6)
    array([0. , 0.1, 0.3])
    """
    sign, turn = circle_turn(found, true)
    return (sign * found + turn + np.pi) % (2 * np.pi) - np.pi


def circle_turn(
    found: Float[np.ndarray, "users"], true: Float[np.ndarray, "users"]
) -> tuple[int, float]:
    """Orientation (1 or -1) and turn (radians) of `align_circle`, which bring any angle of the found circle to the true one.

    >>> sign, turn = circle_turn(np.array([0.5, 0.4, 0.2]), np.array([0.0, 0.1, 0.3]))
    >>> sign, round(turn, 6)
    (-1, 0.5)
    """
    means = {sign: np.exp(1j * (true - sign * found)).mean() for sign in (1, -1)}
    sign = max(means, key=lambda one: abs(means[one]))
    return sign, float(np.angle(means[sign]))


def choose_n_experts(held_out: pd.DataFrame) -> int:
    """The smallest K whose held-out log-likelihood per unit is within one standard error of the best K's.

    Parameters
    ----------
    held_out : one row a held-out unit, one column a K, nats per unit. The standard error is that of the paired
        difference to the best K: units differ far more from each other than the Ks do.

    Raises
    ------
    ValueError : fewer than two units.

    >>> choose_n_experts(pd.DataFrame({1: [-9.0, -6.0, -7.0], 2: [-5.0, -4.0, -4.0], 3: [-5.1, -3.8, -4.0]}))
    2
    """
    if len(held_out) < 2:
        raise ValueError(
            f"no held-out units to choose K by: found {len(held_out)}, expected at least 2"
        )
    best = held_out.mean().idxmax()
    behind = held_out.rsub(held_out[best], axis=0)
    error = behind.std(ddof=1) / len(behind) ** 0.5
    return int(min(k for k in held_out if behind[k].mean() <= error[k]))


class Criteria(NamedTuple):
    """loglik : of all units, nats. n_free : numbers free to fit. n_units : of latents. aic, bic : in units of deviance."""

    loglik: float
    n_free: int
    n_units: int
    aic: float
    bic: float


@torch.no_grad()
def information_criteria(
    policy: MixturePolicy, data: Dataset | Pairs, unit: str | None = "user"
) -> Criteria:
    """AIC = 2 p - 2 log L and BIC = p log U - 2 log L of the pairs that a mixture of tables was fitted to; smaller is better.

    log L = sum_u log sum_k w_uk prod_n exp(loglik_nk), p = K (A - C) + what is free of the gate (+ 1 for a learned lapse
    rate), A the answers that the pairs compare, C the sets of answers that no comparison connects (1, of a survey), U the
    number of units. They compare maxima: fit without priors (`TabularExperts(prior_scale=1e4)`,
    `LearnedWeights(k, alpha=1)`, `UserGate(weight_scale=1e3)`). Sources: Akaike (1974), Schwarz (1978).

    Parameters
    ----------
    unit : the column of those who share a latent; None: a latent each pair.

    Raises
    ------
    ValueError : experts or a gate whose free numbers are not counted: all but tables, and gates that read a prompt.

    >>> from mixdpo_lib.experts.tables import TabularExperts
    >>> from mixdpo_lib.gates.weights import LearnedWeights
    >>> experts, pairs = TabularExperts.from_pairs(["tea", "tea"], ["milk", "juice"], ["tea", "juice"], 2, user=[1, 2])
    >>> policy = MixturePolicy(experts, LearnedWeights(2))
    >>> information_criteria(policy, pairs)  # every answer 1/2 likely; 2 (3 - 1) rewards and 1 weight
    Criteria(loglik=-1.386..., n_free=5, n_units=2, aic=12.772..., bic=6.238...)
    """
    data = policy.prepare(data)
    experts: Any = policy.experts
    if not hasattr(experts, "n_free"):
        raise ValueError(
            f"{type(experts).__name__}: their free numbers cannot be counted; expected TabularExperts, or compare by "
            "held-out pairs (report, choose_k)"
        )
    n_free = experts.n_free(data.index) + policy.gate.n_free() + (policy.given_lapse == "learn")
    constants = policy.constants(data.texts)
    batches = (experts.batch(constants, part) for part in data.index.split(1024))
    loglik = torch.cat([policy.batch_loglik(batch) for batch in batches])
    ids, names = (None, data.rows) if unit is None else data.units(unit)
    total = float(mixture_log_likelihood(loglik, policy.log_w(data).double(), ids).sum())
    aic, bic = (cost * n_free - 2 * total for cost in (2, math.log(len(names))))
    return Criteria(total, n_free, len(names), aic, bic)


def prompt_accuracy(
    policy: MixturePolicy,
    test: Pairs,
    weights: dict[str, Float[Tensor, "rows experts"]],
    test_loglik: Float[Tensor, "pairs experts"] | None = None,
) -> pd.DataFrame:
    """Share of correct predictions by group and prompt: sum_k w_k sigma(D_k) > 0.5, one half counts half.

    Parameters
    ----------
    test : noise-free pairs with columns group and prompt_id.
    weights : by group, log_w of each user of that group (one row a user); a user is scored on its group's pairs.

    Returns
    -------
    group, prompt_id, accuracy (mean over users and pairs of the prompt), n_pairs.
    """
    loglik = policy.loglik(test) if test_loglik is None else test_loglik
    group = np.array(test.rows["group"])
    prompt = np.array(test.rows["prompt_id"])
    parts = []
    for name, log_w in weights.items():
        mask = np.flatnonzero(group == name)
        hits = correct((loglik[mask][None] + log_w[:, None]).logsumexp(-1).exp()).double()
        table = pd.DataFrame(
            {
                "group": name,
                "prompt_id": prompt[mask],
                "accuracy": hits.mean(0).numpy(),
                "n_pairs": 1,
            }
        )
        parts.append(
            table.groupby(["group", "prompt_id"], as_index=False).agg(
                {"accuracy": "mean", "n_pairs": "sum"}
            )
        )
    return pd.concat(parts, ignore_index=True)


def by_prompt_and_group(by_prompt: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """(prompts, groups) accuracies and pair counts, seeds averaged within a prompt."""
    mean = by_prompt.pivot_table(
        index="prompt_id", columns="group", values="accuracy", aggfunc="mean"
    )
    count = by_prompt.pivot_table(
        index="prompt_id", columns="group", values="n_pairs", aggfunc="mean"
    ).reindex_like(mean)
    return mean.to_numpy(), count.fillna(0).to_numpy(), list(mean.columns)


def group_accuracy(
    accuracy: np.ndarray, count: np.ndarray, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Pair-weighted accuracy of each group, and its bootstrap draws over prompts (the same prompts for all groups)."""
    rng = np.random.default_rng(seed)
    hits = np.where(count > 0, np.nan_to_num(accuracy) * count, 0.0)
    draws = rng.multinomial(len(hits), np.full(len(hits), 1 / len(hits)), size=N_BOOTSTRAP)
    asked = draws @ count
    return hits.sum(0) / count.sum(0), (draws @ hits) / np.where(asked > 0, asked, np.nan)


def summarise_accuracy(by_prompt: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """Accuracy with intervals by group, mean and worst group; one row a seed, and seed "mean" for all seeds together.

    Parameters
    ----------
    by_prompt : rows of `prompt_accuracy` with the columns `keys` (for example design, method, routing, users) and seed.
    """
    rows = []
    for key, part in by_prompt.groupby(list(keys), sort=False):
        seeds: list[object] = [*sorted(part["seed"].unique()), "mean"]
        for s in seeds:
            accuracy, count, names = by_prompt_and_group(
                part if s == "mean" else part[part["seed"] == s]
            )
            means, draws = group_accuracy(accuracy, count)
            head = dict(zip(keys, key, strict=True)) | {"seed": str(s)}
            for i, name in enumerate(names):
                low, high = interval(draws[:, i])
                n = int(count[:, i].sum())
                rows.append(
                    {
                        **head,
                        "group": name,
                        "n_pairs": n,
                        "accuracy": means[i],
                        "low": low,
                        "high": high,
                    }
                )
            for name, value, spread in (
                ("mean", means.mean(), draws.mean(1)),
                ("worst", means.min(), draws.min(1)),
            ):
                low, high = interval(spread)
                n = int(count.sum())
                rows.append(
                    {
                        **head,
                        "group": name,
                        "n_pairs": n,
                        "accuracy": value,
                        "low": low,
                        "high": high,
                    }
                )
    return pd.DataFrame(rows)


def accuracy_gain(better: pd.DataFrame, baseline: pd.DataFrame) -> pd.DataFrame:
    """Gain of one method over another on the same prompts, paired: groups, mean and worst; all seeds and each seed.

    The worst-group gain is the difference of the two worst groups, which may be different ones.
    """
    rows = []
    for s in ["mean", *sorted(better["seed"].unique())]:
        parts = [t if s == "mean" else t[t["seed"] == s] for t in (better, baseline)]
        (a, count, names), (b, _, _) = (by_prompt_and_group(part) for part in parts)
        (mean_a, draw_a), (mean_b, draw_b) = group_accuracy(a, count), group_accuracy(b, count)
        for i, name in enumerate(names):
            low, high = interval(draw_a[:, i] - draw_b[:, i])
            rows.append(
                {
                    "seed": str(s),
                    "group": name,
                    "gain": mean_a[i] - mean_b[i],
                    "low": low,
                    "high": high,
                }
            )
        for name, f in (("mean", np.mean), ("worst", np.min)):
            low, high = interval(f(draw_a, axis=1) - f(draw_b, axis=1))
            rows.append(
                {
                    "seed": str(s),
                    "group": name,
                    "gain": f(mean_a) - f(mean_b),
                    "low": low,
                    "high": high,
                }
            )
    return pd.DataFrame(rows)


def reliability(probability: np.ndarray, outcome: np.ndarray, n_bins: int = 10) -> pd.DataFrame:
    """Do events of probability p happen with frequency p? Bins of equal width; empty ones are left out.

    Columns: probability (mean in the bin), frequency, low, high (95 %, Wilson), n, and `calibration_error`, the same in
    every row: sum over bins of n |frequency - probability| / total.

    >>> reliability(np.array([0.1, 0.1, 0.9, 0.9]), np.array([0, 0, 1, 0]), 2)[["probability", "frequency", "n"]]
       probability  frequency  n
    0          0.1        0.0  2
    1          0.9        0.5  2
    """
    p, y = np.asarray(probability, float), np.asarray(outcome, float)
    if p.shape != y.shape or len(p) == 0 or not ((p >= 0) & (p <= 1)).all():
        raise ValueError(
            f"probability {p.shape}, outcome {y.shape}: expected as many of each, probabilities in [0, 1]"
        )
    table = pd.DataFrame(
        {"bin": np.minimum((p * n_bins).astype(int), n_bins - 1), "probability": p, "frequency": y}
    )
    means = table.groupby("bin").agg(
        probability=("probability", "mean"),
        frequency=("frequency", "mean"),
        n=("frequency", "size"),
    )
    z, n, f = 1.96, means["n"], means["frequency"]
    centre, half = (f + z * z / (2 * n)) / (1 + z * z / n), z / (1 + z * z / n)
    spread = half * np.sqrt(f * (1 - f) / n + z * z / (4 * n * n))
    error = float((n * (f - means["probability"]).abs()).sum() / n.sum())
    out = means.assign(low=centre - spread, high=centre + spread, calibration_error=error)
    return out.reset_index(drop=True)
