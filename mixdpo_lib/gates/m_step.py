"""How does a gate learn? One M-step by L-BFGS, and EM for a gate whose experts stand still."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..elbo import entropy, log_responsibilities, mixture_log_likelihood
from .inputs import distinct_rows

if TYPE_CHECKING:
    from .contract import Gate


@dataclass(frozen=True)
class EMResult:
    """What full-batch EM leaves.

    history : one row an iteration: restart, iteration, objective (log-likelihood plus priors), elbo, expected_loglik,
        kl_q_w, loglik (before the M-step of that iteration), entropy and usage; nats per pair, usage in [0, 1].
    stop_reason : of the kept restart, one of STOP_REASONS. restarts : restart, objective, stop_reason, kept.
    log_q : (units, experts), responsibilities at the end.
    lapse : the lapse rate at the end; None where the likelihoods were given, and any rate with them.
    """

    history: pd.DataFrame
    stop_reason: str
    restarts: pd.DataFrame
    log_q: Tensor
    lapse: float | None = None

    @property
    def converged(self) -> bool:
        """Whether the tolerance was met; every other ending is something else."""
        return self.stop_reason == "tolerance"


def gate_m_step(
    gate: Gate,
    inputs: Mapping[str, Tensor],
    log_q: Float[Tensor, "rows experts"],
    entropy_weight: float = 0.0,
    balance_weight: float = 0.0,
    max_iter: int = 10,
    frozen: Sequence[nn.Parameter] = (),
    place: Int[Tensor, "rows"] | None = None,
) -> float:
    """Move a gate that reads towards the responsibilities, in place: line-searched L-BFGS on `m_step.gate_loss`.

    Minimises gate_loss - log prior / rows over the whole table, so that a step cannot lower the bound (generalised EM).
    The experts' optimiser knows nothing of it.

    Parameters
    ----------
    inputs : what the gate reads, one row a latent: a pair, or a unit. log_q : responsibilities of these rows.
    max_iter : >= 1 iterations of L-BFGS. frozen : parameters of the gate that stay as they are.
    place : which row of the inputs each responsibility belongs to, where the inputs are distinct rows (see
        `inputs.distinct_rows`); the same minimum, and rows that are equal are computed once.

    Returns
    -------
    The loss at the end, nats a row.
    """
    held = {id(p) for p in frozen}
    parameters = [p for p in gate.parameters() if id(p) not in held]
    optimizer = torch.optim.LBFGS(
        parameters, lr=1.0, max_iter=max_iter, line_search_fn="strong_wolfe"
    )
    log_q, n, count = log_q.detach(), len(log_q), None
    if place is not None:
        count = torch.bincount(place)
        log_q = (
            log_q.new_zeros(len(count), log_q.shape[1]).index_add(0, place, log_q.exp())
            / count[:, None]
        ).log()

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = (
            gate_loss(gate.log_w(inputs), log_q, entropy_weight, balance_weight, count)
            - gate.log_prior() / n
        )
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)  # type: ignore[arg-type]
        value = float(loss().detach())
    gate.zero_grad(set_to_none=True)
    return value


@torch.no_grad()
def gate_em(
    gate: Gate,
    inputs: Mapping[str, Tensor],
    loglik: Float[Tensor, "pairs experts"],
    unit: Int[Tensor, "pairs"] | None = None,
    *,
    n_units: int | None = None,
    max_iter: int = 200,
    tolerance: float = 1e-6,
    entropy_weight: float = 0.0,
    balance_weight: float = 0.0,
    frozen: Sequence[nn.Parameter] = (),
) -> EMResult:
    """Full-batch EM of the gate alone, in place: the experts are what `loglik` says of them, and stay as they are.

    Parameters
    ----------
    inputs : what the gate reads, one row a latent (a pair, or a unit); empty for an input-free gate.
    loglik : log sigma(D_nk), or `elbo.with_lapse` of it, nats. unit : of each pair, None for a latent per pair.
    tolerance : nats a pair; a smaller gain of the objective (log-likelihood + log prior - regularisation) ends it.

    Returns
    -------
    EMResult with one row an iteration: iteration, objective, loglik (nats per pair).
    """
    rows: list[dict[str, float]] = []
    reason, n = "max_iter", len(loglik)
    latents = n_units if n_units is not None else (n if unit is None else int(unit.max()) + 1)
    shared: dict[str, Any] = {"unit": unit, "n_units": n_units if unit is not None else None}
    log_q = torch.empty(0)
    inputs, place = distinct_rows(inputs, latents)
    for iteration in range(max_iter):
        log_w = gate.log_w(inputs)[place]
        log_q = log_responsibilities(loglik, log_w, **shared)
        total = float(mixture_log_likelihood(loglik, log_w, **shared).sum())
        prior = float(gate.log_prior())
        if entropy_weight or balance_weight:
            whole = gate_loss(log_w, log_q, entropy_weight, balance_weight)
            prior += float(gate_loss(log_w, log_q) - whole) * latents
        rows.append({"iteration": iteration, "objective": (total + prior) / n, "loglik": total / n})
        if not math.isfinite(rows[-1]["objective"]):
            reason = "non_finite"
            break
        if iteration and rows[-1]["objective"] - rows[-2]["objective"] < tolerance:
            reason = "tolerance"
            break
        if not gate.learns:
            reason = "tolerance"
            break
        gate.m_step(
            inputs,
            log_q,
            place,
            frozen=frozen,
            entropy_weight=entropy_weight,
            balance_weight=balance_weight,
        )
    restarts = pd.DataFrame({"restart": [0], "kept": [True]})
    return EMResult(pd.DataFrame(rows), reason, restarts, log_q)


def gate_loss(
    log_w: Float[Tensor, "..."],
    log_q: Float[Tensor, "..."],
    entropy_weight: float | int = 0.0,
    balance_weight: float | int = 0.0,
    count: Int[Tensor, "..."] | None = None,
) -> Float[Tensor, ""]:
    """What a gate minimises: ``mean_n [- sum_k q_nk log w_nk - a H(w_n)] + b KL(mean_n w_n || uniform)``, nats a row.

    The first term is the gate's part of the bound (method: M-step of the gate); its minimum over w is at w = q.  a > 0
    keeps single rows undecided, b > 0 keeps any expert from starving over the whole batch.  Rows are pairs with
    ``latent="pair"`` and units with ``latent="unit"``.

    Parameters
    ----------
    log_w : (rows, K), of the gate.
    log_q : (rows, K), responsibilities, normalised; detached here, for the experts are trained by another loss.
    entropy_weight, balance_weight : a, b >= 0.
    count : (rows,), how many equal rows each stands for, whose mean q is then given; once each by default.

    Raises
    ------
    ValueError : shapes that differ; a weight below 0.

    >>> q = torch.tensor([[0.5, 0.5]])
    >>> gate_loss(q.log(), q.log())
    tensor(0.6931)
    """
    if log_w.shape != log_q.shape:
        raise ValueError(
            f"log_w has shape {tuple(log_w.shape)}, log_q {tuple(log_q.shape)}; expected the same"
        )
    for name, value in (("entropy_weight", entropy_weight), ("balance_weight", balance_weight)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}={value}: expected 0 or above; 0 leaves the term out")
    q = log_q.detach().exp().to(log_w)
    share = (
        torch.full_like(log_w[:, 0], 1 / len(log_w))
        if count is None
        else (count / count.sum()).to(log_w)
    )
    loss = -share @ (q * log_w.masked_fill(q == 0, 0)).sum(1)
    if entropy_weight:
        loss = loss - entropy_weight * share @ entropy(log_w)
    if balance_weight:
        log_mean = (log_w + share.log()[:, None]).logsumexp(0)
        loss = loss + balance_weight * (math.log(log_w.shape[1]) - entropy(log_mean[None])[0])
    return loss
