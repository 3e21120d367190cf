"""What does the base's head say of every position?"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..data.pairs import Texts
from ..store import cached, progress
from .architecture import logit_map
from .features import TextFeatures, ids_key, padded, tokenised
from .model import Base

VERSION = 2


def head_logits(
    base: Base, hidden: Float[Tensor, "rows hidden"], model: Any = None
) -> Float[Tensor, "rows tokens"]:
    """Logits of last hidden states by the head of `model` (that of the base by default), float32; gradients flow."""
    logits = (base.model if model is None else model).get_output_embeddings()(hidden).float()
    mapped = logit_map(base.model.config.get_text_config())
    return logits if mapped is None else mapped(logits)


@dataclass(frozen=True)
class HeadConstants:
    """What the frozen head says about every position, whatever the experts are: computed once, kept on disk.

    token_logit : (positions,) float32, logit of the response token under the base.
    lse : (positions,) float32, logsumexp of the base's logits over the whole vocabulary.
    lse_inactive : (positions,) float32, the same over the tokens outside the active set; -inf where all are active.
    mean_active : (positions,) float32, mean logit of the active tokens, each weighed by its probability under the base.
    """

    token_logit: np.ndarray
    lse: np.ndarray
    lse_inactive: np.ndarray
    mean_active: np.ndarray


def mean_logit(logits: Float[Tensor, "rows tokens"]) -> Float[Tensor, "rows"]:
    """Mean of the logits under the distribution that they make: sum_v softmax(z)_v z_v; gradients flow.

    >>> mean_logit(torch.tensor([[0.0, 0.0], [2.0, -1e4]]))
    tensor([0., 2.])
    """
    return (logits.softmax(1) * logits).sum(1)


def reference_constants(
    base: Base, texts: TextFeatures, active: np.ndarray, block: int = 2048
) -> HeadConstants:
    """The frozen head's constants for every position of `texts`, for this set of active tokens, from the cache.

    What an empty set gives is all that the reference needs: `lse_inactive` (-inf) and `mean_active` (0) are then not
    filled.
    """
    digest = hashlib.sha256(active.tobytes()).hexdigest()
    rows = base.model.get_output_embeddings().weight.shape[0]
    inactive = np.setdiff1d(np.arange(rows), active) if len(active) else active

    def build(folder: Path) -> None:
        n = len(texts.tokens)
        out = np.empty((4, n), dtype=np.float32)
        inactive_ids, active_ids = torch.from_numpy(inactive), torch.from_numpy(active)
        for start in range(0, n, block):
            stop = min(start + block, n)
            hidden = torch.from_numpy(np.array(texts.hidden[start:stop])).to(
                base.device, base.model.dtype
            )
            with torch.inference_mode():
                logits = head_logits(base, hidden).cpu()
                tokens = torch.from_numpy(texts.tokens[start:stop])
                out[0, start:stop] = logits.gather(1, tokens[:, None]).squeeze(1)
                out[1, start:stop] = logits.logsumexp(1)
                out[2, start:stop] = (
                    logits.index_select(1, inactive_ids).logsumexp(1) if len(inactive) else -np.inf
                )
                out[3, start:stop] = (
                    mean_logit(logits.index_select(1, active_ids)) if len(active) else 0.0
                )
            progress("head constants", stop, n, "positions")
        np.save(folder / "constants.npy", out, allow_pickle=False)

    folder = cached("head", VERSION, {"active": digest}, build, inputs=[texts.key])
    return HeadConstants(*np.load(folder / "constants.npy", allow_pickle=False))


def place_of(rows: Int[Tensor, "chosen"], n: int) -> Int[Tensor, "rows"]:
    """Where each of the rows 0 ... n-1 stands in `rows`; -1 where it does not.

    >>> place_of(torch.tensor([2, 0]), 4)
    tensor([ 1, -1,  0, -1])
    """
    return torch.full((n,), -1, device=rows.device).index_copy(
        0, rows, torch.arange(len(rows), device=rows.device)
    )


class _FrozenHeadLogps(torch.autograd.Function):
    """log p(token) of every position under a frozen head, in blocks of positions; gradients for the hidden states.

    d log p(t) / dh = W_t - sum_v p_v W_v is made on the way, while the block's probabilities are at hand, so that no
    more than one block of (positions, vocabulary) is ever held.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, target, block=128):  # type: ignore[override]
        logps, slope = hidden.new_empty(len(hidden), dtype=torch.float32), None
        if ctx.needs_input_grad[0]:
            slope = torch.empty_like(hidden)
        for at in torch.arange(len(hidden), device=hidden.device).split(block):
            z = nn.functional.linear(hidden[at], weight, bias).float()
            token = z.gather(1, target[at, None]).squeeze(1)
            top = z.amax(1)
            total = z.sub_(top[:, None]).exp_().sum(1)
            logps[at] = token - top - total.log()
            if slope is not None:
                slope[at] = weight[target[at]] - (z.to(weight.dtype) @ weight) / total[:, None].to(
                    weight.dtype
                )
        ctx.save_for_backward(slope)
        return logps

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        (slope,) = ctx.saved_tensors
        return (grad[:, None] * slope).to(slope.dtype), None, None, None


def token_logps(
    base: Base, model: Any, hidden: Tensor, target: Tensor
) -> Float[Tensor, "positions"]:
    """log probability of the token at each position, nats, float32; gradients flow."""
    head = model.get_output_embeddings()
    plain = type(head) is nn.Linear and logit_map(base.model.config.get_text_config()) is None
    if plain and not head.weight.requires_grad:
        return _FrozenHeadLogps.apply(hidden.to(head.weight.dtype), head.weight, head.bias, target)
    logits = head_logits(base, hidden, model)
    return logits.gather(1, target[:, None]).squeeze(1) - logits.logsumexp(1)


def response_logps(
    base: Base, model: Any, inputs: dict[str, Tensor], rows: Tensor | None, n_texts: int
) -> Float[Tensor, "rows"]:
    """log probability of the responses of these rows (None: all), nats; gradients flow."""
    input_ids, mask = inputs["input_ids"], inputs["attention_mask"]
    column, target, segment = inputs["column"], inputs["target"], inputs["segment"]
    if rows is not None:
        place = place_of(rows, n_texts)
        own = (place[segment] >= 0).nonzero().squeeze(1)
        input_ids, mask = input_ids[rows], mask[rows]
        column, target, segment = column[own], target[own], place[segment[own]]
    hidden = model.base_model(
        input_ids=input_ids, attention_mask=mask, use_cache=False
    ).last_hidden_state
    logps = token_logps(base, model, hidden[segment, column], target)
    return logps.new_zeros(len(input_ids)).index_add(0, segment, logps)


@torch.no_grad()
def reference_logps(base: Base, texts: Texts, batch_size: int = 32) -> np.ndarray:
    """log pi_ref of every text under the frozen base, nats, (texts,) float32. Kept in the cache; no state is."""
    ids = tokenised(base, texts)

    def build(folder: Path) -> None:
        out = []
        for start in range(0, len(ids), batch_size):
            inputs = {
                n: v.to(base.device) for n, v in padded(ids[start : start + batch_size]).items()
            }
            out.append(response_logps(base, base.model, inputs, None, 0).float().cpu())
            progress("reference", min(start + batch_size, len(ids)), len(ids), "texts")
        np.save(folder / "logps.npy", torch.cat(out).numpy(), allow_pickle=False)

    folder = cached("reference", VERSION, {"base": base.fingerprint, "ids": ids_key(ids)}, build)
    return np.load(folder / "logps.npy", allow_pickle=False)
