"""How many kinds of taste are there, before experts learn? Growth of rewards that are linear in what the base makes of
the answers: seconds where fits take minutes."""

from __future__ import annotations

import copy

import torch

from ..base.model import Base
from ..experts.linear_tables import LinearTables
from ..policy.mixture import MixturePolicy
from .config import FitConfig
from .deciding import Growing, Growth, Proposal
from .linear_start import answer_states, directions, mean_states
from .teaching import Sets

PRIOR_SCALE = 0.3  # of beta_k; .1 to 1 were tried, see docs/log.md


def linear_tables(base: Base, sets: Sets) -> LinearTables:
    """One expert, linear in the leading directions of the differences of the training answers, for all answers."""
    states, place = answer_states(base, sets.train)
    turn, read = directions(states[place[:, 0]] - states[place[:, 1]]), {}
    for texts in (sets.train.texts, sets.held.texts):
        read.update(
            zip(texts.texts, mean_states(base, texts, torch.arange(len(texts))) @ turn, strict=True)
        )
    return LinearTables(torch.stack(list(read.values())), list(read), prior_scale=PRIOR_SCALE)


def sketch(
    policy: MixturePolicy, sets: Sets, config: FitConfig, growth: Growth
) -> tuple[Proposal | None, list[list]]:
    """As many new experts for the only one as linear rewards grow to, each with the units that it answers for there.

    Returns the proposal (None: one expert) and the decisions, rows of the table of `grow`.
    """
    experts = linear_tables(policy.base, sets)
    drawn = MixturePolicy(experts, copy.deepcopy(policy.gate), experts.beta, policy.lapse)
    course = Growing(drawn, sets, config, growth, freeze_others=False, freeze_users=[])
    rows = [[f"linear {kind}", *row] for kind, *row in course.run()]
    n = drawn.n_experts
    if n == 1:
        return None, rows
    return Proposal("linear", (0,), (0,) * n, course.log_q(course.now).exp()), rows
