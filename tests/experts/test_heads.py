"""Low-rank heads against a plain implementation over the whole vocabulary."""

from dataclasses import replace

import pytest
import torch
from tiny import UNUSED, VOCABULARY, full_logps, head_shifts, preference_rows
from torch import nn

from mixdpo_lib.base.features import gather_positions, text_features, tokenise
from mixdpo_lib.data.pairs import Pairs, Text, Texts
from mixdpo_lib.experts import head_voices, low_rank
from mixdpo_lib.experts.heads import HeadExperts
from mixdpo_lib.policy.next_token import MixtureNextToken, NextToken, reference_next_token
from mixdpo_lib.policy.sampling import sample


@pytest.fixture(scope="module")
def data(tiny_base):
    return Pairs.of(preference_rows(10))


def make(base, data, n_experts=3, active="responses", scale=0.5):
    experts = HeadExperts(base, n_experts, rank=4, active=active)
    experts.activate_responses(data)
    if scale:
        experts.perturb(scale, torch.Generator().manual_seed(7))
        with torch.no_grad():
            experts.sharpness.copy_(torch.tensor([0.4, -0.3, 0.0]).repeat(n_experts)[:n_experts])
    return experts


def batch_of(experts, data, rows=slice(None)):
    return experts.batch(experts.constants(data.texts), data.index[rows])


def plain(base, experts, data, rows=slice(None)):
    """(pairs, 2, K) and (pairs, 2) by `full_logps`."""
    part = list(data.rows)[rows]
    found = [
        [full_logps(base, experts, r["prompt"], r[s], r["ended"]) for s in ("chosen", "rejected")]
        for r in part
    ]
    own = torch.stack([torch.stack([side[0] for side in pair]) for pair in found])
    return own, torch.stack([torch.stack([side[1] for side in pair]) for pair in found])


@pytest.mark.parametrize("active", ["responses", "all"])
def test_log_probabilities_equal_a_plain_implementation(tiny_base, data, active):
    experts = make(tiny_base, data, active=active)
    assert len(experts.active_ids) == (
        len(VOCABULARY) if active == "all" else len(experts.active_ids) % 1000
    )
    batch = batch_of(experts, data)
    own, ref = plain(tiny_base, experts, data)
    torch.testing.assert_close(experts.logps(batch), own, atol=2e-4, rtol=1e-5)
    torch.testing.assert_close(experts.ref_logps(batch)[..., 0], ref, atol=2e-4, rtol=1e-5)
    assert (own.std(-1) > 0.05).all()  # the experts do differ


@pytest.mark.parametrize("active", ["responses", "all"])
def test_gradients_equal_a_plain_implementation(tiny_base, data, active):
    experts = make(tiny_base, data, active=active)
    weight = torch.randn(10, 2, 3, generator=torch.Generator().manual_seed(1))
    parameters = [experts.down, experts.up, experts.sharpness]
    mine = torch.autograd.grad((experts.logps(batch_of(experts, data)) * weight).sum(), parameters)
    own, _ = plain(tiny_base, experts, data)
    full = torch.autograd.grad((own * weight).sum(), parameters)
    for a, b in zip(mine, full, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4 * float(b.abs().max()), rtol=1e-4)


def test_active_tokens_are_those_of_the_training_responses(tiny_base, data):
    found = {i for i, word in enumerate(VOCABULARY) if word in UNUSED}
    part = data.where([True] * 4 + [False] * 6)
    experts = make(tiny_base, part)
    tokens = {
        t
        for r in part.rows
        for s in ("chosen", "rejected")
        for t in tokenise(tiny_base, Text(r["prompt"], r[s], r["ended"]))[1]
    }
    assert set(experts.active_ids.tolist()) == tokens and not found & tokens and 0 not in tokens
    # pairs with tokens outside: they keep the logit of the reference, in values and gradients
    own, _ = plain(tiny_base, experts, data)
    batch = batch_of(experts, data)
    assert (batch["target"] < 0).any()
    torch.testing.assert_close(experts.logps(batch), own, atol=2e-4, rtol=1e-5)
    mine = torch.autograd.grad(experts.logps(batch).sum(), experts.up)[0]
    torch.testing.assert_close(
        mine, torch.autograd.grad(own.sum(), experts.up)[0], atol=2e-4, rtol=1e-4
    )


@pytest.mark.parametrize("active", ["responses", "all"])
def test_probabilities_of_all_tokens_sum_to_one(tiny_base, data, active):
    experts = make(tiny_base, data, active=active, scale=2.0)
    store = Texts.of([Text("the film was", word, False) for word in VOCABULARY])
    logps, refs = experts.all_text_logps(
        experts.constants(store), torch.arange(len(store)), block=7
    )
    assert logps.shape == (len(VOCABULARY), 3)
    torch.testing.assert_close(
        logps.double().logsumexp(0).exp(), torch.ones(3).double(), atol=1e-5, rtol=0
    )
    assert float(refs.logsumexp(0)) == pytest.approx(0, abs=1e-5)
    untouched = [VOCABULARY[word] for word in UNUSED]
    moved = (logps - refs)[untouched]  # the inactive tokens: all by the same factor
    assert active == "all" or torch.allclose(moved, moved[:1].expand_as(moved), atol=1e-5)


@pytest.mark.parametrize("active", ["responses", "all"])
def test_zero_heads_are_the_reference(tiny_base, data, active):
    experts = make(tiny_base, data, active=active, scale=0)
    batch = batch_of(experts, data)
    torch.testing.assert_close(
        experts.logps(batch), experts.ref_logps(batch).expand(-1, -1, 3), atol=2e-6, rtol=1e-6
    )
    assert torch.equal(experts.down[0], experts.down[2])
    step = NextToken(experts.base[0], experts, torch.tensor([1]))
    ids, mask = torch.tensor([[2, 5]]), torch.ones(1, 2, dtype=torch.long)
    assert torch.equal(step(ids, mask), reference_next_token(tiny_base)(ids, mask))


def test_perturb_parts_the_experts_by_its_seed(tiny_base, data):
    experts = make(tiny_base, data, scale=0.3)
    assert float(experts.up.detach().std()) == pytest.approx(0.3, rel=0.1)
    assert not torch.equal(experts.up[0], experts.up[1]) and torch.equal(
        experts.down[0], experts.down[1]
    )
    same, other = make(tiny_base, data, scale=0.3), make(tiny_base, data, scale=0)
    other.perturb(0.3, torch.Generator().manual_seed(8))
    assert torch.equal(same.up, experts.up) and not torch.equal(other.up, experts.up)


def test_a_reads_the_hidden_states_of_the_training_responses(tiny_base, data):
    """Each row has mean square 1/r on them, the first reads their mean, and every expert starts with the same A."""
    experts = make(tiny_base, data)
    ids = torch.unique(data.index)
    hidden, _, _ = gather_positions(text_features(tiny_base, data.texts), ids)
    read = hidden @ experts.down[0].detach().T
    deviation = read.var(0, correction=0)[1:]
    torch.testing.assert_close(
        deviation, torch.full_like(deviation, 1 / experts.rank), rtol=1e-3, atol=1e-4
    )
    torch.testing.assert_close(
        read[:, 0].mean(), torch.tensor(experts.rank**-0.5), rtol=1e-4, atol=1e-5
    )
    assert all(torch.equal(experts.down[0], down) for down in experts.down)


def test_next_tokens_agree_with_whole_sequences(tiny_base, data):
    experts = make(tiny_base, data)
    texts = [
        Text("the film", "was very good and bright", True),
        Text("a long long story", "is dull", True),
    ]
    store = Texts.of(texts)
    whole, refs = experts.all_text_logps(experts.constants(store), torch.arange(len(store)))
    speak = NextToken(experts.base[0], experts, torch.tensor([2, 0]))
    ids = [tokenise(tiny_base, t) for t in texts]
    forced = [iter([*response, *[0] * 9]) for _, response in ids]

    def step(
        input_ids, mask
    ):  # the sampler asks, the texts answer: only the given token can be drawn
        speak(input_ids, mask)
        logits = torch.full((2, len(VOCABULARY)), -torch.inf)
        for row in range(2):
            logits[row, next(forced[row])] = 0.0
        return logits

    out = sample(
        step,
        [p for p, _ in ids],
        8,
        eos_token_id=1,
        observe=speak.observe,
        generator=torch.Generator().manual_seed(0),
    )
    assert out.tokens == [response[:-1] for _, response in ids]
    ratio, ref = speak.scores()
    for row, expert in enumerate((2, 0)):
        n = len(ids[row][1])
        assert float(ref[row, :n].sum()) == pytest.approx(float(refs[row]), abs=2e-4)
        assert float((ratio + ref)[row, :n].sum()) == pytest.approx(
            float(whole[row, expert]), abs=2e-4
        )


def test_rows_of_a_batch_speak_as_their_own_expert(tiny_base, data):
    experts = make(tiny_base, data)
    ids, mask = torch.tensor([[2, 5, 7]]).repeat(4, 1), torch.ones(4, 3, dtype=torch.long)
    mixed = NextToken(experts.base[0], experts, torch.tensor([0, 2, 0, 1]))(ids, mask)
    for row, k in enumerate([0, 2, 0, 1]):
        alone = NextToken(experts.base[0], experts, torch.tensor([k]))(ids[:1], mask[:1])
        torch.testing.assert_close(mixed[row], alone[0], atol=1e-5, rtol=1e-5)
    assert (mixed[0] - mixed[1]).abs().max() > 0.1
    torch.testing.assert_close(
        NextToken(
            experts.base[0],
            experts,
        )(ids, mask),
        reference_next_token(tiny_base)(ids, mask),
    )


def test_a_text_is_computed_once_in_a_batch(tiny_base, data):
    experts = make(tiny_base, data)
    pairs = torch.stack([data.index[0], data.index[0].flip(0), data.index[1]])
    once = experts.batch(experts.constants(data.texts), pairs)
    assert len(once["text_ref_logps"]) == 4 and len(once["hidden"]) == len(
        batch_of(experts, data, slice(2))["hidden"]
    )
    logps = experts.logps(once)
    assert torch.equal(logps[0], logps[1].flip(0))
    torch.testing.assert_close(
        logps[[0, 2]], experts.logps(batch_of(experts, data, slice(2))), atol=1e-5, rtol=1e-6
    )
    grad = torch.autograd.grad(experts.logps(once)[:2].sum(), experts.up)[
        0
    ]  # two texts, each of them met twice
    one = torch.autograd.grad(experts.logps(batch_of(experts, data, slice(1))).sum(), experts.up)[0]
    torch.testing.assert_close(grad, 2 * one, atol=1e-4, rtol=1e-4)


def test_blocks_and_buffers_do_not_change_the_values(tiny_base, data):
    experts = make(tiny_base, data)
    constants = experts.constants(data.texts)
    one, refs = experts.all_text_logps(constants, torch.arange(len(data.texts)), block=3)
    all_at_once, same = experts.all_text_logps(constants, torch.arange(len(data.texts)), block=100)
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
    biased = Pairs.of(data.rows)
    experts = make(base, biased)
    own, ref = plain(base, experts, biased, slice(4))
    batch = batch_of(experts, biased, slice(4))
    torch.testing.assert_close(experts.logps(batch), own, atol=2e-4, rtol=1e-5)
    torch.testing.assert_close(experts.ref_logps(batch)[..., 0], ref, atol=2e-4, rtol=1e-5)


def test_loaded_parameters_bring_their_active_tokens(tiny_base, data):
    ours, theirs = make(tiny_base, data), make(tiny_base, data)
    ours.activate(torch.arange(10, 20))
    theirs.activate(torch.arange(20, 30))
    ours.active_head()
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(
        ours.logps(batch_of(ours, data)), theirs.logps(batch_of(theirs, data))
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_experts": 0}, "n_experts=0: a mixture needs at least one expert; use 1 for plain DPO"),
        ({"rank": 0}, "rank=0: each head needs a rank of at least 1"),
        ({"active": "some"}, "active='some': possible are 'responses' .* and 'all'"),
    ],
)
def test_unknown_options_are_refused(tiny_base, options, message):
    with pytest.raises(ValueError, match=message):
        HeadExperts(tiny_base, **options)


def test_experts_without_active_tokens_say_so(tiny_base, data):
    with pytest.raises(
        ValueError,
        match="not fitted: no tokens are active yet; call fit first, or activate_responses",
    ):
        HeadExperts(tiny_base).constants(data.texts)


# -------------------------------------------------------------------------------------------------- some of the experts

ROUTINGS = {
    "spread": torch.eye(3, dtype=torch.bool)[[0, 1, 2, 2, 1, 0, 0, 1, 2, 0]],
    "one for all": torch.eye(3, dtype=torch.bool)[[1] * 10],
    "one never": torch.eye(3, dtype=torch.bool)[[0, 2] * 5],
    "two each": ~torch.eye(3, dtype=torch.bool)[[0, 1, 2, 2, 1, 0, 0, 1, 2, 0]],
    "uneven": torch.arange(30).reshape(10, 3) % 4 == 0,  # one pair has none
    "none": torch.zeros(10, 3, dtype=torch.bool),
}


@pytest.fixture
def computed(monkeypatch):
    """How many (position, expert) the calls of a test have computed, one number a call."""
    counts, function = [], low_rank.LowRankTokenLogps

    class Counting:
        @staticmethod
        def apply(*arguments):
            hidden, down, groups = arguments[0], arguments[1], arguments[10]
            counts.append(len(hidden) * len(down) if groups is None else sum(map(len, groups)))
            return function.apply(*arguments)

    monkeypatch.setattr(low_rank, "LowRankTokenLogps", Counting)
    return counts


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("active", ["responses", "all"])
def test_chosen_experts_equal_the_dense_ones(tiny_base, data, routing, active, computed):
    experts, chosen = make(tiny_base, data, active=active), ROUTINGS[routing]
    weight = torch.randn(10, 2, 3, generator=torch.Generator().manual_seed(1)) * chosen[:, None]
    dense = experts.logps(batch_of(experts, data))
    parameters = [experts.down, experts.up, experts.sharpness]
    full = torch.autograd.grad((dense * weight).sum(), parameters)
    sparse = experts.logps(batch_of(experts, data), chosen)
    torch.testing.assert_close(
        sparse, dense.masked_fill(~chosen[:, None], -torch.inf), atol=2e-5, rtol=1e-6
    )
    loss = (sparse.masked_fill(~chosen[:, None], 0.0) * weight).sum()
    for mine, a in zip(torch.autograd.grad(loss, parameters), full, strict=True):
        torch.testing.assert_close(mine, a, atol=1e-4 * float(a.abs().max()), rtol=1e-4)
    # each chosen (text, expert) once: the texts of these pairs are all different
    lengths = (
        torch.from_numpy(text_features(tiny_base, data.texts).offsets).diff()[data.index].sum(1)
    )
    assert len(torch.unique(data.index)) == 20 and computed == [
        3 * lengths.sum(),
        (lengths[:, None] * chosen).sum(),
    ]


def test_all_experts_chosen_are_the_dense_result_to_the_last_bit(tiny_base, data):
    experts, everyone = make(tiny_base, data), torch.ones(10, 3, dtype=torch.bool)
    found = []
    for chosen in (None, everyone):
        logps = experts.logps(batch_of(experts, data), chosen)
        parameters = [experts.down, experts.up, experts.sharpness]
        found.append([logps, *torch.autograd.grad(logps.square().sum(), parameters)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("routing", [None, "uneven", "one never"])
def test_positions_in_blocks_are_the_positions_at_once(tiny_base, data, routing, monkeypatch):
    experts, chosen = make(tiny_base, data), None if routing is None else ROUTINGS[routing]
    parameters, found = [experts.down, experts.up, experts.sharpness], []
    for block in (7, 1000):
        monkeypatch.setattr(low_rank, "BLOCK", block)
        with torch.no_grad():  # where nothing is kept for a backward pass
            again = experts.logps(batch_of(experts, data), chosen)
        logps = experts.logps(batch_of(experts, data), chosen)
        torch.testing.assert_close(again, logps.detach(), atol=1e-6, rtol=1e-6)
        finite = logps.masked_fill(logps == -torch.inf, 0.0)
        found.append([finite, *torch.autograd.grad(finite.square().sum(), parameters)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5 * float(b.detach().abs().max()), rtol=1e-5)


def test_infinite_entries_leave_no_nan_in_the_gradients(tiny_base, data):
    experts, chosen = make(tiny_base, data), ROUTINGS["spread"]
    logps = experts.logps(batch_of(experts, data), chosen)
    (logps + torch.tensor([0.2, 0.5, 0.3]).log()).logsumexp(
        -1
    ).sum().backward()  # -inf has its place in a sum
    assert experts.up.grad.isfinite().all() and experts.down.grad.isfinite().all()
    assert experts.up.grad.abs().amax((1, 2)).min() > 0
    experts.zero_grad()
    only = torch.zeros(10, 3, dtype=torch.bool)
    only[:, 1] = True
    experts.logps(batch_of(experts, data), only)[..., 1].sum().backward()
    assert experts.up.grad[1].abs().max() > 0 and not experts.up.grad[[0, 2]].any()


def test_a_text_that_pairs_share_is_computed_for_all_their_experts_once(tiny_base, data, computed):
    experts = make(tiny_base, data)
    a, b, c = data.index[0, 0], data.index[0, 1], data.index[1, 0]
    pairs = torch.stack([torch.stack([a, b]), torch.stack([c, a]), torch.stack([a, b])])
    chosen = torch.tensor([[True, False, False], [False, True, False], [True, False, False]])
    batch = experts.batch(experts.constants(data.texts), pairs)
    sparse, dense = experts.logps(batch, chosen), experts.logps(batch)
    torch.testing.assert_close(
        sparse, dense.masked_fill(~chosen[:, None], -torch.inf), atol=2e-5, rtol=1e-6
    )
    length = torch.from_numpy(text_features(tiny_base, data.texts).offsets).diff()
    assert computed[0] == 2 * length[a] + length[b] + length[c]


@pytest.mark.parametrize("block", [3, 100])
def test_all_texts_with_experts_of_their_own(tiny_base, data, block, computed):
    experts = make(tiny_base, data)
    constants = experts.constants(data.texts)
    ids = torch.tensor([4, 0, 9, 9, 2, 7, 5, 1, 3, 11])  # one of them twice, with different experts
    chosen = ROUTINGS["two each"]
    dense, refs = experts.all_text_logps(constants, ids)
    computed.clear()
    sparse, same = experts.all_text_logps(constants, ids, block, chosen)
    torch.testing.assert_close(sparse, dense.masked_fill(~chosen, -torch.inf), atol=2e-5, rtol=1e-6)
    torch.testing.assert_close(same, refs)
    assert (
        sum(computed)
        < 3 * torch.from_numpy(text_features(tiny_base, data.texts).offsets).diff()[ids].sum()
    )


def test_choices_of_another_shape_are_refused(tiny_base, data):
    experts = make(tiny_base, data)
    batch = batch_of(experts, data)
    with pytest.raises(ValueError, match=r"chosen has shape \(9, 3\) .*expected \(10, 3\), bool"):
        experts.logps(batch, torch.ones(9, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"chosen has shape \(20, 2\) .*expected \(20, 3\), bool"):
        experts.text_logps(batch, torch.ones(20, 2, dtype=torch.bool))


def test_only_experts_that_speak_are_computed(tiny_base, data, monkeypatch):
    experts, seen = make(tiny_base, data), []
    monkeypatch.setattr(
        head_voices.HeadGroup,
        "logits",
        lambda self, h, ref, mapped: (
            seen.append((self.expert, self.rows.tolist())),
            ref[self.rows],
        )[1],
    )
    ids, mask = torch.tensor([[2, 5, 7]]).repeat(4, 1), torch.ones(4, 3, dtype=torch.long)
    NextToken(experts.base[0], experts, torch.tensor([2, 0, 2, 2]))(ids, mask)
    assert seen == [(0, [1]), (2, [0, 2, 3])]
    seen.clear()
    log_w = torch.tensor([[0.5, 0.0, 0.5], [0.0, 0.0, 1.0], [0.5, 0.0, 0.5], [0.0, 0.0, 0.4]]).log()
    MixtureNextToken(experts, log_w)(ids, mask)
    assert seen == [(0, [0, 2]), (2, [0, 1, 2, 3])]


# ------------------------------------------------------------------------------------- the mixture by token, enumerated

OPTIONS = [
    {},
    {"temperature": 0.6},
    {"top_k": 4},
    {"top_p": 0.7},
    {"temperature": 1.5, "top_k": 9, "top_p": 0.6},
]


def cut(logits, temperature=1.0, top_k=None, top_p=None):
    """Tempered, truncated and renormalised probabilities of each row, by sorting."""
    p, order = (logits.double() / temperature).softmax(-1).sort(-1, descending=True)
    if top_k is not None:
        p[..., top_k:] = 0
        p /= p.sum(-1, keepdim=True)
    if top_p is not None:
        p[p.cumsum(-1) - p >= top_p] = 0
        p /= p.sum(-1, keepdim=True)
    return torch.zeros_like(p).scatter(-1, order, p)


def conditionals(base, experts, prefixes, **options):
    """p_k(v given prefix), (K, prefixes, vocabulary), from whole passes of the base without a cache."""
    with torch.no_grad():
        out = base.model(input_ids=prefixes, output_hidden_states=True)
        hidden, logits = out.hidden_states[-1][:, -1], out.logits[:, -1]
        mask = torch.zeros(len(VOCABULARY)).index_fill_(0, experts.active_ids, 1.0)
        head = base.model.get_output_embeddings().weight
        shifts = head_shifts(experts, hidden, logits, head)
        return torch.stack([cut(logits + mask * shift, **options) for shift in shifts])


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("weights", [[0.2, 0.5, 0.3], [0.0, 0.4, 0.6]])
def test_every_sequence_of_three_tokens_has_its_probability_under_the_mixture(
    tiny_base, data, options, weights
):
    experts, n = make(tiny_base, data), len(VOCABULARY)
    a, b = torch.cartesian_prod(torch.arange(n), torch.arange(n)).T
    prompt = torch.tensor([[2, 5]])
    grow = [prompt, torch.cat([prompt.expand(n, -1), torch.arange(n)[:, None]], 1)]
    grow.append(torch.cat([prompt.expand(n * n, -1), a[:, None], b[:, None]], 1))
    first, second, third = (
        conditionals(tiny_base, experts, prefixes, **options) for prefixes in grow
    )
    pairs = first[:, 0, :, None] * second  # (K, n, n)
    w = torch.tensor(weights).double()
    whole = torch.einsum("k,kab,kabv->abv", w, pairs, third.reshape(-1, n, n, n)).reshape(n * n, n)
    assert float(whole.sum()) == pytest.approx(1, abs=1e-6)

    possible = whole.sum(1) > 0
    a, b, whole = a[possible], b[possible], whole[possible]
    rows = len(a)
    speak = MixtureNextToken(experts, torch.tensor(weights).log().expand(rows, -1), **options)
    log_p, ids = torch.zeros(rows, 1), prompt.expand(rows, -1)
    for t, taken in enumerate((a, b, None)):
        step = speak(ids, torch.ones(rows, 2 + t, dtype=torch.long))
        torch.testing.assert_close(
            step.double().logsumexp(1), torch.zeros(rows).double(), atol=1e-5, rtol=0
        )
        if taken is None:
            log_p = log_p + step
        else:
            log_p = log_p + step.gather(1, taken[:, None])
            speak.observe(taken)
            ids = taken[:, None]
    torch.testing.assert_close(
        log_p.double().exp(), whole, atol=1e-9, rtol=5e-4
    )  # so the other pairs have 0
    q = w[:, None] * pairs.reshape(3, -1)[:, possible]
    torch.testing.assert_close(
        speak.log_q()[:, 2].double().exp(), (q / q.sum(0)).T, atol=1e-5, rtol=1e-3
    )
    ratio, ref = speak.scores()
    torch.testing.assert_close(
        (ratio + ref).sum(1).double().exp(), whole.sum(1), atol=1e-9, rtol=5e-4
    )


def test_a_token_that_no_expert_says_is_refused(tiny_base, data):
    speak = MixtureNextToken(
        make(tiny_base, data), torch.tensor([[0.2, 0.5, 0.3]] * 2).log(), top_k=1
    )
    log_p = speak(torch.tensor([[2], [5]]), torch.ones(2, 1, dtype=torch.long))
    with pytest.raises(ValueError, match="row 1: token .* has probability 0 under every expert"):
        speak.observe(torch.stack([log_p[0].argmax(), log_p[1].argmin()]))
    speak.observe(log_p.argmax(1))  # nothing was kept of the refused tokens
    assert speak.scores()[0].shape == (2, 1) and speak.log_q().shape == (2, 2, 3)
    with pytest.raises(ValueError, match="top_k=0: expected at least 1"):
        MixtureNextToken(make(tiny_base, data), torch.zeros(1, 1).expand(1, 3) - 2, top_k=0)(
            torch.tensor([[2]]), torch.ones(1, 1, dtype=torch.long)
        )
    with pytest.raises(ValueError, match=r"log_w\[0\]: every expert has weight 0"):
        MixtureNextToken(make(tiny_base, data), torch.full((1, 3), -torch.inf))


# -------------------------------------------------------------------------------------------------------- sharpness


def sharp(base, data, s, active="responses"):
    """One expert that is nothing but sharper."""
    experts = make(base, data, 1, active, scale=0)
    with torch.no_grad():
        experts.sharpness.fill_(s)
    return experts


def next_logps(experts, prefix=(2, 5, 7)):
    """log pi_0(v given prefix), and the reference's, (vocabulary,)."""
    ids, mask = torch.tensor([prefix]), torch.ones(1, len(prefix), dtype=torch.long)
    base, step = experts.base[0], NextToken(experts.base[0], experts, torch.tensor([0]))
    return step(ids, mask).log_softmax(-1)[0], reference_next_token(base)(ids, mask).log_softmax(
        -1
    )[0]


@pytest.mark.parametrize("s", [-0.5, 0.14, 1.0])
def test_with_all_tokens_active_sharpness_is_a_power_of_the_reference(tiny_base, data, s):
    own, ref = next_logps(sharp(tiny_base, data, s, "all"))
    torch.testing.assert_close(own, ((1 + s) * ref).log_softmax(-1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("s", [0.1, 0.5, 1.0])
def test_sharpness_makes_unseen_tokens_no_likelier(tiny_base, data, s):
    """Without the mean their odds would rise by up to exp(s H); with it their share falls."""
    experts = sharp(tiny_base, data, s)
    inactive = torch.ones(len(VOCABULARY), dtype=torch.bool)
    inactive[experts.active_ids] = False
    for prefix in ((2, 5, 7), (3, 1), (9,)):
        own, ref = next_logps(experts, prefix)
        assert 0 < own[inactive].exp().sum() <= ref[inactive].exp().sum() + 1e-6
        lifted = ref + torch.where(inactive, 0.0, s * ref)  # the form without the mean
        assert lifted.softmax(-1)[inactive].sum() > ref[inactive].exp().sum() * 1.05
    first_order = (next_logps(sharp(tiny_base, data, 1e-3))[0][inactive].exp().sum()) / (
        next_logps(experts)[1][inactive].exp().sum()
    )
    assert float(first_order) == pytest.approx(1, abs=1e-5)


def test_the_mean_of_the_active_logits_is_kept_beside_the_other_constants(tiny_base, data):
    experts = make(tiny_base, data)
    features, constants = experts.constants(data.texts)
    logits = tiny_base.model.get_output_embeddings()(torch.from_numpy(features.hidden[:].copy()))
    own = logits[:, experts.active_ids]
    torch.testing.assert_close(
        torch.from_numpy(constants.mean_active), (own.softmax(1) * own).sum(1), atol=1e-5, rtol=1e-5
    )


def test_without_sharpness_there_is_no_number_of_it(tiny_base, data):
    experts = HeadExperts(tiny_base, 2, rank=4, sharpness=False)
    assert experts.sharpness is None and "sharpness" not in experts.state_dict()
    assert experts.options()["sharpness"] is False
    experts.activate_responses(data)
    experts.perturb(0.5, torch.Generator().manual_seed(7))
    zero = make(tiny_base, data, 2)
    with torch.no_grad():
        zero.sharpness.zero_()
    batch = batch_of(experts, data)
    assert torch.equal(experts.logps(batch), zero.logps(batch))  # to the last bit


def test_sharpness_has_a_rate_of_its_own(tiny_base):
    experts = HeadExperts(tiny_base, 2, rank=4, sharpness_rate=0.25, weight_decay=0.1)
    down, up, own = experts.parameter_groups(0.04)
    assert down == {"params": [experts.down], "lr": 0.04}
    assert up == {"params": [experts.up], "lr": 0.04, "weight_decay": 0.05}  # an expert owns half
    assert own == {"params": [experts.sharpness], "lr": 0.01}
    assert len(HeadExperts(tiny_base, 2, sharpness=False).parameter_groups(0.04)) == 2
    with pytest.raises(ValueError, match="weight_decay=-1: expected 0"):
        HeadExperts(tiny_base, 2, weight_decay=-1)
    with pytest.raises(ValueError, match="sharpness_rate=0: expected above 0"):
        HeadExperts(tiny_base, 2, sharpness_rate=0)


def test_scale_is_a_factor_on_the_change_of_the_logits(tiny_base, data):
    experts = make(tiny_base, data, 1)
    ids, mask = torch.tensor([[2, 5, 7]]), torch.ones(1, 3, dtype=torch.long)
    ref = reference_next_token(tiny_base)(ids, mask)
    step = NextToken(tiny_base, experts, torch.tensor([0]))
    change = step(ids, mask) - ref
    experts.scale(0.5)
    step = NextToken(tiny_base, experts, torch.tensor([0]))
    torch.testing.assert_close(step(ids, mask) - ref, 0.5 * change, atol=1e-5, rtol=1e-5)
    assert float(experts.sharpness.detach()) == pytest.approx(0.2)


def test_what_leaves_with_sharpness(tiny_base, data, tmp_path):
    """Merged exactly where a plain head can say it; else refused with the way out."""
    experts = make(tiny_base, data, 1, "all")
    model = experts.as_model(0)
    ids = torch.tensor([[2, 5, 7]])
    own = NextToken(tiny_base, experts, torch.tensor([0]))(ids, torch.ones_like(ids))
    torch.testing.assert_close(
        model(ids).logits[:, -1].log_softmax(-1), own.log_softmax(-1), atol=1e-5, rtol=1e-5
    )
    with pytest.raises(ValueError, match=r"no LoRA can hold it; use merge\(k, folder\)"):
        experts.export_adapter(0, tmp_path / "adapter")
    with pytest.raises(ValueError, match="not all tokens are active or .*: no plain head"):
        make(tiny_base, data, 1).merge(0, tmp_path / "merged")
    assert not list(tmp_path.iterdir())
