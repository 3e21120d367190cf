"""How are many pairs of few answers learned from fast? Each unit as a row of counts: how often it preferred which to which."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..experts.reward_table import RewardTable
from ..gates.contract import Gate
from ..gates.m_step import EMResult
from .full_batch import full_batch_em

PER_ROW = ("objective", "loglik", "elbo", "expected_loglik", "kl_q_w")


class Tally(nn.Module):
    """Tables as `full_batch_em` asks for them, of whole units: one row of counts each, and two matrix products an iteration.

    experts : a table. pairs, unit : as of `full_batch_em`.
    """

    def __init__(
        self, experts: RewardTable, pairs: Int[Tensor, "pairs 2"], unit: Int[Tensor, "pairs"]
    ) -> None:
        super().__init__()
        self.experts, n, n_units = experts, experts.n_answers, int(unit.max()) + 1
        self.cells = torch.cartesian_prod(torch.arange(n), torch.arange(n))
        cell = unit * n * n + pairs[:, 0] * n + pairs[:, 1]
        counts = torch.bincount(cell, minlength=n_units * n * n)
        self.counts = counts.double().reshape(n_units, n * n)
        self.units = torch.arange(n_units)[:, None].expand(n_units, 2)

    def loglik(self, units: Int[Tensor, "units 2"]) -> Float[Tensor, "units experts"]:
        """sum_{n in u} log sigma(D_nk) of every unit, nats."""
        return self.counts @ self.experts.loglik(self.cells)

    def log_prior(self) -> Float[Tensor, ""]:
        """Of the table."""
        return self.experts.log_prior()

    def perturb(self, scale: float, generator: torch.Generator) -> None:
        """Of the table."""
        self.experts.perturb(scale, generator)

    def m_step(self, units: Int[Tensor, "units 2"], weight: Float[Tensor, "units experts"]) -> int:
        """Of the table, whose pairs weigh what their units do."""
        return self.experts.m_step(self.cells, self.counts.T @ weight)


def tally_em(
    experts: RewardTable,
    gate: Gate,
    pairs: Int[Tensor, "pairs 2"],
    unit: Int[Tensor, "pairs"],
    *,
    tolerance: float = 1e-8,
    **options: Any,
) -> EMResult:
    """`full_batch_em` of a table with a latent a unit and no lapses: the same numbers, on counts.

    Its cost grows with units x answers^2 x experts and not with the pairs. Source: docs/method.md; equality tested in
    tests/learning/test_tally.py.

    Raises
    ------
    ValueError : lapses, which belong to single pairs; as of `full_batch_em`.
    """
    if options.get("lapse", 0.0) != 0.0:
        raise ValueError(
            f"lapse={options['lapse']!r}: a row of counts knows no single answers; expected 0, or use full_batch_em"
        )
    tally = Tally(experts, pairs, unit)
    share = len(tally.units) / len(pairs)  # of a row that is a pair's
    found = full_batch_em(tally, gate, tally.units, tolerance=tolerance / share, **options)
    history, restarts = found.history.copy(), found.restarts.copy()
    history[list(PER_ROW)] *= share
    restarts["objective"] *= share
    return dataclasses.replace(found, history=history, restarts=restarts)
