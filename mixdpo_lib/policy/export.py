"""How does an expert leave the mixture? As a PEFT adapter of the plain base, or as a plain transformers model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..experts.adapters import AdapterExperts, adapter_tensors, lora_config
from ..experts.contract import Experts
from ..experts.heads import HeadExperts
from ..experts.models import shared_copy
from ..experts.whole import IndependentExperts
from ..store import whole_folder


def _check_number(experts: Experts, k: int) -> None:
    if not 0 <= k < experts.n_experts:
        raise ValueError(f"k={k}: expected an expert from 0 to {experts.n_experts - 1}")


def _head_name(model: Any) -> str:
    head = model.get_output_embeddings()
    return next(name for name, module in model.named_modules() if module is head)


def _with_adapter(experts: AdapterExperts, k: int, model: Any) -> Any:
    """`model`, which is the base or a copy of it, wrapped by peft with the adapter of expert k."""
    from peft import get_peft_model

    base = experts.base[0]
    wrapped = get_peft_model(model, lora_config(base, experts.rank, experts.blocks, experts.target_modules))
    for name, p in adapter_tensors(wrapped, "default").items():
        p.copy_(experts.tensors(k)[name])
    return wrapped


def _with_head(experts: HeadExperts, k: int, model: Any) -> Any:
    """`model`, which is the base or a copy of it, wrapped by peft with the head of expert k as an adapter."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=experts.rank, lora_alpha=experts.rank, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM",
        target_modules=[_head_name(model)],
    )  # fmt: skip
    wrapped = get_peft_model(model, config)
    down, up = experts.head_correction(k)
    for name, p in adapter_tensors(wrapped, "default").items():
        p.copy_(down if "lora_A" in name else up)
    return wrapped


@torch.no_grad()
def export_adapter(experts: Experts, k: int, folder: str | Path) -> None:
    """Write expert k as an adapter that `peft.PeftModel.from_pretrained(base, folder)` reads; the same logits.

    A head `W h + 1[v active] W B A h` is LoRA on the output head, with lora_A = A and lora_B = W B where v is active
    and 0 elsewhere (exact, float32).

    Raises
    ------
    ValueError : no expert k; `IndependentExperts` (whole models: use `merge`).
    """
    _check_number(experts, k)
    if isinstance(experts, IndependentExperts):
        raise ValueError("IndependentExperts are whole models, no adapters: use merge(k, folder)")
    if not isinstance(experts, (AdapterExperts, HeadExperts)):
        raise ValueError(f"{type(experts).__name__} change no model: they have no adapter")
    base = experts.base[0]
    plain = shared_copy(base.model)
    model = _with_adapter(experts, k, plain) if isinstance(experts, AdapterExperts) else _with_head(experts, k, plain)
    model.peft_config["default"].base_model_name_or_path = base.name
    with whole_folder(folder) as place:
        model.save_pretrained(str(place), save_embedding_layers=False)


@torch.no_grad()
def merged_model(experts: Experts, k: int) -> Any:
    """Expert k as a plain transformers model with weights of its own; a tied head that was changed is untied."""
    _check_number(experts, k)
    base = experts.base[0]
    if isinstance(experts, IndependentExperts):
        return copy.deepcopy(experts.model(k)).requires_grad_(False)
    model = copy.deepcopy(base.model)
    if isinstance(experts, AdapterExperts):
        return _with_adapter(experts, k, model).merge_and_unload()
    if not isinstance(experts, HeadExperts):
        raise ValueError(f"{type(experts).__name__} change no model: there is nothing to merge")
    down, up = experts.head_correction(k)
    head = model.get_output_embeddings()
    new = nn.Linear(head.in_features, head.out_features, bias=head.bias is not None, dtype=head.weight.dtype)
    new.weight.copy_(head.weight + (up @ down).to(head.weight.dtype))
    if head.bias is not None:
        new.bias.copy_(head.bias)
    model.set_output_embeddings(new.requires_grad_(False))
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        config.tie_word_embeddings = False
    model._tied_weights_keys = {}
    model.all_tied_weights_keys = {}
    return model


def merge(experts: Experts, k: int, folder: str | Path) -> None:
    """Write expert k as a plain checkpoint (safetensors, configuration, tokenizer) that transformers loads alone."""
    model = merged_model(experts, k)
    tokenizer = (experts.bases[k] if isinstance(experts, IndependentExperts) else experts.base[0]).tokenizer
    with whole_folder(folder) as place:
        model.save_pretrained(str(place))
        tokenizer.save_pretrained(str(place))
