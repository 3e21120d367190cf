"""Weights that are a density on the circle: where tastes point, on average, and how close together they are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..base.model import Base
from .contract import Gate
from .inputs import given, log_normal, positive
from .metadata import checked_columns, columns_of_json, encode, n_features, read_columns


class DirectionGate(Gate):
    """A von Mises density at M equal angles: ``log w_m = u(x) . (cos t_m, sin t_m) - const``,  ``u(x) = W m + b``.

    The direction of u is the mean taste of users with the metadata m, its length their concentration.  It starts at 0,
    the uniform density; ``requires_grad_(False)`` keeps it.  For experts that are nodes of a circle.

    Parameters
    ----------
    n_experts : M, the nodes. columns : what is known of users, see `metadata.read_columns`; none: one u for all users.
    weight_scale : > 0, the prior N(0, weight_scale^2) of W; b has none.

    Raises
    ------
    ValueError : n_experts below 3, on which no direction can be told; weight_scale not above 0.

    >>> gate = DirectionGate(4)
    >>> gate.bias.data = torch.tensor([math.log(2.0), 0.0])      # towards the first node
    >>> gate.log_w().exp().detach().round(decimals=3)                  # 2, 1, 1/2 and 1, divided by their total
    tensor([[0.4440, 0.2220, 0.1110, 0.2220]])
    """

    density = "circle"

    def __init__(
        self,
        n_experts: int,
        columns: Mapping[str, Any] | None = None,
        weight_scale: float | int = 1.0,
    ) -> None:
        super().__init__(n_experts, reads=tuple(columns or ()))
        if n_experts < 3:
            raise ValueError(
                f"n_experts={n_experts}: a direction needs at least 3 nodes; use 16 or more for a circle"
            )
        self.weight_scale = positive("weight_scale", weight_scale)
        self.columns = checked_columns(columns or {})
        self.weight = nn.Parameter(torch.zeros(2, n_features(self.columns)))
        self.bias = nn.Parameter(torch.zeros(2))

    @classmethod
    def from_metadata(
        cls, metadata: Mapping[str, Sequence[Any]], n_experts: int, **options: Any
    ) -> DirectionGate:
        """A gate for these columns of the training users, see `metadata.read_columns`."""
        return cls(n_experts, read_columns(metadata), **options)

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> DirectionGate:
        """An equal gate as at the start."""
        return cls(**{**options, "columns": columns_of_json(options["columns"])})

    def options(self) -> dict[str, Any]:
        """What makes an equal gate but for what is learned."""
        names = ("n_experts", "columns", "weight_scale")
        return {name: getattr(self, name) for name in names}

    def at_nodes(self, n_experts: int) -> DirectionGate:
        """The same density, read at another number of nodes."""
        again = DirectionGate(n_experts, self.columns, self.weight_scale).to(self.bias.dtype)
        again.load_state_dict(self.state_dict())
        return again.requires_grad_(self.learns)

    def inputs(self, columns: Mapping[str, Sequence[Any]], base: Base | None) -> dict[str, Tensor]:
        """The encoded metadata of each row; nothing without columns."""
        return {"metadata": encode(self.columns, columns)} if self.columns else {}

    def toward(self, inputs: Mapping[str, Tensor]) -> Float[Tensor, "rows 2"]:
        """u(x) of each row; one row without columns. Gradients flow."""
        if not self.columns:
            return self.bias[None]
        metadata = given(inputs, "metadata", self.weight.shape[1])
        return metadata.to(self.weight) @ self.weight.T + self.bias

    def logits(self, inputs: Mapping[str, Tensor]) -> Float[Tensor, "rows nodes"]:
        """u(x) . (cos t_m, sin t_m), before the softmax; gradients flow."""
        u = self.toward(inputs)
        angle = torch.arange(self.n_experts, dtype=torch.float64) * (2 * math.pi / self.n_experts)
        return u @ torch.stack([angle.cos(), angle.sin()]).to(u)

    def log_prior(self) -> Float[Tensor, ""]:
        """Log density of W under its prior, without its constant and without b; nats."""
        return log_normal([self.weight], self.weight_scale)
