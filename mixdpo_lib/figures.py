"""How is a table shown?  Every function is ``f(table, ax) -> ax``: it draws what the table holds and computes nothing.

Colours are those of Okabe and Ito (told apart with any colour vision); a marker or a hatch says the same in grey print.
A method or a reward looks the same in every figure of the study.  Legends lie above the axes, outside the data: give a
title by ``fig.suptitle``.  A table that lacks a column, or that mixes what one figure cannot tell apart (two designs,
say), is refused by name.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

__all__ = [
    "EXPERT_STYLE",
    "METHOD_STYLE",
    "Look",
    "accuracy_by_domain",
    "accuracy_by_group",
    "accuracy_by_own_pairs",
    "curves",
    "dots",
    "group_disagreement",
    "judge_agreement",
    "judge_report",
    "pair_design",
    "probe_scores",
    "recovery",
    "reliability",
    "responsibility_map",
    "reward_distributions",
    "reward_gains",
    "routing_comparison",
    "style",
    "training_curves",
]


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

_OTHER_COLOURS = ("#0072B2", "#D55E00", "#56B4E9", "#E69F00", "#8A8A8A", "#000000")
_OTHER_MARKERS = ("P", "X", "<", ">", "h", "p")


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
        name, _OTHER_COLOURS[position % len(_OTHER_COLOURS)], _OTHER_MARKERS[position % len(_OTHER_MARKERS)], ""
    )


def _legend(ax: Axes, handles: Sequence, labels: Sequence[str], columns: int, above: float = 1.0) -> None:
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
        _legend(ax, [first[name] for name in names], names, columns)


GROUP_ORDER = ("sentiment", "informativeness", "grammar", "all", "mean", "worst")
GROUP_LABELS = {"all": "all pairs", "mean": "mean of\ngroups", "worst": "worst\ngroup"}
ROUTING_LABELS = {
    "none": "none\n(one policy)",
    "prior": "prior weights\n(no user data)",
    "own_pairs": "user's own\ntraining pairs",
    "oracle": "oracle\n(hidden group told)",
}
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


# ------------------------------------------------------------------------------------------------------- preferences


def pair_design(pairs: pd.DataFrame, ax: Axes) -> Axes:
    """How far apart the two answers of a pair are, by design.

    Parameters
    ----------
    pairs : one row a pair; columns ``design``, ``score_difference`` (the user's own reward, chosen minus rejected, in
        the unit that the pairs were labelled in).  Left of 0 the label goes against the reward: noise.
    """
    need(pairs, ["design", "score_difference"], "pair_design")
    designs = list(dict.fromkeys(pairs["design"]))
    width = np.ptp(np.histogram_bin_edges(pairs["score_difference"], bins=40)[:2])
    low, high = pairs["score_difference"].min(), pairs["score_difference"].max()
    edges = width * np.arange(np.floor(low / width), np.ceil(high / width) + 1)  # 0 is an edge
    looks = [("#0072B2", "///"), ("#E69F00", "..."), ("#8A8A8A", "")]
    for position, design in enumerate(designs):
        values = pairs.loc[pairs["design"] == design, "score_difference"]
        colour, hatch = looks[position % len(looks)]
        ax.hist(
            values, bins=edges.tolist(), weights=np.full(len(values), 1 / len(values)), histtype="stepfilled",
            facecolor=mpl.colors.to_rgba(colour, 0.25), edgecolor=colour, hatch=hatch, linewidth=1.4,
            label=f"{design} (n = {len(values):,} pairs)",
        )  # fmt: skip
    ax.axvline(0, color="black", linewidth=1)
    ax.set_xlabel("score of chosen minus score of rejected, the user's own reward\n(below 0: labelled against it)")
    ax.set_ylabel("share of the design's pairs")
    ax.grid(axis="x", visible=False)
    legend_above(ax, 2)
    return ax


def group_disagreement(matrix: pd.DataFrame, ax: Axes) -> Axes:
    """On what share of pairs two hidden groups would prefer the same answer.

    Parameters
    ----------
    matrix : one row for two groups; columns ``group_a``, ``group_b``, ``agreement`` (share), optionally ``n_pairs``.
    """
    need(matrix, ["group_a", "group_b", "agreement"], "group_disagreement")
    names = _ordered(set(matrix["group_a"]) | set(matrix["group_b"]))
    grid = matrix.pivot(index="group_a", columns="group_b", values="agreement").reindex(index=names, columns=names)
    image = ax.imshow(grid.to_numpy(float), vmin=0, vmax=1, cmap="cividis", aspect="auto")
    for row, name_a in enumerate(names):
        for column, name_b in enumerate(names):
            value = grid.loc[name_a, name_b]
            if not np.isnan(value):
                colour = "black" if value > 0.45 else "white"
                ax.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=11)
    _label_cells(ax, names, names)
    note = f"\n(n = {int(matrix['n_pairs'].max()):,} pairs)" if "n_pairs" in matrix else ""
    ax.set_xlabel("hidden group" + note)
    ax.set_ylabel("hidden group")
    ax.figure.colorbar(image, ax=ax, label="share of pairs with the same preference")
    return ax


# ---------------------------------------------------------------------------------------------------------- accuracy


def accuracy_by_group(accuracy: pd.DataFrame, ax: Axes) -> Axes:
    """Held-out preference accuracy by hidden group, methods side by side; every seed a point.

    Shown are single policies, mixtures routed by each user's own training pairs, and Mix-DPO with oracle routing.

    Parameters
    ----------
    accuracy : one design and one kind of users; columns ``method``, ``routing``, ``seed``, ``group``, ``accuracy``,
        ``low``, ``high`` (share of pairs), optionally ``n_pairs``.  Rows whose seed is "mean" give the large marker and
        its interval; without them these are the averages over the seeds.
    """
    need(accuracy, ["method", "routing", "seed", "group", "accuracy", "low", "high"], "accuracy_by_group")
    _one_of(accuracy, ["design", "users"], "accuracy_by_group")
    accuracy = accuracy.reset_index(drop=True)
    single = ~accuracy["method"].str.startswith("mix") & (accuracy["routing"] == "none")
    mixture = accuracy["method"].str.startswith("mix") & (accuracy["routing"] == "own_pairs")
    oracle = (accuracy["method"] == "mix_dpo") & (accuracy["routing"] == "oracle")
    shown = accuracy[single | mixture | oracle]
    shown = shown.assign(series=np.where(oracle[shown.index], "oracle", shown["method"]))
    return _by_group(shown, ax, "series", "hidden group of the users")


def accuracy_by_domain(accuracy: pd.DataFrame, ax: Axes) -> Axes:
    """Held-out preference accuracy by domain of the prompt, methods side by side; every seed a point.

    Parameters
    ----------
    accuracy : columns ``method``, ``seed``, ``group`` (the domain), ``accuracy``, ``low``, ``high`` (share of pairs),
        optionally ``n_pairs``; rows whose seed is "mean" give the large marker and its interval.
    """
    need(accuracy, ["method", "seed", "group", "accuracy", "low", "high"], "accuracy_by_domain")
    shown = accuracy.assign(method=accuracy["method"].replace({"mix_dpo": "mix_dpo_pair"}))  # nobody has a user here
    return _by_group(shown.reset_index(drop=True), ax, "method", "domain of the prompt")


def accuracy_by_capacity(accuracy: pd.DataFrame, ax: Axes) -> Axes:
    """Test accuracy (mean of the groups) against what may be changed of the base, methods side by side.

    Parameters
    ----------
    accuracy : columns ``base``, ``capacity``, ``method``, ``seed``, ``group``, ``accuracy``, ``low``, ``high`` (share
        of pairs); rows of group "mean" are drawn, those whose seed is "mean" as the large marker with its interval.
    """
    need(accuracy, ["base", "capacity", "method", "seed", "group", "accuracy", "low", "high"], "accuracy_by_capacity")
    shown = accuracy[accuracy["group"] == "mean"]
    need(shown, [], "accuracy_by_capacity, group 'mean'")
    several = shown["base"].nunique() > 1
    place = shown["base"] + "\n" + shown["capacity"] if several else shown["capacity"]
    shown = shown.assign(place=place.str.replace(", ", "\n")).reset_index(drop=True)
    places = list(dict.fromkeys(shown["place"]))
    _dodged(shown, ax, "place", places, "method", "accuracy")
    ax.set_xticks(range(len(places)), places)
    _accuracy_axis(ax)
    ax.set_xlabel("what of the base an expert may change")
    legend_above(ax, 3)
    return ax


def _by_group(shown: pd.DataFrame, ax: Axes, series: str, x_label: str) -> Axes:
    groups = _ordered(set(shown["group"]))
    if "mean" in groups and "all" in groups:
        groups.remove("all")
    _dodged(shown[shown["group"].isin(groups)], ax, "group", groups, series, "accuracy")
    labels = [GROUP_LABELS.get(group, group) for group in groups]
    ax.set_xticks(range(len(groups)), [f"{a}\n{b}" if b else a for a, b in zip(labels, _n(shown, groups), strict=True)])
    _accuracy_axis(ax)
    ax.set_xlabel(f"{x_label} (n: test pairs per seed)" if "n_pairs" in shown else x_label)
    legend_above(ax, 3)
    return ax


def routing_comparison(accuracy: pd.DataFrame, ax: Axes, group: str = "mean") -> Axes:
    """What a mixture is told of the user, and how well it then predicts: nothing, its prior, own pairs, the truth.

    Parameters
    ----------
    accuracy : as for :func:`accuracy_by_group`, with every routing.
    group : which rows: "mean" of the groups, "worst" group, "all" pairs or one group.
    """
    need(accuracy, ["method", "routing", "seed", "group", "accuracy", "low", "high"], "routing_comparison")
    _one_of(accuracy, ["design", "users"], "routing_comparison")
    shown = accuracy[accuracy["group"] == group]
    need(shown, [], f"routing_comparison, group {group!r}")
    routings = [name for name in ROUTING_LABELS if name in set(shown["routing"])]
    _dodged(shown, ax, "routing", routings, "method", "accuracy")
    ax.set_xticks(range(len(routings)), [ROUTING_LABELS[name] for name in routings])
    _accuracy_axis(ax)
    pairs = f"; n = {int(shown['n_pairs'].max()):,} test pairs per seed" if "n_pairs" in shown else ""
    what = {"mean": "mean of the groups", "worst": "worst group", "all": "all pairs"}.get(group, f"group {group}")
    ax.set_xlabel(f"what is known of the user ({what}{pairs})")
    legend_above(ax, 2)
    return ax


# ------------------------------------------------------------------------------------------------- what was inferred


def responsibility_map(responsibilities: pd.DataFrame, ax: Axes) -> Axes:
    """Responsibility of each expert for each user; users side by side, sorted by hidden group.

    Parameters
    ----------
    responsibilities : one design, method and seed; columns ``user``, ``group``, ``expert`` (0 ... K-1),
        ``responsibility`` (0 ... 1), optionally ``expert_serves`` (the group that the expert is aligned with).
    """
    need(responsibilities, ["user", "group", "expert", "responsibility"], "responsibility_map")
    _one_of(responsibilities, ["design", "method", "seed"], "responsibility_map")
    experts = sorted(set(responsibilities["expert"]))
    groups = _ordered(set(responsibilities["group"]))
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
    _label_cells(ax, [], names)
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
    table = recovery[~_is_mean(recovery)]
    designs = list(dict.fromkeys(table["design"])) if "design" in table else [None]
    methods = _known_first(table["method"], METHOD_STYLE)
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


# ---------------------------------------------------------------------------------------------------------- training


def training_curves(history: pd.DataFrame, ax: Axes, column: str = "elbo") -> Axes:
    """One quantity of the training history against the pairs seen; one line a seed.

    Parameters
    ----------
    history : one design; columns ``method``, ``seed``, ``pairs_seen`` and ``column``.
    column : what is drawn, for example "elbo" (nats per pair) or "validation_accuracy".
    """
    need(history, ["method", "seed", "pairs_seen", column], "training_curves")
    _one_of(history, ["design"], "training_curves")
    lines = ("-", "--", "-.", ":")
    for position, method in enumerate(_known_first(history["method"], METHOD_STYLE)):
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


# --------------------------------------------------------------------------------------------------------------- text


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
        colour, marker = _OTHER_COLOURS[position % 6], ("o", "s", "^", "D", "v", "P")[position % 6]
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


SERVED_LABELS = {
    "pairs": "posterior of own pairs",
    "metadata": "metadata, then posterior of own pairs",
    "gate": "metadata, then the gate fitted to own pairs",
}


def accuracy_by_own_pairs(table: pd.DataFrame, ax: Axes) -> Axes:
    """Accuracy for new users against the number of their own pairs, with 95 % bands; DPO and the oracle as lines.

    Parameters
    ----------
    table : as `personalization.share_closed` gives it: served_by ("dpo", "oracle" and ways of serving), m, accuracy,
        accuracy_low, accuracy_high.
    """
    need(table, ["served_by", "m", "accuracy", "accuracy_low", "accuracy_high"], "accuracy_by_own_pairs")
    sizes = sorted(table["m"].unique())
    place = {m: i for i, m in enumerate(sizes)}
    for name, dashes in (("oracle", (0, (5, 2))), ("dpo", (0, (1, 1.5)))):
        part = table[table["served_by"] == name]
        if len(part):
            look = METHOD_STYLE[name]
            label = {"dpo": "DPO, one policy", "oracle": "oracle: one DPO a hidden group"}[name]
            ax.axhline(part["accuracy"].iloc[0], color=look.colour, linestyle=dashes, label=label)
    ways = [name for name in dict.fromkeys(table["served_by"]) if name not in ("dpo", "oracle")]
    for position, name in enumerate(ways):
        part = table[table["served_by"] == name].sort_values("m")
        x = [place[m] for m in part["m"]]
        colour = ("#D55E00", "#009E73", "#CC79A7")[position % 3]
        ax.fill_between(x, part["accuracy_low"], part["accuracy_high"], color=colour, alpha=0.13, linewidth=0)
        ax.plot(x, part["accuracy"], color=colour, marker=("D", "o", "^")[position % 3], markersize=5,
                label=SERVED_LABELS.get(name, name))  # fmt: skip
    ax.set_xticks(range(len(sizes)), [str(m) for m in sizes])
    ax.set_xlabel("own pairs of a new user (m)")
    ax.set_ylabel("accuracy on test pairs (share)")
    legend_above(ax, columns=2)
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
        mean = _is_mean(part)
        seeds, summary = part[~mean], part[mean]
        ax.plot(
            seeds[value], [place + 0.12] * len(seeds), linestyle="none", marker="o", markersize=4,
            markerfacecolor="white", markeredgecolor=_OTHER_COLOURS[0], markeredgewidth=0.9,
        )  # fmt: skip
        middle = float((summary if len(summary) else seeds)[value].astype(float).mean())
        bars = None
        if len(summary) and {"low", "high"} <= set(summary):
            row = summary.iloc[0]
            bars = [[max(middle - row["low"], 0.0)], [max(row["high"] - middle, 0.0)]]
        ax.errorbar(
            middle, place - 0.12, xerr=bars, linestyle="none", marker="D", markersize=6, capsize=2.5,
            color=_OTHER_COLOURS[0],
        )  # fmt: skip
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.grid(axis="y", visible=False)
    ax.locator_params(axis="x", nbins=5)
    ax.set_xlabel(x_label or value)
    return ax


def reward_gains(text_summary: pd.DataFrame, ax: Axes) -> Axes:
    """What each policy's texts gain over DPO's by the evaluation judges, with intervals; one panel a reward.

    The rewards have different units, so each has a scale of its own inside ``ax`` (its child axes).

    Parameters
    ----------
    text_summary : one design; columns ``policy``, ``reward``, ``gain_over_dpo``, ``gain_low``, ``gain_high`` (unit of
        the judge), optionally ``n`` (texts), ``kl`` (nats per text), ``seed``.  DPO itself is the line at 0.  Where
        there are several seeds each is a small point; rows whose seed is "mean" give the large marker.
    """
    needed = ["policy", "reward", "gain_over_dpo", "gain_low", "gain_high"]
    need(text_summary, needed, "reward_gains")
    _one_of(text_summary, ["design"], "reward_gains")
    table = text_summary[text_summary["policy"] != "dpo"].dropna(subset=["gain_over_dpo"])
    rewards = _ordered(set(table["reward"]))
    policies = [p for p in _known_first(table["policy"], _POLICY_STYLE)]
    kl = text_summary.groupby("policy")["kl"].mean().dropna() if "kl" in text_summary else {}

    def named(policy: str) -> str:
        label = look_of(policy, _POLICY_STYLE).label
        return f"{label} (KL {kl[policy]:.1f})" if policy in kl else label

    panels: list[Axes] = []
    gap = 0.2
    width = (1 - gap * (len(rewards) - 1)) / len(rewards)
    for column, reward in enumerate(rewards):
        panel = ax.inset_axes((column * (width + gap), 0.0, width, 1.0))
        panels.append(panel)
        panel.axhline(0, color=METHOD_STYLE["dpo"].colour, linewidth=1.4, linestyle="--", label=named("dpo"))
        for x, policy in enumerate(policies):
            rows = table[(table["reward"] == reward) & (table["policy"] == policy)]
            if len(rows) == 0:
                continue
            is_mean = _is_mean(rows)
            look, seeds = look_of(policy, _POLICY_STYLE, x), rows[~is_mean]
            shown = (rows[is_mean] if is_mean.any() else rows)[needed[2:]].astype(float).mean()
            mid, low, high = (float(shown[name]) for name in needed[2:])
            if len(seeds) > 1:
                spread = x + 0.3 + np.linspace(-0.1, 0.1, len(seeds))
                panel.plot(
                    spread, seeds["gain_over_dpo"], linestyle="none", marker=look.marker, markersize=3,
                    color=look.colour, markerfacecolor="white",
                )  # fmt: skip
            serves = policy == f"expert_{reward}"
            panel.errorbar(
                x, mid, yerr=[[mid - low], [high - mid]], color=look.colour, marker=look.marker, capsize=3,
                markersize=9 if serves else 6, markerfacecolor=look.colour if serves else "white", label=named(policy),
                linestyle="none",
            )  # fmt: skip
        panel.set_title(reward, fontsize=9.5, loc="center")
        panel.tick_params(labelsize=8)
        panel.set_xlim(-0.6, len(policies) - 0.4)
        panel.set_xticks([])
        panel.grid(axis="x", visible=False)
        panel.margins(y=0.12)
    ax.set_axis_off()
    panels[0].set_ylabel("gain over DPO\n(unit of the evaluation judge)")
    notes = "filled: the expert that serves this reward; bars: 95 % intervals"
    per_seed = "seed" in table and not _is_mean(table).any() and table["seed"].nunique() > 1
    each = "policy and seed" if per_seed else "policy"
    judged = table[table["policy"] != "base"] if "policy" in table else table  # the base has its candidates alone
    second = [f"n = {int(judged['n'].min()):,} texts per {each}"] if "n" in table else []
    second += ["KL to the reference in nats per text"] if len(kl) else []
    notes += "\n" + "; ".join(second)
    ax.text(0.0, -0.04, notes, transform=ax.transAxes, va="top", fontsize=9)
    looks = {named(policy): look_of(policy, _POLICY_STYLE, x) for x, policy in enumerate(policies)}
    handles = [Line2D([], [], color=k.colour, marker=k.marker, linestyle="none") for k in looks.values()]
    line = panels[0].get_legend_handles_labels()[0][:1]
    _legend(ax, [*line, *handles], [named("dpo"), *looks], 2, above=1.08)
    return ax


# ------------------------------------------------------------------------------------------------------ shared pieces

_POLICY_STYLE: Mapping[str, Look] = {
    "base": METHOD_STYLE["base"],
    "dpo": METHOD_STYLE["dpo"],
    "dpo_rank_3r": METHOD_STYLE["dpo_rank_3r"],
    **{f"expert_{name}": look._replace(label=f"{name} expert") for name, look in EXPERT_STYLE.items()},
}


def _ordered(names: Iterable[str]) -> list[str]:
    """Groups and rewards in the study's order, unknown ones after them."""
    return sorted(names, key=lambda name: (GROUP_ORDER.index(name) if name in GROUP_ORDER else 3 - 0.5, name))


def _is_mean(table: pd.DataFrame) -> pd.Series:
    """Rows that sum up the seeds, marked by "mean" in the column ``seed``; none without that column."""
    if "seed" not in table:
        return pd.Series(False, index=table.index)
    return table["seed"].astype(str).isin(_MEAN_ROWS)


def _known_first(names: Iterable[str], known: Mapping[str, Look]) -> list[str]:
    found = list(dict.fromkeys(names))
    return [name for name in known if name in found] + [name for name in found if name not in known]


def _one_of(table: pd.DataFrame, columns: Sequence[str], plot: str) -> None:
    """Refuse a table that mixes what one figure cannot tell apart."""
    for column in columns:
        if column in table and table[column].nunique() > 1:
            found = list(dict.fromkeys(table[column]))
            raise ValueError(f"{plot}: column {column!r} holds {found}; filter the table to one of them")


def _dodged(table: pd.DataFrame, ax: Axes, category: str, categories: Sequence[str], by: str, value: str) -> None:
    """Seeds as open points, their mean as a filled marker with its interval, one column for each series."""
    series = _known_first(table[by], METHOD_STYLE)
    width = 0.8 / len(series)
    is_mean = _is_mean(table)
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


def _n(table: pd.DataFrame, groups: Sequence[str]) -> list[str]:
    if "n_pairs" not in table:
        return ["" for _ in groups]
    rows = table[~_is_mean(table)]
    rows = rows if len(rows) else table
    largest = rows.groupby("group")["n_pairs"].max()
    return ["" if group == "worst" else f"n = {int(largest[group]):,}" for group in groups]


def _accuracy_axis(ax: Axes) -> None:
    ax.axhline(0.5, color="black", linewidth=1, linestyle=":")
    low = min(0.48, ax.get_ylim()[0])
    ax.set_ylim(low, None)
    ax.annotate(
        "chance", (1, 0.5), xycoords=("axes fraction", "data"), xytext=(-2, 2), textcoords="offset points",
        fontsize=8, ha="right", va="bottom",
    )  # fmt: skip
    ax.set_ylabel("held-out preference accuracy\n(share of pairs, 95 % interval)")


def _label_cells(ax: Axes, columns: Sequence[str], rows: Sequence[str]) -> None:
    ax.set_xticks(range(len(columns)), columns)
    ax.set_yticks(range(len(rows)), rows)
    ax.tick_params(length=0)
    ax.grid(visible=False)
    for side in ax.spines.values():
        side.set_visible(False)


# ------------------------------------------------------------------------------------------------ rewards and judges
JUDGE_MARKERS = {"training": ("o", "training judge"), "evaluation": ("D", "evaluation judge")}
_SHORT = {"sentiment": "sent.", "informativeness": "inform.", "grammar": "gramm."}


def reward_distributions(scores: pd.DataFrame, ax: Axes) -> Axes:
    """How one judge's scores of real pieces are spread.

    Parameters
    ----------
    scores : columns ``reward``, ``judge``, ``unit``, ``score``, one row a text; one judge.
    """
    need(scores, ("reward", "judge", "unit", "score"), "reward_distributions")
    _one_of(scores, ("reward", "judge"), "reward_distributions")
    reward, judge, unit = (str(scores[column].iloc[0]) for column in ("reward", "judge", "unit"))
    look = look_of(reward, EXPERT_STYLE)
    ax.hist(
        scores["score"], bins=30, color=look.colour if judge == "training" else "white", edgecolor=look.colour,
        hatch=None if judge == "training" else look.hatch, linewidth=0.8,
    )  # fmt: skip
    ax.axvline(float(scores["score"].median()), color="black", linewidth=1, linestyle="--")
    ax.set_title(f"{look.label}, {judge}")
    ax.set_xlabel(f"score ({unit})")
    ax.set_ylabel(f"texts (n = {len(scores):,})")
    return ax


def judge_agreement(agreement: pd.DataFrame, ax: Axes) -> Axes:
    """Rank correlation of every two judges on the same texts; frames mark the two judges of one reward.

    Parameters
    ----------
    agreement : columns ``first``, ``second``, ``kind``, ``spearman``; judges as "reward/role".
    """
    need(agreement, ("first", "second", "kind", "spearman"), "judge_agreement")
    names = list(dict.fromkeys(agreement["first"]))
    square = agreement.pivot(index="first", columns="second", values="spearman").loc[names, names]
    ax.imshow(square.to_numpy(float), cmap="RdBu_r", vmin=-1, vmax=1)
    kind = agreement.set_index(["first", "second"])["kind"]
    for i, row in enumerate(names):
        for j, column in enumerate(names):
            value = float(square.loc[row, column])
            ax.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8,
                    color="white" if abs(value) > 0.6 else "black")  # fmt: skip
            if kind[row, column] == "one reward":
                ax.add_patch(mpl.patches.Rectangle((j - 0.46, i - 0.46), 0.92, 0.92, fill=False, linewidth=1.6))
    short = [f"{_SHORT.get(reward, reward)}\n{role}" for reward, role in (name.split("/") for name in names)]
    _label_cells(ax, short, short)
    ax.tick_params(labelsize=8)
    return ax


def judge_report(validity: pd.DataFrame, ax: Axes) -> Axes:
    """What the two judges of one reward reach on each task, with 95 % intervals; a bar marks what is asked of them.

    Parameters
    ----------
    validity : columns ``reward``, ``judge``, ``measure``, ``task``, ``value``, ``low``, ``high``, optional ``bar``; one
        reward and one measure.
    """
    need(validity, ("reward", "judge", "measure", "task", "value", "low", "high"), "judge_report")
    _one_of(validity, ("reward", "measure"), "judge_report")
    look = look_of(str(validity["reward"].iloc[0]), EXPERT_STYLE)
    tasks = list(dict.fromkeys(validity["task"]))
    place = {task: len(tasks) - 1 - i for i, task in enumerate(tasks)}
    for judge, shift in (("training", 0.15), ("evaluation", -0.15)):
        rows = validity[validity["judge"] == judge]
        marker, label = JUDGE_MARKERS[judge]
        y = rows["task"].map(place).to_numpy(float) + shift
        value = rows["value"].to_numpy(float)
        error = np.maximum([value - rows["low"].to_numpy(float), rows["high"].to_numpy(float) - value], 0.0)
        ax.errorbar(
            value, y, xerr=error, linestyle="none", marker=marker, color=look.colour, capsize=2.5, label=label,
            markerfacecolor=look.colour if judge == "training" else "white",
        )  # fmt: skip
        for bar, height in zip(rows.get("bar", pd.Series(np.nan, index=rows.index)), y, strict=True):
            if np.isfinite(bar):
                ax.plot([bar, bar], [height - 0.13, height + 0.13], color="black", linewidth=1.6, label="asked for")
    ax.axvline(0.5, color="black", linewidth=1, linestyle=":", label="chance")
    ax.set_yticks([place[task] for task in tasks], [task.replace("_", " ") for task in tasks])
    ax.set_ylim(-0.6, len(tasks) - 0.4)
    ax.set_xlim(min(0.45, float(validity["low"].min()) - 0.02), 1.01)
    measure = str(validity["measure"].iloc[0])
    ax.set_xlabel({"accuracy": "accuracy (share of texts)", "auc": "AUC (real against all corrupted)"}.get(
        measure, "share of pairs in which the better text scores higher"))  # fmt: skip
    legend_above(ax, columns=4)
    return ax


def probe_scores(probes: pd.DataFrame, ax: Axes) -> Axes:
    """What tampering does to each judge's score, in standard deviations over real pieces; red is a reward for it.

    In brackets the mean absolute change: where scores of both signs move towards nothing, the mean alone stays at 0.

    Parameters
    ----------
    probes : columns ``reward``, ``judge``, ``probe``, ``effect``, ``size``.
    """
    need(probes, ("reward", "judge", "probe", "effect", "size"), "probe_scores")
    rewards, names = _ordered(set(probes["reward"])), list(dict.fromkeys(probes["probe"]))
    columns = [
        (r, j) for r in rewards for j in JUDGE_MARKERS if ((probes["reward"] == r) & (probes["judge"] == j)).any()
    ]
    square, sizes = (
        probes.pivot(index="probe", columns=["reward", "judge"], values=v).loc[names, columns]
        for v in ("effect", "size")
    )
    ax.imshow(square.to_numpy(float), cmap="RdBu_r", vmin=-3, vmax=3, aspect="auto")
    for i in range(len(names)):
        for j in range(len(columns)):
            value, size = float(square.iloc[i, j]), float(sizes.iloc[i, j])
            digits = 1 if abs(value) < 10 else 0
            text = f"{round(value, digits) + 0.0:+.{digits}f} ({size:.{digits}f})"
            ax.text(j, i, text, ha="center", va="center", fontsize=8, color="white" if abs(value) > 1.9 else "black")
    _label_cells(ax, [f"{_SHORT.get(r, r)}\n{j}" for r, j in columns], [name.replace("_", " ") for name in names])
    ax.tick_params(labelsize=8)
    return ax
