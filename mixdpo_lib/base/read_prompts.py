"""Which prompts did the base read already? Many policies continue the same ones, and their heads change none of its states."""

from __future__ import annotations

from collections import OrderedDict
from copy import deepcopy
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from .architecture import read_on

# Of kept states, for each model; the batch that was used longest ago goes first.
MOST_BYTES = 1 << 29
_Key = tuple[Any, ...]
_kept: WeakKeyDictionary[nn.Module, OrderedDict[_Key, tuple[Tensor, Any, int]]] = (
    WeakKeyDictionary()
)


def _bytes(cache: Any) -> int | None:
    """Of keys and values; None for a cache that is not made of them."""
    layers = getattr(cache, "layers", None)
    if not layers or not all(isinstance(getattr(one, "keys", None), Tensor) for one in layers):
        return None
    return sum(int(one.keys.nbytes + one.values.nbytes) for one in layers)


def _key(model: Any, input_ids: Tensor, mask: Tensor) -> _Key:
    """Another batch, another device or a weight that was written since is another key."""
    shape, place = tuple(input_ids.shape), str(input_ids.device)
    rows = (input_ids.cpu().numpy().tobytes(), mask.cpu().numpy().tobytes())
    weights = tuple((p.data_ptr(), p._version) for p in model.parameters())  # noqa: SLF001
    return (shape, place, *rows, weights)


def read_prompts(model: Any, input_ids: Tensor, mask: Tensor) -> tuple[Tensor, Any]:
    """`architecture.read_on` from the start, whose states are kept: the same batch gives them again to the bit.

    input_ids, mask : (rows, T) int64, as `sampling.left_pad` makes them. Returns the last hidden state of each row and
    a cache of the caller's own.
    """
    kept = _kept.setdefault(model, OrderedDict())
    key = _key(model, input_ids, mask)
    if key in kept:
        kept.move_to_end(key)
        hidden, cache, _ = kept[key]
        return hidden.clone(), deepcopy(cache)
    hidden, cache = read_on(model, input_ids, mask, None)
    size = _bytes(cache)
    if size is not None and size <= MOST_BYTES:
        kept[key] = (hidden.clone(), deepcopy(cache), size)
        while sum(one for _, _, one in kept.values()) > MOST_BYTES:
            kept.popitem(last=False)
    return hidden, cache
