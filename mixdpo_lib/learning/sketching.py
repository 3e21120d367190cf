"""How many kinds of taste are there, before experts learn? Linear rewards of what the base makes of the answers say it,
within seconds where fits take minutes."""

from __future__ import annotations

import time

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from ..base.model import Base
from ..elbo import sum_over_units
from .deciding import Growth
from .linear_start import RESTARTS, answer_states, directions, linear_em
from .starts import random_log_q
from .teaching import Sets

PRIOR_SCALE = 0.3  # of beta; the start of a fit has 1; see docs/log.md
REFUSALS = 2  # in a row end it: to ask for one more costs seconds


def sketch(base: Base, sets: Sets, growth: Growth, seed: int) -> tuple[int, list[list]]:
    """How many kinds linear rewards find.

    K = 2, 3, ... are fitted by `linear_em` from several starts, of which the likeliest on training pairs counts; one more
    is kept when the held-out log-likelihood per unit rises by more than `growth` asks for, over the largest K kept.

    Returns that number and the decisions, rows of the table of `grow`.
    """
    states, place = answer_states(base, sets.train)
    differences = states[place[:, 0]] - states[place[:, 1]]
    turn = PRIOR_SCALE * directions(differences)
    read = differences @ turn
    states, place = answer_states(base, sets.held)
    read_held = (states[place[:, 0]] - states[place[:, 1]]) @ turn

    def fitted(k: int) -> Float[Tensor, "held_units"]:
        log_prior = torch.zeros(k, dtype=torch.float64).log_softmax(0)
        starts = (random_log_q(len(sets.names), k, seed * RESTARTS + i) for i in range(RESTARTS))
        runs = [linear_em(read, sets.unit, torch.eye(k).double(), log_prior, one) for one in starts]
        _, log_q, beta = max(runs, key=lambda run: run[0])
        loglik = F.logsigmoid(read_held @ beta.T)
        by_unit = sum_over_units(loglik, sets.held_unit, len(sets.held_names))
        prior = torch.where(sets.place[:, None] < 0, log_prior, log_q[sets.place])
        return (prior + by_unit).logsumexp(1)

    kept, served, refused = 1, fitted(1), 0
    rows: list[list] = []
    while refused < REFUSALS and (k := kept + refused + 1) <= growth.max_experts:
        began, score = time.monotonic(), fitted(k)
        gains = score - served
        gain, error = float(gains.mean()), float(gains.std()) / len(gains) ** 0.5
        better = growth.keeps("linear rewards", gain, error)
        row = ["linear rewards", f"K = {k}", kept, len(gains), gain, error, better]
        rows.append([*row, time.monotonic() - began])
        refused = 0 if better else refused + 1
        if better:
            kept, served = k, score
    return kept, rows
