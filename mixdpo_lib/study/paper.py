"""How do the study's figures and tables get into a paper? Drawn anew from a run's tables, at one width of print."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import matplotlib as mpl
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .. import figures, store
from ..store import MixDPOError
from .paper_figures import FIGURES, Draw, Panel, Shown
from .readme import readme_blocks

OWN = "% written by `mixdpo figures`, which replaces it"
WIDTHS = ("column", "page", "slide")
_INTERVALS = "Brackets: 95 % intervals over prompts, all seeds together"
_TABLES = {  # block of readme.py: captions of its tables
    "results": (
        f"Mix-DPO minus DPO on test prompts. {_INTERVALS}; for NMI the lowest and highest seed.",
        f"Texts at matched KL, scored by the evaluation judges. {_INTERVALS}.",
    ),
    "further": (f"Accuracy on test prompts. {_INTERVALS}.",),
}
_SIGNS = {"%": r"\%", "_": r"\_", "&": r"\&", "#": r"\#", "τ": r"$\tau$", "λ": r"$\lambda$"}


@runtime_checkable
class Results(Protocol):
    """Where tables, values and captions come from: `runner.results.Finished`."""

    @property
    def where(self) -> str:
        """The profile, or "reference"."""

    @property
    def note(self) -> str:
        """What every table must say."""

    def has(self, notebook: str) -> bool:
        """Whether there are any of this notebook."""

    def table(self, notebook: str, name: str) -> pd.DataFrame:
        """A table of it."""

    def values(self, notebook: str) -> dict[str, dict[str, Any]]:
        """Its quoted numbers."""

    def caption(self, notebook: str, figure: str) -> str:
        """Of one of its figures."""


def draw(one: Shown, results: Results, size: str) -> list[Figure]:
    """A figure drawn anew from a table; for slides, where panels do not fit side by side, a figure a panel.

    Raises
    ------
    MixDPOError : no finished run of its notebook, or a table that is not the recorded one.
    """
    panels = one.panels(partial(results.table, one.notebook))
    if one.line:
        at = results.values(one.notebook)[one.line]["value"]
        panels = [(title, rows, partial(_with_line, at, plot)) for title, rows, plot in panels]
    if size == "slide":
        return [_drawn([panel], one, size, len(panels) > 1) for panel in panels]
    return [_drawn(panels, one, one.least if size == "column" else size, len(panels) > 1)]


def _with_line(at: float, plot: Draw, rows: pd.DataFrame, ax: Axes) -> Any:
    ax.axvline(at, color="black", linestyle=":")
    return plot(rows, ax)


def _drawn(panels: list[Panel], one: Shown, width: str, titled: bool) -> Figure:
    across = 1 if one.stacked or width == "column" else min(2, len(panels))
    down = -(-len(panels) // across)
    height = 0 if width == "slide" else down * one.height
    fig, axes = figures.subplots(width, down, across, height=height, squeeze=False)
    used, empty = axes.flat[: len(panels)], axes.flat[len(panels) :]
    for ax in empty:
        ax.remove()
    for ax, (title, rows, plot) in zip(used, panels, strict=True):
        plot(rows, ax)
        if titled:
            ax.set_title(title)
    if titled and all(ax.get_legend() for ax in used):  # titles stand where legends do
        figures.share_legend(fig)
    return fig


def write(results: Results, size: str = "column", folder: Path = Path("paper")) -> str:
    """Write every figure as PDF, fonts embedded, `figures.tex` (with captions) and `tables.tex`; says what is where.

    Parameters
    ----------
    results : of a profile's runs, or the reference results.
    size : "column" (3.3 in), "page" (7 in) or "slide" (10 in). What needs a page is a page wide in a column too.
    folder : where they go.

    Raises
    ------
    MixDPOError : an unknown size; a run of which nothing is there.
    """
    if size not in WIDTHS:
        raise MixDPOError(f"size {size!r}: expected one of {', '.join(WIDTHS)}")
    there = [name for name in _notebooks() if results.has(name)]
    if not there:
        raise MixDPOError(
            f"{results.where}: no finished run of {', '.join(_notebooks())}; make them by `make reproduce-all "
            f"PROFILE={results.where}`, or take --run reference"
        )
    own = "; of your own runs: --run default" if results.where == "reference" else ""
    store.note(f"drawing the figures of {results.where}, some 20 seconds{own}")
    for place in (folder / "figures.tex", folder / "tables.tex"):
        if place.exists() and not place.read_bytes().startswith(OWN.encode()):
            raise MixDPOError(
                f"{place}: found a file that this command did not write; name another folder by --output"
            )
    with store.writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        texts = []
        for one in (one for one in FIGURES if one.notebook in there):
            name = f"{one.notebook}-{one.name}".replace("_", "-")
            caption = results.caption(one.notebook, one.name)
            with mpl.rc_context():
                drawn = draw(one, results, size)
                for number, fig in enumerate(drawn, 1):
                    file = f"{name}-{number}" if len(drawn) > 1 else name
                    with mpl.rc_context({"savefig.bbox": None, "pdf.fonttype": 42}):
                        fig.savefig(folder / f"{file}.pdf", metadata={"CreationDate": None})
                    plt.close(fig)
                    texts.append(_environment(file, caption, size, one.least))
        tables = headline_tables(results)
        for name, written in (("figures.tex", texts), ("tables.tex", tables)):
            (folder / name).write_text("\n".join([OWN, *written]) + "\n", encoding="utf-8")
    absent = [name for name in _notebooks() if name not in there]
    lines = [f"{len(texts)} figures, {len(tables)} tables: {folder}"]
    lines += [f"not there, since not run: {', '.join(absent)}"] if absent else []
    return "\n".join(lines)


def _notebooks() -> list[str]:
    return list(dict.fromkeys(one.notebook for one in FIGURES))


def _environment(name: str, caption: str, size: str, least: str) -> str:
    """A LaTeX figure; what needs a page goes over both columns.

    >>> print(_environment("04-a", "Share of 5 % (τ).", "column", "column"))
    \\begin{figure}
      \\centering
      \\includegraphics{04-a.pdf}
      \\caption{Share of 5 \\% ($\\tau$).}
      \\label{fig:04-a}
    \\end{figure}
    """
    kind = "figure*" if size == "column" and least == "page" else "figure"
    return "\n".join(
        (
            f"\\begin{{{kind}}}",
            "  \\centering",
            f"  \\includegraphics{{{name}.pdf}}",
            f"  \\caption{{{_escaped(caption)}}}",
            f"  \\label{{fig:{name}}}",
            f"\\end{{{kind}}}",
        )
    )


def _escaped(text: str) -> str:
    return "".join(_SIGNS.get(sign, sign) for sign in text)


def headline_tables(results: Results) -> list[str]:
    """README's tables of results in LaTeX (booktabs), from the same numbers; a dash where a notebook was not run.

    A table without a number stays out.
    """
    there = [name for name in _notebooks() if results.has(name)]
    values = {key: value for name in there for key, value in results.values(name).items()}
    blocks, note = readme_blocks(values), f" ({results.note})" if results.note else ""
    return [
        _tabular(f"{name}-{number}", table, caption + note)
        for name, captions in _TABLES.items()
        for number, (table, caption) in enumerate(
            zip(_tables_of(blocks[name]), captions, strict=True), start=1
        )
        if any(re.search(r"\d", cell) for row in table[1:] for cell in row[1:])
    ]


def _tables_of(markdown: str) -> list[list[list[str]]]:
    """Rows of cells of every table in a piece of Markdown.

    >>> _tables_of("| a | b |\\n|---|---|\\n| 1 | 2 |\\n\\nText.")
    [[['a', 'b'], ['1', '2']]]
    """
    blocks = re.findall(r"(?:^\|.*\|$\n?)+", markdown, re.MULTILINE)
    return [
        [
            [cell.strip() for cell in line.strip("|").split("|")]
            for line in block.strip().splitlines()
            if not re.fullmatch(r"[|:-]+", line)
        ]
        for block in blocks
    ]


def _tabular(label: str, rows: Iterable[list[str]], caption: str) -> str:
    head, *body = ([_escaped(cell) for cell in row] for row in rows)
    lines = [" & ".join(row) + r" \\" for row in body]
    return "\n".join(
        (
            "\\begin{table}",
            "  \\centering",
            f"  \\caption{{{_escaped(caption)}}}",
            f"  \\label{{tab:{label}}}",
            f"  \\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}",
            "    \\toprule",
            f"    {' & '.join(head)} \\\\",
            "    \\midrule",
            *(f"    {line}" for line in lines),
            "    \\bottomrule",
            "  \\end{tabular}",
            "\\end{table}",
        )
    )
