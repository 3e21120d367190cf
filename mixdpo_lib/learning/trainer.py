"""A step of learning and its checkpoint: `MixDPOTrainer` on `transformers.Trainer`."""

from __future__ import annotations

import math
import os
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from ..data.messages import Prompt
from ..data.pairs import Pairs
from ..elbo import certified_gap, correct
from ..policy.mixture import MixturePolicy
from ..store import curve, progress, writing_to
from .checkpoints import Checkpoints
from .config import EARLY, FitConfig, Monitor
from .learner import Learner
from .routing import dead_in_routing, routed_share

WARMUP = 0.05  # share of the steps in which the rate rises to its full size


def row_groups(data: Pairs, batch_by: str) -> list[list[int]]:
    """Rows that stay together in a batch: each alone, or all of a prompt."""
    if batch_by == "pair":
        return [[row] for row in range(len(data))]
    groups: dict[Prompt, list[int]] = {}
    for row, prompt in enumerate(data.prompts):
        groups.setdefault(prompt, []).append(row)
    return list(groups.values())


def steps_a_pass(data: Pairs, config: FitConfig) -> int:
    """Steps in which every group of the training pairs is seen once."""
    n_groups = len(row_groups(data, config.batch_by))
    return math.ceil(n_groups / (config.batch_size * config.accumulate))


def _arguments(
    config: FitConfig, folder: Path, rate: float, max_steps: int, save_steps: int | None, cpu: bool
) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=config.batch_size * config.accumulate,
        learning_rate=rate,
        max_steps=max_steps,
        warmup_steps=round(WARMUP * max_steps),
        lr_scheduler_type="linear",
        seed=config.seed,
        data_seed=config.seed,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        save_strategy="steps" if save_steps else "no",
        save_steps=save_steps or 500,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        max_grad_norm=1.0,
        use_cpu=cpu,
        label_names=[],
        bf16=config.bf16,
        ddp_find_unused_parameters=True,
        ddp_broadcast_buffers=False,
    )


def snapshot_name(step: int) -> str:
    """The file of the parameters of an evaluated step."""
    return f"snapshot-{step}.safetensors"


class MixDPOTrainer(Trainer):
    """Stochastic variational EM on `transformers.Trainer`: batches of pairs, E-step from the table, M-step by gradient.

    Checkpoints hold the experts, the gate and the table (safetensors), not the frozen base, and resume exactly. They
    are written twice a pass where `checkpoints` are given; `folder` is for what transformers writes besides.
    """

    def __init__(
        self,
        policy: MixturePolicy,
        data: Pairs,
        config: FitConfig,
        folder: Path,
        validation: Pairs | None = None,
        checkpoints: Checkpoints | None = None,
    ) -> None:
        self.checkpoints = checkpoints
        self.policy, self.data, self.config, self.folder = policy, data, config, folder
        self.unit, self.names = (
            (torch.arange(len(data)), []) if config.latent == "pair" else data.units(config.unit)
        )
        self.groups = row_groups(data, config.batch_by)
        self.pass_steps = steps_a_pass(data, config)
        planned = max(1, round(config.passes * self.pass_steps))
        max_steps = max(planned, config.min_steps)
        self.steps_per_pass = self.pass_steps if max_steps == planned else max_steps / config.passes
        self.losses: list[float] = []
        self.validation, self.validation_unit = validation, self._units_of(validation)
        base_rate = config.learning_rate or policy.experts.rates[config.optimizer]
        # an expert owns about 1/K of the pairs, and so 1/K of the gradient; AdamW makes up for that by itself
        rate = base_rate * (policy.experts.n_sets if config.optimizer == "sgd" else 1)
        cpu = policy.base is None or policy.base.model.device.type == "cpu"
        save_steps = max(1, self.pass_steps // 2) if checkpoints else None
        arguments = _arguments(config, folder, rate, max_steps, save_steps, cpu)
        learner = Learner(policy, data, self.unit, config, self.steps_per_pass)
        groups = [*policy.experts.parameter_groups(rate), *learner.inference.parameter_groups()]
        if config.optimizer == "adamw":
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        else:
            optimizer = torch.optim.SGD(groups, momentum=0.9)
        self.here, self.processes = arguments.process_index, arguments.world_size
        self.n_parts = self.processes * config.accumulate
        if learner.inference.parameter_groups() and self.n_parts > 1:
            raise ValueError(
                f"inference={config.inference} with accumulate={config.accumulate} and {self.processes} processes: "
                "expected one of each, or inference=Exact()"
            )
        self._describe, self._constants = learner.inference.describe, policy.constants(data.texts)
        self.watch = Watch(self)
        super().__init__(
            model=learner,
            args=arguments,
            train_dataset=self.groups,
            data_collator=self._collate,
            callbacks=[self.watch],
            optimizers=(optimizer, None),
        )
        self.remove_callback(PrinterCallback)

    def _units_of(self, validation: Pairs | None) -> Tensor | None:
        """Training unit of each validation pair; -1 for one without training pairs, which the gate must know."""
        if validation is None or self.config.latent == "pair":
            return None
        place = {name: i for i, name in enumerate(self.names)}
        ids, names = validation.units(self.config.unit)
        unknown = [n for n in names if n not in place]
        if unknown and not self.policy.gate.reads:
            raise ValueError(
                f"validation: units {unknown[:3]} have no training pairs; expected units with some, or a gate that "
                "reads what is known of them"
            )
        return torch.tensor([place.get(n, -1) for n in names])[ids]

    def _collate(self, groups: list[list[int]]) -> dict[str, Any]:
        """Of a step's groups the parts of this process: part i has every n-th group from i."""
        total, parts = sum(map(len, groups)), []
        for i in range(self.here, self.n_parts, self.processes):
            own = (
                groups[i :: self.n_parts] or groups[:1]
            )  # processes keep step: one without a group has a share of 0
            row = torch.tensor([row for group in own for row in group])
            share = len(row) / total if i < len(groups) else 0.0
            index = self.data.index[row]
            part = {
                "row": row,
                "scale": share * self.processes,
                **self.policy.experts.batch(self._constants, index),
            }
            described = self._describe(index)
            parts.append(part if described is None else part | {"described": described})
        return {"parts": parts}

    def get_train_dataloader(self) -> Any:
        """Every process is given the same steps, in the order of a single one, and takes its part of each."""
        if self.args.world_size == 1:
            return super().get_train_dataloader()
        groups: Any = self.groups
        loader = torch.utils.data.DataLoader(
            groups,
            batch_size=self.args.per_device_train_batch_size,
            collate_fn=self.data_collator,
            sampler=self._get_train_sampler(),
        )
        return prepare_data_loader(
            loader,
            num_processes=1,
            process_index=0,
            use_seedable_sampler=True,
            data_seed=self.args.data_seed,
        )

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
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

    def take_state(self, checkpoint: Path, state: TrainerState) -> None:
        """Be where a fit ended, without a step."""
        self._load_from_checkpoint(str(checkpoint))
        self.state = state

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Written aside, sealed, and put in place in one step."""
        if self.checkpoints is None:
            return
        with self.checkpoints.writing():
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                names = [snapshot_name(step) for step in self.watch.needed(self.state)]
                self.checkpoints.put_in_place(self.state.global_step, names)
        self.accelerator.wait_for_everyone()

    @property
    def learner(self) -> Learner:
        """What is trained, without what accelerate puts around it."""
        return self.accelerator.unwrap_model(self.model)

    def measure(self) -> dict[str, Any]:
        """The bound by term, accuracy and the validation likelihood.

        With `evaluate_training` the table is filled by a full pass before; without, what it has last seen counts.
        """
        learner, policy, config = self.learner, self.policy, self.config
        table = learner.table
        sets = [self.data, self.validation] if config.evaluate_training else [self.validation]
        seen = [d.index for d in sets if d is not None and d.texts is self.data.texts]
        rewards = (
            policy.text_rewards(self.data.texts, torch.unique(torch.cat(seen))) if seen else None
        )
        if config.evaluate_training:
            table.fill(policy.log_sigma(self.data, rewards))
        log_w = learner.log_w()
        row: dict[str, Any] = table.terms(log_w, 1.0) | {"lapse": policy.lapse}
        if not all(bool(p.isfinite().all()) for p in policy.parameters() if p.requires_grad):
            row["elbo"] = math.nan  # of no policy, whatever the table has last seen
        if config.routing.top_s is not None:  # of the table: the mean over its rows, nats a latent
            unit = table.unit if config.latent == "unit" else None
            gap = certified_gap(
                table.read(), log_w, config.routing.top_s, unit, lapse=policy.lapse, validate=False
            )
            row["certified_gap"] = float(gap.mean())
            share = routed_share(log_w, config.routing.top_s)
            row["dead_experts"] = len(dead_in_routing(share))
        row |= learner.inference.measure(log_w, self.data.index)
        log_q = table.log_q(log_w)
        row["train_accuracy"] = float(
            correct((table.read() + log_q[table.unit]).logsumexp(1).exp()).mean()
        )
        if self.validation is not None:
            same = self.validation.texts is self.data.texts
            loglik = policy.loglik(self.validation, rewards if same else None)
            with torch.no_grad():
                weights = policy.log_w(self.validation)
            if (
                self.validation_unit is not None
            ):  # a unit with training pairs by them, another one by the gate alone
                place = self.validation_unit
                weights = torch.where(place[:, None] < 0, weights, log_q.cpu()[place])
            prediction = (loglik + weights).logsumexp(1)
            row["validation_loglik"] = float(prediction.mean())
            row["validation_accuracy"] = float(correct(prediction.exp()).mean())
        return row


class Watch(TrainerCallback):
    """Progress, the history, snapshots, early stopping."""

    def __init__(self, trainer: MixDPOTrainer) -> None:
        self.trainer, self.start = trainer, time.monotonic()
        self.snapshots: dict[int, dict[str, Tensor]] = {}
        self.monitor = Monitor(trainer.config.stop.patience, trainer.config.stop.min_usage)
        self.stop_reason: str | None = None
        self.course = ""  # of the bound so far, as progress shows it

    def look(self, state: TrainerState) -> None:
        """One row of the history (kept in the trainer's state, so in checkpoints too) and one snapshot."""
        trainer = self.trainer
        row, step = trainer.measure(), state.global_step
        row["step"] = step
        row["pairs_seen"] = round(step / trainer.pass_steps * len(trainer.data))
        row["seconds"] = time.monotonic() - self.start
        row["responsibility_temperature"] = trainer.learner.temperature()
        state.log_history.append(row)
        bounds = [row["elbo"] for row in state.log_history if "elbo" in row]
        self.course = f", bound {curve(bounds)}" if len(bounds) > 1 else ""
        self.snapshots[step] = {
            k: v.detach().clone() for k, v in trainer.policy.state_dict().items()
        }
        if trainer.checkpoints and trainer.args.should_save:
            self._write(trainer.checkpoints.folder / snapshot_name(step), self.snapshots[step])
        self.judge(row)
        if trainer.config.keep == "best":
            for old in set(self.snapshots) - {
                step,
                self.best_step(state),
            }:  # whole models are large
                del self.snapshots[old]

    def best_step(self, state: TrainerState) -> int:
        """The step of the likeliest evaluation so far."""
        rows = [row for row in state.log_history if "elbo" in row]
        return int(rows[max(self.monitor.best_step, 0)]["step"])

    @staticmethod
    def _write(path: Path, tensors: dict[str, Tensor]) -> None:
        partial = path.with_name(f".{path.name}.part")
        with writing_to(path.parent):
            try:
                save_file({k: v.contiguous() for k, v in tensors.items()}, partial)
                os.replace(partial, path)
            finally:
                partial.unlink(missing_ok=True)

    def judge(self, row: dict[str, Any]) -> None:
        """Let the monitor see one row of the history."""
        usage = [value for name, value in row.items() if name.startswith("usage_")]
        score = row.get("validation_loglik", row["elbo"])
        early = not self.due(int(row["step"]))
        self.stop_reason = self.monitor.step(score, usage, row["elbo"], early)

    def due(self, step: int) -> bool:
        """Whether this step is evaluated by the plan, and not as a further, early one."""
        trainer = self.trainer
        every = max(1, int(trainer.steps_per_pass / trainer.config.evaluations_per_pass + 1e-9))
        return step % every == 0 or step == trainer.args.max_steps

    def needed(self, state: TrainerState) -> list[int]:
        """Steps whose snapshots a checkpoint needs: all evaluated ones with keep="all", else the best and the last."""
        every = [int(row["step"]) for row in state.log_history if "elbo" in row]
        if self.trainer.config.keep == "all":
            return sorted(set(every))
        return sorted({every[-1], self.best_step(state)})

    def recall(self, state: TrainerState) -> str | None:
        """What a checkpoint knows of earlier evaluations; returns the reason for which the fit has ended, if any."""
        stop = self.trainer.config.stop
        self.monitor = Monitor(stop.patience, stop.min_usage)
        for row in state.log_history:
            if "elbo" in row:
                self.judge(row)
        folder = self.trainer.checkpoints.folder if self.trainer.checkpoints else Path()
        self.snapshots = {s: load_file(folder / snapshot_name(s)) for s in self.needed(state)}
        return self.stop_reason

    def on_train_begin(self, args, state: TrainerState, control, **kwargs):  # type: ignore[override]
        """The first evaluation, unless a checkpoint knows of earlier ones."""
        if not state.log_history:
            self.look(state)
        control.should_training_stop = bool(self.stop_reason)

    def on_step_end(self, args, state: TrainerState, control, **kwargs):  # type: ignore[override]
        """Progress, and an evaluation where one is due."""
        trainer = self.trainer
        stretched = trainer.validation is not None and trainer.steps_per_pass > trainer.pass_steps
        stage = f"fit K={trainer.policy.n_experts} {trainer.config.latent}"
        text = f"steps, loss {trainer.losses[-1]:.4f}{self.course}"
        progress(stage, state.global_step, state.max_steps, text)
        if self.due(state.global_step) or (stretched and state.global_step in EARLY):
            self.look(state)
            if self.stop_reason:
                progress(stage, state.global_step, state.global_step, self.stop_reason)
                control.should_training_stop = True
                control.should_save = trainer.checkpoints is not None
