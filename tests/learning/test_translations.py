"""One common reward and personal parts with a Gaussian posterior: bounds, recovery, service, refusals."""

import math

import numpy as np
import pytest
import torch
from tiny import preference_rows

from mixdpo_lib.data.pairs import Pairs
from mixdpo_lib.elbo import log_responsibilities, mixture_log_likelihood
from mixdpo_lib.experts.group_tables import GroupTables
from mixdpo_lib.experts.groups import translated
from mixdpo_lib.experts.reward_table import sample_answers
from mixdpo_lib.gates.weights import FixedWeights
from mixdpo_lib.learning.translations import as_gaussian, fit_translations, kl_to_prior
from mixdpo_lib.policy.mixture import MixturePolicy


def generator(seed):
    return torch.Generator().manual_seed(seed)


def shifted(n_pairs, n_users=300, n_basis=2, n_answers=20, seed=0):
    rewards = 2 * torch.randn(n_basis, n_answers, generator=generator(seed), dtype=torch.float64)
    a = torch.randn(n_users, n_basis - 1, generator=generator(seed + 1), dtype=torch.float64)
    return rewards, a, *sample_answers(translated(a) @ rewards, n_pairs, generator(seed + 2))


def table(rewards, n_nodes=128):
    experts = GroupTables(rewards.shape[1], n_nodes, group="translations", n_basis=len(rewards))
    experts.rewards.data = rewards.clone()
    return experts


def correlation(found, true):
    return abs(float(np.corrcoef(found.flatten(), true.flatten())[0, 1]))


@pytest.mark.parametrize("amortised", [False, True])
def test_the_factor_is_found_as_well_as_with_the_true_rewards(amortised):
    rewards, a, pairs, unit = shifted(64, n_users=150)
    found = fit_translations(
        GroupTables(20, 64, group="translations"), pairs, unit, amortised=amortised, rounds=4
    )
    best = table(rewards)
    bayes = log_responsibilities(best.loglik(pairs).detach(), best.nodes.log_prior, unit)
    bayes_mean = best.nodes.taste(bayes).direction
    wanted = 0.98 if not amortised else 0.95
    assert correlation(found.mean, a) >= wanted * correlation(bayes_mean, a)


def test_bound_and_importance_weights_beside_the_likelihood():
    rewards, _, pairs, unit = shifted(16, n_users=100)
    experts = table(rewards, 512)
    found = fit_translations(
        experts, pairs, unit, freeze_experts=True, n_draws=32, rounds=4, importance_draws=2000
    )
    assert torch.equal(experts.rewards.data, rewards)
    exact = mixture_log_likelihood(experts.loglik(pairs).detach(), experts.nodes.log_prior, unit)
    assert float((exact - found.bound).mean()) > 0 and float((found.bound - exact).max()) < 0.15
    assert float((exact - found.bound).mean()) < 0.1  # posteriors are nearly Gaussian
    assert float((exact - found.importance).abs().mean()) < 0.01
    bayes = log_responsibilities(experts.loglik(pairs).detach(), experts.nodes.log_prior, unit)
    wanted = experts.nodes.taste(bayes)
    torch.testing.assert_close(found.mean, wanted.direction, atol=0.1, rtol=0.05)
    served = experts.nodes.taste(found.log_w(experts.nodes))
    torch.testing.assert_close(served.direction, found.mean, atol=1e-5, rtol=0)
    torch.testing.assert_close(served.spread, found.lower[:, 0], atol=1e-5, rtol=0)


def test_gaussians_by_hand():
    mean, lower = as_gaussian(torch.tensor([[1.0, 2.0, 0.0, math.log(2.0), 0.5]]), 2)
    assert mean.tolist() == [[1.0, 2.0]]
    torch.testing.assert_close(lower, torch.tensor([[[1.0, 0.0], [0.5, 2.0]]]))
    normal = torch.distributions.MultivariateNormal
    wanted = torch.distributions.kl_divergence(
        normal(mean, scale_tril=lower), normal(torch.zeros(2), torch.eye(2))
    )
    torch.testing.assert_close(kl_to_prior(mean, lower), wanted)


def test_two_personal_parts():
    rewards, a, pairs, unit = shifted(64, n_users=100, n_basis=3)
    found = fit_translations(
        GroupTables(20, 81, group="translations", n_basis=3), pairs, unit, rounds=4
    )
    fitted, *_ = np.linalg.lstsq(found.mean.numpy(), a.numpy(), rcond=None)
    assert correlation(torch.from_numpy(found.mean.numpy() @ fitted), a) > 0.9


def test_a_translated_policy_serves_speaks_and_is_kept(tiny_base, tmp_path):
    data = Pairs.of(preference_rows(n=6))
    experts = GroupTables.of(tiny_base, data, 64, group="translations")
    experts.perturb(1.0, generator(0))
    policy = MixturePolicy(experts, FixedWeights(log_w=experts.nodes.log_prior), beta=1.0)
    who = policy.user(pairs=data)
    assert float(policy.taste(policy.user()).spread) == pytest.approx(1.0, abs=1e-5)
    assert float(policy.taste(who).spread) < 1.0
    prompt = data.rows[0]["prompt"]
    said = policy.generate([prompt] * 2, user=who, max_new_tokens=8)
    policy.save_pretrained(tmp_path / "shifts")
    again = MixturePolicy.from_pretrained(tmp_path / "shifts", base=tiny_base)
    assert again.generate([prompt] * 2, user=who, max_new_tokens=8).text == said.text
    torch.testing.assert_close(again.user(pairs=data), who.float())


def test_what_is_no_translation_is_refused():
    _, _, pairs, unit = shifted(2, n_users=5)
    with pytest.raises(ValueError, match="a circle is fitted by fit_nodes"):
        fit_translations(GroupTables(20, 16), pairs, unit)
    with pytest.raises(ValueError, match="n_draws=3: expected an even number"):
        fit_translations(GroupTables(20, 64, group="translations"), pairs, unit, n_draws=3)
