"""The table of last-seen log-likelihoods, its responsibilities, and why a fit stops."""

import math

import pytest
import torch

from mixdpo_lib.elbo import correct, entropy, gumbel_softmax_samples, predictive_probability
from mixdpo_lib.learning.config import STOP_REASONS, Monitor
from mixdpo_lib.learning.inference import Annealed, EffectiveExperts, RecognitionNetwork
from mixdpo_lib.learning.table import LoglikTable

LOGLIK = torch.tensor([[0.9, 0.3], [0.8, 0.4], [0.2, 0.6]]).log()
LOG_W = torch.tensor([0.25, 0.75]).log()


@pytest.fixture
def table():
    table = LoglikTable(torch.tensor([0, 0, 1]), n_experts=2)
    table.fill(LOGLIK)
    return table


def test_before_anything_is_seen_the_responsibilities_are_the_weights():
    fresh = LoglikTable(torch.tensor([0, 0, 1]), n_experts=2)
    assert fresh.n_units == 2
    torch.testing.assert_close(fresh.log_q(LOG_W), LOG_W.expand(2, 2))
    assert fresh.terms(LOG_W)["elbo"] == pytest.approx(-math.log(2))  # no expert prefers anything


def test_responsibilities_by_hand(table):
    # user 0: .25 * .9 * .8 = .18 against .75 * .3 * .4 = .09; user 1: .25 * .2 = .05 against .75 * .6 = .45
    torch.testing.assert_close(table.log_q(LOG_W).exp(), torch.tensor([[2 / 3, 1 / 3], [0.1, 0.9]]))
    rows = table.batch_log_q(torch.tensor([2, 0, 1]), LOG_W).exp()
    torch.testing.assert_close(rows, torch.tensor([[0.1, 0.9], [2 / 3, 1 / 3], [2 / 3, 1 / 3]]))


def test_tempered_responsibilities_by_hand(table):
    # T = 2: the square root of the evidence, the weights untouched
    a, b = 0.25 * math.sqrt(0.72), 0.75 * math.sqrt(0.12)
    assert float(table.log_q(LOG_W, 2.0)[0, 0].exp()) == pytest.approx(a / (a + b), rel=1e-5)
    torch.testing.assert_close(table.log_q(LOG_W, 1e6), LOG_W.expand(2, 2), atol=1e-5, rtol=0)


def test_update_changes_only_the_rows_of_the_batch(table):
    seen = torch.tensor([[0.5, 0.7]]).log().requires_grad_()
    table.update(torch.tensor([1]), seen)
    assert not table.loglik.requires_grad
    torch.testing.assert_close(
        table.loglik.exp(), torch.tensor([[0.9, 0.3], [0.5, 0.7], [0.2, 0.6]])
    )
    a, b = (
        0.25 * 0.9 * 0.5,
        0.75 * 0.3 * 0.7,
    )  # the other pair of the user counts as it was last seen
    assert float(table.batch_log_q(torch.tensor([1]), LOG_W)[0, 0].exp()) == pytest.approx(
        a / (a + b), rel=1e-5
    )


def test_the_table_is_part_of_a_checkpoint(table):
    other = LoglikTable(torch.tensor([0, 0, 1]), n_experts=2)
    other.load_state_dict(table.state_dict())
    assert torch.equal(other.loglik, table.loglik) and set(table.state_dict()) == {"loglik", "unit"}


def test_the_bound_by_term_and_by_hand(table):
    terms = table.terms(LOG_W)
    total = math.log(0.18 + 0.09) + math.log(0.05 + 0.45)
    assert terms["elbo"] == pytest.approx(
        total / 3, rel=1e-5
    )  # exact posterior: the bound is the likelihood
    assert terms["bound_gap"] == pytest.approx(0, abs=1e-6)
    kl = sum(
        q * math.log(q / w) for q, w in [(2 / 3, 0.25), (1 / 3, 0.75), (0.1, 0.25), (0.9, 0.75)]
    )
    assert terms["kl_q_w"] == pytest.approx(kl / 3, rel=1e-4)
    assert terms["expected_loglik"] == pytest.approx(terms["elbo"] + terms["kl_q_w"], rel=1e-5)
    entropy = -sum(q * math.log(q) for q in (2 / 3, 1 / 3, 0.1, 0.9)) / 2
    assert terms["entropy"] == pytest.approx(entropy, rel=1e-5)
    assert terms["usage_0"] == pytest.approx((2 / 3 + 0.1) / 2, rel=1e-5) and "usage_2" not in terms


def test_tempered_terms_leave_a_gap(table):
    terms = table.terms(LOG_W, 4.0)
    total = (math.log(0.27) + math.log(0.5)) / 3
    assert terms["bound_gap"] > 1e-3 and terms["elbo"] + terms["bound_gap"] == pytest.approx(
        total, rel=1e-5
    )


def test_a_certain_posterior_has_finite_terms():
    table = LoglikTable(torch.tensor([0]), n_experts=2)
    table.fill(torch.tensor([[-0.1, -500.0]]))
    assert all(math.isfinite(v) for v in table.terms(torch.tensor([0.5, 0.5]).log()).values())


def test_a_unit_that_is_a_row_is_the_pair_level():
    own = LoglikTable(torch.arange(3), n_experts=2)
    own.fill(LOGLIK)
    torch.testing.assert_close(own.log_q(LOG_W), (LOGLIK + LOG_W).log_softmax(1))


def test_predictive_probability_by_hand():
    expected = torch.tensor(
        [0.25 * 0.9 + 0.75 * 0.3, 0.25 * 0.8 + 0.75 * 0.4, 0.25 * 0.2 + 0.75 * 0.6]
    )
    torch.testing.assert_close(predictive_probability(LOGLIK, LOG_W), expected)
    per_row = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]).log()
    torch.testing.assert_close(
        predictive_probability(LOGLIK, per_row), torch.tensor([0.9, 0.4, 0.4])
    )


def test_a_tie_counts_half_whatever_its_rounding():
    ties = (torch.full((3,), 1 / 3).log() - math.log(2)).logsumexp(0).exp()  # not exactly 0.5
    assert correct(torch.stack([ties, ties + 1e-5, ties - 1e-5])).tolist() == [0.5, 1.0, 0.0]


def steps(watch, scores, usage=None):
    return [watch.step(score, usage) for score in scores]


def test_stop_when_nothing_improves_any_more():
    watch = Monitor(patience=2)
    assert steps(watch, [-0.7, -0.6, -0.65, -0.59, -0.6, -0.6]) == [None] * 5 + ["no_improvement"]
    assert watch.best_step == 3 and watch.best == -0.59


def test_early_looks_cost_no_patience_and_call_nobody_dead():
    watch = Monitor(patience=2, min_usage=0.05)
    looked = [(-0.7, False), (-0.9, True), (-0.9, True), (-0.8, True), (-0.75, False)]
    assert [watch.step(score, [1.0, 0.0][early:], early=early) for score, early in looked[1:4]] == (
        [None] * 3
    )
    watch = Monitor(patience=2)
    assert [watch.step(score, early=early) for score, early in looked] == [None] * 5
    assert watch.best_step == 0 and watch.step(-0.8) == "no_improvement"
    watch = Monitor(patience=1)
    assert [watch.step(-0.7), watch.step(-0.6, early=True)] == [None, None]
    assert watch.best_step == 1  # and the best may be one of them


def test_without_patience_only_the_budget_ends_a_fit():
    assert steps(Monitor(patience=0), [-0.1, -0.2, -0.3, -0.4]) == [None] * 4


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
def test_stop_at_a_number_that_is_none(score):
    watch = Monitor(patience=5)
    assert steps(watch, [-0.6, score]) == [None, "non_finite"] and watch.best_step == 0


def test_a_dead_expert_is_fatal_only_where_asked():
    assert Monitor(patience=0).step(-0.6, [1.0, 0.0]) is None
    watch = Monitor(patience=0, min_usage=0.05)
    assert watch.step(-0.6, [0.9, 0.1]) is None and watch.step(-0.6, [0.96, 0.04]) == "dead_expert"
    assert {"dead_expert", "non_finite", "no_improvement", "max_iter"} <= set(STOP_REASONS)


# ------------------------------------------------------------------------------------------------------------ schedules


def test_an_annealed_temperature_by_hand():
    falling = Annealed(2.0, 0.02)
    assert [round(falling.at(share), 6) for share in (0.0, 0.5, 1.0, 2.0)] == [2.0, 0.2, 0.02, 0.02]
    assert [round(Annealed(1, 4).at(share), 6) for share in (-1.0, 0.5)] == [1.0, 2.0]


@pytest.mark.parametrize("wanted", [1.2, 1.8, 2.5])
def test_the_effective_number_of_experts_is_held(wanted):
    log_q = torch.randn(3000, 3, generator=torch.Generator().manual_seed(0)).log_softmax(1)
    tau = EffectiveExperts(wanted).at(0.3, log_q, torch.Generator().manual_seed(1))
    z = gumbel_softmax_samples(log_q, tau, generator=torch.Generator().manual_seed(2))[
        0
    ]  # other draws
    assert float(entropy(z.clamp_min(1e-30).log()).exp().mean()) == pytest.approx(wanted, rel=0.03)


def test_bad_schedules_are_named():
    with pytest.raises(ValueError, match="temperature end=0.0: expected above 0"):
        Annealed(1.0, 0.0)
    with pytest.raises(ValueError, match="needs the responsibilities of the step"):
        EffectiveExperts(1.5).at(0.0)
    with pytest.raises(
        ValueError, match=r"EffectiveExperts\(3.0\) with 3 experts: expected below K"
    ):
        EffectiveExperts(3.0).at(0.0, torch.zeros(2, 3).log_softmax(1))


def test_a_recognition_network_starts_at_the_gate_and_standardises_its_input():
    features = torch.tensor([[10.0, 0.0], [14.0, 2.0]])
    network = RecognitionNetwork(2, 3, mean=features.mean(0), scale=torch.tensor([2.0, 1.0]))
    assert torch.equal(network(features), torch.zeros(2, 3))
    inner = network.inner(torch.tensor([[-1.0, -1.0]]))
    torch.nn.init.ones_(network.outer.weight)
    torch.testing.assert_close(
        network(features[:1]), torch.tanh(inner).sum(1, keepdim=True).expand(1, 3)
    )
    assert {"mean", "scale"} <= set(network.state_dict())


def test_draws_are_made_where_the_generator_is_and_go_where_the_responsibilities_are():
    draw = torch.Generator().manual_seed(0)
    assert gumbel_softmax_samples(torch.zeros(3, 2, device="meta"), 1.0, generator=draw).is_meta
