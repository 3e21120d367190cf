"""A step of learning and its checkpoint: `MixDPOTrainer` on `transformers.Trainer`."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from ..base.features import PairFeatures, TextFeatures, gather_positions
from ..elbo import certified_gap, correct, elbo_terms, gumbel_softmax_samples, sum_over_units
from ..gates.contract import distinct_rows
from ..gates.contract import top_s as keep_top_s
from ..gates.m_step import gate_m_step
from ..gates.weights import LearnedWeights
from ..policy.mixture import MixturePolicy
from ..store import progress
from .config import FitConfig, Monitor
from .inference import RecognitionNetwork
from .starts import cluster_log_q, random_log_q
from .table import LoglikTable


def _describe_pairs(texts: TextFeatures, pairs: Tensor) -> Tensor:
    """What the recognition network reads of a pair: prompt, and mean hidden states of chosen minus rejected."""
    ids, place = torch.unique(pairs, return_inverse=True)
    hidden, _, segment = gather_positions(texts, ids)
    total = torch.zeros(len(ids), hidden.shape[1]).index_add_(0, segment, hidden)
    mean = (total / torch.bincount(segment)[:, None])[place]
    return torch.cat([torch.from_numpy(texts.prompt_hidden)[pairs[:, 0]], mean[:, 0] - mean[:, 1]], 1)


def _from_all(row: Tensor, loglik: Tensor) -> tuple[Tensor, Tensor]:
    """The rows that all processes have just computed; of one process: its own."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return row, loglik
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, (row.cpu(), loglik.cpu()))
    rows, logliks = zip(*found, strict=True)
    return torch.cat(rows).to(row.device), torch.cat(logliks).to(loglik.device)


class Learner(nn.Module):
    """What is trained and what a checkpoint holds: experts, gate, tables, network. The frozen base is not in it."""

    start_log_q: Tensor
    steps: Tensor
    evidence: LoglikTable

    def __init__(
        self, policy: MixturePolicy, unit: Tensor, config: FitConfig, steps_per_pass: int, inputs: dict[str, Tensor],
        together: list[str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.policy, self.steps_per_pass = policy, steps_per_pass
        self.options = config  # not `config`: Trainer writes to an attribute of that name
        self.table = LoglikTable(unit, policy.n_experts)
        self.recognition: RecognitionNetwork | None = None
        if config.symmetry_breaking == "clusters":
            log_q = cluster_log_q(inputs, policy.n_experts, config.seed, together, config.cluster_certainty)
        else:
            log_q = random_log_q(self.table.n_units, policy.n_experts, config.seed)
        self.register_buffer("start_log_q", log_q.float())
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        distinct, place = distinct_rows(inputs) if inputs else ({}, torch.empty(0, dtype=torch.long))
        for name, value in {**distinct, "place": place}.items():  # from the data, so no checkpoint holds them
            self.register_buffer(f"gate_{name}", value, persistent=False)
        learns = policy.n_experts > 1 and any(p.requires_grad for p in policy.gate.parameters())
        if config.symmetry_breaking == "clusters" and learns:  # the gate starts from them
            gate_m_step(policy.gate, self.inputs, self.start_log_q, max_iter=30, place=self.gate_place)

    gate_place: Tensor

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What the gate reads, each distinct row once; `gate_place` says which one a latent (pair or unit) has."""
        return {name: getattr(self, f"gate_{name}") for name in self.policy.gate.reads}

    @torch.no_grad()
    def log_w(self) -> Tensor:
        """The gate's weights, nats: (K,), or one row a latent where it reads something."""
        gate = self.policy.gate
        return gate(self.inputs)[self.gate_place] if gate.reads else gate()

    def recognise(self, described: Tensor) -> RecognitionNetwork:
        """Add a recognition network for pairs of this kind, and the table of its last-seen evidence."""
        scale = described.std(0).clamp_min(1e-6) if len(described) > 1 else torch.ones(described.shape[1])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.options.seed)
            self.recognition = RecognitionNetwork(
                described.shape[1], self.policy.n_experts, mean=described.mean(0), scale=scale
            )
        self.evidence = LoglikTable(self.table.unit.clone(), self.policy.n_experts)
        self.evidence.fill(torch.zeros_like(self.evidence.loglik))
        return self.recognition

    def temperature(self) -> float:
        """Of the responsibilities at this step: geometric from start_temperature to 1."""
        share = float(self.steps) / max(self.options.tempering_passes * self.steps_per_pass, 1)
        return self.options.start_temperature ** max(0.0, 1 - share)

    def starting(self) -> bool:
        """Whether the responsibilities are still those that break the symmetry."""
        config = self.options
        given = config.symmetry_breaking in ("random_responsibilities", "clusters") and self.policy.n_experts > 1
        return given and bool(self.steps < config.symmetry_passes * self.steps_per_pass)

    def chosen(self, row: Tensor, log_w: Tensor) -> Tensor | None:
        """Which experts are computed for these rows: all, or the `top_s` of largest weight once tempering is over."""
        if self.options.top_s is None or self.starting() or self.temperature() > 1:
            return None
        return keep_top_s(log_w[self.table.unit[row]], self.options.top_s) > -math.inf

    def forward(
        self, row: Tensor, described: Tensor | None = None, scale: float = 1.0, part: str = "whole", **batch: Tensor
    ) -> dict[str, Tensor]:
        """loss = - mean_n sum_k q_nk log sigma(D_nk), nats per pair; q detached. See `_relaxed` for the other kinds.

        A step in several parts: each is looked at ("look": the table is brought up to date and nothing else), then
        learned from ("learn", and "last", which closes the step), its loss times `scale`, its share of the step.
        """
        config, several = self.options, self.policy.n_experts > 1
        log_w = self.log_w()
        chosen = self.chosen(row, log_w)
        loglik = self.policy.batch_loglik(batch, chosen)
        last = part in ("whole", "last")
        if self.training and part in ("whole", "look"):
            self.table.update(*_from_all(row, loglik.detach()))
        if part == "look":
            return {}
        penalty = loglik.new_zeros(())
        if self.starting():
            q = self.start_log_q[self.table.unit[row]].exp()
        elif config.inference == "exact" or not several:
            kept = log_w if chosen is None else keep_top_s(log_w, config.top_s)  # type: ignore[arg-type]
            q = self.table.batch_log_q(row, kept, self.temperature()).exp()
        else:
            q, penalty = self._relaxed(row, described)
        if self.training and last and several and not self.starting() and self.temperature() == 1:
            self._m_step_of_gate(log_w)  # tempered responsibilities say little of the weights: a start could kill
        if self.training and last:
            self.steps += 1
        return {"loss": scale * (penalty - (q * loglik.masked_fill(q == 0, 0.0)).sum(1).mean())}

    def _m_step_of_gate(self, log_w: Tensor) -> None:
        """The weights move towards the responsibilities of the whole table."""
        config, gate = self.options, self.policy.gate
        table = self.table if self.recognition is None else self.evidence
        log_q = table.log_q(log_w)
        if not log_q.isfinite().any() or bool(log_q.isnan().any()):  # the next evaluation ends the fit as non-finite
            return
        if isinstance(gate, LearnedWeights):
            gate.update(log_q.exp().mean(0), (float(self.steps) + 1) ** -config.gate_exponent, n_units=len(log_q))
        elif any(p.requires_grad for p in gate.parameters()):  # a frozen gate stays as it was given
            gate_m_step(
                gate, self.inputs, log_q, config.gate_entropy, config.gate_balance, config.gate_iterations,
                place=self.gate_place,
            )  # fmt: skip

    def _relaxed(self, row: Tensor, described: Tensor | None) -> tuple[Tensor, Tensor]:
        """Gumbel-Softmax draws z~ of the latents of these rows, and what KL(q || w) adds to the loss (nats per pair).

        "relaxed" draws from the exact responsibilities, whose KL has no gradient; "recognition" from q_phi, through
        which gradients flow: the evidence of the batch is fresh, that of a unit's other pairs is as last seen.
        """
        config, log_w, unit = self.options, self.log_w(), self.table.unit[row]
        if self.recognition is None:
            log_q, kl = self.table.log_q(log_w, self.temperature()), None
        else:
            fresh = self.recognition(described)
            if self.training:
                self.evidence.update(row, fresh)
            last = sum_over_units(self.evidence.loglik, self.table.unit, self.table.n_units)
            total = last + sum_over_units(fresh - fresh.detach(), unit, self.table.n_units)
            log_q = (log_w + total / self.temperature()).log_softmax(1)
            kl = (log_q.exp() * (log_q - log_w)).sum(1) / torch.bincount(self.table.unit)
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + int(self.steps))
        share = float(self.steps) / (config.passes * self.steps_per_pass)
        tau = config.schedule().temperature(share, log_q, generator)
        z = gumbel_softmax_samples(log_q, tau, config.n_samples, config.hard, generator).mean(0)
        return z[unit], log_q.new_zeros(()) if kl is None else kl[unit].mean()


def row_groups(data: PairFeatures, batch_by: str) -> list[list[int]]:
    """Rows that stay together in a batch: each alone, or all of a prompt."""
    if batch_by == "pair":
        return [[row] for row in range(len(data))]
    groups: dict[str, list[int]] = {}
    for row, prompt in enumerate(data.rows["prompt"]):
        groups.setdefault(prompt, []).append(row)
    return list(groups.values())


def latent_inputs(policy: MixturePolicy, data: PairFeatures, config: FitConfig, unit: Tensor) -> dict[str, Tensor]:
    """What the gate reads of each latent of the training data.

    Raises
    ------
    ValueError : with latent="unit", a gate that reads what differs inside a unit; top_s with an input-free gate, out of
        range; another inference than "exact" with a gate that reads.
    """
    gate = policy.gate
    if config.top_s is not None and not gate.reads:
        raise ValueError(
            f"top_s={config.top_s} with {type(gate).__name__}: the same experts would be left out of every pair, and "
            "never learn; use a gate that reads, or no top_s"
        )
    if config.top_s is not None and not 1 <= config.top_s <= policy.n_experts:
        raise ValueError(f"top_s={config.top_s} with {policy.n_experts} experts: expected 1 ... {policy.n_experts}")
    if not gate.reads:
        return {}
    if config.inference != "exact":
        raise ValueError(f"inference={config.inference!r} with {type(gate).__name__}: expected 'exact' with a gate "
                         "that reads")  # fmt: skip
    inputs = policy.gate_inputs(data)
    if config.latent == "pair":
        return inputs
    _, first = np.unique(unit.numpy(), return_index=True)
    shared = {name: value[first] for name, value in inputs.items()}
    for name, value in inputs.items():
        differs = ~torch.isclose(value.float(), shared[name][unit].float(), atol=1e-3, rtol=1e-3)
        rows = differs if differs.dim() == 1 else differs.any(1)
        if rows.any():
            row = int(rows.nonzero()[0])
            raise ValueError(
                f"row {row}: {name} differs from the first row of its {config.unit}: with latent='unit' a gate may "
                f"read only what the pairs of a {config.unit} share; use latent='pair', or a gate that reads the "
                f"{config.unit}"
            )
    return shared


def _cluster_names(data: PairFeatures, config: FitConfig, unit: Tensor) -> list[str] | None:
    """Of each latent, the name in the column `cluster_by`."""
    if not config.cluster_by:
        return None
    ids, names = data.units(config.cluster_by)
    _, first = np.unique(unit.numpy(), return_index=True)
    return [names[int(i)] for i in ids[first]]


class MixDPOTrainer(Trainer):
    """Stochastic variational EM on `transformers.Trainer`: batches of pairs, E-step from the table, M-step by AdamW.

    Checkpoints hold the experts, the gate and the table (safetensors), not the frozen base, and resume exactly.
    """

    def __init__(
        self, policy: MixturePolicy, data: PairFeatures, config: FitConfig, folder: Path,
        validation: PairFeatures | None = None, save_steps: int | None = None,
    ) -> None:  # fmt: skip
        unit, self.names = (
            data.units(config.unit) if config.latent == "unit" else (torch.arange(len(data)), [])
        )
        self.policy, self.data, self.config, self.folder = policy, data, config, folder
        self.groups = row_groups(data, config.batch_by)
        per_step = config.batch_size * config.accumulate
        self.steps_per_pass = steps_per_pass = math.ceil(len(self.groups) / per_step)
        self.losses: list[float] = []
        self.validation = validation
        if validation is not None and config.latent == "unit":
            place = {name: i for i, name in enumerate(self.names)}
            ids, names = validation.units(config.unit)
            unknown = [n for n in names if n not in place]
            if unknown and not policy.gate.reads:
                raise ValueError(
                    f"validation: units {unknown[:3]} have no training pairs; expected units with some, or a gate that "
                    "reads what is known of them"
                )
            self.validation_unit = torch.tensor([place.get(n, -1) for n in names])[ids]
        # an expert owns about 1/K of the pairs, and so 1/K of the gradient; AdamW makes up for that by itself
        rate = config.learning_rate * (policy.n_experts if config.optimizer == "sgd" else 1)
        arguments = TrainingArguments(
            output_dir=str(folder), per_device_train_batch_size=per_step, learning_rate=rate,
            max_steps=max(1, round(config.passes * steps_per_pass)), weight_decay=config.weight_decay,
            warmup_steps=max(0, round(config.warmup * config.passes * steps_per_pass)), lr_scheduler_type="linear",
            seed=config.seed, data_seed=config.seed, report_to=[], disable_tqdm=True, logging_strategy="no",
            save_strategy="steps" if save_steps else "no", save_steps=save_steps or 500, remove_unused_columns=False,
            dataloader_pin_memory=False, max_grad_norm=1.0, use_cpu=policy.base.model.device.type == "cpu",
            label_names=[], bf16=config.bf16, ddp_find_unused_parameters=True, ddp_broadcast_buffers=False,
        )  # fmt: skip
        inputs = latent_inputs(policy, data, config, unit)
        together = _cluster_names(data, config, unit) if config.symmetry_breaking == "clusters" else None
        learner = Learner(policy, unit, config, steps_per_pass, inputs, together)
        groups = [{"params": list(policy.experts.parameters()), "lr": rate}]
        recognises = config.inference == "recognition" and policy.n_experts > 1
        if recognises:
            network = learner.recognise(_describe_pairs(data.texts, data.pairs))
            groups.append({"params": list(network.parameters()), "lr": config.recognition_rate})
        optimizer: torch.optim.Optimizer = (
            torch.optim.AdamW(groups, weight_decay=config.weight_decay) if config.optimizer == "adamw"
            else torch.optim.SGD(groups, momentum=0.9, weight_decay=config.weight_decay)
        )  # fmt: skip
        constants = policy.constants(data.texts)

        here, processes = arguments.process_index, arguments.world_size
        n_parts = processes * config.accumulate
        if recognises and n_parts > 1:
            raise ValueError(f"inference='recognition' with accumulate={config.accumulate} and {processes} processes: "
                             "expected one of each, or inference='exact'")  # fmt: skip

        def collate(groups: list[list[int]]) -> dict[str, Any]:
            """Of a step's groups the parts of this process: part i has every n-th group from i."""
            total, parts = sum(map(len, groups)), []
            for i in range(here, n_parts, processes):
                own = groups[i::n_parts] or groups[:1]  # processes keep step: one without a group has a share of 0
                row = torch.tensor([row for group in own for row in group])
                share = len(row) / total if i < len(groups) else 0.0
                part = {"row": row, "scale": share * processes,
                        **policy.experts.batch(data.texts, constants, data.pairs[row])}  # fmt: skip
                parts.append(part | ({"described": _describe_pairs(data.texts, data.pairs[row])} if recognises else {}))
            return {"parts": parts}

        super().__init__(
            model=learner, args=arguments, train_dataset=self.groups, data_collator=collate,
            callbacks=[Watch(self)], optimizers=(optimizer, None),
        )  # fmt: skip
        self.remove_callback(PrinterCallback)

    def get_train_dataloader(self) -> Any:
        """Every process is given the same steps, in the order of a single one, and takes its part of each."""
        if self.args.world_size == 1:
            return super().get_train_dataloader()
        groups: Any = self.groups
        loader = torch.utils.data.DataLoader(
            groups, batch_size=self.args.per_device_train_batch_size, collate_fn=self.data_collator,
            sampler=self._get_train_sampler(),
        )  # fmt: skip
        return prepare_data_loader(
            loader, num_processes=1, process_index=0, use_seedable_sampler=True, data_seed=self.args.data_seed
        )

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One step: E-step for all its pairs, then the gradient, a part at a time."""
        model.train()
        parts = self._prepare_inputs(inputs)["parts"]
        names = ["learn"] * (len(parts) - 1) + ["last"] if len(parts) > 1 else ["whole"]
        if len(parts) > 1:
            for part in parts:
                with torch.no_grad(), self.compute_loss_context_manager():
                    model(**part, part="look")
        total = torch.zeros((), device=self.args.device)
        for part, name in zip(parts, names, strict=True):
            with nullcontext() if name != "learn" else self.accelerator.no_sync(model):
                with self.compute_loss_context_manager():
                    loss = model(**part, part=name)["loss"]
                self.accelerator.backward(loss)
            total += loss.detach()
        self.losses.append(float(self.accelerator.reduce(total.clone(), "mean")))
        return total

    def measure(self) -> dict[str, Any]:
        """The bound by term, accuracy and the validation likelihood.

        With `evaluate_training` the table is filled by a full pass before; without, what it has last seen counts.
        """
        learner: Learner = self.accelerator.unwrap_model(self.model)
        policy, table = self.policy, learner.table
        sets = [self.data, self.validation] if self.config.evaluate_training else [self.validation]
        seen = [d.pairs for d in sets if d is not None and d.texts is self.data.texts]
        rewards = policy.text_rewards(self.data.texts, torch.unique(torch.cat(seen))) if seen else None
        if self.config.evaluate_training:
            table.fill(policy.loglik(self.data, rewards))
        log_w = learner.log_w()
        row: dict[str, Any] = table.terms(log_w, 1.0)
        if self.config.top_s is not None:  # of the table: the mean over its rows, nats a latent
            unit = table.unit if self.config.latent == "unit" else None
            row["certified_gap"] = float(
                certified_gap(table.loglik, log_w, self.config.top_s, unit, validate=False).mean()
            )
        if learner.recognition is not None:  # the bound at q_phi: how far it lies below is the amortisation gap
            with torch.no_grad():
                parts = [_describe_pairs(self.data.texts, part) for part in self.data.pairs.split(1024)]
                learner.evidence.fill(torch.cat([learner.recognition(part) for part in parts]))
                own = learner.evidence.log_q(log_w)
                terms = elbo_terms(table.loglik, log_w, own, table.unit, n_units=table.n_units, validate=False)
                row["elbo_recognition"] = float(terms.elbo.sum()) / len(self.data)
        log_q = table.log_q(log_w)[table.unit]
        row["train_accuracy"] = float(correct((table.loglik + log_q).logsumexp(1).exp()).mean())
        if self.validation is not None:
            same = self.validation.texts is self.data.texts
            loglik = policy.loglik(self.validation, rewards if same else None)
            with torch.no_grad():
                weights = policy.log_w(self.validation)
            if self.config.latent == "unit":  # a unit with training pairs by them, another one by the gate alone
                place = self.validation_unit
                weights = torch.where(place[:, None] < 0, weights, table.log_q(log_w)[place])
            prediction = (loglik + weights).logsumexp(1)
            row["validation_loglik"] = float(prediction.mean())
            row["validation_accuracy"] = float(correct(prediction.exp()).mean())
        return row


class Watch(TrainerCallback):
    """Progress lines, the history, snapshots, early stopping."""

    def __init__(self, trainer: MixDPOTrainer) -> None:
        self.trainer, self.start = trainer, time.monotonic()
        self.snapshots: dict[int, dict[str, Tensor]] = {}
        self.monitor = Monitor(trainer.config.patience, trainer.config.min_usage)
        self.stop_reason: str | None = None

    def look(self, state: TrainerState) -> None:
        """One row of the history (kept in the trainer's state, so in checkpoints too) and one snapshot."""
        trainer = self.trainer
        learner: Learner = trainer.accelerator.unwrap_model(trainer.model)
        row = trainer.measure()
        step = state.global_step
        passes = step / trainer.steps_per_pass
        row |= {"step": step, "pairs_seen": round(passes * len(trainer.data)), "seconds": time.monotonic() - self.start}
        row["responsibility_temperature"] = learner.temperature()
        state.log_history.append(row)
        self.snapshots[step] = {k: v.detach().clone() for k, v in trainer.policy.state_dict().items()}
        if trainer.args.save_strategy != "no" and trainer.args.should_save:
            save_file(self.snapshots[step], trainer.folder / f"snapshot-{step}.safetensors")
        self.judge(row)
        for old in set(self.snapshots) - {step, self.best_step(state)}:  # whole models are large
            del self.snapshots[old]

    def best_step(self, state: TrainerState) -> int:
        """The step of the best evaluation so far."""
        rows = [row for row in state.log_history if "elbo" in row]
        return int(rows[max(self.monitor.best_step, 0)]["step"])

    def judge(self, row: dict[str, Any]) -> None:
        """Let the monitor see one row of the history."""
        usage = [value for name, value in row.items() if name.startswith("usage_")]
        self.stop_reason = self.monitor.step(row.get("validation_loglik", row["elbo"]), usage)

    def on_train_begin(self, args, state: TrainerState, control, **kwargs):  # type: ignore[override]
        for row in state.log_history:
            self.judge(row)
        if state.log_history:
            for step in {int(state.log_history[-1]["step"]), self.best_step(state)}:
                self.snapshots[step] = load_file(self.trainer.folder / f"snapshot-{step}.safetensors")
        else:
            self.look(state)
        control.should_training_stop = bool(self.stop_reason)

    def on_step_end(self, args, state: TrainerState, control, **kwargs):  # type: ignore[override]
        config = self.trainer.config
        per_pass = self.trainer.steps_per_pass
        every = max(1, int(per_pass / config.evaluations_per_pass + 1e-9))
        stage = f"fit K={self.trainer.policy.n_experts} {config.latent}"
        progress(stage, state.global_step, state.max_steps, f"bound {state.log_history[-1]['elbo']:.4f}")
        if state.global_step % every == 0 or state.global_step == state.max_steps:
            self.look(state)
            if self.stop_reason:
                progress(stage, state.global_step, state.global_step, self.stop_reason)
                control.should_training_stop = True
