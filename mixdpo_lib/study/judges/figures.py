"""How is the report card of the judges shown?  Every function is ``f(table, ax) -> ax``."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes

from ...figures import legend_above, points
from ...figures.look import looks_of
from ...figures.plots import heat, need, one_of, slots
from ..figures import EXPERT_STYLE, ordered

MEASURES = {
    "accuracy": "accuracy (share of texts)",
    "auc": "AUC (real against all corrupted)",
    "paired rank": "share of pairs in which\nthe better text scores higher",
}
_SHORT = {"sentiment": "sent.", "informativeness": "inform.", "grammar": "gramm."}


def _short(reward: str, judge: str) -> str:
    return f"{_SHORT.get(reward, reward)}\n{judge}"


def reward_distributions(scores: pd.DataFrame, ax: Axes) -> Axes:
    """How one judge's scores of real pieces are spread; the dashed line is their median.

    Parameters
    ----------
    scores : columns ``reward``, ``judge``, ``unit``, ``score``, one row a text; one judge.
    """
    need(scores, ("reward", "judge", "unit", "score"), "reward_distributions")
    one_of(scores, ("reward", "judge"), "reward_distributions")
    reward, judge, unit = (str(scores[column].iloc[0]) for column in ("reward", "judge", "unit"))
    look = looks_of([reward], EXPERT_STYLE)[reward]
    colours = {"color": look.colour if judge == "training" else "white", "edgecolor": look.colour}
    sns.histplot(x=scores["score"], bins=30, alpha=1, **colours, linewidth=0.6, ax=ax)
    ax.axvline(float(scores["score"].median()), color="black", linewidth=1, linestyle="--")
    ax.locator_params(axis="x", nbins=5)
    ax.set(xlabel=f"score ({unit})", ylabel=f"texts (n = {len(scores):,})")
    ax.set_title(f"{look.label}, {judge}")
    return ax


def judge_agreement(agreement: pd.DataFrame, ax: Axes) -> Axes:
    """Rank correlation of every two judges on the same texts; frames: two judges of one reward.

    Parameters
    ----------
    agreement : columns ``first``, ``second``, ``kind``, ``spearman``; judges as "reward/role".
    """
    need(agreement, ("first", "second", "kind", "spearman"), "judge_agreement")
    names = list(dict.fromkeys(agreement["first"]))
    table = agreement.pivot(index="first", columns="second").loc[names]
    short = [_short(*name.split("/")) for name in names]
    grid = table["spearman"][names].set_axis(short).set_axis(short, axis=1)
    heat(grid, ax, cmap="RdBu_r", vmin=-1, vmax=1, annot=True, fmt=".2f")
    for row, column in np.argwhere((table["kind"][names] == "one reward").to_numpy()):
        ax.add_patch(
            mpl.patches.Rectangle((column, row), 1, 1, fill=False, edgecolor="black", linewidth=1.5)
        )
    return ax


def judge_report(validity: pd.DataFrame, ax: Axes) -> Axes:
    """What the two judges of one reward reach on each task; a black bar marks what is asked for.

    Parameters
    ----------
    validity : columns ``reward``, ``judge``, ``measure``, ``task``, ``value``, ``low``, ``high``
        (95 % interval), optional ``bar``; one reward and one measure.
    """
    needed = ("reward", "judge", "measure", "task", "value", "low", "high")
    need(validity, needed, "judge_report")
    one_of(validity, ("reward", "measure"), "judge_report")
    look = looks_of(validity["reward"], EXPERT_STYLE)[validity["reward"].iloc[0]]
    looks = {
        "training": look._replace(label="training judge", marker="o"),
        "evaluation": look._replace(label="evaluation judge", marker="D", filled=False),
    }
    rows = validity.assign(name=validity["task"].str.replace("_", " "))
    points(rows, ax, "name", "value", "judge", looks, horizontal=True)
    if "bar" in rows:
        asked = rows.assign(
            at=slots(rows, "name", list(dict.fromkeys(rows["name"])), "judge", looks)[0]
        )
        asked = asked.dropna(subset=["bar"])
        ax.vlines(
            asked["bar"], asked["at"] - 0.2, asked["at"] + 0.2, color="black", label="asked for"
        )
    ax.axvline(0.5, color="black", linestyle=":", label="chance")
    ax.set(xlim=(min(0.45, float(rows["low"].min()) - 0.02), 1.03), ylabel="")
    share = "share of pairs in which\nthe better text scores higher"
    ax.set_xlabel(MEASURES.get(str(rows["measure"].iloc[0]), share))
    legend_above(ax)
    return ax


def probe_scores(probes: pd.DataFrame, ax: Axes) -> Axes:
    """What tampering does to each judge's score, in standard deviations over real pieces.

    Red is a reward for it. In brackets the mean absolute change: where scores of both signs move
    towards nothing, the mean alone stays at 0.

    Parameters
    ----------
    probes : columns ``reward``, ``judge``, ``probe``, ``effect``, ``size``.
    """
    need(probes, ("reward", "judge", "probe", "effect", "size"), "probe_scores")
    rewards = ordered(set(probes["reward"]))
    rank = {name: place for place, name in enumerate((*rewards, "training", "evaluation"))}
    rows = probes.sort_values(["reward", "judge"], key=lambda names: names.map(rank), kind="stable")
    cells = [_cell(*pair) for pair in zip(rows["effect"], rows["size"], strict=True)]
    judges = [_short(*pair) for pair in zip(rows["reward"], rows["judge"], strict=True)]
    rows = rows.assign(column=judges, cell=cells, probe=rows["probe"].str.replace("_", " "))
    table = rows.pivot(index="probe", columns="column").loc[list(dict.fromkeys(rows["probe"]))]
    effect, cell = (table[name][list(dict.fromkeys(judges))] for name in ("effect", "cell"))
    return heat(effect, ax, cmap="RdBu_r", vmin=-3, vmax=3, annot=cell, fmt="")


def _cell(effect: float, size: float) -> str:
    digits = 1 if abs(effect) < 10 else 0
    return f"{round(effect, digits) + 0.0:+.{digits}f} ({size:.{digits}f})"
