"""What is kept of the tokens that were drawn, against log-probabilities over the whole vocabulary."""

import pytest
import torch

from mixdpo_lib.base import read_prompts as kept_prompts
from mixdpo_lib.base.architecture import read_on
from mixdpo_lib.base.read_prompts import read_prompts
from mixdpo_lib.policy.next_token import divergence, divergence_of_some


def random_logits(shape, scale, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("scale", [0.5, 3.0, 8.0])
@pytest.mark.parametrize("moved", [[0], list(range(0, 300, 3)), list(range(300))])
def test_the_divergence_of_some_tokens_is_that_of_all(scale, moved):
    ref, moved = random_logits((20, 300), 4.0), torch.tensor(moved)
    logits = ref.clone()
    logits[:, moved] += random_logits((20, len(moved)), scale, seed=1)
    log_p, log_ref = logits.double().log_softmax(1), ref.double().log_softmax(1)
    kl = (log_p.exp() * (log_p - log_ref)).sum(1)
    wanted = (logits.double().logsumexp(1), ref.double().logsumexp(1), kl)
    for found in (divergence(logits, ref), divergence_of_some(logits, ref, moved)):
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=1e-6, atol=1e-5)


def test_equal_prompts_are_read_once_and_go_on_apart(tiny_base, monkeypatch):
    model = tiny_base.model
    prompts = torch.tensor([[2, 3, 4], [0, 5, 6], [2, 3, 4], [0, 5, 6], [7, 8, 9]])
    mask = (prompts > 0).long()
    after = torch.tensor([[10], [11], [12], [11], [13]])
    longer = torch.cat([mask, torch.ones_like(after)], 1)
    read, forward = [], model.base_model.forward

    def counted(*args, **options):
        read.append(len(options["input_ids"]))
        return forward(*args, **options)

    read_on(model, prompts[:1], mask[:1], None)  # whether its cache can be used is known now
    monkeypatch.setattr(model.base_model, "forward", counted)
    first, cache = read_on(model, prompts, mask, None)
    second, _ = read_on(model, after, longer, cache)
    assert read == [3, 5]
    for i in range(5):
        own = prompts[i : i + 1, int(prompts[i, 0] == 0) :]
        alone = forward(input_ids=own, use_cache=False).last_hidden_state[0, -1]
        torch.testing.assert_close(first[i], alone, atol=1e-5, rtol=0)
        own = torch.cat([own, after[i : i + 1]], 1)
        alone = forward(input_ids=own, use_cache=False).last_hidden_state[0, -1]
        torch.testing.assert_close(second[i], alone, atol=1e-5, rtol=0)


def test_a_batch_of_prompts_is_read_once_for_all_policies_until_a_weight_changes(
    tiny_base, monkeypatch
):
    model = tiny_base.model
    prompts = torch.tensor([[3, 4, 5], [0, 5, 6]])
    mask = (prompts > 0).long()
    after = torch.tensor([[10], [11]])
    longer = torch.cat([mask, torch.ones_like(after)], 1)
    read_prompts(model, prompts[:1], mask[:1])  # whether its cache can be used is known now
    read, forward = [], model.base_model.forward

    def counted(*args, **options):
        read.append(tuple(options["input_ids"].shape))
        return forward(*args, **options)

    monkeypatch.setattr(model.base_model, "forward", counted)
    first, cache = read_prompts(model, prompts, mask)
    one, _ = read_on(model, after, longer, cache)  # writes into the caller's own cache alone
    again, cache = read_prompts(model, prompts, mask)
    other, _ = read_on(model, after, longer, cache)
    assert read == [(2, 3), (2, 1), (2, 1)]
    assert torch.equal(first, again) and torch.equal(one, other)
    read_prompts(model, prompts, torch.ones_like(mask))  # another mask is another batch
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.0)  # written, though nothing changed
    read_prompts(model, prompts, mask)
    assert read[3:] == [(2, 3), (2, 3)]


def test_kept_prompts_stay_within_their_bytes(tiny_base, monkeypatch):
    model = tiny_base.model
    ones = torch.ones(1, 4, dtype=torch.long)
    read_prompts(model, ones, ones)
    size = next(reversed(kept_prompts._kept[model].values()))[2]
    monkeypatch.setattr(kept_prompts, "MOST_BYTES", 2 * size)
    for token in (2, 3, 4):
        read_prompts(model, token * ones, ones)
    ids = [
        torch.frombuffer(bytearray(key[2]), dtype=torch.int64) for key in kept_prompts._kept[model]
    ]
    assert [one[0].item() for one in ids] == [3, 4]
    monkeypatch.setattr(kept_prompts, "MOST_BYTES", 0)
    read_prompts(model, 5 * ones, ones)
    assert len(kept_prompts._kept[model]) == 2  # too large to be kept at all: nothing else goes
