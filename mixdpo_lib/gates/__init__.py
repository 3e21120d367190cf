"""Which expert is asked? Gates give log w, the weights of the experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .membership import MixedMembershipGate
from .prompt import ContextGate
from .user import UserGate
from .weights import FixedWeights, LearnedWeights

Gate = FixedWeights | LearnedWeights | ContextGate | UserGate | MixedMembershipGate


def make_gate(options: Mapping[str, Any]) -> Gate:
    """The gate that ``gate.options()`` describes, with parameters as at the start.

    Raises
    ------
    ValueError : an unknown kind of gate.

    >>> make_gate(ContextGate(3, 2, width=4).options()).inner
    Linear(in_features=3, out_features=4, bias=True)
    """
    own = dict(options)
    kind = own.pop("gate", None)
    if kind == "UserGate":
        own["columns"] = {n: tuple(c) if isinstance(c[0], float) else list(c) for n, c in own["columns"].items()}
        return UserGate(**own)
    if kind == "MixedMembershipGate":
        own["gates"] = [make_gate(one) for one in own["gates"]]
        return MixedMembershipGate(**own)
    if kind == "FixedWeights":
        return FixedWeights.uniform(own["n_experts"])
    kinds: dict[Any, Any] = {"ContextGate": ContextGate, "LearnedWeights": LearnedWeights}
    if kind not in kinds:
        raise ValueError(f"gate={kind!r}: found no gate of this kind; it was saved by a newer version, or damaged")
    return kinds[kind](**own)
