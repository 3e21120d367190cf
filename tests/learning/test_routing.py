"""Sparse fits: which experts are computed, how the number falls, what is refused."""

import pytest
import torch
from tiny import plain_fit

import mixdpo_lib as mx
from mixdpo_lib.experts.tables import numbered_answers, numbered_pairs
from mixdpo_lib.learning.routing import Router, Routing, dead_in_routing, routed_share


def chosen(routing, log_w, step=0, passes=0.0):
    return Router(routing, log_w.shape[1], seed=1).chosen(log_w, passes, step)


def test_those_of_largest_weight_and_one_at_random_are_computed():
    log_w = torch.randn(500, 6, generator=torch.Generator().manual_seed(0)).log_softmax(1)
    mask = chosen(Routing(top_s=2), log_w)
    assert bool((mask.sum(1) == 3).all()) and bool(mask.gather(1, log_w.topk(2).indices).all())
    other = mask.scatter(1, log_w.topk(2).indices, False).float().mean(0)
    rest = (1 - torch.zeros(500, 6).scatter(1, log_w.topk(2).indices, 1.0)).mean(0) / 4
    torch.testing.assert_close(other, rest, atol=0.05, rtol=0)
    assert torch.equal(mask, chosen(Routing(top_s=2), log_w))  # of seed and step alone
    assert not torch.equal(mask, chosen(Routing(top_s=2), log_w, step=1))
    assert chosen(Routing(top_s=6), log_w) is None
    one = torch.zeros(3, 1)
    assert chosen(Routing(top_s=1), one) is None


def test_the_number_routed_to_falls_to_s():
    router = Router(Routing(top_s=2, anneal=4.0), 32, seed=0)
    assert [router.n_routed(p) for p in (0, 1, 2, 3, 4, 9)] == [32, 16, 8, 4, 2, 2]
    assert Router(Routing(top_s=2), 32, seed=0).n_routed(0) == 2


def test_dead_experts_by_hand():
    log_w = torch.tensor([[0.5, 0.3, 0.2]] * 9 + [[0.3, 0.5, 0.2]]).log()
    share = routed_share(log_w, 1)
    torch.testing.assert_close(share, torch.tensor([0.9, 0.1, 0.0]))
    assert dead_in_routing(share) == [2]


def test_sparse_fits_are_balanced_unless_told_otherwise():
    weights = [Routing(), Routing(top_s=1), Routing(top_s=1, balance=0.0), Routing(balance=0.5)]
    assert [one.balance_weight(4) for one in weights] == [0.0, 1.0, 0.0, 0.5]


def topics(n_groups, seed=0):
    truth = mx.TabularExperts(6, n_groups)
    truth.perturb(3.0, torch.Generator().manual_seed(seed))
    draw = torch.Generator().manual_seed(seed + 1)
    pairs, topic = truth.sample_pairs(torch.arange(2 * n_groups) % n_groups, 40, draw)
    names = [f"topic {t}" for t in topic.tolist()]
    experts = mx.TabularExperts(6, n_groups, answers=numbered_answers(6))
    gate = mx.UserGate.from_metadata({"topic": names}, n_groups, weight_scale=3.0)
    return mx.MixturePolicy(experts, gate, beta=1.0), numbered_pairs(pairs, 6, topic=names)


def test_a_sparse_fit_of_tables_learns_and_no_expert_dies():
    policy, data = topics(4)
    config = plain_fit(latent="pair", batch_by="pair", batch_size=80, passes=20.0)
    config = config.change(start__kind="clusters", routing=Routing(top_s=1), learning_rate=0.1)
    result = mx.fit(policy, data, config)
    assert result.history["dead_experts"].iloc[-1] == 0
    assert result.history["elbo"].iloc[-1] > -0.45


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"top_s": 0}, "top_s=0: expected at least 1 expert"),
        ({"anneal": 1.0}, "anneal=1.0 without top_s: it says when so few experts"),
        ({"top_s": 1, "entropy": 0.1}, "entropy=0.1 with top_s=1: the one keeps single rows"),
        ({"top_s": 1, "anneal": -1.0}, "anneal=-1.0: expected 0 or above"),
    ],
)
def test_choices_that_cannot_be_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        Routing(**options)


def test_sparse_routing_with_one_latent_a_unit_is_refused():
    with pytest.raises(ValueError, match="top_s=1 with latent='unit': the responsibilities of"):
        mx.FitConfig(routing=Routing(top_s=1))


def test_more_experts_than_there_are_is_refused():
    policy, data = topics(2)
    config = plain_fit(latent="pair", batch_by="pair", routing=Routing(top_s=3))
    with pytest.raises(ValueError, match=r"top_s=3 with 2 experts: expected 1 ... 2"):
        mx.fit(policy, data, config)
