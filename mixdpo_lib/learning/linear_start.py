"""How do units part before anything is trained? EM on rewards that are linear in what the base makes of the answers."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from ..base.features import gather_positions, text_features
from ..base.model import Base
from ..data.pairs import Pairs
from ..elbo import log_responsibilities, mixture_log_likelihood
from ..experts.groups import Nodes
from ..store import MixDPOError
from .starts import random_log_q

DIRECTIONS = 32  # of the differences, the leading ones; 16 to 64 were tried, see docs/log.md
RESTARTS, ITERATIONS, TEMPERED, TEMPERATURE = 3, 40, 15, 20.0


@torch.no_grad()
def answer_states(
    base: Base, data: Pairs, block: int = 1024
) -> tuple[Float[Tensor, "texts hidden"], Int[Tensor, "pairs 2"]]:
    """Mean last hidden state of each distinct answer, float64, and the two answers of every pair among them."""
    features = text_features(base, data.texts)
    ids, place = torch.unique(data.index, return_inverse=True)
    means = []
    for part in ids.split(block):
        hidden, _, segment = gather_positions(features, part)
        total = torch.zeros(len(part), hidden.shape[1]).index_add_(0, segment, hidden)
        means.append(total / torch.bincount(segment)[:, None])
    return torch.cat(means).double(), place


def directions(
    differences: Float[Tensor, "pairs hidden"], most: int = DIRECTIONS
) -> Float[Tensor, "hidden directions"]:
    """Leading principal directions of the differences, scaled so that their mean square along each is 1.

    >>> directions(torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 1.0]]).double(), 1).round(decimals=3).abs()
    tensor([[0.6120],
            [0.0000]], dtype=torch.float64)
    """
    values, vectors = torch.linalg.eigh(differences.T @ differences / len(differences))
    kept = [i for i in range(-1, -min(most, len(values)) - 1, -1) if values[i] > 1e-6 * values[-1]]
    return vectors[:, kept] / values[kept].sqrt()


@torch.no_grad()
def linear_em(
    read: Float[Tensor, "pairs directions"],
    unit: Int[Tensor, "pairs"],
    coordinates: Float[Tensor, "experts basis"],
    log_prior: Float[Tensor, "experts"],
    start: Float[Tensor, "units experts"],
) -> tuple[float, Float[Tensor, "units experts"], Float[Tensor, "basis directions"]]:
    """A mixture of linear rewards r_k(y) = sum_j c_kj beta_j . x(y), beta ~ N(0, 1), by tempered EM. [derived]

    Parameters
    ----------
    read : x(chosen) - x(rejected). coordinates : c_kj; the identity for experts of their own. start : log q at first.

    Returns
    -------
    log-likelihood of the units plus log prior, nats a pair; log q of the units under `log_prior`, which stands; beta_j.

    >>> read = torch.tensor([[2.0], [-2.0]]).double().repeat_interleave(20, 0)  # two units of 20 pairs
    >>> unit, weights = torch.arange(2).repeat_interleave(20), torch.tensor([0.5, 0.5]).double()
    >>> log_q = linear_em(read, unit, torch.eye(2).double(), weights.log(), random_log_q(2, 2, seed=0))[1]
    >>> bool((log_q.exp().amax(1) > 0.99).all()), bool(log_q.argmax(1)[0] != log_q.argmax(1)[1])
    (True, True)
    """
    basis, size = coordinates.shape[1], read.shape[1]
    beta, log_q = read.new_zeros(basis, size), start
    for step in range(ITERATIONS):
        weight, p = log_q.exp()[unit], (read @ beta.T @ coordinates.T).sigmoid()
        slope = (weight * (1 - p) @ coordinates).T @ read - beta
        curve, bend = (
            torch.eye(basis * size).to(read).reshape(basis, size, basis, size),
            p * (1 - p),
        )
        for i in range(basis):
            for j in range(i + 1):
                share = (weight * bend) @ (coordinates[:, i] * coordinates[:, j])
                if share.any():  # experts of their own share nothing
                    block = read.T @ (read * share[:, None])
                    curve[i, :, j] += block
                    curve[j, :, i] += block if i != j else 0
        step_size = torch.linalg.solve(curve.reshape(basis * size, -1), slope.flatten())
        beta = beta + step_size.reshape(basis, size)
        loglik = F.logsigmoid(read @ beta.T @ coordinates.T)
        heat = max(1.0, TEMPERATURE ** (1 - step / TEMPERED))
        log_q = log_responsibilities(loglik, log_prior, unit, responsibility_temperature=heat)
    score = float(mixture_log_likelihood(loglik, log_prior, unit).sum() - beta.square().sum() / 2)
    return score / len(read), log_q, beta


def linear_log_q(
    base: Base | None,
    data: Pairs,
    unit: Int[Tensor, "pairs"],
    n_experts: int,
    seed: int,
    nodes: Nodes | None = None,
) -> Float[Tensor, "units experts"]:
    """Responsibilities of the likeliest of three runs of `linear_em` on mean states of the answers; no label is read.

    nodes : where the experts are nodes of a group, whose coordinates and prior the linear rewards then share.

    Raises
    ------
    MixDPOError : experts without a base, or a latent for each pair: one pair says too little.
    """
    n_units = int(unit.max()) + 1
    if base is None or n_units == len(unit):
        found = "experts without a base" if base is None else "a latent for each pair"
        raise MixDPOError(
            f"start kind='linear': found {found}, expected several pairs a unit and a base that reads their answers; use "
            "'random_responsibilities'"
        )
    states, place = answer_states(base, data)
    differences = states[place[:, 0]] - states[place[:, 1]]
    read = differences @ directions(differences)
    if nodes is None:
        coordinates = torch.eye(n_experts, dtype=torch.float64)
        log_prior = torch.zeros(n_experts, dtype=torch.float64).log_softmax(0)
    else:
        coordinates, log_prior = nodes.coordinates, nodes.log_prior
    runs = []
    for restart in range(RESTARTS):
        own = seed * RESTARTS + restart
        start = (
            random_log_q(n_units, n_experts, own)
            if nodes is None
            else nodes.random_log_q(n_units, own)
        )
        runs.append(linear_em(read, unit, coordinates, log_prior, start))
    return max(runs, key=lambda run: run[0])[1]
