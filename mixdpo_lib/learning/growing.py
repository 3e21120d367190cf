"""How does a mixture find its own number of experts? Split, birth, merge, retire, each decided by held-out units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
from datasets import Dataset

from ..data.pairs import Pairs
from ..policy.mixture import MixturePolicy
from ..store import note
from .config import FitConfig
from .deciding import COLUMNS, Growing, Growth
from .sketching import sketch
from .teaching import BySteps, Sets


@dataclass(frozen=True)
class Grown:
    """What growth leaves.

    table : a row a decision: proposal (split, birth, merge, retire; "linear rewards" for each K that these were asked about,
        and "linear" what they found, see `Growth`), experts it takes the place of, K before, units whose held-out pairs
        decided, gain of the mean held-out log-likelihood a unit (nats) and its standard error, kept, seconds.
    n_experts : K at the end. loglik : (held-out units,), nats of all held-out pairs of each, at the end. The pairs that
        decided flatter the result: how good it is, other pairs say (`report`).
    """

    table: pd.DataFrame
    n_experts: int
    loglik: pd.Series = field(repr=False)


def grow(
    policy: MixturePolicy,
    pairs: Dataset | Pairs,
    config: FitConfig | None = None,
    *,
    validation: Dataset | Pairs | None = None,
    growth: Growth | None = None,
    freeze_others: bool = False,
    freeze_users: Sequence[str] = (),
) -> Grown:
    """Let `policy` find its number of experts, in place, from the experts that it has (one, to begin with).

    A **split** parts the units of an expert by the sign of the leading direction of their gradients; a **birth** takes
    the quarter of the units with the lowest log-likelihood per validation pair. The new experts are taught a short
    while and kept when the held-out log-likelihood **per unit** rises by more than a standard error of the paired
    difference. At the end a **merge** of two experts stands when it loses less than that, and an expert is **retired**
    when nothing is lost. Log-likelihood of a held-out unit: log sum_k q_uk prod_n exp(loglik_nk), q_u by its training
    pairs (at most 48 of them in families that take gradient steps), or the gate's weights where it has none. A single
    expert that takes gradient steps is sketched by linear rewards first (`Growth`). Source: docs/method.md.

    Parameters
    ----------
    policy : its gate learns and does not read the prompt. One that is still its reference is fitted first.
    pairs : training pairs with the unit column. validation : pairs that decide, of the same units or of others.
    config : how experts are fitted, and `unit`; a proposal takes two short ones of a pass, what is kept all passes (tables:
        before they may shrink and at the end): experts that still learn would seem to gain by a split.
    growth : see `Growth`.
    freeze_others : the experts that the policy has stay as they are, to the bit; new ones come beside them, for tastes
        that arrive later. Users' predictions move a little, since a new expert takes weight.
    freeze_users : with `freeze_others`, names of users who keep their weights, 0 on new experts: nothing moves for them.

    Raises
    ------
    ValueError : no validation pairs, or of fewer than two units; a latent per pair; a gate that reads the prompt, or
        does not learn; a user who is not in the training pairs; `freeze_users` alone.
    """
    config, growth = config or FitConfig(), growth or Growth()
    _check(policy, config, validation)
    if freeze_users and not freeze_others:
        raise ValueError(
            f"freeze_users={list(freeze_users)[:3]}: found freeze_others=False, expected True: users can keep their weights "
            "only of experts that stay"
        )
    train, held = policy.prepare(pairs), policy.prepare(validation)  # type: ignore[arg-type]
    sets = Sets.of(train, held, config.unit)
    if len(sets.held_names) < 2:
        raise ValueError(
            f"validation has {len(sets.held_names)} unit in column {config.unit!r}; expected at least 2: growth is "
            "decided by a standard error over units; give pairs of more of them"
        )
    if absent := [name for name in freeze_users if name not in set(sets.names)]:
        raise ValueError(
            f"freeze_users={absent[:3]}: no training pairs of them in column {config.unit!r}; name users who have some"
        )
    found = Growing(policy, sets, config, growth, freeze_others, list(freeze_users))
    sketched = growth.sketch and not (freeze_others or freeze_users)
    found.run(_sketched(found, config) if sketched else growth.refusals)
    table = pd.DataFrame(found.rows, columns=COLUMNS)
    kept = int(table["kept"].sum())
    note(f"grown to K={policy.n_experts}: {kept} of {len(table)} proposals kept.")
    loglik = pd.Series(found.score(found.now), sets.held_names).rename_axis(config.unit)
    return Grown(table, policy.n_experts, loglik)


def _sketched(found: Growing, config: FitConfig) -> int:
    """As many experts as linear rewards find, and one more while that holds; how many refusals end growth from here."""
    policy, teacher, sets, growth = found.policy, found.teacher, found.sets, found.growth
    several = len(sets.names) < len(sets.unit)  # of one pair a unit linear rewards learn too little
    read = found.fresh and policy.n_experts == 1 and policy.base is not None
    if not (isinstance(teacher, BySteps) and read and several):
        return growth.refusals
    n_kinds, rows = sketch(policy.base, sets, growth, config.seed)
    found.rows.extend(rows)
    n, kept = max(n_kinds, 2), False
    while n <= growth.max_experts and found.fitted_anew(n, teacher.fit_anew):
        n, kept = n + 1, True
    return 0 if kept or n_kinds == 1 else growth.refusals


def _check(policy: MixturePolicy, config: FitConfig, validation: Any) -> None:
    if validation is None:
        raise ValueError(
            "validation: found none; every proposal is decided by pairs that no step was taken on: give validation=..., "
            "pairs of at least two units"
        )
    if config.latent != "unit":
        raise ValueError(
            f"latent={config.latent!r}: expected 'unit': experts grow by what the pairs of a {config.unit} say together"
        )
    if policy.gate.of_prompt or not policy.gate.learns:
        what = "reads the prompt" if policy.gate.of_prompt else "does not learn"
        raise ValueError(
            f"{type(policy.gate).__name__} {what}: expected weights of units that can make room for a new expert, "
            "such as LearnedWeights or UserGate"
        )
