"""EM over all pairs at once, for tables of rewards."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor, nn

from ..elbo import (
    LAPSE_START,
    check_lapse,
    elbo_terms,
    entropy,
    lapse_log_prior,
    lapse_m_step,
    log_responsibilities,
    mixture_log_likelihood,
    no_lapse_probability,
    with_lapse,
)
from ..gates.contract import Gate
from ..gates.inputs import distinct_rows
from ..gates.m_step import EMResult
from .starts import KINDS, random_log_q


@torch.no_grad()
def full_batch_em(
    experts: Any,
    gate: Gate,
    pairs: Int[Tensor, "pairs 2"],
    unit: Int[Tensor, "pairs"] | None = None,
    *,
    inputs: Mapping[str, Tensor] | None = None,
    max_iter: int = 500,
    tolerance: float = 1e-8,
    start_temperature: float = 1.0,
    tempering_iterations: int = 20,
    restarts: int = 1,
    symmetry_breaking: str = "random_responsibilities",
    symmetry_scale: float = 1.0,
    min_usage: float = 0.0,
    lapse: float | int | str = 0.0,
    lapse_start: float = LAPSE_START,
    seed: int = 0,
) -> EMResult:
    """Full-batch EM, in place: exact responsibilities, M-steps of the experts and of the gate that cannot fall.

    The monitored objective is log-likelihood + log prior of the experts, of the gate, and of a learned lapse rate. It
    never falls once the responsibilities are exact (temperature 1). Source: derived in docs/method.md, tested in
    tests/experts/test_tables.py and tests/learning/test_lapses.py.

    Parameters
    ----------
    experts : a module with loglik, log_prior, perturb and an m_step that cannot fall, for example `TabularExperts`.
    pairs : chosen and rejected answer of each pair. unit : unit of each pair, None for a latent per pair.
    inputs : what the gate reads (`Gate.inputs`), one row a latent: a unit, or a pair. `exact.fit_table` finds them.
    max_iter : >= 1, iterations of each restart.
    tolerance : > 0, nats per pair: a smaller gain of an iteration at temperature 1 ends the fit as converged.
    start_temperature : >= 1, of the first responsibilities; falls to 1 geometrically in `tempering_iterations`.
    restarts : >= 1; the one with the largest objective is kept, all are reported.
    symmetry_breaking : "random_responsibilities" (the first M-step sees them); "random_heads" (parameters drawn with
        standard deviation `symmetry_scale`: with a latent per pair and few distinct pairs, random responsibilities
        average out); or "none" (go on from where the experts are: a call that continues another one gives the same as
        one longer call).
    min_usage : an expert whose mean responsibility falls below this ends the restart as "dead_expert".
    lapse : e in [0, 1), how often an answer is given at random; "learn": moved by `elbo.lapse_m_step` at temperature 1.
    lapse_start : where a learned rate begins, in (0, 1). A call that continues another one gives its `EMResult.lapse`.

    Raises
    ------
    ValueError : an option out of range; a unit with no pairs; a gate that reads, without inputs of every latent.
    KeyboardInterrupt : is not raised: the fit ends as "interrupted" with the state it had reached.
    """
    for name, value, low in (
        ("max_iter", max_iter, 1),
        ("restarts", restarts, 1),
        ("tolerance", tolerance, 0),
        ("start_temperature", start_temperature, 1),
    ):
        if not value >= low or (name == "tolerance" and value <= 0):
            raise ValueError(
                f"{name}={value}: expected {'above 0' if name == 'tolerance' else f'at least {low}'}"
            )
    nothing_to_read = ("clusters", "linear")
    possible = tuple(name for name in KINDS if name not in nothing_to_read)
    if symmetry_breaking not in possible:
        raise ValueError(f"symmetry_breaking={symmetry_breaking!r}: possible are {possible}")
    if isinstance(lapse, str) and lapse != "learn":
        raise ValueError(f'lapse={lapse!r}: expected a rate of at least 0 and below 1, or "learn"')
    learned = isinstance(lapse, str)
    first_lapse = lapse_start if isinstance(lapse, str) else float(lapse)
    check_lapse(first_lapse)
    if learned and lapse_start == 0:
        raise ValueError("lapse_start=0: expected above 0, where a rate can be learned")
    unit = torch.arange(len(pairs)) if unit is None else unit
    n_latents = int(unit.max()) + 1
    read, place = distinct_rows(_read(gate, inputs or {}, n_latents), n_latents)
    gate.double()
    start = {
        name: value.clone()
        for name, value in [*experts.state_dict().items(), *gate.state_dict().items()]
    }
    history, table = [], []
    best: tuple[int, dict[str, Tensor], float] = (0, start, first_lapse)
    for restart in range(restarts):
        _load(experts, gate, start)
        if symmetry_breaking == "random_heads":
            experts.perturb(symmetry_scale, torch.Generator().manual_seed(seed + restart))
        log_q = random_log_q(n_latents, gate.n_experts, seed + restart)
        reason, rows = _one_em(
            experts,
            gate,
            pairs,
            unit,
            read,
            place,
            max_iter,
            tolerance,
            start_temperature,
            tempering_iterations,
            log_q if symmetry_breaking == "random_responsibilities" else None,
            min_usage,
            first_lapse,
            learned,
        )
        history += [{"restart": restart, **row} for row in rows]
        table.append(
            {"restart": restart, "objective": rows[-1]["objective"], "stop_reason": reason}
        )
        state = {
            n: v.clone() for n, v in [*experts.state_dict().items(), *gate.state_dict().items()]
        }
        if restart == 0 or rows[-1]["objective"] > table[best[0]]["objective"]:
            best = (restart, state, rows[-1]["lapse"])
        if reason == "interrupted":
            break
    _load(experts, gate, best[1])
    loglik = with_lapse(experts.loglik(pairs).detach(), best[2])
    log_q = log_responsibilities(loglik, gate.log_w(read)[place], unit)
    frame = pd.DataFrame(table)
    frame["kept"] = frame["restart"] == best[0]
    return EMResult(pd.DataFrame(history), table[best[0]]["stop_reason"], frame, log_q, best[2])


def _read(gate: Gate, inputs: Mapping[str, Tensor], n: int) -> dict[str, Tensor]:
    """What the gate reads, in the precision of its parameters here."""
    if bool(gate.reads) != bool(inputs) or any(len(value) != n for value in inputs.values()):
        found = {name: len(value) for name, value in inputs.items()} or "nothing"
        raise ValueError(
            f"{type(gate).__name__} reads {', '.join(gate.reads) or 'nothing'}: found inputs of {found}, expected "
            f"{f'{n} rows, one a latent; fit_table(policy, pairs) finds them' if gate.reads else 'nothing'}"
        )
    return {
        name: value.double() if value.is_floating_point() else value
        for name, value in inputs.items()
    }


def _load(experts: nn.Module, gate: nn.Module, state: dict[str, Tensor]) -> None:
    for module in (experts, gate):
        module.load_state_dict({name: state[name] for name in module.state_dict()})


def _one_em(
    experts,
    gate,
    pairs,
    unit,
    inputs,
    place,
    max_iter,
    tolerance,
    start_temperature,
    tempering,
    log_q,
    min_usage,
    lapse,
    learned,
) -> tuple[str, list[dict[str, Any]]]:
    """Until a reason to stop: the reason, and one row an iteration."""
    n, rows = len(pairs), []

    def m_step(log_q: Tensor, log_sigma: Tensor) -> None:
        experts.m_step(pairs, log_q.exp()[unit] * no_lapse_probability(log_sigma, lapse))
        if gate.learns:
            gate.m_step(inputs, log_q, place)

    try:
        if log_q is not None:
            m_step(log_q, experts.loglik(pairs).detach())
        for iteration in range(max_iter + 1):
            temperature = start_temperature ** max(0.0, 1 - iteration / max(tempering, 1))
            log_sigma, log_w = experts.loglik(pairs).detach(), gate.log_w(inputs)[place]
            loglik = with_lapse(log_sigma, lapse)
            log_q = log_responsibilities(
                loglik, log_w, unit, responsibility_temperature=temperature
            )
            terms = elbo_terms(loglik, log_w, log_q, unit)
            total = float(mixture_log_likelihood(loglik, log_w, unit).sum())
            prior = float(experts.log_prior()) + float(gate.log_prior())
            if learned:
                prior += lapse_log_prior(lapse)
            usage = log_q.exp().mean(0)
            rows.append(
                {
                    "iteration": iteration,
                    "objective": (total + prior) / n,
                    "loglik": total / n,
                    "elbo": float(terms.elbo.sum()) / n,
                    "expected_loglik": float(terms.expected_loglik.sum()) / n,
                    "kl_q_w": float(terms.kl.sum()) / n,
                    "temperature": temperature,
                    "lapse": lapse,
                    "entropy": float(entropy(log_q).mean()),
                    **{f"usage_{k}": float(u) for k, u in enumerate(usage)},
                }
            )
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
                m_step(log_q, log_sigma)
                if learned and temperature == 1:
                    lapse = float(lapse_m_step(log_sigma, log_q, lapse, unit))
    except KeyboardInterrupt:
        if not rows:
            raise
        return "interrupted", rows
    return "max_iter", rows
