"""How is a table shown?  Every function is ``f(table, ax) -> ax``: it draws and computes nothing.

A table that lacks a column, or mixes what one figure cannot tell apart, is refused by name.
Without axes a function makes its own, a column wide.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes

from .look import COLOURS, DASHES, GREY, MARKERS, Look, Looks, legend_above, looks_of, subplots

CURVE_LABELS = {
    "elbo": "bound (nats per pair)",
    "expected_loglik": "expected log-likelihood (nats per pair)",
    "kl_q_w": "KL(q || w) (nats per pair)",
    "bound_gap": "log-likelihood minus bound (nats per pair)",
    "train_accuracy": "accuracy on training pairs (share)",
    "validation_accuracy": "accuracy on validation pairs (share)",
    "validation_loglik": "validation log-likelihood\n(nats per pair)",
    "validation_elbo": "validation bound (nats per pair)",
    "entropy": "entropy of responsibilities\n(nats per unit)",
    "seconds": "time (s)",
}


def need(table: pd.DataFrame, columns: Sequence[str | None], plot: str) -> None:
    """Refuse a table that lacks a column or has no row."""
    missing = [column for column in columns if column and column not in table.columns]
    if missing:
        raise ValueError(f"{plot}: the table lacks {missing}; it has {list(table.columns)}")
    if len(table) == 0:
        raise ValueError(f"{plot}: the table has no rows; check what it was filtered by")


def one_of(table: pd.DataFrame, columns: Sequence[str], plot: str) -> None:
    """Refuse a table that mixes what one figure cannot tell apart."""
    for column in columns:
        found = list(dict.fromkeys(table.get(column, ())))
        if len(found) > 1:
            raise ValueError(f"{plot}: column {column!r} holds {found}; filter the table to one")


def mean_rows(table: pd.DataFrame) -> pd.Series:
    """Rows that sum up the seeds, marked by "mean" in the column ``seed``."""
    return table.get("seed", pd.Series("", table.index)).astype(str).isin(("mean", "median"))


def _series(
    rows: pd.DataFrame, by: str | None, looks: Looks | None
) -> Iterator[tuple[Look, pd.DataFrame]]:
    """Each series of a table with its look; the whole table where it has no series."""
    if by is None:
        yield Look("", COLOURS[0], MARKERS[0]), rows
    else:
        for name, look in looks_of(rows[by], looks).items():
            yield look, rows[rows[by] == name]


def _axes(ax: Axes | None) -> Axes:
    return subplots("column")[1] if ax is None else ax


def _small() -> float:
    """Area of a seed's marker."""
    return 0.5 * mpl.rcParams["lines.markersize"] ** 2


def points(
    table: pd.DataFrame,
    ax: Axes | None,
    category: str,
    value: str,
    by: str | None = None,
    looks: Looks | None = None,
    places: Sequence[Any] | None = None,
    interval: tuple[str, str] = ("low", "high"),
    horizontal: bool = False,
) -> Axes:
    """One quantity by category: every seed a small point, beside it the mean with its interval.

    Parameters
    ----------
    table : columns `category`, `value`, optionally `by` (series, side by side), ``seed`` and the
        two of `interval`.  Rows with seed "mean" are the large markers; where a series has none,
        the mean of its seeds is.
    places : the categories that are drawn, in their order; by default all, as they first appear.
    horizontal : categories from top to bottom, values to the right.
    """
    need(table, [category, value, by], "points")
    ax, places = _axes(ax), list(dict.fromkeys(table[category]) if places is None else places)
    rows = table[table[category].isin(places)].reset_index(drop=True)
    ends = [end for end in interval if end in rows]
    rows["_at"], width = slots(rows, category, places, by, looks)
    rows = rows.astype({column: float for column in (value, *ends)})
    aside = min(0.2 * width, 0.08) if "seed" in rows else 0.0

    def where(at: Any, height: Any) -> dict[str, Any]:
        return {"x": height, "y": at} if horizontal else {"x": at, "y": height}

    for look, part in _series(rows, by, looks):
        is_mean = mean_rows(part)
        if aside:
            seeds = part[~is_mean]
            seeds = seeds[seeds.groupby("_at")["_at"].transform("size") > 1]  # one is its mean
            repeats = seeds.groupby("_at")["_at"]
            spread = (repeats.cumcount() + 0.5) / repeats.transform("size") - 0.5
            spots = where(seeds["_at"] + aside * (1.6 * spread - 1), seeds[value])
            sns.scatterplot(**spots, color=look.colour, marker=look.marker, s=_small(), ax=ax)
        large = part[is_mean | ~part["_at"].isin(part["_at"][is_mean])]
        large = large.groupby("_at")[[value, *ends]].mean()
        line: dict[str, Any] = {"color": look.colour, "marker": look.marker, "linestyle": "none"}
        line |= {"markerfacecolor": look.colour if look.filled else "white", "label": look.label}
        if len(ends) == 2:
            bars = [large[value] - large[ends[0]], large[ends[1]] - large[value]]
            line["xerr" if horizontal else "yerr"] = np.clip(bars, 0, None)
        ax.errorbar(**where(large.index + aside, large[value]), **line, capsize=2, zorder=4)

    axis, between = (ax.yaxis, ax.axhline) if horizontal else (ax.xaxis, ax.axvline)
    axis.set_ticks(range(len(places)), [str(place) for place in places])
    axis.grid(visible=False)
    if horizontal:
        ax.set(xlabel=value, ylabel=category, ylim=(len(places) - 0.5, -0.5))
    else:
        ax.set(xlabel=category, ylabel=value, xlim=(-0.5, len(places) - 0.5))
    if by:
        for edge in range(1, len(places)):
            between(edge - 0.5, color="#E2E2E2", linewidth=0.8)
        legend_above(ax)
    return ax


def slots(
    rows: pd.DataFrame, category: str, places: Sequence, by: str | None, looks: Looks | None = None
) -> tuple[pd.Series, float]:
    """Where a row stands: at its category's number, the series that occur there side by side.

    Returns the places and the width of one series.
    """
    at = rows[category].map(list(places).index).astype(float)
    if by is None:
        return at, 0.8
    number = rows[by].map(list(looks_of(rows[by], looks)).index).groupby(at)
    beside, width = number.transform("nunique"), 0.8 / int(number.nunique().max())
    return at + width * (number.rank(method="dense") - (beside + 1) / 2), width


def dots(
    table: pd.DataFrame, ax: Axes | None, category: str, value: str, x_label: str = ""
) -> Axes:
    """One quantity by category, from top to bottom; otherwise as :func:`points`.

    Parameters
    ----------
    table : columns category and value, optionally ``seed``, ``low`` and ``high`` (95 % interval).
    x_label : with the unit; the column's name by default.
    """
    need(table, [category, value], "dots")
    ax = points(table, ax, category, value, horizontal=True)
    ax.locator_params(axis="x", nbins=4)
    ax.set(xlabel=x_label or value, ylabel="")
    return ax


def curves(
    table: pd.DataFrame,
    ax: Axes | None,
    x: str,
    y: str,
    by: str | None = None,
    x_label: str = "",
    y_label: str = "",
    log_x: bool = False,
    looks: Looks | None = None,
    each: str | None = None,
    interval: tuple[str, str] | None = None,
) -> Axes:
    """One quantity against another, a line through the means of each series; every seed a point.

    Parameters
    ----------
    table : columns x, y and optionally by (the series); one row a seed or repetition.
    x_label, y_label : with units; the columns' names by default.
    log_x : logarithmic x, ticks at the values that occur.
    each : a column whose values ("seed") get a line of their own each, in place of the mean's.
    interval : two columns, the ends of a bar at each point.
    """
    need(table, [x, y, by, each, *(interval or ())], "curves")
    ax, rows = _axes(ax), table.dropna(subset=[x, y])
    for position, (look, part) in enumerate(_series(rows, by, looks)):
        drawn = dict(data=part, x=x, y=y, color=look.colour, marker=look.marker, ax=ax)
        dashes, marked = DASHES[position % len(DASHES)], max(1, part[x].nunique() // 12)
        line = {"label": look.label, "linestyle": dashes, "markevery": marked, "legend": False}
        line |= {"estimator": None if each else "mean", "units": each, "errorbar": None}
        sns.lineplot(**drawn, **line, markeredgewidth=0.4)
        if not each and part[x].duplicated().any():
            sns.scatterplot(**drawn, s=_small())
        if interval:
            low, high = (part[end] for end in interval)
            thin = 0.7 * mpl.rcParams["lines.linewidth"]
            ax.vlines(part[x], low, high, color=look.colour, linewidth=thin)
    values = sorted(rows[x].unique())
    if log_x:
        ax.set_xscale("log")
    if log_x or (len(values) <= 12 and all(float(value).is_integer() for value in values)):
        ax.set_xticks(values, [f"{value:g}" for value in values])
        ax.minorticks_off()
    ax.set(xlabel=x_label or x, ylabel=y_label or y)
    if by and rows[by].nunique() > 1:
        legend_above(ax)
    return ax


def training_curves(
    history: pd.DataFrame, ax: Axes | None = None, column: str = "elbo", looks: Looks | None = None
) -> Axes:
    """One quantity of a fit, or of several, against the pairs seen; one line a method and seed.

    Parameters
    ----------
    history : as `fit` gives it (``result.history``): columns ``pairs_seen`` and `column`;
        optionally ``method`` and ``seed``, and one ``design``.
    column : what is drawn, for example "elbo" (nats per pair) or "validation_accuracy".
    """
    need(history, ["pairs_seen", column], "training_curves")
    one_of(history, ["design"], "training_curves")
    if history[column].isna().all():
        raise ValueError(
            f"training_curves: column {column!r} holds no number; what is measured on validation "
            "pairs needs fit(..., validation=...)"
        )
    by, each = (name if name in history else None for name in ("method", "seed"))
    label = CURVE_LABELS.get(column, column.replace("_", " "))
    ax = curves(history, ax, "pairs_seen", column, by, y_label=label, looks=looks, each=each)
    n = history["seed"].nunique() if each else 1
    ax.set(xlabel="pairs seen" + (f" (one line a seed, {n} seeds)" if n > 1 else ""))
    ax.xaxis.set_major_locator(mpl.ticker.MaxNLocator(5))
    ax.xaxis.set_major_formatter("{x:,.0f}")
    ax.set_xlim(left=0)
    return ax


def reliability(
    table: pd.DataFrame,
    ax: Axes | None = None,
    by: str | None = None,
    looks: Looks | None = None,
    x_label: str = "predicted probability",
    y_label: str = "frequency (share)",
) -> Axes:
    """Frequency against predicted probability with 95 % intervals; on the diagonal they agree.

    Parameters
    ----------
    table : as `evaluation.reliability` gives it; of several ones, a column `by` tells them apart.
    """
    need(table, ["probability", "frequency", "low", "high", by], "reliability")
    one_of(table, [] if by else ["method"], "reliability")
    ax = _axes(ax)
    ax.plot([0, 1], [0, 1], color=GREY, linestyle=":", label="perfect calibration")
    ends = ("low", "high")
    curves(table, ax, "probability", "frequency", by, x_label, y_label, looks=looks, interval=ends)
    ticks = np.linspace(0, 1, 6)
    ax.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), xticks=ticks, yticks=ticks)
    legend_above(ax)
    return ax


def heat(grid: pd.DataFrame, ax: Axes, bar: str = "", **options: Any) -> Axes:
    """Cells coloured by their value; `bar` names a colour bar, `options` are `sns.heatmap`'s."""
    options |= {"xticklabels": True, "yticklabels": True, "rasterized": True}  # no seams in PDF
    options |= {"annot_kws": {"size": mpl.rcParams["xtick.labelsize"]}, "cbar_kws": {"label": bar}}
    sns.heatmap(grid, ax=ax, cbar=bool(bar), **options)
    ax.tick_params(length=0, labelrotation=0)
    ax.set(xlabel="", ylabel="")
    return ax


def responsibility_map(
    q: pd.DataFrame, ax: Axes | None = None, groups: Mapping[Any, str] | pd.Series | None = None
) -> Axes:
    """Responsibility of each expert for each user; users of one expert (or group) side by side.

    Parameters
    ----------
    q : one row a user (named by the index), one column an expert (number k becomes "expert k+1"),
        probabilities, as `policy.responsibilities` gives it.
    groups : the group of each user by name; users of one group stand together.
    """
    odd = [str(name) for name in q if not pd.api.types.is_numeric_dtype(q[name])]
    if odd or not len(q) or (q < 0).any(axis=None) or not np.allclose(q.sum(axis=1), 1, atol=1e-3):
        raise ValueError(
            f"responsibility_map: found {len(q)} rows of {list(q)}, text in {odd}; expected one "
            "row a user, named by the index, and one column an expert, probabilities that sum to "
            "1, as policy.responsibilities gives them"
        )
    group = pd.Series("" if groups is None else [groups.get(user) for user in q.index], q.index)
    if group.isna().any():
        raise ValueError(f"responsibility_map: no group for {list(q.index[group.isna()])[:5]}")
    sizes = group.value_counts(sort=False)
    order = np.lexsort([*-q.to_numpy().T[::-1], group.map(list(sizes.index).index)])
    names = [name if isinstance(name, str) else f"expert {name + 1}" for name in q]
    ax = _axes(ax)
    heat(q.iloc[order].T.set_axis(names), ax, "responsibility", vmin=0, vmax=1, cmap="cividis")
    ends = sizes.to_numpy().cumsum()
    for end in ends[:-1]:
        ax.axvline(end, color="white", linewidth=2.5)
        ax.axvline(end, color="black", linewidth=0.8)
    if groups is not None:
        ax.set_xticks(ends - sizes.to_numpy() / 2, [f"{name}\n({n})" for name, n in sizes.items()])
    elif len(q) > 8:
        ax.set_xticks([])
    by = "by group" if groups is not None else "sorted by their expert"
    ax.set_xlabel(f"{q.index.name or 'row'}s, {by} (n = {len(q)})")
    return ax
