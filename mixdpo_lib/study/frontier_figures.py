"""How are methods of the field shown beside each other? By accuracy, and by reward against distance."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes

from ..figures import Look, legend_above, points
from ..figures.look import DASHES, looks_of
from ..figures.plots import need
from .figures import METHOD_STYLE, ordered

BASELINE_STYLE: Mapping[str, Look] = {
    "dpo": METHOD_STYLE["dpo"],
    "mix_dpo": METHOD_STYLE["mix_dpo"],
    "moe_dpo": METHOD_STYLE["moe_dpo"],
    "hard_clusters": Look("hard clusters", "#E69F00", "^"),
    "uniform": Look("uniform mixture", "#8A8A8A", "s"),
    "translations": Look("continuous latent", "#CC79A7", "p"),
    "translations_2": Look("continuous latent, two numbers", "#882255", "h"),
    "dpo_metadata": Look("DPO, metadata in prompt", "#56B4E9", "v"),
    "robust": Look("group-robust DPO*", "#332288", ">", filled=False),
    "soup_equal": Look("soup, equal weights*", "#44AA99", "<", filled=False),
    "soup": Look("soup, by own pairs*", "#117733", "X", filled=False),
    "oracle": Look("a DPO a group*", "#000000", "P", filled=False),
}
FRONT_LABELS = {"worst": "worst-served group"}
KNOWING = "* knows the groups"
BEYOND = 1.15  # times the KL that all methods reach is drawn


def accuracy_by_method(accuracy: pd.DataFrame, ax: Axes) -> Axes:
    """Accuracy of every method, each user served by the own pairs: mean of the groups, and the worst group.

    Parameters
    ----------
    accuracy : columns ``method``, ``group`` ("mean" and "worst" are drawn), ``seed``, ``accuracy``, ``low``, ``high``
        (share of pairs, 95 % interval); rows whose seed is "mean" are the large markers.
    """
    need(accuracy, ["method", "group", "seed", "accuracy", "low", "high"], "accuracy_by_method")
    rows = accuracy[accuracy["group"].isin(["mean", "worst"])]
    need(rows, [], "accuracy_by_method, groups 'mean' and 'worst'")
    labels = {name: look.label for name, look in looks_of(rows["method"], BASELINE_STYLE).items()}
    rows = rows.assign(place=rows["method"].map(labels))
    two = {
        "mean": Look("mean of groups", "#0072B2", "o"),
        "worst": Look("worst group", "#D55E00", "D"),
    }
    points(rows, ax, "place", "accuracy", "group", two, list(labels.values()), horizontal=True)
    known = f"\n{KNOWING}" if any(label.endswith("*") for label in labels.values()) else ""
    ax.set_xlabel(f"accuracy on test pairs (share){known}")
    ax.set_ylabel("")
    return ax


def frontiers(table: pd.DataFrame, ax: Axes) -> Axes:
    """Gain of each method's texts against their distance from the base; a panel a reward, and the worst-served group.

    Each panel ends at `BEYOND` times the distance that all methods reach, and says so where points lie farther.

    Parameters
    ----------
    table : as `frontiers.front_points` gives it: ``method``, ``front``, ``kl`` (nats a text), ``gain``, ``low``, ``high``
        (standard deviations of the base's texts; 95 % intervals), ``n`` (texts a point).
    """
    need(table, ["method", "front", "kl", "gain", "low", "high", "n"], "frontiers")
    fronts, looks = ordered(set(table["front"])), looks_of(table["method"], BASELINE_STYLE)
    ax.set_axis_off()
    thin, cut = 0.6 * mpl.rcParams["lines.linewidth"], False
    reached = table.groupby(["front", "method"])["kl"].max().groupby("front").min()
    rows = (len(fronts) + 1) // 2
    high = 1 / (1.28 * rows - 0.28)
    for place, front in enumerate(fronts):
        row, column = divmod(place, 2)
        panel = ax.inset_axes((0.54 * column, 1 - high - 1.28 * high * row, 0.46, high))
        for number, (name, look) in enumerate(looks.items()):
            part = table[(table["method"] == name) & (table["front"] == front)].sort_values("kl")
            panel.plot(
                [0, *part["kl"]],
                [0, *part["gain"]],
                color=look.colour,
                linestyle=DASHES[number % len(DASHES)],
                marker=look.marker,
                markevery=slice(1, None),
                markerfacecolor=look.colour if look.filled else "white",
                label=look.label,
            )
            panel.vlines(part["kl"], part["low"], part["high"], color=look.colour, linewidth=thin)
        panel.axhline(0, color="black", linestyle=":", linewidth=thin, zorder=1)
        panel.set_title(FRONT_LABELS.get(front, front))
        near = BEYOND * reached[front]
        seen = table[(table["front"] == front) & (table["kl"] <= near)]
        panel.set_xlim(0, near)
        panel.axvline(reached[front], color="black", linestyle=":", linewidth=thin, zorder=1)
        if table.loc[table["front"] == front, "kl"].max() > near:
            room = 0.05 * (seen["high"].max() - seen["low"].min())
            panel.set_ylim(min(0, seen["low"].min()) - room, max(0, seen["high"].max()) + room)
            cut = True
        panel.locator_params(nbins=5)
        if column == 0:
            panel.set_ylabel("gain (SD of the\nbase's texts)")
        if place >= len(fronts) - 2:
            panel.set_xlabel("KL to the base (nats a text)")
    for look in looks.values():
        ax.plot(
            [],
            [],
            color=look.colour,
            marker=look.marker,
            markerfacecolor=look.colour if look.filled else "white",
            label=look.label,
        )
    notes = (
        f"n = {int(table['n'].min()):,} texts a point and group; bars: 95 % intervals over prompts"
    )
    notes += "\nupright dots: the KL that all reach"
    notes += f"; {KNOWING}" if any(look.label.endswith("*") for look in looks.values()) else ""
    notes += "; farther points are in the table" if cut else ""
    size = mpl.rcParams["xtick.labelsize"]
    ax.text(0, -0.15, notes, transform=ax.transAxes, va="top", fontsize=size)
    legend_above(ax, 1.07)
    return ax
