"""How are the log-probabilities of many low-rank heads computed fast?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

BLOCK = 256  # positions whose logits are made and used at once
LOG2_E, LN_2 = math.log2(math.e), math.log(2)


class LowRankTokenLogps(torch.autograd.Function):
    """log pi_k(token) of every position and expert, (positions, experts); gradients for A, E = W B and s.

    Written by hand because the logits of all experts are the largest tensors of a step. One such tensor is kept for the
    backward pass, whatever K is: the base's logits z. There those of the experts, (1 + s) z + E A h, are made from it
    once more, in blocks that stay in the cache until every gradient is read from them; in bits (x / log 2), since 2^x
    costs half of what e^x does. E comes as (experts, rank, tokens). `groups` holds the positions of each expert, rising,
    or is None: all positions for all experts. What is not asked for is 0 in the result.

    Sharpness costs the forward pass nothing: the constant s x mean_active of a position, which active tokens lose, is
    given to all others instead.
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
            states = (down.flatten(0, 1) @ hidden.T).view(n_experts, -1, n_positions)
        else:
            states = [own @ hidden[at].T for own, at in zip(down, groups, strict=True)]
        keep = any(ctx.needs_input_grad[1:4])
        base = workspace.take("base", (n_positions if keep else BLOCK, len(head)), hidden)
        room = workspace.take("expert", (BLOCK, len(head)), hidden)
        found = [hidden.new_empty(3, own.shape[1]) for own in states]
        place = target.clamp(min=0)[:, None]
        for block, parts in _blocks(n_positions, n_experts, groups):
            plain = base[block] if keep else base[: block.stop - block.start]
            torch.mm(hidden[block], head.T, out=plain)
            if bias is not None:
                plain += bias
            for k, own in parts:
                at = block if groups is None else groups[k][own]
                rows = plain if groups is None else plain[at - block.start]
                bits = _bits(rows, states[k][:, own], up[k], sharper[k], room)
                token, top, total = found[k][:, own]
                torch.gather(bits, 1, place[at], out=token[:, None])
                torch.amax(bits, 1, out=top)
                torch.sum(bits.sub_(top[:, None]).exp2_(), 1, out=total)
        logps, lses, shares = hidden.new_zeros(n_positions, n_experts), [], []
        for k, (token, top, total) in enumerate(found):
            at = slice(None) if groups is None else groups[k]
            lifted = mean_active[at] * sharper[k]
            active = top * LN_2 + total.log()
            lse = torch.logaddexp(active, lse_inactive[at] + lifted)
            logps[at, k] = torch.where(target[at] < 0, token_logit[at] + lifted, token * LN_2) - lse
            lses.append(lse)
            shares.append((active - lse).exp())
        ctx.save_for_backward(hidden, up, target, mean_active)
        ctx.groups, ctx.sharper, ctx.states = groups, sharper, states
        ctx.lses, ctx.shares = lses, shares
        ctx.base, ctx.room, ctx.workspace, ctx.ticket = base, room, workspace, workspace.ticket()
        return logps

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        """Gradients for A, E and s, from - d log pi / d logits = probabilities - 1[token]."""
        hidden, up, target, mean_active = ctx.saved_tensors
        if ctx.ticket != ctx.workspace.ticket():
            raise RuntimeError(
                "the base's logits were overwritten by a later call before backward() was reached"
            )
        n_experts, groups, sharp = len(up), ctx.groups, ctx.needs_input_grad[3]
        whole = [slice(None)] * n_experts if groups is None else groups
        weights = [-grad[at, k] for k, at in enumerate(whole)]
        weighed = [own * weight for own, weight in zip(ctx.states, weights, strict=True)]
        place, known = target.clamp(min=0)[:, None], (target >= 0).to(hidden.dtype)
        grad_up = torch.zeros_like(up)
        grad_states = [torch.empty_like(own) for own in weighed]
        moved = [torch.empty_like(own) for own in weights]
        for block, parts in _blocks(len(hidden), n_experts, groups):
            for k, own in parts:
                at = block if groups is None else groups[k][own]
                rows = ctx.base[at]
                bits = _bits(rows, ctx.states[k][:, own], up[k], ctx.sharper[k], ctx.room)
                slope = bits.sub_(ctx.lses[k][own, None] * LOG2_E).exp2_()
                slope.scatter_add_(1, place[at], -known[at, None])
                grad_up[k].addmm_(weighed[k][:, own], slope)
                torch.mm(up[k], slope.T, out=grad_states[k][:, own])
                if sharp:
                    torch.sum(slope.mul_(rows), 1, out=moved[k][own])
        grad_down = hidden.new_zeros(n_experts, up.shape[1], hidden.shape[1])
        grad_sharpness = grad.new_zeros(n_experts) if sharp else None
        for k, at in enumerate(whole):
            torch.mm(grad_states[k] * weights[k], hidden[at], out=grad_down[k])
            if grad_sharpness is not None:  # z counts from the mean of the active tokens
                moved[k] -= mean_active[at] * (ctx.shares[k] - known[at])
                grad_sharpness[k] = weights[k] @ moved[k]
        return None, grad_down, grad_up, grad_sharpness, *(None,) * 8


def _blocks(
    n_positions: int, n_experts: int, groups: list[Tensor] | None
) -> Iterator[tuple[slice, list[tuple[int, slice]]]]:
    """Blocks of positions, and for each the experts that have positions there and which of their own these are."""
    starts = list(range(0, n_positions, BLOCK))
    blocks = [slice(start, min(start + BLOCK, n_positions)) for start in starts]
    if groups is None:
        yield from ((block, [(k, block) for k in range(n_experts)]) for block in blocks)
        return
    edges = [
        torch.searchsorted(at, at.new_tensor([*starts, n_positions])).tolist() for at in groups
    ]
    for i, block in enumerate(blocks):
        parts = [(k, slice(edge[i], edge[i + 1])) for k, edge in enumerate(edges)]
        yield block, [(k, own) for k, own in parts if own.stop > own.start]


def _bits(plain: Tensor, states: Tensor, up: Tensor, sharper: float, room: Tensor) -> Tensor:
    """Logits of an expert in bits, (rows, tokens), written to `room`."""
    out = room[: len(plain)]
    return torch.addmm(plain, states.T, up, beta=(1 + sharper) * LOG2_E, alpha=LOG2_E, out=out)


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
        up = (up.mT.flatten(0, 1) @ head.T).view(*down.shape[:2], len(head))  # one product, E
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
        logps = token_logps(down, up, sharpness, None)
        return logps.new_zeros(n_texts, n_experts).index_add(0, inputs["segment"], logps)
    asked = chosen[inputs["segment"]]
    here, speak = asked.any(1).nonzero().squeeze(1), asked.any(0).nonzero().squeeze(1)
    inputs = {name: values[here] for name, values in inputs.items()}
    groups = [asked[here, k].nonzero().squeeze(1) for k in speak]
    sharper = None if sharpness is None else sharpness[speak]
    logps = token_logps(down[speak], up[speak], sharper, groups)
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
        shift = (inputs["hidden"][at] @ down[k].T) @ up[k]
        own_sharpness = None if sharpness is None else sharpness[k]
        mean = inputs["mean_active"][at]
        z = corrected_logits(plain[at], shift, own_sharpness, mean, mapped)
        target = inputs["target"][at]
        own = z.gather(1, target.clamp(min=0)[:, None]).squeeze(1)
        token = torch.where(target >= 0, own, inputs["token_logit"][at])
        lse = torch.logaddexp(z.logsumexp(1), inputs["lse_inactive"][at])
        columns.append(plain.new_zeros(len(plain)).index_copy(0, at, token - lse))
    return torch.stack(columns, 1)
