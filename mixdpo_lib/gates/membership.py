"""A user who is a blend: prompt and user together, and an offset for each user."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..elbo import check_n_experts
from .contract import log_normal, positive
from .prompt import ContextGate
from .user import UserGate


class MixedMembershipGate(nn.Module):
    """Prompt and user together: ``log_w = log_softmax((f(x) + W m_u + theta_u) / gate_temperature)``.

    For ``latent="pair"``: a user is a blend, each comparison draws its own expert.  theta_u is the user's own offset
    with the prior N(0, offset_scale^2); a user without pairs has the offset 0, the prior's mode.

    Parameters
    ----------
    gates : one or two of :class:`ContextGate` and :class:`UserGate`; empty: offsets alone.
    units : names of the users with an offset; their places are ``batch["unit"]``, where -1 is a user without one.
    offset_scale : > 0, nats; 1 by default: an offset of two standard deviations multiplies a weight by seven.
    column : the column of the data that names the user.

    Raises
    ------
    ValueError : gates of different K, no users or one named twice, offset_scale not above 0.

    >>> gate = MixedMembershipGate([], n_experts=2, units=["ann", "bob"])
    >>> gate.places(["bob", "eve"])
    tensor([ 1, -1])
    >>> gate({"unit": torch.tensor([0, -1])}).exp()
    tensor([[0.5000, 0.5000],
            [0.5000, 0.5000]], grad_fn=<ExpBackward0>)
    """

    def __init__(
        self, gates: Sequence[ContextGate | UserGate], n_experts: int, units: Sequence[str],
        offset_scale: float | int = 1.0, gate_temperature: float | int = 1.0, column: str = "user",
    ) -> None:  # fmt: skip
        super().__init__()
        check_n_experts(n_experts)
        if any(gate.n_experts != n_experts for gate in gates):
            raise ValueError(f"gates have {[gate.n_experts for gate in gates]} experts; expected {n_experts} in each")
        if len(units) == 0 or len(set(units)) < len(units):
            raise ValueError(
                f"units: found {len(units)}, {len(set(units))} of them distinct; expected one name for each user, and "
                "at least one; without users a ContextGate is enough"
            )
        self.n_experts, self.units, self.column = n_experts, list(units), column
        self.offset_scale = positive("offset_scale", offset_scale)
        self.gate_temperature = positive("gate_temperature", gate_temperature)
        self.gates = nn.ModuleList(gates)
        self.offset = nn.Parameter(torch.zeros(len(units), n_experts))
        self.reads = (*(name for gate in gates for name in gate.reads), "unit")

    @property
    def suffix(self) -> str:
        """That of the gate of prompts among ``gates``."""
        return next((gate.suffix for gate in self.gates if isinstance(gate, ContextGate)), "")

    @property
    def layer(self) -> int | None:
        """That of the gate of prompts among ``gates``."""
        return next((gate.layer for gate in self.gates if isinstance(gate, ContextGate)), None)

    def options(self) -> dict[str, Any]:
        """What makes an equal gate but for its parameters, see :func:`make_gate`."""
        return {"gate": "MixedMembershipGate", "gates": [gate.options() for gate in self.gates],  # type: ignore[operator]
                "n_experts": self.n_experts, "units": self.units, "offset_scale": self.offset_scale,
                "gate_temperature": self.gate_temperature, "column": self.column}  # fmt: skip

    def with_units(self, units: Sequence[str]) -> "MixedMembershipGate":
        """The same gates for other users, whose offsets start at 0; a user who had an offset keeps it.

        The gates are shared with this one, not copied.

        >>> MixedMembershipGate([], n_experts=2, units=["ann"]).with_units(["ann", "eve"]).offset.shape
        torch.Size([2, 2])
        """
        other = MixedMembershipGate(
            list(self.gates), self.n_experts, units, self.offset_scale, self.gate_temperature, self.column  # type: ignore[arg-type]
        )
        places = self.places(units)
        known = places >= 0
        with torch.no_grad():
            other.offset[known] = self.offset[places[known]]
        return other

    def places(self, names: Sequence[str]) -> Int[Tensor, "rows"]:
        """Place of each user's offset; -1 for users without one."""
        place = {name: i for i, name in enumerate(self.units)}
        return torch.tensor([place.get(name, -1) for name in names])

    def encode(self, metadata: Mapping[str, Sequence[Any]]) -> Float[Tensor, "rows features"]:
        """As :meth:`UserGate.encode`, by the gate of users among ``gates``."""
        return next(gate for gate in self.gates if isinstance(gate, UserGate)).encode(metadata)

    def forward(self, batch: Mapping[str, Tensor]) -> Float[Tensor, "rows experts"]:
        """log_w of every row, nats; gradients flow to the gates and the offsets."""
        if "unit" not in batch:
            raise ValueError(f"batch['unit'] is absent; found {sorted(batch)}: give -1 for users without an offset")
        unit = batch["unit"]
        n_units = len(self.units)
        if len(unit) and not -1 <= int(unit.min()) <= int(unit.max()) < n_units:
            row = int(((unit < -1) | (unit >= n_units)).nonzero()[0])
            raise ValueError(f"batch['unit'][{row}] = {int(unit[row])}; expected -1 ... {n_units - 1}")
        known = (unit >= 0).to(self.offset.dtype)[:, None]
        total = self.offset[unit.clamp(min=0)] * known
        for gate in self.gates:
            total = total + gate.logits(batch)  # type: ignore[operator]
        return (total / self.gate_temperature).log_softmax(-1)

    def log_prior(self) -> Float[Tensor, ""]:
        """Log density of the offsets and of the gates' weights under their priors, without constants; nats."""
        return sum((gate.log_prior() for gate in self.gates), log_normal([self.offset], self.offset_scale))  # type: ignore[operator]
