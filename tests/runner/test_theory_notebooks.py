"""The theory notebooks, executed by the runner with small parameters; assertions on what they teach."""

import numpy as np
import pandas as pd
import pytest

from mixdpo_lib.runner import execute, notebooks

SMALL = {
    "1_from_bradley_terry_to_mixtures": {"n_tables": 2, "max_experts": 3},
    "2_em_and_the_bound": {"n_restarts": 2},
    "3_gumbel_softmax": {"n_draws": 1000},
    "4_who_answered": {
        "seeds": [0],
        "pairs_per_user": [1, 16],
        "reward_scales": [2.0],
        "max_experts": 4,
    },
    "1_extreme_sparsity": {"n_groups": 6, "seeds": [0], "passes": 8},
    "2_growing_experts": {"seeds": [0], "n_users": 120},
    "3_continuous_groups": {"n_users": 60, "n_experts_compared": [1, 3]},
}


def test_the_list_of_theory_notebooks_is_whole():
    assert set(notebooks.theory_names()) == set(SMALL)
    every = notebooks.every_notebook()  # what `make reproduce-all` runs
    assert {name for name, line in every.items() if line.study == "generated"} == set(SMALL)
    assert set(every) == set(SMALL) | set(notebooks.listed_notebooks())


@pytest.fixture(scope="module")
def theory():
    return {
        name: execute.run_notebook(name, values, profile="smoke") for name, values in SMALL.items()
    }


def test_a_cycle_needs_three_experts(theory):
    cycle = pd.read_csv(
        theory["1_from_bradley_terry_to_mixtures"] / "tables" / "cycle.csv"
    ).set_index("K")
    pairs = ["p(a > b)", "p(b > c)", "p(c > a)"]
    assert np.allclose(cycle.loc[1, pairs].astype(float), 0.5, atol=0.02)
    assert np.allclose(cycle.loc[3, pairs].astype(float), 2 / 3, atol=0.03)
    assert cycle["NLL (nats per pair)"].is_monotonic_decreasing
    objectives = pd.read_csv(
        theory["1_from_bradley_terry_to_mixtures"] / "tables" / "objectives.csv"
    )
    equal, own = objectives["one shared objective"]
    assert equal > own  # trap 9: one mixture reward makes all experts equal


def test_the_bound_stays_below_and_touches(theory):
    steps = pd.read_csv(theory["2_em_and_the_bound"] / "tables" / "steps.csv")
    wide = steps.pivot(index="step", columns="quantity", values="nats per pair")
    gap = wide["log-likelihood"] - wide["bound"]
    assert (gap > -1e-12).all() and gap[wide.index % 2 == 1].max() < 1e-12 and gap[2] > 1e-4
    symmetry = pd.read_csv(theory["2_em_and_the_bound"] / "tables" / "symmetry.csv").set_index(
        "symmetry_breaking"
    )
    assert symmetry.loc["none", "experts 0 and 1 differ by"] == 0
    assert symmetry.loc["random_responsibilities", "NMI"] > 0.8


def test_the_relaxed_objective_is_no_bound(theory):
    value = pd.read_csv(theory["3_gumbel_softmax"] / "tables" / "value.csv").set_index(
        "gumbel_temperature"
    )
    assert value.loc[5.0, "relaxed objective"] > value.loc[5.0, "log-likelihood"]
    assert value.loc[1.0, "relaxed objective"] == pytest.approx(-0.816, abs=0.005)
    assert value.loc[0.05, "relaxed objective"] == pytest.approx(
        value.loc[0.05, "bound at this q"], abs=0.01
    )


def test_latents_of_users_are_found_and_k_is_chosen(theory):
    table = pd.read_csv(theory["4_who_answered"] / "tables" / "recovery.csv")
    nmi = table.set_index(["pairs per user", "inference"])["nmi"]
    assert (
        nmi[16, "latent per unit"] > nmi[16, "Bayes rule"] - 0.1 and nmi[1, "latent per unit"] < 0.2
    )
    held_out = pd.read_csv(theory["4_who_answered"] / "tables" / "held_out.csv").set_index("K")[
        "nats per user"
    ]
    assert held_out[3] > held_out[1] + 1 and held_out[3] > held_out[2]


def test_one_bad_answer_gives_a_user_away_only_without_lapses(theory):
    table = pd.read_csv(theory["4_who_answered"] / "tables" / "lapses.csv")
    q = table.set_index(["lapse rate", "answers"])["q of the user's own expert"]
    assert q[0.0, "as answered"] > 0.99 and q[0.0, "one bad answer"] < 1e-6
    assert q[0.02, "as answered"] > 0.99 and q[0.02, "one bad answer"] > 0.99
    nats = table.set_index(["lapse rate", "answers"])["that user (nats)"]
    lost = nats[:, "as answered"] - nats[:, "one bad answer"]
    assert lost[0.02] < np.log(2 / 0.02) < lost[0.0]


def test_growth_finds_the_groups_and_leaves_the_old_users_alone(theory):
    decisions = pd.read_csv(theory["2_growing_experts"] / "tables" / "decisions.csv")
    assert decisions["kept"].sum() == 2 and decisions["gain"][decisions["kept"]].min() > 0.1
    late = pd.read_csv(theory["2_growing_experts"] / "tables" / "late.csv")
    assert late["old experts equal"].all()
    accuracy = late.set_index(["users", "fit"])["accuracy"]
    for users in ("old users", "new users"):
        assert abs(accuracy[users, "grown"] - accuracy[users, "from the beginning"]) < 0.03


def test_few_experts_die_where_one_is_drawn_at_random(theory):
    fits = pd.read_csv(theory["1_extreme_sparsity"] / "tables" / "fits.csv").set_index("fit")
    assert (fits["dead"] <= 1).all() and fits.loc["dense", "computed at the end"] == 6
    assert fits["computed at the end"].value_counts().to_dict() == {2: 5, 6: 2}


def test_users_are_placed_on_a_circle(theory):
    folder = theory["3_continuous_groups"] / "tables"
    users = pd.read_csv(folder / "users.csv")
    assert np.cos(users["true"] - users["found"]).mean() > 0.9
    held_out = pd.read_csv(folder / "held_out.csv").groupby("K")["loglik"].mean()
    assert held_out.idxmax() == "circle" and held_out["3"] > held_out["1"]
    said = pd.read_csv(folder / "said.csv").set_index("angle")
    assert np.allclose(said.sum(axis=1), 1) and len(said) in (16, 32, 64, 128)
    density = pd.read_csv(folder / "newcomer.csv").groupby("comparisons")["density"].max()
    assert density["after 24"] > density["after 4"] > density["after 1"]
    factors = pd.read_csv(folder / "factors.csv")
    assert abs(factors.corr().iloc[0, 1]) > 0.85
