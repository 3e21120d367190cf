"""Weights that read nothing: fixed, or learned by their closed form."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..base.model import Base
from ..elbo import GATE_TOLERANCE, check_log_w, check_n_experts
from .contract import Gate


class _WeightsAlone(Gate):
    """The same weights for every row: `log_weights` (K,), a buffer."""

    log_weights: Tensor

    def inputs(self, columns: Mapping[str, Sequence[Any]], base: Base | None) -> dict[str, Tensor]:
        """Nothing is read."""
        return {}

    def logits(self, inputs: Mapping[str, Tensor]) -> Float[Tensor, "1 experts"]:
        """The weights as they are, nats, one row; no gradient flows."""
        return self.log_weights[None]

    def log_w(self, inputs: Mapping[str, Tensor] | None = None) -> Float[Tensor, "1 experts"]:
        """The weights as they are, nats, one row; no gradient flows."""
        return self.log_weights[None]


class FixedWeights(_WeightsAlone):
    """Weights that are given and stay as they are: ``w_k`` does not depend on the input and is not learned.

    Parameters
    ----------
    weights : (K,), >= 0, total 1; a weight of 0 leaves an expert out.  Sequence or tensor.
    log_w : (K,), nats: the same in the log domain.  Give one of the two.

    Raises
    ------
    ValueError : neither or both given; no weights; a negative weight; a total that is not 1.

    >>> FixedWeights([0.25, 0.75]).log_w().exp()
    tensor([[0.2500, 0.7500]])
    >>> FixedWeights.uniform(2).n_experts
    2
    """

    density = "any"

    def __init__(
        self,
        weights: Sequence[float | int] | Tensor | None = None,
        *,
        log_w: Tensor | None = None,
    ) -> None:
        if (weights is None) == (log_w is None):
            raise ValueError("FixedWeights: give weights or log_w, exactly one of the two")
        if log_w is None:
            given = torch.as_tensor(weights)
            given = given if given.dtype == torch.float64 else given.float()
            if given.dim() != 1:
                raise ValueError(f"weights has shape {tuple(given.shape)}; expected (experts,)")
            check_n_experts(len(given))
            if not (given >= 0).all():
                raise ValueError(
                    f"weights={given.tolist()}: expected every weight to be 0 or above"
                )
            log_w = given.log()
        if log_w.dim() != 1:
            raise ValueError(f"log_w has shape {tuple(log_w.shape)}; expected (experts,)")
        super().__init__(len(log_w))
        log_w = log_w.detach().clone()
        total = float(log_w.exp().sum())
        if not abs(total - 1) <= GATE_TOLERANCE:
            raise ValueError(f"weights sum to {total:.6g}, expected 1; divide them by their total")
        self.register_buffer("log_weights", check_log_w(log_w))

    @classmethod
    def uniform(cls, n_experts: int) -> FixedWeights:
        """Equal weights for ``n_experts`` experts."""
        check_n_experts(n_experts)
        return cls(torch.full((n_experts,), 1.0 / n_experts, dtype=torch.float64).float())

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> FixedWeights:
        """Equal weights, until the saved ones are loaded."""
        return cls.uniform(options["n_experts"])

    def options(self) -> dict[str, Any]:
        """What makes an equal gate but for its weights."""
        return {"n_experts": self.n_experts}

    def log_prior(self) -> Float[Tensor, ""]:
        """0: nothing is learned."""
        return self.log_weights.new_zeros(())


class LearnedWeights(_WeightsAlone):
    """One set of weights for all inputs, learned as the mean responsibility over units, with a Dirichlet prior.

    M-step: ``m_k = (U mean_u q_uk + alpha - 1) / (U + K (alpha - 1))``, the mode of the posterior under a symmetric
    Dirichlet of concentration alpha; stochastic form ``w <- (1 - rho) w + rho m``.  Source: derived in docs/method.md,
    tested in tests/gates/test_gating.py.  Starts uniform.  Not trained by gradient: ``log_weights`` is a buffer.

    Parameters
    ----------
    n_experts : K >= 1; 1 is plain DPO.
    alpha : >= 1, default 1.1: a tenth of a unit is added to each expert, enough to keep a weight from reaching 0 and
        too little to move weights that many units speak for.  1 is maximum likelihood.

    Raises
    ------
    ValueError : n_experts below 1, alpha below 1.

    >>> gate = LearnedWeights(n_experts=2, alpha=2.0)
    >>> gate.update(torch.tensor([0.75, 0.25]), rho=1.0, n_units=8)   # (6 + 1) / 10, (2 + 1) / 10
    >>> gate.log_w().exp()
    tensor([[0.7000, 0.3000]])
    """

    def __init__(self, n_experts: int, alpha: float | int = 1.1) -> None:
        super().__init__(n_experts)
        if not 1 <= alpha < math.inf:
            raise ValueError(
                f"alpha={alpha}: the Dirichlet concentration is at least 1; 1 is maximum likelihood"
            )
        self.alpha = float(alpha)
        self.register_buffer("log_weights", torch.full((n_experts,), -math.log(n_experts)))

    def options(self) -> dict[str, Any]:
        """What makes an equal gate but for its weights."""
        return {"n_experts": self.n_experts, "alpha": self.alpha}

    @property
    def learns(self) -> bool:
        """Always, by its closed form."""
        return True

    def n_free(self) -> int:
        """K - 1: they sum to 1."""
        return self.n_experts - 1

    def m_step(
        self,
        inputs: Mapping[str, Tensor],
        log_q: Float[Tensor, "rows experts"],
        place: Int[Tensor, "rows"],
        share: float = 1.0,
        max_iter: int = 30,
        frozen: Sequence[nn.Parameter] = (),
        entropy_weight: float = 0.0,
        balance_weight: float = 0.0,
    ) -> None:
        """See `Gate.m_step`: `share` of the way to the mode of the posterior (`update`).

        Raises
        ------
        ValueError : a weight of entropy or balance, which act on gates that read.
        """
        if entropy_weight or balance_weight:
            raise ValueError(
                f"entropy_weight={entropy_weight}, balance_weight={balance_weight} with LearnedWeights: expected a "
                "gate that reads, or weights of 0"
            )
        self.update(log_q.exp().mean(0), share, n_units=len(log_q))

    @torch.no_grad()
    def update(
        self,
        mean_responsibility: Float[Tensor, "..."],
        rho: float | int = 1.0,
        *,
        n_units: float | int,
    ) -> None:
        """Move the weights towards the mean responsibility.

        Parameters
        ----------
        mean_responsibility : (K,), probabilities: the mean of q over **units** (over pairs only where each pair has a
            latent of its own).
        rho : step in (0, 1]; 1 is the full M-step.  Stochastic EM wants ``sum rho = inf`` and ``sum rho^2 < inf``.
        n_units : how many units the training data holds: they are weighed against the prior.  For a mini-batch this
            is still the number in the whole data.

        Raises
        ------
        ValueError : another shape, no probabilities, rho outside (0, 1], n_units not above 0.
        """
        if mean_responsibility.shape != self.log_weights.shape:
            raise ValueError(
                f"mean_responsibility has shape {tuple(mean_responsibility.shape)}; expected ({self.n_experts},)"
            )
        if not 0 < rho <= 1:
            raise ValueError(f"rho={rho}: expected above 0 and at most 1; 1 is the full M-step")
        if not 0 < n_units < math.inf:
            raise ValueError(
                f"n_units={n_units}: expected the number of units of the training data, above 0"
            )
        q = mean_responsibility.to(self.log_weights.device, torch.float64)
        if not (q >= 0).all() or not abs(float(q.sum()) - 1) <= 1e-3:
            raise ValueError(
                f"mean_responsibility={q.tolist()}: expected probabilities that sum to 1"
            )
        prior = self.alpha - 1
        m = (n_units * q / q.sum() + prior) / (n_units + self.n_experts * prior)
        w = (1 - rho) * self.log_weights.double().exp() + rho * m
        self.log_weights.copy_((w / w.sum()).log())

    def log_prior(self) -> Float[Tensor, ""]:
        """Log density of the weights under the Dirichlet prior, without its constant: ``(alpha - 1) sum_k log w_k``.

        Nats.  The objective that full-batch EM with this gate never lowers is the log-likelihood plus this.
        """
        if self.alpha == 1:
            return self.log_weights.new_zeros(())
        return (self.alpha - 1) * self.log_weights.sum()
