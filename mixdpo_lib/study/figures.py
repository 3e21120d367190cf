"""How are the study's tables shown? Every function is ``f(table, ax) -> ax``; see figures.py."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from ..figures import (
    EXPERT_STYLE,
    GROUP_LABELS,
    METHOD_STYLE,
    Look,
    accuracy_axis,
    dodged,
    known_first,
    label_cells,
    legend_above,
    look_of,
    mean_rows,
    n_pairs_labels,
    need,
    one_of,
    ordered,
    place_legend,
)

ROUTING_LABELS = {
    "none": "none\n(one policy)",
    "prior": "prior weights\n(no user data)",
    "own_pairs": "user's own\ntraining pairs",
    "oracle": "oracle\n(hidden group told)",
}


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
    names = ordered(set(matrix["group_a"]) | set(matrix["group_b"]))
    grid = matrix.pivot(index="group_a", columns="group_b", values="agreement").reindex(index=names, columns=names)
    image = ax.imshow(grid.to_numpy(float), vmin=0, vmax=1, cmap="cividis", aspect="auto")
    for row, name_a in enumerate(names):
        for column, name_b in enumerate(names):
            value = grid.loc[name_a, name_b]
            if not np.isnan(value):
                colour = "black" if value > 0.45 else "white"
                ax.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=11)
    label_cells(ax, names, names)
    note = f"\n(n = {int(matrix['n_pairs'].max()):,} pairs)" if "n_pairs" in matrix else ""
    ax.set_xlabel("hidden group" + note)
    ax.set_ylabel("hidden group")
    ax.figure.colorbar(image, ax=ax, label="share of pairs with the same preference")
    return ax


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
    one_of(accuracy, ["design", "users"], "accuracy_by_group")
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
    dodged(shown, ax, "place", places, "method", "accuracy")
    ax.set_xticks(range(len(places)), places)
    accuracy_axis(ax)
    ax.set_xlabel("what of the base an expert may change")
    legend_above(ax, 3)
    return ax


def _by_group(shown: pd.DataFrame, ax: Axes, series: str, x_label: str) -> Axes:
    groups = ordered(set(shown["group"]))
    if "mean" in groups and "all" in groups:
        groups.remove("all")
    dodged(shown[shown["group"].isin(groups)], ax, "group", groups, series, "accuracy")
    labels = [GROUP_LABELS.get(group, group) for group in groups]
    below = n_pairs_labels(shown, groups)
    ax.set_xticks(range(len(groups)), [f"{a}\n{b}" if b else a for a, b in zip(labels, below, strict=True)])
    accuracy_axis(ax)
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
    one_of(accuracy, ["design", "users"], "routing_comparison")
    shown = accuracy[accuracy["group"] == group]
    need(shown, [], f"routing_comparison, group {group!r}")
    routings = [name for name in ROUTING_LABELS if name in set(shown["routing"])]
    dodged(shown, ax, "routing", routings, "method", "accuracy")
    ax.set_xticks(range(len(routings)), [ROUTING_LABELS[name] for name in routings])
    accuracy_axis(ax)
    pairs = f"; n = {int(shown['n_pairs'].max()):,} test pairs per seed" if "n_pairs" in shown else ""
    what = {"mean": "mean of the groups", "worst": "worst group", "all": "all pairs"}.get(group, f"group {group}")
    ax.set_xlabel(f"what is known of the user ({what}{pairs})")
    legend_above(ax, 2)
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
    table : as `new_users.share_closed` gives it: served_by ("dpo", "oracle" and ways of serving), m, accuracy,
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
    one_of(text_summary, ["design"], "reward_gains")
    table = text_summary[text_summary["policy"] != "dpo"].dropna(subset=["gain_over_dpo"])
    rewards = ordered(set(table["reward"]))
    policies = [p for p in known_first(table["policy"], _POLICY_STYLE)]
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
            is_mean = mean_rows(rows)
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
    per_seed = "seed" in table and not mean_rows(table).any() and table["seed"].nunique() > 1
    each = "policy and seed" if per_seed else "policy"
    judged = table[table["policy"] != "base"] if "policy" in table else table  # the base has its candidates alone
    second = [f"n = {int(judged['n'].min()):,} texts per {each}"] if "n" in table else []
    second += ["KL to the reference in nats per text"] if len(kl) else []
    notes += "\n" + "; ".join(second)
    ax.text(0.0, -0.04, notes, transform=ax.transAxes, va="top", fontsize=9)
    looks = {named(policy): look_of(policy, _POLICY_STYLE, x) for x, policy in enumerate(policies)}
    handles = [Line2D([], [], color=k.colour, marker=k.marker, linestyle="none") for k in looks.values()]
    line = panels[0].get_legend_handles_labels()[0][:1]
    place_legend(ax, [*line, *handles], [named("dpo"), *looks], 2, above=1.08)
    return ax


_POLICY_STYLE: Mapping[str, Look] = {
    "base": METHOD_STYLE["base"],
    "dpo": METHOD_STYLE["dpo"],
    "dpo_rank_3r": METHOD_STYLE["dpo_rank_3r"],
    **{f"expert_{name}": look._replace(label=f"{name} expert") for name, look in EXPERT_STYLE.items()},
}
JUDGE_MARKERS = {"training": ("o", "training judge"), "evaluation": ("D", "evaluation judge")}
_SHORT = {"sentiment": "sent.", "informativeness": "inform.", "grammar": "gramm."}


def reward_distributions(scores: pd.DataFrame, ax: Axes) -> Axes:
    """How one judge's scores of real pieces are spread.

    Parameters
    ----------
    scores : columns ``reward``, ``judge``, ``unit``, ``score``, one row a text; one judge.
    """
    need(scores, ("reward", "judge", "unit", "score"), "reward_distributions")
    one_of(scores, ("reward", "judge"), "reward_distributions")
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
    label_cells(ax, short, short)
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
    one_of(validity, ("reward", "measure"), "judge_report")
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
    rewards, names = ordered(set(probes["reward"])), list(dict.fromkeys(probes["probe"]))
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
    label_cells(ax, [f"{_SHORT.get(r, r)}\n{j}" for r, j in columns], [name.replace("_", " ") for name in names])
    ax.tick_params(labelsize=8)
    return ax
