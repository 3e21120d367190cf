"""How does a fit move? Its steps as a picture that runs."""

from __future__ import annotations

import base64
import tempfile
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.figure import Figure

from .look import Looks, looks_of, style
from .plots import need

DPI = 90
STILL: Any = {"figure.constrained_layout.use": False}  # nothing moves but what is drawn
CORNERS = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, np.sqrt(3) / 2]])


class Moving:
    """A GIF that a notebook shows, that a page of the web shows, and that can be written to a file (`data`, bytes)."""

    def __init__(self, data: bytes, words: str) -> None:
        self.data, self.words = data, words

    def _repr_html_(self) -> str:
        code = base64.b64encode(self.data).decode()
        return f'<img src="data:image/gif;base64,{code}" alt="{self.words}" style="max-width:100%">'


def users_part(
    table: pd.DataFrame, groups: Looks | None = None, frames_per_second: int = 3, last: int = 6
) -> Moving:
    """Users in the triangle of three experts, and the bound, step by step.

    Parameters
    ----------
    table : one row a step and user: step, user, group, expert_0, expert_1, expert_2 (responsibilities, total 1), and
        bound (nats per pair), the same for all users of a step.
    groups : looks of the groups. last : how often the last picture is repeated.

    Raises
    ------
    ValueError : a column that is missing.
    """
    experts = [f"expert_{k}" for k in range(3)]
    need(table, ["step", "user", "group", *experts, "bound"], "users_part")
    looks, steps = looks_of(sorted(table["group"].unique()), groups), sorted(table["step"].unique())
    style("page")
    with mpl.rc_context(STILL):
        fig = Figure(figsize=(7.0, 3.0))
    fig.subplots_adjust(left=0.03, right=0.98, bottom=0.17, top=0.9, wspace=0.25)
    triangle, curve = fig.subplots(1, 2)
    bound = table.groupby("step")["bound"].first().loc[steps]
    jitter = np.random.default_rng(0).normal(0, 0.02, (table["user"].nunique(), 2))

    def draw(frame: int) -> list[Any]:
        step = steps[min(frame, len(steps) - 1)]
        now = table[table["step"] == step].sort_values("user")
        place = now[experts].to_numpy() @ CORNERS + jitter
        triangle.clear()
        triangle.plot(*CORNERS[[0, 1, 2, 0]].T, color="#BBBBBB", linewidth=1)
        for name, look in looks.items():
            own = (now["group"] == name).to_numpy()
            triangle.scatter(
                *place[own].T,
                s=16,
                color=look.colour,
                marker=look.marker,
                label=look.label,
                alpha=0.8,
            )
        for k, (x, y) in enumerate(CORNERS):
            below = {"ha": "center", "va": "bottom" if k == 2 else "top"}
            triangle.annotate(
                f"expert {k}", (x, y), (0, 9 if k == 2 else -9), textcoords="offset points", **below
            )
        triangle.set(
            xlim=(-0.12, 1.12),
            ylim=(-0.15, 1.02),
            aspect="equal",
            title=f"step {step}: who answered?",
        )
        triangle.axis("off")
        triangle.legend(loc="upper left", bbox_to_anchor=(-0.16, 1.0), title="hidden")
        curve.clear()
        curve.plot(steps, bound, color="#DDDDDD")
        curve.plot(
            bound.loc[:step].index, bound.loc[:step], color="black", marker="o", markersize=3
        )
        curve.set(xlabel="step of EM", ylabel="nats per pair", title="the bound")
        return []

    moving = FuncAnimation(fig, draw, frames=len(steps) + last)
    return Moving(
        _gif(moving, frames_per_second),
        "Users part into the corners of a triangle while the bound rises",
    )


def _gif(moving: FuncAnimation, frames_per_second: int) -> bytes:
    """The frames as a GIF that repeats; matplotlib's writer knows files alone."""
    with tempfile.TemporaryDirectory() as folder, mpl.rc_context(STILL):
        path = Path(folder) / "moving.gif"
        moving.save(path, writer=PillowWriter(fps=frames_per_second), dpi=DPI)
        return path.read_bytes()
