"""The E-step: a table of last-seen log-likelihoods, the responsibilities it implies, and when to stop and why."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from sklearn.cluster import KMeans
from torch import Tensor, nn

from .elbo import elbo_terms, entropy, log_responsibilities, mixture_log_likelihood
from .gating import FixedWeights, Gate, LearnedWeights, distinct_rows, gate_loss, standardise

STOP_REASONS = (
    "tolerance", "max_iter", "bound_decreased", "no_improvement", "non_finite", "dead_expert", "interrupted",
)  # fmt: skip
SYMMETRY_BREAKING = ("random_responsibilities", "clusters", "random_heads", "none")


class LoglikTable(nn.Module):
    """Last-seen log-likelihoods of every training pair, for the E-step in mini-batches.

    Incremental EM (Neal and Hinton 1998): the responsibilities of a unit need all its pairs, a batch holds a few; the
    others count with the value they had when they were last computed. Part of a checkpoint, so that a resumed run
    continues exactly.

    Parameters
    ----------
    unit : (pairs,) int64, unit of each pair, 0 ... U-1; the row's own number where each pair has a latent of its own.
    n_experts : K.

    >>> table = LoglikTable(torch.tensor([0, 0, 1]), n_experts=2)
    >>> table.fill(torch.tensor([[-1.0, -2.0], [-1.0, -2.0], [-3.0, -1.0]]))
    >>> table.log_q(torch.tensor([0.5, 0.5]).log()).exp()
    tensor([[0.8808, 0.1192],
            [0.1192, 0.8808]])
    """

    loglik: Tensor
    unit: Tensor

    def __init__(self, unit: Int[Tensor, "pairs"], n_experts: int) -> None:
        super().__init__()
        self.n_units = int(unit.max()) + 1
        self.register_buffer("unit", unit)
        self.register_buffer("loglik", torch.full((len(unit), n_experts), -math.log(2.0)))

    @torch.no_grad()
    def fill(self, loglik: Float[Tensor, "pairs experts"]) -> None:
        """Replace the whole table, nats."""
        self.loglik.copy_(loglik)

    @torch.no_grad()
    def update(self, row: Int[Tensor, "batch"], loglik: Float[Tensor, "batch experts"]) -> None:
        """Replace some rows by what a batch has just computed, nats; -inf (expert not computed) changes nothing."""
        self.loglik[row] = torch.where(loglik == -math.inf, self.loglik[row], loglik.detach().to(self.loglik.dtype))

    @torch.no_grad()
    def log_q(self, log_w: Float[Tensor, ...], temperature: float = 1.0) -> Float[Tensor, "units experts"]:
        """Responsibilities of every unit (log q, normalised; no gradient), tempered by `temperature` >= 1."""
        return log_responsibilities(
            self.loglik, log_w, self.unit, responsibility_temperature=temperature, n_units=self.n_units, validate=False
        )

    @torch.no_grad()
    def batch_log_q(
        self, row: Int[Tensor, "batch"], log_w: Float[Tensor, ...], temperature: float = 1.0
    ) -> Float[Tensor, "batch experts"]:
        """log q of the unit that each of these rows belongs to."""
        return self.log_q(log_w, temperature)[self.unit[row]]

    @torch.no_grad()
    def terms(self, log_w: Float[Tensor, ...], temperature: float = 1.0) -> dict[str, float]:
        """The bound by term over the whole table, nats per pair, with usage and entropy of the responsibilities.

        `bound_gap` is log-likelihood minus bound: 0 at temperature 1, where q is the exact posterior.
        """
        log_q = self.log_q(log_w, temperature)
        terms = elbo_terms(self.loglik, log_w, log_q, self.unit, n_units=self.n_units, validate=False)
        total = mixture_log_likelihood(self.loglik, log_w, self.unit, n_units=self.n_units, validate=False).sum()
        n, q = len(self.loglik), log_q.exp()
        out = {
            "elbo": float(terms.elbo.sum()) / n,
            "expected_loglik": float(terms.expected_loglik.sum()) / n,
            "kl_q_w": float(terms.kl.sum()) / n,
            "bound_gap": float(total - terms.elbo.sum()) / n,
            "entropy": float(-(q * log_q.masked_fill(q == 0, 0)).sum(1).mean()),
        }
        return out | {f"usage_{k}": float(u) for k, u in enumerate(q.mean(0))}


def predictive_probability(
    loglik: Float[Tensor, "pairs experts"], log_w: Float[Tensor, ...]
) -> Float[Tensor, "pairs"]:
    """sum_k w_k sigma(D_k): probability that the first answer is preferred, for weights (K,) or one row a pair."""
    return (loglik + log_w).logsumexp(-1).exp()


def correct(probability: Float[Tensor, "*pairs"]) -> Float[Tensor, "*pairs"]:
    """1 where the first answer is predicted, 0 where the second; a tie (1/2 up to rounding of float32) counts half.

    >>> correct(torch.tensor([0.7, 0.5 + 1e-7, 0.2]))
    tensor([1.0000, 0.5000, 0.0000])
    """
    return torch.where((probability - 0.5).abs() <= 1e-6, 0.5, (probability > 0.5).float())


@dataclass
class Monitor:
    """Watches a score that should rise (validation log-likelihood, nats per pair) and says when and why to stop.

    >>> watch = Monitor(patience=2)
    >>> [watch.step(score) for score in (-0.70, -0.60, -0.61, -0.62)]
    [None, None, None, 'no_improvement']
    >>> watch.best_step
    1
    """

    patience: int
    min_usage: float = 0.0
    best: float = -math.inf
    best_step: int = -1
    scores: list[float] = field(default_factory=list)

    def step(self, score: float, usage: list[float] | None = None) -> str | None:
        """Take the next score; returns a stop reason, or None to go on."""
        self.scores.append(score)
        if not math.isfinite(score):
            return "non_finite"
        if usage and min(usage) < self.min_usage:
            return "dead_expert"
        if score > self.best:
            self.best, self.best_step = score, len(self.scores) - 1
        elif self.patience and len(self.scores) - 1 - self.best_step >= self.patience:
            return "no_improvement"
        return None


# -------------------------------------------------------------------------------------------- amortised and relaxed


class RecognitionNetwork(nn.Module):
    """q_phi(z given x, y+, y-): an approximate posterior read from the pair itself, trained jointly with the experts.

    The network gives every pair its evidence f_nk, and log q = log_softmax(log w + f) for a latent per pair,
    log_softmax(log w + sum of f over the unit's pairs) for a latent per unit: the form of the exact posterior, with f
    in the place of log sigma(D). It starts at f = 0, where q is the gate. Source: derived in docs/method.md.

    Parameters
    ----------
    n_features : numbers that describe a pair. n_experts : K. width : hidden units, 32 by default.
    mean, scale : (features,), of the training pairs; inputs are standardised by them. Part of a checkpoint.

    >>> RecognitionNetwork(n_features=4, n_experts=2)(torch.ones(1, 4))
    tensor([[0., 0.]], grad_fn=<AddmmBackward0>)
    """

    mean: Tensor
    scale: Tensor

    def __init__(
        self, n_features: int, n_experts: int, width: int = 32, mean: Tensor | None = None, scale: Tensor | None = None
    ) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(n_features) if mean is None else mean)
        self.register_buffer("scale", torch.ones(n_features) if scale is None else scale)
        self.inner, self.outer = nn.Linear(n_features, width), nn.Linear(width, n_experts)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, features: Float[Tensor, "pairs features"]) -> Float[Tensor, "pairs experts"]:
        """Evidence f_nk of every pair, nats; gradients flow."""
        return self.outer(torch.tanh(self.inner((features - self.mean) / self.scale)))


GUMBEL_SCHEDULES = ("constant", "exponential", "effective_experts")


@dataclass(frozen=True)
class GumbelSchedule:
    """Which `gumbel_temperature` a step has.

    kind : "constant" (start throughout), "exponential" (geometric from start to end), or "effective_experts" (the
        temperature at which the mean of exp(entropy of z~) is `effective_experts`, found anew at every step).
    start, end : > 0. effective_experts : above 1 and below K.

    >>> [round(GumbelSchedule("exponential", 4.0, 0.25).temperature(share), 2) for share in (0.0, 0.5, 1.0)]
    [4.0, 1.0, 0.25]
    """

    kind: str = "constant"
    start: float = 1.0
    end: float = 0.1
    effective_experts: float = 1.5

    def __post_init__(self) -> None:
        if self.kind not in GUMBEL_SCHEDULES:
            raise ValueError(f"gumbel_schedule={self.kind!r}: possible are {GUMBEL_SCHEDULES}")
        for name in ("start", "end"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"gumbel_temperature {name}={getattr(self, name)}: expected above 0, for example 1.0")
        if not 1 < self.effective_experts < math.inf:
            raise ValueError(f"effective_experts={self.effective_experts}: expected above 1 and below K")

    @torch.no_grad()
    def temperature(
        self, share: float, log_q: Tensor | None = None, generator: torch.Generator | None = None
    ) -> float:
        """At `share` (0 to 1) of the training; "effective_experts" reads the responsibilities log_q (rows, K) as well.

        Raises
        ------
        ValueError : "effective_experts" without log_q, or a target of K or more.
        """
        if self.kind == "constant":
            return self.start
        if self.kind == "exponential":
            return self.start * (self.end / self.start) ** min(1.0, max(0.0, share))
        if log_q is None:
            raise ValueError("gumbel_schedule='effective_experts' needs the responsibilities of the step: give log_q")
        n_experts = log_q.shape[-1]
        if n_experts > 1 and not self.effective_experts < n_experts:
            raise ValueError(f"effective_experts={self.effective_experts} with {n_experts} experts: expected below K")
        noise = torch.empty_like(log_q).exponential_(generator=generator).clamp_min(1e-30).log().neg()
        low, high = math.log(0.01), math.log(100.0)
        for _ in range(30):  # exp(entropy) grows with the temperature
            middle = (low + high) / 2
            log_z = ((log_q.clamp_min(-1e4) + noise) / math.exp(middle)).log_softmax(-1)
            found = float(entropy(log_z).exp().mean())
            low, high = (middle, high) if found < self.effective_experts else (low, middle)
        return math.exp((low + high) / 2)


# ------------------------------------------------------------------------------------------------------ full batches


@dataclass(frozen=True)
class EMResult:
    """What full-batch EM leaves.

    history : one row an iteration: restart, iteration, objective (log-likelihood plus priors), elbo, expected_loglik,
        kl_q_w, loglik (before the M-step of that iteration), entropy and usage; nats per pair, usage in [0, 1].
    stop_reason : of the kept restart, one of STOP_REASONS. restarts : restart, objective, stop_reason, kept.
    log_q : (units, experts), responsibilities at the end.
    """

    history: pd.DataFrame
    stop_reason: str
    restarts: pd.DataFrame
    log_q: Tensor

    @property
    def converged(self) -> bool:
        """Whether the tolerance was met; every other ending is something else."""
        return self.stop_reason == "tolerance"


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
    inputs: Mapping[str, Tensor], n_experts: int, seed: int, together: Sequence[str] | None = None,
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
            f"symmetry_breaking='clusters' needs a gate that reads prompts or metadata; this one reads "
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
    read = read - read.mean(0)  # directions from the centre: a few far prompts must not be a cluster of their own
    size = np.linalg.norm(read, axis=1, keepdims=True)
    distinct, place = np.unique((read / np.where(size > 0, size, 1)).round(3), axis=0, return_inverse=True)
    if len(distinct) < n_experts:
        raise ValueError(f"{len(distinct)} distinct inputs of the gate for {n_experts} experts: use fewer experts")
    label = KMeans(n_experts, n_init=10, random_state=seed).fit_predict(distinct)[place.ravel()]
    log_q = torch.full((len(label), n_experts), math.log((1 - certainty) / (n_experts - 1)))
    log_q[torch.arange(len(label)), torch.from_numpy(label).long()] = math.log(certainty)
    return log_q


# ---------------------------------------------------------------------------------------------- M-step of the gate


def gate_m_step(
    gate: Gate, inputs: Mapping[str, Tensor], log_q: Float[Tensor, "rows experts"], entropy_weight: float = 0.0,
    balance_weight: float = 0.0, max_iter: int = 10, frozen: Sequence[nn.Parameter] = (),
    place: Int[Tensor, "rows"] | None = None,
) -> float:  # fmt: skip
    """Move a gate that reads towards the responsibilities, in place: line-searched L-BFGS on `gating.gate_loss`.

    Minimises gate_loss - log prior / rows over the whole table, so that a step cannot lower the bound (generalised EM).
    The experts' optimiser knows nothing of it.

    Parameters
    ----------
    inputs : what the gate reads, one row a latent: a pair, or a unit. log_q : responsibilities of these rows.
    max_iter : >= 1 iterations of L-BFGS. frozen : parameters of the gate that stay as they are.
    place : which row of the inputs each responsibility belongs to, where the inputs are distinct rows (see
        `gating.distinct_rows`); the same minimum, and rows that are equal are computed once.

    Returns
    -------
    The loss at the end, nats a row.
    """
    held = {id(p) for p in frozen}
    parameters = [p for p in gate.parameters() if id(p) not in held]
    optimizer = torch.optim.LBFGS(parameters, lr=1.0, max_iter=max_iter, line_search_fn="strong_wolfe")
    log_q, n, count = log_q.detach(), len(log_q), None
    if place is not None:
        count = torch.bincount(place)
        log_q = (log_q.new_zeros(len(count), log_q.shape[1]).index_add(0, place, log_q.exp()) / count[:, None]).log()

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = gate_loss(gate(inputs), log_q, entropy_weight, balance_weight, count) - gate.log_prior() / n  # type: ignore[union-attr, operator]
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)  # type: ignore[arg-type]
        value = float(loss().detach())
    gate.zero_grad(set_to_none=True)
    return value


@torch.no_grad()
def gate_em(
    gate: Gate, inputs: Mapping[str, Tensor], loglik: Float[Tensor, "pairs experts"],
    unit: Int[Tensor, "pairs"] | None = None, *, n_units: int | None = None, max_iter: int = 200,
    tolerance: float = 1e-6, entropy_weight: float = 0.0, balance_weight: float = 0.0,
    frozen: Sequence[nn.Parameter] = (),
) -> EMResult:  # fmt: skip
    """Full-batch EM of the gate alone, in place: the experts are what `loglik` says of them, and stay as they are.

    Parameters
    ----------
    inputs : what the gate reads, one row a latent (a pair, or a unit); empty for an input-free gate.
    loglik : log sigma(D_nk), nats. unit : unit of each pair, None for a latent per pair.
    tolerance : nats a pair; a smaller gain of the objective (log-likelihood + log prior - regularisation) ends it.

    Returns
    -------
    EMResult with one row an iteration: iteration, objective, loglik (nats per pair).
    """
    rows: list[dict[str, float]] = []
    reason, n = "max_iter", len(loglik)
    total_units = n_units if n_units is not None else (n if unit is None else int(unit.max()) + 1)
    shared: dict[str, Any] = {"unit": unit, "n_units": n_units if unit is not None else None}
    log_q, place = torch.empty(0), torch.empty(0, dtype=torch.long)
    if gate.reads:
        inputs, place = distinct_rows(inputs)
    for iteration in range(max_iter):
        log_w = gate(inputs)[place] if gate.reads else gate()
        log_q = log_responsibilities(loglik, log_w, **shared)
        total = float(mixture_log_likelihood(loglik, log_w, **shared).sum())
        prior = 0.0 if isinstance(gate, FixedWeights) else float(gate.log_prior())
        if gate.reads and (entropy_weight or balance_weight):
            plain, whole = gate_loss(log_w, log_q), gate_loss(log_w, log_q, entropy_weight, balance_weight)
            prior += float(plain - whole) * total_units
        rows.append({"iteration": iteration, "objective": (total + prior) / n, "loglik": total / n})
        if not math.isfinite(rows[-1]["objective"]):
            reason = "non_finite"
            break
        if iteration and rows[-1]["objective"] - rows[-2]["objective"] < tolerance:
            reason = "tolerance"
            break
        if isinstance(gate, FixedWeights):
            reason = "tolerance"
            break
        if isinstance(gate, LearnedWeights):
            gate.update(log_q.exp().mean(0), n_units=total_units)
        else:
            gate_m_step(gate, inputs, log_q, entropy_weight, balance_weight, 30, frozen, place)
    return EMResult(pd.DataFrame(rows), reason, pd.DataFrame({"restart": [0], "kept": [True]}), log_q)


@torch.no_grad()
def full_batch_em(
    experts: Any, gate: FixedWeights | LearnedWeights, pairs: Int[Tensor, "pairs 2"],
    unit: Int[Tensor, "pairs"] | None = None, *, max_iter: int = 500, tolerance: float = 1e-8,
    start_temperature: float = 1.0, tempering_iterations: int = 20, restarts: int = 1,
    symmetry_breaking: str = "random_responsibilities", symmetry_scale: float = 1.0, min_usage: float = 0.0,
    seed: int = 0,
) -> EMResult:  # fmt: skip
    """Full-batch EM, in place: exact responsibilities, an M-step of the experts that cannot fall, the weights' mode.

    The monitored objective is log-likelihood + log prior of the experts + log prior of the weights. It never falls once
    the responsibilities are exact (temperature 1). Source: derived in docs/method.md, tested in tests/test_em.py.

    Parameters
    ----------
    experts : a module with loglik, log_prior, perturb and an m_step that cannot fall, for example `TabularExperts`.
    pairs : chosen and rejected answer of each pair. unit : unit of each pair, None for a latent per pair.
    max_iter : >= 1, iterations of each restart.
    tolerance : > 0, nats per pair: a smaller gain of an iteration at temperature 1 ends the fit as converged.
    start_temperature : >= 1, of the first responsibilities; falls to 1 geometrically in `tempering_iterations`.
    restarts : >= 1; the one with the largest objective is kept, all are reported.
    symmetry_breaking : "random_responsibilities" (the first M-step sees them); "random_heads" (parameters drawn with
        standard deviation `symmetry_scale`: with a latent per pair and few distinct pairs, random responsibilities
        average out); or "none" (go on from where the experts are: a call that continues another one gives the same as
        one longer call).
    min_usage : an expert whose mean responsibility falls below this ends the restart as "dead_expert".

    Raises
    ------
    ValueError : an option out of range; a unit with no pairs.
    KeyboardInterrupt : is not raised: the fit ends as "interrupted" with the state it had reached.
    """
    for name, value, low in (("max_iter", max_iter, 1), ("restarts", restarts, 1), ("tolerance", tolerance, 0),
                             ("start_temperature", start_temperature, 1)):  # fmt: skip
        if not value >= low or (name == "tolerance" and value <= 0):
            raise ValueError(f"{name}={value}: expected {'above 0' if name == 'tolerance' else f'at least {low}'}")
    possible = tuple(name for name in SYMMETRY_BREAKING if name != "clusters")  # input-free: nothing to cluster
    if symmetry_breaking not in possible:
        raise ValueError(f"symmetry_breaking={symmetry_breaking!r}: possible are {possible}")
    gate.double()
    unit = torch.arange(len(pairs)) if unit is None else unit
    start = {name: value.clone() for name, value in [*experts.state_dict().items(), *gate.state_dict().items()]}
    history, table, best = [], [], None
    for restart in range(restarts):
        _load(experts, gate, start)
        if symmetry_breaking == "random_heads":
            experts.perturb(symmetry_scale, torch.Generator().manual_seed(seed + restart))
        log_q = random_log_q(int(unit.max()) + 1, gate.n_experts, seed + restart)
        reason, rows = _one_em(
            experts, gate, pairs, unit, max_iter, tolerance, start_temperature, tempering_iterations,
            log_q if symmetry_breaking == "random_responsibilities" else None, min_usage,
        )  # fmt: skip
        history += [{"restart": restart, **row} for row in rows]
        table.append({"restart": restart, "objective": rows[-1]["objective"], "stop_reason": reason})
        state = {n: v.clone() for n, v in [*experts.state_dict().items(), *gate.state_dict().items()]}
        if best is None or rows[-1]["objective"] > table[best[0]]["objective"]:
            best = (restart, state)
        if reason == "interrupted":
            break
    assert best is not None
    _load(experts, gate, best[1])
    log_q = log_responsibilities(experts.loglik(pairs).detach(), gate(), unit)
    frame = pd.DataFrame(table)
    frame["kept"] = frame["restart"] == best[0]
    return EMResult(pd.DataFrame(history), table[best[0]]["stop_reason"], frame, log_q)


def _load(experts: nn.Module, gate: nn.Module, state: dict[str, Tensor]) -> None:
    for module in (experts, gate):
        module.load_state_dict({name: state[name] for name in module.state_dict()})


def _one_em(
    experts, gate, pairs, unit, max_iter, tolerance, start_temperature, tempering, log_q, min_usage
) -> tuple[str, list[dict[str, Any]]]:  # fmt: skip
    """Until a reason to stop: the reason, and one row an iteration."""
    n, rows = len(pairs), []
    n_units = int(unit.max()) + 1

    def m_step(log_q: Tensor) -> None:
        experts.m_step(pairs, log_q.exp()[unit])
        if isinstance(gate, LearnedWeights):
            gate.update(log_q.exp().mean(0), n_units=n_units)

    try:
        if log_q is not None:
            m_step(log_q)
        for iteration in range(max_iter + 1):
            temperature = start_temperature ** max(0.0, 1 - iteration / max(tempering, 1))
            loglik, log_w = experts.loglik(pairs).detach(), gate()
            log_q = log_responsibilities(loglik, log_w, unit, responsibility_temperature=temperature)
            terms = elbo_terms(loglik, log_w, log_q, unit)
            total = float(mixture_log_likelihood(loglik, log_w, unit).sum())
            prior = float(experts.log_prior()) + float(gate.log_prior() if isinstance(gate, LearnedWeights) else 0.0)
            usage = log_q.exp().mean(0)
            rows.append({
                "iteration": iteration, "objective": (total + prior) / n, "loglik": total / n,
                "elbo": float(terms.elbo.sum()) / n, "expected_loglik": float(terms.expected_loglik.sum()) / n,
                "kl_q_w": float(terms.kl.sum()) / n, "temperature": temperature,
                "entropy": float(entropy(log_q).mean()),
                **{f"usage_{k}": float(u) for k, u in enumerate(usage)},
            })  # fmt: skip
            exact = temperature == 1 and len(rows) > 1 and rows[-2]["temperature"] == 1
            gain = rows[-1]["objective"] - rows[-2]["objective"] if exact else math.inf
            if not math.isfinite(rows[-1]["objective"]):
                return "non_finite", rows
            if float(usage.min()) < min_usage:
                return "dead_expert", rows
            if gain < -1e-10 * max(1.0, abs(rows[-1]["objective"])):
                return "bound_decreased", rows
            if gain < tolerance:
                return "tolerance", rows
            if iteration < max_iter:
                m_step(log_q)
    except KeyboardInterrupt:
        if not rows:
            raise
        return "interrupted", rows
    return "max_iter", rows
