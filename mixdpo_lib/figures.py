"""How is a table shown?  Every function is ``f(table, ax) -> ax``: it draws what the table holds and computes nothing.

Colours are those of Okabe and Ito (told apart with any colour vision); a marker or a hatch says the same in grey print.
A method or a reward looks the same in every figure of the study.  Legends lie above the axes, outside the data: give a
title by ``fig.suptitle``.  A table that lacks a column, or that mixes what one figure cannot tell apart (two designs,
say), is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes


class Look(NamedTuple):
    """How a method or a reward looks in every figure."""

    label: str
    colour: str
    marker: str
    hatch: str


METHOD_STYLE: Mapping[str, Look] = {
    "base": Look("base model", "#8A8A8A", "s", ""),
    "dpo": Look("DPO", "#0072B2", "o", "///"),
    "dpo_rank_3r": Look("DPO, rank 3r", "#56B4E9", "v", "\\\\\\"),
    "mix_dpo": Look("Mix-DPO, per user", "#D55E00", "D", "..."),
    "dpo_rank_2r": Look("DPO, rank 2r", "#332288", ">", "\\\\\\"),
    "mix_dpo_pair": Look("Mix-DPO, per pair", "#E69F00", "^", "xxx"),
    "moe_dpo": Look("MoE-DPO", "#009E73", "P", "++"),
    "dpo_last_step": Look("DPO, last step", "#CC6677", "<", "|||"),
    "moe_dpo_top_1": Look("MoE-DPO, top-1", "#44AA99", "p", "**"),
    "supervised": Look("supervised classifier", "#7A4B00", "X", "--"),
    "oracle": Look("Mix-DPO, oracle", "#000000", "*", "ooo"),
}
EXPERT_STYLE: Mapping[str, Look] = {
    "sentiment": Look("sentiment", "#009E73", "o", "///"),
    "informativeness": Look("informativeness", "#CC79A7", "s", "..."),
    "grammar": Look("grammar", "#7A4B00", "^", "xxx"),
}
OTHER_COLOURS = ("#0072B2", "#D55E00", "#56B4E9", "#E69F00", "#8A8A8A", "#000000")
OTHER_MARKERS = ("P", "X", "<", ">", "h", "p")


def style() -> None:
    """Set matplotlib's defaults for the whole study: readable at 6 x 4 inches, no frame that carries nothing."""
    mpl.rcParams.update(
        {
            "figure.figsize": (6.0, 4.0),
            "figure.dpi": 100,
            "figure.constrained_layout.use": True,
            "savefig.dpi": 150,
            "font.size": 10,
            "axes.titlesize": 11,
            "axes.labelsize": 10,
            "axes.titlelocation": "left",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": "#E2E2E2",
            "grid.linewidth": 0.6,
            "xtick.labelsize": 9,
            "ytick.labelsize": 9,
            "legend.fontsize": 9,
            "legend.frameon": False,
            "lines.linewidth": 1.6,
            "lines.markersize": 6,
            "hatch.linewidth": 0.6,
            "svg.fonttype": "none",
        }
    )


def need(table: pd.DataFrame, columns: Sequence[str], plot: str) -> None:
    """Refuse a table that lacks a column or has no row."""
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise ValueError(f"{plot}: the table lacks {missing}; it has {list(table.columns)}")
    if len(table) == 0:
        raise ValueError(f"{plot}: the table has no rows; check what it was filtered by")


def look_of(name: str, known: Mapping[str, Look], position: int = 0) -> Look:
    """The look of a method or reward; names that the study does not know get one by position."""
    if name in known:
        return known[name]
    return Look(
        name, OTHER_COLOURS[position % len(OTHER_COLOURS)], OTHER_MARKERS[position % len(OTHER_MARKERS)], ""
    )


def place_legend(ax: Axes, handles: Sequence, labels: Sequence[str], columns: int, above: float = 1.0) -> None:
    ax.legend(
        handles, labels, loc="lower left", bbox_to_anchor=(0.0, above), ncols=columns, borderaxespad=0.3,
        borderpad=0.2, columnspacing=1.2, handlelength=1.8, handletextpad=0.5,
    )  # fmt: skip


def legend_above(ax: Axes, columns: int = 3) -> None:
    """One legend above the axes, outside the data; repeated labels appear once."""
    handles, labels = ax.get_legend_handles_labels()
    first = dict(zip(reversed(labels), reversed(handles), strict=True))
    names = [label for label in dict.fromkeys(labels)]
    if names:
        place_legend(ax, [first[name] for name in names], names, columns)


GROUP_ORDER = ("sentiment", "informativeness", "grammar", "all", "mean", "worst")
GROUP_LABELS = {"all": "all pairs", "mean": "mean of\ngroups", "worst": "worst\ngroup"}
CURVE_LABELS = {
    "elbo": "bound (nats per pair)",
    "expected_loglik": "expected log-likelihood (nats per pair)",
    "kl_q_w": "KL(q || w) (nats per pair)",
    "bound_gap": "log-likelihood minus bound (nats per pair)",
    "train_accuracy": "accuracy on training pairs (share)",
    "validation_accuracy": "accuracy on validation pairs (share)",
    "validation_loglik": "validation log-likelihood (nats per pair)",
    "validation_elbo": "validation bound (nats per pair)",
    "entropy": "entropy of responsibilities (nats per unit)",
    "responsibility_temperature": "temperature of responsibilities",
    "seconds": "time (s)",
}
RECOVERY_LABELS = {"nmi": "NMI", "ari": "adjusted\nRand index", "aligned_accuracy": "aligned\naccuracy"}
_MEAN_ROWS = ("mean", "all", "median")


def responsibility_map(responsibilities: pd.DataFrame, ax: Axes) -> Axes:
    """Responsibility of each expert for each user; users side by side, sorted by hidden group.

    Parameters
    ----------
    responsibilities : one design, method and seed; columns ``user``, ``group``, ``expert`` (0 ... K-1),
        ``responsibility`` (0 ... 1), optionally ``expert_serves`` (the group that the expert is aligned with).
    """
    need(responsibilities, ["user", "group", "expert", "responsibility"], "responsibility_map")
    one_of(responsibilities, ["design", "method", "seed"], "responsibility_map")
    experts = sorted(set(responsibilities["expert"]))
    groups = ordered(set(responsibilities["group"]))
    grid = responsibilities.pivot(index="user", columns="expert", values="responsibility")[experts]
    group_of = responsibilities.drop_duplicates("user").set_index("user")["group"]
    order = sorted(grid.index, key=lambda user: (groups.index(group_of[user]), *(-grid.loc[user]).tolist()))
    image = ax.imshow(grid.loc[order].to_numpy(float).T, vmin=0, vmax=1, cmap="cividis", aspect="auto")
    sizes = [int((group_of == group).sum()) for group in groups]
    ends = np.cumsum(sizes)
    for end in ends[:-1]:
        ax.axvline(end - 0.5, color="white", linewidth=3)
        ax.axvline(end - 0.5, color="black", linewidth=1)
    serves = {}
    if "expert_serves" in responsibilities:
        serves = responsibilities.drop_duplicates("expert").set_index("expert")["expert_serves"].to_dict()
    names = [f"expert {int(k) + 1}" + (f"\n(serves\n{serves[k]})" if k in serves else "") for k in experts]
    label_cells(ax, [], names)
    ax.set_xticks(ends - np.array(sizes) / 2 - 0.5, [f"{g}\n({n} users)" for g, n in zip(groups, sizes, strict=True)])
    ax.set_xlabel(f"users, by hidden group (n = {len(order)})")
    ax.figure.colorbar(image, ax=ax, label="responsibility")
    return ax


def recovery(recovery: pd.DataFrame, ax: Axes) -> Axes:
    """Agreement of responsibilities with the hidden groups; every seed a point, the median a bar.

    Parameters
    ----------
    recovery : columns ``method``, ``seed``, ``nmi``, ``ari``, ``aligned_accuracy`` (any of the three), optionally
        ``design``, ``n_users``.
    """
    need(recovery, ["method", "seed"], "recovery")
    measures = [name for name in RECOVERY_LABELS if name in recovery.columns]
    if not measures:
        raise ValueError(f"recovery: the table has none of {list(RECOVERY_LABELS)}; it has {list(recovery.columns)}")
    table = recovery[~mean_rows(recovery)]
    designs = list(dict.fromkeys(table["design"])) if "design" in table else [None]
    methods = known_first(table["method"], METHOD_STYLE)
    places = [(measure, design) for measure in measures for design in designs]
    width = 0.7 / len(methods)
    for position, method in enumerate(methods):
        look = look_of(method, METHOD_STYLE, position)
        offset = (position - (len(methods) - 1) / 2) * width
        for x, (measure, design) in enumerate(places):
            rows = table[table["method"] == method]
            values = (rows if design is None else rows[rows["design"] == design])[measure].to_numpy(float)
            if len(values) == 0:
                continue
            spread = np.linspace(-0.2, 0.2, len(values)) * width if len(values) > 1 else np.zeros(1)
            ax.plot(
                x + offset + spread, values, linestyle="none", marker=look.marker, color=look.colour, markersize=6,
                markerfacecolor="white", label=look.label, clip_on=False, zorder=3,
            )  # fmt: skip
            median = float(np.median(values))
            ends = [x + offset - 0.4 * width, x + offset + 0.4 * width]
            ax.plot(ends, [median, median], color=look.colour, linewidth=2.5)
    for x in range(len(designs), len(places), len(designs)):
        ax.axvline(x - 0.5, color="#C8C8C8", linewidth=1)
    ticks = [RECOVERY_LABELS[m] + (f"\n{d}" if d is not None and len(designs) > 1 else "") for m, d in places]
    ax.set_xticks(range(len(places)), ticks)
    ax.set_xlim(-0.5, len(places) - 0.5)
    ax.set_ylim(min(0.0, float(table[measures].min().min())), 1.0)
    ax.grid(axis="x", visible=False)
    users = f"n = {int(table['n_users'].max())} users; " if "n_users" in table else ""
    ax.set_xlabel(f"{users}points: seeds, bar: their median")
    ax.set_ylabel("agreement with the hidden groups\n(1 = all recovered)")
    legend_above(ax, 2)
    return ax


def training_curves(history: pd.DataFrame, ax: Axes, column: str = "elbo") -> Axes:
    """One quantity of the training history against the pairs seen; one line a seed.

    Parameters
    ----------
    history : one design; columns ``method``, ``seed``, ``pairs_seen`` and ``column``.
    column : what is drawn, for example "elbo" (nats per pair) or "validation_accuracy".
    """
    need(history, ["method", "seed", "pairs_seen", column], "training_curves")
    one_of(history, ["design"], "training_curves")
    lines = ("-", "--", "-.", ":")
    for position, method in enumerate(known_first(history["method"], METHOD_STYLE)):
        look = look_of(method, METHOD_STYLE, position)
        runs = history[history["method"] == method].dropna(subset=[column]).groupby("seed", sort=True)
        for _, run in runs:
            run = run.sort_values("pairs_seen")
            ax.plot(
                run["pairs_seen"], run[column], color=look.colour, linestyle=lines[position % len(lines)],
                linewidth=1.3, marker=look.marker, markersize=4.5, markevery=max(1, len(run) // 6), label=look.label,
            )  # fmt: skip
    seeds = history["seed"].nunique()
    ax.set_xlabel(f"pairs seen (one line a seed, {seeds} seed{'s' if seeds > 1 else ''})")
    ax.set_ylabel(CURVE_LABELS.get(column, column.replace("_", " ")))
    ax.xaxis.set_major_formatter("{x:,.0f}")
    ax.set_xlim(left=0)
    legend_above(ax, 2)
    return ax


def curves(
    table: pd.DataFrame, ax: Axes, x: str, y: str, by: str, x_label: str = "", y_label: str = "", log_x: bool = False
) -> Axes:
    """One quantity against another, a line through the means of each series; every seed a point.

    Parameters
    ----------
    table : columns x, y and by (the series, in order of first appearance); one row a seed or repetition.
    x_label, y_label : with units; the columns' names by default. log_x : logarithmic x, ticks at the values that occur.
    """
    need(table, [x, y, by], "curves")
    for position, (name, part) in enumerate(table.groupby(by, sort=False)):
        colour, marker = OTHER_COLOURS[position % 6], ("o", "s", "^", "D", "v", "P")[position % 6]
        mean = part.groupby(x)[y].mean()
        if part.groupby(x)[y].size().max() > 1:
            ax.scatter(part[x], part[y], s=14, marker=marker, facecolor="none", edgecolor=colour, linewidth=0.8)
        dashes = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))[position % 6]
        ax.plot(mean.index, mean, color=colour, marker=marker, markersize=5, linestyle=dashes, label=str(name))
    values = sorted(table[x].unique())
    if log_x:
        ax.set_xscale("log")
    if log_x or (len(values) <= 12 and all(float(value).is_integer() for value in values)):
        ax.set_xticks(values, [f"{value:g}" for value in values])
        ax.minorticks_off()
    ax.set_xlabel(x_label or x)
    ax.set_ylabel(y_label or y)
    if table[by].nunique() > 1:
        legend_above(ax, columns=min(4, table[by].nunique()))
    return ax


def reliability(table: pd.DataFrame, ax: Axes, by: str = "method") -> Axes:
    """Frequency against predicted probability with 95 % intervals; the diagonal is perfect calibration.

    Parameters
    ----------
    table : as `evaluation.reliability` gives it, with a column `by` for the series.
    """
    need(table, [by, "probability", "frequency", "low", "high", "n"], "reliability")
    ax.plot([0, 1], [0, 1], color="#8A8A8A", linestyle=":", label="perfect calibration")
    for position, (name, part) in enumerate(table.groupby(by, sort=False)):
        bars = [(part["frequency"] - part["low"]).clip(lower=0), (part["high"] - part["frequency"]).clip(lower=0)]
        look = look_of(str(name), METHOD_STYLE, position)
        ax.errorbar(
            part["probability"], part["frequency"], yerr=bars, color=look.colour, capsize=2.5, marker=look.marker,
            markersize=6, linestyle=("-", "--")[position % 2], label=look.label,
        )  # fmt: skip
    ax.set_xlabel("weight of the films' expert (probability)")
    ax.set_ylabel("share of prompts about films")
    ax.set_xlim(-0.03, 1.03)
    ax.set_ylim(-0.03, 1.03)
    legend_above(ax, columns=3)
    return ax


def dots(table: pd.DataFrame, ax: Axes, category: str, value: str, x_label: str = "") -> Axes:
    """One quantity by category, from top to bottom; every seed an open point, its mean filled with its interval.

    Parameters
    ----------
    table : columns category, value and ``seed``; rows with seed "mean" carry ``low`` and ``high`` (95 % interval) and
        stand for the mean, which is drawn from the seeds where there are none.
    x_label : with the unit; the column's name by default.
    """
    need(table, [category, "seed", value], "dots")
    names = list(dict.fromkeys(table[category]))
    for place, name in enumerate(names):
        part = table[table[category] == name]
        mean = mean_rows(part)
        seeds, summary = part[~mean], part[mean]
        ax.plot(
            seeds[value], [place + 0.12] * len(seeds), linestyle="none", marker="o", markersize=4,
            markerfacecolor="white", markeredgecolor=OTHER_COLOURS[0], markeredgewidth=0.9,
        )  # fmt: skip
        middle = float((summary if len(summary) else seeds)[value].astype(float).mean())
        bars = None
        if len(summary) and {"low", "high"} <= set(summary):
            row = summary.iloc[0]
            bars = [[max(middle - row["low"], 0.0)], [max(row["high"] - middle, 0.0)]]
        ax.errorbar(
            middle, place - 0.12, xerr=bars, linestyle="none", marker="D", markersize=6, capsize=2.5,
            color=OTHER_COLOURS[0],
        )  # fmt: skip
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.grid(axis="y", visible=False)
    ax.locator_params(axis="x", nbins=5)
    ax.set_xlabel(x_label or value)
    return ax


def ordered(names: Iterable[str]) -> list[str]:
    """Groups and rewards in the study's order, unknown ones after them."""
    return sorted(names, key=lambda name: (GROUP_ORDER.index(name) if name in GROUP_ORDER else 3 - 0.5, name))


def mean_rows(table: pd.DataFrame) -> pd.Series:
    """Rows that sum up the seeds, marked by "mean" in the column ``seed``; none without that column."""
    if "seed" not in table:
        return pd.Series(False, index=table.index)
    return table["seed"].astype(str).isin(_MEAN_ROWS)


def known_first(names: Iterable[str], known: Mapping[str, Look]) -> list[str]:
    found = list(dict.fromkeys(names))
    return [name for name in known if name in found] + [name for name in found if name not in known]


def one_of(table: pd.DataFrame, columns: Sequence[str], plot: str) -> None:
    """Refuse a table that mixes what one figure cannot tell apart."""
    for column in columns:
        if column in table and table[column].nunique() > 1:
            found = list(dict.fromkeys(table[column]))
            raise ValueError(f"{plot}: column {column!r} holds {found}; filter the table to one of them")


def dodged(table: pd.DataFrame, ax: Axes, category: str, categories: Sequence[str], by: str, value: str) -> None:
    """Seeds as open points, their mean as a filled marker with its interval, one column for each series."""
    series = known_first(table[by], METHOD_STYLE)
    width = 0.8 / len(series)
    is_mean = mean_rows(table)
    for position, name in enumerate(series):
        look = look_of(name, METHOD_STYLE, position)
        for x, place in enumerate(categories):
            here = (table[by] == name) & (table[category] == place)
            seeds, summary = table[here & ~is_mean].sort_values("seed"), table[here & is_mean]
            if not here.any():
                continue
            centre = x + (_slot(table, category, place, by, series, name)) * width
            spread = np.linspace(-0.16, 0.16, len(seeds)) * width if len(seeds) > 1 else np.zeros(len(seeds))
            ax.plot(
                centre - 0.2 * width + spread, seeds[value], linestyle="none", marker=look.marker, markersize=4,
                markerfacecolor="white", markeredgecolor=look.colour, markeredgewidth=0.9, zorder=3,
            )  # fmt: skip
            shown = (summary if len(summary) else seeds)[[value, "low", "high"]].astype(float).mean()
            mid, low, high = (float(shown[key]) for key in (value, "low", "high"))
            ax.errorbar(
                centre + 0.2 * width, mid, yerr=[[max(mid - low, 0.0)], [max(high - mid, 0.0)]], linestyle="none",
                marker=look.marker, color=look.colour, markersize=7, capsize=2.5, label=look.label, zorder=4,
            )  # fmt: skip
    for x in range(1, len(categories)):
        ax.axvline(x - 0.5, color="#E2E2E2", linewidth=0.8)
    ax.set_xlim(-0.5, len(categories) - 0.5)
    ax.grid(axis="x", visible=False)


def _slot(table: pd.DataFrame, category: str, place: str, by: str, series: Sequence[str], name: str) -> float:
    """Place of a series among those that occur in this category, centred."""
    present = set(table.loc[table[category] == place, by])
    here = [other for other in series if other in present]
    return here.index(name) - (len(here) - 1) / 2


def n_pairs_labels(table: pd.DataFrame, groups: Sequence[str]) -> list[str]:
    if "n_pairs" not in table:
        return ["" for _ in groups]
    rows = table[~mean_rows(table)]
    rows = rows if len(rows) else table
    largest = rows.groupby("group")["n_pairs"].max()
    return ["" if group == "worst" else f"n = {int(largest[group]):,}" for group in groups]


def accuracy_axis(ax: Axes) -> None:
    ax.axhline(0.5, color="black", linewidth=1, linestyle=":")
    low = min(0.48, ax.get_ylim()[0])
    ax.set_ylim(low, None)
    ax.annotate(
        "chance", (1, 0.5), xycoords=("axes fraction", "data"), xytext=(-2, 2), textcoords="offset points",
        fontsize=8, ha="right", va="bottom",
    )  # fmt: skip
    ax.set_ylabel("held-out preference accuracy\n(share of pairs, 95 % interval)")


def label_cells(ax: Axes, columns: Sequence[str], rows: Sequence[str]) -> None:
    ax.set_xticks(range(len(columns)), columns)
    ax.set_yticks(range(len(rows)), rows)
    ax.tick_params(length=0)
    ax.grid(visible=False)
    for side in ax.spines.values():
        side.set_visible(False)
