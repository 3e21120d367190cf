"""How are tastes on a circle shown? Users at their angles, and what is said as the angle turns."""

from __future__ import annotations

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection

from .look import GREY
from .plots import heat, need

CYCLE = sns.husl_palette(
    360, s=0.85, l=0.55
)  # a colour a degree, that comes back to where it began


def users_on_circle(table: pd.DataFrame, ax: Axes) -> Axes:
    """A spoke for each user, from the true angle outside to the angle that was found inside; straight where they agree.

    Parameters
    ----------
    table : columns ``true`` and ``found``, radians, aligned (see `evaluation.align_circle`).
    """
    need(table, ["true", "found"], "users_on_circle")
    true, found = (table[name].to_numpy(float) for name in ("true", "found"))
    colours = [CYCLE[int(np.degrees(angle)) % 360] for angle in true]
    ends = [np.stack([r * np.cos(a), r * np.sin(a)], 1) for r, a in ((1.0, true), (0.55, found))]
    spokes = LineCollection(list(np.stack(ends, 1)), colors=colours, linewidths=0.6, alpha=0.7)
    ax.add_collection(spokes)
    for size, (x, y) in zip((9, 5), (end.T for end in ends), strict=True):
        ax.scatter(x, y, s=size, c=colours, linewidths=0, zorder=3)
    for angle in range(0, 360, 90):
        x, y = np.cos(np.radians(angle)), np.sin(np.radians(angle))
        beside, above = (
            ("left", "center", "right")[1 - round(x)],
            ("bottom", "center", "top")[1 - round(y)],
        )
        ax.text(1.07 * x, 1.07 * y, f"{angle}°", ha=beside, va=above)
    ax.text(0, 0, "outside: true\ninside: found", ha="center", va="center", color=GREY)
    ax.set(xlim=(-1.3, 1.3), ylim=(-1.3, 1.3), aspect="equal")
    ax.set_axis_off()
    return ax


def said_by_angle(table: pd.DataFrame, ax: Axes) -> Axes:
    """The probability of every answer under the policy of each angle.

    Parameters
    ----------
    table : ``angle`` (degrees, rising), and a column an answer: its probability.
    """
    need(table, ["angle"], "said_by_angle")
    grid = table.set_index("angle").T
    ax = heat(grid, ax, "probability", cmap="Greys", vmin=0)
    at = [int(np.abs(grid.columns.to_numpy(float) - angle).argmin()) for angle in range(0, 360, 90)]
    ax.set_xticks([i + 0.5 for i in at], [f"{angle}°" for angle in range(0, 360, 90)], rotation=0)
    ax.set(xlabel="angle of the taste", ylabel="")
    return ax
