"""Which of many differences are more than chance? Paired bootstrap p-values, corrected by Holm."""

from __future__ import annotations

import numpy as np
import pandas as pd
from jaxtyping import Float

from ..evaluation import N_BOOTSTRAP, interval

REFERENCE = "mix_dpo"


def bootstrap_p(draws: Float[np.ndarray, "draws"]) -> float:
    """Two-sided p-value of "no difference" from bootstrap draws of a paired difference.

    2 min(1 + #{draws <= 0}, 1 + #{draws >= 0}) / (n + 1), at most 1: never 0. Source: Davison and Hinkley 1997, section
    4.2, with the percentile interval inverted.

    >>> bootstrap_p(np.array([0.3, 0.1, 0.2]))
    0.5
    """
    draws = draws[~np.isnan(draws)]  # of draws that hold no pair
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


def accuracy_differences(by_user: pd.DataFrame, reference: str = REFERENCE) -> pd.DataFrame:
    """How far the reference lies above every other method: mean over the groups, and the worst group of each.

    Prompts and users are resampled together, since a prompt is read by many users and a user reads many prompts: the
    weight of a user's pairs on a prompt in a draw is how often the user was drawn, within the group, times how often the
    prompt was. Source: Owen 2007, The pigeonhole bootstrap, Annals of Applied Statistics 1(2). All methods have the same draws.

    Parameters
    ----------
    by_user : of one design, as `ReviewUsers.accuracy_by_user` gives it; all seeds together, each with users of its own.

    Returns
    -------
    method, group ("mean", "worst"), difference, low, high (shares, the reference minus the method; percentile interval of
    95 % over prompts and users), p (paired bootstrap), p_holm (corrected over all rows).

    Raises
    ------
    ValueError : the reference is not there; a method that was not asked the same of the same users.
    """
    by_method = dict(list(by_user.groupby("method", sort=False)))
    if reference not in by_method:
        raise ValueError(f"method {reference!r} is not there; found {list(by_method)}")
    hits = {method: _hits(part) for method, part in by_method.items()}
    mine, n_pairs = hits.pop(reference)
    rng, users = np.random.default_rng(0), mine.index.to_frame(index=False)
    prompts = _weights(rng, mine.shape[1])
    groups = [np.flatnonzero(users["group"] == g) for g in dict.fromkeys(users["group"])]
    drawn = [_weights(rng, len(rows)) for rows in groups]

    def accuracy(table: pd.DataFrame) -> Float[np.ndarray, "draws groups"]:
        right, asked = table.to_numpy(), n_pairs.to_numpy()
        of_group = []
        for rows, who in zip(groups, drawn, strict=True):
            n = ((who @ asked[rows]) * prompts).sum(1)
            of_group.append(((who @ right[rows]) * prompts).sum(1) / np.where(n > 0, n, np.nan))
        return np.stack(of_group, 1)

    rows, own = [], accuracy(mine)
    for method, (other, asked) in hits.items():
        if not asked.equals(n_pairs):
            raise ValueError(
                f"method {method!r}: {len(asked)} users on {asked.shape[1]} prompts, {reference!r}: {len(n_pairs)} on "
                f"{n_pairs.shape[1]}, or with other pairs; expected the same, fit both with the same seeds"
            )
        theirs = accuracy(other)
        for group, of in (("mean", np.mean), ("worst", np.min)):
            spread = of(own, axis=1) - of(theirs, axis=1)
            low, high = interval(spread[1:])
            found = {"difference": spread[0], "low": low, "high": high}
            rows.append({"method": method, "group": group, **found, "p": bootstrap_p(spread[1:])})
    if not rows:
        raise ValueError(f"methods: found {reference!r} alone, expected others to compare with it")
    table = pd.DataFrame(rows)
    return table.assign(p_holm=holm(table["p"].to_numpy()))


def _hits(part: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(users, prompts) of a method: pairs that are predicted, and pairs that were asked."""
    keys = ["group", "seed", "user"]
    part = part.assign(right=part["accuracy"] * part["n_pairs"])
    wide = part.pivot_table(index=keys, columns="prompt_id", values=["right", "n_pairs"])
    return wide["right"].fillna(0.0), wide["n_pairs"].fillna(0.0)


def _weights(rng: np.random.Generator, n: int) -> Float[np.ndarray, "draws n"]:
    """How often each of n is drawn: first each once, then the bootstrap's draws."""
    draws = rng.multinomial(n, np.full(n, 1 / n), size=N_BOOTSTRAP)
    return np.concatenate([np.ones((1, n)), draws])
