"""People on a circle of tastes: who compared what, and where a fit places them."""

import math

import numpy as np
import pytest
import torch

from mixdpo_lib.study.circle_people import people_on_circle, placed


@pytest.fixture(scope="module")
def people():
    draw = torch.Generator().manual_seed(0)
    angle = 2 * math.pi * torch.rand(150, generator=draw, dtype=torch.float64)
    rewards = 2 * torch.randn(2, 12, generator=draw, dtype=torch.float64)
    return people_on_circle(angle, rewards, 100, 32, draw), rewards


def test_people_are_learned_from_or_held_out(people):
    them, _ = people
    assert (
        them.of.bincount().tolist() == [32] * 100 and them.of_held.bincount().tolist() == [32] * 50
    )
    assert len(them.train) == 3200 and len(them.held) == 1600 and len(them.angle) == 150
    assert bool((them.train[:, 0] != them.train[:, 1]).all())


def test_people_are_placed_nearly_as_well_as_by_the_true_rewards(people):
    them, rewards = people
    fit = placed(them, rewards, 16, seed=0)
    users = fit.users
    assert list(users) == ["true", "found", "known_rewards", "spread"] and len(users) == 100
    np.testing.assert_array_equal(users["true"], them.angle[:100].numpy())
    assert bool(users["found"].between(0, 2 * np.pi).all())
    assert 0 < fit.error("known_rewards") < 15  # degrees
    assert fit.error() < 1.3 * fit.error("known_rewards")
    assert fit.log_q.shape == (100, fit.experts.n_experts)
    sign, turn = fit.turn
    own = fit.experts.nodes.taste(fit.log_q).direction.numpy()
    np.testing.assert_allclose(np.cos(sign * own + turn), np.cos(users["found"]), atol=1e-9)


def test_an_error_is_the_shorter_way_round(people):
    them, rewards = people
    fit = placed(them, rewards, 16, seed=0)
    fit.users["found"] = fit.users["true"] + np.radians(350)
    assert fit.error() == pytest.approx(10)
