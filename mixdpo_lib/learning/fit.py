"""A fit from start to end: restarts, resumption, the best step kept; the gate alone."""

from __future__ import annotations

import copy
import math
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import TrainerState

from ..base.model import need_memory
from ..data.pairs import Pairs
from ..gates.m_step import EMResult, gate_em
from ..policy.mixture import MixturePolicy
from ..policy.remarks import seen_before
from ..store import MixDPOError, note
from .checkpoints import RESTARTS, Checkpoints
from .config import FitConfig
from .identity import fit_identity, remembered, unlike, was_left
from .learner import latent_inputs
from .result import FAILED, FitResult, ending, summarise
from .starts import RANDOM_HEADS_SCALE
from .trainer import MixDPOTrainer, steps_a_pass


def _perturb(policy: MixturePolicy, config: FitConfig, seed: int) -> None:
    if config.start.kind == "random_heads":
        policy.experts.perturb(RANDOM_HEADS_SCALE, torch.Generator().manual_seed(seed))


def _restarts(
    policy: MixturePolicy, train: Pairs, config: FitConfig, validation: Pairs | None
) -> tuple[pd.DataFrame, dict[str, Tensor] | None]:
    """Short fits from several seeds: their table, and the learner of the one with the best training likelihood."""
    if config.start.restarts == 1 or policy.n_experts == 1:
        return pd.DataFrame(
            {"restart": [0], "seed": [config.seed], "elbo": [float("nan")], "kept": [True]}
        ), None
    start = copy.deepcopy(policy.state_dict())
    rows, states, failed = [], [], []
    for i in range(config.start.restarts):
        policy.load_state_dict(start)
        seed = config.seed + 1000 * i
        _perturb(policy, config, seed)
        short = config.change(
            seed=seed,
            passes=config.start.restart_passes,
            min_steps=round(config.min_steps * config.start.restart_passes / config.passes),
            evaluations_per_pass=1,
            stop__patience=0,
            stop__min_usage=0.0,
        )
        with tempfile.TemporaryDirectory() as scratch:
            trainer = MixDPOTrainer(policy, train, short, Path(scratch), validation)
            trainer.train()
            rows.append({"restart": i, "seed": seed, "elbo": trainer.measure()["elbo"]})
            seen = pd.DataFrame([row for row in trainer.state.log_history if "elbo" in row])
            failed.append(ending(trainer.watch.stop_reason, seen) in FAILED)
        states.append(copy.deepcopy(trainer.learner.state_dict()))
    table = pd.DataFrame(rows)
    score = table["elbo"].fillna(-math.inf).mask(pd.Series(failed), -math.inf)
    table = table.assign(kept=table.index == int(score.idxmax()))
    if not all(failed):
        return table, states[int(score.idxmax())]
    policy.load_state_dict(start)  # all failed: the fit begins where they did
    _perturb(policy, config, config.seed)
    return table, None


def check_unit(data: Pairs, config: FitConfig) -> None:
    """Refuse latents of units whose column there is not."""
    if config.latent == "unit" and config.unit not in data.rows.column_names:
        raise ValueError(
            f"latent='unit': no column {config.unit!r}; found {data.rows.column_names}; name the column that says whose "
            "pairs these are by FitConfig(unit=...), or give each comparison a latent of its own: "
            "FitConfig(latent='pair')"
        )


def fit(
    policy: MixturePolicy,
    train: Dataset | Pairs,
    config: FitConfig | None = None,
    *,
    validation: Dataset | Pairs | None = None,
    folder: str | Path | None = None,
) -> FitResult:
    """Fit the experts and the gate of `policy`, in place, by stochastic variational EM.

    E-step: responsibilities from the table of last-seen log-likelihoods (table.py). M-step: gradient steps on
    - sum_n sum_k q_nk loglik_nk, loglik_nk = log sigma(D_nk), or what a lapse rate makes of it (`elbo.with_lapse`); a
    learned rate moves with the gate. With K = 1 and no lapses this is DPO.

    Parameters
    ----------
    train : preference set; with latent="unit" its unit column says which pairs share a latent.
    config : see `FitConfig`; its defaults where none is given.
    validation : pairs of the same units; the step at which their likelihood (by each unit's own training pairs) is
        best is put back into the policy, unless `Stop.best` says the last. Without them the last step stays, unless the
        fit diverged: then the best finite one is put back.
    folder : where checkpoints are written (twice a pass) and gone on from; none by default. It belongs to one fit: the
        same data, policy (made anew, as at first) and configuration go on from the newest whole checkpoint, to the
        same bits. More `passes` go on too, where `min_steps` stretches neither; the rate then falls to 0 over the new
        number of passes from where it stands, so that the numbers are not those of a fit planned so long from the
        start.

    Returns
    -------
    FitResult; its sentence is printed. `result.restore(policy, step)` puts another evaluated step into the policy.

    Raises
    ------
    ValueError : bad rows, an absent unit column, an unknown option.
    MixDPOError : less free memory than gradients, AdamW's two moments and two snapshots need (it is named); a folder
        that is a file, cannot be written, is full, or holds another fit (what differs is named).
    """
    config = FitConfig() if config is None else config
    if not hasattr(config, "latent"):
        raise ValueError(
            f"config: found {type(config).__name__}, expected a FitConfig; give the pairs to judge by as validation="
        )
    size = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    what = f"gradients, moments and snapshots of {size / 1e6:.1f} M trained parameters"
    need_memory(20 * size, what, next(policy.experts.parameters()).device)
    train = policy.prepare(train)
    valid = None if validation is None else policy.prepare(validation)
    check_unit(train, config)
    if valid is not None:
        named = all(config.unit in pairs.rows.column_names for pairs in (train, valid))
        for said in seen_before(train, valid, config.unit if named else None, "validation"):
            note(said)
    checkpoints = None if folder is None else _checkpoints(folder, policy, train, valid, config)
    newest = None if checkpoints is None else checkpoints.newest()
    if checkpoints and newest is None and was_left(policy, checkpoints.identity):
        raise MixDPOError(
            f"{folder}: no whole checkpoint there, and the policy is as an interrupted fit left it; make the policy anew"
        )
    own = None if checkpoints is None else checkpoints.identity
    with remembered(policy, own), tempfile.TemporaryDirectory() as scratch:
        policy.experts.start(train)
        _perturb(policy, config, config.seed)
        first = config.change(start__restarts=1) if newest else config
        restarts, start = _restarts(policy, train, first, valid)
        place = checkpoints.part if checkpoints else Path(scratch)
        trainer = MixDPOTrainer(policy, train, config, place, valid, checkpoints)
        if (
            start is not None
        ):  # the best restart goes on: its experts, gate, table, and where it was in the tempering
            trainer.learner.load_state_dict(start)
        if checkpoints:
            if newest:
                restarts = pd.read_csv(newest / RESTARTS, float_precision="round_trip")
            checkpoints.restarts = restarts.to_csv(index=False)
            if trainer.args.should_save:
                checkpoints.begin()
        _train(trainer, newest)
    watch = trainer.watch
    history = pd.DataFrame([row for row in trainer.state.log_history if "elbo" in row])
    leading = [
        "step",
        "pairs_seen",
        "elbo",
    ]  # a checkpoint sorts the columns: one order, resumed or not
    history = history[leading + sorted(set(history) - set(leading))]
    why = ending(watch.stop_reason, history)
    last = config.stop.best == "last" and why not in FAILED
    result = FitResult(
        history=history,
        stop_reason=why,
        best_step=int(history["step"].iloc[-1]) if last else watch.best_step(trainer.state),
        restarts=restarts,
        snapshots=watch.snapshots,
        losses=trainer.losses,
    )
    learner = trainer.learner
    back = valid is not None or result.stop_reason in FAILED
    kept = result.best_step if back else None
    log_q = learner.table.log_q(learner.log_w()).cpu()
    nodes = policy.experts.nodes
    result.summary = summarise(
        history, result.stop_reason, kept, log_q, learner.table.loglik.cpu(), nodes
    )
    if kept is not None:
        result.restore(policy)
    if nodes is not None and config.latent == "unit":
        nodes.warn_narrow(log_q)
    policy.gate.to("cpu")  # where it was before: what users are served by is asked there
    if trainer.args.should_save:
        note(f"fit K={policy.n_experts}: {result.summary}")
    return result


def _checkpoints(
    folder: str | Path,
    policy: MixturePolicy,
    train: Pairs,
    valid: Pairs | None,
    config: FitConfig,
) -> Checkpoints:
    """Those of this fit; the policy is as it is before its first step."""
    pass_steps = steps_a_pass(train, config)
    own = fit_identity(policy, train, valid, config)
    return Checkpoints(Path(folder), own, lambda a, b: unlike(a, b, pass_steps))


def _train(trainer: MixDPOTrainer, checkpoint: Path | None) -> None:
    """To the end: from the start, or from a whole checkpoint; a finished fit is read and nothing else.

    Raises
    ------
    MixDPOError : the checkpoint was written by a version of transformers or torch that this one does not read.
    """
    if checkpoint is None:
        trainer.train()
        return
    unread = (
        f"{checkpoint}: whole, but this version of transformers or torch does not read it; go on with those that wrote "
        "it, or give another folder"
    )
    try:
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    except (TypeError, ValueError) as error:
        raise MixDPOError(f"{unread} ({error})") from error
    if trainer.watch.recall(state) or state.global_step >= trainer.args.max_steps:
        trainer.take_state(checkpoint, state)
        return
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint))
    except Exception as error:
        if "Weights only load failed" in str(error):  # torch loads numbers and nothing else
            raise MixDPOError(f"{unread} ({error})") from error
        raise


@torch.no_grad()
def fit_gate(
    policy: MixturePolicy,
    data: Dataset | Pairs,
    latent: str = "unit",
    unit: str = "user",
    frozen: list[nn.Parameter] | None = None,
    **options: Any,
) -> EMResult:
    """Fit the gate of `policy` alone, in place: new users or new prompts, the same experts. See `m_step.gate_em`.

    Parameters
    ----------
    data : preferences of those who shall be served. latent, unit : as in `FitConfig`.
    frozen : parameters of the gate that stay, such as `shared` of a `MixedMembershipGate`: only the users' offsets move.
    options : max_iter, tolerance, entropy_weight, balance_weight of `m_step.gate_em`.

    Returns
    -------
    EMResult: history, stop_reason, responsibilities. No parameter of the experts is touched, nor the lapse rate.
    """
    data = policy.prepare(data)
    config = FitConfig(latent=latent, unit=unit)
    check_unit(data, config)
    ids = data.units(unit)[0] if latent == "unit" else torch.arange(len(data))
    inputs = latent_inputs(policy, data, config, ids)
    own = ids if latent == "unit" else None
    return gate_em(policy.gate, inputs, policy.loglik(data), own, frozen=frozen or [], **options)
