"""The E-step: a table of last-seen log-likelihoods, the responsibilities it implies, and when to stop and why."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .elbo import elbo_terms, log_responsibilities, mixture_log_likelihood, sum_over_units

STOP_REASONS = ("max_iter", "no_improvement", "non_finite", "dead_expert", "interrupted")


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
        """Replace some rows by what a batch has just computed, nats."""
        self.loglik[row] = loglik.detach()

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


def unit_loglik(loglik: Float[Tensor, "pairs experts"], unit: Int[Tensor, "pairs"], n_units: int) -> Tensor:
    """Sum of loglik over the pairs of each unit, (U, K), nats."""
    return sum_over_units(loglik, unit, n_units)


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
