"""Low-rank heads against a plain implementation over the whole vocabulary."""

from dataclasses import replace

import pytest
import torch
from tiny import UNUSED, VOCABULARY, full_logps, preference_rows
from torch import nn

from mixdpo_lib.decoding import sample
from mixdpo_lib.experts import HeadExperts, reference_next_token
from mixdpo_lib.features import Text, gather_positions, pair_features, text_store, tokenise


@pytest.fixture(scope="module")
def data(tiny_base):
    return pair_features(tiny_base, preference_rows(10))


def make(base, data, n_experts=3, active="responses", scale=0.5):
    experts = HeadExperts(base, n_experts, rank=4, active=active)
    experts.activate_responses(data)
    if scale:
        experts.perturb(scale, torch.Generator().manual_seed(7))
    return experts


def batch_of(experts, data, rows=slice(None)):
    return experts.batch(data.texts, experts.constants(data.texts), data.pairs[rows])


def plain(base, experts, data, rows=slice(None)):
    """(pairs, 2, K) and (pairs, 2) by `full_logps`."""
    part = list(data.rows)[rows]
    found = [[full_logps(base, experts, r["prompt"], r[s], r["ended"]) for s in ("chosen", "rejected")] for r in part]
    own = torch.stack([torch.stack([side[0] for side in pair]) for pair in found])
    return own, torch.stack([torch.stack([side[1] for side in pair]) for pair in found])


@pytest.mark.parametrize("active", ["responses", "all"])
def test_log_probabilities_equal_a_plain_implementation(tiny_base, data, active):
    experts = make(tiny_base, data, active=active)
    assert len(experts.active_ids) == (len(VOCABULARY) if active == "all" else len(experts.active_ids) % 1000)
    batch = batch_of(experts, data)
    own, ref = plain(tiny_base, experts, data)
    torch.testing.assert_close(experts.logps(batch), own, atol=2e-4, rtol=1e-5)
    torch.testing.assert_close(experts.ref_logps(batch)[..., 0], ref, atol=2e-4, rtol=1e-5)
    assert (own.std(-1) > 0.05).all()  # the experts do differ


@pytest.mark.parametrize("active", ["responses", "all"])
def test_gradients_equal_a_plain_implementation(tiny_base, data, active):
    experts = make(tiny_base, data, active=active)
    weight = torch.randn(10, 2, 3, generator=torch.Generator().manual_seed(1))
    mine = torch.autograd.grad((experts.logps(batch_of(experts, data)) * weight).sum(), [experts.down, experts.up])
    own, _ = plain(tiny_base, experts, data)
    full = torch.autograd.grad((own * weight).sum(), [experts.down, experts.up])
    for a, b in zip(mine, full, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4 * float(b.abs().max()), rtol=1e-4)


def test_active_tokens_are_those_of_the_training_responses(tiny_base, data):
    found = {i for i, word in enumerate(VOCABULARY) if word in UNUSED}
    part = data.where([True] * 4 + [False] * 6)
    experts = make(tiny_base, part)
    tokens = {t for r in part.rows for s in ("chosen", "rejected")
              for t in tokenise(tiny_base, Text(r["prompt"], r[s], r["ended"]))[1]}  # fmt: skip
    assert set(experts.active_ids.tolist()) == tokens and not found & tokens and 0 not in tokens
    # pairs with tokens outside: they keep the logit of the reference, in values and gradients
    own, _ = plain(tiny_base, experts, data)
    batch = batch_of(experts, data)
    assert (batch["target"] < 0).any()
    torch.testing.assert_close(experts.logps(batch), own, atol=2e-4, rtol=1e-5)
    mine = torch.autograd.grad(experts.logps(batch).sum(), experts.up)[0]
    torch.testing.assert_close(mine, torch.autograd.grad(own.sum(), experts.up)[0], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("active", ["responses", "all"])
def test_probabilities_of_all_tokens_sum_to_one(tiny_base, data, active):
    experts = make(tiny_base, data, active=active, scale=2.0)
    store = text_store(tiny_base, [Text("the film was", word, False) for word in VOCABULARY])
    logps, refs = experts.all_text_logps(store.features, experts.constants(store.features), block=7)
    assert logps.shape == (len(VOCABULARY), 3)
    torch.testing.assert_close(logps.double().logsumexp(0).exp(), torch.ones(3).double(), atol=1e-5, rtol=0)
    assert float(refs.logsumexp(0)) == pytest.approx(0, abs=1e-5)
    untouched = [VOCABULARY[word] for word in UNUSED]
    moved = (logps - refs[:, None])[untouched]  # the inactive tokens: all by the same factor
    assert active == "all" or torch.allclose(moved, moved[:1].expand_as(moved), atol=1e-5)


@pytest.mark.parametrize("active", ["responses", "all"])
def test_zero_heads_are_the_reference(tiny_base, data, active):
    experts = make(tiny_base, data, active=active, scale=0)
    batch = batch_of(experts, data)
    torch.testing.assert_close(experts.logps(batch), experts.ref_logps(batch).expand(-1, -1, 3), atol=2e-6, rtol=1e-6)
    assert torch.equal(experts.down[0], experts.down[2])
    step = experts.next_token(torch.tensor([1]))
    ids, mask = torch.tensor([[2, 5]]), torch.ones(1, 2, dtype=torch.long)
    assert torch.equal(step(ids, mask), reference_next_token(tiny_base)(ids, mask))


def test_perturb_parts_the_experts_by_its_seed(tiny_base, data):
    experts = make(tiny_base, data, scale=0.3)
    assert float(experts.up.detach().std()) == pytest.approx(0.3, rel=0.1)
    assert not torch.equal(experts.up[0], experts.up[1]) and torch.equal(experts.down[0], experts.down[1])
    same, other = make(tiny_base, data, scale=0.3), make(tiny_base, data, scale=0)
    other.perturb(0.3, torch.Generator().manual_seed(8))
    assert torch.equal(same.up, experts.up) and not torch.equal(other.up, experts.up)


def test_a_reads_the_hidden_states_of_the_training_responses(tiny_base, data):
    """Each row has mean square 1/r on them, the first reads their mean, and every expert starts with the same A."""
    experts = make(tiny_base, data)
    ids = torch.unique(data.pairs)
    hidden, _, _ = gather_positions(data.texts, ids)
    read = hidden @ experts.down[0].detach().T
    deviation = read.var(0, correction=0)[1:]
    torch.testing.assert_close(deviation, torch.full_like(deviation, 1 / experts.rank), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(read[:, 0].mean(), torch.tensor(experts.rank**-0.5), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(experts.down[0], down) for down in experts.down)


def test_next_tokens_agree_with_whole_sequences(tiny_base, data):
    experts = make(tiny_base, data)
    texts = [Text("the film", "was very good and bright", True), Text("a long long story", "is dull", True)]
    store = text_store(tiny_base, texts)
    whole, refs = experts.all_text_logps(store.features, experts.constants(store.features))
    speak = experts.next_token(torch.tensor([2, 0]))
    ids = [tokenise(tiny_base, t) for t in texts]
    forced = [iter([*response, *[0] * 9]) for _, response in ids]

    def step(input_ids, mask):  # the sampler asks, the texts answer: only the given token can be drawn
        speak(input_ids, mask)
        logits = torch.full((2, len(VOCABULARY)), -torch.inf)
        for row in range(2):
            logits[row, next(forced[row])] = 0.0
        return logits

    out = sample(step, [p for p, _ in ids], 8, eos_token_id=1, observe=speak.observe,
                 generator=torch.Generator().manual_seed(0))  # fmt: skip
    assert out.tokens == [response[:-1] for _, response in ids]
    ratio, ref = speak.scores()
    for row, expert in enumerate((2, 0)):
        n = len(ids[row][1])
        assert float(ref[row, :n].sum()) == pytest.approx(float(refs[row]), abs=2e-4)
        assert float((ratio + ref)[row, :n].sum()) == pytest.approx(float(whole[row, expert]), abs=2e-4)


def test_rows_of_a_batch_speak_as_their_own_expert(tiny_base, data):
    experts = make(tiny_base, data)
    ids, mask = torch.tensor([[2, 5, 7]]).repeat(4, 1), torch.ones(4, 3, dtype=torch.long)
    mixed = experts.next_token(torch.tensor([0, 2, 0, 1]))(ids, mask)
    for row, k in enumerate([0, 2, 0, 1]):
        alone = experts.next_token(torch.tensor([k]))(ids[:1], mask[:1])
        torch.testing.assert_close(mixed[row], alone[0], atol=1e-5, rtol=1e-5)
    assert (mixed[0] - mixed[1]).abs().max() > 0.1
    torch.testing.assert_close(experts.next_token()(ids, mask), reference_next_token(tiny_base)(ids, mask))


def test_a_text_is_computed_once_in_a_batch(tiny_base, data):
    experts = make(tiny_base, data)
    pairs = torch.stack([data.pairs[0], data.pairs[0].flip(0), data.pairs[1]])
    once = experts.batch(data.texts, experts.constants(data.texts), pairs)
    assert len(once["text_ref_logps"]) == 4 and len(once["hidden"]) == len(batch_of(experts, data, slice(2))["hidden"])
    logps = experts.logps(once)
    assert torch.equal(logps[0], logps[1].flip(0))
    torch.testing.assert_close(logps[[0, 2]], experts.logps(batch_of(experts, data, slice(2))), atol=1e-5, rtol=1e-6)
    grad = torch.autograd.grad(experts.logps(once)[:2].sum(), experts.up)[0]  # two texts, each of them met twice
    one = torch.autograd.grad(experts.logps(batch_of(experts, data, slice(1))).sum(), experts.up)[0]
    torch.testing.assert_close(grad, 2 * one, atol=1e-4, rtol=1e-4)


def test_blocks_and_buffers_do_not_change_the_values(tiny_base, data):
    experts = make(tiny_base, data)
    constants = experts.constants(data.texts)
    one, refs = experts.all_text_logps(data.texts, constants, block=3)
    all_at_once, same = experts.all_text_logps(data.texts, constants, block=100)
    torch.testing.assert_close(one, all_at_once, atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(refs, same)


def test_a_backward_pass_that_comes_too_late_is_refused(tiny_base, data):
    experts = make(tiny_base, data)
    logps = experts.logps(batch_of(experts, data))
    experts.logps(batch_of(experts, data, slice(2)))
    with pytest.raises(RuntimeError, match="overwritten by a later call"):
        logps.sum().backward()


def test_a_head_with_a_bias(tiny_base, data):
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(tiny_base.model.config).eval()
    model.load_state_dict(tiny_base.model.state_dict())
    head = model.lm_head = nn.Linear(32, len(VOCABULARY))
    head.weight.data.copy_(tiny_base.model.get_output_embeddings().weight)
    head.bias.data.copy_(torch.linspace(-1, 1, len(VOCABULARY)))
    base = replace(tiny_base, model=model.requires_grad_(False), fingerprint="with-bias")
    biased = pair_features(base, data.rows)
    experts = make(base, biased)
    own, ref = plain(base, experts, biased, slice(4))
    batch = batch_of(experts, biased, slice(4))
    torch.testing.assert_close(experts.logps(batch), own, atol=2e-4, rtol=1e-5)
    torch.testing.assert_close(experts.ref_logps(batch)[..., 0], ref, atol=2e-4, rtol=1e-5)


def test_loaded_parameters_bring_their_active_tokens(tiny_base, data):
    ours, theirs = make(tiny_base, data), make(tiny_base, data)
    ours.activate(torch.arange(10, 20))
    theirs.activate(torch.arange(20, 30))
    ours._require_active()
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours.logps(batch_of(ours, data)), theirs.logps(batch_of(theirs, data)))


@pytest.mark.parametrize(("options", "message"), [
    ({"n_experts": 0}, "n_experts=0: a mixture needs at least one expert; use 1 for plain DPO"),
    ({"rank": 0}, "rank=0: each head needs a rank of at least 1"),
    ({"active": "some"}, "active='some': possible are 'responses' .* and 'all'"),
])  # fmt: skip
def test_unknown_options_are_refused(tiny_base, options, message):
    with pytest.raises(ValueError, match=message):
        HeadExperts(tiny_base, **options)


def test_a_base_with_other_logits_is_refused(tiny_base, tiny_folder):
    from mixdpo_lib.sources import load_base

    capped = load_base(tiny_folder)
    capped.model.config.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match="final_logit_softcapping=30.0: low-rank heads need plain linear logits"):
        HeadExperts(capped)


def test_experts_without_active_tokens_say_so(tiny_base, data):
    with pytest.raises(ValueError, match="no active tokens yet: call fit, or activate_responses, first"):
        HeadExperts(tiny_base).constants(data.texts)
