"""How does a part of a mixture learn while it grows? Tables by their M-step, every other family by gradient steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..base.model import need_memory
from ..data.pairs import Pairs
from ..elbo import no_lapse_probability, sum_over_units
from ..experts.contract import Experts
from ..experts.copies import gathered
from ..gates.inputs import distinct_rows
from ..gates.weights import LearnedWeights
from ..policy.mixture import MixturePolicy
from .config import FitConfig
from .fit import fit
from .learner import of_units
from .routing import Routing

PAIRS_ASKED = 48  # of a unit, evenly spaced: where its gradient points and who answers for it is plain from these


@dataclass(frozen=True)
class Sets:
    """Training and held-out pairs, and whose they are.

    unit, held_unit : of each pair. names, held_names : of the units. place : training unit of each held-out unit, -1
        where there is none. column : that names them.
    """

    train: Pairs
    held: Pairs
    unit: Int[Tensor, "pairs"]
    names: list[str]
    held_unit: Int[Tensor, "held_pairs"]
    held_names: list[str]
    place: Int[Tensor, "held_units"]
    column: str

    @classmethod
    def of(cls, train: Pairs, held: Pairs, column: str) -> Sets:
        """Of two preference sets."""
        (unit, names), (held_unit, held_names) = train.units(column), held.units(column)
        known = {name: i for i, name in enumerate(names)}
        place = torch.tensor([known.get(name, -1) for name in held_names])
        return cls(train, held, unit, names, held_unit, held_names, place, column)


def unit_inputs(
    policy: MixturePolicy, data: Pairs, unit: Int[Tensor, "pairs"], column: str
) -> dict[str, Tensor]:
    """What the gate reads of each unit, see `of_units`."""
    return of_units(policy, data, unit, column) if policy.gate.reads else {}


class Teaching(ABC):
    """What growth asks of learning: log-likelihoods of units, the units' gradients, and two ways to learn."""

    rounds: int  # of learning and new responsibilities, for a proposal
    exact: bool  # whether an expert learns from its units at once; else more steps alone would look like a gain

    asked: Pairs  # training pairs by which units are told apart
    asked_unit: Int[Tensor, "asked"]  # unit of each

    def __init__(self, policy: MixturePolicy, sets: Sets, config: FitConfig) -> None:
        self.policy, self.sets, self.config = policy, sets, config
        self.asked, self.asked_unit = sets.train, sets.unit

    def alone(self, experts: Experts) -> MixturePolicy:
        """These experts with equal weights, at the lapse rate of now."""
        gate, policy = LearnedWeights(experts.n_experts), self.policy
        return MixturePolicy(experts, gate, policy.beta, policy.lapse)

    def logliks(
        self, experts: Experts
    ) -> tuple[Float[Tensor, "units experts"], Float[Tensor, "held_units experts"]]:
        """Log-likelihood of the training pairs asked and of all held-out pairs of each unit, nats."""
        alone, sets = self.alone(experts), self.sets
        loglik = alone.loglik(self.asked).double()
        train = sum_over_units(loglik, self.asked_unit, len(sets.names))
        held = alone.loglik(sets.held).double()
        return train, sum_over_units(held, sets.held_unit, len(sets.held_names))

    @abstractmethod
    def gradients(
        self, expert: Experts, units: Int[Tensor, "some"]
    ) -> Float[Tensor, "some numbers"]:
        """Gradient of each of these units' log-likelihood with respect to what one expert is made of."""

    @abstractmethod
    def teach(self, experts: Experts, weight: Float[Tensor, "units experts"], short: bool) -> None:
        """Fit each of the experts to the units, in place, a unit weighted by its responsibility for it."""

    @abstractmethod
    def settle(self, short: bool) -> None:
        """Fit the whole policy from where it is, in place."""


class ByTable(Teaching):
    """Tables: exact M-steps on soft responsibilities."""

    rounds, exact = 12, True

    def __init__(self, policy: MixturePolicy, sets: Sets, config: FitConfig) -> None:
        super().__init__(policy, sets, config)
        number = policy.constants(sets.train.texts).number
        self.index = torch.from_numpy(number)[sets.train.index]

    def gradients(
        self, expert: Experts, units: Int[Tensor, "some"]
    ) -> Float[Tensor, "some numbers"]:
        """See `Teaching.gradients`: of the rewards."""
        table: Any = expert
        wrong = -torch.expm1(table.loglik(self.index).detach()[:, 0])
        found = wrong.new_zeros(len(self.sets.names), table.n_answers).flatten()
        for side, sign in ((0, 1.0), (1, -1.0)):
            at = self.sets.unit * table.n_answers + self.index[:, side]
            found.index_add_(0, at, sign * wrong)
        return found.view(-1, table.n_answers)[units]

    def teach(self, experts: Experts, weight: Float[Tensor, "units experts"], short: bool) -> None:
        """See `Teaching.teach`."""
        table: Any = experts
        rows = weight.double()[self.sets.unit]
        right = no_lapse_probability(table.loglik(self.index).detach(), self.policy.lapse)
        table.m_step(self.index, rows * right)

    def settle(self, short: bool) -> None:
        """See `Teaching.settle`."""
        policy, sets = self.policy, self.sets
        table: Any = policy.experts
        inputs, before = unit_inputs(policy, sets.train, sets.unit, sets.column), -torch.inf
        inputs, place = distinct_rows(inputs, len(sets.names))
        for _ in range(30 if short else 300):
            log_sigma = table.loglik(self.index).detach()
            loglik = sum_over_units(policy.with_lapse(log_sigma), sets.unit, len(sets.names))
            joint = loglik + policy.gate.log_w(inputs)[place].detach()
            prior = float(table.log_prior().detach()) + float(policy.gate.log_prior().detach())
            now = (float(joint.logsumexp(1).sum()) + prior) / len(self.index)
            if now - before < 1e-7:
                return
            before, log_q = now, joint.log_softmax(1)
            self.teach(table, log_q.exp(), short)
            policy.gate.m_step(inputs, log_q, place)
            policy.move_lapse(log_sigma, log_q, sets.unit)


class BySteps(Teaching):
    """Gradient steps of `fit`: a unit belongs to the expert that answers for more than half of it.

    It is asked at most `PAIRS_ASKED` of its pairs: to run all of them through every expert costs more than to teach it.
    """

    rounds, exact = 2, False

    def __init__(self, policy: MixturePolicy, sets: Sets, config: FitConfig) -> None:
        super().__init__(policy, sets, config)
        counts, order = sets.unit.bincount(), sets.unit.argsort(stable=True)
        place = torch.empty_like(order)  # of a pair among those of its unit
        place[order] = torch.arange(len(order)) - (counts.cumsum(0) - counts)[sets.unit[order]]
        chosen = place % (counts / PAIRS_ASKED).ceil().long()[sets.unit] == 0
        self.asked, self.asked_unit = sets.train.where(chosen.numpy()), sets.unit[chosen]

    def gradients(
        self, expert: Experts, units: Int[Tensor, "some"]
    ) -> Float[Tensor, "some numbers"]:
        """See `Teaching.gradients`: of all parameters, one backward pass a unit, over the pairs asked.

        Raises
        ------
        MixDPOError : less memory than the gradients of all units need.
        """
        alone, data, counts = self.alone(expert), self.asked, self.sets.unit.bincount()
        parameters = [p for p in expert.parameters() if p.requires_grad]
        size = sum(p.numel() for p in parameters)
        need_memory(4 * size * len(units), f"gradients of {len(units)} units", parameters[0].device)
        constants, found = alone.constants(data.texts), torch.empty(len(units), size)
        for row, one in enumerate(units.tolist()):
            batch = expert.batch(constants, data.index[self.asked_unit == one])
            batch = {name: value.to(parameters[0].device) for name, value in batch.items()}
            with torch.enable_grad():
                each = torch.autograd.grad(alone.batch_loglik(batch).mean(), parameters)
            found[row] = counts[one] * torch.cat([g.flatten().float().cpu() for g in each])
        return found

    def _config(self, short: bool) -> FitConfig:
        config = self.config
        passes = min(1.0, config.passes) if short else config.passes
        return config.change(
            passes=passes,
            min_steps=round(config.min_steps * passes / config.passes),
            evaluations_per_pass=1 / passes if short else config.evaluations_per_pass,
            evaluate_training=config.evaluate_training and not short,
            start__kind="none",
            start__temperature=1.0,
            start__restarts=1,
        )

    def teach(self, experts: Experts, weight: Float[Tensor, "units experts"], short: bool) -> None:
        """See `Teaching.teach`."""
        config = self._config(short).change(routing=Routing())  # of one expert there is none
        for k in range(experts.n_experts):
            mask: Bool[Tensor, "pairs"] = (weight[:, k] > 0.5)[self.sets.unit]
            if not bool(mask.any()):
                continue
            one = self.alone(gathered(experts, [(experts, k)]))
            fit(one, self.sets.train.where(mask.numpy()), config)
            for name, value in experts.own(k).items():
                value.copy_(one.experts.own(0)[name])

    def settle(self, short: bool) -> None:
        """See `Teaching.settle`."""
        self._fit(self._config(short))

    def fit_anew(self) -> None:
        """Fit the whole policy, whose experts are as at the start, from linear rewards (`linear_start`), in place."""
        self._fit(self._config(short=False).change(start__kind="linear"))

    def _fit(self, config: FitConfig) -> None:
        sets = self.sets
        known = (sets.place >= 0)[sets.held_unit]
        if self.policy.gate.reads:
            known = torch.ones_like(known)
        held = sets.held.where(known.numpy()) if bool(known.any()) else None
        fit(self.policy, sets.train, config, validation=held)


def teaching(policy: MixturePolicy, sets: Sets, config: FitConfig) -> Teaching:
    """By the M-step of the family, where it has one; else by gradient steps."""
    return (ByTable if hasattr(policy.experts, "m_step") else BySteps)(policy, sets, config)
