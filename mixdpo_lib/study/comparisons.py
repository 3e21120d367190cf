"""Which of many differences are more than chance? Paired bootstrap p-values, corrected by Holm."""

from __future__ import annotations

import numpy as np
import pandas as pd
from jaxtyping import Float

from ..evaluation import by_prompt_and_group, group_accuracy, interval

REFERENCE = "mix_dpo"


def bootstrap_p(draws: Float[np.ndarray, "draws"]) -> float:
    """Two-sided p-value of "no difference" from bootstrap draws of a paired difference.

    2 min(1 + #{draws <= 0}, 1 + #{draws >= 0}) / (n + 1), at most 1: never 0. Source: Davison and Hinkley 1997, section
    4.2, with the percentile interval inverted.

    >>> bootstrap_p(np.array([0.3, 0.1, 0.2]))
    0.5
    """
    tail = min((draws <= 0).sum(), (draws >= 0).sum())
    return min(1.0, 2 * (1 + int(tail)) / (len(draws) + 1))


def holm(p: Float[np.ndarray, "tests"]) -> Float[np.ndarray, "tests"]:
    """Holm's step-down correction: the i-th smallest of m times m - i + 1, rising, at most 1 (Holm 1979).

    >>> holm(np.array([0.04, 0.01, 0.03])).round(6).tolist()
    [0.06, 0.03, 0.06]
    """
    order = np.argsort(p, kind="stable")
    steps = p[order] * np.arange(len(p), 0, -1)
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return corrected


def served_by_own_pairs(by_prompt: pd.DataFrame) -> pd.DataFrame:
    """Of `ReviewUsers.accuracy_by_prompt` the users that were fitted, by their own pairs, or by all there is."""
    how = by_prompt["routing"].isin(["none", "own_pairs"])
    return by_prompt[how & (by_prompt["users"] == "seen")]


def accuracy_differences(by_prompt: pd.DataFrame, reference: str = REFERENCE) -> pd.DataFrame:
    """How far the reference lies above every other method: mean over the groups, and the worst group of each.

    Parameters
    ----------
    by_prompt : of one design, as `ReviewUsers.accuracy_by_prompt` gives it; all seeds together.

    Returns
    -------
    method, group ("mean", "worst"), difference, low, high (shares, the reference minus the method; percentile interval of
    95 % over prompts), p (paired bootstrap), p_holm (corrected over all rows).

    Raises
    ------
    ValueError : the reference is not there.
    """
    by_method = dict(list(served_by_own_pairs(by_prompt).groupby("method", sort=False)))
    if reference not in by_method:
        raise ValueError(f"method {reference!r} is not there; found {list(by_method)}")
    drawn = {m: group_accuracy(*by_prompt_and_group(part)[:2]) for m, part in by_method.items()}
    rows = []
    (mean, draws) = drawn.pop(reference)
    for method, (other, other_draws) in drawn.items():
        for group, of in (("mean", np.mean), ("worst", np.min)):
            spread = of(draws, axis=1) - of(other_draws, axis=1)
            low, high = interval(spread)
            found = {"difference": of(mean) - of(other), "low": low, "high": high}
            rows.append({"method": method, "group": group, **found, "p": bootstrap_p(spread)})
    table = pd.DataFrame(rows)
    return table.assign(p_holm=holm(table["p"].to_numpy()))
