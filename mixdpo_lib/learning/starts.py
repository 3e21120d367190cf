"""How do equal experts part? Symmetry breaking, tempering, restarts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from sklearn.cluster import KMeans
from torch import Tensor

from ..gates.inputs import standardise
from .choices import Choices

KINDS = ("random_responsibilities", "linear", "clusters", "random_heads", "none")
RANDOM_HEADS_SCALE = 1e-3  # standard deviation of B_k: some 0.01 nats a text, enough to part and too little to matter


@dataclass(frozen=True)
class Start(Choices):
    """How experts that start equal part, and how fast their responsibilities harden.

    kind : "random_responsibilities" of the latents stand at first; or those of "linear" rewards of what the base makes of
        the answers (`linear_start`; units of several pairs); or "clusters" of what the gate reads; "random_heads" draws
        small parameters for each expert; "none".
    passes : how long given responsibilities stand, in passes over the training pairs.
    certainty : above 1/K and below 1, responsibility of the expert of a row's cluster.
    together : column whose rows share a cluster, such as a work that several templates ask about.
    temperature : >= 1, of tempered responsibilities at the start, q ~ w exp(sum loglik / T); falls geometrically to 1.
    tempering_passes : T reaches 1 here.
    restarts : >= 1, short fits from other seeds, each `restart_passes` long; the likeliest goes on.
    """

    kind: str = "random_responsibilities"
    passes: float | int = 0.5
    certainty: float = 0.8
    together: str = ""
    temperature: float | int = 20.0
    tempering_passes: float | int = 2.0
    restarts: int = 1
    restart_passes: float | int = 1.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r}: possible are {KINDS}")
        if not 0 < self.certainty < 1:
            raise ValueError(f"certainty={self.certainty}: expected above 0 and below 1")
        if not 1 <= self.temperature < math.inf:
            raise ValueError(
                f"temperature={self.temperature}: expected at least 1, which is no tempering"
            )
        for name in ("restarts", "restart_passes"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: expected more than 0")
        for name in ("passes", "tempering_passes"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)}: expected 0 or more")

    @property
    def given(self) -> bool:
        """Whether responsibilities are given at first."""
        return self.kind in ("random_responsibilities", "linear", "clusters")


def random_log_q(n_units: int, n_experts: int, seed: int) -> Float[Tensor, "units experts"]:
    """Seeded random responsibilities, uniform on the simplex: symmetry breaking of the same scale for every K.

    >>> random_log_q(2, 1, seed=0)
    tensor([[0.],
            [0.]], dtype=torch.float64)
    """
    draw = torch.empty(n_units, n_experts, dtype=torch.float64)
    draw.exponential_(generator=torch.Generator().manual_seed(seed))
    return (draw / draw.sum(1, keepdim=True)).log()


def cluster_log_q(
    inputs: Mapping[str, Tensor],
    n_experts: int,
    seed: int,
    together: Sequence[str] | None = None,
    certainty: float = 0.8,
) -> Float[Tensor, "rows experts"]:
    """Responsibilities from seeded spherical k-means on what the gate reads: symmetry breaking that a gate can follow.

    Random responsibilities of single comparisons average out over the pairs of a prompt; clusters of prompts do not.
    No label is read. A row's cluster has log-probability log `certainty`, the other experts share the rest. Rows with
    the same name in `together` (the work that several templates ask about) share a cluster, that of their mean.

    >>> cluster_log_q({"context": torch.tensor([[0.0], [0.1], [9.0]])}, 2, seed=0).exp().sort(1).values
    tensor([[0.2000, 0.8000],
            [0.2000, 0.8000],
            [0.2000, 0.8000]])
    """
    if n_experts == 1:
        return torch.zeros(len(next(iter(inputs.values()))), 1)
    parts = [inputs[name] for name in sorted(inputs) if inputs[name].dim() == 2]
    if not parts:
        raise ValueError(
            f"start kind='clusters' needs a gate that reads prompts or metadata; this one reads "
            f"{sorted(inputs) or 'nothing'}: use 'random_responsibilities'"
        )
    columns = []
    for part in parts:
        mean, scale = standardise(part)
        columns.append(((part - mean) / scale).numpy())
    read = np.concatenate(columns, 1)
    if together is not None:
        names, member = np.unique(np.asarray(together), return_inverse=True)
        means = np.zeros((len(names), read.shape[1]))
        np.add.at(means, member, read)
        read = (means / np.bincount(member)[:, None])[member]
    read = read - read.mean(
        0
    )  # directions from the centre: a few far prompts must not be a cluster of their own
    size = np.linalg.norm(read, axis=1, keepdims=True)
    distinct, place = np.unique(
        (read / np.where(size > 0, size, 1)).round(3), axis=0, return_inverse=True
    )
    if len(distinct) < n_experts:
        raise ValueError(
            f"{len(distinct)} distinct inputs of the gate for {n_experts} experts: use fewer experts"
        )
    label = KMeans(n_experts, n_init=10, random_state=seed).fit_predict(distinct)[place.ravel()]
    log_q = torch.full((len(label), n_experts), math.log((1 - certainty) / (n_experts - 1)))
    log_q[torch.arange(len(label)), torch.from_numpy(label).long()] = math.log(certainty)
    return log_q
