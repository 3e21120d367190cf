"""How is a table shown?  By a function ``f(table, ax) -> ax`` on axes that suit a paper.

>>> import pandas as pd
>>> fig, ax = subplots("column")  # or "page", "slide"
>>> ax = curves(pd.DataFrame({"K": [1, 2], "loss": [0.7, 0.5]}), ax, "K", "loss")
>>> ax.lines[0].get_ydata().tolist()
[0.7, 0.5]
"""

from .circle import said_by_angle, users_on_circle
from .look import Look, legend_above, share_legend, style, subplots, watermark
from .moving import Moving, users_part
from .plots import curves, dots, points, reliability, responsibility_map, training_curves

__all__ = [
    "Look",
    "Moving",
    "curves",
    "dots",
    "legend_above",
    "points",
    "reliability",
    "responsibility_map",
    "said_by_angle",
    "share_legend",
    "style",
    "subplots",
    "training_curves",
    "users_on_circle",
    "users_part",
    "watermark",
]
