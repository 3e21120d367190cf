"""How many nodes does an integral over a group need? As many that twice as many say the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..elbo import mixture_log_likelihood
from ..experts.group_tables import GroupTables
from ..experts.reward_table import RewardTable
from ..gates.contract import Gate
from ..gates.m_step import EMResult
from ..store import note
from .tally import Tally, tally_em

GAP = 1e-8  # nats a pair that twice the nodes may change the likelihood by, on average
MOST = 1024  # nodes: posteriors of .006 radians, those of some 10,000 pairs a user


def doubling_gap(
    once: Float[Tensor, "units"], twice: Float[Tensor, "units"], n_pairs: int
) -> float:
    """sum_u |log L_u(2M) - log L_u(M)| / pairs, nats: how far M nodes are from the integral, on average a pair."""
    return float((twice - once).abs().sum()) / n_pairs


def enough_nodes(
    log_likelihood: Callable[[int], Float[Tensor, "units"]],
    n_pairs: int,
    first: int = 16,
    most: int = MOST,
    gap: float = GAP,
) -> int:
    """The fewest of first, 2 first, 4 first ... nodes whose doubling changes the likelihood by less than `gap` a pair.

    log_likelihood : of every unit, nats, float64, with that number of nodes.

    Raises
    ------
    ValueError : even `most` nodes are too few.
    """
    n, once = first, log_likelihood(first)
    while n <= most:
        twice = log_likelihood(2 * n)
        if doubling_gap(once, twice, n_pairs) < gap:
            return n
        n, once = 2 * n, twice
    raise ValueError(
        f"{most} nodes: twice as many change the likelihood by {gap:g} nats a pair or more; posteriors are so narrow that "
        "a discrete mixture or fewer pairs a user serve as well; expected enough within most="
        f"{most}: raise it"
    )


@torch.no_grad()
def unit_log_likelihood(
    experts: RewardTable, gate: Gate, pairs: Int[Tensor, "pairs 2"], unit: Int[Tensor, "pairs"]
) -> Float[Tensor, "units"]:
    """log sum_k w_k prod_n sigma(D_nk) of every unit, nats, of a table and a gate that reads nothing."""
    tally = Tally(experts, pairs, unit)
    return mixture_log_likelihood(tally.loglik(tally.units), gate.log_w().double())


@torch.no_grad()
def fit_nodes(
    experts: GroupTables,
    gate: Any,
    pairs: Int[Tensor, "pairs 2"],
    unit: Int[Tensor, "pairs"],
    *,
    most: int = MOST,
    **options: Any,
) -> tuple[GroupTables, Any, EMResult]:
    """`tally_em` of nodes of a group, with as many nodes as the data need.

    Fits at the number of nodes given; as long as doubling it changes the likelihood by 1e-8 nats a pair or more, it goes
    on from there with twice as many.  Warns where a posterior is narrower than 6/M radians all the same.

    Parameters
    ----------
    experts, gate : with as many nodes as to begin with, 16 or 32; left as they are. A gate that knows `at_nodes`.
    options : of `tally_em`; parameters are drawn at first ("random_heads").

    Returns
    -------
    Experts and gate with the number of nodes that was chosen, and the result of the last fit.
    """
    if not hasattr(gate, "at_nodes"):
        raise ValueError(
            f"{type(gate).__name__} knows one number of nodes: expected DirectionGate; use full_batch_em to stay at it"
        )
    n = experts.n_experts
    start = {"symmetry_breaking": "random_heads", **options}
    while True:
        experts, gate = experts.at_nodes(n), gate.at_nodes(n).double()
        result = tally_em(experts, gate, pairs, unit, **start)

        def log_likelihood(m: int, experts: GroupTables = experts, gate: Any = gate) -> Tensor:
            return unit_log_likelihood(experts.at_nodes(m), gate.at_nodes(m), pairs, unit)

        wanted = enough_nodes(log_likelihood, len(pairs), n, most)
        if wanted == n:
            break
        note(f"{n} nodes are too few for these posteriors: on with {wanted}")
        n, start = wanted, {**options, "symmetry_breaking": "none", "start_temperature": 1.0}
    experts.nodes.warn_narrow(result.log_q)
    return experts, gate, result
