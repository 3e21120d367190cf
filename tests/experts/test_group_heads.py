"""Nodes of a group, on heads: values and gradients against plain operations, the discrete case, speech, leaving."""

import math

import pytest
import torch
from tiny import preference_rows

from mixdpo_lib.data.pairs import Pairs
from mixdpo_lib.experts.group_heads import GroupHeads
from mixdpo_lib.experts.group_logps import NAMES, plain_token_logps
from mixdpo_lib.experts.heads import HeadExperts, prefix_kl
from mixdpo_lib.gates.direction import DirectionGate
from mixdpo_lib.learning.config import FitConfig
from mixdpo_lib.learning.fit import fit
from mixdpo_lib.policy.mixture import MixturePolicy


@pytest.fixture(scope="module")
def data():
    return Pairs.of(preference_rows(n=6))


def moved(tiny_base, data, n=16, **options):
    experts = GroupHeads(tiny_base, n, rank=2, **options)
    experts.start(data)
    experts.perturb(0.5, torch.Generator().manual_seed(0))
    if experts.sharpness is not None:
        experts.sharpness.data = torch.tensor([0.2, -0.3])
    return experts


def by_plain_operations(experts, batch):
    head, bias = experts.active_head()
    inputs = [batch[name] for name in NAMES]
    logps = plain_token_logps(
        inputs,
        experts.down,
        experts.up,
        experts.sharpness,
        experts._coordinates(),
        head,
        bias,
        None,
    )
    return logps.new_zeros(len(batch["text_ref_logps"]), experts.n_experts).index_add(
        0, batch["segment"], logps
    )


@pytest.mark.parametrize("options", [{}, {"sharpness": False}, {"active": "all"}])
def test_values_and_gradients_equal_plain_operations(tiny_base, data, options):
    experts = moved(tiny_base, data, **options)
    batch = experts.batch(experts.constants(data.texts), data.index)
    weight = torch.randn(
        len(batch["text_ref_logps"]), 16, generator=torch.Generator().manual_seed(1)
    )
    found = []
    for logps in (experts.text_logps(batch), by_plain_operations(experts, batch)):
        experts.zero_grad()
        (logps * weight).sum().backward()
        found.append((logps.detach(), [p.grad.clone() for p in experts.parameters()]))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-4, rtol=1e-5)
    for fast, plain in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(fast, plain, atol=1e-4, rtol=1e-4)


def test_a_cyclic_group_is_heads_of_its_sums(tiny_base, data):
    """Free heads whose A stands side by side and whose B and s are sums with c: rank J r."""
    experts = moved(tiny_base, data, 3, group="cyclic")
    free = HeadExperts(tiny_base, 3, rank=4)
    free.activate(experts.active_ids)
    for k in range(3):
        free.down.data[k], free.up.data[k], free.sharpness.data[k] = experts.low_rank(k)
    constants = experts.constants(data.texts)
    batch = experts.batch(constants, data.index)
    torch.testing.assert_close(
        experts.text_logps(batch), free.text_logps(batch), atol=1e-4, rtol=1e-5
    )
    ids = torch.arange(len(data.texts))
    found, wanted = (prefix_kl(one, data.texts, ids) for one in (experts, free))
    assert found == pytest.approx(wanted, rel=1e-4)


def test_opposite_nodes_undo_each_other_to_first_order(tiny_base, data):
    experts = moved(tiny_base, data)
    experts.scale(1e-3)
    batch = experts.batch(experts.constants(data.texts), data.index)
    change = (experts.text_logps(batch) - batch["text_ref_logps"]).detach()
    torch.testing.assert_close(change[:, :8], -change[:, 8:], atol=2e-4, rtol=0.05)


def test_a_circle_is_fitted_served_heard_and_kept(tiny_base, data, tmp_path):
    policy = MixturePolicy(GroupHeads(tiny_base, 16, rank=2), DirectionGate(16))
    result = fit(policy, data, FitConfig(min_steps=60, learning_rate=0.1))
    assert result.history["elbo"].iloc[-1] > result.history["elbo"].iloc[0]
    assert "latents are placed within" in result.summary
    who = policy.user(pairs=data)
    assert -math.pi < float(policy.taste(who).direction) <= math.pi
    prompt = data.rows[0]["prompt"]
    said = policy.generate([prompt] * 3, user=who, max_new_tokens=6)
    policy.save_pretrained(tmp_path / "circle")
    again = MixturePolicy.from_pretrained(tmp_path / "circle", base=tiny_base)
    assert again.generate([prompt] * 3, user=who, max_new_tokens=6).text == said.text
    torch.testing.assert_close(again.predict(data, user=who), policy.predict(data, user=who))


def test_more_nodes_read_the_same_basis(tiny_base, data):
    experts = moved(tiny_base, data)
    batch = experts.batch(experts.constants(data.texts), data.index)
    few = experts.text_logps(batch)
    experts.use_nodes(64)
    torch.testing.assert_close(experts.text_logps(batch)[:, ::4], few, atol=1e-4, rtol=1e-5)
    with pytest.raises(ValueError, match="expected at least 8"):
        experts.use_nodes(4)
