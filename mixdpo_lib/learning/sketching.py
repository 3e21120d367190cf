"""How many kinds of taste are there, before experts learn? Linear rewards of what the base makes of the answers say it,
within seconds where fits take minutes."""

from __future__ import annotations

import time

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from ..base.model import Base
from ..elbo import sum_over_units
from .deciding import Growth
from .linear_start import RESTARTS, answer_states, directions, linear_em
from .starts import random_log_q
from .teaching import Sets

PRIOR_SCALE = 0.3  # of beta; the start of a fit has 1; see docs/log.md
HELD = 5  # a fifth of each unit's training pairs, one at least, is held out of the sketch
REFUSALS = 2  # in a row end it: to ask for one more costs seconds


def some_of_each(unit: Int[Tensor, "pairs"], part: int, seed: int) -> Bool[Tensor, "pairs"]:
    """One of `part` pairs of each unit, drawn at random: at least one of a unit with two pairs, none of a single one.

    >>> some_of_each(torch.tensor([0, 0, 0, 0, 1, 2, 2]), part=2, seed=0).int().tolist()
    [1, 0, 0, 1, 0, 1, 0]
    """
    shuffled = torch.randperm(len(unit), generator=torch.Generator().manual_seed(seed))
    order = shuffled[unit[shuffled].argsort(stable=True)]
    count = unit.bincount()
    rank = torch.arange(len(unit)) - (count.cumsum(0) - count)[unit[order]]
    wanted = torch.where(count > 1, (count // part).clamp(min=1), 0)
    return torch.zeros(len(unit), dtype=torch.bool).index_put((order,), rank < wanted[unit[order]])


def sketch(base: Base, sets: Sets, growth: Growth, seed: int) -> tuple[int, list[list]]:
    """How many kinds linear rewards find.

    K = 2, 3, ... are fitted by `linear_em` to four fifths of the training pairs of each unit, from several starts of which
    the likeliest counts; one more is kept when the log-likelihood per unit of the last fifth rises by more than `growth`
    asks for, over the largest K kept. The held-out labels are of texts that linear rewards have seen: how many kinds there
    are is asked here, not how far they carry.

    Returns that number and the decisions, rows of the table of `grow`.
    """
    states, place = answer_states(base, sets.train)
    differences = states[place[:, 0]] - states[place[:, 1]]
    read = PRIOR_SCALE * differences @ directions(differences)
    n_units = len(sets.names)
    held = some_of_each(sets.unit, HELD, seed)
    asked = sets.unit[held].unique()

    def fitted(k: int) -> Float[Tensor, "units"]:
        log_prior = torch.zeros(k, dtype=torch.float64).log_softmax(0)
        starts = (random_log_q(n_units, k, seed * RESTARTS + i) for i in range(RESTARTS))
        own, unit = read[~held], sets.unit[~held]
        runs = [linear_em(own, unit, torch.eye(k).double(), log_prior, one) for one in starts]
        _, log_q, beta = max(runs, key=lambda run: run[0])
        by_unit = sum_over_units(F.logsigmoid(read[held] @ beta.T), sets.unit[held], n_units)
        return (log_q + by_unit).logsumexp(1)[asked]

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
