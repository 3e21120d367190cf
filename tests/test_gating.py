"""Input-free gates: the M-step by hand, the stochastic form, saved state, and what is refused."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixdpo_lib import elbo, gating


def test_fixed_weights_say_what_they_were_given():
    for gate in (
        gating.FixedWeights([0.25, 0.75, 0.0]),
        gating.FixedWeights(log_w=torch.tensor([0.25, 0.75, 0.0]).log()),
    ):
        assert gate.n_experts == 3
        assert gate().exp().tolist() == pytest.approx([0.25, 0.75, 0.0])
        assert (gate({"prompt": ["not read"]}) == gate.log_w).all()
        assert list(gate.parameters()) == []
    assert gating.FixedWeights([1.0])().tolist() == [0.0]
    assert gating.FixedWeights.uniform(3)().tolist() == pytest.approx([-math.log(3)] * 3)


def test_m_step_by_hand():
    gate = gating.LearnedWeights(3, alpha=1.5)
    gate.update(torch.tensor([0.5, 0.5, 0.0]), n_units=10)
    assert gate().exp().tolist() == pytest.approx([5.5 / 11.5, 5.5 / 11.5, 0.5 / 11.5])
    plain = gating.LearnedWeights(3, alpha=1)
    plain.update(torch.tensor([0.5, 0.5, 0.0]), n_units=10)
    assert plain().exp().tolist() == pytest.approx([0.5, 0.5, 0.0])


def test_m_step_is_the_mode_of_the_posterior():
    """No other weights reach a higher U sum_k q_k log w_k + log prior."""
    q, units = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64), 7
    gate = gating.LearnedWeights(3, alpha=1.7).double()
    gate.update(q, n_units=units)
    best = units * (q * gate()).sum() + gate.log_prior()
    draw = torch.Generator().manual_seed(0)
    for _ in range(200):
        other = (gate() + 0.3 * torch.randn(3, generator=draw, dtype=torch.float64)).log_softmax(-1)
        assert units * (q * other).sum() + 0.7 * other.sum() <= best


def test_stochastic_form_by_hand():
    gate = gating.LearnedWeights(2, alpha=1)
    gate.update(torch.tensor([1.0, 0.0]), rho=0.25, n_units=5)
    assert gate().exp().tolist() == pytest.approx([0.75 * 0.5 + 0.25, 0.75 * 0.5])


def test_robbins_monro_steps_reach_the_mean():
    draw = torch.Generator().manual_seed(0)
    shares = torch.tensor([0.5, 0.3, 0.2])
    gate = gating.LearnedWeights(3, alpha=1)
    for t in range(2000):
        z = torch.multinomial(shares, 8, replacement=True, generator=draw)
        gate.update(torch.bincount(z, minlength=3) / 8, rho=1 / (t + 2), n_units=1000)
    assert gate().exp().tolist() == pytest.approx(shares.tolist(), abs=0.02)


def test_prior_keeps_every_expert_alive_and_yields_to_data():
    gate = gating.LearnedWeights(2)
    gate.update(torch.tensor([1.0, 0.0]), n_units=60)
    assert 0 < gate().exp()[1] < 0.01
    elbo.check_log_w(gate())


def test_em_with_learned_weights_never_falls():
    """Full-batch EM of the weights alone, on given likelihoods: likelihood plus prior rises at every step."""
    draw = torch.Generator().manual_seed(0)
    loglik = torch.nn.functional.logsigmoid(2 * torch.randn(40, 3, generator=draw, dtype=torch.float64))
    unit = torch.arange(40) // 4
    gate = gating.LearnedWeights(3, alpha=1.2).double()
    before = -math.inf
    for _ in range(50):
        value = (elbo.mixture_log_likelihood(loglik, gate(), unit).sum() + gate.log_prior()).item()
        assert value >= before - 1e-10
        before = value
        gate.update(elbo.log_responsibilities(loglik, gate(), unit).exp().mean(0), n_units=10)


def test_one_expert_stays_certain():
    gate = gating.LearnedWeights(1)
    gate.update(torch.tensor([1.0]), rho=0.3, n_units=12)
    assert gate().tolist() == [0.0]


def test_state_is_saved_with_the_module():
    gate = gating.LearnedWeights(2)
    gate.update(torch.tensor([0.9, 0.1]), n_units=12)
    again = gating.LearnedWeights(2)
    again.load_state_dict(gate.state_dict())
    assert (again() == gate()).all()


def test_top_s_keeps_the_largest_without_renormalising():
    log_w = torch.tensor([[0.2, 0.5, 0.3], [0.4, 0.2, 0.4]]).log()
    assert torch.allclose(gating.top_s(log_w, 2).exp(), torch.tensor([[0.0, 0.5, 0.3], [0.4, 0.0, 0.4]]))
    assert torch.allclose(gating.top_s(log_w, 1).exp(), torch.tensor([[0.0, 0.5, 0.0], [0.4, 0.0, 0.0]]))
    assert (gating.top_s(log_w, 3) == log_w).all()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from([-3.0, -1.0, -0.5, -math.inf]), min_size=4, max_size=4))
def test_top_s_is_nested_and_keeps_s(values):
    log_w = torch.tensor(values)
    before = torch.zeros(4, dtype=torch.bool)
    for s in range(1, 5):
        kept = gating.top_s(log_w, s)
        alive = kept > -math.inf
        assert alive.sum() == min(s, int((log_w > -math.inf).sum()))
        assert (alive | ~before).all()
        assert (kept[alive] == log_w[alive]).all()
        before = alive


@pytest.mark.parametrize(
    "build", [lambda: gating.LearnedWeights(0), lambda: gating.FixedWeights([]), lambda: gating.FixedWeights.uniform(0)]
)
def test_no_expert_is_refused(build):
    with pytest.raises(ValueError, match="n_experts=0: a mixture needs at least one expert; use 1 for plain DPO"):
        build()


def test_bad_weights_are_refused():
    with pytest.raises(ValueError, match="weights sum to 1.5, expected 1"):
        gating.FixedWeights([0.75, 0.75])
    with pytest.raises(ValueError, match="weights sum to nan"):
        gating.FixedWeights(log_w=torch.tensor([math.nan, 0.0]))
    with pytest.raises(ValueError, match="every weight to be 0 or above"):
        gating.FixedWeights([1.5, -0.5])
    with pytest.raises(ValueError, match="exactly one of the two"):
        gating.FixedWeights()
    with pytest.raises(ValueError, match=r"weights has shape \(1, 2\)"):
        gating.FixedWeights(torch.tensor([[0.5, 0.5]]))


def test_bad_updates_are_refused():
    gate = gating.LearnedWeights(2)
    even = torch.tensor([0.5, 0.5])
    with pytest.raises(ValueError, match=r"mean_responsibility has shape \(3,\); expected \(2,\)"):
        gate.update(torch.ones(3) / 3, n_units=1)
    with pytest.raises(ValueError, match="expected probabilities that sum to 1"):
        gate.update(even * 2, n_units=1)
    with pytest.raises(ValueError, match="expected probabilities that sum to 1"):
        gate.update(even * math.nan, n_units=1)
    for rho in (0.0, 1.5):
        with pytest.raises(ValueError, match=f"rho={rho}"):
            gate.update(even, rho, n_units=1)
    with pytest.raises(ValueError, match="n_units=0: expected the number of units"):
        gate.update(even, n_units=0)
    with pytest.raises(ValueError, match="alpha=0.5: the Dirichlet concentration is at least 1"):
        gating.LearnedWeights(2, alpha=0.5)
    assert gate().exp().tolist() == pytest.approx([0.5, 0.5])
