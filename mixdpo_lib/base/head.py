"""What does the base's head say of every position?"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
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

VERSION = 3
RARER = (1, 2, 5)  # rising; numbers of occurrences under which tokens are left out of active sets
POSITIONS_AT_ONCE, TOKENS_AT_ONCE = 2048, 1024  # a block of logits stays in the processor's cache


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
    top = logits.detach().amax(1, keepdim=True)  # what rounding leaves of a large logit's share
    return top.squeeze(1) + (logits.softmax(1) * (logits - top)).sum(1)


def _mapped(base: Base, logits: Tensor) -> Tensor:
    mapped = logit_map(base.model.config.get_text_config())
    return logits if mapped is None else mapped(logits)


def _some_logits(
    base: Base, hidden: Float[Tensor, "rows hidden"], tokens: np.ndarray
) -> Iterator[tuple[Int[Tensor, "some"], Float[Tensor, "rows some"]]]:
    """Blocks of these tokens, and the logits of each block, float32."""
    head: Any = base.model.get_output_embeddings()
    bias = getattr(head, "bias", None)
    for start in range(0, len(tokens), TOKENS_AT_ONCE):
        ids = torch.from_numpy(tokens[start : start + TOKENS_AT_ONCE]).to(hidden.device)
        own = None if bias is None else bias[ids].float()
        yield ids, _mapped(base, nn.functional.linear(hidden, head.weight[ids].float(), own))


def _lse(logits: Float[Tensor, "rows tokens"]) -> Float[Tensor, "rows"]:
    """logsumexp by row; overwrites the logits."""
    top = logits.amax(1)
    return logits.sub_(top[:, None]).exp_().sum(1).log_().add_(top)


def _lse_over(
    base: Base,
    hidden: Float[Tensor, "rows hidden"],
    tokens: np.ndarray,
    sought: tuple[Int[Tensor, "rows"], Float[Tensor, "rows"]] | None = None,
) -> Float[Tensor, "rows"]:
    """logsumexp over these tokens; -inf over none.

    sought : a token of each row, and where its logit is written if it is among these.
    """
    found = [hidden.new_full((len(hidden),), -torch.inf)]
    for ids, logits in _some_logits(base, hidden, tokens):
        if sought is not None:
            place = torch.searchsorted(ids, sought[0]).clamp(max=len(ids) - 1)
            rows = (ids[place] == sought[0]).nonzero().squeeze(1)
            sought[1][rows] = logits[rows, place[rows]]
        found.append(_lse(logits))
    return torch.stack(found).logsumexp(0)


def _mean_over(
    base: Base, hidden: Float[Tensor, "rows hidden"], tokens: np.ndarray
) -> Float[Tensor, "rows"]:
    """`mean_logit` over these tokens; 0 over none."""
    if len(tokens) == 0:
        return hidden.new_zeros(len(hidden))
    parts = [(mean_logit(z), _lse(z)) for _, z in _some_logits(base, hidden, tokens)]
    means, lses = map(torch.stack, zip(*parts, strict=True))
    return (lses.softmax(0) * means).sum(0)


def _by_position(
    base: Base,
    texts: TextFeatures,
    parameters: dict[str, Any],
    compute: Callable[[Tensor, slice], list[Tensor]],
) -> Float[np.ndarray, "numbers positions"]:
    """`compute(hidden states, their places)` of every position, float32, from the cache."""

    def build(folder: Path) -> None:
        n, rows = len(texts.tokens), []
        for start in range(0, n, POSITIONS_AT_ONCE):
            at = slice(start, min(start + POSITIONS_AT_ONCE, n))
            with torch.inference_mode():
                hidden = torch.from_numpy(np.array(texts.hidden[at])).to(base.device)
                rows.append(torch.stack(compute(hidden, at)).cpu())
            progress("head constants", at.stop, n, "positions")
        np.save(folder / "constants.npy", torch.cat(rows, 1).numpy(), allow_pickle=False)

    folder = cached("head", VERSION, parameters, build, inputs=[texts.key])
    return np.load(folder / "constants.npy", allow_pickle=False)


def _whole_vocabulary(base: Base, texts: TextFeatures) -> Float[np.ndarray, "numbers positions"]:
    """Logit of the response token, logsumexp over the tokens rarer than each number of `RARER`, and over all of them."""
    rows = len(base.model.get_output_embeddings().weight)
    counts = np.bincount(texts.tokens, minlength=rows)
    edges = [0, *RARER, len(texts.tokens) + 1]
    bands = [np.flatnonzero((counts >= a) & (counts < b)) for a, b in pairwise(edges)]

    def of_texts(hidden: Tensor, at: slice) -> list[Tensor]:
        ids = torch.from_numpy(texts.tokens[at]).to(hidden.device)
        logit = torch.empty(len(hidden), device=hidden.device)
        sums = [_lse_over(base, hidden, band, (ids, logit)) for band in bands]
        return [logit, *accumulate(sums, torch.logaddexp)]

    return _by_position(base, texts, {"rarer": list(RARER)}, of_texts)


def base_logps(base: Base, texts: TextFeatures) -> Float[np.ndarray, "texts"]:
    """log pi_ref of every text, nats, float32: `reference_logps` of texts whose states are known, up to rounding."""
    token, *_, lse = _whole_vocabulary(base, texts)
    upto = np.concatenate([[0.0], np.cumsum(token - lse, dtype=np.float64)])
    return np.diff(upto[texts.offsets]).astype(np.float32)


def reference_constants(base: Base, texts: TextFeatures, active: np.ndarray) -> HeadConstants:
    """The frozen head's constants for every position of `texts`, for this set of active tokens, from the cache.

    active : (tokens,) int64, rising.

    Notes
    -----
    The whole vocabulary is passed over once for a set of texts. Kept is the logsumexp of the tokens that occur in them
    less often than each number of `RARER`: an active set that holds none of those then costs the logits of the frequent
    tokens alone. It is a sum and no difference, so that a small inactive mass is as exact as a large one. Products are
    float32 whatever the base is computed in.
    """
    rows = len(base.model.get_output_embeddings().weight)
    counts = np.bincount(texts.tokens, minlength=rows)
    token, *sums, lse = _whole_vocabulary(base, texts)
    outside, rest = np.delete(np.arange(rows), active), np.full_like(lse, -np.inf)
    for least, those in zip(RARER, sums, strict=True):
        if len(active) and counts[active].min() >= least:
            outside, rest = np.setdiff1d(np.flatnonzero(counts >= least), active), those

    def of_active(hidden: Tensor, at: slice) -> list[Tensor]:
        inactive = torch.from_numpy(rest[at]).to(hidden.device)
        inactive = torch.logaddexp(inactive, _lse_over(base, hidden, outside))
        return [inactive, _mean_over(base, hidden, active)]

    digest = hashlib.sha256(active.tobytes()).hexdigest()
    inactive, mean = _by_position(base, texts, {"active": digest}, of_active)
    return HeadConstants(token, lse, inactive, mean)


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
    base: Base, model: Any, hidden: Tensor, target: Tensor, power: Tensor | None = None
) -> Float[Tensor, "positions"]:
    """log probability of the token at each position, nats, float32; gradients flow.

    power : () float32, 1 + s: of the distribution proportional to the model's own to this power; None: 1.
    """
    head = model.get_output_embeddings()
    plain = type(head) is nn.Linear and logit_map(base.model.config.get_text_config()) is None
    if plain and not head.weight.requires_grad and (power is None or head.bias is None):
        states = hidden if power is None else power * hidden
        return _FrozenHeadLogps.apply(states.to(head.weight.dtype), head.weight, head.bias, target)
    logits = head_logits(base, hidden, model)
    logits = logits if power is None else power * logits
    return logits.gather(1, target[:, None]).squeeze(1) - logits.logsumexp(1)


def response_logps(
    base: Base,
    model: Any,
    inputs: dict[str, Tensor],
    rows: Tensor | None,
    n_texts: int,
    power: Tensor | None = None,
) -> Float[Tensor, "rows"]:
    """log probability of the responses of these rows (None: all), nats; gradients flow. `power`: see `token_logps`."""
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
    logps = token_logps(base, model, hidden[segment, column], target, power)
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
