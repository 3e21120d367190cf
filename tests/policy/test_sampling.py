"""Sampling: against known distributions, truncation by hand, endings, padding, repeatability, and what is refused."""

import math

import pytest
import torch

from mixdpo_lib.policy import sampling

P = torch.tensor([0.5, 0.25, 0.15, 0.07, 0.03])


def constant(p: torch.Tensor):
    """A next-token function that always gives the distribution p."""
    return lambda input_ids, mask: p.log().expand(len(input_ids), -1)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def frequencies(p: torch.Tensor, n: int = 20_000, seed: int = 0, **options) -> torch.Tensor:
    out = sampling.sample(constant(p), [[0]] * (n // 20), 20, generator=seeded(seed), **options)
    return torch.bincount(torch.tensor(out.tokens).flatten(), minlength=len(p)).double()


def chi_square(counts: torch.Tensor, p: torch.Tensor) -> float:
    expected = p.double() * counts.sum()
    assert (counts[p == 0] == 0).all()
    return float(((counts - expected) ** 2 / expected)[p > 0].sum())


def test_plain_sampling_follows_the_distribution():
    assert chi_square(frequencies(P), P) < 18.5  # 4 degrees of freedom: 0.999 quantile


def test_temperature_divides_the_logits():
    sharper = P.log().div(0.5).softmax(-1)
    assert chi_square(frequencies(P, temperature=0.5), sharper) < 18.5


def test_sampling_over_a_vocabulary_of_several_blocks():
    """1,000 tokens in four blocks, the last one padded; most of the mass on tokens at the edges of blocks."""
    p = torch.full((1000,), 1e-4)
    p[[0, 255, 256, 511, 999]] = 0.18
    p[300] = 0.0
    p = p / p.sum()
    counts = frequencies(p, n=100_000)
    assert counts[300] == 0
    grouped = torch.tensor([0, 255, 256, 511, 999])
    rest = torch.ones(1000, dtype=torch.bool)
    rest[grouped] = False
    counts = torch.cat([counts[grouped], counts[rest].sum()[None]])
    assert (
        chi_square(counts, torch.cat([p[grouped], p[rest].sum()[None]])) < 20.5
    )  # 5 degrees of freedom


def test_draw_inverts_the_cumulative_distribution():
    u = torch.tensor([0.0, 0.4999, 0.5, 0.7499, 0.75, 0.97, 1 - 1e-16], dtype=torch.float64)
    shares = torch.tensor([0.5, 0.25, 0.0, 0.21875, 0.03125, 0.0])  # sums without rounding
    assert sampling.draw(shares.expand(7, 6), u).tolist() == [0, 0, 1, 1, 3, 4, 4]


def test_rare_tokens_behind_a_long_sum_are_not_lost():
    """A share of 1e-10 at the end of 49,152 tokens: lost if the running total were kept in float32."""
    shares = torch.ones(1, 49_152)
    shares[0, -1] = 1e-6
    width = 1e-6 / 49_151
    for where, token in [(1 - 0.5 * width, 49_151), (1 - 1.5 * width, 49_150)]:
        assert sampling.draw(shares, torch.tensor([where], dtype=torch.float64)).item() == token


def test_a_share_of_zero_is_never_drawn():
    shares = torch.zeros(50_000, 700)
    shares[:, [3, 600]] = torch.tensor([1.0, 3.0])
    drawn = sampling.draw(shares, torch.rand(50_000, dtype=torch.float64, generator=seeded()))
    assert set(drawn.tolist()) == {3, 600}
    assert (drawn == 600).double().mean().item() == pytest.approx(0.75, abs=0.01)


def test_top_k_keeps_the_most_likely():
    kept = torch.tensor([0.5, 0.25, 0.15, 0.0, 0.0])
    assert chi_square(frequencies(P, top_k=3), kept / kept.sum()) < 13.9
    assert chi_square(frequencies(P, top_k=50), P) < 18.5


@pytest.mark.parametrize("top_p, size", [(0.4, 1), (0.6, 2), (0.76, 3), (0.95, 4), (1.0, 5)])
def test_top_p_keeps_the_smallest_set(top_p, size):
    order = torch.tensor([3, 0, 4, 1, 2])
    p = P[order]
    kept = torch.where(order < size, p, 0.0)
    assert chi_square(frequencies(p, top_p=top_p), kept / kept.sum()) < 18.5


def test_top_p_of_a_flat_distribution_looks_beyond_the_first_guess():
    p = torch.full((2000,), 1 / 2000)
    ids, shares = sampling._nucleus(p.log().expand(2, -1), 0.5)
    assert (shares > 0).sum(-1).tolist() == pytest.approx([1000, 1000], abs=1)


def test_top_p_after_top_k_is_measured_on_what_is_left():
    # of the top 3, renormalised .556, .278, .167: .8 needs the first two (.833)
    counts = frequencies(P, top_k=3, top_p=0.8)
    kept = torch.tensor([0.5, 0.25, 0.0, 0.0, 0.0])
    assert chi_square(counts, kept / kept.sum()) < 10.9


@pytest.mark.parametrize(
    "options, kept",
    [
        ({}, P),
        ({"temperature": 0.5}, P**2),
        ({"top_k": 2}, torch.tensor([0.5, 0.25, 0.0, 0.0, 0.0])),
        ({"top_p": 0.8}, torch.tensor([0.5, 0.25, 0.15, 0.0, 0.0])),
        ({"top_k": 3, "top_p": 0.8}, torch.tensor([0.5, 0.25, 0.0, 0.0, 0.0])),
        (
            {"temperature": 0.5, "top_k": 3, "top_p": 0.75},
            torch.tensor([0.25, 0.0625, 0.0, 0.0, 0.0]),
        ),
    ],
)
def test_truncated_log_probs_are_those_that_are_drawn_from(options, kept):
    order = torch.tensor([3, 0, 4, 1, 2])
    found = sampling.truncated_log_probs(P[order].log()[None], **options)[0].exp()
    torch.testing.assert_close(
        found, (kept / kept.sum())[order].to(found.dtype), atol=1e-6, rtol=1e-5
    )
    seen = frequencies(P[order], **options)
    assert not seen[found == 0].any() and chi_square(seen, found) < 18.5


def chain(input_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """A Markov chain over four tokens; the last column decides."""
    table = torch.tensor(
        [[0.1, 0.4, 0.3, 0.2], [0.5, 0.1, 0.2, 0.2], [0.3, 0.3, 0.2, 0.2], [0.25, 0.25, 0.25, 0.25]]
    )
    return table[input_ids[:, -1]].log()


def test_sequences_follow_a_markov_chain():
    out = sampling.sample(chain, [[0]] * 20_000, 2, generator=seeded())
    pairs = torch.tensor(out.tokens)
    counts = torch.bincount(pairs[:, 0] * 4 + pairs[:, 1], minlength=16).double()
    table = chain(torch.arange(4)[:, None], torch.ones(4, 1)).exp()
    assert chi_square(counts, (table[0][:, None] * table).flatten()) < 37.7  # 15 degrees of freedom


def test_greedy_takes_the_most_likely():
    out = sampling.sample(chain, [[0], [2, 1]], 4, greedy=True)
    assert out.tokens == [[1, 0, 1, 0], [0, 1, 0, 1]]
    assert out.ended == [False, False]


def test_rows_end_at_the_end_token_and_are_fed_padding():
    seen = []

    def counting(input_ids, mask):
        seen.append((input_ids.clone(), mask.clone()))
        return torch.eye(6)[(input_ids[:, -1] + 1) % 6].log()

    out = sampling.sample(counting, [[1], [0, 3]], 6, eos_token_id=5, pad_id=0, generator=seeded())
    assert out.tokens == [[2, 3, 4], [4]]
    assert out.ended == [True, True]
    assert seen[0][0].tolist() == [[0, 1], [0, 3]] and seen[0][1].tolist() == [[0, 1], [1, 1]]
    assert [ids.flatten().tolist() for ids, _ in seen[1:]] == [
        [2, 4],
        [3, 0],
        [4, 0],
    ]  # row 1 ended: padding
    assert [mask.shape[1] for _, mask in seen] == [2, 3, 4, 5]
    assert len(seen) == 4  # stops when every row has ended


def test_the_budget_cuts_rows_off():
    out = sampling.sample(
        lambda i, m: torch.eye(6)[(i[:, -1] + 1) % 6].log(), [[0]], 3, eos_token_id=5, greedy=True
    )
    assert out == sampling.Decoded([[1, 2, 3]], [False])


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"top_k": 3}, {"top_p": 0.8}])
def test_a_row_does_not_depend_on_the_rows_beside_it(options):
    prompts = [[0], [1], [2, 3], [3, 1, 2], [2]]
    whole = sampling.sample(chain, prompts, 8, eos_token_id=3, generator=seeded(5), **options)
    again = sampling.sample(chain, prompts, 8, eos_token_id=3, generator=seeded(5), **options)
    assert whole == again
    split = seeded(5)  # the same stream, read by two calls
    first = sampling.sample(chain, prompts[:2], 8, eos_token_id=3, generator=split, **options)
    second = sampling.sample(chain, prompts[2:], 8, eos_token_id=3, generator=split, **options)
    assert first.tokens + second.tokens == whole.tokens
    assert first.ended + second.ended == whole.ended
    assert (
        sampling.sample(chain, prompts, 8, eos_token_id=3, generator=seeded(6), **options) != whole
    )


def test_rows_may_belong_to_different_experts():
    """The expert of a row is drawn once; its text then follows that expert alone."""
    experts = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    z = torch.tensor([0, 1]).repeat(500)
    out = sampling.sample(lambda ids, mask: experts[z].log(), [[0]] * 1000, 20, generator=seeded())
    tokens = torch.tensor(out.tokens).double()
    assert tokens[z == 0].mean().item() == pytest.approx(0.1, abs=0.01)
    assert tokens[z == 1].mean().item() == pytest.approx(0.8, abs=0.01)


def test_posterior_weighted_tokens_equal_an_expert_drawn_once():
    """Weighting next-token distributions by the posterior of z given the text so far is the same distribution."""
    w = torch.tensor([0.4, 0.6], dtype=torch.float64)
    experts = torch.tensor([[0.9, 0.1], [0.2, 0.8]], dtype=torch.float64)
    for first in (0, 1):
        for second in (0, 1):
            drawn_once = (w * experts[:, first] * experts[:, second]).sum()
            posterior = w * experts[:, first] / (w * experts[:, first]).sum()
            by_token = (w @ experts)[first] * (posterior @ experts)[second]
            assert drawn_once.item() == pytest.approx(by_token.item(), abs=1e-12)


def test_progress_is_told_after_each_step():
    told = []
    sampling.sample(
        constant(P),
        [[0]],
        3,
        generator=seeded(),
        progress=lambda done, total: told.append((done, total)),
    )
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_left_pad():
    ids, mask = sampling.left_pad([[1, 2, 3], [4]], pad_id=9)
    assert ids.tolist() == [[1, 2, 3], [9, 9, 4]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"temperature": 0.0}, "temperature=0.0: expected above 0; use greedy=True"),
        ({"temperature": math.nan}, "temperature=nan: expected above 0"),
        ({"top_k": 0}, "top_k=0: expected at least 1"),
        ({"top_p": 0.0}, "top_p=0.0: expected above 0 and at most 1"),
        ({"top_p": 1.2}, "top_p=1.2: expected above 0 and at most 1"),
        ({"greedy": True, "top_k": 5}, "greedy=True takes the most likely token"),
        ({"generator": None}, "sampling needs a generator"),
        ({"max_new_tokens": 0}, "max_new_tokens=0: expected at least 1"),
    ],
)
def test_bad_options_are_refused(options, message):
    arguments = {"max_new_tokens": 2, "generator": seeded()} | options
    with pytest.raises(ValueError, match=message):
        sampling.sample(constant(P), [[0]], **arguments)


def test_bad_prompts_and_logits_are_refused():
    with pytest.raises(ValueError, match=r"prompt_ids\[1\] is empty; expected at least one token"):
        sampling.sample(constant(P), [[0], []], 2, generator=seeded())
    with pytest.raises(ValueError, match="prompt_ids is empty"):
        sampling.sample(constant(P), [], 2, generator=seeded())
    with pytest.raises(
        ValueError, match=r"step gave logits of shape \(1, 5\); expected \(2, vocabulary\)"
    ):
        sampling.sample(lambda i, m: P.log()[None], [[0], [1]], 2, generator=seeded())
    for bad in (math.nan, math.inf):
        logits = torch.zeros(2, 4)
        logits[1, 2] = bad
        with pytest.raises(RuntimeError, match="step 0, row 1: the largest logit is"):
            sampling.sample(lambda i, m, logits=logits: logits, [[0], [1]], 2, generator=seeded())
    with pytest.raises(RuntimeError, match="row 0: the largest logit is -inf"):
        sampling.sample(lambda i, m: torch.full((1, 3), -math.inf), [[0]], 2, generator=seeded())


@pytest.mark.parametrize("spread", [0.3, 3.0, 12.0])
@pytest.mark.parametrize("top_p", [0.05, 0.9, 0.9999])
def test_the_nucleus_is_that_of_a_whole_sort(spread, top_p):
    logits = torch.randn(40, 5000, generator=seeded()) * spread
    ids, shares = sampling._nucleus(logits, top_p)  # noqa: SLF001
    p, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
    p = p.masked_fill(p.double().cumsum(-1) - p >= top_p, 0.0)
    width = ids.shape[1]
    assert (p[:, width:] == 0).all()
    torch.testing.assert_close(shares, p[:, :width])
    assert torch.equal(ids[shares > 0], order[:, :width][p[:, :width] > 0])
