"""What does every gate give, and what do gates share?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mixdpo_lib.elbo import _keep_largest


def top_s(log_w: Float[Tensor, "*rows experts"], s: int) -> Float[Tensor, "*rows experts"]:
    """Keep the S largest weights of each row and set the others to ``-inf``, **without** renormalising.

    Not renormalised, the likelihood of the kept experts is a lower bound of the whole one in every row; renormalised
    it is none.  Among equal weights the lower index is kept, so the kept sets are nested in S.

    Parameters
    ----------
    log_w : (..., K), nats.
    s : 1 ... K.

    Returns
    -------
    The shape of log_w, nats.  Gradients flow to the kept weights.

    Raises
    ------
    ValueError : s below 1 or above the number of experts.

    >>> top_s(torch.tensor([.2, .5, .3]).log(), 2).exp()
    tensor([0.0000, 0.5000, 0.3000])
    """
    return _keep_largest(log_w, s)


def distinct_rows(inputs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Int[Tensor, "rows"]]:
    """The distinct rows of what a gate reads, and which of them each row is: twelve answers to a prompt are read once.

    >>> inputs, place = distinct_rows({"context": torch.tensor([[2.0], [1.0], [2.0]])})
    >>> inputs["context"].T, place
    (tensor([[1., 2.]]), tensor([1, 0, 1]))
    """
    n = len(next(iter(inputs.values())))
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
    if not 0 < value < math.inf:
        raise ValueError(f"{name}={value}: expected above 0")
    return float(value)


def log_normal(parameters: Sequence[Tensor], scale: float) -> Float[Tensor, ""]:
    return -sum((p.square().sum() for p in parameters), torch.zeros(())) / (2 * scale**2)


def zero_linear(n_in: int, n_out: int) -> nn.Linear:
    layer = nn.Linear(n_in, n_out)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def given(batch: Mapping[str, Tensor], name: str, size: int) -> Tensor:
    if name not in batch:
        raise ValueError(f"batch[{name!r}] is absent; found {sorted(batch)}: this gate reads {name}")
    value = batch[name]
    if value.dim() != 2 or value.shape[1] != size:
        raise ValueError(f"batch[{name!r}] has shape {tuple(value.shape)}; expected (rows, {size})")
    if not bool(value.isfinite().all()):
        row = int((~value.isfinite()).any(1).nonzero()[0])
        raise ValueError(f"batch[{name!r}], row {row}: found a value that is not finite")
    return value
