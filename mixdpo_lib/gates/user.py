"""Weights that read what is known of the user."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..base.model import Base
from .contract import Gate
from .inputs import given, log_normal, positive, zero_linear


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
    ValueError : no columns, n_experts below 1, weight_scale not above 0.

    >>> gate = UserGate.from_metadata({"country": ["x", "y", "x"], "age": [20, 30, 40]}, n_experts=2)
    >>> gate.encode({"country": ["y"], "age": [30]})
    tensor([[0., 1., 0.]])
    """

    def __init__(
        self,
        columns: Mapping[str, list[str] | tuple[float, float]],
        n_experts: int,
        weight_scale: float | int = 1.0,
    ) -> None:
        if not columns:
            raise ValueError(
                "columns: found none; a gate of users needs at least one column of metadata"
            )
        super().__init__(n_experts, reads=tuple(columns))
        self.weight_scale = positive("weight_scale", weight_scale)
        self.columns = dict(columns)
        n_features = sum(
            len(kind) if isinstance(kind, list) else 1 for kind in self.columns.values()
        )
        self.outer = zero_linear(n_features, n_experts)

    @classmethod
    def from_metadata(
        cls, metadata: Mapping[str, Sequence[Any]], n_experts: int, **options: Any
    ) -> UserGate:
        """A gate for these columns: text and truth values are categorical, other numbers numeric.

        Raises
        ------
        ValueError : a missing or NaN value (row and column named); a column that is the same in every row, of which
            a gate can learn nothing.
        """
        columns: dict[str, list[str] | tuple[float, float]] = {}
        for name, values in metadata.items():
            _check_metadata(name, values)
            if len(set(values)) < 2:
                raise ValueError(
                    f"metadata column {name!r} is {values[0]!r} in every row: a gate can learn nothing from it; "
                    "leave it out"
                )
            if all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
                numbers = torch.tensor([float(v) for v in values], dtype=torch.float64)
                columns[name] = (float(numbers.mean()), float(numbers.std(correction=0)))
            else:
                columns[name] = sorted({str(v) for v in values})
        return cls(columns, n_experts, **options)

    def encode(self, metadata: Mapping[str, Sequence[Any]]) -> Float[Tensor, "rows features"]:
        """(rows, features) float32 of these users: what the gate reads.

        Raises
        ------
        ValueError : a column that is absent; a missing or NaN value; text in a numeric column.
        """
        parts, n_rows = [], None
        for name, kind in self.columns.items():
            if name not in metadata:
                raise ValueError(
                    f"metadata column {name!r} is absent; found {list(metadata)}: the gate was trained with it, give it"
                )
            values = metadata[name]
            _check_metadata(name, values)
            if n_rows is not None and len(values) != n_rows:
                raise ValueError(
                    f"metadata column {name!r} has {len(values)} rows, the ones before it {n_rows}"
                )
            n_rows = len(values)
            if isinstance(kind, tuple):
                wrong = [i for i, v in enumerate(values) if not isinstance(v, (int, float))]
                if wrong:
                    raise ValueError(
                        f"metadata row {wrong[0]}, column {name!r}: found {values[wrong[0]]!r}, expected a number"
                    )
                parts.append(
                    ((torch.tensor([float(v) for v in values]) - kind[0]) / kind[1])[:, None]
                )
            else:
                place = {category: i for i, category in enumerate(kind)}
                unseen = sorted({str(v) for v in values} - set(place))
                if unseen:
                    warnings.warn(
                        f"metadata column {name!r}: {unseen[:3]} were not among the training users' categories; "
                        "users with them are served by their other columns and the bias",
                        stacklevel=2,
                    )
                one_hot = torch.zeros(len(values), len(kind))
                for row, value in enumerate(values):
                    if str(value) in place:
                        one_hot[row, place[str(value)]] = 1.0
                parts.append(one_hot)
        return torch.cat(parts, 1)

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> UserGate:
        """An equal gate as at the start; JSON has no tuples, so that mean and standard deviation come as a list."""
        columns = {
            name: [str(one) for one in kind]
            if isinstance(kind[0], str)
            else (float(kind[0]), float(kind[1]))
            for name, kind in options["columns"].items()
        }
        return cls(**{**options, "columns": columns})

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


def _check_metadata(name: str, values: Sequence[Any]) -> None:
    if len(values) == 0:
        raise ValueError(f"metadata column {name!r} has no rows: give at least one user")
    for row, value in enumerate(values):
        if value is None or (isinstance(value, float) and not math.isfinite(value)):
            raise ValueError(
                f"metadata row {row}, column {name!r}: found {value!r}, expected text or a finite number"
            )
