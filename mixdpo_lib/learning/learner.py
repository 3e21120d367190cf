"""What is trained, and what is one step? Experts, gate, and the table of what was last seen of each pair."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data.pairs import Pairs, values_of
from ..gates.inputs import distinct_rows
from ..policy.mixture import MixturePolicy
from .config import FitConfig
from .inference import Exact, Moment
from .linear_start import linear_log_q
from .routing import Router
from .starts import cluster_log_q, random_log_q
from .table import LoglikTable

GATE_EXPONENT = (
    0.6  # Robbins-Monro: steps (t + 1)^-0.6; sum rho = inf and sum rho^2 < inf between 0.5 and 1
)
GATE_ITERATIONS = (
    5  # of L-BFGS in each M-step of a gate that reads: the responsibilities move on anyway
)


def latent_inputs(
    policy: MixturePolicy, data: Pairs, config: FitConfig, unit: Tensor
) -> dict[str, Tensor]:
    """What the gate reads of each latent of the training data.

    Raises
    ------
    ValueError : with latent="unit", a gate that reads what differs inside a unit; routing that the gate cannot do;
        another inference than `Exact` with a gate that reads.
    """
    gate = policy.gate
    config.routing.check(gate)
    if not gate.reads:
        return {}
    if not isinstance(config.inference, Exact):
        raise ValueError(
            f"inference={config.inference} with {type(gate).__name__}: expected Exact() with a gate that reads"
        )
    if config.latent == "pair":
        return policy.gate_inputs(data)
    return of_units(policy, data, unit, config.unit)


def of_units(policy: MixturePolicy, data: Pairs, unit: Tensor, column: str) -> dict[str, Tensor]:
    """What the gate reads of each unit, from what it reads of each pair.

    Raises
    ------
    ValueError : pairs of a unit that differ in it; the row is named, and the column where it stands in the data.
    """
    inputs = policy.gate_inputs(data)
    _, first = np.unique(unit.numpy(), return_index=True)
    shared = {name: value[first] for name, value in inputs.items()}
    for name, value in inputs.items():
        differs = ~torch.isclose(value.float(), shared[name][unit].float(), atol=1e-3, rtol=1e-3)
        rows = differs if differs.dim() == 1 else differs.any(1)
        if rows.any():
            row = int(rows.nonzero()[0])
            before = int(first[unit[row]])
            read = [one for one in policy.gate.reads if one in data.rows.column_names]
            unlike = [
                f"column {one!r}: found {values[row]!r}, and {values[before]!r} in row {before}"
                for one, values in ((one, values_of(data.rows, one)) for one in read)
                if values[row] != values[before]
            ]
            where = f" ({'; '.join(unlike)})" if unlike else ""
            raise ValueError(
                f"row {row}: {name} differs from the first row of its {column}{where}: with latent='unit' "
                f"a gate may read only what the pairs of a {column} share; mend the row, or, if it is meant, use "
                f"latent='pair', or a gate that reads the {column}"
            )
    return shared


def _cluster_names(data: Pairs, config: FitConfig, unit: Tensor) -> list[str] | None:
    """Of each latent, the name in the column `start.together`."""
    if not config.start.together:
        return None
    ids, names = data.units(config.start.together)
    _, first = np.unique(unit.numpy(), return_index=True)
    return [names[int(i)] for i in ids[first]]


def _from_all(row: Tensor, loglik: Tensor) -> tuple[Tensor, Tensor]:
    """The rows that all processes have just computed; of one process: its own."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return row, loglik
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, (row.cpu(), loglik.cpu()))
    rows, logliks = zip(*found, strict=True)
    return torch.cat(rows).to(row.device), torch.cat(logliks).to(loglik.device)


class Learner(nn.Module):
    """What is trained and what a checkpoint holds: experts, gate, tables, network. The frozen base is not in it.

    Parameters
    ----------
    unit : (pairs,), the latent of each training pair. steps_per_pass : how many steps count as a pass for the start.
    """

    start_log_q: Tensor
    steps: Tensor
    gate_place: Tensor

    def __init__(
        self,
        policy: MixturePolicy,
        data: Pairs,
        unit: Tensor,
        config: FitConfig,
        steps_per_pass: float | int,
    ) -> None:
        super().__init__()
        self.policy, self.steps_per_pass = policy, steps_per_pass
        self.options = config  # not `config`: Trainer writes to an attribute of that name
        self.table = LoglikTable(unit, policy.n_experts, policy.with_lapse)
        inputs = latent_inputs(policy, data, config, unit)
        start, n_latents, nodes = config.start, self.table.n_units, policy.experts.nodes
        if start.kind == "clusters" and policy.n_experts > 1:
            together = _cluster_names(data, config, unit)
            log_q = cluster_log_q(inputs, policy.n_experts, config.seed, together, start.certainty)
        elif start.kind == "linear" and policy.n_experts > 1:
            log_q = linear_log_q(policy.base, data, unit, policy.n_experts, config.seed, nodes)
        else:
            log_q = (
                random_log_q(n_latents, policy.n_experts, config.seed)
                if nodes is None
                else nodes.random_log_q(n_latents, config.seed)
            )
        self.register_buffer("start_log_q", log_q.float())
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        distinct, place = distinct_rows(inputs, n_latents)
        self._read: Sequence[str] = list(distinct)
        for name, value in {
            **distinct,
            "place": place,
        }.items():  # from the data, so no checkpoint holds them
            self.register_buffer(f"gate_{name}", value, persistent=False)
        if start.kind == "clusters" and policy.n_experts > 1:  # the gate starts from them
            policy.gate.m_step(self.inputs, self.start_log_q, self.gate_place)
        self.router = Router(config.routing, policy.n_experts, config.seed)
        asked = policy.n_experts > 1 or config.inference.alone
        inference = config.inference if asked else Exact()
        self.inference = inference.part(self.table, data, policy.base, config.seed)

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What the gate reads, each distinct row once; `gate_place` says which one a latent (pair or unit) has."""
        return {name: getattr(self, f"gate_{name}") for name in self._read}

    @torch.no_grad()
    def log_w(self) -> Tensor:
        """The gate's weights of each latent, nats."""
        return self.policy.gate.log_w(self.inputs)[self.gate_place]

    def temperature(self) -> float:
        """Of the responsibilities at this step: geometric from the start's to 1."""
        start = self.options.start
        share = float(self.steps) / max(start.tempering_passes * self.steps_per_pass, 1)
        return start.temperature ** max(0.0, 1 - share)

    def starting(self) -> bool:
        """Whether the responsibilities are still those that break the symmetry."""
        start = self.options.start
        given = start.given and self.policy.n_experts > 1
        return given and bool(self.steps < start.passes * self.steps_per_pass)

    def routing_weights(self, row: Tensor, log_w: Tensor) -> Tensor:
        """By which experts are chosen for these rows: the gate's, or at first those that break the symmetry."""
        weights = self.start_log_q if self.starting() else log_w
        return weights[self.table.unit[row]]

    def chosen(self, row: Tensor, log_w: Tensor) -> Tensor | None:
        """Which experts are computed for these rows; None: all of them."""
        if self.options.routing.top_s is None:
            return None
        now = self.now()
        passes = now.step / self.steps_per_pass
        return self.router.chosen(self.routing_weights(row, log_w), passes, now.step)

    def forward(
        self,
        row: Tensor,
        described: Tensor | None = None,
        scale: float = 1.0,
        part: str = "whole",
        **batch: Tensor,
    ) -> dict[str, Tensor]:
        """loss = - mean_n sum_k q_nk loglik_nk - log prior / pairs + penalty, nats per pair; see inference.py for q.

        loglik_nk is log sigma(D_nk), with the policy's lapse rate: its gradient weighs a pair by q_nk r_nk.

        A step in several parts: each is looked at ("look": the table is brought up to date and nothing else), then
        learned from ("learn", and "last", which closes the step), its loss times `scale`, its share of the step.
        """
        log_w = self.log_w()
        chosen = self.chosen(row, log_w)
        log_sigma = self.policy.batch_log_sigma(batch, chosen)
        last = part in ("whole", "last")
        if self.training and part in ("whole", "look"):
            self.table.update(*_from_all(row, log_sigma.detach()))
        if part == "look":
            return {}
        loglik = self.policy.with_lapse(log_sigma)
        penalty = loglik.new_zeros(())
        if chosen is not None:  # a latent a pair, exact: the row itself says all
            joint = self.routing_weights(row, log_w).masked_fill(~chosen, -torch.inf)
            if not self.starting():
                joint = joint + loglik.detach() / self.temperature()
            q = joint.softmax(1)
        elif self.starting():
            q = self.start_log_q[self.table.unit[row]].exp()
        else:
            q, penalty = self.inference.weights(row, log_w, self.now(), described)
        if self.training and last:
            self._m_step(log_w)
            self.steps += 1
        expected = (q * loglik.masked_fill(q == 0, 0.0)).sum(1).mean()
        prior = self.policy.experts.log_prior() / len(self.table.unit)
        return {"loss": scale * (penalty - expected - prior)}

    def now(self) -> Moment:
        """Where this step stands."""
        share = float(self.steps) / (self.options.passes * self.steps_per_pass)
        return Moment(int(self.steps), share, self.temperature(), self.training)

    def _m_step(self, log_w: Tensor) -> None:
        """Weights and lapse rate move towards what the whole table says, once responsibilities are no longer tempered.

        Tempered responsibilities say little of the weights: a start could kill an expert.
        """
        if self.starting() or self.temperature() > 1:
            return
        if self.policy.n_experts == 1 and self.policy.given_lapse != "learn":
            return
        log_q = self.inference.table.log_q(log_w)
        if not log_q.isfinite().any() or bool(
            log_q.isnan().any()
        ):  # the next evaluation ends the fit as non-finite
            return
        share = (float(self.steps) + 1) ** -GATE_EXPONENT
        self.policy.move_lapse(self.table.loglik, log_q, self.table.unit, share)
        if self.policy.n_experts == 1:
            return
        self.policy.gate.m_step(
            self.inputs,
            log_q,
            self.gate_place,
            share=share,
            max_iter=GATE_ITERATIONS,
            entropy_weight=self.options.routing.entropy,
            balance_weight=self.options.routing.balance_weight(self.policy.n_experts),
        )
