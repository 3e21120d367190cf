"""What does a fit leave? Its history, its best parameters, and one sentence for people."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from ..experts.groups import Nodes
from ..policy.mixture import MixturePolicy

DEAD = 0.02  # mean responsibility below which an expert is called dead: less than a fiftieth of the pairs are its own
EQUAL = 0.02  # mean difference of sigma(D) below which two experts are called equal: one pair in fifty decided otherwise
SURER = (
    0.1  # share of validation pairs more that later steps predict right, from which on it is told
)
PARTED = (
    0.5  # how far the latents' weights must stand, on average, between equal (0) and certain (1)
)
FAILED = ("diverged", "non_finite")  # endings after which the best finite step is put back
FELL = 1.0  # nats per pair that the bound may end below its start: more is worse than e times as unlikely a pair
COIN = math.log(0.5)  # nats per pair of who knows nothing
NAMED = 5  # experts that a sentence names; of more it says how many
LEARNED = 0.02  # nats per pair that the bound must have risen: a fiftieth of a nat decides one pair in fifty


@dataclass
class FitResult:
    """What a fit leaves: one row an evaluation, why it stopped, every restart, parameters of evaluated steps.

    history : step, pairs_seen, elbo and the other columns of docs/reading-your-result.md.
    best_step : of the best validation likelihood (without validation pairs: of the best bound), or the last (`Stop.best`).
    snapshots : parameters by step, of the best and the last evaluation; of all with keep="all".
    losses : of each step since the start or the last resumption, nats per pair.
    summary : one sentence: steps, bound from and to, whether experts parted, what to turn if nothing was learned.
    """

    history: pd.DataFrame
    stop_reason: str
    best_step: int
    restarts: pd.DataFrame
    snapshots: dict[int, dict[str, Tensor]] = field(repr=False, default_factory=dict)
    losses: list[float] = field(repr=False, default_factory=list)
    summary: str = ""

    def __repr__(self) -> str:
        return f"FitResult: {self.summary or self.stop_reason}"

    def restore(self, policy: MixturePolicy, step: int | str = "best") -> None:
        """Put the parameters of an evaluated step into the policy: "best", "last", or its number.

        Raises
        ------
        ValueError : a step whose parameters were not kept; those that were are named. A policy that lacks some of them.
        """
        last = max(self.snapshots, default=0)
        number = (
            {"best": self.best_step, "last": last}.get(step, step)
            if isinstance(step, str)
            else step
        )
        if number not in self.snapshots:
            raise ValueError(
                f"step={step!r}: kept are {sorted(self.snapshots)}, 'best' and 'last'; fit with keep='all' keeps every "
                "evaluated step"
            )
        state = self.snapshots[int(number)]
        if foreign := sorted(set(state) - set(policy.state_dict())):
            raise ValueError(
                f"the policy has no {', '.join(foreign)}, which the fit's had; make it as the fitted one was (a learned "
                'lapse rate: lapse="learn")'
            )
        policy.load_state_dict(state, strict=False)

    def plot(self) -> Any:
        """Bound, validation likelihood and usage of the experts along the fit: a matplotlib figure."""
        from matplotlib import pyplot as plt

        from .. import figures

        usage = [name for name in self.history if name.startswith("usage_")]
        shown = [name for name in ("elbo", "validation_loglik") if name in self.history]
        fig, axes = plt.subplots(
            1, len(shown) + bool(usage), figsize=(7.0, 2.6), squeeze=False, layout="constrained"
        )
        for ax, name in zip(axes[0], shown, strict=False):
            figures.training_curves(self.history.assign(method="", seed=0), ax, column=name)
        if usage:
            long = self.history.melt("step", usage, "expert", "usage")
            long["expert"] = long["expert"].str.replace("usage_", "expert ")
            figures.curves(
                long, axes[0, -1], "step", "usage", "expert", "step", "mean responsibility (share)"
            )
        return fig


def certainty(log_q: Float[Tensor, "latents experts"]) -> float:
    """How far responsibilities stand, on average, between equal (0) and certain (1); 1 for K = 1.

    >>> import torch
    >>> round(certainty(torch.tensor([[0.75, 0.25], [0.5, 0.5]]).log()), 3)
    0.25
    """
    n_experts = log_q.shape[1]
    if n_experts == 1:
        return 1.0
    return float((log_q.exp().amax(1).mean() - 1 / n_experts) / (1 - 1 / n_experts))


def dead_experts(log_q: Float[Tensor, "latents experts"]) -> list[int]:
    """Experts of less than `DEAD` mean responsibility."""
    return [k for k, usage in enumerate(log_q.exp().mean(0).tolist()) if usage < DEAD]


def equal_experts(
    loglik: Float[Tensor, "pairs experts"], dead: Sequence[int] = ()
) -> list[tuple[int, int]]:
    """Pairs of living experts whose sigma(D) differ by less than `EQUAL` on average, the later one first.

    >>> import torch
    >>> equal_experts(torch.tensor([[0.9, 0.9, 0.1]]).log())
    [(1, 0)]
    """
    p, living = loglik.exp(), [k for k in range(loglik.shape[1]) if k not in set(dead)]
    return [
        (i, j)
        for i in living
        for j in living
        if j < i and float((p[:, i] - p[:, j]).abs().mean()) < EQUAL
    ]


def _short(value: float) -> str:
    return f"{value:.3f}" if not abs(value) > 1e4 else f"{value:.3g}"


def ending(stop_reason: str | None, history: pd.DataFrame) -> str:
    """Why a fit ended: the reason that was found, "diverged" where the bound fell by more than `FELL`, or "max_iter".

    >>> ending(None, pd.DataFrame({"elbo": [-0.7, -9.0]}))
    'diverged'
    """
    fell = history["elbo"].iloc[0] - history["elbo"].iloc[-1]
    return stop_reason or ("diverged" if fell > FELL else "max_iter")


def _too_sure(history: pd.DataFrame, kept_step: int) -> list[str]:
    """Whether later steps predict more validation pairs right and are less likely, since they are too sure of the others.

    >>> rows = {"step": [0, 20, 80], "validation_accuracy": [0.5, 0.75, 0.92], "validation_loglik": [-0.69, -0.63, -1.45]}
    >>> _too_sure(pd.DataFrame(rows), 20)[0][:75]
    'step 80 predicts more validation pairs right (0.92, where the kept one has '
    """
    if "validation_accuracy" not in history:
        return []
    kept = history[history["step"] == kept_step].iloc[0]
    later = history[history["step"] > kept_step]
    if later.empty or later["validation_accuracy"].max() < kept["validation_accuracy"] + SURER:
        return []
    at = later.loc[later["validation_accuracy"].idxmax()]
    return [
        f"step {int(at['step'])} predicts more validation pairs right ({at['validation_accuracy']:.2f}, where the kept one has "
        f"{kept['validation_accuracy']:.2f}) and is too sure of the others: learn a lapse rate (lapse='learn'), or lower "
        "min_steps or learning_rate"
    ]


def summarise(
    history: pd.DataFrame,
    stop_reason: str,
    kept_step: int | None,
    log_q: Float[Tensor, "latents experts"],
    loglik: Float[Tensor, "pairs experts"],
    nodes: Nodes | None = None,
) -> str:
    """One sentence for people.

    Parameters
    ----------
    kept_step : the best step where it was put back; None where the last one stays.
    log_q, loglik : responsibilities of the latents and log-likelihoods of the training pairs at the end, nats.
    nodes : of experts that are nodes of a group: what counts is how closely users are placed, not which node is used.
    """
    first, last, n_experts = history.iloc[0], history.iloc[-1], log_q.shape[1]
    said = [
        f"{int(last['step'])} steps; bound {_short(first['elbo'])} to {_short(last['elbo'])} nats per pair"
    ]
    if stop_reason != "max_iter":
        said.append(f"ended early: {stop_reason}")
    if stop_reason in FAILED:
        what = "the fit diverged" if stop_reason == "diverged" else "numbers that are none came up"
        at = history[history["step"] == kept_step].iloc[0]
        said.append(
            f"WARNING: {what}: step {kept_step}, the best finite one (bound {at['elbo']:.3f}), was put back; lower "
            "learning_rate"
        )
        return "; ".join(said) + "."
    lost = False
    if kept_step is not None:
        at = history[history["step"] == kept_step].iloc[0]
        best = at["validation_loglik"] >= history["validation_loglik"].max()
        which = "the best on validation pairs" if best else "as was chosen"
        said.append(f"step {kept_step} is kept, {which} ({at['validation_loglik']:.3f} nats)")
        lost = at["validation_loglik"] < COIN + EQUAL and last["elbo"] > COIN + LEARNED
        if lost:
            worse = "worse" if at["validation_loglik"] < COIN - EQUAL else "hardly better"
            said.append(
                f"WARNING: validation pairs are predicted {worse} than by a coin"
                + (" (nothing that was learned is kept)" if kept_step == 0 else "")
                + ": what was learned does not carry over; give more pairs of each unit, or fewer experts"
                + (" (of one: more, if people contradict one another)" if n_experts == 1 else "")
            )
        said += _too_sure(history, kept_step)
    turned = last["elbo"] - first["elbo"] < LEARNED
    if last["elbo"] - first["elbo"] < -LEARNED:
        said.append("WARNING: the bound fell: lower learning_rate")
    elif turned:
        said.append("almost nothing was learned: raise passes, min_steps or learning_rate")
        if n_experts == 1:
            said.append(
                "or people contradict one another, which one policy cannot follow: try n_experts=2"
            )
    elif nodes is not None:
        spread = float(nodes.taste(log_q).spread.median())
        unit = "deviations of the prior" if nodes.group == "translations" else "radians"
        said.append(f"latents are placed within {spread:.2f} {unit} (median)")
    elif n_experts > 1:
        sure, dead = certainty(log_q), dead_experts(log_q)
        alike = [f"{i} and {j}" for i, j in equal_experts(loglik, dead)]
        parted = sure >= PARTED and not alike
        when = "at the last step " if kept_step not in (None, int(last["step"])) else ""
        said.append(
            f"{when}experts have {'' if parted else 'not '}parted (mean certainty {sure:.2f})"
        )
        if n_experts > len(log_q):
            said.append(f"{n_experts} experts are more than the {len(log_q)} that they could serve")
        if dead:
            named = f"expert{'s' * (len(dead) > 1)} {', '.join(map(str, dead))}"
            which = named if len(dead) <= NAMED else f"{len(dead)} experts"
            said.append(f"{which} almost unused: fewer experts may do, or another seed")
        if alike:
            more = f" and {len(alike) - NAMED} pairs more" if len(alike) > NAMED else ""
            said.append(
                f"experts {', '.join(alike[:NAMED])}{more} nearly equal: fewer may do (choose_k)"
            )
        if sure < PARTED and not lost:
            said.append(
                "if groups are expected, raise passes or min_steps, or give each unit more pairs"
            )
    return "; ".join(said) + "."
