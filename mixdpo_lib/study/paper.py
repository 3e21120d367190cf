"""How do the study's figures and tables get into a paper? Drawn anew from a run's tables, at one width of print."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import matplotlib as mpl
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .. import figures, store
from ..store import MixDPOError
from . import figures as shown
from . import frontier_figures as fronts
from .judges import figures as judged
from .readme import readme_blocks

WIDTHS = ("column", "page", "slide")
Draw = Callable[[pd.DataFrame, Axes], Any]
Panel = tuple[str, pd.DataFrame, Draw]
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

    def has(self, notebook: str) -> bool:
        """Whether there are any of this notebook."""

    def table(self, notebook: str, name: str) -> pd.DataFrame:
        """A table of it."""

    def values(self, notebook: str) -> dict[str, dict[str, Any]]:
        """Its quoted numbers."""

    def caption(self, notebook: str, figure: str) -> str:
        """Of one of its figures."""


class Shown(NamedTuple):
    """A figure of a notebook: its panels, how small it can be, and how high a panel is.

    panels : from `table(name)`, which loads a table of that notebook.
    least : "page" where a column is too narrow; it is then drawn a page wide, for `figure*`.
    height : inches of a panel in a column or on a page, 0 for what suits; on a slide all that there is.
    stacked : panels below each other on a page too.
    """

    notebook: str
    name: str
    panels: Callable[[Callable[[str], pd.DataFrame]], list[Panel]]
    least: str = "column"
    height: float = 0
    stacked: bool = False


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
    rows = rows.dropna(subset="gain")
    rows = rows.assign(mixture=rows["people_of"] + ", K = " + rows["K"].astype(str))
    return figures.dots(rows, ax, "mixture", "gain", "gain (nats per test pair)")


def _people(rows: pd.DataFrame, ax: Axes) -> Axes:
    most = rows[rows["K"] == rows["K"].max()]
    x, y = "share of people", "gain (nats per test pair)"
    return figures.curves(most, ax, "share", "gain", "people_of", x, y)


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
    Shown("08_ablation_experts", "held_out", _against_k(_HELD_OUT)),
    Shown("08_ablation_experts", "collapse", _settings("collapse", _USED, _NMI), height=2.0, stacked=True),
    Shown("10_model_sizes", "accuracy_by_capacity", _one("accuracy", shown.accuracy_by_capacity), height=3.0),
    Shown("11_real_people", "gains", _one("verdicts", _verdicts)),
    Shown("11_real_people", "people", _one("people", _people)),
    Shown("12_baselines", "accuracy_by_method", _one("accuracy", fronts.accuracy_by_method), "page", 4.2),
    Shown("12_baselines", "frontiers", _one("points", fronts.frontiers), "page", 5.0),
    Shown("1_extreme_sparsity", "fits", _settings("fits", *_DIED, by="fit"), height=2.2, stacked=True),
    Shown("2_growing_experts", "gains", _one("decisions", _grown)),
    Shown("2_growing_experts", "late", _one("late", _late)),
    Shown("3_continuous_groups", "users", _one("users", figures.users_on_circle), height=3.1),
    Shown("3_continuous_groups", "said", _one("said", figures.said_by_angle), "page", 3.4),
    Shown("3_continuous_groups", "held_out", _one("held_out", _free)),
)  # fmt: skip


def draw(one: Shown, results: Results, size: str) -> list[Figure]:
    """A figure drawn anew from a table; for slides, where panels do not fit side by side, a figure a panel.

    Raises
    ------
    MixDPOError : no finished run of its notebook, or a table that is not the recorded one.
    """
    panels = one.panels(partial(results.table, one.notebook))
    if size == "slide":
        return [_drawn([panel], one, size, len(panels) > 1) for panel in panels]
    return [_drawn(panels, one, one.least if size == "column" else size, len(panels) > 1)]


def _drawn(panels: list[Panel], one: Shown, width: str, titled: bool) -> Figure:
    across = 1 if one.stacked or width == "column" else len(panels)
    down = len(panels) // across
    height = 0 if width == "slide" else down * one.height
    fig, axes = figures.subplots(width, down, across, height=height, squeeze=False)
    for ax, (title, rows, plot) in zip(axes.flat, panels, strict=True):
        plot(rows, ax)
        if titled:
            ax.set_title(title)
    if titled and all(ax.get_legend() for ax in axes.flat):  # titles stand where legends do
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
        (folder / "figures.tex").write_text("\n".join(texts) + "\n", encoding="utf-8")
        tables = headline_tables(results)
        (folder / "tables.tex").write_text("\n".join(tables) + "\n", encoding="utf-8")
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
    """README's tables of results in LaTeX (booktabs), from the same numbers; a dash where a notebook was not run."""
    there = [name for name in _notebooks() if results.has(name)]
    values = {key: value for name in there for key, value in results.values(name).items()}
    blocks = readme_blocks(values)
    return [
        _tabular(f"{name}-{number}", table, caption)
        for name, captions in _TABLES.items()
        for number, (table, caption) in enumerate(
            zip(_tables_of(blocks[name]), captions, strict=True), start=1
        )
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
