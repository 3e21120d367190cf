"""How are the log-probabilities of many low-rank heads computed fast?"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

BLOCK = 256  # positions whose logits are made and used at once


class LowRankTokenLogps(torch.autograd.Function):
    """log pi_k(token) of every position and expert, (positions, experts); gradients for A, E = W B and s.

    Written by hand because the logits of all experts are the largest tensors of a step: exp(logit) is kept once per
    expert in a buffer that is used again, and the backward pass reads it in two matrix products. `groups` holds the
    positions of each expert, or is None: all positions for all experts. What is not asked for is 0 in the result.

    Sharpness costs the forward pass nothing: logits (1 + s) z + E A h come from the same product, and the constant
    s x mean_active of a position, which active tokens lose, is given to all others instead.
    """

    @staticmethod
    def forward(
        ctx,
        hidden,
        down,
        up,
        sharpness,
        head,
        bias,
        target,
        token_logit,
        lse_inactive,
        mean_active,
        groups,
        workspace,
    ):  # type: ignore[override]
        """See the class."""
        n_experts, n_positions = len(down), len(hidden)
        sharper = [0.0] * n_experts if sharpness is None else sharpness.tolist()
        if groups is None:
            sizes = [n_positions] * n_experts
            states = list(torch.einsum("pd,krd->kpr", hidden, down))
        else:
            sizes = [len(at) for at in groups]
            states = [hidden[at] @ down[k].T for k, at in enumerate(groups)]
        keep = any(ctx.needs_input_grad[1:4])
        size = sum(sizes) if keep else BLOCK
        flat = workspace.take("experts", (size, len(head)), hidden)
        buffers = flat.split(sizes) if keep else [flat] * n_experts
        room = workspace.take("base", (BLOCK, len(head)), hidden)
        logps = hidden.new_zeros(n_positions, n_experts)
        totals = [hidden.new_empty(n) for n in sizes]
        expected = [hidden.new_empty(n) for n in sizes] if ctx.needs_input_grad[3] else None
        for start in range(0, n_positions, BLOCK):  # each stays in the processor's cache
            stop = min(start + BLOCK, n_positions)
            base_logits = torch.mm(hidden[start:stop], head.T, out=room[: stop - start])
            if bias is not None:
                base_logits += bias
            for k in range(n_experts):
                if groups is None:
                    own, at, plain = slice(start, stop), slice(start, stop), base_logits
                else:
                    low, high = torch.searchsorted(
                        groups[k], torch.tensor([start, stop], device=hidden.device)
                    ).tolist()
                    own, at = slice(low, high), groups[k][low:high]
                    plain = base_logits[at - start]
                z = buffers[k][own] if keep else buffers[k][: len(plain)]
                torch.addmm(plain, states[k][own], up[k].T, beta=1 + sharper[k], out=z)
                lifted = mean_active[at] * sharper[k]
                token, known = token_logit[at] + lifted, target[at] >= 0
                token[known] = z[known, target[at][known]]
                others = lse_inactive[at] + lifted
                top = torch.maximum(z.amax(1), others)
                z.sub_(top[:, None]).exp_()
                inside = z.sum(1)
                total = totals[k][own] = inside + (others - top).exp()
                logps[at, k] = token - top - total.log()
                if (
                    expected is not None
                ):  # sum_v pi_k(v) (z_v - mean_active) - (z_token - mean_active): - d logp / ds
                    moved = (torch.linalg.vecdot(z, plain) - mean_active[at] * inside) / total
                    moved[known] -= plain[known, target[at][known]] - mean_active[at][known]
                    expected[k][own] = moved
        ctx.save_for_backward(hidden, up, target)
        ctx.groups = [slice(None)] * n_experts if groups is None else groups
        ctx.states, ctx.totals, ctx.expected = states, totals, expected
        ctx.buffers, ctx.ticket, ctx.workspace = buffers, workspace.ticket(), workspace
        return logps

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        """Gradients for A, E and s, from the probabilities that were kept."""
        hidden, up, target = ctx.saved_tensors
        if ctx.ticket != ctx.workspace.ticket():
            raise RuntimeError(
                "the experts' logits were overwritten by a later call before backward() was reached"
            )
        grad_down = torch.zeros(
            len(up), up.shape[2], hidden.shape[1], dtype=hidden.dtype, device=hidden.device
        )
        grad_up = torch.zeros_like(up)
        grad_sharpness = None if ctx.expected is None else up.new_zeros(len(up))
        for k, (at, probability) in enumerate(zip(ctx.groups, ctx.buffers, strict=True)):
            own, states = grad[at, k], ctx.states[k]
            weight = (own / ctx.totals[k])[:, None]
            torch.mm(probability.T, states * weight, out=grad_up[k])
            grad_up[k].neg_()
            grad_state = (probability @ up[k]) * -weight
            rows = (target[at] >= 0).nonzero().squeeze(1)
            columns = target[at][rows]
            grad_up[k].index_add_(0, columns, states[rows] * own[rows, None])
            grad_state.index_add_(0, rows, up[k][columns] * own[rows, None])
            torch.mm(grad_state.T, hidden[at], out=grad_down[k])
            if grad_sharpness is not None:
                grad_sharpness[k] = -(own @ ctx.expected[k])
        return None, grad_down, grad_up, grad_sharpness, *(None,) * 8


class Workspace:
    """Large buffers that are used again, step after step, instead of being mapped anew."""

    def __init__(self) -> None:
        self._flat: dict[str, Tensor] = {}
        self._uses = 0

    def take(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """A buffer of this name and shape, of the type and on the device of `like`; its content is undefined."""
        size = int(np.prod(shape))
        flat = self._flat.get(name)
        if (
            flat is None
            or flat.numel() < size
            or flat.dtype != like.dtype
            or flat.device != like.device
        ):
            flat = self._flat[name] = torch.empty(size, dtype=like.dtype, device=like.device)
        self._uses += 1
        return flat[:size].view(shape)

    def ticket(self) -> int:
        """How often buffers were taken: who holds an older ticket finds his content overwritten."""
        return self._uses


def low_rank_text_logps(
    batch: dict[str, Tensor],
    down: Float[Tensor, "experts rank hidden"],
    up: Float[Tensor, "experts hidden rank"],
    sharpness: Float[Tensor, "experts"] | None,
    head: Float[Tensor, "tokens hidden"],
    bias: Float[Tensor, "tokens"] | None,
    chosen: Bool[Tensor, "texts experts"] | None,
    mapped: Callable[[Tensor], Tensor] | None,
    workspace: Workspace,
) -> Float[Tensor, "texts experts"]:
    """log pi_k of the texts of a batch of `HeadExperts`, nats; -inf where an expert was not chosen for a text."""
    names = ("hidden", "target", "token_logit", "lse_inactive", "mean_active", "segment")
    inputs = {name: batch[name] for name in names}
    n_texts, n_experts = len(batch["text_ref_logps"]), len(down)

    def token_logps(
        down: Tensor, up: Tensor, sharpness: Tensor | None, groups: list[Tensor] | None
    ) -> Tensor:
        if mapped is not None:
            return _mapped_token_logps(inputs, down, up, sharpness, head, bias, groups, mapped)
        return LowRankTokenLogps.apply(
            inputs["hidden"],
            down,
            up,
            sharpness,
            head,
            bias,
            inputs["target"],
            inputs["token_logit"],
            inputs["lse_inactive"],
            inputs["mean_active"],
            groups,
            workspace,
        )

    if chosen is None or bool(chosen.all()):
        logps = token_logps(down, head @ up, sharpness, None)
        return logps.new_zeros(n_texts, n_experts).index_add(0, inputs["segment"], logps)
    asked = chosen[inputs["segment"]]
    here, speak = asked.any(1).nonzero().squeeze(1), asked.any(0).nonzero().squeeze(1)
    inputs = {name: values[here] for name, values in inputs.items()}
    groups = [asked[here, k].nonzero().squeeze(1) for k in speak]
    sharper = None if sharpness is None else sharpness[speak]
    logps = token_logps(down[speak], head @ up[speak], sharper, groups)
    sums = logps.new_zeros(n_texts, len(speak)).index_add(0, inputs["segment"], logps)
    return sums.new_zeros(chosen.shape).index_copy(1, speak, sums).masked_fill(~chosen, -torch.inf)


def corrected_logits(
    plain: Float[Tensor, "rows tokens"],
    shift: Float[Tensor, "rows tokens"],
    sharpness: Tensor | float | None,
    mean_active: Float[Tensor, "rows"] | None,
    mapped: Callable[[Tensor], Tensor] | None,
) -> Float[Tensor, "rows tokens"]:
    """Logits of an expert for the active tokens, f(z + W B A h) + s (f(z) - mean_active), by plain operations.

    plain : z, the head's output for the active tokens. shift : W B A h. mapped : f, what the model does to its head's
    output; None: nothing. sharpness : s, or None for a head without. mean_active : mean logit f(z) of the active tokens
    under the reference; read where there is an s. Gradients flow.
    """
    logits = plain + shift if mapped is None else mapped(plain + shift)
    if sharpness is None or mean_active is None:
        return logits
    base = plain if mapped is None else mapped(plain)
    return logits + sharpness * (base - mean_active[:, None])


def _mapped_token_logps(
    inputs: dict[str, Tensor],
    down: Tensor,
    up: Tensor,
    sharpness: Tensor | None,
    head: Tensor,
    bias: Tensor | None,
    groups: list[Tensor] | None,
    mapped: Callable[[Tensor], Tensor],
) -> Float[Tensor, "positions experts"]:
    """The same for a head whose output is scaled or soft-capped: by plain operations, slower and larger."""
    plain = inputs["hidden"] @ head.T + (0 if bias is None else bias)
    every = torch.arange(len(plain), device=plain.device)
    columns = []
    for k in range(len(down)):
        at = every if groups is None else groups[k]
        shift = (inputs["hidden"][at] @ down[k].T) @ up[k].T
        own_sharpness = None if sharpness is None else sharpness[k]
        mean = inputs["mean_active"][at]
        z = corrected_logits(plain[at], shift, own_sharpness, mean, mapped)
        target = inputs["target"][at]
        own = z.gather(1, target.clamp(min=0)[:, None]).squeeze(1)
        token = torch.where(target >= 0, own, inputs["token_logit"][at])
        lse = torch.logaddexp(z.logsumexp(1), inputs["lse_inactive"][at])
        columns.append(plain.new_zeros(len(plain)).index_copy(0, at, token - lse))
    return torch.stack(columns, 1)
