"""What is the bound?  Pure functions of margins, gate and responsibilities.

Nothing here knows a model, a device or a file.  Everything stays in the log domain, in float32 or float64.

Shapes: B pairs, K experts, U units (a unit is whatever shares one latent expert, for example a user).  Without
``unit`` each pair has a latent of its own and a *row* of a result is a pair; with ``unit`` a row is a unit.

``loglik`` is log sigma(D), or, where answers may be lapses, :func:`with_lapse` of it: every function takes either.

Sign rule: every quantity is a log-likelihood or a bound, in nats, to be **maximised**.

The gate ``log_w`` may be (K,), shared by all rows; one row per pair (B, K); or, with ``unit``, one row per unit
(U, K).  Where B = U its rows are read as units.  A (B, K) gate given together with ``unit`` has to be constant inside
each unit, because a latent that is shared by the pairs of a unit has one prior.

Checks cost a little and synchronise an accelerator; ``validate=False`` skips them where the inputs were checked before.
"""

from __future__ import annotations

import math
from numbers import Integral
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

GATE_TOLERANCE = (
    1e-5  # how far the log of a row's total weight may lie above 0: rounding of float32
)
NORMALISED_TOLERANCE = 1e-4  # how far the log of a responsibility row's total may lie from 0
LAPSE_PRIOR = (
    2.0,
    50.0,
)  # Beta(a, b) of a learned lapse rate: weighs as one lapse in fifty answers
LAPSE_START = 0.02  # the mode of that prior, where a learned rate begins
__all__ = [
    "ElboTerms",
    "certified_gap",
    "check_log_w",
    "elbo_terms",
    "entropy",
    "gumbel_softmax_samples",
    "lapse_log_prior",
    "lapse_m_step",
    "log_responsibilities",
    "margins",
    "mixture_log_likelihood",
    "mixture_reward",
    "no_lapse_probability",
    "relaxed_objective",
    "restricted_log_likelihood",
    "sum_over_units",
    "with_lapse",
]


class ElboTerms(NamedTuple):
    """The bound by term, one entry a row (pair or unit), in nats; ``elbo = expected_loglik - kl``."""

    expected_loglik: Float[Tensor, "rows"]
    kl: Float[Tensor, "rows"]
    elbo: Float[Tensor, "rows"]


def _check_float(name: str, value: Tensor) -> None:
    if value.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{name} has dtype {value.dtype}; expected float32 or float64: convert it with {name}.float()"
        )


def _check_matrix(name: str, value: Tensor, axes: str = "pairs, experts") -> None:
    _check_float(name, value)
    if value.dim() != 2 or value.shape[0] == 0 or value.shape[1] == 0:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}; expected ({axes}), neither of them empty"
        )


def _row_name(value: Tensor, row: int, name: str) -> str:
    return name if value.dim() == 1 else f"{name}[{row}]"


def check_log_w(log_w: Float[Tensor, "..."], name: str = "log_w") -> Float[Tensor, "..."]:
    """Refuse a gate that is no set of (sub-)probabilities, and return it unchanged.

    Parameters
    ----------
    log_w : (K,) or (rows, K), nats.  Each row: ``logsumexp <= 1e-5``; ``-inf`` leaves an expert out; a total below 1
        is allowed (a restricted gate is not renormalised).
    name : what the message calls it.

    Raises
    ------
    ValueError : wrong dtype or rank; a row that holds NaN or ``+inf``, leaves every expert out, or whose total exceeds
        1.  The first such row is named.

    >>> check_log_w(torch.tensor([0.5, 0.5]).log()).exp()
    tensor([0.5000, 0.5000])
    >>> check_log_w(torch.tensor([[0.5, 0.5], [0.7, 0.7]]).log())
    Traceback (most recent call last):
    ...
    ValueError: log_w[1]: weights sum to 1.4, expected at most 1; normalise it with log_softmax(log_w, -1)
    """
    _check_float(name, log_w)
    if log_w.dim() not in (1, 2) or log_w.shape[-1] == 0:
        raise ValueError(
            f"{name} has shape {tuple(log_w.shape)}; expected (experts,) or (rows, experts), not empty"
        )
    rows = log_w.detach().reshape(-1, log_w.shape[-1])
    broken = (rows.isnan() | (rows == math.inf)).any(-1)
    if broken.any():
        row = int(broken.nonzero()[0])
        where, found = _row_name(log_w, row, name), rows[row].tolist()
        raise ValueError(
            f"{where}: holds NaN or +inf ({found}); expected log-probabilities, at most 0 nats each"
        )
    totals = rows.logsumexp(-1)
    if (totals == -math.inf).any():
        where = _row_name(log_w, int((totals == -math.inf).nonzero()[0]), name)
        raise ValueError(
            f"{where}: every expert has weight 0 (all -inf); leave at least one expert in"
        )
    if (totals > GATE_TOLERANCE).any():
        row = int((totals > GATE_TOLERANCE).nonzero()[0])
        total = math.exp(min(float(totals[row]), 700.0))
        raise ValueError(
            f"{_row_name(log_w, row, name)}: weights sum to {total:.6g}, expected at most 1; "
            f"normalise it with log_softmax({name}, -1)"
        )
    return log_w


def _check_loglik(loglik: Tensor) -> None:
    _check_matrix("loglik", loglik)
    broken = (loglik.isnan() | (loglik > 0)).any(-1)
    if broken.any():
        row = int(broken.nonzero()[0])
        raise ValueError(
            f"loglik[{row}]: found {loglik[row].tolist()}; expected log-probabilities, at most 0 nats each: "
            "apply logsigmoid to the margins"
        )


def _check_log_q(log_q: Tensor, rows: int, experts: int) -> None:
    _check_matrix("log_q", log_q, "rows, experts")
    if log_q.shape != (rows, experts):
        raise ValueError(
            f"log_q has shape {tuple(log_q.shape)}; expected ({rows}, {experts}): one row a pair or unit"
        )
    totals = log_q.detach().logsumexp(-1)
    wrong = ~(totals.abs() <= NORMALISED_TOLERANCE)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"log_q[{row}]: the log of its total is {float(totals[row]):.6g}, expected 0; "
            "responsibilities are normalised: use log_softmax(log_q, -1)"
        )


def _count_units(unit: Tensor, pairs: int, n_units: int | None, validate: bool) -> int:
    if unit.shape != (pairs,):
        raise ValueError(
            f"unit has shape {tuple(unit.shape)}; expected ({pairs},): one unit number for each pair"
        )
    if not validate and n_units is not None:
        return n_units
    if validate and int(unit.min()) < 0:
        row = int((unit < 0).nonzero()[0])
        raise ValueError(
            f"unit[{row}] = {int(unit[row])}; expected numbers from 0 on: renumber the units"
        )
    highest = int(unit.max())
    if n_units is None:
        if validate:
            sizes = torch.bincount(unit, minlength=highest + 1)
            if (sizes == 0).any():
                missing = int((sizes == 0).nonzero()[0])
                raise ValueError(
                    f"unit {missing} of 0 ... {highest} has no pairs; renumber the units without gaps, "
                    "or pass n_units to let units without pairs keep their prior"
                )
        return highest + 1
    if highest >= n_units:
        row = int((unit >= n_units).nonzero()[0])
        raise ValueError(
            f"unit[{row}] = {int(unit[row])} with n_units={n_units}; expected at most {n_units - 1}"
        )
    return n_units


def sum_over_units(
    loglik: Float[Tensor, "pairs experts"], unit: Int[Tensor, "_"], n_units: int
) -> Float[Tensor, "units experts"]:
    """Log-likelihood of all pairs of a unit under each expert: ``sum_{n in u} loglik[n, k]``.

    A unit without pairs gets zeros.  Gradients flow.

    >>> sum_over_units(torch.tensor([[-1.0, -2.0], [-3.0, -4.0], [-5.0, -6.0]]), torch.tensor([1, 0, 1]), 2)
    tensor([[-3., -4.],
            [-6., -8.]])
    """
    zeros = loglik.new_zeros(n_units, loglik.shape[1])
    return zeros.index_add(0, unit.to(loglik.device), loglik)


def _unit_gate(log_w: Tensor, unit: Tensor, n_units: int, validate: bool) -> Tensor:
    """The gate of each unit, (U, K), from a (U, K) gate or from a (B, K) gate that is constant inside each unit."""
    pairs = len(unit)
    if log_w.shape[0] == n_units:
        return log_w
    if log_w.shape[0] != pairs:
        raise ValueError(
            f"log_w has {log_w.shape[0]} rows for {pairs} pairs of {n_units} units; expected (experts,), "
            f"({n_units}, experts) or ({pairs}, experts)"
        )
    first = torch.full((n_units,), pairs, dtype=torch.long, device=unit.device)
    first = first.scatter_reduce(0, unit.long(), torch.arange(pairs, device=unit.device), "amin")
    if (first == pairs).any():
        missing = int((first == pairs).nonzero()[0])
        raise ValueError(
            f"unit {missing} has no pairs, so a log_w by pair says nothing of it; give log_w by unit"
        )
    per_unit = log_w[first]
    if validate:
        differs = ((log_w.exp() - per_unit[unit].exp()).abs() > GATE_TOLERANCE).any(-1)
        if differs.any():
            row = int(differs.nonzero()[0])
            raise ValueError(
                f"log_w[{row}] = {[round(v, 4) for v in log_w[row].tolist()]} differs from the first row of its unit "
                f"{int(unit[row])}, {[round(v, 4) for v in per_unit[unit[row]].tolist()]}; a latent per unit has one "
                "prior per unit: use a gate that reads what the unit's pairs share, or a latent per pair (unit=None)"
            )
    return per_unit


def _rows(
    loglik: Tensor, log_w: Tensor, unit: Tensor | None, n_units: int | None, validate: bool
) -> tuple[Tensor, Tensor]:
    """``(loglik, log_w)`` with one row a latent: (B, K) without units, (U, K) with them."""
    if validate:
        _check_loglik(loglik)
        check_log_w(log_w)
    if log_w.shape[-1] != loglik.shape[1]:
        raise ValueError(
            f"log_w has {log_w.shape[-1]} experts and loglik {loglik.shape[1]} (shapes {tuple(log_w.shape)} and "
            f"{tuple(loglik.shape)}); expected the same experts in both"
        )
    if unit is None:
        if n_units is not None:
            raise ValueError(
                f"n_units={n_units} without unit; give unit, the number of the unit of each pair"
            )
        if log_w.dim() == 2 and log_w.shape[0] not in (1, loglik.shape[0]):
            raise ValueError(
                f"log_w has {log_w.shape[0]} rows and loglik {loglik.shape[0]}; expected one row a pair, or "
                "(experts,); a gate given by unit needs unit as well"
            )
        return loglik, log_w.expand_as(loglik)
    units = _count_units(unit, loglik.shape[0], n_units, validate)
    if log_w.dim() == 2 and log_w.shape[0] != 1:
        log_w = _unit_gate(log_w, unit, units, validate)
    return sum_over_units(loglik, unit, units), log_w.expand(units, loglik.shape[1])


def margins(
    policy_logps: Float[Tensor, "pairs answers experts"],
    ref_logps: Float[Tensor, "..."],
    beta: float | int,
) -> Float[Tensor, "pairs experts"]:
    """Margin of the better answer under each expert, ``D_k``.

    ``D_k = beta [(log pi_k(y+) - log pi_ref(k)(y+)) - (log pi_k(y-) - log pi_ref(k)(y-))]``: the implicit reward of
    an expert, whose partition function cancels inside that expert.  Source: arXiv 2510.08256; DPO for K = 1.

    Parameters
    ----------
    policy_logps : (B, 2, K), nats, summed over the response's tokens; index 0 chosen, 1 rejected.
    ref_logps : (B, 2, K), or (B, 2, 1) when the experts share a reference; the same sum.
    beta : > 0, strength of the KL term; large keeps the policy close to its reference.

    Returns
    -------
    (B, K), in units of beta x nats.  Gradients flow.

    Raises
    ------
    ValueError : beta not above 0, or shapes that do not fit.

    >>> margins(torch.tensor([[[-1.0], [-4.0]]]), torch.tensor([[[-2.0], [-3.0]]]), beta=0.5)
    tensor([[1.]])
    """
    if not 0 < beta < math.inf:
        raise ValueError(
            f"beta={beta}: the strength of the KL term is above 0; 0.1 is a usual value"
        )
    if policy_logps.dim() != 3 or policy_logps.shape[1] != 2:
        raise ValueError(
            f"policy_logps has shape {tuple(policy_logps.shape)}; expected (pairs, 2, experts)"
        )
    _check_float("policy_logps", policy_logps)
    _check_float("ref_logps", ref_logps)
    pairs, _, experts = policy_logps.shape
    if ref_logps.shape not in ((pairs, 2, experts), (pairs, 2, 1)):
        raise ValueError(
            f"ref_logps has shape {tuple(ref_logps.shape)}; expected ({pairs}, 2, {experts}), "
            f"or ({pairs}, 2, 1) for a shared reference"
        )
    log_ratios = policy_logps - ref_logps
    return beta * (log_ratios[:, 0] - log_ratios[:, 1])


def check_lapse(lapse: float | int) -> None:
    """Refuse a lapse rate that is none.

    >>> check_lapse(1.0)
    Traceback (most recent call last):
    ...
    ValueError: lapse=1.0: expected a rate of at least 0 and below 1, such as 0.02; 0 leaves lapses out
    """
    if not 0 <= lapse < 1:
        raise ValueError(
            f"lapse={lapse}: expected a rate of at least 0 and below 1, such as {LAPSE_START}; 0 leaves lapses out"
        )


def _lapse_logs(log_sigma: Tensor, lapse: float | int | Tensor) -> tuple[Tensor, Tensor]:
    """``log(1 - e)`` and ``log(e / 2)``, of the dtype and on the device of log_sigma."""
    if not isinstance(lapse, Tensor):
        check_lapse(lapse)
    rate = torch.as_tensor(lapse, dtype=log_sigma.dtype, device=log_sigma.device)
    return torch.log1p(-rate), torch.log(rate / 2)


def _never(lapse: float | int | Tensor) -> bool:
    return bool(not isinstance(lapse, Tensor) and lapse == 0)


def with_lapse(
    log_sigma: Float[Tensor, "pairs experts"], lapse: float | int | Float[Tensor, ""]
) -> Float[Tensor, "pairs experts"]:
    """Log-likelihood of each answer under each expert, where an answer is given at random at the lapse rate e.

    ``loglik = log((1 - e) sigma(D) + e / 2)``, which is at least ``log(e / 2)`` and at most ``log(1 - e / 2)``.  Lapses
    are independent of each other, given the expert.  Source: derived in docs/method.md, tested in tests/test_elbo.py.

    Parameters
    ----------
    log_sigma : (B, K), nats, <= 0: log sigmoid of the margins.  -inf (an expert that was not computed) stays -inf.
    lapse : e, a probability in [0, 1).  A tensor of one number is not checked, which would synchronise an accelerator.

    Returns
    -------
    (B, K), nats, < 0, of the dtype of log_sigma; log_sigma itself for the number 0.  Gradients flow to log_sigma,
    multiplied by :func:`no_lapse_probability`.

    Raises
    ------
    ValueError : e is no rate.

    >>> with_lapse(torch.tensor([[0.9, 0.1]]).log(), lapse=0.2).exp()   # .8 * .9 + .1, .8 * .1 + .1
    tensor([[0.8200, 0.1800]])
    """
    if _never(lapse):
        return log_sigma
    log_attentive, log_random = _lapse_logs(log_sigma, lapse)
    loglik = torch.logaddexp(log_sigma + log_attentive, log_random)
    return torch.where(log_sigma == -math.inf, log_sigma, loglik)


@torch.no_grad()
def no_lapse_probability(
    log_sigma: Float[Tensor, "pairs experts"], lapse: float | int | Float[Tensor, ""]
) -> Float[Tensor, "pairs experts"]:
    """Posterior probability that an answer was no lapse, if expert k gave it.

    ``r_nk = (1 - e) sigma(D_nk) / exp(loglik_nk)``, loglik of :func:`with_lapse`; ``1 - r_nk = (e / 2) / exp(loglik_nk)``.
    It is the derivative of loglik by log sigma(D).  Source: derived in docs/method.md, tested in tests/test_elbo.py.

    Parameters and errors as :func:`with_lapse`.  Returns (B, K), in [0, 1]; ones for e = 0.  No gradient flows.

    >>> no_lapse_probability(torch.tensor([[0.9, 0.1]]).log(), lapse=0.2)   # .72 / .82, .08 / .18
    tensor([[0.8780, 0.4444]])
    """
    if _never(lapse):
        return torch.ones_like(log_sigma)
    log_attentive, log_random = _lapse_logs(log_sigma, lapse)
    return torch.sigmoid(log_sigma + log_attentive - log_random)


@torch.no_grad()
def lapse_m_step(
    log_sigma: Float[Tensor, "pairs experts"],
    log_q: Float[Tensor, "rows experts"],
    lapse: float | int | Float[Tensor, ""],
    unit: Int[Tensor, "_"] | None = None,
    *,
    prior: tuple[float, float] = LAPSE_PRIOR,
) -> Float[Tensor, ""]:
    """The lapse rate's M-step, the mode of its posterior: ``(sum_nk q_uk (1 - r_nk) + a - 1) / (N + a + b - 2)``.

    The prior Beta(a, b) is needed: experts that over-fit leave no pair unexplained, and e would fall to 0, where one
    degenerate answer costs what it likes.  The default Beta(2, 50) weighs as much as one lapse in fifty further answers
    and has its mode there, at .02; where every pair is explained it leaves about ``2 / (N + 100)``.
    Source: derived in docs/method.md, tested in tests/test_elbo.py.

    Parameters
    ----------
    log_sigma : (B, K), nats, <= 0: log sigmoid of the margins, of all N = B training pairs.
    log_q : (B, K), or (U, K) with unit, nats, rows normalised: responsibilities.
    lapse : e of the E-step, a probability in [0, 1), at which r is computed.
    unit : (B,), 0 ... U-1: the row of log_q of each pair; None: its own.
    prior : a, b, both >= 1.  (1, 1) is maximum likelihood.

    Returns
    -------
    The new e, float64.  No gradient flows.

    Raises
    ------
    ValueError : e is no rate.

    >>> log_sigma, log_q = torch.tensor([[0.9], [0.1]]).log(), torch.zeros(2, 1)
    >>> lapse_m_step(log_sigma, log_q, 0.2, prior=(1.0, 1.0))   # (.1 / .82 + .1 / .18) / 2
    tensor(0.3388, dtype=torch.float64)
    """
    q = (log_q if unit is None else log_q[unit]).double().exp()
    lapses = (q * (1 - no_lapse_probability(log_sigma.double(), lapse))).sum()
    a, b = prior
    return (lapses + a - 1) / (len(log_sigma) + a + b - 2)


def lapse_log_prior(lapse: float, prior: tuple[float, float] = LAPSE_PRIOR) -> float:
    """Log density of a lapse rate in (0, 1) under Beta(a, b), without its constant: ``(a - 1) log e + (b - 1) log(1 - e)``.

    Nats.  The objective that full-batch EM with a learned rate never lowers is the log-likelihood plus this.

    >>> lapse_log_prior(0.5, (2.0, 2.0))   # 2 log .5
    -1.3862943611198906
    """
    return (prior[0] - 1) * math.log(lapse) + (prior[1] - 1) * math.log1p(-lapse)


def mixture_log_likelihood(
    loglik: Float[Tensor, "pairs experts"],
    log_w: Float[Tensor, "..."],
    unit: Int[Tensor, "_"] | None = None,
    *,
    n_units: int | None = None,
    validate: bool = True,
) -> Float[Tensor, "rows"]:
    """Log-likelihood of the mixture of Bradley-Terry models (MBT).

    ``log sum_k w_k sigma(D_k)`` for a pair (arXiv 2510.08256), ``log sum_k w_k prod_{n in u} sigma(D_nk)`` for a unit
    (derived in docs/method.md).  It is not Bradley-Terry on the mixture reward; see :func:`mixture_reward`.

    Parameters
    ----------
    loglik : (B, K), nats, <= 0: log sigmoid of the margins, or :func:`with_lapse` of it.
    log_w : (K,), (B, K) or (U, K), nats; see :func:`check_log_w`.
    unit : (B,), 0 ... U-1: which pairs share a latent.  None: a latent for each pair.
    n_units : U, where it is not ``unit.max() + 1``; units without pairs then have log-likelihood 0.
    validate : False skips the checks of values.

    Returns
    -------
    (B,) or (U,), nats, <= 0.  Gradients flow to both arguments.

    Raises
    ------
    ValueError : shapes that differ, values out of range, a gate that differs inside a unit; the row is named.

    >>> D = torch.tensor([[3.0, -3.0]])
    >>> mixture_log_likelihood(F.logsigmoid(D), torch.tensor([0.5, 0.5]).log()).exp()
    tensor([0.5000])
    """
    rows, gate = _rows(loglik, log_w, unit, n_units, validate)
    return (gate + rows).logsumexp(-1)


@torch.no_grad()
def log_responsibilities(
    loglik: Float[Tensor, "pairs experts"],
    log_w: Float[Tensor, "..."],
    unit: Int[Tensor, "_"] | None = None,
    *,
    responsibility_temperature: float | int = 1.0,
    n_units: int | None = None,
    validate: bool = True,
) -> Float[Tensor, "rows experts"]:
    """Posterior log-probability that expert k explains each pair, or all pairs of each unit (the E-step).

    ``log q[u,k] = log_w[u,k] + sum_{n in u} loglik[n,k] / T - logsumexp_k(...)``; at T = 1 the exact posterior.
    Source: derived in docs/method.md; equality of bound and likelihood tested in tests/test_elbo.py.

    Parameters
    ----------
    loglik : (B, K), nats, <= 0: log sigmoid of the margin of expert k on pair n, or :func:`with_lapse` of it.
    log_w : (K,), (B, K) or (U, K), nats: the gate; -inf leaves an expert out.
    unit : (B,), 0 ... U-1, or None for a latent per pair.
    responsibility_temperature : T > 0.  Above 1 it tempers the evidence, which keeps responsibilities soft early in
        training; 1 gives the posterior.
    n_units : U, where it is not ``unit.max() + 1``; units without pairs then keep their prior.

    Returns
    -------
    (B, K) or (U, K), nats, rows normalised.  No gradient flows.

    Raises
    ------
    ValueError : as :func:`mixture_log_likelihood`; T not above 0.

    Notes
    -----
    One expert gives zeros.  A row of equal loglik gives log_w back: identical experts cannot part by themselves.

    >>> log_responsibilities(torch.tensor([[.9, .3]]).log(), torch.tensor([.5, .5]).log()).exp()
    tensor([[0.7500, 0.2500]])
    """
    if not 0 < responsibility_temperature < math.inf:
        raise ValueError(
            f"responsibility_temperature={responsibility_temperature}: expected above 0; 1 is exact"
        )
    rows, gate = _rows(loglik, log_w, unit, n_units, validate)
    return (gate + rows / responsibility_temperature).log_softmax(-1)


def _kl(log_q: Tensor, log_w: Tensor) -> Tensor:
    """``sum_k q_k (log q_k - log w_k)`` by row; q = 0 counts 0, w = 0 under q > 0 gives +inf."""
    q = log_q.exp()
    held = q > 0
    # both logarithms are replaced where q = 0 *before* they are used: a masked infinity would still give NaN gradients
    difference = log_q.masked_fill(~held, 0.0) - log_w.masked_fill(~held, 0.0)
    return (q * difference).sum(-1)


def _expected(log_q: Tensor, values: Tensor) -> Tensor:
    q = log_q.exp()
    return (q * values.masked_fill(q == 0, 0.0)).sum(-1)


def elbo_terms(
    loglik: Float[Tensor, "pairs experts"],
    log_w: Float[Tensor, "..."],
    log_q: Float[Tensor, "rows_of_q experts"],
    unit: Int[Tensor, "_"] | None = None,
    *,
    n_units: int | None = None,
    validate: bool = True,
) -> ElboTerms:
    """The evidence lower bound by term.

    ``sum_k q_k loglik_k - KL(q || w)`` for a pair, ``sum_k q_uk sum_{n in u} loglik_nk - KL(q_u || w_u)`` for a unit:
    the KL counts once per unit.  Equal to :func:`mixture_log_likelihood` at the exact posterior, below it for any
    other q.  Source: derived in docs/method.md, tested in tests/test_elbo.py.

    Parameters
    ----------
    loglik, log_w, unit, n_units, validate : as in :func:`mixture_log_likelihood`.
    log_q : (B, K), or (U, K) with units; nats, rows normalised.  A term with q = 0 counts 0.

    Returns
    -------
    ElboTerms(expected_loglik, kl, elbo), each (B,) or (U,), in nats per row.  Gradients flow to all three arguments;
    detach log_q for the M-step.  To report the bound in nats per pair: ``terms.elbo.sum() / len(loglik)``.

    Raises
    ------
    ValueError : as :func:`mixture_log_likelihood`; log_q of another shape or not normalised.

    >>> loglik, log_w = torch.tensor([[.9, .3]]).log(), torch.tensor([.5, .5]).log()
    >>> terms = elbo_terms(loglik, log_w, torch.tensor([[.75, .25]]).log())
    >>> terms.elbo.exp()   # = .5 * .9 + .5 * .3
    tensor([0.6000])
    """
    rows, gate = _rows(loglik, log_w, unit, n_units, validate)
    if validate:
        _check_log_q(log_q, *rows.shape)
    expected = _expected(log_q, rows)
    kl = _kl(log_q, gate)
    return ElboTerms(expected, kl, expected - kl)


def entropy(log_q: Float[Tensor, "rows experts"]) -> Float[Tensor, "rows"]:
    """Entropy of each row, ``- sum_k q_k log q_k``, in nats; its exponential is the effective number of experts.

    >>> entropy(torch.tensor([[.5, .5], [1., 0.]]).log()).exp()
    tensor([2., 1.])
    """
    return -_expected(log_q, log_q)


def mixture_reward(
    rewards: Float[Tensor, "rows experts"], log_w: Float[Tensor, "..."], *, validate: bool = True
) -> Float[Tensor, "rows"]:
    """Reward of the mixture, ``r(x, y) = log sum_k w_k exp r_k(x, y)``.  Source: arXiv 2510.08256.

    The preference probability of MBT is **not** the logistic function of a difference of these rewards: with
    w = (.5, .5), r(y+) = (3, -3) and r(y-) = (0, 0) that gives 0.910, MBT 0.500.  Two quantities, two names.

    Parameters
    ----------
    rewards : (B, K), any unit that the experts share.
    log_w : (K,) or (B, K), nats.

    Returns
    -------
    (B,), the unit of the rewards.  Gradients flow.

    Raises
    ------
    ValueError : shapes that differ, NaN or +inf in the rewards, a gate that :func:`check_log_w` refuses.

    >>> rewards = torch.tensor([[3.0, -3.0], [0.0, 0.0]])
    >>> better, worse = mixture_reward(rewards, torch.tensor([0.5, 0.5]).log())
    >>> torch.sigmoid(better - worse)
    tensor(0.9096)
    """
    if validate:
        _check_matrix("rewards", rewards, "answers, experts")
        broken = (rewards.isnan() | (rewards == math.inf)).any(-1)
        if broken.any():
            row = int(broken.nonzero()[0])
            raise ValueError(
                f"rewards[{row}]: holds NaN or +inf ({rewards[row].tolist()}); expected finite rewards"
            )
        check_log_w(log_w)
    if log_w.shape[-1] != rewards.shape[1] or (
        log_w.dim() == 2 and log_w.shape[0] not in (1, rewards.shape[0])
    ):
        raise ValueError(
            f"log_w has shape {tuple(log_w.shape)} and rewards {tuple(rewards.shape)}; expected the same experts, "
            "and one row of log_w for each row of rewards or for all"
        )
    return (log_w + rewards).logsumexp(-1)


def keep_top_s(log_w: Float[Tensor, "*rows experts"], s: int) -> Float[Tensor, "*rows experts"]:
    """Keep the S largest weights of each row and set the others to ``-inf``, **without** renormalising.

    Not renormalised, the likelihood of the kept experts is a lower bound of the whole one in every row; renormalised
    it is none.  Among equal weights the lower index is kept, so the kept sets are nested in S.

    Parameters
    ----------
    log_w : (..., K), nats.
    s : 1 ... K.

    Returns
    -------
    The shape of log_w, nats.  Gradients flow to the kept weights.

    Raises
    ------
    ValueError : s below 1 or above the number of experts.

    >>> keep_top_s(torch.tensor([.2, .5, .3]).log(), 2).exp()
    tensor([0.0000, 0.5000, 0.3000])
    """
    experts = log_w.shape[-1]
    if not 1 <= s <= experts:
        raise ValueError(f"top_s={s} with {experts} experts; expected 1 ... {experts}")
    order = log_w.detach().argsort(dim=-1, descending=True, stable=True)
    left_out = torch.ones_like(log_w, dtype=torch.bool).scatter(-1, order[..., :s], False)
    return log_w.masked_fill(left_out, -math.inf)


def restricted_log_likelihood(
    loglik: Float[Tensor, "pairs experts"],
    log_w: Float[Tensor, "..."],
    top_s: int,
    unit: Int[Tensor, "_"] | None = None,
    *,
    n_units: int | None = None,
    validate: bool = True,
) -> Float[Tensor, "rows"]:
    """MBT log-likelihood of the S experts of largest weight: a lower bound, ``log sum_{k in S} w_k sigma(D_k)``.

    The weights are not renormalised, so it lies below :func:`mixture_log_likelihood` in every row and grows with S.
    loglik of the experts left out is not read.  Source: derived in docs/method.md, tested in tests/test_elbo.py.

    Parameters and errors as :func:`mixture_log_likelihood`; ``top_s`` in 1 ... K.  Returns nats, (B,) or (U,).

    >>> loglik, log_w = torch.tensor([[.9, .3]]).log(), torch.tensor([.6, .4]).log()
    >>> restricted_log_likelihood(loglik, log_w, top_s=1).exp()   # .6 * .9
    tensor([0.5400])
    """
    rows, gate = _rows(loglik, log_w, unit, n_units, validate)
    kept = keep_top_s(gate, top_s)
    return (kept + rows.masked_fill(kept == -math.inf, 0.0)).logsumexp(-1)


def certified_gap(
    loglik: Float[Tensor, "pairs experts"],
    log_w: Float[Tensor, "..."],
    top_s: int,
    unit: Int[Tensor, "_"] | None = None,
    *,
    lapse: float | int = 0.0,
    n_units: int | None = None,
    validate: bool = True,
) -> Float[Tensor, "rows"]:
    """How far the restricted log-likelihood can lie below the whole one, without a look at the other experts.

    ``log((r + 1 - W_S) / r)``, r the kept sum ``sum_{k in S} w_k sigma(D_k)``, ``1 - W_S`` the weight left out (read
    off the gate, which costs nothing): an expert that was not computed gives a probability of at most 1.  With a lapse
    rate e it is at most ``1 - e / 2`` a pair, and the bound ``log((r + (1 - e / 2)^n (1 - W_S)) / r)`` for n pairs.
    Source: derived in docs/method.md, tested in tests/test_elbo.py.

    Parameters and errors as :func:`restricted_log_likelihood`; give the whole gate, not a restricted one.
    lapse : e in [0, 1) of a loglik that holds lapses (:func:`with_lapse`); 0, the default, bounds any loglik.

    Returns
    -------
    (B,) or (U,), nats, >= 0, never below the true gap and 0 for S = K.

    >>> loglik, log_w = torch.tensor([[.9, .3]]).log(), torch.tensor([.6, .4]).log()
    >>> certified_gap(loglik, log_w, top_s=1).exp()   # (.54 + .4) / .54; the true gap is log(.66 / .54)
    tensor([1.7407])
    """
    rows, gate = _rows(loglik, log_w, unit, n_units, validate)
    kept = keep_top_s(gate, top_s)
    log_r = (kept + rows.masked_fill(kept == -math.inf, 0.0)).logsumexp(-1)
    log_left_out = gate.masked_fill(kept > -math.inf, -math.inf).logsumexp(-1)
    if not _never(lapse):
        check_lapse(lapse)
        pairs = 1 if unit is None else torch.bincount(unit, minlength=len(rows)).to(rows)
        log_left_out = log_left_out + pairs * math.log1p(-lapse / 2)
    return F.softplus(log_left_out - log_r)


def gumbel_softmax_samples(
    log_q: Float[Tensor, "rows experts"],
    gumbel_temperature: float | int,
    n_samples: int = 1,
    hard: bool = False,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "samples rows experts"]:
    """Relaxed draws of the latent expert, ``z~ = softmax((log q + g) / gumbel_temperature)``, g standard Gumbel.

    Parameters
    ----------
    log_q : (rows, K), nats, normalised; an expert with -inf is never drawn.
    gumbel_temperature : > 0.  Near 0 the draws are nearly one-hot and their gradient is noisy.
    n_samples : >= 1 Monte-Carlo draws.
    hard : one-hot values with the gradient of the soft ones (straight-through).
    generator : source of the noise, on any device: a draw is the same wherever log_q is; None takes the global one.

    Returns
    -------
    (n_samples, rows, K), each row sums to 1.  Gradients flow to log_q.

    Raises
    ------
    ValueError : temperature not above 0; n_samples below 1.

    >>> log_q = torch.tensor([[0.9, 0.1]]).log().expand(2000, 2)
    >>> z = gumbel_softmax_samples(log_q, 1.0, hard=True, generator=torch.Generator().manual_seed(0))
    >>> bool((z.mean((0, 1)) - torch.tensor([0.9, 0.1])).abs().max() < 0.02)
    True
    """
    if not 0 < gumbel_temperature < math.inf:
        raise ValueError(
            f"gumbel_temperature={gumbel_temperature}: expected above 0, for example 1.0"
        )
    if n_samples < 1:
        raise ValueError(f"n_samples={n_samples}: expected at least 1 Monte-Carlo sample")
    drawn_on = log_q.device if generator is None else generator.device
    noise = torch.empty(n_samples, *log_q.shape, dtype=log_q.dtype, device=drawn_on)
    noise = -noise.exponential_(generator=generator).clamp_min(torch.finfo(log_q.dtype).tiny).log()
    noise = noise.to(log_q.device)
    soft = ((log_q + noise) / gumbel_temperature).softmax(-1)
    if not hard:
        return soft
    one_hot = F.one_hot(soft.detach().argmax(-1), soft.shape[-1]).to(soft.dtype)
    return one_hot + (soft - soft.detach())


def relaxed_objective(
    loglik: Float[Tensor, "pairs experts"],
    log_w: Float[Tensor, "..."],
    log_q: Float[Tensor, "rows_of_q experts"],
    gumbel_temperature: float | int,
    n_samples: int = 1,
    hard: bool = False,
    generator: torch.Generator | None = None,
    unit: Int[Tensor, "_"] | None = None,
    *,
    n_units: int | None = None,
    validate: bool = True,
) -> Float[Tensor, "rows"]:
    """Gumbel-Softmax estimate of the bound: ``mean_s sum_k z~_sk loglik_k - KL(q || w)``.

    A bound (in expectation) only as the temperature goes to 0: with w = q = (.9, .1) and loglik = (-1, 0) the
    log-likelihood is -.841, this objective -.816 at temperature 1 and -.605 at 5.  Hard samples are unbiased in value
    at any temperature, their gradient is not.  Source: arXiv 2510.08256 names the relaxation; the rest is derived in
    docs/method.md and tested in tests/test_elbo.py.

    Parameters
    ----------
    loglik, log_w, log_q, unit, n_units, validate : as in :func:`elbo_terms`.
    gumbel_temperature, n_samples, hard, generator : as in :func:`gumbel_softmax_samples`.

    Returns
    -------
    (B,) or (U,), nats, to be maximised.  Gradients flow to all three tensors.

    >>> loglik, log_w = torch.tensor([[-1.0, 0.0]]), torch.tensor([0.9, 0.1]).log()
    >>> draw = torch.Generator().manual_seed(0)
    >>> relaxed_objective(loglik, log_w, log_w[None], 1.0, n_samples=200_000, generator=draw).round(decimals=2)
    tensor([-0.8200])
    """
    rows, gate = _rows(loglik, log_w, unit, n_units, validate)
    if validate:
        _check_log_q(log_q, *rows.shape)
    z = gumbel_softmax_samples(log_q, gumbel_temperature, n_samples, hard, generator)
    values = rows.masked_fill(log_q == -math.inf, 0.0)
    return (z * values).sum(-1).mean(0) - _kl(log_q, gate)


def predictive_probability(
    loglik: Float[Tensor, "pairs experts"], log_w: Float[Tensor, ...]
) -> Float[Tensor, "pairs"]:
    """sum_k w_k exp(loglik_k), for weights (K,) or one row a pair.

    With loglik = log sigma(D) the probability that the first answer is preferred, with that of :func:`with_lapse` the
    probability that it is the answer; both lie on the same side of one half.
    """
    return (loglik + log_w).logsumexp(-1).exp()


def correct(probability: Float[Tensor, "*pairs"]) -> Float[Tensor, "*pairs"]:
    """1 where the first answer is predicted, 0 where the second; a tie (1/2 up to rounding of float32) counts half.

    >>> correct(torch.tensor([0.7, 0.5 + 1e-7, 0.2]))
    tensor([1.0000, 0.5000, 0.0000])
    """
    return torch.where((probability - 0.5).abs() <= 1e-6, 0.5, (probability > 0.5).float())


def check_n_experts(n_experts: int) -> None:
    """Refuse a mixture without an expert."""
    if not isinstance(n_experts, Integral) or isinstance(n_experts, bool):
        raise ValueError(f"n_experts={n_experts!r}: expected a whole number, at least 1")
    if n_experts < 1:
        raise ValueError(
            f"n_experts={n_experts}: a mixture needs at least one expert; use 1 for plain DPO"
        )
