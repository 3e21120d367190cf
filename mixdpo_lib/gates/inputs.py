"""What do gates share? Rows that are equal, scales, priors, checks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


def distinct_rows(
    inputs: Mapping[str, Tensor], n: int
) -> tuple[dict[str, Tensor], Int[Tensor, "rows"]]:
    """The distinct ones of `n` rows of what a gate reads, and which of them each row is.

    Twelve answers to a prompt are read once; a gate that reads nothing has one row for all.

    >>> inputs, place = distinct_rows({"prompt": torch.tensor([[2.0], [1.0], [2.0]])}, 3)
    >>> inputs["prompt"].T, place
    (tensor([[1., 2.]]), tensor([1, 0, 1]))
    >>> distinct_rows({}, 2)
    ({}, tensor([0, 0]))
    """
    if not inputs:
        return {}, torch.zeros(n, dtype=torch.long)
    whole = torch.cat([inputs[name].reshape(n, -1).double() for name in sorted(inputs)], 1)
    distinct, place = torch.unique(whole, dim=0, return_inverse=True)
    first = torch.full((len(distinct),), n, device=place.device).scatter_reduce(
        0, place, torch.arange(n, device=place.device), "amin"
    )
    return {name: value[first] for name, value in inputs.items()}, place


def standardise(features: Float[Tensor, "rows features"]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every column, with 1 where a column does not vary: ``mean, scale`` of a gate.

    >>> standardise(torch.tensor([[0.0, 5.0], [2.0, 5.0]]))
    (tensor([1., 5.]), tensor([1., 1.]))
    """
    scale = features.std(0, correction=0)
    return features.mean(0), torch.where(scale > 1e-6, scale, torch.ones_like(scale))


def positive(name: str, value: float | int) -> float:
    """The value as a float; refuses what is not above 0."""
    if not 0 < value < math.inf:
        raise ValueError(f"{name}={value}: expected above 0")
    return float(value)


def log_normal(parameters: Sequence[Tensor], scale: float) -> Float[Tensor, ""]:
    """Log density of parameters under N(0, scale^2), without its constant; nats."""
    return -sum((p.square().sum() for p in parameters), torch.zeros(())) / (2 * scale**2)


def zero_linear(n_in: int, n_out: int) -> nn.Linear:
    """A linear layer that starts at 0, where every expert has the same weight."""
    layer = nn.Linear(n_in, n_out)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def given(inputs: Mapping[str, Tensor], name: str, size: int) -> Float[Tensor, "rows size"]:
    """One of the inputs; refuses what is absent, of another size, or not finite (the row is named)."""
    if name not in inputs:
        raise ValueError(
            f"inputs[{name!r}] is absent; found {sorted(inputs)}: this gate reads {name}"
        )
    value = inputs[name]
    if value.dim() != 2 or value.shape[1] != size:
        raise ValueError(
            f"inputs[{name!r}] has shape {tuple(value.shape)}; expected (rows, {size})"
        )
    if not bool(value.isfinite().all()):
        row = int((~value.isfinite()).any(1).nonzero()[0])
        raise ValueError(f"inputs[{name!r}], row {row}: found a value that is not finite")
    return value


def column(columns: Mapping[str, Sequence[object]], name: str) -> Sequence[object]:
    """One of the data's columns; an absent one is named with those that there are."""
    if name not in columns:
        raise ValueError(
            f"column {name!r} is missing; found {list(columns)}: the gate reads it; give it for every row"
        )
    return columns[name]
