"""One expert against TRL's own trainer of DPO: the same pairs, the same start, the loss of every step."""

import pytest
import torch
from datasets import Dataset
from tiny import preference_rows
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

from mixdpo_lib.data.pairs import Pairs
from mixdpo_lib.experts.adapters import AdapterExperts
from mixdpo_lib.experts.leaving import adapter_tensors
from mixdpo_lib.experts.whole import IndependentExperts
from mixdpo_lib.gates.weights import FixedWeights
from mixdpo_lib.policy.mixture import MixturePolicy

STEPS, BETA, RATE, EPSILON = 20, 0.5, 2e-3, 1e-3


def trl_losses(model, config, tokenizer, rows, folder, start=None):
    """Losses of TRL's DPO, all pairs in every step, by AdamW at a constant rate."""
    arguments = DPOConfig(
        output_dir=str(folder),
        beta=BETA,
        max_steps=STEPS,
        per_device_train_batch_size=len(rows),
        learning_rate=RATE,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        weight_decay=0.0,
        adam_epsilon=EPSILON,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        gradient_checkpointing=False,
        max_length=None,
        disable_dropout=True,
    )
    trainer = DPOTrainer(
        model, args=arguments, train_dataset=rows, processing_class=tokenizer, peft_config=config
    )
    if start is not None:
        with torch.no_grad():
            for name, p in adapter_tensors(trainer.model, "default").items():
                p.copy_(start[name])
    seen = []
    loss_of = trainer.compute_loss

    def compute_loss(*args, **options):  # the log rounds
        loss = loss_of(*args, **options)
        seen.append(float((loss[0] if isinstance(loss, tuple) else loss).detach()))
        return loss

    trainer.compute_loss = compute_loss
    trainer.train()
    return seen


def own_losses(experts, data):
    policy = MixturePolicy(experts, FixedWeights.uniform(1), beta=BETA)
    batch = experts.batch(policy.constants(data.texts), data.index)
    optimizer = torch.optim.AdamW(experts.parameters(), lr=RATE, eps=EPSILON, weight_decay=0.0)
    losses = []
    for _ in range(STEPS):
        loss = -policy.batch_loglik(batch).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("family", ["adapter", "independent"])
def test_one_expert_learns_as_trl_does(tiny_base, tmp_path, family):
    rows = preference_rows(8).map(lambda _: {"ended": True})  # TRL ends every answer
    data = Pairs.of(rows)
    tokenizer = tiny_base.tokenizer
    tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(tiny_base.name, dtype=torch.float32)
    answers = (
        "chosen",
        "rejected",
    )  # the tokenizer splits at spaces, and TRL joins prompt and answer first
    given = Dataset.from_list(
        [{"prompt": row["prompt"], **{a: " " + row[a] for a in answers}} for row in rows]
    )
    if family == "adapter":
        experts = AdapterExperts(tiny_base, 1, rank=4, blocks=1)
        config, start = experts.lora_config(), dict(experts.tensors(0))
    else:
        experts, config, start = IndependentExperts([tiny_base]), None, None
    other = torch.tensor(
        trl_losses(model, config, tokenizer, given, tmp_path, start), dtype=torch.float64
    )
    own = torch.tensor(own_losses(experts, data), dtype=torch.float64)
    assert len(other) == STEPS and float(own[-1]) < 0.66
    assert float(((own - other) / other).abs().max()) < 1e-5
