"""Which causal models can be read, and how are they read on?

Asked of a model when it is loaded: its logits are its head on the last hidden state (scaled and capped as some do), no
position sees a later one, and padding on the right changes nothing. How it goes on from a prompt is tried once: with its
cache and padding on the left, or, where that gives other states, by reading each text anew.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..store import MixDPOError

TOLERANCE = 1e-3  # of the largest value; rounding of float32 is far below, bfloat16 is given more


def logit_map(config: Any) -> Callable[[Tensor], Tensor] | None:
    """What a model does to its head's output: a factor (Cohere, Granite), then soft-capping (Gemma); None: nothing.

    c tanh(z / c) keeps every logit between -c and c (Gemma 2, arXiv 2408.00118).
    """
    factor = float(getattr(config, "logit_scale", None) or 1.0) / float(
        getattr(config, "logits_scaling", None) or 1.0
    )
    factor *= float(getattr(config, "lm_head_multiplier", None) or 1.0)
    caps = (getattr(config, n, None) for n in ("final_logit_softcapping", "logits_soft_cap"))
    cap = next((one for one in caps if one is not None), None)
    if factor == 1.0 and cap is None:
        return None
    return lambda z: factor * z if cap is None else cap * torch.tanh(factor * z / cap)


# ------------------------------------------------------------------------------------------------------------- at load


def _differ(one: Tensor, other: Tensor) -> float:
    """Largest difference as a share of what is allowed."""
    allowed = TOLERANCE if one.dtype == torch.float32 else 0.05
    scale = max(1.0, float(one.abs().max()))
    difference = float((one.float() - other.float()).abs().max())
    return difference / (allowed * scale) if difference == difference else float("inf")


@torch.no_grad()
def check_model(model: Any, place: Path | str) -> None:
    """Refuse a model that cannot be read as a causal language model with an ordinary head.

    Raises
    ------
    MixDPOError : what was asked, what was found, and which models are right.
    """

    def refuse(found: str) -> MixDPOError:
        return MixDPOError(
            f"{place}: {type(model).__name__} cannot be read here: {found}; expected a causal language model whose "
            "logits are a linear head on its last hidden state (Llama, Qwen, Gemma, Mistral, GPT-2, Phi, ... are)"
        )

    head = model.get_output_embeddings()
    if getattr(getattr(head, "weight", None), "dim", lambda: 0)() != 2:
        raise refuse("it has no output head")
    rows = min(len(head.weight), len(model.get_input_embeddings().weight))
    ids = (torch.arange(7, device=model.device) * 7 + 3)[None] % rows
    other = ids.clone()
    other[0, -1] = (other[0, -1] + 1) % rows
    try:
        logits = model(input_ids=ids, use_cache=False).logits
        hidden = _last_states(model, ids)
        padded = _last_states(
            model,
            torch.cat([ids, ids[:, :2]], 1),
            torch.tensor([[1] * 7 + [0] * 2], device=ids.device),
        )
        changed = model(input_ids=other, use_cache=False).logits
    except Exception as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise refuse(f"a forward pass failed ({type(error).__name__}: {said})") from error
    if not bool(logits.isfinite().all()):
        raise refuse("its logits are not finite: damaged weights, or a dtype that is too small")
    if hidden.shape[-1] != head.weight.shape[1]:
        raise refuse(
            f"its last hidden state has {hidden.shape[-1]} numbers, its head reads {head.weight.shape[1]}"
        )
    mapped = logit_map(model.config.get_text_config()) or (lambda z: z)
    if _differ(logits, mapped(head(hidden).float())) > 1:
        raise refuse("its logits are not its head on the last hidden state")
    if _differ(logits[:, :-1], changed[:, :-1]) > 1:
        raise refuse("positions see what comes after them (it reads in both directions)")
    if _differ(hidden, padded[:, :7]) > 1:
        raise refuse("padding on the right changes what stands before it")


def _last_states(
    model: Any, input_ids: Int[Tensor, "rows n"], mask: Int[Tensor, "rows n"] | None = None
) -> Float[Tensor, "rows n hidden"]:
    mask = torch.ones_like(input_ids) if mask is None else mask
    out = model.base_model(input_ids=input_ids, attention_mask=mask, use_cache=False)
    return out.last_hidden_state


# ---------------------------------------------------------------------------------------------------------- reading on


class Reread:
    """What was read so far, of a model whose cache cannot be used: rows of token ids without padding."""

    def __init__(self) -> None:
        self.rows: list[list[int]] = []

    def reorder_cache(self, source: Int[Tensor, "rows"]) -> None:
        """Row i goes on from row source[i]."""
        self.rows = [list(self.rows[i]) for i in source.tolist()]

    def read(
        self, model: Any, input_ids: Int[Tensor, "rows t"], mask: Int[Tensor, "rows total"]
    ) -> Float[Tensor, "rows hidden"]:
        """The last hidden state of each row after these further tokens: padded on the right, which changes nothing."""
        own = mask[:, -input_ids.shape[1] :]
        new = [ids[keep > 0].tolist() for ids, keep in zip(input_ids, own, strict=True)]
        self.rows = [[*a, *b] for a, b in zip(self.rows or [[]] * len(new), new, strict=True)]
        width = max(map(len, self.rows))
        padded = torch.zeros(len(self.rows), width, dtype=torch.long, device=input_ids.device)
        seen = torch.zeros_like(padded)
        for i, row in enumerate(self.rows):
            padded[i, : len(row)] = torch.tensor(row, device=input_ids.device)
            seen[i, : len(row)] = 1
        last = torch.tensor([len(row) - 1 for row in self.rows], device=input_ids.device)
        states = _last_states(model, padded, seen)
        return states[torch.arange(len(last), device=last.device), last]


def _with_cache(
    model: Any, input_ids: Tensor, mask: Tensor, cache: Any
) -> tuple[Float[Tensor, "rows hidden"], Any]:
    options: dict[str, Any] = {}
    if "position_ids" in inspect.signature(model.base_model.forward).parameters:
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        options["position_ids"] = positions
    out = model.base_model(
        input_ids=input_ids, attention_mask=mask, use_cache=True, past_key_values=cache, **options
    )
    return out.last_hidden_state[:, -1], out.past_key_values


_cache_is_right: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@torch.no_grad()
def _try_cache(model: Any) -> bool:
    """Whether a prompt padded on the left, read on by the cache in two rows, gives the states of the plain text."""
    rows = len(model.get_input_embeddings().weight)
    ids = (torch.arange(6, device=model.device) * 5 + 2)[None] % rows
    plain = _last_states(model, ids)[:, -1]
    padded = torch.cat([ids[:, :2] * 0, ids], 1)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]], device=ids.device)
    try:
        _, cache = _with_cache(model, padded[:, :5], mask[:, :5], None)
        cache.reorder_cache(torch.zeros(2, dtype=torch.long, device=ids.device))
        padded, mask = padded.expand(2, -1), mask.expand(2, -1)
        for n in (6, 7, 8):
            state, cache = _with_cache(model, padded[:, n - 1 : n], mask[:, :n], cache)
        return _differ(plain.expand(2, -1), state) <= 1
    except Exception:  # whatever an architecture says of a call that it does not know
        return False


def read_on(
    model: Any, input_ids: Tensor, mask: Tensor, cache: Any
) -> tuple[Float[Tensor, "rows hidden"], Any]:
    """The last hidden state of each row after these further tokens, and the cache that remembers them.

    Prompts that are equal are read once.

    mask : (rows, total), 0 where left padding stands, over all tokens so far; positions are counted without it.
    """
    if model not in _cache_is_right:
        _cache_is_right[model] = _try_cache(model)
    if _cache_is_right[model] and cache is None:
        both, place = torch.stack([input_ids, mask], 1).unique(dim=0, return_inverse=True)
        if len(both) < len(place):
            hidden, cache = _with_cache(model, both[:, 0], both[:, 1], None)
            cache.reorder_cache(place)
            return hidden[place], cache
    if _cache_is_right[model] and not isinstance(cache, Reread):
        return _with_cache(model, input_ids, mask, cache)
    cache = Reread() if cache is None else cache
    return cache.read(model, input_ids, mask), cache
