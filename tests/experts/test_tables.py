"""Exact experts on finite answers and full-batch EM: optima, monotone ascent, recovery of known experts, cycles."""

import json
import math

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from mixdpo_lib.data.pairs import Text
from mixdpo_lib.elbo import log_responsibilities, margins, mixture_log_likelihood
from mixdpo_lib.evaluation import choose_n_experts, recovery
from mixdpo_lib.experts.tables import TabularExperts
from mixdpo_lib.gates.weights import FixedWeights, LearnedWeights
from mixdpo_lib.learning.full_batch import full_batch_em
from mixdpo_lib.learning.starts import random_log_q


def generator(seed):
    return torch.Generator().manual_seed(seed)


def generated(n_experts, seed, n_units=1000, n_answers=20, pairs_per_unit=16):
    """Known experts, each unit's expert, their pairs; weights drawn evenly."""
    truth = TabularExperts(n_answers, n_experts)
    truth.perturb(2.0, generator(seed))
    z = torch.randint(n_experts, (n_units,), generator=generator(seed + 100))
    pairs, unit = truth.sample_pairs(z, pairs_per_unit, generator(seed + 200))
    return truth, z, pairs, unit


def fitted(n_experts, pairs, unit, n_answers=20, restarts=4, seed=0, **options):
    experts, gate = TabularExperts(n_answers, n_experts), LearnedWeights(n_experts)
    options = {"start_temperature": 8.0, "tolerance": 1e-6, "max_iter": 300} | options
    return (
        experts,
        gate,
        full_batch_em(experts, gate, pairs, unit, restarts=restarts, seed=seed, **options),
    )


def test_the_policy_is_the_optimum_of_its_own_objective_and_its_margins_are_reward_differences():
    experts = TabularExperts(4, 2, beta=0.5, log_ref=torch.tensor([0.1, 0.2, 0.3, 0.4]).log())
    experts.perturb(1.0, generator(0))
    unnormalised = torch.tensor([0.1, 0.2, 0.3, 0.4]).double() * (experts.rewards / 0.5).exp()
    torch.testing.assert_close(
        experts.log_policy().exp(),
        unnormalised / unnormalised.sum(1, keepdim=True),
        rtol=1e-6,
        atol=1e-7,
    )
    pairs = torch.tensor([[0, 3], [2, 1]])
    found = margins(experts.logps(pairs), experts.ref_logps(pairs), beta=0.5)
    torch.testing.assert_close(
        found, (experts.rewards[:, pairs[:, 0]] - experts.rewards[:, pairs[:, 1]]).T
    )
    torch.testing.assert_close(torch.nn.functional.logsigmoid(found), experts.loglik(pairs))


def test_m_steps_reach_the_optimum_of_another_optimiser():
    truth, _, pairs, _ = generated(1, 3, n_units=30, n_answers=6)
    weight = torch.rand(len(pairs), 1, generator=generator(1), dtype=torch.float64)
    experts = TabularExperts(6, 1)
    while experts.m_step(pairs, weight):
        pass

    def loss(rewards):
        r = torch.tensor(rewards, requires_grad=True)
        value = -(
            weight[:, 0] * torch.nn.functional.logsigmoid(r[pairs[:, 0]] - r[pairs[:, 1]])
        ).sum()
        value = value + (r**2).sum() / 8
        value.backward()
        return value.item(), r.grad.numpy()

    other = minimize(loss, [0.0] * 6, jac=True, method="BFGS", options={"gtol": 1e-10})
    torch.testing.assert_close(experts.rewards.data[0], torch.tensor(other.x), atol=1e-6, rtol=0)


def test_an_answer_that_always_wins_has_a_finite_reward():
    experts = TabularExperts(2, 1)
    pairs = torch.tensor([[0, 1]] * 50)
    while experts.m_step(pairs, torch.ones(50, 1).double()):
        pass
    assert 1 < float(experts.rewards.data[0, 0]) < 10


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(1, 4), st.booleans(), st.booleans())
def test_the_monitored_objective_never_falls(seed, n_experts, by_unit, learned):
    truth = TabularExperts(5, 3)
    truth.perturb(3.0, generator(seed))
    pairs, unit = truth.sample_pairs(
        torch.randint(3, (12,), generator=generator(seed)), 5, generator(seed + 1)
    )
    experts = TabularExperts(5, n_experts)
    gate = LearnedWeights(n_experts) if learned else FixedWeights.uniform(n_experts)
    result = full_batch_em(
        experts, gate, pairs, unit if by_unit else None, max_iter=25, tolerance=1e-14, seed=seed
    )
    steps = result.history["objective"].diff().iloc[1:]
    assert (steps >= -1e-12).all(), steps.min()
    assert result.stop_reason in ("max_iter", "tolerance")
    # the bound at the exact posterior is the likelihood
    assert (result.history["elbo"] - result.history["loglik"]).abs().max() < 1e-10


def test_going_on_equals_one_longer_run():
    _, _, pairs, unit = generated(3, 5, n_units=60)
    long, short = [
        fitted(3, pairs, unit, restarts=1, max_iter=n, tolerance=1e-15, start_temperature=1.0)
        for n in (20, 10)
    ]
    rest = full_batch_em(
        short[0], short[1], pairs, unit, symmetry_breaking="none", max_iter=10, tolerance=1e-15
    )
    assert rest.history["objective"].iloc[-1] == long[2].history["objective"].iloc[-1]
    assert torch.equal(short[0].rewards, long[0].rewards)


def test_without_symmetry_breaking_experts_stay_equal_and_k_equal_experts_are_one():
    _, _, pairs, unit = generated(2, 6, n_units=50)
    one = fitted(
        1, pairs, unit, symmetry_breaking="none", start_temperature=1.0, restarts=1, max_iter=30
    )
    three = fitted(
        3, pairs, unit, symmetry_breaking="none", start_temperature=1.0, restarts=1, max_iter=30
    )
    assert torch.equal(three[0].rewards[0], three[0].rewards[1])
    for _, _, result in (one, three):
        assert result.history["loglik"].iloc[0] == pytest.approx(-math.log(2))
    # each expert of three holds a third of the pairs against a whole prior, so rewards are drawn in more: no equality
    assert three[2].history["loglik"].iloc[-1] <= one[2].history["loglik"].iloc[-1] + 1e-12


@pytest.mark.parametrize("n_experts", [2, 3, 5])
def test_known_experts_are_recovered(n_experts):
    """1,000 users, 16 pairs each: classification within .02 of the Bayes rule, weights within .03, three seeds.

    All 20 seeds and the choice of K: notebooks/theory/4_who_answered.ipynb.
    """
    for seed in range(3):
        truth, z, pairs, unit = generated(n_experts, seed)
        log_shares = (torch.bincount(z, minlength=n_experts) / len(z)).double().log()
        bayes = log_responsibilities(truth.loglik(pairs).detach(), log_shares, unit).argmax(1)
        _, gate, result = fitted(n_experts, pairs, unit, seed=seed)
        assert result.converged
        found = recovery(pd.DataFrame(result.log_q.exp().numpy()), [str(i) for i in z.tolist()])
        assert found["aligned_accuracy"] >= float((bayes == z).double().mean()) - 0.02
        weights = gate.log_w()[0].exp().sort().values
        torch.testing.assert_close(weights, log_shares.exp().sort().values, atol=0.03, rtol=0)


def cycle(n=300):
    """a beats b, b beats c, c beats a in two of three comparisons each; a user holds one of the three orders."""
    orders = [(0, 1, 2), (1, 2, 0), (2, 0, 1)]
    pairs = torch.tensor(
        [[o[i], o[j]] for o in orders for _ in range(n) for i, j in ((0, 1), (1, 2), (0, 2))]
    )
    return pairs, torch.arange(3 * n).repeat_interleave(3)


def test_a_preference_cycle():
    """One Bradley-Terry model says 1/2 on every pair; three experts reach the majority of 2/3 (trap 11)."""
    pairs, unit = cycle()
    wanted = torch.tensor([[0, 1], [1, 2], [2, 0]])
    said = {}
    for n_experts in (1, 3):
        experts = TabularExperts(3, n_experts, prior_scale=10.0)
        gate = LearnedWeights(n_experts)
        full_batch_em(experts, gate, pairs, unit, restarts=5)
        said[n_experts] = mixture_log_likelihood(
            experts.loglik(wanted).detach(), gate.log_w()[0]
        ).exp()
    torch.testing.assert_close(said[1], torch.full((3,), 0.5).double(), atol=0.02, rtol=0)
    torch.testing.assert_close(said[3], torch.full((3,), 2 / 3).double(), atol=0.03, rtol=0)


def test_every_restart_is_reported_and_the_best_is_kept():
    _, _, pairs, unit = generated(3, 8, n_units=80)
    _, _, result = fitted(3, pairs, unit, restarts=3)
    table = result.restarts
    assert len(table) == 3 and table["kept"].sum() == 1
    assert table.loc[table["kept"], "objective"].item() == table["objective"].max()
    last = result.history.groupby("restart")["objective"].last()
    assert last.tolist() == table["objective"].tolist()


def test_endings_have_their_own_names():
    _, _, pairs, unit = generated(2, 9, n_units=50)
    assert fitted(2, pairs, unit, restarts=1, max_iter=2)[2].stop_reason == "max_iter"
    assert not fitted(2, pairs, unit, restarts=1, max_iter=2)[2].converged
    assert fitted(2, pairs, unit, restarts=1, min_usage=0.49999)[2].stop_reason == "dead_expert"

    class Falls(TabularExperts):
        def m_step(self, pairs, weight, steps=2):
            self.rewards.data.mul_(-1.5).add_(torch.linspace(0, 1, self.n_answers))
            return 1

    result = full_batch_em(Falls(20, 2), LearnedWeights(2), pairs, unit, max_iter=50)
    assert result.stop_reason == "bound_decreased" and not result.converged

    class Stops(TabularExperts):
        calls = 0

        def m_step(self, pairs, weight, steps=2):
            self.calls += 1
            if self.calls == 4:
                raise KeyboardInterrupt
            return super().m_step(pairs, weight, steps)

    result = full_batch_em(Stops(20, 2), LearnedWeights(2), pairs, unit)
    assert result.stop_reason == "interrupted" and len(result.history) == 3

    class Breaks(TabularExperts):
        def log_prior(self):
            return torch.tensor(float("nan"))

    assert full_batch_em(Breaks(20, 2), LearnedWeights(2), pairs, unit).stop_reason == "non_finite"


def test_bad_input_is_named():
    pairs, unit = cycle(2)
    experts, gate = TabularExperts(3, 2), LearnedWeights(2)
    with pytest.raises(ValueError, match="max_iter=0: expected at least 1"):
        full_batch_em(experts, gate, pairs, unit, max_iter=0)
    with pytest.raises(ValueError, match="tolerance=0.0: expected above 0"):
        full_batch_em(experts, gate, pairs, unit, tolerance=0.0)
    with pytest.raises(ValueError, match="symmetry_breaking='hope': possible are"):
        full_batch_em(experts, gate, pairs, unit, symmetry_breaking="hope")
    with pytest.raises(ValueError, match="unit 1 of 0 ... 2 has no pairs"):
        full_batch_em(experts, gate, pairs[:2], torch.tensor([0, 2]))
    with pytest.raises(ValueError, match=r"pairs\[1\] = \[0, 3\]; expected answers 0 ... 2"):
        experts.loglik(torch.tensor([[0, 1], [0, 3]]))
    with pytest.raises(ValueError, match="n_answers=1: a preference needs at least two answers"):
        TabularExperts(1, 2)
    with pytest.raises(ValueError, match="prior_scale=0.0: expected a positive number"):
        TabularExperts(3, 2, prior_scale=0.0)


def test_random_responsibilities_are_seeded_and_uniform_on_the_simplex():
    a, b = random_log_q(4000, 3, seed=1), random_log_q(4000, 3, seed=1)
    assert torch.equal(a, b)
    torch.testing.assert_close(a.exp().mean(0), torch.full((3,), 1 / 3).double(), atol=0.02, rtol=0)
    torch.testing.assert_close(
        a.exp().var(0), torch.full((3,), 1 / 18).double(), atol=0.005, rtol=0
    )


def test_the_choice_of_k_takes_the_smallest_within_one_standard_error():
    better, noise = torch.randn(2, 100, generator=generator(0)).double().numpy()
    noise = 0.001 * (noise - noise.mean()) / noise.std(ddof=1)  # standard error 1e-4
    for ahead, chosen in (
        (-1e-5, 2),
        (0.9e-4, 2),
        (1.1e-4, 3),
    ):  # K = 3 behind, ahead within one error, beyond it
        table = pd.DataFrame({1: better - 1.0, 2: better, 3: better + ahead + noise})
        assert choose_n_experts(table) == chosen
    with pytest.raises(ValueError, match="no held-out units"):
        choose_n_experts(table.iloc[:0])


def test_tables_of_conversations_are_made_again_from_json(tiny_base):
    """JSON has no tuples: messages come back as lists."""
    asked = (("system", "w5"), ("user", "w1 w2"))
    answers = [Text(asked, "w3", True), Text(asked, "w4", True)]
    experts = TabularExperts(2, 3, answers=answers, base=tiny_base)
    kept = json.loads(json.dumps(experts.options()))
    assert TabularExperts.from_options(kept, lambda: tiny_base).answers == tuple(answers)
