"""The bound: hand-computed numbers, equalities in float64, gradients, invariances, and what is refused."""

import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from mixdpo_lib import elbo

INF = math.inf


def weights(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).log()


def problem(seed: int, pairs: int = 12, experts: int = 3, units: int = 4, spread: float = 3.0):
    """Random (loglik, log_w, unit) in float64; every unit has a pair."""
    draw = torch.Generator().manual_seed(seed)
    margin = torch.randn(pairs, experts, generator=draw, dtype=torch.float64) * spread
    log_w = torch.randn(experts, generator=draw, dtype=torch.float64).log_softmax(-1)
    unit = torch.cat([torch.arange(units), torch.randint(units, (pairs - units,), generator=draw)])
    return F.logsigmoid(margin), log_w, unit[torch.randperm(pairs, generator=draw)]


def random_q(seed: int, rows: int, experts: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(rows, experts, generator=draw, dtype=torch.float64)).log_softmax(-1)


# ------------------------------------------------------------------------------------------- numbers worked by hand


def test_margin_by_hand():
    policy = torch.tensor([[[-1.0, -2.0], [-4.0, -2.0]]])
    shared = torch.tensor([[[-2.0], [-3.0]]])
    assert elbo.margins(policy, shared, beta=0.1)[0].tolist() == pytest.approx([0.2, -0.1])
    own = torch.tensor([[[-2.0, -1.0], [-3.0, -5.0]]])
    assert elbo.margins(policy, own, beta=0.1)[0].tolist() == pytest.approx([0.2, -0.4])


def test_mixture_of_bradley_terry_is_not_bradley_terry_on_the_mixture_reward():
    log_w = weights(0.5, 0.5)
    margin = torch.tensor([[3.0, -3.0]], dtype=torch.float64)
    mbt = elbo.mixture_log_likelihood(F.logsigmoid(margin), log_w).exp()
    better, worse = elbo.mixture_reward(
        torch.tensor([[3.0, -3.0], [0.0, 0.0]], dtype=torch.float64), log_w
    )
    assert mbt.item() == pytest.approx(0.500, abs=5e-4)
    assert torch.sigmoid(better - worse).item() == pytest.approx(0.910, abs=5e-4)
    assert better.item() == pytest.approx(math.log(math.cosh(3.0)))  # log((e^3 + e^-3) / 2)


def test_preference_cycle_likelihoods():
    """One Bradley-Terry model on a cycle of 2/3 majorities: -log(1/2) = .693 a pair; three rankings reach .637."""
    rows = torch.tensor([0, 0, 1, 1, 2, 2])  # a > b, b > a, b > c, c > b, c > a, a > c
    won = torch.tensor([2 / 3, 1 / 3] * 3, dtype=torch.float64)
    # rankings a > b > c, b > c > a, c > a > b with far-apart rewards: 1 where the ranking has that order, else 0
    agrees = torch.tensor([[1, 0, 1], [1, 1, 0], [0, 1, 1]], dtype=torch.bool)[rows]
    agrees[1::2] = ~agrees[1::2]
    loglik = F.logsigmoid(torch.where(agrees, 40.0, -40.0).double())
    third = weights(1 / 3, 1 / 3, 1 / 3)
    p = elbo.mixture_log_likelihood(loglik, third).exp()
    assert p[0::2].tolist() == pytest.approx([2 / 3] * 3)
    assert -(won * p.log()).sum().item() / 3 == pytest.approx(0.637, abs=5e-4)
    one = elbo.mixture_log_likelihood(F.logsigmoid(torch.zeros(6, 1).double()), weights(1.0))
    assert one.exp().tolist() == pytest.approx([0.5] * 6)
    assert -(won * one).sum().item() / 3 == pytest.approx(0.693, abs=5e-4)


def test_unit_posterior_by_hand():
    loglik = torch.tensor([[0.9, 0.3], [0.8, 0.5], [0.2, 0.6]], dtype=torch.float64).log()
    unit = torch.tensor([0, 0, 1])
    log_w = weights(0.25, 0.75)
    q = elbo.log_responsibilities(loglik, log_w, unit).exp()
    first, second = 0.25 * 0.9 * 0.8, 0.75 * 0.3 * 0.5
    assert q[0].tolist() == pytest.approx([first / (first + second), second / (first + second)])
    assert q[1].tolist() == pytest.approx([0.05 / 0.5, 0.45 / 0.5])
    likelihood = elbo.mixture_log_likelihood(loglik, log_w, unit).exp()
    assert likelihood.tolist() == pytest.approx([first + second, 0.5])


def test_kl_counts_once_per_unit():
    loglik = torch.zeros(5, 2, dtype=torch.float64)
    q, w = weights(0.5, 0.5)[None], weights(0.9, 0.1)
    by_hand = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    terms = elbo.elbo_terms(loglik, w, q, torch.zeros(5, dtype=torch.long))
    assert terms.kl.tolist() == pytest.approx([by_hand])
    assert elbo.elbo_terms(loglik, w, q.expand(5, 2)).kl.sum().item() == pytest.approx(5 * by_hand)


def test_tempered_responsibilities():
    loglik, log_w = torch.tensor([[0.9, 0.3]], dtype=torch.float64).log(), weights(0.5, 0.5)
    ratio = math.sqrt(0.9 / 0.3)
    q = elbo.log_responsibilities(loglik, log_w, responsibility_temperature=2.0).exp()
    assert q[0].tolist() == pytest.approx([ratio / (1 + ratio), 1 / (1 + ratio)])
    cold = elbo.log_responsibilities(
        loglik, weights(0.2, 0.8), responsibility_temperature=1e9
    ).exp()
    assert cold[0].tolist() == pytest.approx([0.2, 0.8])  # no evidence is left, the prior is


def test_restriction_and_certified_gap_by_hand():
    loglik = torch.tensor([[0.9, 0.3, 0.5]], dtype=torch.float64).log()
    log_w = weights(0.6, 0.3, 0.1)
    kept = elbo.restricted_log_likelihood(loglik, log_w, top_s=2)
    assert kept.exp().item() == pytest.approx(0.54 + 0.09)
    gap = elbo.certified_gap(loglik, log_w, top_s=2)
    assert gap.item() == pytest.approx(math.log((0.63 + 0.1) / 0.63))
    assert elbo.certified_gap(loglik, log_w, top_s=3).item() == 0.0


def test_entropy_by_hand():
    rows = torch.stack([weights(0.5, 0.5), weights(1.0, 0.0), weights(0.9, 0.1)])
    expected = [math.log(2), 0.0, -0.9 * math.log(0.9) - 0.1 * math.log(0.1)]
    assert elbo.entropy(rows).tolist() == pytest.approx(expected)


# -------------------------------------------------------------------------------------------- equalities and bounds


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("level", ["pair", "unit"])
def test_bound_equals_likelihood_at_the_exact_posterior(seed, level):
    loglik, log_w, unit = problem(seed)
    unit = unit if level == "unit" else None
    log_q = elbo.log_responsibilities(loglik, log_w, unit)
    terms = elbo.elbo_terms(loglik, log_w, log_q, unit)
    likelihood = elbo.mixture_log_likelihood(loglik, log_w, unit)
    torch.testing.assert_close(terms.elbo, likelihood, rtol=0, atol=1e-10)
    torch.testing.assert_close(terms.expected_loglik - terms.kl, terms.elbo, rtol=0, atol=0)
    assert log_q.logsumexp(-1).abs().max() < 1e-12


@pytest.mark.parametrize("level", ["pair", "unit"])
def test_bound_lies_below_the_likelihood_for_1000_random_q(level):
    loglik, log_w, unit = problem(0, pairs=1000 if level == "pair" else 3000, units=1000)
    unit = unit if level == "unit" else None
    likelihood, posterior = (
        function(loglik, log_w, unit)
        for function in (elbo.mixture_log_likelihood, elbo.log_responsibilities)
    )
    assert len(likelihood) == 1000
    log_q = random_q(1, 1000, 3)
    terms = elbo.elbo_terms(loglik, log_w, log_q, unit)
    assert (terms.elbo <= likelihood + 1e-12).all()
    assert (terms.kl >= 0).all()
    # and the distance is the KL from q to the posterior
    kl = (log_q.exp() * (log_q - posterior)).sum(-1)
    torch.testing.assert_close(likelihood - terms.elbo, kl, rtol=0, atol=1e-10)


@pytest.mark.parametrize("level", ["pair", "unit"])
def test_restricted_bound_grows_with_s_and_its_gap_is_certified(level):
    for seed in range(50):
        loglik, log_w, unit = problem(seed, experts=5)
        unit = unit if level == "unit" else None
        whole = elbo.mixture_log_likelihood(loglik, log_w, unit)
        before = torch.full_like(whole, -INF)
        for s in range(1, 6):
            kept = elbo.restricted_log_likelihood(loglik, log_w, s, unit)
            gap = elbo.certified_gap(loglik, log_w, s, unit)
            assert (kept > before).all() and (kept <= whole + 1e-12).all()
            assert (gap >= whole - kept - 1e-12).all() and (gap >= 0).all()
            before = kept
        torch.testing.assert_close(before, whole, rtol=0, atol=1e-12)


def test_renormalised_restriction_is_no_bound():
    loglik, log_w = torch.tensor([[0.9, 0.1]], dtype=torch.float64).log(), weights(0.6, 0.4)
    renormalised = loglik[:, 0]
    assert renormalised.item() > elbo.mixture_log_likelihood(loglik, log_w).item()


def test_certified_gap_stays_above_the_true_gap_in_float32():
    """A gate so sure that 1 - W_S would round to 0: the weight left out is read directly."""
    loglik = torch.tensor([[-50.0, 0.0]])
    log_w = torch.tensor([0.0, -25.0])
    true = elbo.mixture_log_likelihood(loglik, log_w) - elbo.restricted_log_likelihood(
        loglik, log_w, 1
    )
    assert true.item() > 20
    assert elbo.certified_gap(loglik, log_w, 1).item() >= true.item() - 1e-5


# ------------------------------------------------------------------------------------------------------------ lapses


def test_lapses_by_hand():
    log_sigma = torch.tensor([[0.9, 0.1]], dtype=torch.float64).log()
    loglik = elbo.with_lapse(log_sigma, 0.2)
    assert loglik.exp()[0].tolist() == pytest.approx([0.82, 0.18])  # .8 * .9 + .1, .8 * .1 + .1
    r = elbo.no_lapse_probability(log_sigma, 0.2)
    assert r[0].tolist() == pytest.approx([0.72 / 0.82, 0.08 / 0.18])
    torch.testing.assert_close(1 - r, 0.1 / loglik.exp())
    # a degenerate answer costs log(2 / e) and no more, a perfect one log(1 / (1 - e / 2))
    ends = elbo.with_lapse(torch.tensor([[-1e30, -76.0, 0.0]]), 0.02)[0]
    assert ends.tolist() == pytest.approx([math.log(0.01)] * 2 + [math.log(0.99)], rel=1e-6)


def test_without_lapses_nothing_changes_to_the_last_bit():
    for dtype in (torch.float32, torch.float64):
        loglik, log_w, unit = problem(3, experts=4)
        loglik = loglik.to(dtype)
        for none in (0, 0.0):
            assert torch.equal(elbo.with_lapse(loglik, none), loglik)
            assert torch.equal(elbo.no_lapse_probability(loglik, none), torch.ones_like(loglik))
            gaps = [
                elbo.certified_gap(loglik, log_w.to(dtype), 2, unit, **choice)
                for choice in ({}, {"lapse": none})
            ]
            assert torch.equal(*gaps)


def test_gradient_with_lapses_weighs_pairs_by_the_posterior_of_expert_and_no_lapse():
    log_sigma, log_w, unit = problem(20)
    for groups in (None, unit):
        variable = log_sigma.clone().requires_grad_()
        loglik = elbo.with_lapse(variable, 0.1)
        elbo.mixture_log_likelihood(loglik, log_w, groups).sum().backward()
        q = elbo.log_responsibilities(loglik.detach(), log_w, groups).exp()
        q = q if groups is None else q[groups]
        expected = q * elbo.no_lapse_probability(log_sigma, 0.1)
        torch.testing.assert_close(variable.grad, expected, rtol=0, atol=1e-12)
    assert float((expected - q).abs().max()) > 0.1  # lapses do weigh here


def test_an_expert_that_was_not_computed_stays_so():
    log_sigma = torch.tensor([[-INF, -1.0]], requires_grad=True)
    loglik = elbo.with_lapse(log_sigma, torch.tensor(0.1))
    assert loglik[0, 0] == -INF and loglik[0, 1] > -INF
    elbo.mixture_log_likelihood(loglik, torch.tensor([0.5, 0.5]).log()).sum().backward()
    assert log_sigma.grad[0, 0] == 0 and 0 < log_sigma.grad[0, 1] < 1


@pytest.mark.parametrize("prior", [elbo.LAPSE_PRIOR, (1.5, 4.0)])
def test_the_m_step_of_the_lapse_rate_maximises(prior):
    """One step is the maximum of the expected log posterior, and steps end at the maximum of the posterior itself."""
    log_sigma, log_w, unit = problem(21, pairs=60, units=10)
    log_q = elbo.log_responsibilities(elbo.with_lapse(log_sigma, 0.3), log_w, unit)
    r = elbo.no_lapse_probability(log_sigma, 0.3)

    def expected(e):
        terms = r * math.log(1 - e) + (1 - r) * math.log(e / 2)
        return float((log_q[unit].exp() * terms).sum()) + elbo.lapse_log_prior(e, prior)

    def posterior(e):
        loglik = elbo.with_lapse(log_sigma, e)
        total = elbo.mixture_log_likelihood(loglik, log_w, unit).sum()
        return float(total) + elbo.lapse_log_prior(e, prior)

    def highest(function):
        found = minimize_scalar(
            lambda e: -function(e), bounds=(1e-6, 0.999), options={"xatol": 1e-9}
        )
        return found.x

    step = float(elbo.lapse_m_step(log_sigma, log_q, 0.3, unit, prior=prior))
    assert step == pytest.approx(highest(expected), abs=1e-6)
    rate, before = 0.3, posterior(0.3)
    for _ in range(300):
        log_q = elbo.log_responsibilities(elbo.with_lapse(log_sigma, rate), log_w, unit)
        rate = float(elbo.lapse_m_step(log_sigma, log_q, rate, unit, prior=prior))
        assert posterior(rate) >= before - 1e-9
        before = posterior(rate)
    assert rate == pytest.approx(highest(posterior), abs=1e-5)


def test_experts_that_explain_every_pair_leave_the_prior_s_floor():
    rate = 0.02
    for _ in range(2000):
        step = elbo.lapse_m_step(torch.full((900, 1), -1e-9), torch.zeros(900, 1), rate)
        rate = float(step)
    assert rate == pytest.approx(2 / (900 + 100), rel=0.01)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.floats(1e-4, 0.99))
def test_the_decision_at_one_half_does_not_move_with_the_lapse_rate(seed, rate):
    log_sigma, log_w, _ = problem(seed)
    preference = elbo.predictive_probability(log_sigma, log_w)
    answer = elbo.predictive_probability(elbo.with_lapse(log_sigma, rate), log_w)
    torch.testing.assert_close(answer, (1 - rate) * preference + rate / 2)
    assert torch.equal(preference > 0.5, answer > 0.5)


@pytest.mark.parametrize("level", ["pair", "unit"])
def test_the_certified_gap_is_tighter_with_lapses_and_still_holds(level):
    for seed in range(20):
        log_sigma, log_w, unit = problem(seed, experts=5)
        unit = unit if level == "unit" else None
        log_sigma[:, log_w.argsort()[:2]] = 0.0  # those left out explain everything
        loglik = elbo.with_lapse(log_sigma, 0.3)
        true = elbo.mixture_log_likelihood(loglik, log_w, unit)
        true = true - elbo.restricted_log_likelihood(loglik, log_w, 3, unit)
        gap = elbo.certified_gap(loglik, log_w, 3, unit, lapse=0.3)
        torch.testing.assert_close(gap, true)  # reached: nothing smaller is certain
        assert (gap < elbo.certified_gap(loglik, log_w, 3, unit) - 1e-6).all()


def test_the_certified_gap_of_a_unit_without_pairs_knows_no_lapse():
    loglik, unit = elbo.with_lapse(torch.zeros(1, 2), 0.5), torch.tensor([0])
    gap = elbo.certified_gap(loglik, torch.tensor([0.6, 0.4]).log(), 1, unit, lapse=0.5, n_units=2)
    assert gap.exp().tolist() == pytest.approx([1 / 0.6] * 2)  # (.6 * .75 + .4 * .75) / (.6 * .75)


def test_one_degenerate_answer_decides_a_posterior_without_lapses_and_not_with():
    """Six clear answers speak for expert 0; one more, of 76 nats, must not outweigh them."""
    margin = torch.tensor([[4.0, -1.0]] * 6 + [[-76.0, 0.0]])
    unit, even = torch.zeros(7, dtype=torch.long), torch.tensor([0.5, 0.5]).log()
    without, lapsing = (
        elbo.log_responsibilities(elbo.with_lapse(F.logsigmoid(margin), e), even, unit).exp()[0, 0]
        for e in (0.0, 0.02)
    )
    assert without < 1e-6 and lapsing > 0.9


@pytest.mark.parametrize("rate", [-0.1, 1.0, math.nan, INF])
def test_a_lapse_rate_that_is_none_is_refused(rate):
    loglik, log_w = torch.full((2, 2), -1.0), torch.tensor([0.5, 0.5]).log()
    for call in (
        lambda: elbo.with_lapse(loglik, rate),
        lambda: elbo.no_lapse_probability(loglik, rate),
        lambda: elbo.lapse_m_step(loglik, log_w.expand(2, 2), rate),
        lambda: elbo.certified_gap(loglik, log_w, 1, lapse=rate),
    ):
        with pytest.raises(ValueError, match=f"lapse={rate}: expected a rate of at least 0"):
            call()


# ----------------------------------------------------------------------------------------------------- invariances


@pytest.mark.parametrize("level", ["pair", "unit"])
def test_permuting_experts_changes_nothing(level):
    loglik, log_w, unit = problem(3, experts=4)
    unit = unit if level == "unit" else None
    order = torch.tensor([2, 0, 3, 1])
    log_q = elbo.log_responsibilities(loglik, log_w, unit)
    mixed = elbo.log_responsibilities(loglik[:, order], log_w[order], unit)
    torch.testing.assert_close(mixed, log_q[:, order], rtol=0, atol=1e-12)
    torch.testing.assert_close(
        elbo.mixture_log_likelihood(loglik[:, order], log_w[order], unit),
        elbo.mixture_log_likelihood(loglik, log_w, unit),
        rtol=0,
        atol=1e-12,
    )


@pytest.mark.parametrize("level", ["pair", "unit"])
def test_two_equal_experts_equal_one(level):
    loglik, _, unit = problem(5, experts=2)
    unit = unit if level == "unit" else None
    twice = loglik[:, [0, 1, 1]]
    two, three = weights(0.4, 0.6), weights(0.4, 0.25, 0.35)
    torch.testing.assert_close(
        elbo.mixture_log_likelihood(twice, three, unit),
        elbo.mixture_log_likelihood(loglik, two, unit),
        rtol=0,
        atol=1e-12,
    )
    q2 = elbo.log_responsibilities(loglik, two, unit).exp()
    q3 = elbo.log_responsibilities(twice, three, unit).exp()
    torch.testing.assert_close(q3[:, 1] + q3[:, 2], q2[:, 1], rtol=0, atol=1e-12)


def test_unit_equal_to_row_index_is_the_pair_level():
    loglik, log_w, _ = problem(7)
    rows = torch.arange(len(loglik))
    by_pair = log_w.expand_as(loglik) + 0
    for gate in (log_w, by_pair):
        torch.testing.assert_close(
            elbo.log_responsibilities(loglik, gate, rows),
            elbo.log_responsibilities(loglik, gate),
            rtol=0,
            atol=0,
        )
        torch.testing.assert_close(
            elbo.mixture_log_likelihood(loglik, gate, rows),
            elbo.mixture_log_likelihood(loglik, gate),
            rtol=0,
            atol=0,
        )


@pytest.mark.parametrize("level", ["pair", "unit"])
def test_one_expert_is_dpo(level):
    loglik, _, unit = problem(9, experts=1)
    unit = unit if level == "unit" else None
    log_q = elbo.log_responsibilities(loglik, weights(1.0), unit)
    assert (log_q == 0).all()
    assert elbo.elbo_terms(loglik, weights(1.0), log_q, unit).elbo.sum().item() == pytest.approx(
        loglik.sum().item()
    )


def test_equal_margins_give_the_gate_back():
    """At the start all margins are 0: responsibilities equal the weights, so experts cannot part by themselves."""
    loglik = F.logsigmoid(torch.zeros(4, 3, dtype=torch.float64))
    log_w = weights(0.2, 0.3, 0.5)
    torch.testing.assert_close(
        elbo.log_responsibilities(loglik, log_w), log_w.expand(4, 3), rtol=0, atol=1e-12
    )
    margin = torch.zeros(4, 3, dtype=torch.float64, requires_grad=True)
    log_q = elbo.log_responsibilities(F.logsigmoid(margin), weights(1 / 3, 1 / 3, 1 / 3))
    elbo.elbo_terms(F.logsigmoid(margin), weights(1 / 3, 1 / 3, 1 / 3), log_q).elbo.sum().backward()
    assert (margin.grad == margin.grad[:, :1]).all()


def test_gate_given_by_pair_or_by_unit_is_the_same():
    loglik, _, unit = problem(11)
    by_unit = random_q(1, 4, 3)
    torch.testing.assert_close(
        elbo.log_responsibilities(loglik, by_unit[unit], unit),
        elbo.log_responsibilities(loglik, by_unit, unit),
        rtol=0,
        atol=0,
    )


def test_order_of_pairs_changes_nothing_for_units():
    loglik, log_w, unit = problem(13)
    order = torch.randperm(len(unit), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        elbo.mixture_log_likelihood(loglik[order], log_w, unit[order]),
        elbo.mixture_log_likelihood(loglik, log_w, unit),
        rtol=0,
        atol=1e-12,
    )


def test_unit_without_pairs_keeps_its_prior_when_asked_for():
    loglik, log_w = torch.tensor([[0.9, 0.3]], dtype=torch.float64).log(), weights(0.25, 0.75)
    q = elbo.log_responsibilities(loglik, log_w, torch.tensor([2]), n_units=4).exp()
    assert q.shape == (4, 2)
    assert q[[0, 1, 3]].flatten().tolist() == pytest.approx([0.25, 0.75] * 3)


# ------------------------------------------------------------------------------------------- gradients and extremes


@pytest.mark.parametrize("level", ["pair", "unit"])
def test_gradients_against_finite_differences(level):
    loglik, log_w, unit = problem(17, pairs=6, units=3)
    unit = unit if level == "unit" else None
    log_q = random_q(2, 6 if unit is None else 3, 3)
    inputs = tuple(t.clone().requires_grad_() for t in (loglik, log_w, log_q))

    def normalised(loglik, raw_w, raw_q):
        return elbo.elbo_terms(
            loglik, raw_w.log_softmax(-1), raw_q.log_softmax(-1), unit, validate=False
        )

    assert torch.autograd.gradcheck(normalised, inputs)
    assert torch.autograd.gradcheck(
        lambda a, b: elbo.mixture_log_likelihood(a, b.log_softmax(-1), unit, validate=False),
        inputs[:2],
    )
    assert torch.autograd.gradcheck(
        lambda a, b: elbo.certified_gap(a, b.log_softmax(-1), 2, unit, validate=False), inputs[:2]
    )
    assert torch.autograd.gradcheck(
        lambda a, b: elbo.mixture_reward(a, b.log_softmax(-1), validate=False), inputs[:2]
    )

    def relaxed(loglik, raw_w, raw_q):
        draw = torch.Generator().manual_seed(4)  # the same noise at each evaluation
        gate, q = raw_w.log_softmax(-1), raw_q.log_softmax(-1)
        return elbo.relaxed_objective(
            loglik, gate, q, 0.7, 5, generator=draw, unit=unit, validate=False
        )

    assert torch.autograd.gradcheck(relaxed, inputs)


def test_gradient_of_the_likelihood_is_the_responsibility():
    """Fisher's identity: the M-step's weights are the gradient of the likelihood."""
    loglik, log_w, unit = problem(19)
    for groups in (None, unit):
        variable = loglik.clone().requires_grad_()
        elbo.mixture_log_likelihood(variable, log_w, groups).sum().backward()
        q = elbo.log_responsibilities(loglik, log_w, groups).exp()
        torch.testing.assert_close(
            variable.grad, q if groups is None else q[groups], rtol=0, atol=1e-10
        )


def test_responsibilities_carry_no_gradient():
    loglik = F.logsigmoid(torch.zeros(2, 2, requires_grad=True))
    assert not elbo.log_responsibilities(loglik, torch.tensor([0.5, 0.5]).log()).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("level", ["pair", "unit"])
def test_excluded_experts_leave_values_and_gradients_finite(dtype, level):
    unit = torch.tensor([0, 0, 1]) if level == "unit" else None
    margin = torch.tensor(
        [[1.0, -1.0, 1e4], [0.5, 2.0, -1e4], [3.0, 0.0, 0.0]], dtype=dtype, requires_grad=True
    )
    log_w = torch.tensor([math.log(0.5), math.log(0.5), -INF], dtype=dtype, requires_grad=True)
    loglik = F.logsigmoid(margin)
    log_q = elbo.log_responsibilities(loglik, log_w, unit)
    assert (log_q[:, 2] == -INF).all()
    terms = elbo.elbo_terms(loglik, log_w, log_q.clone().requires_grad_(), unit)
    total = terms.elbo.sum() + elbo.mixture_log_likelihood(loglik, log_w, unit).sum()
    total = total + elbo.restricted_log_likelihood(loglik, log_w, 1, unit).sum()
    total = total + elbo.certified_gap(loglik, log_w, 1, unit).sum()
    draw = torch.Generator().manual_seed(0)
    total = (
        total
        + elbo.relaxed_objective(loglik, log_w, log_q, 0.5, 3, generator=draw, unit=unit).sum()
    )
    total.backward()
    assert total.isfinite()
    for gradient in (margin.grad, log_w.grad):
        assert gradient is not None and gradient.isfinite().all()
    assert (margin.grad[:, 2] == 0).all()
    alone = elbo.elbo_terms(loglik[:, :2], log_w[:2], log_q[:, :2], unit)
    torch.testing.assert_close(terms.elbo, alone.elbo)


def test_a_term_with_q_zero_counts_zero():
    loglik = torch.tensor([[-1.0, -2.0]])
    terms = elbo.elbo_terms(loglik, torch.tensor([0.0, -INF]), torch.tensor([[0.0, -INF]]))
    assert [t.item() for t in terms] == [-1.0, 0.0, -1.0]
    outside = elbo.elbo_terms(loglik, torch.tensor([0.0, -INF]), torch.tensor([[0.5, 0.5]]).log())
    assert outside.kl.item() == INF and outside.elbo.item() == -INF  # q where w says never


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("level", ["pair", "unit"])
def test_margins_of_ten_thousand_stay_finite(dtype, level):
    unit = torch.tensor([0, 0, 1, 1]) if level == "unit" else None
    margin = torch.tensor(
        [[1e4, -1e4], [-1e4, -1e4], [-1e4, 1e4], [1e4, 1e4]], dtype=dtype, requires_grad=True
    )
    log_w = torch.tensor([0.5, 0.5], dtype=dtype).log()
    loglik = F.logsigmoid(margin)
    log_q = elbo.log_responsibilities(loglik, log_w, unit)
    terms = elbo.elbo_terms(loglik, log_w, log_q, unit)
    likelihood = elbo.mixture_log_likelihood(loglik, log_w, unit)
    torch.testing.assert_close(terms.elbo, likelihood)
    gap = elbo.certified_gap(loglik, log_w, 1, unit)
    draw = torch.Generator().manual_seed(0)
    relaxed = elbo.relaxed_objective(loglik, log_w, log_q, 0.1, 3, generator=draw, unit=unit)
    for value in (*terms, likelihood, gap, relaxed):
        assert value.isfinite().all()
    (terms.elbo.sum() + likelihood.sum() + gap.sum() + relaxed.sum()).backward()
    assert margin.grad.isfinite().all()


# ---------------------------------------------------------------------------------------------------------- relaxed


def quadrature(temperature: float, points: int = 200_001) -> float:
    """Relaxed objective of w = q = (.9, .1), loglik = (-1, 0): the difference of two Gumbels is logistic."""
    u = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    logistic = u.log() - (-u).log1p()
    return -torch.sigmoid((math.log(9.0) + logistic) / temperature).mean().item()


@pytest.mark.parametrize("temperature, known", [(1.0, -0.816), (5.0, -0.605), (0.3, None)])
def test_soft_samples_against_quadrature(temperature, known):
    loglik, log_w = torch.tensor([[-1.0, 0.0]], dtype=torch.float64), weights(0.9, 0.1)
    exact = quadrature(temperature)
    if known is not None:
        assert exact == pytest.approx(known, abs=1e-3)
    draw = torch.Generator().manual_seed(1)
    z = elbo.gumbel_softmax_samples(log_w[None], temperature, 40_000, generator=draw)
    values = (z[:, 0] * loglik).sum(-1)
    assert abs(values.mean().item() - exact) < 4 * values.std().item() / 200
    draw = torch.Generator().manual_seed(1)
    objective = elbo.relaxed_objective(
        loglik, log_w, log_w[None], temperature, 40_000, generator=draw
    )
    assert objective.item() == pytest.approx(values.mean().item())


def test_relaxed_objective_exceeds_the_likelihood_when_warm():
    loglik, log_w = torch.tensor([[-1.0, 0.0]], dtype=torch.float64), weights(0.9, 0.1)
    assert elbo.mixture_log_likelihood(loglik, log_w).item() == pytest.approx(-0.841, abs=5e-4)
    assert quadrature(5.0) > -0.841


@pytest.mark.parametrize("temperature", [0.2, 1.0, 5.0])
def test_hard_samples_are_unbiased_in_value(temperature):
    log_q = weights(0.6, 0.3, 0.1)[None]
    loglik = torch.tensor([[-1.0, -0.2, -3.0]], dtype=torch.float64)
    draw = torch.Generator().manual_seed(2)
    z = elbo.gumbel_softmax_samples(log_q, temperature, 20_000, hard=True, generator=draw)
    assert torch.allclose(z.max(-1).values, torch.ones(20_000, 1, dtype=torch.float64))
    values = (z[:, 0] * loglik).sum(-1)
    exact = (log_q.exp() * loglik).sum().item()
    assert abs(values.mean().item() - exact) < 4 * values.std().item() / math.sqrt(20_000)


def test_straight_through_gradient_is_the_soft_one():
    raw = torch.tensor([[0.3, -0.2, 0.1]], dtype=torch.float64)
    gradients = []
    for hard in (False, True):
        log_q = raw.clone().requires_grad_()
        draw = torch.Generator().manual_seed(3)
        z = elbo.gumbel_softmax_samples(log_q.log_softmax(-1), 0.7, 4, hard=hard, generator=draw)
        (z * torch.tensor([1.0, 2.0, 4.0])).sum().backward()
        gradients.append(log_q.grad)
    torch.testing.assert_close(*gradients)


def test_samples_repeat_with_the_generator():
    log_q = weights(0.5, 0.5)[None]
    one, two = (
        elbo.gumbel_softmax_samples(log_q, 1.0, generator=torch.Generator().manual_seed(0))
        for _ in range(2)
    )
    assert (one == two).all()


# ------------------------------------------------------------------------------------------------------- properties

rows_of_floats = st.lists(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=3, max_size=3), min_size=1, max_size=6
)
raw_gate = st.lists(st.floats(-30, 30, width=32), min_size=3, max_size=3)


@settings(max_examples=50, deadline=None)
@given(rows_of_floats, raw_gate, st.data())
def test_properties_hold_for_any_margins_and_gate(rows, gate, data):
    loglik = F.logsigmoid(torch.tensor(rows, dtype=torch.float64))
    log_w = torch.tensor(gate, dtype=torch.float64).log_softmax(-1)
    units = data.draw(st.integers(1, len(rows)))
    unit = torch.tensor([n % units for n in range(len(rows))])
    for groups in (None, unit):
        log_q = elbo.log_responsibilities(loglik, log_w, groups)
        assert log_q.logsumexp(-1).abs().max() < 1e-9
        likelihood = elbo.mixture_log_likelihood(loglik, log_w, groups)
        assert (likelihood <= 1e-9).all() and likelihood.isfinite().all()
        terms = elbo.elbo_terms(loglik, log_w, log_q, groups)
        torch.testing.assert_close(terms.elbo, likelihood, rtol=1e-10, atol=1e-9)
        total = elbo.sum_over_units(loglik, groups, units) if groups is not None else loglik
        assert (likelihood <= total.max(-1).values + 1e-9).all()
        assert (likelihood >= total.min(-1).values - 1e-9).all()
        assert (elbo.restricted_log_likelihood(loglik, log_w, 2, groups) <= likelihood + 1e-9).all()
        reward = elbo.mixture_reward(total, log_w)
        torch.testing.assert_close(
            reward, likelihood, rtol=1e-12, atol=1e-12
        )  # the same formula, another meaning


# -------------------------------------------------------------------------------------------------- what is refused

GOOD = torch.tensor([[-0.1, -0.2], [-0.3, -0.4], [-0.5, -0.6]])
EVEN = torch.tensor([0.5, 0.5]).log()


@pytest.mark.parametrize(
    "log_w, message",
    [
        (torch.tensor([0.1, 0.2]), r"log_w: weights sum to 2\.3\d*, expected at most 1"),
        (
            torch.tensor([[-1.0, -1.0], [0.0, -1.0], [-1.0, -1.0]]),
            r"log_w\[1\]: weights sum to 1\.36",
        ),
        (torch.tensor([-INF, -INF]), r"log_w: every expert has weight 0"),
        (
            torch.tensor([[-1.0, -1.0], [-1.0, -1.0], [-INF, -INF]]),
            r"log_w\[2\]: every expert has weight 0",
        ),
        (torch.tensor([math.nan, -1.0]), r"log_w: holds NaN or \+inf"),
        (torch.tensor([INF, -1.0]), r"log_w: holds NaN or \+inf"),
        (torch.tensor([-2.0, -2.0, -2.0]), r"log_w has 3 experts and loglik 2"),
        (
            torch.tensor([[-1.0, -1.0], [-1.0, -1.0]]),
            r"log_w has 2 rows and loglik 3; .*needs unit",
        ),
        (
            torch.tensor([-1.0, -1.0]).half(),
            r"log_w has dtype torch.float16; expected float32 or float64",
        ),
        (torch.zeros(1, 1, 2), r"log_w has shape \(1, 1, 2\)"),
    ],
)
def test_a_bad_gate_is_refused(log_w, message):
    for function in (elbo.mixture_log_likelihood, elbo.log_responsibilities):
        with pytest.raises(ValueError, match=message):
            function(GOOD, log_w)


@pytest.mark.parametrize(
    "loglik, message",
    [
        (torch.tensor([[-0.1, -0.2], [0.3, -0.1]]), r"loglik\[1\].*apply logsigmoid"),
        (torch.tensor([[math.nan, -0.2]]), r"loglik\[0\].*at most 0"),
        (torch.zeros(0, 2), r"loglik has shape \(0, 2\); expected \(pairs, experts\)"),
        (GOOD.bfloat16(), r"loglik has dtype torch.bfloat16"),
    ],
)
def test_a_bad_loglik_is_refused(loglik, message):
    with pytest.raises(ValueError, match=message):
        elbo.mixture_log_likelihood(loglik, EVEN)


@pytest.mark.parametrize(
    "unit, n_units, message",
    [
        ([0, 2, 2], None, r"unit 1 of 0 \.\.\. 2 has no pairs; renumber"),
        ([0, -1, 1], None, r"unit\[1\] = -1; expected numbers from 0 on"),
        ([0, 1, 4], 3, r"unit\[2\] = 4 with n_units=3"),
        ([0, 1], None, r"unit has shape \(2,\); expected \(3,\)"),
        (None, 3, r"n_units=3 without unit"),
    ],
)
def test_bad_units_are_refused(unit, n_units, message):
    with pytest.raises(ValueError, match=message):
        elbo.log_responsibilities(
            GOOD, EVEN, None if unit is None else torch.tensor(unit), n_units=n_units
        )


def test_a_gate_that_differs_inside_a_unit_is_refused_with_its_row():
    log_w = torch.tensor([[0.5, 0.5], [0.3, 0.7], [0.4, 0.6]]).log()
    with pytest.raises(
        ValueError, match=r"log_w\[2\] = .* differs from the first row of its unit 0,.*unit=None"
    ):
        elbo.log_responsibilities(GOOD, log_w, torch.tensor([0, 1, 0]))
    with pytest.raises(ValueError, match=r"log_w has 4 rows for 3 pairs of 2 units"):
        elbo.log_responsibilities(GOOD, EVEN.expand(4, 2), torch.tensor([0, 1, 0]))
    with pytest.raises(
        ValueError, match=r"unit 1 has no pairs, so a log_w by pair says nothing of it"
    ):
        elbo.log_responsibilities(GOOD, EVEN.expand(3, 2), torch.tensor([0, 3, 0]), n_units=4)


def test_responsibilities_that_are_none_are_refused():
    with pytest.raises(ValueError, match=r"log_q\[1\]: the log of its total is .*expected 0"):
        elbo.elbo_terms(GOOD, EVEN, torch.stack([EVEN, EVEN + 0.1, EVEN]))
    with pytest.raises(ValueError, match=r"log_q has shape \(3, 2\); expected \(1, 2\)"):
        elbo.elbo_terms(GOOD, EVEN, EVEN.expand(3, 2), torch.tensor([0, 0, 0]))


@pytest.mark.parametrize("beta", [0.0, -0.1, INF, math.nan])
def test_beta_is_above_zero(beta):
    with pytest.raises(ValueError, match="strength of the KL term is above 0"):
        elbo.margins(torch.zeros(1, 2, 3), torch.zeros(1, 2, 1), beta)


def test_shapes_of_logps():
    with pytest.raises(
        ValueError, match=r"policy_logps has shape \(1, 3, 3\); expected \(pairs, 2, experts\)"
    ):
        elbo.margins(torch.zeros(1, 3, 3), torch.zeros(1, 2, 1), 0.1)
    with pytest.raises(
        ValueError, match=r"ref_logps has shape \(1, 2, 2\); expected \(1, 2, 3\), or \(1, 2, 1\)"
    ):
        elbo.margins(torch.zeros(1, 2, 3), torch.zeros(1, 2, 2), 0.1)
    with pytest.raises(ValueError, match=r"ref_logps has dtype torch.bfloat16"):
        elbo.margins(torch.zeros(1, 2, 3), torch.zeros(1, 2, 1).bfloat16(), 0.1)


@pytest.mark.parametrize("temperature", [0.0, -1.0, INF, math.nan])
def test_temperatures_are_above_zero(temperature):
    with pytest.raises(ValueError, match="gumbel_temperature=.*above 0"):
        elbo.gumbel_softmax_samples(EVEN[None], temperature)
    with pytest.raises(ValueError, match="responsibility_temperature=.*above 0"):
        elbo.log_responsibilities(GOOD, EVEN, responsibility_temperature=temperature)


def test_other_refusals():
    with pytest.raises(ValueError, match="n_samples=0: expected at least 1"):
        elbo.gumbel_softmax_samples(EVEN[None], 1.0, 0)
    for s in (0, 3):
        with pytest.raises(ValueError, match=f"top_s={s} with 2 experts; expected 1 ... 2"):
            elbo.restricted_log_likelihood(GOOD, EVEN, s)
    with pytest.raises(ValueError, match=r"rewards\[0\]: holds NaN"):
        elbo.mixture_reward(torch.tensor([[math.nan, 0.0]]), EVEN)
    with pytest.raises(ValueError, match=r"log_w has shape \(2,\) and rewards \(1, 3\)"):
        elbo.mixture_reward(torch.zeros(1, 3), EVEN)


@pytest.mark.parametrize("page", ["method.md", "claims.md"])
def test_the_pages_of_mathematics_and_claims_name_what_exists(page):
    """Every `module.name` and `test_module.test_name` is defined in that file."""
    root = Path(__file__).parent.parent
    page = (root / "docs" / page).read_text(encoding="utf-8")
    named = re.findall(r"`(\w+)\.(\w+)(?:\.\w+)?`", page)
    assert len(named) > 40
    for module, name in named:
        places = [
            *(root / ("tests" if module.startswith("test_") else "mixdpo_lib")).rglob(
                f"{module}.py"
            )
        ]
        definition = re.compile(rf"^(?:(?:def|class) {name}\b|{name} = )", re.M)
        assert any(definition.search(file.read_text(encoding="utf-8")) for file in places), (
            f"{module}.{name}"
        )
