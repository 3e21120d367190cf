"""How does a figure look?  Its width in print, its letters, the colour and marker of each name.

Text is at least 7 pt at the width of a column or page.  Colours are those of Okabe and Ito (told
apart with any colour vision); markers and dashes say the same in grey print.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import matplotlib as mpl
import matplotlib.pyplot as plt
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure


class Look(NamedTuple):
    """How a name looks in every figure; its marker is open where not `filled`."""

    label: str
    colour: str
    marker: str
    filled: bool = True


Looks = Mapping[str, Look]
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "D", "s", "^", "v", "P", "X")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (7, 1.5)))
GREY = "#8A8A8A"
WIDTHS = {"column": 3.3, "page": 7.0, "slide": 10.0}  # inches


def style(width: str = "page") -> None:
    """Set matplotlib's defaults for a width: text of 7 to 8 pt, on a slide of 14 to 15 pt."""
    if width not in WIDTHS:
        raise ValueError(f"width {width!r}: expected one of {', '.join(WIDTHS)}")
    context, scale = ("talk", 0.85) if width == "slide" else ("paper", 0.82)
    rc = {
        "figure.dpi": 150,
        "figure.constrained_layout.use": True,
        "savefig.dpi": 300,
        "pdf.fonttype": 42,  # fonts embedded whole, text stays text
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": "#E2E2E2",
        "hatch.linewidth": 0.6,
        "legend.frameon": False,
        "legend.columnspacing": 1.2,
    }
    # DejaVu comes with matplotlib: the same letters on every machine
    sns.set_theme(context, "whitegrid", COLOURS, font="DejaVu Sans", font_scale=scale, rc=rc)


def subplots(
    width: str = "column", rows: int = 1, columns: int = 1, height: float | int = 0, **options: Any
) -> tuple[Figure, Any]:
    """Figure and axes as `plt.subplots` gives them, of an exact width, in the :func:`style` for it.

    Parameters
    ----------
    width : "column" (3.3 in), "page" (7 in) or "slide" (10 in).
    height : inches; by default what suits the panels.
    options : of `plt.subplots`, for example ``sharey=True``.

    >>> fig, axes = subplots("page", columns=2)
    >>> fig.get_size_inches().round(2).tolist(), axes.shape
    ([7.0, 2.4], (2,))
    >>> plt.close(fig)
    """
    style(width)
    panel = (3.4 if width == "slide" else 1.7) + 0.2 * WIDTHS[width] / columns
    size = (WIDTHS[width], height or rows * panel)
    return plt.subplots(rows, columns, figsize=size, layout="constrained", **options)


def watermark(fig: Figure, text: str) -> None:
    """A plain note in a strip of its own below the panels, by which the figure grows, once."""
    if any(other.get_gid() == "watermark" for other in fig.texts):
        return
    width, height = fig.get_size_inches()
    note = fig.text(0.5, 0, text, ha="center", va="bottom", color="#A50026", weight="bold")
    note.set(gid="watermark", fontsize=mpl.rcParams["xtick.labelsize"])
    strip = 2 * float(note.get_fontsize()) / 72
    total = height + strip
    note.set_y(0.2 * strip / total)
    fig.set_size_inches(width, total)
    fig.set_layout_engine("constrained", rect=(0, strip / total, 1, height / total))


def legend_above(ax: Axes, height: float = 1.0) -> None:
    """One legend above the axes, at `height` times theirs; repeated labels appear once."""
    found = zip(*ax.get_legend_handles_labels(), strict=True)
    _legend(ax.legend, found, ax.bbox.width, loc="lower left", bbox_to_anchor=(0.0, height))


def share_legend(fig: Figure) -> None:
    """One legend above all panels in place of one above each."""
    found: list[tuple[Any, str]] = []
    for ax in fig.axes:
        if legend := ax.get_legend():
            found += zip(*ax.get_legend_handles_labels(), strict=True)
            legend.remove()
    _legend(fig.legend, found, fig.bbox.width, loc="outside upper left")


def _legend(make: Callable, found: Iterable, width: float, **where: Any) -> None:
    """A legend of (artist, label), each label once, in as many columns as fit `width` pixels."""
    artists = dict(reversed([(label, artist) for artist, label in found][::-1]))
    for columns in range(len(artists), 0, -1):
        legend = make(list(artists.values()), list(artists), ncols=columns, **where)
        if columns == 1 or legend.get_window_extent().width <= width:
            return
        legend.remove()


def looks_of(names: Iterable[Any], looks: Looks | None = None) -> dict[Any, Look]:
    """How names are drawn: as `looks` says and in its order, others in colours left over.

    >>> looks_of(["b", "a"], {"a": Look("A", "#000000", "*")})["b"]
    Look(label='b', colour='#0072B2', marker='o', filled=True)
    """
    found = list(dict.fromkeys(names))
    drawn = {name: look for name, look in (looks or {}).items() if name in found}
    taken = {look.colour for look in drawn.values()}
    free = [one for one in zip(COLOURS, MARKERS, strict=True) if one[0] not in taken]
    for position, name in enumerate([name for name in found if name not in drawn]):
        drawn[name] = Look(str(name), *(free or [(GREY, "o")])[position % max(len(free), 1)])
    return drawn
