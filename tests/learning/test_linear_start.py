"""Units part before anything is trained: EM on linear rewards of the answers' mean states."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import normalized_mutual_info_score
from tiny import plain_fit, preference_rows

from mixdpo_lib.base.features import text_features
from mixdpo_lib.data.pairs import Pairs
from mixdpo_lib.elbo import log_responsibilities
from mixdpo_lib.evaluation import align_circle
from mixdpo_lib.experts.groups import Nodes
from mixdpo_lib.experts.heads import HeadExperts
from mixdpo_lib.experts.tables import TabularExperts
from mixdpo_lib.gates.weights import FixedWeights, LearnedWeights
from mixdpo_lib.learning.fit import fit
from mixdpo_lib.learning.learner import Learner
from mixdpo_lib.learning.linear_start import (
    answer_states,
    directions,
    linear_em,
    linear_log_q,
)
from mixdpo_lib.learning.starts import random_log_q
from mixdpo_lib.policy.mixture import MixturePolicy
from mixdpo_lib.store import MixDPOError


def answered(rewards, unit, read, seed=0):
    """`read` turned so that the chosen answer comes first: margins of each unit's own linear reward."""
    draw = torch.Generator().manual_seed(seed)
    margin = (read * rewards[unit]).sum(1)
    flip = torch.rand(len(read), generator=draw).double() > margin.sigmoid()
    return torch.where(flip[:, None], -read, read)


def drawn(n_units, n_pairs, size, seed=0):
    draw = torch.Generator().manual_seed(seed)
    unit = torch.arange(n_units).repeat_interleave(n_pairs)
    return unit, torch.randn(len(unit), size, generator=draw).double()


@pytest.mark.parametrize("seed", range(3))
def test_groups_are_parted(seed):
    unit, read = drawn(45, 40, 12, seed)
    group = torch.arange(45) % 3
    rewards = 2.0 * torch.eye(12).double()[:3][group]
    read = answered(rewards, unit, read, seed)
    prior = torch.zeros(3).double().log_softmax(0)
    for start in range(2):
        score, log_q, _ = linear_em(
            read, unit, torch.eye(3).double(), prior, random_log_q(45, 3, start)
        )
        assert normalized_mutual_info_score(group, log_q.argmax(1)) == 1.0
        assert -0.6931 < score < 0
        torch.testing.assert_close(log_q.exp().sum(1), torch.ones(45).double())


def test_angles_are_found():
    unit, read = drawn(60, 60, 6)
    angle = torch.linspace(0, 2 * np.pi, 61)[:-1].double()
    rewards = torch.zeros(60, 6).double()
    rewards[:, 2], rewards[:, 4] = 2 * angle.cos(), 2 * angle.sin()
    nodes = Nodes("circle", 32)
    read = answered(rewards, unit, read)
    _, log_q, _ = linear_em(
        read, unit, nodes.coordinates, nodes.log_prior, nodes.random_log_q(60, seed=0)
    )
    found = align_circle(nodes.taste(log_q).direction.numpy(), angle.numpy())
    assert np.cos(found - angle.numpy()).mean() > 0.98


def test_one_expert_is_a_logistic_regression():
    """K = 1: the score is that of scikit-learn's regression with the same prior."""
    unit, read = drawn(5, 60, 4)
    read = answered(torch.tensor([[1.0, -0.5, 0.0, 2.0]]).double().expand(5, -1), unit, read)
    score, log_q, _ = linear_em(
        read, unit, torch.ones(1, 1).double(), torch.zeros(1).double(), torch.zeros(5, 1).double()
    )
    both = np.concatenate([read.numpy(), -read.numpy()])
    label = np.repeat([1, 0], len(read))
    plain = LogisticRegression(C=0.5, fit_intercept=False, tol=1e-10).fit(both, label)
    beta = torch.from_numpy(plain.coef_[0])
    loglik = torch.nn.functional.logsigmoid(read @ beta).sum() - beta.square().sum() / 2
    assert score == pytest.approx(float(loglik) / len(read), abs=1e-9)
    assert log_q.abs().max() == 0


def test_where_it_ends_is_a_maximum():
    """Responsibilities are those of the weighted regressions that they imply."""
    unit, read = drawn(20, 30, 5, seed=3)
    rewards = torch.eye(5).double()[torch.arange(20) % 2] * 1.5
    read = answered(rewards, unit, read)
    prior = torch.tensor([0.4, 0.6]).double().log()
    _, log_q, _ = linear_em(read, unit, torch.eye(2).double(), prior, random_log_q(20, 2, 0))
    both, label = np.concatenate([read.numpy(), -read.numpy()]), np.repeat([1, 0], len(read))
    loglik = []
    for k in range(2):
        weight = np.tile(log_q.exp()[unit, k].numpy(), 2)
        plain = LogisticRegression(C=0.5, fit_intercept=False, tol=1e-10, max_iter=1000)
        beta = torch.from_numpy(plain.fit(both, label, weight).coef_[0])
        loglik.append(torch.nn.functional.logsigmoid(read @ beta))
    again = log_responsibilities(torch.stack(loglik, 1), prior, unit)
    torch.testing.assert_close(again.exp(), log_q.exp(), atol=1e-3, rtol=0)


def test_directions_have_mean_square_1():
    differences = torch.randn(500, 6, generator=torch.Generator().manual_seed(0)).double()
    differences = differences @ torch.diag(torch.tensor([5.0, 4, 3, 2, 1, 0]).double())
    read = differences @ directions(differences, 4)
    torch.testing.assert_close(read.T @ read / 500, torch.eye(4).double(), atol=1e-8, rtol=0)
    flat = directions(torch.ones(9, 3).double())
    assert flat.shape == (3, 1)  # there are no more


def test_states_are_the_means_of_the_answers(tiny_base):
    data = Pairs.of(preference_rows())
    states, place = answer_states(tiny_base, data, block=5)
    features = text_features(tiny_base, data.texts)
    for pair in (0, 7):
        for side in (0, 1):
            text = int(data.index[pair, side])
            a, b = features.offsets[text : text + 2]
            own = torch.from_numpy(np.array(features.hidden[a:b])).mean(0).double()
            torch.testing.assert_close(states[place[pair, side]], own, atol=1e-6, rtol=1e-5)


def test_a_fit_starts_from_it(tiny_base):
    data = Pairs.of(preference_rows())
    unit = data.units("user")[0]
    config = plain_fit(passes=2.0, batch_size=8).change(start__kind="linear", latent="unit")
    policy = MixturePolicy(HeadExperts(tiny_base, 2, rank=2), LearnedWeights(2))
    own = linear_log_q(tiny_base, data, unit, 2, config.seed)
    learner = Learner(policy, data, unit, config, 3)
    torch.testing.assert_close(learner.start_log_q, own.float())
    assert learner.starting() and not torch.equal(own, random_log_q(len(own), 2, config.seed))
    assert fit(policy, data, config).history["elbo"].notna().all()
    one = MixturePolicy(HeadExperts(tiny_base, 1, rank=2), FixedWeights.uniform(1))
    assert Learner(one, data, unit, config, 3).start_log_q.abs().max() == 0  # nothing to part


def test_what_it_cannot_part(tiny_base):
    data = Pairs.of(preference_rows())
    with pytest.raises(MixDPOError, match="found a latent for each pair, expected several pairs"):
        linear_log_q(tiny_base, data, torch.arange(len(data)), 2, 0)
    with pytest.raises(MixDPOError, match="found experts without a base"):
        linear_log_q(TabularExperts(3, 2).base[0], data, data.units("user")[0], 2, 0)
