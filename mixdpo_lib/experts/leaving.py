"""How does an expert leave the mixture? Copies of the base, LoRA around them, and heads of their own."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..base.architecture import logit_map
from ..store import MixDPOError, plain, whole_folder


def shared_copy(model: nn.Module) -> Any:
    """The same modules anew around the same tensors: what is put into the copy does not reach the original."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def lora_config(rank: int, modules: Sequence[str], **options: Any) -> Any:
    """The LoRA configuration of these linear layers; B A is added as it is (alpha = rank)."""
    from peft import LoraConfig

    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        target_modules=list(modules),
        **options,
    )


def with_lora(model: Any, config: Any, name: str = "default") -> Any:
    """`model` wrapped by peft with one fresh adapter of this name."""
    from peft import get_peft_model

    return get_peft_model(model, config, adapter_name=name)


@torch.no_grad()
def with_lora_head(
    model: Any, down: Float[Tensor, "rank hidden"], up: Float[Tensor, "tokens rank"]
) -> Any:
    """`model` wrapped by peft with LoRA on its output head: lora_A = down, lora_B = up.

    Merged into a head that is tied to the embeddings, it would change these too. There it has a bias of zeros, which
    peft adds but refuses to merge into a head without one.

    Raises
    ------
    ValueError : a tied head with a bias, for which peft has no such refusal.
    """
    head = model.get_output_embeddings()
    tied = head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    if tied and getattr(head, "bias", None) is not None:
        raise ValueError(
            f"{type(model).__name__}: its head is tied to the embeddings and has a bias: an adapter on it could be "
            "merged wrongly; use merge(k, folder)"
        )
    name = next(name for name, module in model.named_modules() if module is head)
    wrapped = with_lora(model, lora_config(len(down), [name], lora_bias=tied))
    for name, p in adapter_tensors(wrapped, "default").items():
        if not name.endswith(".bias"):
            p.copy_(down if "lora_A" in name else up)
    return wrapped


def with_equal_adapters(model: Any, config: Any, names: Sequence[str]) -> Any:
    """`model` wrapped by peft with one adapter a name, all with the same start (seed 0)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        wrapped = with_lora(model, config, names[0])
        for name in names[1:]:
            wrapped.add_adapter(name, config)
    first = adapter_tensors(wrapped, names[0])
    with torch.no_grad():
        for name in names[1:]:
            for key, value in adapter_tensors(wrapped, name).items():
                value.copy_(first[key])
    return wrapped.eval()


def with_tensors(model: Any, config: Any, tensors: Mapping[str, Tensor]) -> Any:
    """`model` wrapped by peft with one adapter that holds these tensors, named as peft saves them."""
    wrapped = with_lora(model, config)
    with torch.no_grad():
        for name, p in adapter_tensors(wrapped, "default").items():
            p.copy_(tensors[name])
    return wrapped


def adapter_tensors(peft_model: Any, adapter: str) -> dict[str, nn.Parameter]:
    """The tensors of one adapter by the names under which peft saves them."""
    mark = f".{adapter}."
    named = peft_model.named_parameters()
    return {n.replace(mark, "."): p for n, p in named if mark in n and "lora_" in n}


@torch.no_grad()
def replace_head(model: Any, change: Float[Tensor, "tokens hidden"], factor: float = 1.0) -> Any:
    """`model` with an output head of its own, the old one times `factor` plus `change`; a tied one is untied. In place."""
    head = model.get_output_embeddings()
    new = nn.Linear(
        head.in_features, head.out_features, bias=head.bias is not None, dtype=head.weight.dtype
    )
    new.weight.copy_(factor * head.weight + change.to(head.weight.dtype))
    if head.bias is not None:
        new.bias.copy_(factor * head.bias)
    model.set_output_embeddings(new.requires_grad_(False))
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        config.tie_word_embeddings = False
    model._tied_weights_keys = {}  # noqa: SLF001  (transformers has no other way)
    model.all_tied_weights_keys = {}
    return model


def check_no_sharpness(k: int, sharpness: float, instead: str) -> None:
    """Refuse to write expert k as LoRA where its sharpness is not 0."""
    if sharpness:
        raise ValueError(
            f"expert {k} has the sharpness {sharpness:.3g}, which is of full rank: no LoRA can hold it; use {instead}, "
            "as_causal_lm(), or fit experts with sharpness=False"
        )


def head_as_adapter(
    k: int,
    model: Any,
    down: Float[Tensor, "rank hidden"],
    up: Float[Tensor, "tokens rank"],
    sharpness: float,
) -> Any:
    """Expert k as LoRA on the output head: lora_A = A, lora_B = W B where a token is active and 0 elsewhere.

    Raises
    ------
    ValueError : a sharpness that is not 0, which no LoRA can hold.
    """
    check_no_sharpness(k, sharpness, 'merge(k, folder) (with active="all")')
    return with_lora_head(shared_copy(model), down, up)


def head_as_model(
    k: int,
    model: Any,
    down: Float[Tensor, "rank hidden"],
    up: Float[Tensor, "tokens rank"],
    sharpness: float,
    whole: bool,
) -> Any:
    """Expert k as a plain model with the head (1 + s) W + W B A; a head that was tied to the embeddings is untied.

    whole : all tokens are active, and the model neither scales nor caps its head's output.

    Raises
    ------
    ValueError : a sharpness that is not 0, and not `whole`: no head says that.
    """
    if sharpness and not whole:
        raise ValueError(
            f"expert {k} has the sharpness {sharpness:.3g}, and not all tokens are active or the model scales or caps its "
            "head's output: no plain head says the same; use as_causal_lm(), or fit with "
            'HeadExperts(..., sharpness=False) or, where nothing is scaled or capped, active="all"'
        )
    return replace_head(copy.deepcopy(model), up @ down, 1 + sharpness)


def with_power(k: int, model: Any, power: float) -> Any:
    """`model` with its head times `power`, 1 + s of expert k, in place; untouched for 1.

    Raises
    ------
    ValueError : the model scales or caps its head's output, so that no plain head says the same.
    """
    if power == 1:
        return model
    if logit_map(model.config.get_text_config()) is not None:
        raise ValueError(
            f"expert {k} has the sharpness {power - 1:.3g}, and {type(model).__name__} scales or caps its head's output: no "
            "plain head says the same; use as_causal_lm(), or fit experts with sharpness=False"
        )
    head = model.get_output_embeddings()
    return replace_head(model, torch.zeros_like(head.weight), power)


@torch.no_grad()
def write_adapter(experts: Any, k: int, folder: str | Path) -> None:
    """See `Experts.export_adapter`."""
    model = experts.as_adapter(k)
    model.peft_config["default"].base_model_name_or_path = experts.base[0].name
    with _place(experts, k, folder) as place:
        model.save_pretrained(str(place), save_embedding_layers=False)


@torch.no_grad()
def write_model(experts: Any, k: int, folder: str | Path) -> None:
    """See `Experts.merge`."""
    model = experts.as_model(k)
    with _place(experts, k, folder) as place:
        model.save_pretrained(str(place))
        experts.tokenizer(k).save_pretrained(str(place))


@contextmanager
def _place(experts: Any, k: int, folder: str | Path) -> Iterator[Path]:
    """For what is made of expert k; `mixdpo.json` in it says of which expert, family and base that is."""
    target = Path(folder).expanduser().resolve()
    for base in (experts.base[0], *experts.bases):
        if base.folder and target == Path(base.folder).resolve():
            raise MixDPOError(
                f"{folder}: found the base of these experts, which would be lost; give another name"
            )
    own = {
        "expert": k,
        "experts": experts.describe(),
        "base": experts.base[0].name,
        "base_fingerprint": experts.base[0].fingerprint,
    }
    with whole_folder(folder, mark="mixdpo.json") as place:
        yield place
        (place / "mixdpo.json").write_text(json.dumps(own, indent=1, default=plain) + "\n")
