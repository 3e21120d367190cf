"""What does the figure show? Pairs a second as bars on a log scale, and the curves of the scaling parts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from benchmarks.speed.measuring import Row, quartiles
from mixdpo_lib.figures import style
from mixdpo_lib.figures.look import COLOURS, GREY, MARKERS

COLUMN_MM = 85.0
PANELS = (  # title of the horizontal axis, lines in it
    ("experts K", ("K",)),
    ("tokens an answer", ("tokens of an answer",)),
    ("active tokens", ("active tokens",)),
    ("vocabulary", ("vocabulary, active tokens", "vocabulary, all tokens")),
    ("pairs of a pass", ("pairs",)),
)


def _bars(ax: Any, rows: list[Row]) -> None:
    rows = rows[::-1]
    for place, one in enumerate(rows):
        low, middle, high = quartiles(one["values"])
        colour = GREY if one["what"].startswith("TRL") else COLOURS[0]
        ax.barh(place, middle, color=colour, height=0.7)
        ax.plot([low, high], [place, place], color="black", linewidth=1)
        ax.annotate(f" {middle:.3g}", (max(middle, high), place), va="center", fontsize=7)
    ax.set_yticks(range(len(rows)), [one["what"] for one in rows])
    ax.set(xscale="log", xlabel="pairs a second")
    ax.margins(x=0.25)
    ax.grid(visible=False, axis="y")


def _short(value: float, _: Any = None) -> str:
    """A number on an axis: 16384 is 16k."""
    return f"{value:g}" if value < 1000 else f"{value / 1000:.0f}k"


def _curve(ax: Any, lines: Mapping[str, list[Row]], title: str) -> None:
    for (name, rows), colour, marker in zip(lines.items(), COLOURS, MARKERS, strict=False):
        rows = sorted(rows, key=lambda one: one["x"])
        spread = [quartiles(one["values"]) for one in rows]
        x, middle = [one["x"] for one in rows], [s[1] for s in spread]
        label = name.rpartition(", ")[2].removesuffix(" tokens")
        ax.plot(x, middle, color=colour, marker=marker, markersize=3, label=label)
        ax.fill_between(x, [s[0] for s in spread], [s[2] for s in spread], color=colour, alpha=0.2)
    ax.set(xscale="log", yscale="log", xlabel=title)
    places = sorted({one["x"] for rows in lines.values() for one in rows})
    ax.set_xticks(places[:: math.ceil(len(places) / 3)])
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(FuncFormatter(_short))
        axis.set_minor_locator(NullLocator())
    if len(lines) > 1:
        ax.legend(fontsize=7, handlelength=1.2)


def draw(records: Mapping[str, Mapping[str, Any]], path: Path) -> Path | None:
    """Write the figure, 85 mm wide; None where there is nothing to show."""
    by_line: dict[str, list[Row]] = {}
    for record in records.values():
        for one in record["rows"]:
            if one["line"] and one["values"]:
                by_line.setdefault(one["line"], []).append(one)
    panels = [
        (title, {name: by_line[name] for name in names if name in by_line})
        for title, names in PANELS
        if any(name in by_line for name in names)
    ]
    bars = by_line.get("throughput", [])
    if not panels and not bars:
        return None
    style("column")
    rows = math.ceil(len(panels) / 2)
    heights = [height for height in (2.0 * bool(bars), 1.6 * rows) if height]
    fig = plt.figure(figsize=(COLUMN_MM / 25.4, sum(heights)), layout="constrained")
    parts = list(fig.subfigures(len(heights), height_ratios=heights, squeeze=False)[:, 0])
    if bars:
        _bars(parts.pop(0).subplots(), bars)
    for place, (title, lines) in enumerate(panels):
        ax = parts[0].add_subplot(rows, 2, place + 1)
        _curve(ax, lines, title)
        if place % 2 == 0:
            ax.set_ylabel("seconds")
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path)
    plt.close(fig)
    return path
