"""Rewards that are linear in vectors of the answers: their M-step, their gradients, their copies."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from mixdpo_lib.experts.copies import gathered
from mixdpo_lib.experts.linear_tables import LinearTables
from mixdpo_lib.experts.tables import numbered_answers, numbered_pairs
from mixdpo_lib.gates.weights import LearnedWeights
from mixdpo_lib.policy.mixture import MixturePolicy

DRAW = torch.Generator()


def tables(n_answers=12, n_experts=2, size=4, prior_scale=1.0, scale=0.0):
    read = torch.randn(n_answers, size, generator=DRAW.manual_seed(0)).double()
    experts = LinearTables(
        read, numbered_answers(n_answers), n_experts=n_experts, prior_scale=prior_scale
    )
    experts.perturb(scale, DRAW.manual_seed(1))
    return experts


def pairs_and_weights(n=60, n_answers=12, n_experts=2):
    first = torch.randint(n_answers, (n,), generator=DRAW.manual_seed(2))
    second = (first + torch.randint(1, n_answers, (n,), generator=DRAW.manual_seed(3))) % n_answers
    weight = torch.rand(n, n_experts, generator=DRAW.manual_seed(4)).double()
    return torch.stack([first, second], 1), weight


@pytest.mark.parametrize("prior_scale", [0.3, 2.0])
def test_the_m_step_ends_at_weighted_logistic_regression(prior_scale):
    experts, (pairs, weight) = tables(prior_scale=prior_scale), pairs_and_weights()
    assert experts.m_step(pairs, weight, steps=30) > 0
    x = (experts.read[pairs[:, 0]] - experts.read[pairs[:, 1]]).numpy()
    for k in range(2):
        plain = LogisticRegression(C=prior_scale**2, fit_intercept=False, tol=1e-12, max_iter=1000)
        both = np.concatenate([x, -x]), np.repeat([1, 0], len(x)), np.tile(weight[:, k] / 2, 2)
        expected = torch.from_numpy(plain.fit(*both).coef_[0])
        torch.testing.assert_close(experts.rewards.data[k], expected, atol=1e-5, rtol=0)
    assert experts.m_step(pairs, weight) == 0  # nothing is left to gain


def test_an_m_step_never_lowers_its_objective():
    """From far away too, where a whole Newton step would overshoot."""
    experts, (pairs, weight) = tables(scale=30.0), pairs_and_weights()

    def objective():
        fit = (weight * experts.loglik(pairs)).sum(0)
        return (fit - experts.rewards.square().sum(1) / 2).detach()

    for _ in range(20):
        before = objective()
        experts.m_step(pairs, weight, steps=1)
        assert bool((objective() >= before).all())


def test_pulls_of_units_are_their_gradients():
    experts, (pairs, _) = tables(n_experts=1, scale=1.0), pairs_and_weights()
    unit = torch.arange(len(pairs)) % 3
    loglik = experts.loglik(pairs)[:, 0]
    found = experts.pulls(pairs, -torch.expm1(loglik.detach()), unit, 3)
    for u in range(3):
        (own,) = torch.autograd.grad(loglik[unit == u].sum(), [experts.rewards], retain_graph=True)
        torch.testing.assert_close(found[u], own[0])


def test_a_policy_of_them_says_what_the_table_says():
    experts, (pairs, _) = tables(scale=1.0), pairs_and_weights()
    policy = MixturePolicy(experts, LearnedWeights(2))
    torch.testing.assert_close(
        policy.loglik(numbered_pairs(pairs, 12)), experts.loglik(pairs).detach().float()
    )


def test_copies_keep_what_was_learned_and_what_is_read():
    experts, (pairs, _) = tables(scale=1.0), pairs_and_weights()
    made = gathered(experts, [(experts, 1), (experts, 0), (experts, 1)])
    assert type(made) is LinearTables and made.n_experts == 3
    torch.testing.assert_close(made.loglik(pairs), experts.loglik(pairs)[:, [1, 0, 1]])
