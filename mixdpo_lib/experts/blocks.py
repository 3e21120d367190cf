"""The blocks of a transformer: which a base has, and what enters one of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..base.features import TokenIds, ids_key, padded
from ..base.model import Base
from ..store import MixDPOError, cached, large_array, progress

VERSION = 3


def block_list(model: Any) -> tuple[str, nn.ModuleList]:
    """The transformer blocks of a causal language model and their name inside it.

    Raises
    ------
    MixDPOError : a model without one list of `num_hidden_layers` blocks.
    """
    n = int(model.config.get_text_config().num_hidden_layers)
    found = [
        (name, m)
        for name, m in model.named_modules()
        if isinstance(m, nn.ModuleList) and len(m) == n
    ]
    if not found:
        raise MixDPOError(f"{type(model).__name__}: no list of {n} blocks found; adapters need one")
    return found[0]


def linear_names(block: nn.Module) -> list[str]:
    """Names of the linear layers of a block, without what is above them, in order."""
    found = [
        name.rsplit(".", 1)[-1]
        for name, m in block.named_modules()
        if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"
    ]
    return list(dict.fromkeys(found))


def turned(block: nn.Module) -> bool:
    """Whether the linear layers of a block keep their weights transposed, as GPT-2 does."""
    return any(type(m).__name__ == "Conv1D" for m in block.modules())


class _Enough(Exception):
    """Raised where the lower blocks have said what was asked."""


@torch.no_grad()
def entering(
    model: Any,
    block: int,
    input_ids: Int[Tensor, "rows columns"],
    mask: Int[Tensor, "rows columns"],
) -> Float[Tensor, "rows columns hidden"]:
    """What enters a block of the model (its number from 0), without running that block or those above it."""
    found: list[Tensor] = []

    def stop(_: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        found.append(args[0] if args else options["hidden_states"])
        raise _Enough

    handle = block_list(model)[1][block].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model.base_model(input_ids=input_ids, attention_mask=mask, use_cache=False)
    except _Enough:
        return found[0]
    finally:
        handle.remove()
    raise MixDPOError(f"{type(model).__name__}: block {block} does not run; use IndependentExperts")


@torch.no_grad()
def block_gives(model: Any) -> int:
    """How many things a block gives: 0 where it is its hidden states alone, else the length of a tuple they lead."""
    found: list[Any] = []
    handle = block_list(model)[1][0].register_forward_hook(lambda *call: found.append(call[2]))
    try:
        ids = torch.ones(1, 2, dtype=torch.long, device=model.device)
        model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    finally:
        handle.remove()
    return len(found[0]) if isinstance(found[0], tuple) else 0


def unless_kept(
    forward: Callable[..., Any], kept: Callable[[], Tensor | None], gives: int
) -> Callable[..., Any]:
    """A block's forward pass, which gives what was kept of it where something was, in its own form (`block_gives`)."""

    def run(*args: Any, **options: Any) -> Any:
        if (states := kept()) is None:
            return forward(*args, **options)
        return (states, *[None] * (gives - 1)) if gives else states

    return run


def chosen_layers(
    base: Base, blocks: int | Sequence[int], target_modules: Sequence[str] | None
) -> tuple[list[int], list[str]]:
    """Numbers of the blocks, from 0, and names of the linear layers that these options of `AdapterExperts` choose.

    Raises
    ------
    ValueError : blocks or modules that the base has not (what it has is named).
    """
    n_blocks = len(block_list(base.model)[1])
    chosen = (
        list(range(n_blocks - blocks, n_blocks)) if isinstance(blocks, int) else sorted(set(blocks))
    )
    if not chosen or not 0 <= chosen[0] <= chosen[-1] < n_blocks:
        raise ValueError(
            f"blocks={blocks}: {base.name} has {n_blocks} blocks, 0 ... {n_blocks - 1}; give a number "
            f"from 1 to {n_blocks}, or a list of them"
        )
    known = linear_names(block_list(base.model)[1][chosen[0]])
    unknown = sorted(set(target_modules or ()) - set(known))
    if unknown or (target_modules is not None and not target_modules):
        raise ValueError(
            f"target_modules={target_modules}: {unknown} not in the blocks of {base.name}; possible are {known}"
        )
    return chosen, list(target_modules or known)


def lower_states(base: Base, model: Any, block: int, ids: TokenIds) -> np.ndarray:
    """What enters this block at every token, float32 (positions, hidden), memory-mapped, from the cache if there.

    ids : token ids of prompt and response of each text.
    """
    offsets = np.concatenate([[0], np.cumsum([len(a) + len(b) for a, b in ids])])

    def build(folder: Path) -> None:
        width = int(base.model.config.get_text_config().hidden_size)  # of a block, not of the head
        out = large_array(folder / "lower.npy", (int(offsets[-1]), width))
        order = sorted(range(len(ids)), key=lambda i: -len(ids[i][0]) - len(ids[i][1]))
        for start in range(0, len(order), 48):
            rows = order[start : start + 48]
            inputs = padded([ids[i] for i in rows])
            on = (inputs[name].to(base.device) for name in ("input_ids", "attention_mask"))
            states = entering(model, block, *on)
            for state, i in zip(states.float().cpu().numpy(), rows, strict=True):
                out[offsets[i] : offsets[i + 1]] = state[: offsets[i + 1] - offsets[i]]
            progress("lower blocks", start + len(rows), len(order), "texts")
        out.flush()

    options = {"block": block, "base": base.fingerprint, "ids": ids_key(ids)}
    folder = cached("lower", VERSION, options, build)
    return np.load(folder / "lower.npy", mmap_mode="r", allow_pickle=False)
