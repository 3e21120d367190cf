"""Figures and tables for a paper, from the reference results: of a size, legible, with captions."""

import re

import matplotlib
import pytest
from matplotlib import pyplot as plt
from test_figure_sizes import texts_of

from mixdpo_lib import store
from mixdpo_lib.runner.notebooks import notebook_path
from mixdpo_lib.runner.results import Finished
from mixdpo_lib.store import MixDPOError
from mixdpo_lib.study import paper

REFERENCE = Finished("reference")
BY_NAME = {one.name: one for one in paper.FIGURES}


@pytest.mark.parametrize(
    "name, size, inches",
    [
        ("elbo", "column", 3.3),
        ("accuracy_by_group_clean", "column", 7.0),  # needs a page, and says so
        ("settings", "page", 7.0),
        ("routing", "slide", 10.0),
    ],
)
def test_a_figure_has_its_width_and_letters_of_seven_points(name, size, inches, monkeypatch):
    with matplotlib.rc_context():
        drawn = paper.draw(BY_NAME[name], REFERENCE, size)
        assert len(drawn) == (2 if size == "slide" else 1)  # a panel a slide
        fig = drawn[0]
        assert fig.get_figwidth() == inches
        texts = texts_of(fig, monkeypatch)
        assert len(texts) > 4 and min(text.get_fontsize() for text in texts) >= 7
        page = fig.bbox.padded(0.5)
        for box in (text.get_window_extent() for text in texts):
            assert page.x0 <= box.x0 and box.x1 <= page.x1, "cut at a side"
        plt.close("all")


def test_every_figure_of_the_study_is_among_them():
    """By the names of the sidecars; what is drawn from several tables, or twice, is named here."""
    folder = store.project_root() / "figures" / "reference"
    kept = {
        (path.parts[-3], path.stem)
        for path in folder.glob("*/figures/*.json")
        if path.parts[-3] != "09_results"  # those of 04 again
    }
    left_out = {
        ("01_reviews_and_rewards", "judge_report"),
        ("01_reviews_and_rewards", "reward_distributions"),
        ("03_dpo", "accuracy_by_group"),
        ("3_continuous_groups", "newcomer"),  # the true angle stands in no table
    }
    assert kept - left_out == {(one.notebook, one.name) for one in paper.FIGURES}


@pytest.mark.parametrize(
    "one", [o for o in paper.FIGURES if "theory" in str(notebook_path(o.notebook))]
)
def test_nothing_of_a_theory_figure_is_cut_in_a_column(one, monkeypatch):
    with matplotlib.rc_context():
        (fig,) = paper.draw(one, REFERENCE, "column")
        page = fig.bbox.padded(0.5)
        for text in texts_of(fig, monkeypatch):
            box = text.get_window_extent()
            assert page.x0 <= box.x0 and box.x1 <= page.x1, text.get_text()
        plt.close("all")


def test_an_odd_panel_has_a_row_of_its_own():
    panels = paper.draw(BY_NAME["moments"], REFERENCE, "page")[0].axes
    assert len(panels) == 4
    with matplotlib.rc_context():
        three = BY_NAME["moments"]._replace(
            panels=lambda table: BY_NAME["moments"].panels(table)[:3]
        )
        fig = paper.draw(three, REFERENCE, "page")[0]
        assert (
            len(fig.axes) == 3 and len({ax.get_subplotspec().rowspan.start for ax in fig.axes}) == 2
        )
        plt.close("all")


def test_figures_captions_and_tables_are_written(tmp_path, monkeypatch):
    chosen = tuple(BY_NAME[name] for name in ("elbo", "collapse"))
    monkeypatch.setattr(paper, "FIGURES", chosen)
    said = paper.write(REFERENCE, "column", tmp_path)
    assert said == f"2 figures, 2 tables: {tmp_path}"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "04-mix-dpo-elbo.pdf",
        "08-ablation-experts-collapse.pdf",
        "figures.tex",
        "tables.tex",
    ]
    content = (tmp_path / "04-mix-dpo-elbo.pdf").read_bytes()
    assert content.startswith(b"%PDF") and b"/FontFile2" in content  # embedded, TrueType
    text = (tmp_path / "figures.tex").read_text()
    assert (
        text.count(r"\caption{The bound (nats per pair)") == text.count("04-mix-dpo-elbo.pdf") == 1
    )
    tables = (tmp_path / "tables.tex").read_text()
    assert tables.count(r"\toprule") == 2
    assert re.search(r"accuracy, mean of the groups & \+0\.\d{3} \[0\.\d{3}, 0\.\d{3}\] & ", tables)
    first, _, body = tables.partition("\n")
    assert first == text.splitlines()[0] == paper.OWN and not re.search(r"(?<!\\)[%_#]", body)
    (tmp_path / "tables.tex").write_text("my own\n")  # a paper's folder has such files, too
    with pytest.raises(
        MixDPOError, match="tables.tex: found a file that this command did not write"
    ):
        paper.write(REFERENCE, "column", tmp_path)
    assert (tmp_path / "tables.tex").read_text() == "my own\n"


@pytest.mark.parametrize(
    "notebook, name, line",
    [
        ("1_from_bradley_terry_to_mixtures", "cycle", 2 / 3),
        ("11_real_people", "gains", 0.0),
        ("11_real_people", "people", 0.0),
        ("08_ablation_experts", "held_out", None),
    ],
)
def test_lines_that_a_caption_or_reader_needs_are_drawn(notebook, name, line):
    """Of the cycle's majority, of who gains and who loses, and of the K that the rule picks."""
    one = next(o for o in paper.FIGURES if (o.notebook, o.name) == (notebook, name))
    if line is None:
        line = REFERENCE.values("08_ablation_experts")["chosen_n_experts"]["value"]
    with matplotlib.rc_context():
        (fig,) = paper.draw(one, REFERENCE, "column")
        drawn = [
            set(values)
            for shown in fig.axes[0].lines
            for values in (shown.get_xdata(), shown.get_ydata())
            if len(values) == 2
        ]
        assert {line} in drawn
        plt.close("all")


def test_tables_of_a_profile_that_means_nothing_say_so_and_empty_ones_stay_out(monkeypatch):
    whole = paper.headline_tables(REFERENCE)
    assert len(whole) == 3 and not any("too small" in table for table in whole)

    class Small(Finished):
        note = "smoke: too small to mean anything"

    small = paper.headline_tables(Small("reference"))
    assert all("(smoke: too small to mean anything)" in table for table in small)
    monkeypatch.setattr(Small, "has", lambda self, notebook: notebook == "08_ablation_experts")
    assert paper.headline_tables(Small("reference")) == []
