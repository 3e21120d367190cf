"""Which figures of the notebooks go into a paper? Each with its panels, from the recorded tables, and its size."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pandas as pd
from matplotlib.axes import Axes

from .. import figures
from . import figures as shown
from . import frontier_figures as fronts
from .judges import figures as judged

Draw = Callable[[pd.DataFrame, Axes], Any]
Panel = tuple[str, pd.DataFrame, Draw]


class Shown(NamedTuple):
    """A figure of a notebook: its panels, how small it can be, and how high a panel is.

    panels : from `table(name)`, which loads a table of that notebook.
    least : "page" where a column is too narrow; it is then drawn a page wide, for `figure*`.
    height : inches of a panel in a column or on a page, 0 for what suits; on a slide all that there is.
    stacked : panels below each other on a page too.
    line : the value of the notebook at which a dotted line stands, upright.
    """

    notebook: str
    name: str
    panels: Callable[[Callable[[str], pd.DataFrame]], list[Panel]]
    least: str = "column"
    height: float = 0
    stacked: bool = False
    line: str = ""


def _one(name: str, draw: Draw) -> Callable:
    return lambda table: [("", table(name), draw)]


def _designs(name: str, draw: Draw, where: str = "", only: str = "") -> Callable:
    """A panel a design of the table `name`; rows for which `where` holds, of the design `only`."""

    def panels(table: Callable[[str], pd.DataFrame]) -> list[Panel]:
        rows = table(name).query(where) if where else table(name)
        designs = [one for one in rows["design"].unique() if only in ("", one)]
        return [(f"{one} design", rows[rows["design"] == one], draw) for one in designs]

    return panels


def _by_group(design: str) -> Callable:
    return _designs("accuracy", shown.accuracy_by_group, "users == 'seen'", design)


def _curves(column: str) -> Draw:
    return partial(figures.training_curves, column=column, looks=shown.METHOD_STYLE)


def _first_seed(table: Callable[[str], pd.DataFrame]) -> list[Panel]:
    rows = table("responsibilities").query("method == 'mix_dpo'")
    rows = rows[rows["seed"] == rows["seed"].min()]
    return _designs("", shown.responsibility_map)(lambda _: rows)


def _routings(table: Callable[[str], pd.DataFrame]) -> list[Panel]:
    rows = table("accuracy").query("design == 'default'")
    draw = shown.routing_comparison
    return [(f"{users} users", rows[rows["users"] == users], draw) for users in ("seen", "new")]


def _gradient(table: Callable[[str], pd.DataFrame]) -> list[Panel]:
    def draw(what: str) -> Draw:
        x, y = "Gumbel-Softmax temperature τ", f"{what} of the gradient,\nrelative"
        return lambda rows, ax: figures.curves(
            rows, ax, "gumbel_temperature", what, "draws", x, y, log_x=True
        )

    return [("", table("gradient"), draw(what)) for what in ("noise", "bias")]


def _against_k(*columns: tuple[str, str]) -> Callable:
    def draw(column: str, label: str) -> Draw:
        x = "number of experts K"
        return lambda rows, ax: figures.curves(rows, ax, "K", column, None, x, label)

    return lambda table: [("", table("experts"), draw(*one)) for one in columns]


def _settings(name: str, *columns: tuple[str, str], by: str = "setting") -> Callable:
    def draw(column: str, label: str) -> Draw:
        return lambda rows, ax: figures.dots(rows, ax, by, column, label)

    return lambda table: [("", table(name), draw(*one)) for one in columns]


def _reliability(rows: pd.DataFrame, ax: Axes) -> Axes:
    x = "weight of the films' expert (probability)"
    return figures.reliability(
        rows, ax, "method", shown.METHOD_STYLE, x, "share of prompts about films"
    )


def _grown(rows: pd.DataFrame, ax: Axes) -> Axes:
    one = rows[rows["seed"] == rows["seed"].min()]
    ends = {"low": one["gain"] - one["error"], "high": one["gain"] + one["error"]}
    label = "gain on held-out users (nats per user)"
    return figures.dots(one.assign(**ends), ax, "decision", "gain", label)


def _late(rows: pd.DataFrame, ax: Axes) -> Axes:
    figures.points(rows, ax, "users", "accuracy", by="fit")
    ax.set(ylabel="accuracy on further pairs", xlabel="")
    return ax


def _free(rows: pd.DataFrame, ax: Axes) -> Axes:
    return figures.dots(rows, ax, "K", "loglik", "held-out log-likelihood (nats per user)")


def _verdicts(rows: pd.DataFrame, ax: Axes) -> Axes:
    ax.axvline(0, color="black", linewidth=0.8)
    rows = rows.dropna(subset="gain")
    rows = rows.assign(mixture=rows["people_of"] + ", K = " + rows["K"].astype(str))
    return figures.dots(rows, ax, "mixture", "gain", "gain (nats per test pair)")


def _people(rows: pd.DataFrame, ax: Axes) -> Axes:
    most = rows[rows["K"] == rows["K"].max()]
    ax.axhline(0, color="black", linewidth=0.8)
    x, y = "share of people", "gain (nats per test pair)"
    return figures.curves(most, ax, "share", "gain", "people_of", x, y)


def _lines(
    y: str, by: str | None, x: str, label: str = "", log_x: bool = False, where: str = ""
) -> Draw:
    """Curves of `y` against `x`, of the rows for which `where` holds."""
    axis = _AXES.get(x, x.replace("_", " "))
    axis += " (log scale)" if log_x else ""

    def draw(rows: pd.DataFrame, ax: Axes) -> Axes:
        rows = rows.query(where) if where else rows
        return figures.curves(rows, ax, x, y, by, axis, label or y, log_x=log_x)

    return draw


def _recovered(x: str, where: str) -> Draw:
    return _lines("nmi", "inference", x, "NMI with the true groups", True, where)


def _cycle(rows: pd.DataFrame, ax: Axes) -> Axes:
    pairs = [name for name in rows.columns if name.startswith("p(")]
    long = rows.melt("K", pairs, var_name="pair", value_name="probability")
    ax.axhline(2 / 3, color="black", linewidth=0.8, linestyle=":")
    ax.set_xticks(rows["K"])
    return _lines("probability", "pair", "K", "probability of\nthe majority's choice")(long, ax)


def _moments(table: Callable[[str], pd.DataFrame]) -> list[Panel]:
    return [
        (
            "",
            table("moments"),
            _lines(f"{what} of {of}", "draws", _TAU, f"{what} of {of} (nats)", True),
        )
        for of in ("value", "gradient")
        for what in ("bias", "noise")
    ]


def _passed(rows: pd.DataFrame, ax: Axes) -> Axes:
    long = rows.melt(_TAU, var_name="quantity", value_name="nats")
    return _lines("nats", "quantity", _TAU, log_x=True)(long, ax)


_TAU = "gumbel_temperature"
_AXES = {
    "K": "number of experts K",
    _TAU: "Gumbel-Softmax temperature τ",
    "start_temperature": "temperature at the start",
    "reward_scale": "standard deviation of the rewards",
}
_THEORY = (
    "1_from_bradley_terry_to_mixtures",
    "2_em_and_the_bound",
    "3_gumbel_softmax",
    "4_who_answered",
)
_ERROR = "error of the fitted\nprobabilities (mean absolute)"
_REACHED = "share of starts that\nreach the best end"
_NMI = ("NMI", "NMI of users' experts\nwith hidden groups")
_DIED = (("dead", "dead experts"), ("NMI", "NMI of topics with the groups"))
_USED = ("used experts", "used experts, exp H")
_HELD_OUT = ("held-out log-likelihood", "held-out log-likelihood\n(nats per user)")
FIGURES = (
    Shown("01_reviews_and_rewards", "judge_agreement", _one("agreement", judged.judge_agreement), "page", 2.8),
    Shown("01_reviews_and_rewards", "probe_scores", _one("probes", judged.probe_scores), "page", 2.8),
    Shown("02_preferences", "pair_design", _one("score_differences", shown.pair_design)),
    Shown("02_preferences", "group_disagreement", _one("group_agreement", shown.group_disagreement)),
    Shown("03_dpo", "validation_loglik", _designs("history", _curves("validation_loglik"))),
    Shown("04_mix_dpo", "elbo", _designs("history", _curves("elbo"))),
    Shown("04_mix_dpo", "responsibilities", _first_seed, "page", 2.0, True),
    Shown("04_mix_dpo", "accuracy_by_group_default", _by_group("default"), "page", 3.0),
    Shown("04_mix_dpo", "accuracy_by_group_clean", _by_group("clean"), "page", 3.0),
    Shown("04_mix_dpo", "routing", _routings, height=3.0),
    Shown("04_mix_dpo", "sharpness", _designs("sharpness", shown.expert_sharpness), height=2.9),
    Shown("04_mix_dpo", "reward_gains", _one("text_summary", shown.reward_gains), "page"),
    Shown("05_moe_dpo", "accuracy_by_domain", _one("accuracy", shown.accuracy_by_domain), "page", 3.0),
    Shown("05_moe_dpo", "reliability", _one("reliability", _reliability), height=3.2),
    Shown("06_personalization", "personalization", _one("served", shown.accuracy_by_own_pairs), height=3.4),
    Shown("07_ablation_temperature", "gradient", _gradient),
    Shown("07_ablation_temperature", "settings", _settings("settings", _NMI)),
    Shown("08_ablation_experts", "experts", _against_k(_USED, ("seconds", "seconds of a fit"))),
    Shown("08_ablation_experts", "held_out", _against_k(_HELD_OUT), line="chosen_n_experts"),
    Shown("08_ablation_experts", "collapse", _settings("collapse", _USED, _NMI), height=2.0, stacked=True),
    Shown("10_model_sizes", "accuracy_by_capacity", _one("accuracy", shown.accuracy_by_capacity), height=3.0),
    Shown("11_real_people", "gains", _one("verdicts", _verdicts)),
    Shown("11_real_people", "people", _one("people", _people)),
    Shown("12_baselines", "accuracy_by_method", _one("accuracy", fronts.accuracy_by_method), "page", 4.2),
    Shown("12_baselines", "frontiers", _one("points", fronts.frontiers), "page", 5.0),
    Shown(_THEORY[0], "cycle", _one("cycle", _cycle)),
    Shown(_THEORY[0], "approximation", _one("approximation", _lines("mean absolute error", None, "K", _ERROR))),
    Shown(_THEORY[1], "steps", _one("steps", _lines("nats per pair", "quantity", "step", where="step >= 2"))),
    Shown(_THEORY[1], "restarts", _one("reached", _lines("reached the best", "pairs", "start_temperature", _REACHED, True))),
    Shown(_THEORY[2], "value", _one("value", _passed)),
    Shown(_THEORY[2], "moments", _moments),
    Shown(_THEORY[3], "pairs", _one("recovery", _recovered("pairs per user", "reward_scale == 2"))),
    Shown(_THEORY[3], "noise", _one("recovery", _recovered("reward_scale", "`pairs per user` == 16"))),
    Shown(_THEORY[3], "held_out", _one("held_out", _lines("nats per user", None, "K"))),
    Shown("1_extreme_sparsity", "fits", _settings("fits", *_DIED, by="fit"), height=2.2, stacked=True),
    Shown("2_growing_experts", "gains", _one("decisions", _grown)),
    Shown("2_growing_experts", "late", _one("late", _late)),
    Shown("3_continuous_groups", "users", _one("users", figures.users_on_circle), height=3.1),
    Shown("3_continuous_groups", "said", _one("said", figures.said_by_angle), "page", 3.4),
    Shown("3_continuous_groups", "held_out", _one("held_out", _free)),
)  # fmt: skip
