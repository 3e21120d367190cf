"""Figures: labels, how many points are drawn, and that they lie where the table says."""

import ast
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import pytest  # noqa: E402
from figure_tables import FRONTS  # noqa: E402
from matplotlib.collections import PathCollection  # noqa: E402
from matplotlib.colors import to_hex  # noqa: E402

from mixdpo_lib import figures  # noqa: E402
from mixdpo_lib.figures.look import looks_of  # noqa: E402
from mixdpo_lib.study import figures as study_figures  # noqa: E402
from mixdpo_lib.study import frontier_figures  # noqa: E402

GROUPS = ["sentiment", "informativeness", "grammar"]
NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").rglob("*.ipynb"))


@pytest.fixture()
def ax():
    with matplotlib.rc_context():
        figure, axes = figures.subplots("page", height=4)
        yield axes
        plt.close(figure)


def drawn(ax, colour: str | None = None) -> np.ndarray:
    """Heights of all points, seeds first, of one colour if named, without reference lines."""
    small = [points for points in ax.collections if isinstance(points, PathCollection)]
    large = [
        line for line in ax.lines if line.get_marker() not in ("None", "", None, "_", "|", 2, 3)
    ]
    if colour is not None:
        small = [points for points in small if to_hex(points.get_facecolor()[0]) == colour.lower()]
        large = [line for line in large if line.get_color() == colour]
    heights = [points.get_offsets()[:, 1] for points in small] + [
        line.get_ydata() for line in large
    ]
    return (
        np.concatenate([np.asarray(part, float) for part in heights]) if heights else np.array([])
    )


def legend_labels(ax) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def tick_labels(axis) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]


@pytest.fixture()
def accuracy() -> pd.DataFrame:
    rows = []
    series = [
        ("dpo", "none"),
        ("mix_dpo", "prior"),
        ("mix_dpo", "own_pairs"),
        ("mix_dpo", "oracle"),
    ]
    for m, (method, routing) in enumerate(series):
        for seed in range(3):
            for g, group in enumerate([*GROUPS, "mean", "worst"]):
                value = 0.6 + 0.04 * m + 0.01 * g + 0.001 * seed
                rows.append(
                    {
                        "design": "default",
                        "users": "seen",
                        "method": method,
                        "routing": routing,
                        "seed": seed,
                    }
                    | {
                        "group": group,
                        "n_pairs": 400 + g,
                        "accuracy": value,
                        "low": value - 0.02,
                        "high": value + 0.03,
                    }
                )
    return pd.DataFrame(rows)


def test_accuracy_by_group_draws_every_seed_and_the_mean(ax, accuracy):
    assert study_figures.accuracy_by_group(accuracy, ax) is ax
    shown = accuracy[accuracy["routing"] != "prior"]
    means = shown.groupby(["method", "routing", "group"])["accuracy"].mean()
    assert sorted(drawn(ax)) == pytest.approx(sorted([*shown["accuracy"], *means]))
    assert len(drawn(ax, study_figures.METHOD_STYLE["dpo"].colour)) == 5 * (3 + 1)
    assert len(drawn(ax, study_figures.METHOD_STYLE["oracle"].colour)) == 5 * (3 + 1)
    labels = tick_labels(ax.xaxis)
    assert (
        labels[0] == "sentiment\nn = 400"
        and labels[3] == "mean of\ngroups\nn = 403"
        and labels[4] == "worst\ngroup"
    )
    assert legend_labels(ax) == ["chance", "DPO", "Mix-DPO, per user", "Mix-DPO, oracle"]
    assert "share of pairs" in ax.get_ylabel()
    bars = [
        segment for container in ax.containers for segment in container.lines[2][0].get_segments()
    ]
    assert sorted(s[0, 1] for s in bars) == pytest.approx(sorted(means - 0.02))
    assert sorted(s[1, 1] for s in bars) == pytest.approx(sorted(means + 0.03))


def test_rows_named_mean_give_the_interval(ax, accuracy):
    rows = accuracy.query("method == 'dpo' and seed == 0").assign(
        seed="mean", accuracy=0.7, low=0.65, high=0.72
    )
    table = pd.concat([accuracy[accuracy["method"] == "dpo"], rows])
    study_figures.accuracy_by_group(table, ax)
    assert np.isclose(drawn(ax), 0.7).sum() == 5
    segment = ax.containers[0].lines[2][0].get_segments()[0]
    assert segment[:, 1].tolist() == pytest.approx([0.65, 0.72])


def test_routing_comparison(ax, accuracy):
    study_figures.routing_comparison(accuracy, ax, group="worst")
    shown = accuracy[accuracy["group"] == "worst"]
    means = shown.groupby(["method", "routing"])["accuracy"].mean()
    assert sorted(drawn(ax)) == pytest.approx(sorted([*shown["accuracy"], *means]))
    assert tick_labels(ax.xaxis)[0].startswith("none") and tick_labels(ax.xaxis)[3].startswith(
        "oracle"
    )
    assert "worst group" in ax.get_xlabel() and "n = 404" in ax.get_xlabel()


def test_frontiers_begin_at_the_base_and_have_a_panel_a_reward(ax):
    frontier_figures.frontiers(FRONTS, ax)
    titles = [panel.get_title("left") for panel in ax.child_axes]
    assert titles == [*GROUPS, "worst-served group"]
    soup = frontier_figures.BASELINE_STYLE["soup"]
    for panel, front in zip(ax.child_axes, [*GROUPS, "worst"], strict=True):
        (line,) = [one for one in panel.lines if one.get_color() == soup.colour]
        shown = FRONTS[(FRONTS["method"] == "soup") & (FRONTS["front"] == front)]
        assert np.allclose(line.get_xydata(), [[0, 0], *shown[["kl", "gain"]].to_numpy()])
    assert legend_labels(ax)[0] == "DPO" and soup.label in legend_labels(ax)
    (note,) = [text.get_text() for text in ax.texts]
    assert note.startswith("n = 100 texts") and note.endswith("* knows the groups")
    with pytest.raises(ValueError, match=r"frontiers: the table lacks \['kl'\]"):
        frontier_figures.frontiers(FRONTS.drop(columns="kl"), ax)


def test_accuracy_by_domain_draws_every_method_of_every_domain(ax):
    rows = [
        {
            "method": m,
            "seed": s,
            "group": g,
            "n_pairs": 9,
            "accuracy": 0.6 + i / 50,
            "low": 0.5,
            "high": 0.8,
        }
        for i, m in enumerate(("dpo", "moe_dpo", "oracle"))
        for s in (0, 1)
        for g in ("film", "book")
    ]
    study_figures.accuracy_by_domain(pd.DataFrame(rows), ax)
    labels = tick_labels(ax.xaxis)
    assert {label.split("\n")[0] for label in labels} == {"film", "book"} and "n = 9" in labels[0]
    assert len(ax.get_legend().get_texts()) == 3 + 1 and ax.get_xlabel().startswith(
        "domain of the prompt"
    )
    with pytest.raises(ValueError, match=r"accuracy_by_domain: the table lacks \['group'\]"):
        study_figures.accuracy_by_domain(pd.DataFrame(rows).drop(columns="group"), ax)


def test_accuracy_by_capacity_draws_every_method_of_every_capacity(ax):
    rows = [
        {
            "base": "a",
            "capacity": c,
            "method": m,
            "seed": s,
            "group": g,
            "accuracy": 0.6,
            "low": 0.5,
            "high": 0.8,
        }
        for c in ("head, rank 1", "adapters, 2 blocks, rank 8")
        for m in ("dpo", "mix_dpo")
        for s in ("0", "mean")
        for g in ("sentiment", "mean")
    ]
    study_figures.accuracy_by_capacity(pd.DataFrame(rows), ax)
    assert tick_labels(ax.xaxis) == ["head\nrank 1", "adapters\n2 blocks\nrank 8"]
    assert len(ax.get_legend().get_texts()) == 2 + 1  # and chance
    with pytest.raises(ValueError, match=r"accuracy_by_capacity: the table lacks \['capacity'\]"):
        study_figures.accuracy_by_capacity(pd.DataFrame(rows).drop(columns="capacity"), ax)


def test_a_table_of_two_designs_is_refused(ax, accuracy):
    both = pd.concat([accuracy, accuracy.assign(design="clean")])
    with pytest.raises(
        ValueError, match=r"accuracy_by_group: column 'design' holds \['default', 'clean'\]; filter"
    ):
        study_figures.accuracy_by_group(both, ax)
    with pytest.raises(ValueError, match="column 'users' holds"):
        study_figures.routing_comparison(pd.concat([accuracy, accuracy.assign(users="new")]), ax)


def test_missing_columns_and_empty_tables_are_refused(ax, accuracy):
    with pytest.raises(ValueError, match=r"accuracy_by_group: the table lacks \['low'\]"):
        study_figures.accuracy_by_group(accuracy.drop(columns="low"), ax)
    with pytest.raises(ValueError, match="training_curves: the table has no rows"):
        figures.training_curves(pd.DataFrame(columns=["method", "seed", "pairs_seen", "elbo"]), ax)
    with pytest.raises(ValueError, match="routing_comparison, group 'cats': the table has no rows"):
        study_figures.routing_comparison(accuracy, ax, group="cats")


def test_responsibility_map_sorts_users_by_group(ax):
    truth = {"u0": "grammar", "u1": "sentiment", "u2": "grammar", "u3": "informativeness"}
    q = {"u0": (0.1, 0.2, 0.7), "u1": (0.8, 0.1, 0.1), "u2": (0.3, 0.1, 0.6), "u3": (0.2, 0.8, 0.0)}
    table = pd.DataFrame(
        {
            "user": u,
            "group": truth[u],
            "expert": k,
            "expert_serves": GROUPS[k],
            "responsibility": q[u][k],
        }
        for u in truth
        for k in range(3)
    )
    study_figures.responsibility_map(table, ax)
    shown = np.asarray(ax.collections[0].get_array())
    assert shown.T.tolist() == [list(q[u]) for u in ("u1", "u3", "u2", "u0")]
    assert tick_labels(ax.xaxis) == ["sentiment\n(1)", "informativeness\n(1)", "grammar\n(2)"]
    assert ax.get_xticks().tolist() == [0.5, 1.5, 3.0]
    assert tick_labels(ax.yaxis)[0] == "expert 0\n(serves\nsentiment)"
    assert "n = 4" in ax.get_xlabel()


def test_training_curves_draw_a_line_a_seed(ax):
    table = pd.DataFrame(
        {
            "method": m,
            "seed": s,
            "pairs_seen": 100 * t,
            "elbo": -0.7 + 0.01 * t + 0.001 * s,
            "entropy": 1.0,
        }
        for m in ("mix_dpo", "dpo")
        for s in range(3)
        for t in range(4)
    )
    figures.training_curves(table, ax, looks=study_figures.METHOD_STYLE)
    assert len(ax.lines) == 6
    one = table[(table["method"] == "dpo") & (table["seed"] == 0)]
    assert ax.lines[0].get_ydata().tolist() == one["elbo"].tolist()
    assert ax.lines[0].get_xdata().tolist() == one["pairs_seen"].tolist()
    assert ax.get_ylabel() == "bound (nats per pair)"
    assert "3 seeds" in ax.get_xlabel()
    assert legend_labels(ax) == ["DPO", "Mix-DPO, per user"]


@pytest.fixture()
def gains() -> pd.DataFrame:
    rows = []
    for p, policy in enumerate(["base", "dpo", *(f"expert_{g}" for g in GROUPS)]):
        for r, reward in enumerate(GROUPS):
            gain = 0.0 if policy == "dpo" else (p - 2) * 10.0**-r
            rows.append(
                {
                    "policy": policy,
                    "reward": reward,
                    "n": 1600 + p,
                    "kl": 1.5 * p,
                    "gain_over_dpo": gain,
                }
                | {"gain_low": gain - 0.1, "gain_high": gain + 0.2}
            )
    return pd.DataFrame(rows)


def test_reward_gains_have_a_panel_and_scale_for_each_reward(ax, gains):
    study_figures.reward_gains(gains, ax)
    assert [panel.get_title("center") for panel in ax.child_axes] == GROUPS
    for panel, reward in zip(ax.child_axes, GROUPS, strict=True):
        rows = gains[(gains["reward"] == reward) & (gains["policy"] != "dpo")]
        assert drawn(panel).tolist() == pytest.approx(rows["gain_over_dpo"].tolist())
        lows = [c.lines[2][0].get_segments()[0][0, 1] for c in panel.containers]
        assert lows == pytest.approx(rows["gain_low"].tolist())
        filled = [
            line.get_markerfacecolor() for line in panel.lines if str(line.get_marker()) in "os^"
        ]
        assert filled.count("white") == 3  # the expert that serves this reward is filled
    assert legend_labels(ax)[0] == "DPO (KL 1.5)"
    assert "n = 1,602 to 1,604 texts per policy" in ax.texts[0].get_text()


def test_reward_gains_show_seeds_as_points(ax, gains):
    seeds = pd.concat(
        [gains.assign(seed=s, gain_over_dpo=gains["gain_over_dpo"] + 0.01 * s) for s in range(3)]
    )
    study_figures.reward_gains(pd.concat([seeds, gains.assign(seed="mean")]), ax)
    assert len(drawn(ax.child_axes[0])) == 4 * (3 + 1)


def test_dots_show_seeds_and_a_mean_with_its_interval(ax):
    table = pd.DataFrame(
        {
            "setting": ["a", "a", "a", "b", "b"],
            "seed": ["0", "1", "mean", "0", "1"],
            "nmi": [0.2, 0.4, 0.3, 0.6, 1.0],
            "low": [None, None, 0.1, None, None],
            "high": [None, None, 0.5, None, None],
        }
    )
    figures.dots(table, ax, "setting", "nmi", "NMI")
    (points,) = [
        points.get_offsets() for points in ax.collections if isinstance(points, PathCollection)
    ]
    (means,) = [line for line in ax.lines if line.get_marker() == "o"]
    assert points[:, 0].tolist() == [0.2, 0.4, 0.6, 1.0] and points[:, 1].round().tolist() == [
        0,
        0,
        1,
        1,
    ]
    assert means.get_xdata().tolist() == pytest.approx([0.3, 0.8])
    (bar,) = [segment for segment in ax.containers[0].lines[2][0].get_segments() if len(segment)]
    assert bar[:, 0].tolist() == pytest.approx([0.1, 0.5])
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a", "b"] and ax.get_xlabel() == "NMI"
    with pytest.raises(ValueError, match="dots: the table lacks"):
        figures.dots(table, ax, "setting", "ari")


def test_pair_design_bars_hold_the_shares(ax):
    table = pd.DataFrame(
        {
            "design": ["default"] * 4 + ["clean"] * 2,
            "score_difference": [-1.0, 0.5, 1.0, 2.0, 3.0, 3.0],
        }
    )
    study_figures.pair_design(table, ax)
    assert legend_labels(ax) == ["default (n = 4 pairs)", "clean (n = 2 pairs)"]
    shapes = [shape.get_paths()[0].vertices for shape in ax.collections]
    heights = [vertices[:, 1].max() for vertices in shapes]
    assert heights == pytest.approx([0.25, 1.0])
    edges = shapes[0][:, 0]
    assert np.abs(edges).min() < 1e-9  # 0 separates labels for and against the reward


def test_group_disagreement_writes_each_value(ax):
    table = pd.DataFrame(
        {"group_a": a, "group_b": b, "agreement": 1.0 if a == b else 0.5, "n_pairs": 900}
        for a in GROUPS
        for b in GROUPS
    )
    study_figures.group_disagreement(table, ax)
    assert [text.get_text() for text in ax.texts] == [
        "1.00" if i % 4 == 0 else "0.50" for i in range(9)
    ]
    assert tick_labels(ax.xaxis) == GROUPS
    assert "n = 900 pairs" in ax.get_xlabel()


def test_recovery_draws_seeds_and_their_median(ax):
    table = pd.DataFrame(
        {
            "design": d,
            "method": "mix_dpo",
            "seed": s,
            "n_users": 60,
            "nmi": 0.5 + 0.1 * s,
            "ari": 0.4,
        }
        for d in ("default", "clean")
        for s in range(3)
    )
    study_figures.recovery(table, ax)
    medians = [0.6, 0.6, 0.4, 0.4]
    assert sorted(drawn(ax)) == pytest.approx(sorted([*table["nmi"], *table["ari"], *medians]))
    (large,) = [
        line
        for line in ax.lines
        if line.get_marker() == study_figures.METHOD_STYLE["mix_dpo"].marker
    ]
    assert large.get_ydata().tolist() == pytest.approx(medians)
    assert tick_labels(ax.xaxis) == [
        "NMI\ndefault",
        "NMI\nclean",
        "adjusted\nRand index\ndefault",
        "adjusted\nRand index\nclean",
    ]
    with pytest.raises(ValueError, match="the table has none of"):
        study_figures.recovery(table[["method", "seed"]], ax)


def test_looks_differ_in_colour_and_marker():
    for looks in (
        study_figures.METHOD_STYLE,
        study_figures.EXPERT_STYLE,
        study_figures.SERVED_STYLE,
    ):
        assert len({look.colour for look in looks.values()}) == len(looks)
        assert len({look.marker for look in looks.values()}) == len(looks)
    looks = looks_of(["gr_dpo", "dpo", "other"], study_figures.METHOD_STYLE)
    assert list(looks) == ["dpo", "gr_dpo", "other"] and looks["gr_dpo"].label == "gr_dpo"
    assert len({look.colour for look in looks.values()}) == 3


def test_nothing_is_drawn_outside_the_page(ax, accuracy):
    """Labels and legend fit a page; at every width: test_figure_sizes."""
    study_figures.accuracy_by_group(accuracy, ax)
    ax.figure.canvas.draw()
    page, legend = ax.figure.bbox, ax.get_legend().get_window_extent()
    assert legend.x0 >= page.x0 and legend.x1 <= page.x1 and legend.y1 <= page.y1
    assert not legend.overlaps(ax.get_window_extent())
    boxes = [label.get_window_extent() for label in ax.get_xticklabels()]
    assert all(a.x1 <= b.x0 for a, b in zip(boxes, boxes[1:], strict=False))


def test_curves_have_a_line_through_the_means_and_a_point_for_every_seed(ax):
    table = pd.DataFrame(
        {"K": [1, 1, 2, 2, 1, 2], "value": [1.0, 3.0, 4.0, 6.0, 0.0, 1.0], "what": list("aaaabb")}
    )
    figures.curves(table, ax, "K", "value", "what", "experts K", "value (nats)")
    first, second = ax.lines
    assert first.get_ydata().tolist() == [2.0, 5.0] and second.get_ydata().tolist() == [0.0, 1.0]
    assert [points.get_offsets()[:, 1].tolist() for points in ax.collections] == [
        [1.0, 3.0, 4.0, 6.0]
    ]
    assert ax.get_xlabel() == "experts K" and legend_labels(ax) == ["a", "b"]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["1", "2"]
    with pytest.raises(ValueError, match="curves: the table lacks"):
        figures.curves(table, ax, "tau", "value", "what")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_figure_of_a_notebook_names_its_table(path):
    """The name is that of a table which the notebook writes, or of another notebook's."""
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    calls = [
        node
        for cell in cells
        for node in ast.walk(ast.parse("".join(cell["source"])))
        if isinstance(node, ast.Call)
    ]
    called = {
        name: [call for call in calls if ast.unparse(call.func) == name]
        for name in ("run.table", "run.figure")
    }
    written = {
        call.args[1].value if isinstance(call.args[1], ast.Constant) else "any"
        for call in called["run.table"]
    }
    for call in called["run.figure"]:
        options = {option.arg: ast.unparse(option.value) for option in call.keywords}
        table = ast.literal_eval(options["table"])
        assert table in written or "any" in written or "/" in table and "data" in options, (
            ast.unparse(call)
        )
        assert options["by"].split(".")[0].removesuffix("figures") in (
            "",
            "study_",
            "judge_",
            "frontier_",
        ), ast.unparse(call)
