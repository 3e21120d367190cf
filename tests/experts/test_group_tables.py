"""Nodes of a group, on tables: coordinates, likelihood by quadrature, recovery of angles, the discrete case, refusals."""

import math
import warnings

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from tiny import preference_rows

from mixdpo_lib.data.pairs import Pairs
from mixdpo_lib.elbo import elbo_terms, log_responsibilities, mixture_log_likelihood
from mixdpo_lib.evaluation import align_circle
from mixdpo_lib.experts.group_tables import GroupTables
from mixdpo_lib.experts.groups import (
    Nodes,
    concentration,
    exponential,
    generators,
    on_circle,
    translated,
)
from mixdpo_lib.experts.reward_table import sample_answers
from mixdpo_lib.experts.tables import TabularExperts
from mixdpo_lib.gates.direction import DirectionGate
from mixdpo_lib.gates.user import UserGate
from mixdpo_lib.gates.weights import FixedWeights, LearnedWeights
from mixdpo_lib.learning.full_batch import full_batch_em
from mixdpo_lib.learning.quadrature import doubling_gap, enough_nodes, fit_nodes
from mixdpo_lib.policy.mixture import MixturePolicy


def generator(seed):
    return torch.Generator().manual_seed(seed)


def on_a_circle(n_pairs, seed=0, n_users=300, n_answers=20):
    """Two rewards of standard deviation 2, users at random angles, their pairs."""
    rewards = 2 * torch.randn(2, n_answers, generator=generator(seed), dtype=torch.float64)
    angle = 2 * math.pi * torch.rand(n_users, generator=generator(seed + 1), dtype=torch.float64)
    return rewards, angle, *sample_answers(on_circle(angle) @ rewards, n_pairs, generator(seed + 2))


def truth(rewards, n_nodes):
    experts = GroupTables(rewards.shape[1], n_nodes)
    experts.rewards.data = rewards.clone()
    return experts


# ------------------------------------------------------------------------------------------------------ the group
def test_the_exponential_map_gives_each_row_of_the_table():
    angle = torch.linspace(-4, 4, 9, dtype=torch.float64)
    found = exponential(angle[:, None], generators("circle"))
    torch.testing.assert_close(found, torch.stack([angle.cos(), angle.sin()], 1))
    quarter = exponential(torch.tensor([[math.pi / 2]]).double(), generators("circle"))
    assert quarter[0, 1] == pytest.approx(1.0)  # and not -1: the sign of the generator
    shift = torch.randn(5, 3, generator=generator(0), dtype=torch.float64)
    torch.testing.assert_close(exponential(shift, generators("translations", 4)), translated(shift))
    x = generators("translations", 4)
    assert not (x @ x).any()  # nilpotent: exp = I + X
    assert len(generators("cyclic")) == 0


def test_nodes_of_a_circle_and_of_translations():
    nodes = Nodes("circle", 16)
    torch.testing.assert_close(
        nodes.coordinates.T @ nodes.coordinates / 16, torch.eye(2).double() / 2
    )
    assert float(nodes.log_prior.exp().sum()) == pytest.approx(1.0, abs=1e-12)
    grid = Nodes("translations", 81, n_basis=3)
    assert grid.coordinates.shape == (81, 3) and bool((grid.coordinates[:, 0] == 1).all())
    weights = Nodes("translations", 64).log_prior.exp()
    assert float(weights @ Nodes("translations", 64).points[:, 0].square()) == pytest.approx(
        1.0, abs=1e-6
    )


def test_direction_concentration_and_density_by_hand():
    nodes = Nodes("circle", 64)
    log_w = (3.0 * (nodes.points - 1.0).cos())[None].log_softmax(1)
    found = nodes.taste(log_w)
    assert float(found.direction) == pytest.approx(1.0, abs=1e-9)
    assert float(found.concentration) == pytest.approx(3.0, abs=1e-6)
    density = np.exp(3 * np.cos(nodes.points.numpy() - 1)) / (2 * np.pi * np.i0(3.0))
    np.testing.assert_allclose(found.density[0].numpy(), density, rtol=1e-6)
    assert float(concentration(torch.tensor([0.0])).double()) == 0.0


# ------------------------------------------------------------------------------------------------- the likelihood
def test_the_bound_is_the_likelihood_by_another_quadrature():
    rewards, _, pairs, unit = on_a_circle(16, n_users=5)
    experts = truth(rewards, 128)
    loglik, log_w = experts.loglik(pairs).detach(), experts.nodes.log_prior
    log_q = log_responsibilities(loglik, log_w, unit)
    bound = elbo_terms(loglik, log_w, log_q, unit).elbo
    difference = (rewards[:, pairs[:, 0]] - rewards[:, pairs[:, 1]]).numpy()
    for u in range(5):
        d = difference[:, (unit == u).numpy()]

        def density(t, d=d):
            margin = np.cos(t) * d[0] + np.sin(t) * d[1]
            return np.exp(-np.logaddexp(0, -margin).sum()) / (2 * np.pi)

        exact = math.log(quad(density, 0, 2 * np.pi, epsabs=0, epsrel=1e-12, limit=400)[0])
        assert float(bound[u]) == pytest.approx(exact, abs=1e-10)


def test_the_error_of_few_nodes_falls_as_derived():
    """2 exp(-M^2 sd^2 / 2) of a posterior of width sd: 16, 32 and 64 nodes on 64 pairs a user."""
    rewards, _, pairs, unit = on_a_circle(64)

    def log_likelihood(n):
        experts = truth(rewards, n)
        return mixture_log_likelihood(experts.loglik(pairs).detach(), experts.nodes.log_prior, unit)

    exact = log_likelihood(512)
    gaps = [doubling_gap(log_likelihood(n), exact, len(pairs)) for n in (16, 32, 64)]
    assert gaps[1] < gaps[0] / 30 and gaps[2] < gaps[1] / 30 and gaps[2] < 1e-7
    assert enough_nodes(log_likelihood, len(pairs)) in (64, 128)
    with pytest.raises(ValueError, match="16 nodes: twice as many change the likelihood"):
        enough_nodes(log_likelihood, len(pairs), most=16)


def test_narrow_posteriors_are_warned_of_where_nodes_are_few():
    rewards, _, pairs, unit = on_a_circle(64)
    for n, warned in ((16, True), (256, False)):
        experts = truth(rewards, n)
        log_q = log_responsibilities(experts.loglik(pairs).detach(), experts.nodes.log_prior, unit)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            narrow = experts.nodes.warn_narrow(log_q)
        assert bool(found) == warned == bool(narrow)
        if warned:
            assert "16 nodes read badly: use twice as many" in str(found[0].message)


# ------------------------------------------------------------------------------------------------------- recovery
@pytest.mark.parametrize("n_pairs", [16, 64])
def test_angles_are_found_as_well_as_with_the_true_rewards(n_pairs):
    """All 20 seeds, 1,000 users and the free mixtures: benchmarks/circle.py."""
    rewards, angle, pairs, unit = on_a_circle(n_pairs, n_users=300)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        experts, gate, result = fit_nodes(
            GroupTables(20, 32),
            DirectionGate(32),
            pairs,
            unit,
            symmetry_scale=0.5,
            tolerance=1e-6,
            max_iter=100,
        )
    assert experts.n_experts == gate.n_experts in (64, 128) and result.converged
    best = truth(rewards, 64)
    bayes = log_responsibilities(best.loglik(pairs).detach(), best.nodes.log_prior, unit)

    def error(found):
        return np.median(np.abs((found - angle.numpy() + np.pi) % (2 * np.pi) - np.pi))

    found = align_circle(experts.nodes.taste(result.log_q).direction.numpy(), angle.numpy())
    assert error(found) <= 1.15 * error(experts.nodes.taste(bayes).direction.numpy())


def test_the_monitored_objective_never_falls():
    _, _, pairs, unit = on_a_circle(8, n_users=40, n_answers=6)
    for group, n, gate in (
        ("circle", 16, DirectionGate(16)),
        ("cyclic", 3, LearnedWeights(3)),
        ("translations", 64, FixedWeights(log_w=Nodes("translations", 64).log_prior)),
    ):
        result = full_batch_em(
            GroupTables(6, n, group=group),
            gate,
            pairs,
            unit,
            symmetry_breaking="random_heads",
            max_iter=30,
            tolerance=1e-14,
        )
        assert (result.history["objective"].diff().iloc[1:] >= -1e-9).all()
        assert (result.history["elbo"] - result.history["loglik"]).abs().max() < 1e-10


def test_a_concentrated_population_is_found_by_the_gate():
    rewards, _, _, _ = on_a_circle(1)
    draw = np.random.default_rng(0).vonmises(1.0, 4.0, 400)
    pairs, unit = sample_answers(on_circle(torch.from_numpy(draw)) @ rewards, 32, generator(3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, gate, _ = fit_nodes(
            GroupTables(20, 32), DirectionGate(32), pairs, unit, symmetry_scale=0.5, tolerance=1e-6
        )
    assert float(gate.bias.detach().norm()) == pytest.approx(4.0, abs=0.8)


# ----------------------------------------------------------------------------------------- the discrete case; limits
@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_a_cyclic_group_is_a_table_of_its_rewards(k):
    rewards, _, pairs, unit = on_a_circle(8, n_users=30)
    nodes = GroupTables(20, k, group="cyclic")
    nodes.rewards.data = rewards
    free = TabularExperts(20, k)
    turn = 2 * math.pi * torch.arange(k, dtype=torch.float64) / k
    free.rewards.data = turn.cos()[:, None] * rewards[0] + turn.sin()[:, None] * rewards[1]
    torch.testing.assert_close(nodes.loglik(pairs), free.loglik(pairs), atol=1e-6, rtol=0)
    torch.testing.assert_close(nodes.logps(pairs), free.logps(pairs), atol=1e-6, rtol=0)


def test_one_node_is_one_bradley_terry_model():
    _, _, pairs, unit = on_a_circle(8, n_users=30)
    one, node = TabularExperts(20, 1), GroupTables(20, 1, group="cyclic")
    weight = torch.ones(len(pairs), 1).double()
    for _ in range(8):
        one.m_step(pairs, weight), node.m_step(pairs, weight)
    torch.testing.assert_close(node.rewards[:1], one.rewards)


def test_a_turned_basis_is_the_same_model():
    rewards, angle, pairs, unit = on_a_circle(8, n_users=30)
    experts = truth(rewards, 64)
    turned = truth(on_circle(torch.tensor([0.7, 0.7 + math.pi / 2]).double()) @ rewards, 64)
    both = [
        mixture_log_likelihood(one.loglik(pairs).detach(), one.nodes.log_prior, unit)
        for one in (experts, turned)
    ]
    torch.testing.assert_close(*both, atol=1e-6, rtol=0)
    for sign in (1, -1):
        found = align_circle(sign * angle.numpy() + 0.7, angle.numpy())
        np.testing.assert_allclose(np.cos(found - angle.numpy()), 1.0)


def test_what_is_no_group_is_refused():
    for n, group, n_basis, said in (
        (4, "circle", 2, "expected at least 8, 16 to start with"),
        (16, "circle", 1, "n_basis=1 of group='circle': expected 2 basis experts"),
        (16, "circle", 3, "n_basis=3 of group='circle': expected 2 basis experts, whose"),
        (64, "translations", 1, "expected 2 basis experts or more"),
        (65, "translations", 3, "expected a grid of at least 8 nodes a coordinate"),
        (64, "sphere", 2, "possible are 'circle', 'cyclic', 'translations'"),
    ):
        with pytest.raises(ValueError, match=said):
            GroupTables(5, n, group=group, n_basis=n_basis)


def test_a_gate_that_cannot_place_users_on_the_group_is_refused():
    circle = GroupTables(5, 16)
    for gate in (LearnedWeights(16), UserGate.from_metadata({"age": [1, 2]}, 16)):
        with pytest.raises(ValueError, match="a free weight for each node is no density"):
            MixturePolicy(circle, gate)
    with pytest.raises(ValueError, match="expected FixedWeights"):
        MixturePolicy(GroupTables(5, 64, group="translations"), DirectionGate(64))
    with pytest.raises(ValueError, match="have no place on a circle: use UserGate"):
        MixturePolicy(TabularExperts(5, 16), DirectionGate(16))
    MixturePolicy(circle, FixedWeights(log_w=circle.nodes.log_prior))
    MixturePolicy(GroupTables(5, 3, group="cyclic"), LearnedWeights(3))
    with pytest.raises(ValueError, match="are nodes of no group"):
        MixturePolicy(TabularExperts(5, 3), LearnedWeights(3)).taste(torch.zeros(3))
    _, _, pairs, unit = on_a_circle(2, n_users=5, n_answers=5)
    with pytest.raises(ValueError, match="knows one number of nodes"):
        fit_nodes(circle, FixedWeights(log_w=circle.nodes.log_prior), pairs, unit)


# ------------------------------------------------------------------------------------------- serving, speech, keeping
def words(tiny_base, n_experts=16):
    """A policy of the answers of a preference set, its gate told by metadata where users point."""
    data = Pairs.of(preference_rows(n=6))
    experts = GroupTables.of(tiny_base, data, n_experts)
    experts.perturb(1.0, generator(0))
    gate = DirectionGate.from_metadata({"age": [20, 30, 40]}, n_experts)
    gate.weight.data = torch.tensor([[0.0], [2.0]])
    return MixturePolicy(experts, gate, beta=1.0), data


def test_a_user_has_a_density_a_direction_and_a_concentration(tiny_base):
    policy, data = words(tiny_base)
    old, young = (policy.taste(policy.user(metadata={"age": age})) for age in (40, 20))
    assert float(old.direction) == pytest.approx(math.pi / 2, abs=1e-5)
    assert float(young.direction) == pytest.approx(-math.pi / 2, abs=1e-5)
    assert float(old.concentration) == pytest.approx(2.0 * 10 / np.std([20, 30, 40]), rel=1e-3)
    assert float(old.density.sum() * policy.experts.nodes.cell) == pytest.approx(1.0, abs=1e-6)
    own = policy.user(pairs=data, metadata={"age": 30})
    assert float(policy.taste(own).concentration) > float(
        policy.taste(policy.user(metadata={"age": 30})).concentration
    )
    said = policy.predict(data, user=own)
    by_hand = (policy.loglik(data) + own).logsumexp(1).exp()
    torch.testing.assert_close(said, by_hand)


def test_nodes_speak_and_are_kept(tiny_base, tmp_path):
    policy, data = words(tiny_base)
    prompt = data.rows[0]["prompt"]
    who = policy.user(metadata={"age": 40})
    texts = policy.generate([prompt] * 3, user=who, max_new_tokens=8)
    assert set(texts.expert) <= set(range(16)) and len(texts.text) == 3
    policy.save_pretrained(tmp_path / "circle")
    again = MixturePolicy.from_pretrained(tmp_path / "circle", base=tiny_base)
    assert again.experts.nodes == policy.experts.nodes
    torch.testing.assert_close(again.user(metadata={"age": 40}), who)
    torch.testing.assert_close(again.predict(data, user=who), policy.predict(data, user=who))
    assert again.generate([prompt] * 3, user=who, max_new_tokens=8).text == texts.text
