"""How is a mixture of tables fitted to all of its pairs at once? Full-batch EM of a policy, by names of units and columns."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset

from ..data.pairs import Pairs
from ..experts.reward_table import RewardTable
from ..gates.m_step import EMResult
from ..policy.mixture import MixturePolicy
from .config import FitConfig
from .fit import check_unit
from .full_batch import full_batch_em
from .learner import latent_inputs
from .tally import tally_em


@torch.no_grad()
def fit_table(
    policy: MixturePolicy, data: Dataset | Pairs, unit: str | None = "user", **options: Any
) -> EMResult:
    """Fit tables, gate and lapse rate of `policy`, in place, by full-batch EM: exact steps that cannot fall.

    Where `fit` takes gradient steps on the same objective, this takes `full_batch.full_batch_em`: of any gate, also of one
    that reads, and on counts of each unit (`tally.tally_em`) where there are no lapses.

    For maximum likelihood leave the priors out: `TabularExperts(..., prior_scale=1e4)`, `LearnedWeights(k, alpha=1)`,
    `UserGate(..., weight_scale=1e3)`; and `tolerance=1e-11`, several `restarts`.

    Parameters
    ----------
    data : preference set of the table's answers. unit : the column of those who share a latent; None: a latent a pair.
    options : max_iter, tolerance, restarts, seed and the others of `full_batch_em`, but for the lapse rate, which is the
        policy's.

    Returns
    -------
    EMResult; its rows of log_q are the units as `policy.log_posterior` names them.

    Raises
    ------
    ValueError : experts that are no tables; another beta than theirs; an absent unit column; a gate that reads what
        differs inside a unit; as of `full_batch_em`.

    >>> from mixdpo_lib.experts.tables import TabularExperts
    >>> from mixdpo_lib.gates.weights import LearnedWeights
    >>> first, second, winner = ["tea"] * 4, ["milk"] * 4, ["tea", "tea", "tea", "milk"]
    >>> experts, pairs = TabularExperts.from_pairs(first, second, winner, prior_scale=1e4)
    >>> policy = MixturePolicy(experts, LearnedWeights(1))
    >>> found = fit_table(policy, pairs, unit=None)
    >>> round(float(policy.predict(pairs)[0]), 4)  # three of four
    0.75
    """
    table = policy.experts
    if not isinstance(table, RewardTable):
        raise ValueError(f"{type(table).__name__} are no tables: expected TabularExperts; use fit")
    if policy.beta != table.beta:
        raise ValueError(
            f"beta={policy.beta:g} of the policy and {table.beta:g} of its table: expected the same; leave beta out"
        )
    data = policy.prepare(data)
    config = FitConfig(latent="pair") if unit is None else FitConfig(unit=unit)
    check_unit(data, config)
    ids = torch.arange(len(data)) if unit is None else data.units(unit)[0]
    batch = table.batch(policy.constants(data.texts), data.index)
    index = batch["answer"][batch["place"]]
    options |= {"inputs": latent_inputs(policy, data, config, ids)}
    if unit is None or policy.given_lapse:
        options |= {"lapse": policy.given_lapse, "lapse_start": policy.lapse}
        found = full_batch_em(table, policy.gate, index, ids, **options)
    else:
        found = tally_em(table, policy.gate, index, ids, **options)
    policy.gate.float()
    if policy.given_lapse == "learn":
        policy.lapse_rate.copy_(torch.tensor(found.lapse))
    return found
