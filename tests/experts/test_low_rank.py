"""The fast log-probabilities of many heads against plain operations in float64, values and gradients."""

from itertools import pairwise

import pytest
import torch

from mixdpo_lib.experts import low_rank

EXPERTS, RANK, HIDDEN, TOKENS, LENGTHS = 3, 4, 16, 50, (3, 9, 1, 12, 6)


def draw(scale=1.0, inactive=1.0):
    """Batch, (A, B, s), head and bias in float64; a token in eight is not active."""
    g = torch.Generator().manual_seed(3)

    def normal(*size):
        return torch.randn(*size, generator=g, dtype=torch.float64)

    n = sum(LENGTHS)
    batch = {
        "hidden": normal(n, HIDDEN),
        "target": torch.arange(n) % TOKENS - (torch.arange(n) % 8 == 0) * TOKENS,
        "token_logit": normal(n),
        "lse_inactive": normal(n) + inactive,
        "mean_active": normal(n),
        "segment": torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS)),
        "text_ref_logps": torch.zeros(len(LENGTHS), 1),
    }
    batch["target"].clamp_(min=-1)
    down, up = normal(EXPERTS, RANK, HIDDEN) / 4, normal(EXPERTS, HIDDEN, RANK) / 4 * scale
    return (
        batch,
        (down, up, torch.tensor([0.4, -0.3, 0.0]).double()),
        normal(TOKENS, HIDDEN),
        normal(TOKENS),
    )


def plainly(batch, parameters, head, bias):
    """log pi_k of the texts by its definition: all logits at once, autograd."""
    down, up, sharpness = parameters
    z = batch["hidden"] @ head.T + (0 if bias is None else bias)
    shift = torch.einsum("pd,krd,khr,vh->kpv", batch["hidden"], down, up, head)
    s = torch.zeros(EXPERTS).double() if sharpness is None else sharpness
    mean, target = batch["mean_active"], batch["target"]
    logits = z + shift + s[:, None, None] * (z - mean[:, None])
    lse = torch.logaddexp(logits.logsumexp(2), batch["lse_inactive"].expand(EXPERTS, -1))
    own = logits[:, torch.arange(len(z)), target.clamp(min=0)]
    logps = torch.where(target >= 0, own, batch["token_logit"]) - lse
    edges = torch.tensor([0, *LENGTHS]).cumsum(0).tolist()
    return torch.stack([logps[:, a:b].sum(1) for a, b in pairwise(edges)])


def quickly(batch, parameters, head, bias, chosen=None, mapped=None):
    return low_rank.low_rank_text_logps(
        batch, *parameters, head, bias, chosen, mapped, low_rank.Workspace()
    )


def cast(value, dtype):
    if isinstance(value, dict):
        return {name: cast(v, dtype) for name, v in value.items()}
    return value.to(dtype) if value is not None and value.is_floating_point() else value


def check_equal(inputs, dtype, chosen=None, mapped=None):
    """Values to 1e-5, gradients for A, B and s to 1e-4 of the largest; to 1e-10 in float64."""
    batch, parameters, head, bias = inputs
    everyone = torch.ones(len(LENGTHS), EXPERTS, dtype=torch.bool)
    said = everyone if chosen is None else chosen
    weight = torch.randn(said.shape, generator=torch.Generator().manual_seed(1)).double() * said
    learned = [p.clone().requires_grad_() for p in parameters if p is not None]
    own = plainly(batch, (*learned, None)[:3], head, bias)
    mine = [p.detach().to(dtype).requires_grad_() for p in learned]
    fast = quickly(
        cast(batch, dtype), (*mine, None)[:3], cast(head, dtype), cast(bias, dtype), chosen, mapped
    )
    assert fast.dtype == dtype and bool((fast[~said] == -torch.inf).all())
    values, slopes = (1e-10, 1e-10) if dtype == torch.float64 else (1e-5, 1e-4)
    size = float(own.abs().max())
    torch.testing.assert_close(fast[said].double(), own[said], atol=values * size, rtol=values)
    full = torch.autograd.grad((own * weight).sum(), learned)
    quick = torch.autograd.grad((fast.masked_fill(~said, 0.0) * weight.to(dtype)).sum(), mine)
    for a, b in zip(quick, full, strict=True):
        assert float(b.abs().max()) > 0
        torch.testing.assert_close(
            a.double(), b, atol=slopes * float(b.abs().max()), rtol=slopes, check_dtype=False
        )


CHOSEN = {
    "all": None,
    "some": torch.tensor([[1, 0, 0], [0, 0, 1], [1, 0, 1], [0, 0, 0], [1, 0, 0]]).bool(),
    "two": torch.tensor([[1, 1, 0], [0, 1, 1], [1, 0, 1], [1, 1, 0], [0, 1, 1]]).bool(),
}


@pytest.mark.parametrize("chosen", CHOSEN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("block", [5, 256])
def test_values_and_gradients(dtype, block, chosen, monkeypatch):
    monkeypatch.setattr(low_rank, "BLOCK", block)
    check_equal(draw(), dtype, CHOSEN[chosen])


@pytest.mark.parametrize("chosen", CHOSEN)
def test_without_bias_and_without_sharpness(chosen):
    batch, (down, up, _), head, _ = draw()
    check_equal((batch, (down, up, None), head, None), torch.float32, CHOSEN[chosen])


@pytest.mark.parametrize("chosen", CHOSEN)
def test_a_head_whose_output_is_mapped(chosen):
    """The identity as a map: the plain operations of the library say the same."""
    check_equal(draw(), torch.float32, CHOSEN[chosen], lambda z: z)


@pytest.mark.parametrize(
    ("scale", "inactive", "s"),
    [
        (300.0, 1.0, 0.4),  # logits of +-1,000: e to their power is neither 0 nor finite
        (1.0, 500.0, 0.4),  # the other tokens have all the mass
        (1.0, -500.0, 0.4),  # and none
        (1.0, 1.0, -3.0),  # logits turned round
        (1.0, 1.0, 200.0),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits(dtype, scale, inactive, s):
    batch, (down, up, sharpness), head, bias = draw(scale, inactive)
    if inactive == 500.0:  # some gradient is left: where the logits are as large
        batch["lse_inactive"][::2] = 1.0
    sharpness[0] = s
    # float32 holds the logits to 1e-7 of their size, and gradients follow: read against the same rounded input
    inputs = (
        cast(batch, torch.float32),
        (down.float(), up.float(), sharpness),
        head.float(),
        bias.float(),
    )
    rounded = [cast(inputs[0], torch.float64), tuple(p.double() for p in inputs[1])]
    check_equal((*rounded, inputs[2].double(), inputs[3].double()), dtype)


def test_all_tokens_active():
    batch, parameters, head, bias = draw()
    batch["lse_inactive"][:], batch["target"] = -torch.inf, batch["target"].clamp(min=0)
    check_equal((batch, parameters, head, bias), torch.float32)


def test_what_is_kept_for_the_backward_pass_does_not_grow_with_the_experts():
    batch, (down, up, sharpness), head, bias = draw()
    sizes = []
    for times in (1, 10):
        workspace = low_rank.Workspace()
        many = [
            p.repeat(times, *[1] * (p.dim() - 1)).requires_grad_() for p in (down, up, sharpness)
        ]
        low_rank.low_rank_text_logps(
            batch, *many, head, bias, None, None, workspace
        ).sum().backward()
        sizes.append(sum(flat.numel() for flat in workspace._flat.values()))
        assert bool(many[1].grad.abs().amax((1, 2)).min() > 0)
    assert sizes[0] == sizes[1]
