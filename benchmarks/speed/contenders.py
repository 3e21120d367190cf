"""How long does one contender take for a step? A process of its own, which steps when it is told to.

    python -m benchmarks.speed.contenders NAME FILE [--batch 8] [--device cpu]

It answers by lines of JSON; a line "n" on its standard input asks for n steps. See throughput.py, which asks.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from benchmarks.speed.measuring import peak_gib, wait_for

OURS = {
    "heads, K = 1": {"n_experts": 1},
    "heads, K = 3": {"n_experts": 3},
    "adapter, kept lower blocks": {"keep_lower": True},
    "adapter": {"keep_lower": False},
}
TRL = {"TRL, full": None, "TRL, LoRA in all blocks": 0, "TRL, LoRA in the last two": 2}
LORA = {"rank": 8, "target_modules": ("q_proj", "v_proj")}
ENDLESS = 1_000_000  # steps


def say(**what: Any) -> None:
    """A line to whoever asks."""
    print("@" + json.dumps(what), file=sys.__stdout__, flush=True)


class Turns(TrainerCallback):
    """Lets a trainer make the steps that are asked for, and says how long each took, its data included."""

    def __init__(self, device: str) -> None:
        self.device, self.left, self.start = device, 0, 0.0

    def ask(self) -> bool:
        """Wait for the next number of steps; False: there is none."""
        line = sys.stdin.readline().strip()
        self.left, self.start = int(line or 0), time.perf_counter()
        self.first = self.left
        return self.left > 0

    def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        """Count; when all are done say so and wait."""
        self.left -= 1
        if self.left == 0:
            wait_for(self.device)
            seconds = (time.perf_counter() - self.start) / self.first
            say(seconds=seconds, peak_gib=peak_gib(self.device))
            control.should_training_stop = not self.ask()


def lora(model: Any, last: int) -> Any:
    """LoRA of rank 8 on q and v, in the last so many blocks (0: in all)."""
    from peft import LoraConfig

    n = int(model.config.num_hidden_layers)
    return LoraConfig(
        r=LORA["rank"],
        lora_alpha=LORA["rank"],
        target_modules=list(LORA["target_modules"]),
        layers_to_transform=list(range(n - last, n)) if last else None,
        task_type="CAUSAL_LM",
    )


def trl_model(folder: str, device: str) -> tuple[Any, Any]:
    """Model and tokenizer as TRL takes them, float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False
    )
    return model.to(device), tokenizer


def trl_trainer(
    name: str,
    loaded: tuple[Any, Any],
    rows: list[dict[str, str]],
    batch: int,
    scratch: str,
    held_out: list[dict[str, str]] | None = None,
    **options: Any,
) -> Any:
    """TRL's trainer of DPO at its fastest: float32, no checkpointing of activations, reference precomputed."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    model, tokenizer = loaded
    choices = {
        "beta": 0.1,
        "learning_rate": 1e-4,
        "max_steps": ENDLESS,
        "per_device_train_batch_size": batch,
        "per_device_eval_batch_size": 8,
        "precompute_ref_log_probs": True,
        "gradient_checkpointing": False,
        "bf16": False,
        "max_length": None,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": [],
        "use_cpu": model.device.type == "cpu",
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        **options,
    }
    last = TRL[name]
    return DPOTrainer(
        model,
        args=DPOConfig(output_dir=scratch, **choices),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=None if held_out is None else Dataset.from_list(held_out),
        processing_class=tokenizer,
        peft_config=None if last is None else lora(model, last),
    )


def own_trainer(
    name: str, base_name: str, rows: list[dict[str, str]], active: list[int], batch: int,
    scratch: str, device: str,
) -> Any:  # fmt: skip
    """The project's trainer, as `fit` runs it, without evaluations on the way."""
    import mixdpo_lib as mx
    from benchmarks.speed.material import as_pairs, head_policy
    from mixdpo_lib.gates.weights import LearnedWeights
    from mixdpo_lib.learning.config import FitConfig
    from mixdpo_lib.learning.trainer import MixDPOTrainer

    base, pairs = mx.load_base(base_name, device=device), as_pairs(rows)
    options = OURS[name]
    if "n_experts" in options:
        experts: Any = head_policy(base, options["n_experts"], pairs, active).experts
    else:
        experts = mx.AdapterExperts(base, 1, blocks=2, **LORA, **options)
    policy = mx.MixturePolicy(experts, LearnedWeights(experts.n_experts))
    config = FitConfig(
        latent="pair",
        batch_by="pair",
        batch_size=batch,
        passes=ENDLESS * batch / len(rows),
        evaluations_per_pass=1e-6,
        evaluate_training=False,
    )
    return MixDPOTrainer(policy, pairs, config, Path(scratch))


def main() -> None:
    """Get ready, say so, and step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=[*OURS, *TRL])
    parser.add_argument("file", type=Path)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    chosen = parser.parse_args()
    given = json.loads(chosen.file.read_text(encoding="utf-8"))
    sys.stdout = sys.stderr  # what libraries print is no answer
    needs = "trl" if chosen.name in TRL else "peft"
    if importlib.util.find_spec(needs) is None and not chosen.name.startswith("heads"):
        say(absent=f"{needs} not installed")
        return
    with tempfile.TemporaryDirectory() as scratch:
        start = time.perf_counter()
        if chosen.name in TRL:
            loaded = trl_model(given["folder"], chosen.device)
            trainer = trl_trainer(chosen.name, loaded, given["rows"], chosen.batch, scratch)
        else:
            trainer = own_trainer(
                chosen.name, given["base"], given["rows"], given["active"], chosen.batch, scratch,
                chosen.device,
            )  # fmt: skip
        turns = Turns(chosen.device)
        trainer.add_callback(turns)
        say(ready=time.perf_counter() - start)
        if turns.ask():
            trainer.train()


if __name__ == "__main__":
    main()
