"""A gate of one's own, outside the library: its fifteen lines are fitted, served, saved and loaded."""

import math

import datasets
import numpy as np
import pytest
import torch
from tiny import plain_fit, sentence

import mixdpo_lib as mx
from mixdpo_lib.gates.contract import GATES, Gate
from mixdpo_lib.gates.inputs import log_normal, zero_linear
from mixdpo_lib.store import MixDPOError


class HourGate(Gate):
    """The hour of the comparison: log w = log_softmax(W [sin, cos])."""

    def __init__(self, n_experts, weight_scale=1.0):
        super().__init__(n_experts, reads=("hour",))
        self.outer, self.weight_scale = zero_linear(2, n_experts), weight_scale

    def inputs(self, columns, base):
        angle = torch.tensor(columns["hour"]) * (2 * math.pi / 24)
        return {"angle": torch.stack([angle.sin(), angle.cos()], 1)}

    def logits(self, inputs):
        return self.outer(inputs["angle"])

    def log_prior(self):
        return log_normal([self.outer.weight], self.weight_scale)

    def options(self):
        return {"n_experts": self.n_experts, "weight_scale": self.weight_scale}


HOURS = [*range(7, 18), *range(19, 24), *range(6)]


def rows_by_hour(n, seed):
    """From 7 to 17 o'clock `bright` is wanted, from 19 to 5 `dull`."""
    rng, rows = np.random.default_rng(seed), []
    for i in range(n):
        hour = HOURS[i % len(HOURS)]
        good, bad = ("bright", "dull") if 6 < hour < 18 else ("dull", "bright")
        shared = f"{sentence(rng, 1, 2)} {{}} {sentence(rng, 1, 2)}"
        rows.append({"prompt": sentence(rng, 2, 4), "chosen": shared.format(good)})
        rows[-1] |= {"rejected": shared.format(bad), "ended": False, "hour": hour}
    return datasets.Dataset.from_list(rows)


@pytest.fixture(scope="module")
def policy(tiny_base):
    policy = mx.MixturePolicy(mx.HeadExperts(tiny_base, n_experts=2, rank=4), HourGate(2), beta=0.3)
    config = plain_fit(latent="pair", batch_size=8, passes=5.0, learning_rate=0.02)
    config = config.change(start__temperature=1.0, start__kind="clusters", start__passes=1.0)
    config = config.change(evaluations_per_pass=0.2, evaluate_training=False)
    mx.fit(policy, rows_by_hour(88, seed=0), config)
    return policy


def test_held_out_pairs_are_predicted_by_the_hour(policy):
    held_out = rows_by_hour(44, seed=1)
    probability = policy.predict(held_out)
    assert float((probability > 0.5).float().mean()) > 0.8
    even = policy.predict(held_out, user=torch.full((2,), 0.5).log())
    assert float(probability.log().mean()) > float(even.log().mean()) + 0.2


def test_it_is_served_by_the_hour_and_by_pairs(policy):
    night, noon = policy.user(metadata={"hour": 3}), policy.user(metadata={"hour": 12})
    assert float(night.exp().sum()) == pytest.approx(1.0)
    assert int(night.argmax()) != int(noon.argmax())
    assert float(night.exp().max()) > 0.8 and float(noon.exp().max()) > 0.8
    own = rows_by_hour(22, seed=2).select([17, 18, 19]).remove_columns("hour")
    told = policy.user(pairs=own, metadata={"hour": 3})  # answers of the night: surer than before
    assert float(told[night.argmax()]) > float(night.max())
    with pytest.raises(ValueError, match="give user=policy.user"):
        policy.generate(["the film"], max_new_tokens=2)
    assert len(policy.generate(["the film"], user=night, max_new_tokens=2, seed=0).text) == 1


def test_it_is_saved_and_loaded(policy, tiny_base, tmp_path):
    policy.save_pretrained(tmp_path / "mixture")
    again = mx.MixturePolicy.from_pretrained(tmp_path / "mixture", base=tiny_base)
    assert type(again.gate) is HourGate and again.gate.describe() == policy.gate.describe()
    held_out = rows_by_hour(22, seed=1)
    torch.testing.assert_close(again.predict(held_out), policy.predict(held_out))


def test_where_its_module_was_not_imported_it_is_refused(policy, tiny_base, tmp_path, monkeypatch):
    policy.save_pretrained(tmp_path / "mixture")
    monkeypatch.delitem(GATES, "HourGate")
    with pytest.raises(MixDPOError, match="'HourGate'.*import the module that defines it"):
        mx.MixturePolicy.from_pretrained(tmp_path / "mixture", base=tiny_base)
