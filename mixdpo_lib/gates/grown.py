"""How do users keep what they had when experts are added? Weight 0 on the new ones, and the old gate for the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..base.model import Base
from ..data.checks import written
from .contract import Gate, make_gate
from .inputs import column as column_of


class GrownGate(Gate):
    """The weights of `before`, and 0 on what came later, for the users named; those of `after` for everybody else.

    Parameters
    ----------
    before : the gate of the first experts; it stays as it is.
    after : the gate of all experts, the first ones among them; the M-step moves it, by the responsibilities of all.
    units : names of the users who keep their weights. column : the column of the data that names the user.

    Raises
    ------
    ValueError : more experts before than after; no users.

    >>> from mixdpo_lib.gates.weights import FixedWeights
    >>> gate = GrownGate(FixedWeights([1.0]), FixedWeights([0.5, 0.5]), ["ann"])
    >>> gate.log_w(gate.inputs({"user": ["ann", "eve"]}, None)).exp()
    tensor([[1.0000, 0.0000],
            [0.5000, 0.5000]])
    """

    def __init__(
        self, before: Gate, after: Gate, units: Sequence[str | int], column: str = "user"
    ) -> None:
        reads = [*before.reads, *after.reads, column]
        of_prompt = [*before.of_prompt, *after.of_prompt]
        super().__init__(
            after.n_experts, list(dict.fromkeys(reads)), list(dict.fromkeys(of_prompt))
        )
        if before.n_experts > after.n_experts or not units:
            raise ValueError(
                f"before has {before.n_experts} experts, after {after.n_experts}, for {len(units)} users: expected no "
                "fewer after than before, and at least one user who keeps the weights"
            )
        self.before, self.after, self.column = before, after, column
        self.units = [written(unit) for unit in units]

    def options(self) -> dict[str, Any]:
        """What makes an equal gate but for what is learned."""
        own = {"before": self.before.describe(), "after": self.after.describe()}
        return {**own, "units": self.units, "column": self.column}

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> GrownGate:
        """An equal gate as at the start."""
        gates = {name: make_gate(options[name]) for name in ("before", "after")}
        return cls(**{**options, **gates})

    def resized(self, n_experts: int) -> Gate:
        """See `Gate.resized`; the first experts stay."""
        return GrownGate(self.before, self.after.resized(n_experts), self.units, self.column)

    @property
    def learns(self) -> bool:
        """Whether the gate of the others does."""
        return self.after.learns

    def inputs(self, columns: Mapping[str, Sequence[Any]], base: Base | None) -> dict[str, Tensor]:
        """What both gates read, and whether a row's user keeps the weights."""
        known = set(self.units)
        kept = [written(name) in known for name in column_of(columns, self.column)]
        return self._read(columns, base) | {"kept": torch.tensor(kept)}

    def user_inputs(
        self, columns: Mapping[str, Sequence[Any]], base: Base | None
    ) -> dict[str, Tensor]:
        """What both gates read of a user, who is new where no name is given."""
        if self.column in columns:
            return self.inputs(columns, base)
        return self._read(columns, base) | {"kept": torch.tensor([False])}

    def _read(self, columns: Mapping[str, Sequence[Any]], base: Base | None) -> dict[str, Tensor]:
        return {
            f"{part}/{name}": value
            for part, gate in (("before", self.before), ("after", self.after))
            for name, value in gate.inputs(columns, base).items()
        }

    @staticmethod
    def _part(inputs: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
        start = f"{part}/"
        return {n[len(start) :]: value for n, value in inputs.items() if n.startswith(start)}

    def log_w(self, inputs: Mapping[str, Tensor] | None = None) -> Float[Tensor, "rows experts"]:
        """Weights of each row, nats."""
        inputs = inputs or {}
        if "kept" not in inputs:
            raise ValueError(f"inputs['kept'] is absent; found {sorted(inputs)}: see GrownGate")
        kept = inputs["kept"].bool()
        after = self.after.log_w(self._part(inputs, "after"))
        before = self.before.log_w(self._part(inputs, "before"))
        none = before.new_full((len(before), self.n_experts - self.before.n_experts), -torch.inf)
        return torch.where(kept[:, None], torch.cat([before, none], 1), after)

    def logits(self, inputs: Mapping[str, Tensor]) -> Float[Tensor, "rows experts"]:
        """The weights themselves, nats."""
        return self.log_w(inputs)

    def log_prior(self) -> Float[Tensor, ""]:
        """Of the gate of the others."""
        return self.after.log_prior()

    def m_step(
        self,
        inputs: Mapping[str, Tensor],
        log_q: Float[Tensor, "rows experts"],
        place: Int[Tensor, "rows"],
        share: float = 1.0,
        max_iter: int = 30,
        frozen: Sequence[nn.Parameter] = (),
        entropy_weight: float = 0.0,
        balance_weight: float = 0.0,
    ) -> None:
        """See `Gate.m_step`: `after` moves, by the users who keep their weights too: what a new user is likely to be."""
        own = self._part(inputs, "after")
        at = place if own else torch.zeros_like(place)
        self.after.m_step(own, log_q, at, share, max_iter, frozen, entropy_weight, balance_weight)
