"""How are the study's tables shown?  Every function is ``f(table, ax) -> ax``; see figures/.

A method or a reward looks the same in every figure of the study.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes

from ..figures import Look, curves, legend_above, points
from ..figures import responsibility_map as general_map
from ..figures.look import looks_of
from ..figures.plots import heat, mean_rows, need, one_of

METHOD_STYLE: Mapping[str, Look] = {
    "base": Look("base model", "#8A8A8A", "s"),
    "dpo": Look("DPO", "#0072B2", "o"),
    "dpo_plain": Look("plain DPO", "#AA4499", "h"),
    "dpo_rank_3r": Look("DPO, rank 3r", "#56B4E9", "v"),
    "mix_dpo": Look("Mix-DPO, per user", "#D55E00", "D"),
    "dpo_rank_2r": Look("DPO, rank 2r", "#332288", ">"),
    "mix_dpo_pair": Look("Mix-DPO, per pair", "#E69F00", "^"),
    "moe_dpo": Look("MoE-DPO", "#009E73", "P"),
    "dpo_last_step": Look("DPO, last step", "#CC6677", "<"),
    "moe_dpo_top_1": Look("MoE-DPO, top-1", "#44AA99", "p"),
    "supervised": Look("supervised classifier", "#7A4B00", "X"),
    "oracle": Look("Mix-DPO, oracle", "#000000", "*"),
}
EXPERT_STYLE: Mapping[str, Look] = {
    "sentiment": Look("sentiment", "#009E73", "o"),
    "informativeness": Look("informativeness", "#CC79A7", "s"),
    "grammar": Look("grammar", "#7A4B00", "^"),
}
SERVED_STYLE: Mapping[str, Look] = {
    "pairs": Look("posterior of own pairs", "#D55E00", "D"),
    "metadata": Look("metadata, then posterior of own pairs", "#009E73", "o"),
    "gate": Look("metadata, then the gate fitted to own pairs", "#CC79A7", "^"),
}
POLICY_STYLE: Mapping[str, Look] = {
    "base": METHOD_STYLE["base"]._replace(filled=False),
    "base_sharpened": Look("base, sharpened", "#8A8A8A", "d", filled=False),
    "dpo": METHOD_STYLE["dpo"]._replace(filled=False),
    "dpo_plain": METHOD_STYLE["dpo_plain"]._replace(filled=False),
    "dpo_sharpened": Look("DPO, half head, sharpened", "#0072B2", "v", filled=False),
    **{
        f"expert_{name}": look._replace(label=f"{name} expert", filled=False)
        for name, look in EXPERT_STYLE.items()
    },
}
GROUP_ORDER = ("sentiment", "informativeness", "grammar", "others", "all", "mean", "worst")
SERVED_LABELS = {"all": "all users\n(one policy)", "nobody": "no group"}
GROUP_LABELS = {"all": "all pairs", "mean": "mean of\ngroups", "worst": "worst\ngroup"}
ROUTING_LABELS = {
    "none": "none\n(one\npolicy)",
    "prior": "prior\nweights",
    "own_pairs": "own\ntraining\npairs",
    "oracle": "oracle\n(group\ntold)",
}
RECOVERY_LABELS = {
    "nmi": "NMI",
    "ari": "adjusted\nRand index",
    "aligned_accuracy": "aligned\naccuracy",
}


def ordered(names: Iterable[str]) -> list[str]:
    """Groups and rewards in the study's order, unknown ones before the sums."""
    place = {name: position for position, name in enumerate(GROUP_ORDER)}
    return sorted(names, key=lambda name: (place.get(name, place["others"]), name))


# ----------------------------------------------------------------------------- pairs and judges
def pair_design(pairs: pd.DataFrame, ax: Axes) -> Axes:
    """How far apart the two answers of a pair are, by design.

    Parameters
    ----------
    pairs : one row a pair; columns ``design``, ``score_difference`` (the user's own reward, chosen
        minus rejected, in the unit that the pairs were labelled in).  Left of 0 the label goes
        against the reward: noise.
    """
    need(pairs, ["design", "score_difference"], "pair_design")
    n, values = pairs["design"].value_counts(sort=False), pairs["score_difference"]
    width = np.ptp(np.histogram_bin_edges(values, bins=40)[:2])
    edges = width * np.arange(np.floor(values.min() / width), np.ceil(values.max() / width) + 1)
    near = np.quantile(values, 0.995)  # a long tail would leave the rest no room
    shape = {"bins": edges, "stat": "probability", "element": "step"}  # 0 is an edge
    for position, (design, look) in enumerate(looks_of(n.index).items()):
        hatched = {"color": look.colour, "alpha": 0.25, "hatch": ("///", "...", "xx")[position % 3]}
        part, label = values[pairs["design"] == design], f"{design} (n = {n[design]:,} pairs)"
        sns.histplot(part, **shape, **hatched, label=label, ax=ax)
    ax.axvline(0, color="black", linewidth=1)
    ax.set_xlim(edges[0], near)
    beyond = (values > near).mean()
    ax.set_xlabel(
        "score of chosen minus rejected, by the user's own\nreward (SD; below 0: labelled against it);\n"
        f"{100 * beyond:.1f} % lie beyond"
    )
    ax.set_ylabel("share of the design's pairs")
    ax.grid(axis="x", visible=False)
    legend_above(ax)
    return ax


def group_disagreement(matrix: pd.DataFrame, ax: Axes) -> Axes:
    """On what share of pairs two hidden groups would prefer the same answer.

    Parameters
    ----------
    matrix : one row for two groups; columns ``group_a``, ``group_b``, ``agreement`` (share),
        optionally ``n_pairs``.
    """
    need(matrix, ["group_a", "group_b", "agreement"], "group_disagreement")
    names = ordered(set(matrix["group_a"]) | set(matrix["group_b"]))
    grid = matrix.pivot(index="group_a", columns="group_b", values="agreement")
    grid = grid.reindex(index=names, columns=names)
    bar = "share of pairs with\nthe same preference"
    heat(grid, ax, bar, vmin=0, vmax=1, cmap="cividis", annot=True, fmt=".2f")
    n = f" (n = {int(matrix['n_pairs'].max()):,} pairs)" if "n_pairs" in matrix else ""
    ax.tick_params(axis="x", labelrotation=30)
    ax.set(xlabel="hidden group" + n, ylabel="hidden group")
    return ax


# ------------------------------------------------------------------------------------ accuracies
def accuracy_by_group(accuracy: pd.DataFrame, ax: Axes) -> Axes:
    """Held-out preference accuracy by hidden group, methods side by side; every seed a point.

    Shown are single policies, mixtures routed by each user's own training pairs, and Mix-DPO with
    oracle routing.

    Parameters
    ----------
    accuracy : one design and one kind of users; columns ``method``, ``routing``, ``seed``,
        ``group``, ``accuracy``, ``low``, ``high`` (share of pairs), optionally ``n_pairs``.  Rows
        whose seed is "mean" give the large marker and its interval; without them these are the
        averages over the seeds.
    """
    columns = ["method", "routing", "seed", "group", "accuracy", "low", "high"]
    need(accuracy, columns, "accuracy_by_group")
    one_of(accuracy, ["design", "users"], "accuracy_by_group")
    mixture, routing = accuracy["method"].str.startswith("mix"), accuracy["routing"]
    oracle = (accuracy["method"] == "mix_dpo") & (routing == "oracle")
    shown = mixture & (routing == "own_pairs") | ~mixture & (routing == "none") | oracle
    rows = accuracy.assign(method=accuracy["method"].where(~oracle, "oracle"))[shown]
    return _by_group(rows, ax, "hidden group of the users")


def accuracy_by_domain(accuracy: pd.DataFrame, ax: Axes) -> Axes:
    """Held-out preference accuracy by domain of the prompt, methods side by side.

    Parameters
    ----------
    accuracy : columns ``method``, ``seed``, ``group`` (the domain), ``accuracy``, ``low``, ``high``
        (share of pairs), optionally ``n_pairs``; as for :func:`accuracy_by_group`.
    """
    need(accuracy, ["method", "seed", "group", "accuracy", "low", "high"], "accuracy_by_domain")
    rows = accuracy.replace({"method": {"mix_dpo": "mix_dpo_pair"}})  # nobody has a user here
    return _by_group(rows, ax, "domain of the prompt", "mean of\ndomains")


def _by_group(rows: pd.DataFrame, ax: Axes, x_label: str, mean: str = GROUP_LABELS["mean"]) -> Axes:
    groups = [group for group in ordered(set(rows["group"]))]
    if {"mean", "all"} <= set(groups):
        groups.remove("all")
    named = {**GROUP_LABELS, "mean": mean}
    labels = [named.get(group, group) for group in groups]
    if "n_pairs" in rows:
        one_seed = rows[~mean_rows(rows)] if (~mean_rows(rows)).any() else rows
        n = one_seed.groupby("group")["n_pairs"].max()
        below = ["" if group == "worst" else f"\nn = {int(n[group]):,}" for group in groups]
        labels = [label + more for label, more in zip(labels, below, strict=True)]
        x_label += " (n: test pairs per seed)"
    return _accuracy(rows, ax, "group", dict(zip(groups, labels, strict=True)), x_label)


def accuracy_by_capacity(accuracy: pd.DataFrame, ax: Axes) -> Axes:
    """Test accuracy (mean of the groups) against what may be changed of the base.

    Parameters
    ----------
    accuracy : columns ``base``, ``capacity``, ``method``, ``seed``, ``group``, ``accuracy``,
        ``low``, ``high`` (share of pairs); rows of group "mean" are drawn, as for
        :func:`accuracy_by_group`.
    """
    columns = ["base", "capacity", "method", "seed", "group", "accuracy", "low", "high"]
    need(accuracy, columns, "accuracy_by_capacity")
    rows = accuracy[accuracy["group"] == "mean"]
    need(rows, [], "accuracy_by_capacity, group 'mean'")
    base = rows["base"] + ", " if rows["base"].nunique() > 1 else ""
    rows = rows.assign(place=(base + rows["capacity"]).str.replace(", ", "\n"))
    places = {place: place for place in dict.fromkeys(rows["place"])}
    return _accuracy(rows, ax, "place", places, "what of the base an expert may change")


def routing_comparison(accuracy: pd.DataFrame, ax: Axes, group: str = "mean") -> Axes:
    """What a mixture is told of the user, and how well it then predicts.

    Nothing, its prior, the user's own pairs, the truth.

    Parameters
    ----------
    accuracy : as for :func:`accuracy_by_group`, with every routing.
    group : which rows: "mean" of the groups, "worst" group, "all" pairs or one group.
    """
    columns = ["method", "routing", "seed", "group", "accuracy", "low", "high"]
    need(accuracy, columns, "routing_comparison")
    one_of(accuracy, ["design", "users"], "routing_comparison")
    rows = accuracy[accuracy["group"] == group]
    need(rows, [], f"routing_comparison, group {group!r}")
    places = {k: label for k, label in ROUTING_LABELS.items() if k in set(rows["routing"])}
    what = {"mean": "mean of the groups", "worst": "worst group", "all": "all pairs"}
    n = f"\nn = {int(rows['n_pairs'].max()):,} test pairs per seed" if "n_pairs" in rows else ""
    x_label = f"what is known of the user ({what.get(group, f'group {group}')}){n}"
    return _accuracy(rows, ax, "routing", places, x_label)


def _accuracy(
    rows: pd.DataFrame, ax: Axes, category: str, places: Mapping[str, str], x_label: str
) -> Axes:
    """Methods side by side in each place, above the line of chance."""
    points(rows, ax, category, "accuracy", "method", METHOD_STYLE, list(places))
    ax.set_xticks(range(len(places)), list(places.values()))
    ax.axhline(0.5, color="black", linestyle=":", label="chance", zorder=1)
    ax.set_ylim(min(0.48, ax.get_ylim()[0]), None)
    legend_above(ax)
    ax.set(xlabel=x_label, ylabel="held-out preference accuracy\n(share of pairs, 95 % interval)")
    return ax


def accuracy_by_own_pairs(table: pd.DataFrame, ax: Axes) -> Axes:
    """Accuracy for new users against the number of their own pairs, with 95 % intervals.

    Parameters
    ----------
    table : as `new_users.share_closed` gives it: served_by ("dpo", "oracle", drawn as lines, and
        ways of serving), m, accuracy, accuracy_low, accuracy_high.
    """
    ends = ("accuracy_low", "accuracy_high")
    need(table, ["served_by", "m", "accuracy", *ends], "accuracy_by_own_pairs")
    lines = {"oracle": "oracle: one DPO a hidden group", "dpo": "DPO, one policy"}
    for (name, label), dashes in zip(lines.items(), ("--", ":"), strict=True):
        for height in table.loc[table["served_by"] == name, "accuracy"][:1]:
            look = METHOD_STYLE[name]
            ax.axhline(height, color=look.colour, linestyle=dashes, label=label)
    sizes = sorted(table["m"].unique())
    ways = table[~table["served_by"].isin(lines)].sort_values("m", kind="stable")
    names = list(looks_of(ways["served_by"], SERVED_STYLE))
    beside = 0.16 * (ways["served_by"].map(names.index) - (len(names) - 1) / 2)  # bars apart
    ways = ways.assign(place=ways["m"].map(sizes.index) + beside)
    curves(ways, ax, "place", "accuracy", "served_by", looks=SERVED_STYLE, interval=ends)
    ax.set_xticks(range(len(sizes)), [str(m) for m in sizes])
    ax.set(xlabel="own pairs of a new user (m)", ylabel="accuracy on test pairs (share)")
    legend_above(ax)
    return ax


# ----------------------------------------------------------------------- what experts are and do
def responsibility_map(responsibilities: pd.DataFrame, ax: Axes) -> Axes:
    """Responsibility of each expert for each user; users side by side, sorted by hidden group.

    Parameters
    ----------
    responsibilities : one design, method and seed; columns ``user``, ``group``, ``expert``
        (0 ... K-1), ``responsibility`` (0 ... 1), optionally ``expert_serves`` (the group that the
        expert is aligned with).
    """
    rows = responsibilities
    need(rows, ["user", "group", "expert", "responsibility"], "responsibility_map")
    one_of(rows, ["design", "method", "seed"], "responsibility_map")
    q = rows.pivot(index="user", columns="expert", values="responsibility")
    users = rows.drop_duplicates("user").set_index("user")["group"]
    users = users.sort_values(key=lambda names: names.map(ordered(set(names)).index), kind="stable")
    if "expert_serves" in rows:
        serves = rows.drop_duplicates("expert").set_index("expert")["expert_serves"]
        q = q.rename(columns={k: f"expert {k}\n(serves\n{serves[k]})" for k in q})
    general_map(q.loc[users.index], ax, users)
    ax.set_xlabel(f"users, by hidden group (n = {len(q)})")
    return ax


def recovery(recovery: pd.DataFrame, ax: Axes) -> Axes:
    """Agreement of responsibilities with the hidden groups; every seed and their median.

    Parameters
    ----------
    recovery : columns ``method``, ``seed``, ``nmi``, ``ari``, ``aligned_accuracy`` (any of the
        three), optionally ``design``, ``n_users``.
    """
    need(recovery, ["method", "seed"], "recovery")
    measures = [name for name in RECOVERY_LABELS if name in recovery]
    if not measures:
        raise ValueError(
            f"recovery: the table has none of {list(RECOVERY_LABELS)}; it has {list(recovery)}"
        )
    keys = [name for name in ("design", "method") if name in recovery]
    rows = recovery[~mean_rows(recovery)].melt([*keys, "seed"], measures, "measure", "agreement")
    rows["place"] = rows["measure"].map(RECOVERY_LABELS)
    if recovery.get("design", pd.Series()).nunique() > 1:
        rows["place"] += "\n" + rows["design"]
    medians = rows.groupby(["place", "method"], sort=False)["agreement"].median().reset_index()
    rows = pd.concat([rows, medians.assign(seed="median")], ignore_index=True)
    points(rows, ax, "place", "agreement", "method", METHOD_STYLE)
    ax.set_ylim(min(-0.06, ax.get_ylim()[0]), 1.06)
    users = f"n = {int(recovery['n_users'].max())} users; " if "n_users" in recovery else ""
    ax.set(xlabel=f"{users}small: seeds, large: their median")
    ax.set_ylabel("agreement with the hidden groups\n(1 = all recovered)")
    return ax


def expert_sharpness(sharpness: pd.DataFrame, ax: Axes) -> Axes:
    """Which sharpness s every head found, by the group that it serves; every seed a point.

    Parameters
    ----------
    sharpness : one design; columns ``method``, ``seed``, ``served`` (a group, "all" of a single
        policy, or "nobody"), ``sharpness`` (pure number; the line at 0 is the base).
    """
    need(sharpness, ["method", "seed", "served", "sharpness"], "expert_sharpness")
    one_of(sharpness, ["design"], "expert_sharpness")
    places = ordered(set(sharpness["served"]))
    points(sharpness, ax, "served", "sharpness", "method", METHOD_STYLE, places, horizontal=True)
    ax.set_yticks(range(len(places)), [SERVED_LABELS.get(place, place) for place in places])
    ax.axvline(0, color="black", linestyle=":", zorder=1)
    ax.locator_params(axis="x", nbins=5)
    legend_above(ax)
    ax.set(xlabel="sharpness s (1 + s: power of the base)", ylabel="whom the expert serves")
    return ax


def reward_gains(text_summary: pd.DataFrame, ax: Axes) -> Axes:
    """What each policy's texts gain over DPO's by the evaluation judges; one panel a reward.

    The rewards have different units, so each has a scale of its own inside ``ax`` (its child axes).

    Parameters
    ----------
    text_summary : one design; columns ``policy``, ``reward``, ``gain_over_dpo``, ``gain_low``,
        ``gain_high`` (unit of the judge), optionally ``n`` (texts), ``kl`` (nats per text),
        ``seed``.  DPO itself is the line at 0.  Each seed is a small point; rows whose seed is
        "mean" give the large marker.
    """
    ends = ("gain_low", "gain_high")
    need(text_summary, ["policy", "reward", "gain_over_dpo", *ends], "reward_gains")
    one_of(text_summary, ["design"], "reward_gains")
    kl = text_summary.groupby("policy")["kl"].mean().dropna() if "kl" in text_summary else {}
    looks = {
        name: look._replace(label=look.label + (f" (KL {kl[name]:.1f})" if name in kl else ""))
        for name, look in looks_of(text_summary["policy"], POLICY_STYLE).items()
    }
    dpo = looks.pop("dpo", POLICY_STYLE["dpo"])
    table = text_summary[text_summary["policy"] != "dpo"].dropna(subset=["gain_over_dpo"])
    rewards = ordered(set(table["reward"]))
    ax.set_axis_off()
    ax.plot([], [], color=dpo.colour, linestyle="--", label=dpo.label)
    for look in looks.values():
        ax.plot([], [], color=look.colour, marker=look.marker, linestyle="none", label=look.label)
    width = 1 / (1.3 * len(rewards) - 0.3)
    for column, reward in enumerate(rewards):
        panel = ax.inset_axes((1.3 * width * column, 0, width, 1))
        panel.axhline(0, color=dpo.colour, linestyle="--")
        own = f"expert_{reward}"
        here = looks | {own: looks[own]._replace(filled=True)} if own in looks else looks
        rows = table[table["reward"] == reward]
        points(rows, panel, "reward", "gain_over_dpo", "policy", here, interval=ends)
        if legend := panel.get_legend():
            legend.remove()  # there is one for all panels
        panel.set(xticks=[], xlabel="", ylabel="")
        panel.set_title(reward, loc="center")
        panel.margins(y=0.12)
        panel.locator_params(axis="y", nbins=6)
    ax.child_axes[0].set_ylabel("gain over DPO\n(unit of the evaluation judge)")
    notes = "filled: the expert that serves this reward; bars: 95 % intervals"
    if "n" in table:
        judged = table[table["policy"] != "base"]  # the base has its candidates alone
        seeds = table["seed"].nunique() if "seed" in table and not mean_rows(table).any() else 1
        each = "policy and seed" if seeds > 1 else "policy"
        sizes = dict.fromkeys([f"{int(judged['n'].min()):,}", f"{int(judged['n'].max()):,}"])
        notes += f"\nn = {' to '.join(sizes)} texts per {each}"
        notes += "; KL to the reference in nats per text" if len(kl) else ""
    size = mpl.rcParams["xtick.labelsize"]
    ax.text(0, -0.04, notes, transform=ax.transAxes, va="top", fontsize=size)
    legend_above(ax, 1.1)
    return ax
