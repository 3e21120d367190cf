"""A fit from start to end: restarts, resumption, the gate alone."""

from __future__ import annotations

import copy
import math
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from datasets import Dataset
from torch import Tensor, nn

from ..base.features import PairFeatures
from ..base.model import need_memory
from ..gates.m_step import EMResult, gate_em
from ..gates.membership import MixedMembershipGate
from ..policy.mixture import MixturePolicy
from .config import FitConfig, FitResult
from .trainer import MixDPOTrainer, Watch, latent_inputs, row_groups


def _restarts(
    policy: MixturePolicy, train: PairFeatures, config: FitConfig, validation: PairFeatures | None
) -> tuple[pd.DataFrame, dict[str, Tensor] | None]:
    """Short fits from several seeds: their table, and the learner of the one with the best training likelihood."""
    if config.restarts == 1 or policy.n_experts == 1:
        return pd.DataFrame({"restart": [0], "seed": [config.seed], "elbo": [float("nan")], "kept": [True]}), None
    start = copy.deepcopy(policy.state_dict())
    rows, states = [], []
    for i in range(config.restarts):
        policy.load_state_dict(start)
        seed = config.seed + 1000 * i
        if config.symmetry_breaking == "random_heads":
            policy.experts.perturb(config.symmetry_scale, torch.Generator().manual_seed(seed))
        short = replace(
            config, seed=seed, restarts=1, passes=config.restart_passes, evaluations_per_pass=1,
            patience=0, min_usage=0.0,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as scratch:
            trainer = MixDPOTrainer(policy, train, short, Path(scratch), validation)
            trainer.train()
            rows.append({"restart": i, "seed": seed, "elbo": trainer.measure()["elbo"]})
        states.append(copy.deepcopy(trainer.accelerator.unwrap_model(trainer.model).state_dict()))
    table = pd.DataFrame(rows)
    best = int(table["elbo"].fillna(-math.inf).idxmax())
    return table.assign(kept=table.index == best), states[best]


def fit(
    policy: MixturePolicy, train: Dataset | PairFeatures, config: FitConfig | None = None,
    validation: Dataset | PairFeatures | None = None, folder: str | Path | None = None,
) -> FitResult:  # fmt: skip
    """Fit the experts and the gate of `policy`, in place, by stochastic variational EM.

    E-step: responsibilities from the table of last-seen log-likelihoods (table.py). M-step: AdamW on
    - sum_n sum_k q_nk log sigma(D_nk). With K = 1 this is DPO.

    Parameters
    ----------
    train : preference set; with latent="unit" its unit column says which pairs share a latent.
    validation : pairs of the same units; its likelihood, by each unit's own training pairs, decides about stopping.
    folder : where checkpoints are written (twice a pass) and resumed from; none by default.

    Returns
    -------
    FitResult. The policy is left as it was after the last step; `snapshots[best_step]` are its best parameters.

    Raises
    ------
    ValueError : bad rows, an absent unit column, an unknown option.
    MixDPOError : less free memory than gradients, AdamW's two moments and two snapshots need (it is named).
    """
    config = config or FitConfig()
    size = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    what = f"gradients, moments and snapshots of {size / 1e6:.1f} M trained parameters"
    need_memory(20 * size, what, next(policy.experts.parameters()).device)
    train = policy.prepare(train)
    if config.latent == "unit":
        train.units(config.unit)
    valid = None if validation is None else policy.prepare(validation)
    policy.experts.start(train)
    if config.symmetry_breaking == "random_heads":
        policy.experts.perturb(config.symmetry_scale, torch.Generator().manual_seed(config.seed))
    resume = folder is not None and any(Path(folder).glob("checkpoint-*"))
    restarts, start = _restarts(policy, train, replace(config, restarts=1) if resume else config, valid)
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(folder) if folder else Path(scratch)
        per_step = config.batch_size * config.accumulate
        twice_a_pass = max(1, math.ceil(len(row_groups(train, config.batch_by)) / per_step) // 2)
        trainer = MixDPOTrainer(policy, train, config, place, valid, save_steps=twice_a_pass if folder else None)
        if start is not None:  # the best restart goes on: its experts, gate, table, and where it was in the tempering
            trainer.accelerator.unwrap_model(trainer.model).load_state_dict(start)
        if folder and resume:
            restarts = pd.read_csv(place / "restarts.csv")
        elif folder and trainer.args.should_save:
            restarts.to_csv(place / "restarts.csv", index=False)
        watch = next(c for c in trainer.callback_handler.callbacks if isinstance(c, Watch))
        trainer.train(resume_from_checkpoint=resume or None)
    history = pd.DataFrame([row for row in trainer.state.log_history if "elbo" in row])
    first = ["step", "pairs_seen", "elbo"]  # a checkpoint sorts the columns: one order, resumed or not
    history = history[first + sorted(set(history) - set(first))]
    return FitResult(
        history=history, stop_reason=watch.stop_reason or "max_iter",
        best_step=watch.best_step(trainer.state), restarts=restarts,
        snapshots=watch.snapshots, losses=trainer.losses,
    )  # fmt: skip


@torch.no_grad()
def fit_gate(
    policy: MixturePolicy, data: Dataset | PairFeatures, latent: str = "unit", unit: str = "user",
    only_offsets: bool = False, **options: Any,
) -> EMResult:  # fmt: skip
    """Fit the gate of `policy` alone, in place: new users or new prompts, the same experts. See `m_step.gate_em`.

    Parameters
    ----------
    data : preferences of those who shall be served. latent, unit : as in `FitConfig`.
    only_offsets : of a `MixedMembershipGate` only the users' offsets move, its gates stay.
    options : max_iter, tolerance, entropy_weight, balance_weight of `m_step.gate_em`.

    Returns
    -------
    EMResult: history, stop_reason, responsibilities. No parameter of the experts is touched.
    """
    data = policy.prepare(data)
    config = FitConfig(latent=latent, unit=unit)
    ids, names = data.units(unit) if latent == "unit" else (torch.arange(len(data)), [])
    frozen: list[nn.Parameter] = []
    if only_offsets:
        if not isinstance(policy.gate, MixedMembershipGate):
            raise ValueError(f"only_offsets with {type(policy.gate).__name__}: it has none; use a MixedMembershipGate")
        frozen = [p for gate in policy.gate.gates for p in gate.parameters()]
    return gate_em(
        policy.gate, latent_inputs(policy, data, config, ids), policy.loglik(data),
        ids if latent == "unit" else None, frozen=frozen, **options,
    )  # fmt: skip
