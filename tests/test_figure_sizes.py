"""Figures in print: at the width of a column, a page and a slide all text is large enough, whole and apart."""

import inspect
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import pytest  # noqa: E402
from figure_tables import (
    AGREEMENT,
    BY_CAPACITY,
    BY_DOMAIN,
    BY_GROUP,
    BY_METHOD,
    CALIBRATION,
    CURVES,
    FRONTS,
    GAINS,
    HISTORY,
    LONG_Q,
    MATRIX,
    PAIRS,
    PROBES,
    RECOVERY,
    SAID_BY_ANGLE,
    SCORES,
    SERVED,
    SETTINGS,
    SHARPNESS,
    USERS_ON_CIRCLE,
    VALIDITY,
    Q,
)  # noqa: E402
from matplotlib.text import Text  # noqa: E402

from mixdpo_lib import figures  # noqa: E402
from mixdpo_lib.study import figures as study_figures  # noqa: E402
from mixdpo_lib.study import frontier_figures  # noqa: E402
from mixdpo_lib.study.judges import figures as judge_figures  # noqa: E402

ROOT = Path(__file__).parent.parent
LOOKS = study_figures.METHOD_STYLE

# function: (narrowest width that it fits, height or 0, how it is called)
FIGURES = {
    "points": ("column", 0, lambda ax: figures.points(SETTINGS[:8], ax, "setting", "NMI")),
    "users_on_circle": ("column", 3.1, lambda ax: figures.users_on_circle(USERS_ON_CIRCLE, ax)),
    "said_by_angle": ("page", 3.4, lambda ax: figures.said_by_angle(SAID_BY_ANGLE, ax)),
    "dots": (
        "column",
        0,
        lambda ax: figures.dots(SETTINGS, ax, "setting", "NMI", "NMI with the true groups"),
    ),
    "curves": (
        "column",
        0,
        lambda ax: figures.curves(CURVES, ax, "K", "nats", "inference", log_x=True),
    ),
    "training_curves": (
        "column",
        0,
        lambda ax: figures.training_curves(HISTORY, ax, "validation_loglik", LOOKS),
    ),
    "reliability": (
        "column",
        3.2,
        lambda ax: figures.reliability(CALIBRATION, ax, "method", LOOKS),
    ),
    "responsibility_map": ("column", 0, lambda ax: figures.responsibility_map(Q, ax)),
    "study.responsibility_map": (
        "page",
        2,
        lambda ax: study_figures.responsibility_map(LONG_Q, ax),
    ),
    "pair_design": ("column", 0, lambda ax: study_figures.pair_design(PAIRS, ax)),
    "group_disagreement": ("column", 0, lambda ax: study_figures.group_disagreement(MATRIX, ax)),
    "accuracy_by_group": ("page", 0, lambda ax: study_figures.accuracy_by_group(BY_GROUP, ax)),
    "accuracy_by_domain": ("page", 0, lambda ax: study_figures.accuracy_by_domain(BY_DOMAIN, ax)),
    "accuracy_by_capacity": (
        "column",
        3,
        lambda ax: study_figures.accuracy_by_capacity(BY_CAPACITY, ax),
    ),
    "accuracy_by_own_pairs": (
        "column",
        3.4,
        lambda ax: study_figures.accuracy_by_own_pairs(SERVED, ax),
    ),
    "routing_comparison": ("column", 3, lambda ax: study_figures.routing_comparison(BY_GROUP, ax)),
    "recovery": ("page", 0, lambda ax: study_figures.recovery(RECOVERY, ax)),
    "reward_gains": ("page", 0, lambda ax: study_figures.reward_gains(GAINS, ax)),
    "accuracy_by_method": (
        "page",
        3.9,
        lambda ax: frontier_figures.accuracy_by_method(BY_METHOD, ax),
    ),
    "frontiers": ("page", 5, lambda ax: frontier_figures.frontiers(FRONTS, ax)),
    "expert_sharpness": ("page", 0, lambda ax: study_figures.expert_sharpness(SHARPNESS, ax)),
    "judge_report": ("column", 3, lambda ax: judge_figures.judge_report(VALIDITY, ax)),
    "judge_agreement": ("page", 2.8, lambda ax: judge_figures.judge_agreement(AGREEMENT, ax)),
    "probe_scores": ("page", 0, lambda ax: judge_figures.probe_scores(PROBES, ax)),
    "reward_distributions": (
        "column",
        0,
        lambda ax: judge_figures.reward_distributions(SCORES, ax),
    ),
}


def texts_of(figure, monkeypatch) -> list[Text]:
    """Every piece of text that is drawn."""
    drawn, draw = {}, Text.draw

    def note(self, renderer):
        if self.get_visible() and self.get_text().strip():
            drawn[id(self)] = self
        draw(self, renderer)

    monkeypatch.setattr(Text, "draw", note)
    figure.canvas.draw()
    return list(drawn.values())


@pytest.mark.parametrize("name", FIGURES)
def test_text_is_large_whole_and_apart(name, monkeypatch):
    width, height, draw = FIGURES[name]
    with matplotlib.rc_context():
        figure, ax = figures.subplots(width, height=height)
        assert draw(ax) is ax
        figures.watermark(figure, "smoke: too small to mean anything")
        texts = texts_of(figure, monkeypatch)
        page = figure.bbox.padded(0.5)
        assert len(texts) > 4
        for text in texts:
            size, box = text.get_fontsize(), text.get_window_extent()
            assert size >= 7, f"{text} has {size} pt"
            assert page.x0 <= box.x0 and box.x1 <= page.x1, f"{text} is cut at a side"
            assert page.y0 <= box.y0 and box.y1 <= page.y1, f"{text} is cut above or below"
        level = [
            (text, text.get_window_extent().padded(-0.5))
            for text in texts
            if text.get_rotation() % 90 == 0
        ]
        for (text, box), (other, beside) in combinations(level, 2):
            assert not box.overlaps(beside), f"{text} lies on {other}"
        data = [one.get_window_extent() for one in (*figure.axes, *ax.child_axes)]
        outside = [text.get_window_extent() for text in figure.texts]
        outside += [ax.get_legend().get_window_extent()] if ax.get_legend() else []
        assert not any(box.overlaps(panel) for box in outside for panel in data)
        plt.close(figure)


@pytest.mark.parametrize(
    "name", ["dots", "curves", "training_curves", "reliability", "accuracy_by_group"]
)
def test_slides_have_text_of_fourteen_points(name, monkeypatch):
    with matplotlib.rc_context():
        figure, ax = figures.subplots("slide")
        FIGURES[name][2](ax)
        assert figure.get_size_inches().tolist() == [10, 5.4]
        assert min(text.get_fontsize() for text in texts_of(figure, monkeypatch)) >= 14
        plt.close(figure)


def test_every_figure_is_looked_at():
    for module in (figures, study_figures, judge_figures):
        for name, function in vars(module).items():
            if inspect.isfunction(function) and function.__module__.startswith("mixdpo_lib"):
                parameters = list(inspect.signature(function).parameters)
                if (
                    "ax" in parameters[1:2]
                    and not name.startswith("_")
                    and name not in ("heat", "general_map")
                ):
                    assert name in FIGURES, f"{function.__module__}.{name}"


@pytest.mark.parametrize("width, inches", [("column", 3.3), ("page", 7.0), ("slide", 10.0)])
def test_a_figure_keeps_its_width(width, inches, tmp_path):
    with matplotlib.rc_context():
        figure, axes = figures.subplots(width, columns=2, sharey=True)
        for ax in axes:
            figures.training_curves(HISTORY, ax, "validation_loglik")
        figures.share_legend(figure)
        figure.savefig(tmp_path / "figure.png", dpi=100)
        plt.close(figure)
    assert plt.imread(tmp_path / "figure.png").shape[1] == round(100 * inches)


def test_an_unknown_width_is_refused():
    with pytest.raises(ValueError, match="width 'paper': expected one of column, page, slide"):
        figures.subplots("paper")


def test_a_shared_legend_names_each_series_once():
    with matplotlib.rc_context():
        figure, axes = figures.subplots("page", columns=2)
        for ax in axes:
            figures.training_curves(HISTORY, ax, "validation_loglik", LOOKS).set_title("design")
        figures.share_legend(figure)
        assert all(ax.get_legend() is None for ax in axes)
        assert [text.get_text() for text in figure.legends[0].get_texts()] == [
            "Mix-DPO, per user",
            "Mix-DPO, per pair",
        ]
        figure.canvas.draw()
        assert not any(
            figure.legends[0].get_window_extent().overlaps(ax.get_tightbbox()) for ax in axes
        )
        plt.close(figure)


def test_a_watermark_stands_below_the_panels_and_once():
    with matplotlib.rc_context():
        figure, ax = figures.subplots("column", height=2)
        figures.dots(SETTINGS, ax, "setting", "NMI")
        figure.canvas.draw()
        before = ax.get_window_extent().height
        for _ in range(2):
            figures.watermark(figure, "smoke: too small to mean anything")
        assert [text.get_text() for text in figure.texts] == ["smoke: too small to mean anything"]
        assert figure.get_size_inches() == pytest.approx([3.3, 2.2], abs=0.01)
        figure.canvas.draw()
        assert ax.get_window_extent().height == pytest.approx(before, abs=1)
        assert figure.texts[0].get_window_extent().y1 <= ax.get_tightbbox().y0
        plt.close(figure)


def test_figures_need_no_torch():
    check = "import sys; from mixdpo_lib import figures; from mixdpo_lib.study import figures; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=True)
