"""How is a table shown?  Every function is ``f(table, ax) -> ax``: it draws what the table holds and computes nothing.

Colours are those of Okabe and Ito (told apart with any colour vision); a marker or a hatch says the same in grey print.
A method or a reward looks the same in every figure of the study.  Legends lie outside the data.  A table that lacks a
column is refused by name.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

__all__ = [
    "EXPERT_STYLE",
    "METHOD_STYLE",
    "Look",
    "style",
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
    "mix_dpo": Look("Mix-DPO, latent per user", "#D55E00", "D", "..."),
    "mix_dpo_pair": Look("Mix-DPO, latent per pair", "#E69F00", "^", "xxx"),
    "oracle": Look("Mix-DPO, oracle routing", "#000000", "*", "ooo"),
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


def legend_above(ax: Axes, columns: int = 3) -> None:
    """One legend above the axes, outside the data; repeated labels appear once."""
    handles, labels = ax.get_legend_handles_labels()
    first = dict(zip(reversed(labels), reversed(handles), strict=True))
    names = [label for label in dict.fromkeys(labels)]
    if names:
        ax.legend([first[n] for n in names], names, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=columns)


_ = np
# ------------------------------------------------------------------------------------------------ rewards and judges
