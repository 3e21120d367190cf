"""Learning at scale: `MixDPOTrainer` on `transformers.Trainer`, `fit` and `FitConfig`."""

from __future__ import annotations

import copy
import math
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from .elbo import certified_gap, elbo_terms, gumbel_softmax_samples, sum_over_units
from .em import (
    SYMMETRY_BREAKING,
    EMResult,
    GumbelSchedule,
    LoglikTable,
    Monitor,
    RecognitionNetwork,
    cluster_log_q,
    correct,
    gate_em,
    gate_m_step,
    random_log_q,
)
from .features import PairFeatures, TextFeatures, gather_positions
from .gating import LearnedWeights, MixedMembershipGate, distinct_rows
from .gating import top_s as keep_top_s
from .mixture import MixturePolicy
from .sources import need_memory
from .store import progress

INFERENCE = ("exact", "relaxed", "recognition")


@dataclass(frozen=True)
class FitConfig:
    """How a mixture is fitted. The defaults are common values, not tuned ones; study.py has those of the study."""

    latent: str = "unit"  # "unit": one latent expert a unit (user); "pair": one a comparison
    unit: str = "user"  # the column that says which pairs share a latent
    learning_rate: float = 1e-3
    passes: float = 3.0  # over the training pairs
    batch_size: int = 32  # pairs, or prompts with batch_by="prompt"; all processes together
    accumulate: int = 1  # batches a step; each is computed alone, so that memory holds one of them
    bf16: bool = False  # blocks under bfloat16 autocast; heads and log-probabilities stay float32
    batch_by: str = "pair"  # "prompt": all pairs of a prompt in one batch, so that texts they share are computed once
    weight_decay: float = 0.0
    optimizer: str = "adamw"  # or "sgd": momentum 0.9, no scaling by coordinate
    warmup: float = 0.05  # share of the steps
    symmetry_breaking: str = "random_responsibilities"  # see SYMMETRY_BREAKING; "clusters" of what the gate reads
    cluster_by: str = ""  # column whose rows share a cluster, such as a work that several templates ask about
    cluster_certainty: float = 0.8  # responsibility of the expert of a row's cluster, above 1/K and below 1
    symmetry_passes: float = 0.25  # how long the random responsibilities (or the clusters) stand
    symmetry_scale: float = 1e-3  # standard deviation of B_k with "random_heads"
    start_temperature: float = 8.0  # of tempered responsibilities, q ~ w exp(sum loglik / T); falls to 1
    tempering_passes: float = 1.0  # T reaches 1 here
    restarts: int = 1  # short fits from other seeds; the one with the best training likelihood goes on
    restart_passes: float = 1.0  # length of each of them
    evaluations_per_pass: float | int = 2  # below 1: one in several passes
    evaluate_training: bool = True  # an evaluation computes all training pairs anew; False: as last seen, faster
    patience: int = 0  # evaluations without a better validation likelihood before stopping; 0: never
    min_usage: float = 0.0  # mean responsibility below which an expert ends the fit as dead; 0: reported, never fatal
    inference: str = "exact"  # responsibilities: "exact"; "relaxed" draws from them; "recognition" network, see em.py
    recognition_rate: float = 0.03  # learning rate of the recognition network
    gumbel_temperature: float = 1.0  # of the relaxed draws; the first one where the schedule changes it
    gumbel_schedule: str = "constant"  # see GumbelSchedule
    gumbel_end: float = 0.1  # last temperature of "exponential"
    effective_experts: float = 1.5  # what "effective_experts" holds
    n_samples: int = 1  # relaxed draws a step
    hard: bool = False  # one-hot draws with the gradient of the soft ones (straight-through)
    gate_exponent: float = 0.6  # Robbins-Monro: rho_t = (t + 1) ** -gate_exponent, between 0.5 and 1
    gate_iterations: int = 5  # of L-BFGS in each M-step of a gate that reads
    gate_entropy: float = 0.0  # weight of the entropy of single weights in the gate's loss: keeps routing undecided
    gate_balance: float = 0.0  # weight of KL(mean weight || uniform): keeps any expert from starving
    top_s: int | None = None  # experts computed for a pair once tempering is over, by a gate that reads; None: all
    seed: int = 0

    def __post_init__(self) -> None:
        if self.latent not in ("unit", "pair"):
            raise ValueError(f"latent={self.latent!r}: possible are 'unit' (one a user) and 'pair' (one a comparison)")
        if self.symmetry_breaking not in SYMMETRY_BREAKING:
            raise ValueError(f"symmetry_breaking={self.symmetry_breaking!r}: possible are {SYMMETRY_BREAKING}")
        for name in (
            "learning_rate", "passes", "batch_size", "accumulate", "restarts", "evaluations_per_pass", "n_samples",
            "recognition_rate", "gate_iterations",
        ):  # fmt: skip
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: expected more than 0")
        if not 0 < self.cluster_certainty < 1:
            raise ValueError(f"cluster_certainty={self.cluster_certainty}: expected above 0 and below 1")
        if self.batch_by not in ("pair", "prompt"):
            raise ValueError(f"batch_by={self.batch_by!r}: possible are 'pair' and 'prompt' (all pairs of a prompt)")
        if self.optimizer not in ("adamw", "sgd"):
            raise ValueError(f"optimizer={self.optimizer!r}: possible are 'adamw' and 'sgd' (momentum 0.9)")
        if self.start_temperature < 1:
            raise ValueError(f"start_temperature={self.start_temperature}: expected at least 1, which is no tempering")
        if not 0 <= self.min_usage < 1:
            raise ValueError(f"min_usage={self.min_usage}: expected in [0, 1); 0 never ends a fit")
        if self.top_s is not None and self.inference != "exact":
            raise ValueError(f"top_s={self.top_s} with inference={self.inference!r}: expected 'exact', or no top_s")
        if self.inference not in INFERENCE:
            raise ValueError(f"inference={self.inference!r}: possible are {INFERENCE}")
        self.schedule()
        if not 0.5 < self.gate_exponent <= 1:
            raise ValueError(f"gate_exponent={self.gate_exponent}: expected in (0.5, 1], so that sum rho^2 is finite")

    def schedule(self) -> GumbelSchedule:
        """The temperatures of the relaxed draws."""
        return GumbelSchedule(
            self.gumbel_schedule, self.gumbel_temperature, self.gumbel_end, self.effective_experts
        )


@dataclass
class FitResult:
    """What a fit leaves: one row an evaluation, why it stopped, every restart, parameters at the best and last of them.

    losses : of each step since the start or the last resumption, nats per pair.
    """

    history: pd.DataFrame
    stop_reason: str
    best_step: int
    restarts: pd.DataFrame
    snapshots: dict[int, dict[str, Tensor]] = field(repr=False, default_factory=dict)
    losses: list[float] = field(repr=False, default_factory=list)


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


class _Learner(nn.Module):
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


def _groups(data: PairFeatures, batch_by: str) -> list[list[int]]:
    """Rows that stay together in a batch: each alone, or all of a prompt."""
    if batch_by == "pair":
        return [[row] for row in range(len(data))]
    groups: dict[str, list[int]] = {}
    for row, prompt in enumerate(data.rows["prompt"]):
        groups.setdefault(prompt, []).append(row)
    return list(groups.values())


def _gate_inputs(policy: MixturePolicy, data: PairFeatures, config: FitConfig, unit: Tensor) -> dict[str, Tensor]:
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
        self.groups = _groups(data, config.batch_by)
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
        inputs = _gate_inputs(policy, data, config, unit)
        together = _cluster_names(data, config, unit) if config.symmetry_breaking == "clusters" else None
        learner = _Learner(policy, unit, config, steps_per_pass, inputs, together)
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
            callbacks=[_Watch(self)], optimizers=(optimizer, None),
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
        learner: _Learner = self.accelerator.unwrap_model(self.model)
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


class _Watch(TrainerCallback):
    """Progress lines, the history, snapshots, early stopping."""

    def __init__(self, trainer: MixDPOTrainer) -> None:
        self.trainer, self.start = trainer, time.monotonic()
        self.snapshots: dict[int, dict[str, Tensor]] = {}
        self.monitor = Monitor(trainer.config.patience, trainer.config.min_usage)
        self.stop_reason: str | None = None

    def look(self, state: TrainerState) -> None:
        """One row of the history (kept in the trainer's state, so in checkpoints too) and one snapshot."""
        trainer = self.trainer
        learner: _Learner = trainer.accelerator.unwrap_model(trainer.model)
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
        progress(f"fit K={self.trainer.policy.n_experts} {config.latent}", state.global_step, state.max_steps, "steps")
        if state.global_step % every == 0 or state.global_step == state.max_steps:
            self.look(state)
            if self.stop_reason:
                control.should_training_stop = True


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

    E-step: responsibilities from the table of last-seen log-likelihoods (em.py). M-step: AdamW on
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
        twice_a_pass = max(1, math.ceil(len(_groups(train, config.batch_by)) / per_step) // 2)
        trainer = MixDPOTrainer(policy, train, config, place, valid, save_steps=twice_a_pass if folder else None)
        if start is not None:  # the best restart goes on: its experts, gate, table, and where it was in the tempering
            trainer.accelerator.unwrap_model(trainer.model).load_state_dict(start)
        if folder and resume:
            restarts = pd.read_csv(place / "restarts.csv")
        elif folder and trainer.args.should_save:
            restarts.to_csv(place / "restarts.csv", index=False)
        watch = next(c for c in trainer.callback_handler.callbacks if isinstance(c, _Watch))
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
    """Fit the gate of `policy` alone, in place: new users or new prompts, the same experts. See `em.gate_em`.

    Parameters
    ----------
    data : preferences of those who shall be served. latent, unit : as in `FitConfig`.
    only_offsets : of a `MixedMembershipGate` only the users' offsets move, its gates stay.
    options : max_iter, tolerance, entropy_weight, balance_weight of `em.gate_em`.

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
        policy.gate, _gate_inputs(policy, data, config, ids), policy.loglik(data),
        ids if latent == "unit" else None, frozen=frozen, **options,
    )  # fmt: skip


def gradient_error(
    policy: MixturePolicy, train: Dataset | PairFeatures, config: FitConfig, n_draws: int = 8
) -> dict[str, float]:
    """How far the gradient of relaxed draws is from the exact one, at these experts, on one batch of training pairs.

    With g_i the experts' gradient of draw i and g the exact one: `bias` = |mean g_i - g| / |g|, which holds noise of
    size `noise` / sqrt(n_draws) as well, and `noise` = sqrt(mean |g_i - mean g_i|^2) / |g|. Responsibilities are at
    temperature 1.

    Parameters
    ----------
    config : with inference="relaxed"; its gumbel_temperature, n_samples and hard are measured.
    n_draws : >= 2.

    Raises
    ------
    ValueError : another kind of inference, too few draws.
    """
    if config.inference != "relaxed" or n_draws < 2:
        raise ValueError(
            f"inference={config.inference!r}, n_draws={n_draws}: expected 'relaxed', and at "
            "least 2 draws to see their spread"
        )
    config = replace(config, start_temperature=1.0, symmetry_breaking="none", evaluate_training=True)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = MixDPOTrainer(policy, policy.prepare(train), config, Path(scratch))
        learner: _Learner = trainer.accelerator.unwrap_model(trainer.model)
        trainer.measure()
        batch = next(iter(trainer.get_train_dataloader()))["parts"][0]
        learner.eval()

        def gradient(inference: str, step: int) -> Tensor:
            learner.options = replace(config, inference=inference)
            learner.steps.fill_(step)  # draws are seeded by the step
            policy.zero_grad()
            learner(**batch)["loss"].backward()
            return torch.cat([p.grad.flatten() for p in policy.experts.parameters() if p.grad is not None])

        exact = gradient("exact", 0)
        draws = torch.stack([gradient("relaxed", step) for step in range(n_draws)])
        policy.zero_grad()
    mean, size = draws.mean(0), float(exact.norm())
    noise = float((draws - mean).square().sum(1).mean().sqrt())
    return {"bias": float((mean - exact).norm()) / size, "noise": noise / size}
