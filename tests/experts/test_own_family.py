"""A family of experts of one's own, outside the library: fitted, heard, saved and loaded by its few lines."""

import pytest
import torch
from tiny import plain_fit, preference_rows
from torch import nn

import mixdpo_lib as mx
from mixdpo_lib.base.architecture import read_on
from mixdpo_lib.base.features import gather_positions, text_features
from mixdpo_lib.base.head import head_logits
from mixdpo_lib.data.pairs import Pairs
from mixdpo_lib.experts.contract import FAMILIES, Experts, Voices
from mixdpo_lib.store import MixDPOError


class ShiftExperts(Experts):
    """One number a word and expert: log pi_k = log_softmax(base logits + b_k)."""

    def __init__(self, base, n_experts=2):
        super().__init__(base, n_experts)
        size = base.model.get_output_embeddings().weight.shape[0]
        self.shift = nn.Parameter(torch.zeros(n_experts, size))

    def options(self):
        return {"n_experts": self.n_experts}

    def perturb(self, scale, generator):
        self.shift.data = torch.randn(self.shift.shape, generator=generator) * scale

    def constants(self, texts):
        return text_features(self.base[0], texts)

    def batch(self, constants, pairs):
        ids, place = torch.unique(pairs, return_inverse=True)
        hidden, positions, segment = gather_positions(constants, ids)
        target = torch.from_numpy(constants.tokens)[positions]
        batch = {"target": target, "segment": segment, "place": place}
        batch["logits"] = head_logits(self.base[0], hidden).detach()[:, None]
        return batch | {"text_ref_logps": summed(batch["logits"], batch, len(ids))}

    def text_logps(self, batch, chosen=None):
        logps = summed(batch["logits"] + self.shift, batch, len(batch["text_ref_logps"]))
        return logps if chosen is None else logps.masked_fill(~chosen, -torch.inf)

    def voices(self, chosen):
        return ShiftVoices(self, chosen)


def summed(logits, batch, n_texts):
    """log-probabilities of the response tokens, summed by text: (texts, experts), nats."""
    logps = logits.log_softmax(-1)[torch.arange(len(logits)), :, batch["target"]]
    return torch.zeros(n_texts, logps.shape[1]).index_add(0, batch["segment"], logps)


class ShiftVoices(Voices):
    """One pass of the base, and the shift of each expert that some row chose."""

    def __init__(self, experts, chosen):
        self.experts, self.chosen, self.cache = experts, chosen, None

    def reorder(self, source):
        self.cache.reorder_cache(source)

    def __call__(self, input_ids, mask):
        base = self.experts.base[0]
        hidden, self.cache = read_on(base.model, input_ids, mask, self.cache)
        plain, said = head_logits(base, hidden), []
        for k in range(0 if self.chosen is None else self.experts.n_experts):
            if len(rows := self.chosen[:, k].nonzero().squeeze(1)):
                said.append((k, rows, plain[rows] + self.experts.shift[k].detach()))
        return plain, said


@pytest.fixture(scope="module")
def data():
    return Pairs.of(preference_rows(n=48))


@pytest.fixture(scope="module")
def policy(tiny_base, data):
    policy = mx.MixturePolicy(ShiftExperts(tiny_base), mx.LearnedWeights(2), beta=0.3)
    mx.fit(policy, data, plain_fit(passes=20.0, learning_rate=0.05, evaluations_per_pass=0.2))
    return policy


def test_it_starts_as_the_reference(tiny_base, data):
    experts = ShiftExperts(tiny_base)
    logps, refs = experts.all_text_logps(experts.constants(data.texts), torch.arange(8))
    torch.testing.assert_close(logps, refs.expand(8, 2))


def test_a_fit_parts_the_groups(policy, data):
    q = policy.posterior(data)
    best = dict(zip(q.index, q.to_numpy().argmax(1), strict=True))
    assert best["user0"] == best["user2"] != best["user1"] == best["user3"]
    assert q.to_numpy().max(1).min() > 0.9


def test_it_writes(policy):
    word = policy.base.tokenizer("bright")["input_ids"][0]
    fond = int(policy.experts.shift[:, word].argmax())
    texts = {}
    for k in range(2):
        user = torch.full((2,), -torch.inf).index_fill(0, torch.tensor([k]), 0.0)
        prompts = ["the film was"] * 40
        said = policy.generate(prompts, user=user, max_new_tokens=8, seed=0)
        texts[k] = " ".join(said.text).split()
    assert texts[fond].count("bright") > texts[1 - fond].count("bright")


def test_it_is_saved_and_loaded(policy, data, tiny_base, tmp_path):
    policy.save_pretrained(tmp_path / "mixture")
    again = mx.MixturePolicy.from_pretrained(tmp_path / "mixture", base=tiny_base)
    assert type(again.experts) is ShiftExperts
    torch.testing.assert_close(again.loglik(data), policy.loglik(data))


def test_where_its_module_was_not_imported_it_is_refused(policy, tiny_base, tmp_path, monkeypatch):
    policy.save_pretrained(tmp_path / "mixture")
    monkeypatch.delitem(FAMILIES, "ShiftExperts")
    with pytest.raises(MixDPOError, match="'ShiftExperts'.*import the module that defines it"):
        mx.MixturePolicy.from_pretrained(tmp_path / "mixture", base=tiny_base)


def test_leaving_the_mixture_is_refused_by_default(policy, tmp_path):
    with pytest.raises(ValueError, match="ShiftExperts have no adapter to export"):
        policy.experts.export_adapter(0, tmp_path / "adapter")
    with pytest.raises(ValueError, match="ShiftExperts change no model"):
        policy.experts.merge(0, tmp_path / "model")
    with pytest.raises(ValueError, match="k=2: expected an expert from 0 to 1"):
        policy.experts.export_adapter(2, tmp_path / "adapter")
    assert not list(tmp_path.iterdir())
