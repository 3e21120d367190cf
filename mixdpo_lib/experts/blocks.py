"""The blocks of a transformer: which a base has, and what enters one of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..base.features import padded
from ..base.model import Base
from ..store import MixDPOError, cached, large_array, progress

VERSION = 2


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


def lower_states(
    base: Base, model: Any, block: int, ids: Sequence[tuple[list[int], list[int]]], key: str
) -> np.ndarray:
    """What enters this block at every token, float32 (positions, hidden), memory-mapped, from the cache if there.

    ids : token ids of prompt and response of each text, which have this key.
    """
    offsets = np.concatenate([[0], np.cumsum([len(a) + len(b) for a, b in ids])])

    def build(folder: Path) -> None:
        out = large_array(folder / "lower.npy", (int(offsets[-1]), base.hidden_size))
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

    options = {"block": block, "base": base.fingerprint}
    folder = cached("lower", VERSION, options, build, inputs=[key])
    return np.load(folder / "lower.npy", mmap_mode="r", allow_pickle=False)
