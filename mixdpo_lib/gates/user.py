"""Weights that read what is known of the user."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..base.model import Base
from .contract import Gate
from .inputs import given, log_normal, positive, zero_linear
from .metadata import checked_columns, columns_of_json, encode, n_features, read_columns


class UserGate(Gate):
    """Reads what is known of the user: ``log_w = log_softmax(W m + b)``, m the encoded metadata of a row.

    Categories are one-hot, numbers are standardised.  A category that was not there when the gate was made is encoded
    as all zeros, so that only the other columns and the bias speak, with a warning that names it.

    Parameters
    ----------
    columns : by name, the categories of a categorical column (a list of text), or mean and standard deviation of a
        numeric one (a tuple).  :meth:`from_metadata` reads them off the training users.
    n_experts : K >= 1.
    weight_scale : > 0, nats for a category, or for one standard deviation of a number: the prior N(0, weight_scale^2).

    Raises
    ------
    ValueError : no columns, or one that is neither; n_experts below 1, weight_scale not above 0.

    >>> gate = UserGate.from_metadata({"country": ["x", "y", "x"], "age": [20, 30, 40]}, n_experts=2)
    >>> gate.encode({"country": ["y"], "age": [30]})
    tensor([[0., 1., 0.]])
    """

    def __init__(
        self,
        columns: Mapping[str, Any],
        n_experts: int,
        weight_scale: float | int = 1.0,
    ) -> None:
        if not columns:
            raise ValueError(
                "columns: found none; a gate of users needs at least one column of metadata"
            )
        super().__init__(n_experts, reads=tuple(columns))
        self.weight_scale = positive("weight_scale", weight_scale)
        self.columns = checked_columns(columns)
        self.outer = zero_linear(n_features(self.columns), n_experts)

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], n_experts: int, **options: Any) -> UserGate:
        """A gate for these columns: text and truth values are categorical, other numbers numeric.

        Raises
        ------
        ValueError : a missing or NaN value (row and column named); a column that is the same in every row, of which
            a gate can learn nothing.
        """
        return cls(read_columns(metadata), n_experts, **options)

    def encode(self, metadata: Mapping[str, Sequence[Any]]) -> Float[Tensor, "rows features"]:
        """(rows, features) float32 of these users: what the gate reads.

        Raises
        ------
        ValueError : a column that is absent; a missing or NaN value; text in a numeric column.
        """
        return encode(self.columns, metadata)

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> UserGate:
        """An equal gate as at the start; JSON has no tuples, so that mean and standard deviation come as a list."""
        return cls(**{**options, "columns": columns_of_json(options["columns"])})

    def options(self) -> dict[str, Any]:
        """What makes an equal gate but for what is learned."""
        return {
            "columns": self.columns,
            "n_experts": self.n_experts,
            "weight_scale": self.weight_scale,
        }

    def inputs(self, columns: Mapping[str, Sequence[Any]], base: Base | None) -> dict[str, Tensor]:
        """The encoded metadata of each row, see `encode`."""
        return {"metadata": self.encode(columns)}

    def logits(self, inputs: Mapping[str, Tensor]) -> Float[Tensor, "rows experts"]:
        """Before the softmax; gradients flow."""
        return self.outer(given(inputs, "metadata", self.outer.in_features))

    def log_prior(self) -> Float[Tensor, ""]:
        """Log density of the weights under their prior, without its constant and without the bias; nats."""
        return log_normal([self.outer.weight], self.weight_scale)

    def n_free(self) -> int:
        """(K - 1) for b, for each number, and for each category but one of a column, as in a regression."""
        if not self.learns:
            return 0
        read = sum(len(one) - 1 if isinstance(one, list) else 1 for one in self.columns.values())
        return (1 + read) * (self.n_experts - 1)


def given_gate(column: str, categories: Sequence[str], n_experts: int) -> UserGate:
    """A gate that is told who answers: the expert of each category of a column, for sure; frozen. For oracles.

    >>> given_gate("group", ["a", "b"], 2).log_w({"metadata": torch.tensor([[0.0, 1.0]])}).exp()
    tensor([[0., 1.]])
    """
    gate = UserGate({column: list(categories)}, n_experts)
    with torch.no_grad():
        for i in range(len(categories)):
            gate.outer.weight[i % n_experts, i] = 200.0  # nats: e^-200 is 0 in float32
    return gate.requires_grad_(False)
