"""The general figures draw a user's own fit: its history, its responsibilities, plain tables."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import pytest  # noqa: E402
from figure_tables import CALIBRATION, LONG_Q, Q  # noqa: E402

from mixdpo_lib import figures  # noqa: E402


def test_the_history_of_one_fit_is_one_curve():
    with matplotlib.rc_context():
        history = pd.DataFrame(
            {"step": [0, 10, 20], "pairs_seen": [0, 80, 160], "elbo": [-0.69, -0.6, -0.5]}
        )
        ax = figures.training_curves(history)
        (line,) = ax.lines
        assert line.get_xdata().tolist() == [0, 80, 160] and line.get_ydata().tolist() == [
            -0.69,
            -0.6,
            -0.5,
        ]
        assert (
            ax.get_legend() is None
            and ax.get_xlabel() == "pairs seen"
            and ax.get_ylabel() == "bound (nats per pair)"
        )
        assert ax.figure.get_size_inches()[0] == pytest.approx(3.3)
        with pytest.raises(
            ValueError, match=r"training_curves: the table lacks \['pairs_seen'\]; it has \['step'"
        ):
            figures.training_curves(history.drop(columns="pairs_seen"))
        with pytest.raises(ValueError, match="validation_loglik' holds no number; .* needs fit"):
            figures.training_curves(
                history.assign(validation_loglik=np.nan), column="validation_loglik"
            )
        plt.close("all")


def test_the_responsibilities_of_one_fit_are_a_map():
    q = pd.DataFrame(
        [[0.1, 0.9], [0.8, 0.2], [0.6, 0.4]], index=pd.Index(["ann", "bob", "cy"], name="user")
    )
    with matplotlib.rc_context():
        ax = figures.responsibility_map(q)
        assert np.asarray(ax.collections[0].get_array()).tolist() == [
            [0.8, 0.6, 0.1],
            [0.2, 0.4, 0.9],
        ]
        assert [label.get_text() for label in ax.get_xticklabels()] == ["bob", "cy", "ann"]
        assert [label.get_text() for label in ax.get_yticklabels()] == ["expert 1", "expert 2"]
        assert ax.get_xlabel() == "users, sorted by their expert (n = 3)"
        ax = figures.responsibility_map(q, groups={"ann": "new", "bob": "old", "cy": "new"})
        assert np.asarray(ax.collections[0].get_array()).tolist() == [
            [0.6, 0.1, 0.8],
            [0.4, 0.9, 0.2],
        ]
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
        assert [line.get_ydata().tolist() for line in ax.lines] == [
            [0.7, 0.5, 0.6]
        ] and ax.get_legend() is None
        ax = figures.dots(
            pd.DataFrame({"what": ["a", "b"], "value": [1.0, 2.0]}), None, "what", "value"
        )
        (line,) = ax.lines
        assert line.get_xdata().tolist() == [1.0, 2.0] and line.get_ydata().tolist() == [0.0, 1.0]
        ax = figures.reliability(
            CALIBRATION[CALIBRATION["method"] == "moe_dpo"].drop(columns="method")
        )
        assert ax.lines[1].get_ydata().tolist() == pytest.approx(
            (np.linspace(0.05, 0.95, 10) ** 2).tolist()
        )
        assert "film" not in ax.get_xlabel() + ax.get_ylabel()
        with pytest.raises(
            ValueError, match=r"reliability: column 'method' holds \['moe_dpo', 'supervised'\]"
        ):
            figures.reliability(CALIBRATION)
        with pytest.raises(ValueError, match=r"reliability: the table lacks \['low', 'high'\]"):
            figures.reliability(CALIBRATION.drop(columns=["low", "high"]))
        plt.close("all")
