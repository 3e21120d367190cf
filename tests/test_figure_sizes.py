"""Figures in print: at the width of a column, a page and a slide all text is large enough, whole and apart."""

import inspect
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import pytest  # noqa: E402
from matplotlib.text import Text  # noqa: E402

from mixdpo_lib import figures  # noqa: E402
from mixdpo_lib.study import figures as study_figures  # noqa: E402
from mixdpo_lib.study.judges import figures as judge_figures  # noqa: E402

ROOT = Path(__file__).parent.parent
GROUPS = ["sentiment", "informativeness", "grammar"]
SEEDS = [0, 1, 2, "mean"]


def accuracy(methods: list[tuple[str, str]], groups: list[str], **more) -> pd.DataFrame:
    rows = []
    for m, (method, routing) in enumerate(methods):
        for g, group in enumerate(groups):
            for seed in SEEDS:
                value = 0.56 + 0.03 * m + 0.01 * g + 0.004 * (0 if seed == "mean" else seed)
                rows.append({"method": method, "routing": routing, "group": group, "seed": seed, "n_pairs": 2519})
                rows[-1] |= {"accuracy": value, "low": value - 0.02, "high": value + 0.03, **more}
    return pd.DataFrame(rows)


SINGLE = [("dpo", "none"), ("dpo_rank_3r", "none")]
MIXTURES = [(m, r) for m in ("mix_dpo", "mix_dpo_pair") for r in ("prior", "own_pairs", "oracle")]
BY_GROUP = accuracy(SINGLE + MIXTURES, [*GROUPS, "mean", "worst"], design="default", users="seen")
METHODS = ("dpo", "dpo_rank_2r", "mix_dpo", "moe_dpo", "dpo_last_step", "moe_dpo_top_1", "oracle")
BY_DOMAIN = accuracy([(m, "none") for m in METHODS], ["book", "film", "mean", "worst"])
CAPACITIES = ("head, rank 1", "head, rank 32", "adapters, 1 block, rank 8", "adapters, 4 blocks, rank 8")
BY_CAPACITY = pd.concat(
    accuracy([("dpo", "none"), ("mix_dpo", "none")], ["mean"], base="smollm2-135m", capacity=name)
    for name in CAPACITIES
)
HISTORY = pd.DataFrame(
    {"method": m, "seed": s, "pairs_seen": 12_000 * t, "validation_loglik": -0.69 + 0.02 * t + 0.003 * s}
    for m in ("mix_dpo", "mix_dpo_pair")
    for s in range(3)
    for t in range(6)
)
SETTINGS = pd.DataFrame(
    {"setting": name, "seed": seed, "NMI": 0.3 + 0.05 * k, "low": 0.2, "high": 0.6}
    for k, name in enumerate(("exact", "relaxed, τ = 0.2", "recognition, effective_experts"))
    for seed in SEEDS
)
CURVES = pd.DataFrame(
    {"K": k, "nats": -26 + k / 10 + s / 20, "inference": name}
    for k in range(1, 9)
    for s in range(3)
    for name in ("Bayes rule", "latent per unit", "latent per pair")
)
CALIBRATION = pd.DataFrame(
    {"method": m, "probability": p, "frequency": p**2, "low": 0.8 * p**2, "high": 0.3 + 0.7 * p**2, "n": 9}
    for m in ("moe_dpo", "supervised")
    for p in np.linspace(0.05, 0.95, 10)
)
PAIRS = pd.DataFrame({"design": ["default", "clean"] * 500, "score_difference": np.tan(np.linspace(-1, 1.4, 1000))})
MATRIX = pd.DataFrame(
    {"group_a": a, "group_b": b, "agreement": 1.0 if a == b else 0.53, "n_pairs": 4191} for a in GROUPS for b in GROUPS
)
Q = pd.DataFrame(np.eye(3).repeat(8, 0), index=pd.Index([f"user{i:03d}" for i in range(24)], name="user"))
LONG_Q = pd.DataFrame(
    {"user": user, "group": GROUPS[i // 8], "expert": k, "expert_serves": GROUPS[k], "responsibility": Q.iloc[i, k]}
    for i, user in enumerate(Q.index)
    for k in range(3)
)
RECOVERY = pd.DataFrame(
    {"design": d, "method": m, "seed": s, "n_users": 60, "nmi": 0.3 + s / 9, "ari": 0.4, "aligned_accuracy": 0.6}
    for d in ("default", "clean")
    for m in ("mix_dpo", "mix_dpo_pair")
    for s in range(3)
)
GAINS = pd.DataFrame(
    {"policy": p, "reward": r, "n": 1620, "kl": 5.9, "gain_over_dpo": i - 2, "gain_low": i - 2.4, "gain_high": i - 1.7}
    for i, p in enumerate(("base", "dpo", "dpo_rank_3r", *(f"expert_{g}" for g in GROUPS)))
    for r in GROUPS
)
SERVED = pd.DataFrame(
    {"served_by": way, "m": m, "accuracy": 0.66 + i / 50, "accuracy_low": 0.62, "accuracy_high": 0.79}
    for i, way in enumerate(("dpo", "oracle", "pairs", "metadata", "gate"))
    for m in ((0,) if way in ("dpo", "oracle") else (0, 1, 2, 4, 8, 16, 32, 64))
)
JUDGES = [f"{reward}/{role}" for role in ("training", "evaluation") for reward in GROUPS]
AGREEMENT = pd.DataFrame(
    {"first": a, "second": b, "kind": "one reward" if a[:4] == b[:4] != a else "two rewards", "spearman": -0.19}
    for a in JUDGES
    for b in JUDGES
)
VALIDITY = pd.DataFrame(
    {"reward": "grammar", "judge": j, "measure": "paired rank", "task": t, "value": 0.9, "low": 0.8, "high": 0.95}
    | {"bar": 0.85 if t == "spelling" else None}
    for j in ("training", "evaluation")
    for t in ("spelling", "swapped_neighbours", "dropped_article", "all kinds")
)
PROBES = pd.DataFrame(
    {"reward": r, "judge": j, "probe": p, "effect": e, "size": abs(e)}
    for r in GROUPS
    for j in ("training", "evaluation")
    for p, e in (("negation", 0.1), ("one_word_repeated", -109.0), ("lower_case", -2.1))
)
SCORES = pd.DataFrame(
    {"reward": "informativeness", "judge": "evaluation", "unit": "mean rating, -1 to 1", "score": np.sin(range(90))}
)
LOOKS = study_figures.METHOD_STYLE

# function: (narrowest width that it fits, height or 0, how it is called)
FIGURES = {
    "points": ("column", 0, lambda ax: figures.points(SETTINGS[:8], ax, "setting", "NMI")),
    "dots": ("column", 0, lambda ax: figures.dots(SETTINGS, ax, "setting", "NMI", "NMI with the true groups")),
    "curves": ("column", 0, lambda ax: figures.curves(CURVES, ax, "K", "nats", "inference", log_x=True)),
    "training_curves": ("column", 0, lambda ax: figures.training_curves(HISTORY, ax, "validation_loglik", LOOKS)),
    "reliability": ("column", 3.2, lambda ax: figures.reliability(CALIBRATION, ax, "method", LOOKS)),
    "responsibility_map": ("column", 0, lambda ax: figures.responsibility_map(Q, ax)),
    "study.responsibility_map": ("page", 2, lambda ax: study_figures.responsibility_map(LONG_Q, ax)),
    "pair_design": ("column", 0, lambda ax: study_figures.pair_design(PAIRS, ax)),
    "group_disagreement": ("column", 0, lambda ax: study_figures.group_disagreement(MATRIX, ax)),
    "accuracy_by_group": ("page", 0, lambda ax: study_figures.accuracy_by_group(BY_GROUP, ax)),
    "accuracy_by_domain": ("page", 0, lambda ax: study_figures.accuracy_by_domain(BY_DOMAIN, ax)),
    "accuracy_by_capacity": ("column", 3, lambda ax: study_figures.accuracy_by_capacity(BY_CAPACITY, ax)),
    "accuracy_by_own_pairs": ("column", 3.4, lambda ax: study_figures.accuracy_by_own_pairs(SERVED, ax)),
    "routing_comparison": ("column", 3, lambda ax: study_figures.routing_comparison(BY_GROUP, ax)),
    "recovery": ("page", 0, lambda ax: study_figures.recovery(RECOVERY, ax)),
    "reward_gains": ("page", 0, lambda ax: study_figures.reward_gains(GAINS, ax)),
    "judge_report": ("column", 3, lambda ax: judge_figures.judge_report(VALIDITY, ax)),
    "judge_agreement": ("page", 2.8, lambda ax: judge_figures.judge_agreement(AGREEMENT, ax)),
    "probe_scores": ("page", 0, lambda ax: judge_figures.probe_scores(PROBES, ax)),
    "reward_distributions": ("column", 0, lambda ax: judge_figures.reward_distributions(SCORES, ax)),
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
        level = [(text, text.get_window_extent().padded(-0.5)) for text in texts if text.get_rotation() % 90 == 0]
        for (text, box), (other, beside) in combinations(level, 2):
            assert not box.overlaps(beside), f"{text} lies on {other}"
        data = [one.get_window_extent() for one in (*figure.axes, *ax.child_axes)]
        outside = [text.get_window_extent() for text in figure.texts]
        outside += [ax.get_legend().get_window_extent()] if ax.get_legend() else []
        assert not any(box.overlaps(panel) for box in outside for panel in data)
        plt.close(figure)


@pytest.mark.parametrize("name", ["dots", "curves", "training_curves", "reliability", "accuracy_by_group"])
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
                if "ax" in parameters[1:2] and not name.startswith("_") and name not in ("heat", "general_map"):
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
        assert [text.get_text() for text in figure.legends[0].get_texts()] == ["Mix-DPO, per user", "Mix-DPO, per pair"]
        figure.canvas.draw()
        assert not any(figure.legends[0].get_window_extent().overlaps(ax.get_tightbbox()) for ax in axes)
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
        assert figure.get_size_inches() == pytest.approx([3.3, 2.2])
        figure.canvas.draw()
        assert ax.get_window_extent().height == pytest.approx(before, abs=1)
        assert figure.texts[0].get_window_extent().y1 <= ax.get_tightbbox().y0
        plt.close(figure)


def test_figures_need_no_torch():
    check = "import sys; from mixdpo_lib import figures; from mixdpo_lib.study import figures; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=True)


# --------------------------------------------------------------------------------------------------- a user's own fit
def test_the_history_of_one_fit_is_one_curve():
    with matplotlib.rc_context():
        history = pd.DataFrame({"step": [0, 10, 20], "pairs_seen": [0, 80, 160], "elbo": [-0.69, -0.6, -0.5]})
        ax = figures.training_curves(history)
        (line,) = ax.lines
        assert line.get_xdata().tolist() == [0, 80, 160] and line.get_ydata().tolist() == [-0.69, -0.6, -0.5]
        assert ax.get_legend() is None and ax.get_xlabel() == "pairs seen" and ax.get_ylabel() == "bound (nats per pair)"
        assert ax.figure.get_size_inches()[0] == pytest.approx(3.3)
        with pytest.raises(ValueError, match=r"training_curves: the table lacks \['pairs_seen'\]; it has \['step'"):
            figures.training_curves(history.drop(columns="pairs_seen"))
        with pytest.raises(ValueError, match="validation_loglik' holds no number; .* needs fit"):
            figures.training_curves(history.assign(validation_loglik=np.nan), column="validation_loglik")
        plt.close("all")


def test_the_responsibilities_of_one_fit_are_a_map():
    q = pd.DataFrame([[0.1, 0.9], [0.8, 0.2], [0.6, 0.4]], index=pd.Index(["ann", "bob", "cy"], name="user"))
    with matplotlib.rc_context():
        ax = figures.responsibility_map(q)
        assert np.asarray(ax.collections[0].get_array()).tolist() == [[0.8, 0.6, 0.1], [0.2, 0.4, 0.9]]
        assert [label.get_text() for label in ax.get_xticklabels()] == ["bob", "cy", "ann"]
        assert [label.get_text() for label in ax.get_yticklabels()] == ["expert 1", "expert 2"]
        assert ax.get_xlabel() == "users, sorted by their expert (n = 3)"
        ax = figures.responsibility_map(q, groups={"ann": "new", "bob": "old", "cy": "new"})
        assert np.asarray(ax.collections[0].get_array()).tolist() == [[0.6, 0.1, 0.8], [0.4, 0.9, 0.2]]
        assert [label.get_text() for label in ax.get_xticklabels()] == ["new\n(2)", "old\n(1)"]
        plt.close("all")


@pytest.mark.parametrize(
    "q, groups, found",
    [
        (LONG_Q, None, r"text in \['user', 'group', 'expert_serves'\]; expected one row a user"),
        (Q.iloc[:0], None, "found 0 rows"),
        (Q * 2, None, "probabilities that sum to 1"),
        (Q - 1e-2, None, "probabilities that sum to 1"),
        (Q, {"user000": "a"}, r"no group for \['user001', "),
    ],
)
def test_what_is_no_responsibility_is_refused(q, groups, found):
    with pytest.raises(ValueError, match=f"responsibility_map: .*{found}"):
        figures.responsibility_map(q, groups=groups)


def test_plain_tables_need_neither_methods_nor_seeds():
    with matplotlib.rc_context():
        table = pd.DataFrame({"K": [1, 2, 3], "loss": [0.7, 0.5, 0.6]})
        ax = figures.curves(table, None, "K", "loss")
        assert [line.get_ydata().tolist() for line in ax.lines] == [[0.7, 0.5, 0.6]] and ax.get_legend() is None
        ax = figures.dots(pd.DataFrame({"what": ["a", "b"], "value": [1.0, 2.0]}), None, "what", "value")
        (line,) = ax.lines
        assert line.get_xdata().tolist() == [1.0, 2.0] and line.get_ydata().tolist() == [0.0, 1.0]
        ax = figures.reliability(CALIBRATION[CALIBRATION["method"] == "moe_dpo"].drop(columns="method"))
        assert ax.lines[1].get_ydata().tolist() == pytest.approx((np.linspace(0.05, 0.95, 10) ** 2).tolist())
        assert "film" not in ax.get_xlabel() + ax.get_ylabel()
        with pytest.raises(ValueError, match=r"reliability: column 'method' holds \['moe_dpo', 'supervised'\]"):
            figures.reliability(CALIBRATION)
        with pytest.raises(ValueError, match=r"reliability: the table lacks \['low', 'high'\]"):
            figures.reliability(CALIBRATION.drop(columns=["low", "high"]))
        plt.close("all")
