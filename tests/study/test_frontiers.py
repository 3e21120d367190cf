"""Fronts of reward against distance, and differences corrected for being many: against numbers by hand."""

import numpy as np
import pandas as pd
import pytest

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


def hits_of(shares, seeds=(0,), n_users=5, n_prompts=40, noise=0.01, n_pairs=4):
    """As `accuracy_by_user` gives it: users of two groups, each method with its share of right answers."""
    rng = np.random.default_rng(0)
    rows = [
        {"method": m, "seed": seed, "group": g, "user": f"{g}{u}", "prompt_id": i}
        | {"accuracy": share + rng.normal(0, noise), "n_pairs": n_pairs}
        for m, share in shares.items()
        for seed in seeds
        for g in "ab"
        for u in range(n_users)
        for i in range(n_prompts)
    ]
    return pd.DataFrame(rows)


def test_differences_to_the_reference_by_hand():
    by_user = hits_of({"dpo": 0.5, "mix_dpo": 0.7, "soup": 0.7})
    found = accuracy_differences(by_user).set_index(["method", "group"])
    means = by_user.groupby(["method", "group"])["accuracy"].mean().unstack()
    for method in ("dpo", "soup"):
        for group, of in (("mean", means.mean(axis=1)), ("worst", means.min(axis=1))):
            row = found.loc[(method, group)]
            assert row["difference"] == pytest.approx(of["mix_dpo"] - of[method])
            assert row["low"] <= row["difference"] <= row["high"]
    assert (found.loc["dpo", "p_holm"] < 0.01).all() and (found.loc["soup", "p_holm"] > 0.05).all()
    with pytest.raises(ValueError, match=r"method 'moe_dpo' is not there; found \['dpo'"):
        accuracy_differences(by_user, "moe_dpo")
    short = by_user[(by_user["method"] != "soup") | (by_user["user"] != "a0")]
    with pytest.raises(ValueError, match="method 'soup': 9 users on 40 prompts, 'mix_dpo': 10 on"):
        accuracy_differences(short)


@pytest.mark.parametrize("over", ["user", "prompt_id"])
def test_differences_that_vary_over_users_or_prompts_have_intervals_as_wide_as_they_ask(over):
    """The standard error of a mean over n draws of a spread sigma is sigma / sqrt(n), whichever of the two varies."""
    by_user = hits_of({"dpo": 0.5, "mix_dpo": 0.7}, n_users=30, n_prompts=30, noise=0.0)
    rng, mine = np.random.default_rng(1), by_user["method"] == "mix_dpo"
    places = sorted(set(by_user[over]), key=str)
    moved = dict(zip(places, rng.normal(0, 0.1, len(places)), strict=True))
    by_user.loc[mine, "accuracy"] += by_user.loc[mine, over].map(moved)
    row = accuracy_differences(by_user).set_index("group").loc["mean"]
    spread = np.array([moved[one] for one in places])
    expected = 2 * 1.96 * spread.std() / np.sqrt(len(spread))
    assert row["high"] - row["low"] == pytest.approx(expected, rel=0.15)


def test_users_of_other_seeds_are_other_users():
    by_user = hits_of({"dpo": 0.5, "mix_dpo": 0.7}, seeds=(0, 1), noise=0.0)
    away = (by_user["method"] == "mix_dpo") & (by_user["seed"] == 1) & (by_user["user"] == "a0")
    by_user.loc[away, "accuracy"] = 0.0
    row = accuracy_differences(by_user).set_index("group").loc["worst"]
    assert row["difference"] == pytest.approx(0.7 * 9 / 10 - 0.5)


def test_p_values_are_never_zero():
    assert bootstrap_p(np.ones(1999)) == 0.001 and bootstrap_p(np.zeros(9)) == 1


def test_the_reference_alone_is_compared_with_nothing():
    with pytest.raises(ValueError, match="found 'mix_dpo' alone"):
        accuracy_differences(hits_of({"mix_dpo": 0.7}))
