"""How is text sampled from a next-token function?

The function may be anything: a base model, an expert, a batch whose rows belong to different experts.  Nothing here
knows where it comes from.  Plain sampling (``temperature=1`` without truncation) draws exactly from it, which is what
KL and perplexity are measured on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

NextTokenFunction = Callable[[Tensor, Tensor], Tensor]
BLOCK = 256  # the vocabulary is summed in blocks of this many tokens, so that a draw reads one block and the block sums
RARE = 1e-4  # most nuclei hold no token of a smaller probability


@dataclass(frozen=True)
class Decoded:
    """What was sampled: the new tokens of each row, and whether the row ended itself.

    tokens : new token ids by row, without the prompt, padding and end token.
    ended : True where the end token was drawn, False where ``max_new_tokens`` cut the row off.
    """

    tokens: list[list[int]]
    ended: list[bool]


def left_pad(
    prompt_ids: Sequence[Sequence[int]], pad_id: int
) -> tuple[Int[Tensor, "rows T"], Int[Tensor, "rows T"]]:
    """Prompts of unequal length as one batch, padded on the left so that all of them end in the last column.

    Returns
    -------
    ``(input_ids, attention_mask)``, int64; the mask is 0 on padding.

    Raises
    ------
    ValueError : no prompt at all, or an empty one (the row is named).

    >>> left_pad([[5, 6, 7], [8]], pad_id=0)
    (tensor([[5, 6, 7],
            [0, 0, 8]]), tensor([[1, 1, 1],
            [0, 0, 1]]))
    """
    if len(prompt_ids) == 0:
        raise ValueError("prompt_ids is empty; give at least one prompt")
    for row, ids in enumerate(prompt_ids):
        if len(ids) == 0:
            raise ValueError(
                f"prompt_ids[{row}] is empty; expected at least one token, for example the start token"
            )
    width = max(len(ids) for ids in prompt_ids)
    input_ids = torch.full((len(prompt_ids), width), pad_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(prompt_ids):
        input_ids[row, width - len(ids) :] = torch.as_tensor(list(ids), dtype=torch.long)
        attention_mask[row, width - len(ids) :] = 1
    return input_ids, attention_mask


def _first_above(cumulative: Tensor, u: Tensor) -> Tensor:
    """By row, the first column whose running total exceeds ``u`` times the whole: its own share is above 0."""
    total = cumulative[:, -1:]
    target = torch.minimum(u[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True)


def draw(shares: Float[Tensor, "rows tokens"], u: Float[Tensor, "rows"]) -> Int[Tensor, "rows"]:
    """Draw one column by row in proportion to ``shares``, by the inverse of the cumulative distribution.

    Exact up to the rounding of float32 *relative to each share*: the running totals are kept in float64 and in two
    levels (blocks, then the tokens of one block), so that rare tokens are not lost in the rounding of a long sum.
    A share of 0 is never drawn.  One number decides a row, so that a row does not depend on the rows beside it.

    Parameters
    ----------
    shares : >= 0, not all 0 in a row; need not be normalised.
    u : in [0, 1), float64.

    >>> draw(torch.tensor([[0.0, 0.3, 0.7], [0.0, 0.3, 0.7]]), torch.tensor([0.0, 0.5], dtype=torch.float64))
    tensor([1, 2])
    """
    rows, tokens = shares.shape
    blocks = math.ceil(tokens / BLOCK)
    if blocks * BLOCK != tokens:
        shares = torch.nn.functional.pad(shares, (0, blocks * BLOCK - tokens))
    parts = shares.view(rows, blocks, BLOCK)
    upto = parts.sum(-1).double().cumsum(-1)
    block = _first_above(upto, u)
    before = torch.cat([torch.zeros_like(upto[:, :1]), upto], dim=-1)
    start, end = before.gather(1, block), before.gather(1, block + 1)
    within = ((u[:, None] * upto[:, -1:] - start) / (end - start)).clamp(0.0, 1.0)
    chosen = parts[torch.arange(rows, device=shares.device), block[:, 0]].double().cumsum(-1)
    return block[:, 0] * BLOCK + _first_above(chosen, within[:, 0])[:, 0]


def _nucleus(logits: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """``(token ids, shares)`` of the smallest set of tokens by row that holds at least ``top_p`` of the probability.

    Largest shares first; at the end of a row stand tokens with a share of 0, which may be any.
    """
    shares = logits.softmax(-1)
    # the tokens below `least` hold less than 1 - top_p together, so that the nucleus lies among the others
    sure = 0.5 * (1 - top_p) / logits.shape[-1]
    common = shares.masked_fill(shares < RARE, 0.0).sum(-1, keepdim=True)
    least = torch.where(common > top_p + 1e-4, max(RARE, sure), sure)
    row, token = (shares >= least).nonzero(as_tuple=True)
    counts = row.bincount(minlength=len(shares))
    place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    ids = token.new_zeros(len(shares), int(counts.max())).index_put((row, place), token)
    found = shares.new_zeros(ids.shape).index_put((row, place), shares[row, token])
    found, order = found.sort(dim=-1, descending=True, stable=True)
    before = found.double().cumsum(-1) - found
    # a token stays while the tokens before it hold less than top_p: the first one always does
    return ids.gather(1, order), found.masked_fill(before >= top_p, 0.0)


def _check_truncation(temperature: float, top_k: int | None, top_p: float | None) -> None:
    if not 0 < temperature < math.inf:
        raise ValueError(
            f"temperature={temperature}: expected above 0; use greedy=True for the most likely token"
        )
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k}: expected at least 1, or None for no truncation")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(
            f"top_p={top_p}: expected above 0 and at most 1, or None for no truncation"
        )


def _check(
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    greedy: bool,
    generator: torch.Generator | None,
) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}: expected at least 1")
    _check_truncation(temperature, top_k, top_p)
    if greedy and (temperature != 1 or top_k is not None or top_p is not None):
        raise ValueError(
            "greedy=True takes the most likely token: temperature, top_k and top_p say nothing; drop them"
        )
    if not greedy and generator is None:
        raise ValueError(
            "sampling needs a generator: pass torch.Generator().manual_seed(seed), or greedy=True"
        )


def _shares(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None
) -> tuple[Tensor | None, Tensor]:
    """``(token ids, shares)`` of the tokens that stay, truncated and tempered as asked; ids None: all, in order."""
    if temperature != 1:
        logits = logits / temperature
    ids = None
    if top_k is not None and top_k < logits.shape[-1]:
        logits, ids = logits.topk(top_k, dim=-1)
    if top_p is not None and top_p < 1:
        inner, shares = _nucleus(logits, top_p)
        return (inner if ids is None else ids.gather(1, inner)), shares
    return ids, (logits - logits.amax(-1, keepdim=True)).exp_()


def _next(
    logits: Tensor, u: Tensor, temperature: float, top_k: int | None, top_p: float | None
) -> Tensor:
    """One token by row from float32 logits, truncated and tempered as asked."""
    ids, shares = _shares(logits, temperature, top_k, top_p)
    column = draw(shares, u)
    return column if ids is None else ids.gather(1, column[:, None])[:, 0]


def truncated_log_probs(
    logits: Float[Tensor, "rows tokens"],
    temperature: float | int = 1.0,
    top_k: int | None = None,
    top_p: float | int | None = None,
) -> Float[Tensor, "rows tokens"]:
    """Log-probabilities that :func:`sample` draws from under these options, in nats; ``-inf`` for a token cut off.

    Parameters
    ----------
    temperature, top_k, top_p : as in :func:`sample`.

    Raises
    ------
    ValueError : an option out of range.

    >>> truncated_log_probs(torch.tensor([[0.5, 0.1, 0.25, 0.15]]).log(), top_k=2).exp()
    tensor([[0.6667, 0.0000, 0.3333, 0.0000]])
    """
    _check_truncation(temperature, top_k, top_p)
    ids, shares = _shares(logits, temperature, top_k, top_p)
    if ids is None:
        return (logits / temperature).log_softmax(-1)
    log_p = (shares / shares.sum(-1, keepdim=True)).log()
    return torch.full_like(logits, -math.inf).scatter_reduce(1, ids, log_p, "amax")


@torch.no_grad()
def sample(
    step: NextTokenFunction,
    prompt_ids: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float | int = 1.0,
    top_k: int | None = None,
    top_p: float | int | None = None,
    greedy: bool = False,
    eos_token_id: int | Sequence[int] | None = None,
    pad_id: int | None = None,
    generator: torch.Generator | None = None,
    progress: Callable[[int, int], None] | None = None,
    observe: Callable[[Tensor], None] | None = None,
) -> Decoded:
    """Continue each prompt by up to ``max_new_tokens`` tokens.

    Parameters
    ----------
    step : next-token function ``step(input_ids (B, T), attention_mask (B, total)) -> logits (B, V)``.  It keeps its own
        cache: the first call has the left-padded prompts, every later call one column; the mask spans all columns so
        far.  B stays the same; rows that ended are fed ``pad_id`` and what they give is not recorded.
    prompt_ids : token ids of the prompts, none empty.
    max_new_tokens : >= 1.
    temperature : > 0, divides the logits; 1 samples the function itself.
    top_k : keep the k most likely tokens (after the temperature); None keeps all.
    top_p : keep the smallest set of tokens that holds this probability (after top_k); None keeps all.
    greedy : take the most likely token; excludes the three above.
    eos_token_id : end token, or several; each ends its row and is not recorded.  None: every row runs to
        ``max_new_tokens``.
    pad_id : what padding is filled with; default the (first) end token, else 0.  Masked, so that any id will do.
    generator : source of randomness, required unless greedy.  It is advanced by B x max_new_tokens numbers whatever
        the rows do; each row has its own, so that a row is the same when a batch is split or other rows end early.
    progress : called with (tokens done, max_new_tokens) after each step.
    observe : called with the tokens (B,) drawn at each step, where the logits lie, also those of rows that ended.

    Returns
    -------
    Decoded(tokens, ended).

    Raises
    ------
    ValueError : an empty prompt, an option out of range, options that contradict each other, logits of another shape.
    RuntimeError : logits that are NaN, +inf or all -inf (step and row are named).

    Notes
    -----
    Untruncated sampling at temperature 1 draws exactly from ``softmax(logits)``, by one pass over the vocabulary and no
    sort.  A mixture is sampled by drawing the expert of each row once and letting ``step`` use it throughout, or by a
    ``step`` that weights the experts by their posterior (``next_token.MixtureNextToken``).

    >>> step = lambda input_ids, mask: torch.eye(4)[(input_ids[:, -1] + 1) % 4].log()   # counts 0 1 2 3 0 ...
    >>> sample(step, [[0], [3, 1]], 5, eos_token_id=3, generator=torch.Generator().manual_seed(0))
    Decoded(tokens=[[1, 2], [2]], ended=[True, True])
    """
    _check(max_new_tokens, temperature, top_k, top_p, greedy, generator)
    one = eos_token_id is None or isinstance(eos_token_id, int)
    ends: list[Any] = [eos_token_id] if one else [*eos_token_id]  # type: ignore[misc, list-item]
    pad = next((i for i in (pad_id, *ends) if i is not None), 0)
    input_ids, mask = left_pad(prompt_ids, pad)
    rows = len(prompt_ids)
    if generator is not None:
        # the numbers of one row lie together, so that a batch that is split reads the same stream
        shape, device = (rows, max_new_tokens), generator.device
        chance = torch.rand(shape, dtype=torch.float64, generator=generator, device=device)
    tokens: list[list[int]] = [[] for _ in range(rows)]
    ended = torch.zeros(rows, dtype=torch.bool)
    for position in range(max_new_tokens):
        logits = step(input_ids, mask)
        if logits.dim() != 2 or logits.shape[0] != rows:
            raise ValueError(
                f"step gave logits of shape {tuple(logits.shape)}; expected ({rows}, vocabulary)"
            )
        if not logits.dtype == torch.float64:
            logits = logits.float()
        peak = logits.amax(-1)
        if not bool(peak.isfinite().all()):  # NaN spreads into the maximum
            row = int((~peak.isfinite()).nonzero()[0])
            raise RuntimeError(
                f"step {position}, row {row}: the largest logit is {float(peak[row])}, expected a finite number; "
                "look for a diverged expert or a mask that excludes every token"
            )
        if greedy:
            chosen = logits.argmax(-1)
        else:
            chosen = _next(logits, chance[:, position].to(logits.device), temperature, top_k, top_p)
        drawn, chosen = chosen, chosen.cpu()
        for row, token in enumerate(chosen.tolist()):
            if ended[row]:
                continue
            if token in ends:
                ended[row] = True
            else:
                tokens[row].append(token)
        if observe is not None:
            observe(drawn)
        if progress is not None:
            progress(position + 1, max_new_tokens)
        if bool(ended.all()):
            break
        input_ids = chosen.masked_fill(ended, pad)[:, None]
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    return Decoded(tokens, ended.tolist())
