"""How are the log-probabilities of many nodes of a group computed fast? J products with the head, a sum for each node."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .low_rank import corrected_logits

BLOCK = 64  # positions at once: their logits of the base, of J basis experts and of one node stay in the cache

NAMES = ("hidden", "target", "token_logit", "lse_inactive", "mean_active")


class GroupTokenLogps(torch.autograd.Function):
    """log pi_m(token) of every position and node, (positions, nodes); gradients for A_j, E_j = W B_j and s_j.

    logits_m = (1 + sum_j c_mj s_j) z + sum_j c_mj E_j A_j h.  Written by hand because the logits of all nodes are too large
    to be kept: the backward pass makes them anew, block by block, and sums G_j = sum_m c_mj g_m (onehot - pi_m) over the
    nodes, so that J products give the gradients whatever M is.  The gradient of s_j is sum_v G_j (z - mean_active).
    """

    @staticmethod
    def forward(
        ctx,
        down,
        up,
        sharpness,
        coordinates,
        hidden,
        head,
        bias,
        target,
        token_logit,
        lse_inactive,
        mean_active,
    ):  # type: ignore[override]
        """See the class."""
        ctx.save_for_backward(down, up, coordinates, hidden, target, mean_active)
        ctx.frozen = (head, bias)
        sharper = coordinates @ sharpness if sharpness is not None else None
        logps = hidden.new_empty(len(hidden), len(coordinates))
        tops = torch.empty_like(logps)
        ctx.sharper = [0.0] * len(coordinates) if sharper is None else sharper.tolist()
        for at in _blocks(len(hidden)):
            plain, moved = _shared(hidden[at], down, up, head, bias)
            known = (target[at] >= 0).nonzero().squeeze(1)
            column, room = target[at][known], torch.empty_like(plain)
            for m, own in enumerate(coordinates.tolist()):
                z = _node(plain, moved, own, ctx.sharper[m], room)
                lifted = mean_active[at] * ctx.sharper[m]
                token, others = token_logit[at] + lifted, lse_inactive[at] + lifted
                token[known] = z[known, column]
                top = torch.maximum(z.amax(1), others)
                inside = z.sub_(top[:, None]).exp_().sum(1)
                total = top + (inside + (others - top).exp()).log()
                logps[at, m], tops[at, m] = token - total, total
        ctx.totals = tops
        return logps

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        """Gradients for A, E and s, from logits that are made anew."""
        down, up, coordinates, hidden, target, mean_active = ctx.saved_tensors
        head, bias = ctx.frozen
        grad_down, grad_up = torch.zeros_like(down), torch.zeros_like(up)
        grad_sharpness = up.new_zeros(len(up)) if ctx.needs_input_grad[2] else None
        for at in _blocks(len(hidden)):
            plain, moved = _shared(hidden[at], down, up, head, bias)
            room, sums = torch.empty_like(plain), torch.zeros_like(moved)
            for m, own in enumerate(coordinates.tolist()):
                z = _node(plain, moved, own, ctx.sharper[m], room)
                z.sub_(ctx.totals[at, m, None]).exp_().mul_(grad[at, m, None])
                for total, c in zip(sums, own, strict=True):
                    total.sub_(z, alpha=c)
            known = (target[at] >= 0).nonzero().squeeze(1)
            sums[:, known, target[at][known]] += coordinates.T @ grad[at][known].T
            for j, total in enumerate(sums):
                state = hidden[at] @ down[j].T
                grad_up[j].addmm_(total.T, state)
                grad_down[j].addmm_((total @ up[j]).T, hidden[at])
                if grad_sharpness is not None:
                    grad_sharpness[j] += (total * plain).sum() - total.sum(1) @ mean_active[at]
        return grad_down, grad_up, grad_sharpness, *(None,) * 8


def _blocks(n: int) -> list[slice]:
    return [slice(start, min(start + BLOCK, n)) for start in range(0, n, BLOCK)]


def _shared(
    hidden: Tensor, down: Tensor, up: Tensor, head: Tensor, bias: Tensor | None
) -> tuple[Float[Tensor, "rows tokens"], Float[Tensor, "basis rows tokens"]]:
    """What all nodes share: z = W h of the active tokens, and E_j A_j h of each basis expert."""
    plain = hidden @ head.T if bias is None else torch.addmm(bias, hidden, head.T)
    return plain, torch.stack([(hidden @ a.T) @ e.T for a, e in zip(down, up, strict=True)])


def _node(
    plain: Tensor, moved: Tensor, own: list[float], sharper: float, room: Tensor
) -> Float[Tensor, "rows tokens"]:
    """Logits of a node in `room`."""
    torch.add(plain * (1 + sharper) if sharper else plain, moved[0], alpha=own[0], out=room)
    for one, c in zip(moved[1:], own[1:], strict=True):
        room.add_(one, alpha=c)
    return room


def group_text_logps(
    batch: dict[str, Tensor],
    down: Float[Tensor, "basis rank hidden"],
    up: Float[Tensor, "basis hidden rank"],
    sharpness: Float[Tensor, "basis"] | None,
    coordinates: Float[Tensor, "nodes basis"],
    head: Float[Tensor, "tokens hidden"],
    bias: Float[Tensor, "tokens"] | None,
    chosen: Bool[Tensor, "texts nodes"] | None = None,
    mapped: Callable[[Tensor], Tensor] | None = None,
) -> Float[Tensor, "texts nodes"]:
    """log pi_m of the texts of a batch of heads, nats; -inf where a node was not chosen for a text.

    Texts and nodes that nothing chose are not computed.
    """
    n_texts, segment = len(batch["text_ref_logps"]), batch["segment"]
    inputs = [batch[name] for name in NAMES]
    if chosen is not None and not bool(chosen.all()):
        here = chosen.any(1)[segment].nonzero().squeeze(1)
        speak = chosen.any(0).nonzero().squeeze(1)
        rest = {name: batch[name][here] for name in (*NAMES, "segment")}
        rest["text_ref_logps"] = batch["text_ref_logps"]
        some = group_text_logps(
            rest, down, up, sharpness, coordinates[speak], head, bias, None, mapped
        )
        whole = some.new_zeros(chosen.shape).index_copy(1, speak, some)
        return whole.masked_fill(~chosen, -torch.inf)
    if mapped is None:
        logps = GroupTokenLogps.apply(
            down, head @ up, sharpness, coordinates, inputs[0], head, bias, *inputs[1:]
        )
    else:
        logps = plain_token_logps(inputs, down, up, sharpness, coordinates, head, bias, mapped)
    return logps.new_zeros(n_texts, len(coordinates)).index_add(0, segment, logps)


def plain_token_logps(
    inputs: list[Tensor],
    down: Tensor,
    up: Tensor,
    sharpness: Tensor | None,
    coordinates: Tensor,
    head: Tensor,
    bias: Tensor | None,
    mapped: Callable[[Tensor], Tensor] | None,
) -> Float[Tensor, "positions nodes"]:
    """The same by plain operations, for a head whose output is scaled or soft-capped; slower and larger."""
    hidden, target, token_logit, lse_inactive, mean_active = inputs
    plain, moved = _shared(hidden, down, head @ up, head, bias)
    columns = []
    for own in coordinates:
        shift = torch.tensordot(own, moved, 1)
        sharper = None if sharpness is None else own @ sharpness
        z = corrected_logits(plain, shift, sharper, mean_active, mapped)
        token = z.gather(1, target.clamp(min=0)[:, None]).squeeze(1)
        token = torch.where(target >= 0, token, token_logit)
        columns.append(token - torch.logaddexp(z.logsumexp(1), lse_inactive))
    return torch.stack(columns, 1)
