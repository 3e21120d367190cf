"""Fronts of reward against distance, and differences corrected for being many: against numbers by hand."""

import numpy as np
import pandas as pd
import pytest

from mixdpo_lib.evaluation import accuracy_gain
from mixdpo_lib.study.comparisons import accuracy_differences, bootstrap_p, holm
from mixdpo_lib.study.frontiers import (
    drawn_points,
    front_points,
    hypervolume,
    hypervolumes,
    win_rates,
)


@pytest.mark.parametrize(
    "kl, gain, budget, by_hand",
    [
        ([1.0], [1.0], 2.0, 0.5 + 1 + 2),  # a triangle, a square, and one standard deviation below
        ([4.0], [2.0], 2.0, 1 + 2),  # beyond the budget: the coin with the base reaches (2, 1)
        ([2.0, 1.0], [0.5, 1.0], 3.0, 0.5 + 2 + 3),  # the further point is worse
        ([1.0, 3.0], [1.0, 2.0], 3.0, 0.5 + 3 + 3),
        ([1.0, 2.0], [0.1, 1.0], 2.0, 1 + 2),  # the near point lies below the chord
        ([1.0, 2.0], [-0.4, -0.9], 2.0, 2),  # nothing is above the base, which is there
    ],
)
def test_hypervolumes_by_hand(kl, gain, budget, by_hand):
    assert float(hypervolume(np.array(kl), np.array(gain), budget)) == pytest.approx(by_hand)


def test_a_hypervolume_is_what_coins_reach():
    rng = np.random.default_rng(0)
    kl, gain = rng.uniform(0, 4, (5, 4)), rng.normal(size=(5, 4))
    p, x = np.linspace(0, 1, 201)[:, None], np.linspace(0, 2.5, 501)
    found = hypervolume(kl, gain, 2.5)
    for row in range(5):
        k, g = np.append(kl[row], 0.0), np.append(gain[row], 0.0)
        pairs = [(i, j) for i in range(5) for j in range(5)]
        far = np.concatenate([p * k[i] + (1 - p) * k[j] for i, j in pairs])
        won = np.concatenate([p * g[i] + (1 - p) * g[j] for i, j in pairs])
        best = np.where(far <= x + 1e-9, won, -np.inf).max(0)
        assert found[row] == pytest.approx(np.trapezoid(best, x) + 2.5, abs=0.03)


def made_up(rewards, kls):
    """Texts of methods on three prompts: rewards[method][group][factor], the same on each prompt but for `prompt` / 10."""
    rows = [
        {
            "method": method,
            "seed": 0,
            "group": group,
            "factor": factor,
            "number": prompt,
            "prompt_id": prompt,
            "reward": value + prompt / 10,
            "kl": kls[method][factor],
        }
        for method, groups in rewards.items()
        for group, points in groups.items()
        for factor, value in points.items()
        for prompt in range(3)
    ]
    return pd.DataFrame(rows)


KL = {"dpo": {0.5: 1.0, 1.0: 2.0}, "mix_dpo": {0.5: 1.0, 1.0: 4.0}}
REWARDS = {
    "dpo": {"a": {0.5: 1.0, 1.0: 2.0}, "b": {0.5: 0.0, 1.0: -1.0}},
    "mix_dpo": {"a": {0.5: 2.0, 1.0: 6.0}, "b": {0.5: 1.0, 1.0: 2.0}},
}


@pytest.fixture(scope="module")
def texts():
    return made_up(REWARDS, KL)


@pytest.fixture(scope="module")
def base():
    """Two texts a prompt, whose mean is prompt / 10."""
    ids, away = np.repeat(range(3), 2), np.tile([1.0, -1.0], 3)
    return pd.DataFrame({"prompt_id": ids, "a": ids / 10 + 2 * away, "b": ids / 10 + away})


@pytest.fixture(scope="module")
def drawn(texts, base):
    return drawn_points(texts, base)


def test_points_are_gains_in_standard_deviations(drawn, base):
    spread = base[["a", "b"]].std()
    for method, groups in REWARDS.items():
        gains = {
            group: np.array([*points.values()]) / spread[group] for group, points in groups.items()
        }
        for group, gain in gains.items():
            assert np.allclose(drawn.gain[method, group], gain)  # of all draws: prompts are alike
        assert np.allclose(drawn.gain[method, "worst"], np.minimum(gains["a"], gains["b"]))
        assert np.allclose(drawn.kl[method, "worst"], [*KL[method].values()])
    table = front_points(drawn).set_index(["method", "front", "factor"])
    assert table.loc[("mix_dpo", "a", 1.0), "kl"] == 4 and table["n"].eq(3).all()
    assert np.allclose(table["low"], table["gain"]) and np.allclose(table["high"], table["gain"])


def test_ratios_of_hypervolumes(drawn):
    assert drawn.budget("a") == 2
    table = hypervolumes(drawn).set_index(["method", "front"])
    (near, far) = drawn.gain["mix_dpo", "b"][0]
    at_budget = max(near + (far - near) / 3, far / 2)
    by_hand = near / 2 + (near + at_budget) / 2 + 2
    assert table.loc[("mix_dpo", "b"), "hypervolume"] == pytest.approx(by_hand)
    assert table.loc[("dpo", "b"), "hypervolume"] == pytest.approx(2)  # it never gains: the base
    assert table.loc[("mix_dpo", "b"), "ratio"] == pytest.approx(by_hand / 2)
    assert (table.xs("dpo")[["ratio", "low", "high", "p_holm"]] == 1).all(axis=None)
    p = table.xs("mix_dpo")
    assert np.allclose(p["p_holm"], holm(p["p"].to_numpy())) and (p["p_holm"] < 0.05).all()


def test_a_method_that_wrote_less_is_refused(texts, base):
    gap = texts[~((texts["method"] == "mix_dpo") & (texts["factor"] == 1) & (texts["number"] == 2))]
    with pytest.raises(
        ValueError, match="method mix_dpo, group a, factor 1.0: no text on prompt 2"
    ):
        drawn_points(gap, base)


def test_wins_are_counted_where_a_method_is_no_further_away(texts):
    table = win_rates(texts).set_index("group")
    assert table.loc["a", "factor"] == 0.5 and table.loc["a", "kl_baseline"] == 2
    assert table.loc["a", "win_rate"] == 0.5  # 2.0 against 2.0: a tie on each prompt
    assert table.loc["b", "win_rate"] == 1 and table.loc["b", "n"] == 3
    with pytest.raises(ValueError, match=r"dpo at factor 2.0: no texts; it wrote at \[0.5, 1.0\]"):
        win_rates(texts, factor=2.0)


def test_differences_to_the_reference_by_hand():
    rng = np.random.default_rng(0)
    rows = [
        {"method": m, "routing": how, "users": who, "seed": 0, "group": g, "prompt_id": i}
        | {"accuracy": share + rng.normal(0, 0.01), "n_pairs": 4}
        for m, how, share in (
            ("dpo", "none", 0.5),
            ("mix_dpo", "own_pairs", 0.7),
            ("mix_dpo", "oracle", 0.9),
            ("soup", "own_pairs", 0.7),
        )
        for who in ("seen", "new")
        for g in "ab"
        for i in range(40)
    ]
    by_prompt = pd.DataFrame(rows)
    found = accuracy_differences(by_prompt).set_index(["method", "group"])
    assert len(found) == 4 and found.loc[("dpo", "mean"), "difference"] == pytest.approx(
        0.2, abs=5e-3
    )
    part = by_prompt.query("users == 'seen' and routing != 'oracle'")
    gain = accuracy_gain(*(part[part["method"] == m] for m in ("mix_dpo", "soup")))
    gain = gain.query("seed == 'mean'").set_index("group")
    for group in ("mean", "worst"):
        row = found.loc[("soup", group)]
        assert row[["difference", "low", "high"]].tolist() == pytest.approx(
            gain.loc[group, ["gain", "low", "high"]].tolist()
        )
    assert (found.loc["dpo", "p_holm"] < 0.01).all() and (found.loc["soup", "p_holm"] > 0.05).all()
    with pytest.raises(ValueError, match=r"method 'moe_dpo' is not there; found \['dpo'"):
        accuracy_differences(by_prompt, "moe_dpo")


def test_p_values_are_never_zero():
    assert bootstrap_p(np.ones(1999)) == 0.001 and bootstrap_p(np.zeros(9)) == 1
