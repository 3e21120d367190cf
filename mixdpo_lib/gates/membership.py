"""A user who is a blend: other gates together, and an offset for each user."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..base.model import Base
from ..data.checks import written
from .contract import Gate, make_gate
from .inputs import column, log_normal, positive
from .m_step import gate_em


class MixedMembershipGate(Gate):
    """Other gates and the user together: ``log_w = log_softmax(sum of the gates' logits + theta_u)``.

    For ``latent="pair"``: a user is a blend, each comparison draws its own expert.  theta_u is the user's own offset
    with the prior N(0, offset_scale^2); a user without pairs has the offset 0, the prior's mode.

    Parameters
    ----------
    gates : gates that read, such as :class:`ContextGate` and :class:`UserGate`; empty: offsets alone.
    units : names of the users with an offset.
    offset_scale : > 0, nats; 1 by default: an offset of two standard deviations multiplies a weight by seven.
    column : the column of the data that names the user.

    Raises
    ------
    ValueError : gates of different K, no users or one named twice, offset_scale not above 0.

    >>> gate = MixedMembershipGate([], n_experts=2, units=["ann", "bob"])
    >>> gate.inputs({"user": ["bob", "eve"]}, None)["unit"]
    tensor([ 1, -1])
    >>> gate.log_w({"unit": torch.tensor([0, -1])}).exp()
    tensor([[0.5000, 0.5000],
            [0.5000, 0.5000]], grad_fn=<ExpBackward0>)
    """

    def __init__(
        self,
        gates: Sequence[Gate],
        n_experts: int,
        units: Sequence[str | int],
        offset_scale: float | int = 1.0,
        column: str = "user",
    ) -> None:
        super().__init__(
            n_experts,
            reads=list(dict.fromkeys([*(name for gate in gates for name in gate.reads), column])),
            of_prompt=list(dict.fromkeys(name for gate in gates for name in gate.of_prompt)),
        )
        if any(gate.n_experts != n_experts for gate in gates):
            raise ValueError(
                f"gates have {[gate.n_experts for gate in gates]} experts; expected {n_experts} in each"
            )
        units = [written(unit) for unit in units]
        if len(units) == 0 or len(set(units)) < len(units):
            raise ValueError(
                f"units: found {len(units)}, {len(set(units))} of them distinct; expected one name for each user, and "
                "at least one; without users a ContextGate is enough"
            )
        self.units, self.column = units, column
        self.offset_scale = positive("offset_scale", offset_scale)
        self.gates = nn.ModuleList(gates)
        self.offset = nn.Parameter(torch.zeros(len(units), n_experts))

    @property
    def shared(self) -> list[nn.Parameter]:
        """The gates' parameters: what is no user's own."""
        return list(self.gates.parameters())

    def options(self) -> dict[str, Any]:
        """What makes an equal gate but for what is learned."""
        names = ("n_experts", "units", "offset_scale", "column")
        own = {name: getattr(self, name) for name in names}
        return {"gates": [gate.describe() for gate in self._gates], **own}

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> MixedMembershipGate:
        """An equal gate as at the start."""
        return cls(**{**options, "gates": [make_gate(one) for one in options["gates"]]})

    def resized(self, n_experts: int) -> Gate:
        """See `Gate.resized`."""
        gates = [gate.resized(n_experts) for gate in self._gates]
        return MixedMembershipGate(gates, n_experts, self.units, self.offset_scale, self.column)

    @property
    def _gates(self) -> list[Gate]:
        return list(self.gates)  # type: ignore[arg-type]

    def with_units(self, units: Sequence[str | int]) -> MixedMembershipGate:
        """The same gates for other users, whose offsets start at 0; a user who had an offset keeps it.

        The gates are shared with this one, not copied.

        >>> MixedMembershipGate([], n_experts=2, units=["ann"]).with_units(["ann", "eve"]).offset.shape
        torch.Size([2, 2])
        """
        other = MixedMembershipGate(
            self._gates, self.n_experts, units, self.offset_scale, self.column
        )
        places = self.places(units)
        known = places >= 0
        with torch.no_grad():
            other.offset[known] = self.offset[places[known]]
        return other

    def places(self, names: Sequence[object]) -> Int[Tensor, "rows"]:
        """Place of each user's offset; -1 for users without one."""
        place = {name: i for i, name in enumerate(self.units)}
        return torch.tensor([place.get(written(name), -1) for name in names])

    def inputs(self, columns: Mapping[str, Sequence[Any]], base: Base | None) -> dict[str, Tensor]:
        """What the gates read, each under its number, and the place of each row's user."""
        unit = self.places(list(column(columns, self.column)))
        return {**self._of_gates(columns, base), "unit": unit}

    def user_inputs(
        self, columns: Mapping[str, Sequence[Any]], base: Base | None
    ) -> dict[str, Tensor]:
        """What the gates read of a user; one who is named has the own offset, where there is one."""
        named = list(columns[self.column]) if self.column in columns else [None]
        return {**self._of_gates(columns, base), "unit": self.places(named)}

    def _of_gates(
        self, columns: Mapping[str, Sequence[Any]], base: Base | None
    ) -> dict[str, Tensor]:
        return {
            f"{i}/{name}": value
            for i, gate in enumerate(self._gates)
            for name, value in gate.inputs(columns, base).items()
        }

    def logits(self, inputs: Mapping[str, Tensor]) -> Float[Tensor, "rows experts"]:
        """The gates' logits and each row's offset; gradients flow to both."""
        if "unit" not in inputs:
            raise ValueError(
                f"inputs['unit'] is absent; found {sorted(inputs)}: give -1 for users without an offset"
            )
        unit, n_units = inputs["unit"], len(self.units)
        if len(unit) and not -1 <= int(unit.min()) <= int(unit.max()) < n_units:
            row = int(((unit < -1) | (unit >= n_units)).nonzero()[0])
            raise ValueError(
                f"inputs['unit'][{row}] = {int(unit[row])}; expected -1 ... {n_units - 1}"
            )
        known = (unit >= 0).to(self.offset.dtype)[:, None]
        total = self.offset[unit.clamp(min=0)] * known
        for i, gate in enumerate(self._gates):
            own = {
                name[len(f"{i}/") :]: v for name, v in inputs.items() if name.startswith(f"{i}/")
            }
            total = total + gate.logits(own)
        return total

    def log_prior(self) -> Float[Tensor, ""]:
        """Log density of the offsets and of the gates' weights under their priors, without constants; nats."""
        own = log_normal([self.offset], self.offset_scale)
        return sum((gate.log_prior() for gate in self._gates), own)

    @torch.no_grad()
    def served(
        self, inputs: Mapping[str, Tensor], loglik: Float[Tensor, "pairs experts"] | None = None
    ) -> Float[Tensor, "experts"]:
        """log w of one user: the weights of the most probable offset given the pairs, by EM; 0 without pairs."""
        if loglik is None:
            return super().served(inputs)
        gate, n = self.with_units(["user"]), len(loglik)
        gate.offset.zero_()
        own = {**inputs, "unit": torch.zeros(1, dtype=torch.long)}
        every = {name: value.expand(n, *value.shape[1:]) for name, value in own.items()}
        gate_em(gate, every, loglik, frozen=gate.shared)
        return gate.log_w(own)[0].detach()
