"""Which proposals does growth make, and which of them does it keep? Each is decided by held-out units."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..experts.contract import Experts
from ..experts.copies import gathered
from ..gates.contract import Gate
from ..gates.grown import GrownGate
from ..gates.m_step import gate_em
from ..policy.mixture import MixturePolicy
from .choices import Choices
from .config import FitConfig
from .teaching import Sets, Teaching, teaching, unit_inputs

BIRTH_SHARE = 0.25  # of the units: those that the mixture serves worst are taught a new expert
LEAST = 0.01  # nats a unit that an expert is worth at least: of one that nobody is served by, gain and error are both 0
ROUNDING = 1e-5  # of log-probabilities in float32 that were added up in another order; a start that parts is 1e-2 nats
GATE_ITERATIONS = 20  # of EM for the weights, each time responsibilities are asked for


COLUMNS = ["proposal", "experts", "n_experts", "units", "gain", "error", "kept", "seconds"]


@dataclass(frozen=True)
class Growth(Choices):
    """When growth believes a proposal, and when it ends.

    errors : > 0; a split or birth is kept when the held-out log-likelihood per unit rises by more than so many standard
        errors of the paired difference, a merge when it falls by less; by `LEAST` nats in any case.
    refusals : >= 1 splits and births that are refused in a row end growth; as many merges and retirements are tried.
    max_experts : >= 2; growth ends there.
    sketch : where one expert takes gradient steps and has learned nothing, and units have several pairs, rewards that are
        linear in what its base makes of the answers say first how many kinds there are, within seconds and by a fifth of
        the training pairs that they have not seen. So many experts, two at least, are fitted from there ("linear"), and
        one more while held-out units say so; that ends growth. If experts refuse what was found, it goes on as without.
    """

    errors: float | int = 1.0
    refusals: int = 3
    max_experts: int = 64
    sketch: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.errors < math.inf:
            raise ValueError(f"errors={self.errors}: expected above 0; 1 is one standard error")
        for name, low in (("refusals", 1), ("max_experts", 2)):
            if getattr(self, name) < low:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least {low}")

    def keeps(self, kind: str, gain: float, error: float) -> bool:
        """Whether a proposal of this kind stands by its mean gain a held-out unit and the standard error of that, nats."""
        allowed = max(self.errors * error, LEAST)
        return gain > {"retire": -LEAST, "merge": -allowed}.get(kind, allowed)


@dataclass(frozen=True)
class _Mixture:
    """Experts and gate, and the log-likelihood of the units' training and held-out pairs under each expert."""

    experts: Experts
    gate: Gate
    train: Float[Tensor, "units experts"]
    held: Float[Tensor, "held_units experts"]


@dataclass(frozen=True)
class Proposal:
    """Experts that go, and new ones: each a copy of an expert, with the units that it is taught at first."""

    kind: str
    gone: tuple[int, ...]
    copies: tuple[int, ...] = ()
    weight: Float[Tensor, "units new"] | None = None


def _hopeless(kind: str, found: tuple[float, float], growth: Growth) -> bool:
    """Whether a round of teaching leaves so little that the next one, which costs as much, need not be asked."""
    gain, error = found
    return gain < -max(2 * growth.errors * error, LEAST) if kind == "merge" else gain <= 0


def _gate_inputs(
    policy: MixturePolicy, sets: Sets, gate: Gate, held: bool = False
) -> dict[str, Tensor]:
    """What a gate reads of the training or of the held-out units."""
    own, policy.gate = policy.gate, gate
    try:
        if held:
            return unit_inputs(policy, sets.held, sets.held_unit, sets.column)
        return unit_inputs(policy, sets.train, sets.unit, sets.column)
    finally:
        policy.gate = own


def _is_reference(policy: MixturePolicy, sets: Sets) -> bool:
    """Whether every expert gives every training text what its reference gives, up to rounding."""
    texts = sets.train.texts
    logps, refs = policy.experts.all_text_logps(policy.constants(texts), torch.arange(len(texts)))
    return torch.allclose(logps, refs.expand_as(logps), rtol=ROUNDING, atol=ROUNDING)


class _Known:
    """What a growth knows: the policy as it is, and what its units' pairs say of it."""

    def __init__(
        self,
        policy: MixturePolicy,
        sets: Sets,
        config: FitConfig,
        growth: Growth,
        freeze_others: bool,
        freeze_users: list[str],
    ) -> None:
        self.policy, self.sets, self.growth = policy, sets, growth
        self.teacher: Teaching = teaching(policy, sets, config)
        policy.experts.start(sets.train)
        self.fresh = _is_reference(policy, sets)
        if self.fresh:
            self.teacher.settle(short=False)
        self.held_back = policy.n_experts if freeze_others else 0
        self.moving = torch.from_numpy(~np.isin(sets.names, freeze_users))
        self.now = self.measured()
        if freeze_users:
            after = policy.gate.resized(policy.n_experts)
            policy.gate = GrownGate(policy.gate, after, freeze_users, config.unit)
            self.now = self._weighed(replace(self.now, gate=policy.gate))
        self.rows: list[list[Any]] = []

    # ------------------------------------------------------------------------------------------------ what is known

    def measured(self) -> _Mixture:
        """The policy as it is."""
        return _Mixture(
            self.policy.experts, self.policy.gate, *self.teacher.logliks(self.policy.experts)
        )

    def log_q(self, mixture: _Mixture) -> Float[Tensor, "units experts"]:
        """Responsibilities of the training units, nats."""
        log_w = mixture.gate.log_w(_gate_inputs(self.policy, self.sets, mixture.gate)).detach()
        return (log_w + mixture.train).log_softmax(1)

    def score(self, mixture: _Mixture) -> Float[Any, "held_units"]:
        """Log-likelihood of all held-out pairs of each unit, nats."""
        place = self.sets.place
        log_w = (
            mixture.gate.log_w(_gate_inputs(self.policy, self.sets, mixture.gate, held=True))
            .detach()
            .double()
        )
        log_w = log_w.expand(len(place), -1)
        prior = torch.where(place[:, None] < 0, log_w, self.log_q(mixture)[place])
        return (prior + mixture.held).logsumexp(1).numpy()

    def _weighed(self, mixture: _Mixture) -> _Mixture:
        """With a gate that was moved to its responsibilities."""
        inputs = _gate_inputs(self.policy, self.sets, mixture.gate)
        gate_em(mixture.gate, inputs, mixture.train, max_iter=GATE_ITERATIONS, tolerance=1e-4)
        return mixture


class Growing(_Known):
    """The course of one growth."""

    # ------------------------------------------------------------------------------------------------- the proposals

    def _birth(self) -> Proposal:
        """A new expert for the units that the mixture serves worst."""
        sets, counts = self.sets, self.teacher.asked_unit.bincount().double()
        log_q = self.log_q(self.now)
        each = (log_q + self.now.train).logsumexp(1) / counts
        tested = torch.from_numpy(self.score(self.now)) / torch.bincount(sets.held_unit).double()
        known = sets.place >= 0
        each[sets.place[known]] = tested[known]
        each = each.masked_fill(~self.moving, torch.inf)
        n = max(1, round(BIRTH_SHARE * int(self.moving.sum())))
        weight = torch.zeros(len(each), 1, dtype=torch.float64)
        weight[each.argsort()[:n]] = 1.0
        nearest = int((log_q.exp() * weight).sum(0).argmax())
        return Proposal("birth", (), (nearest,), weight)

    def _split(self, k: int, q: Float[Tensor, "units experts"]) -> tuple[float, Proposal] | None:
        """The units of an expert parted by their gradients, with how far they part."""
        units = (q[:, k] > 0.5).logical_and(self.moving).nonzero().squeeze(1)
        if len(units) < 4:
            return None
        one = gathered(self.now.experts, [(self.now.experts, k)])
        gradients = self.teacher.gradients(one, units).double()
        gradients -= gradients.mean(0)
        values, vectors = torch.linalg.eigh(gradients @ gradients.T)
        weight = torch.zeros(len(q), 2, dtype=torch.float64)
        side = vectors[:, -1] > 0
        weight[units[side], 0], weight[units[~side], 1] = 1.0, 1.0
        return float(values[-1]), Proposal("split", (k,), (k, k), weight * q[:, [k]])

    def _more(self) -> Iterator[Proposal]:
        """Splits, the widest parted first, with a birth after the first of them."""
        q = self.log_q(self.now).exp()
        every = [self._split(k, q) for k in range(self.held_back, self.policy.n_experts)]
        splits = sorted((s for s in every if s is not None), key=lambda s: -s[0])
        yield from (proposal for _, proposal in splits[:1])
        yield self._birth()
        yield from (proposal for _, proposal in splits[1:])

    def _fewer(self) -> Iterator[Proposal]:
        """The least used expert retired, and merges, the most alike first."""
        q = self.log_q(self.now).exp()
        free = range(self.held_back, self.policy.n_experts)
        if self.policy.n_experts == 1:
            return
        if free:
            yield Proposal("retire", (min(free, key=lambda k: float(q[:, k].sum())),))
        per_unit = self.now.train / self.teacher.asked_unit.bincount()[:, None]
        apart = torch.cdist(per_unit.T, per_unit.T)
        for i, j in sorted(
            ((i, j) for i in free for j in free if i < j), key=lambda p: float(apart[p])
        ):
            larger = i if float(q[:, i].sum()) >= float(q[:, j].sum()) else j
            yield Proposal("merge", (i, j), (larger,), (q[:, [i]] + q[:, [j]]))

    # ------------------------------------------------------------------------------------------------- the decisions

    def _tried(self, proposal: Proposal) -> _Mixture:
        """The mixture with what is proposed, taught a short while."""
        now = self.now
        stay = [k for k in range(now.experts.n_experts) if k not in proposal.gone]
        n_new = len(proposal.copies)
        gate = now.gate.resized(len(stay) + n_new)
        parts = [(now.experts, k) for k in [*stay, *proposal.copies]]
        experts = gathered(now.experts, parts)
        train = torch.cat([now.train[:, stay], now.train[:, list(proposal.copies)]], 1)
        held = torch.cat([now.held[:, stay], now.held[:, list(proposal.copies)]], 1)
        if n_new == 0 or proposal.weight is None:
            return self._weighed(_Mixture(experts, gate, train, held))
        new = gathered(now.experts, [(now.experts, k) for k in proposal.copies])
        weight = proposal.weight
        for _ in range(self.teacher.rounds):
            self.teacher.teach(new, weight, short=True)
            train[:, len(stay) :], held[:, len(stay) :] = self.teacher.logliks(new)
            tried = self._weighed(_Mixture(experts, gate, train, held))
            weight = self.log_q(tried).exp()[:, len(stay) :]
            if not self.teacher.exact and _hopeless(proposal.kind, self._gain(tried), self.growth):
                break
        whole = [(now.experts, k) for k in stay] + [(new, k) for k in range(n_new)]
        return _Mixture(gathered(experts, whole), gate, train, held)

    def _gain(self, tried: _Mixture) -> tuple[float, float]:
        """Mean gain of held-out log-likelihood a unit over the mixture of now, nats, and its standard error."""
        gains = self.score(tried) - self.score(self.now)
        return float(gains.mean()), float(gains.std(ddof=1)) / len(gains) ** 0.5

    def decide(self, proposal: Proposal) -> bool:
        """Try what is proposed, write the row, and take it where it holds."""
        began, before = time.monotonic(), self.now
        tried = self._tried(proposal)
        gain, error = self._gain(tried)
        kept = self.growth.keeps(proposal.kind, gain, error)
        if kept:
            self.policy.experts, self.policy.gate, self.now = tried.experts, tried.gate, tried
            self._settle(short=self.teacher.exact)
        experts = " and ".join(str(k) for k in proposal.gone or proposal.copies)
        self._write(proposal.kind, experts, before, gain, error, kept, began)
        return kept

    def fitted_anew(self, n_experts: int, fit_anew: Callable[[], None]) -> bool:
        """Fit so many new experts in place of all; take them where they hold and each has units, else nothing is left."""
        began, before, policy = time.monotonic(), self.now, self.policy
        like = before.experts
        lapse = {name: value.clone() for name, value in policy.named_buffers(recurse=False)}
        policy.experts = like.of_number([(like, 0)] * n_experts)
        policy.experts.start(self.sets.train)
        policy.gate = before.gate.resized(n_experts)
        try:
            fit_anew()
            tried = self.measured()
        except BaseException:  # interrupted, too: the policy is what it was
            self._back(before, lapse)
            raise
        gain, error = self._gain(tried)
        idle = set(range(n_experts)) - set(self.log_q(tried).argmax(1).tolist())
        kept = not idle and self.growth.keeps("linear", gain, error)  # an idle one would go again
        if kept:
            self.now = tried
        else:
            self._back(before, lapse)
        self._write("linear", "all", before, gain, error, kept, began)
        return kept

    def _back(self, before: _Mixture, lapse: dict[str, Tensor]) -> None:
        """The policy as it was before a fit."""
        self.now = before
        self.policy.experts, self.policy.gate = before.experts, before.gate
        for name, value in self.policy.named_buffers(recurse=False):
            value.copy_(lapse[name])

    def _write(
        self,
        kind: str,
        experts: str,
        before: _Mixture,
        gain: float,
        error: float,
        kept: bool,
        began: float,
    ) -> None:
        n, units = before.experts.n_experts, len(self.sets.held_names)
        seconds = time.monotonic() - began
        self.rows.append([kind, experts, n, units, gain, error, kept, seconds])

    def _settle(self, short: bool) -> None:
        """All experts learn on, or with experts held back the others alone."""
        if not self.held_back:
            self.teacher.settle(short)
        elif self.policy.n_experts > self.held_back:
            first, n = self.held_back, self.policy.n_experts
            new = gathered(self.now.experts, [(self.now.experts, k) for k in range(first, n)])
            for _ in range(self.teacher.rounds):
                self.teacher.teach(new, self.log_q(self.now).exp()[:, first:], short)
                train, held = self.now.train.clone(), self.now.held.clone()
                train[:, first:], held[:, first:] = self.teacher.logliks(new)
                self.now = self._weighed(_Mixture(self.now.experts, self.now.gate, train, held))
            old = [(self.now.experts, k) for k in range(first)]
            self.policy.experts = gathered(new, [*old, *((new, k) for k in range(n - first))])
        self.now = self.measured()

    def run(self, refusals: int) -> None:
        """Grow until so many proposals are refused in a row, then shrink while nothing is lost."""
        refused, grew = 0, refusals > 0
        while grew and self.policy.n_experts < self.growth.max_experts:
            grew = False
            for proposal in self._more():
                grew = self.decide(proposal)
                refused = 0 if grew else refused + 1
                if grew or refused >= refusals:
                    break
        kept = self._settled_since(0)
        shrank = True
        while shrank:
            shrank = any(map(self.decide, islice(self._fewer(), max(refusals, 1))))
        self._settled_since(kept)

    def _settled_since(self, row: int) -> int:
        """All passes, if something was kept since: half-learned experts would be merged for nothing."""
        if self.teacher.exact and any(one[COLUMNS.index("kept")] for one in self.rows[row:]):
            self._settle(short=False)
        return len(self.rows)
