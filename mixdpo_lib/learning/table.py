"""What was last seen of each pair? The table behind the E-step."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..elbo import elbo_terms, log_responsibilities, mixture_log_likelihood


class LoglikTable(nn.Module):
    """Last-seen log-likelihoods of every training pair, for the E-step in mini-batches.

    Incremental EM (Neal and Hinton 1998): the responsibilities of a unit need all its pairs, a batch holds a few; the
    others count with the value they had when they were last computed. Part of a checkpoint, so that a resumed run
    continues exactly.

    Parameters
    ----------
    unit : (pairs,) int64, unit of each pair, 0 ... U-1; the row's own number where each pair has a latent of its own.
    n_experts : K.
    as_read : what the values become when they are read, such as `MixturePolicy.with_lapse`: the table then holds
        log sigma(D), and a lapse rate that moves leaves no value behind that was made with an older one.

    >>> table = LoglikTable(torch.tensor([0, 0, 1]), n_experts=2)
    >>> table.fill(torch.tensor([[-1.0, -2.0], [-1.0, -2.0], [-3.0, -1.0]]))
    >>> table.log_q(torch.tensor([0.5, 0.5]).log()).exp()
    tensor([[0.8808, 0.1192],
            [0.1192, 0.8808]])
    """

    loglik: Tensor
    unit: Tensor

    def __init__(
        self,
        unit: Int[Tensor, "pairs"],
        n_experts: int,
        as_read: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self._as_read = as_read
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
        self.loglik[row] = torch.where(
            loglik == -math.inf, self.loglik[row], loglik.detach().to(self.loglik.dtype)
        )

    @torch.no_grad()
    def read(self) -> Float[Tensor, "pairs experts"]:
        """Log-likelihood of every pair as last seen, at the lapse rate of now, nats."""
        return self.loglik if self._as_read is None else self._as_read(self.loglik)

    @torch.no_grad()
    def log_q(
        self, log_w: Float[Tensor, ...], temperature: float = 1.0
    ) -> Float[Tensor, "units experts"]:
        """Responsibilities of every unit (log q, normalised; no gradient), tempered by `temperature` >= 1."""
        return log_responsibilities(
            self.read(),
            log_w,
            self.unit,
            responsibility_temperature=temperature,
            n_units=self.n_units,
            validate=False,
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
        log_q, loglik = self.log_q(log_w, temperature), self.read()
        terms = elbo_terms(loglik, log_w, log_q, self.unit, n_units=self.n_units, validate=False)
        total = mixture_log_likelihood(
            loglik, log_w, self.unit, n_units=self.n_units, validate=False
        ).sum()
        n, q = len(loglik), log_q.exp()
        out = {
            "elbo": float(terms.elbo.sum()) / n,
            "expected_loglik": float(terms.expected_loglik.sum()) / n,
            "kl_q_w": float(terms.kl.sum()) / n,
            "bound_gap": float(total - terms.elbo.sum()) / n,
            "entropy": float(-(q * log_q.masked_fill(q == 0, 0)).sum(1).mean()),
        }
        return out | {f"usage_{k}": float(u) for k, u in enumerate(q.mean(0))}
