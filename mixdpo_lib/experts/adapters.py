"""LoRA adapters in chosen blocks of one frozen base."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..base.features import padded, tokenise
from ..base.head import reference_logps, response_logps
from ..base.model import Base
from ..data.pairs import Texts
from ..store import MixDPOError, cached, progress
from .contract import Experts, Voices
from .leaving import adapter_tensors, lora_config, shared_copy, with_lora
from .models import ModelVoices, by_expert, registered

VERSION = 2


def block_list(model: Any) -> tuple[str, nn.ModuleList]:
    """The transformer blocks of a causal language model and their name inside it.

    Raises
    ------
    MixDPOError : a model without one list of `num_hidden_layers` blocks.
    """
    n = int(model.config.get_text_config().num_hidden_layers)
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == n]
    if not found:
        raise MixDPOError(f"{type(model).__name__}: no list of {n} blocks found; adapters need one")
    return found[0]


def _linear_names(block: nn.Module) -> list[str]:
    """Names of the linear layers of a block, without what is above them, in order."""
    found = [name.rsplit(".", 1)[-1] for name, m in block.named_modules()
             if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"]  # fmt: skip
    return list(dict.fromkeys(found))


class _Enough(Exception):
    """Raised where the lower blocks have said what was asked."""


@torch.no_grad()
def entering(
    model: Any, block: int, input_ids: Int[Tensor, "rows columns"], mask: Int[Tensor, "rows columns"]
) -> Float[Tensor, "rows columns hidden"]:
    """What enters a block of the model (its number from 0), without running that block or those above it."""
    found: list[Tensor] = []

    def stop(_: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        found.append(args[0] if args else options["hidden_states"])
        raise _Enough

    handle = block_list(model)[1][block].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model.base_model(input_ids=input_ids, attention_mask=mask, use_cache=False)
    except _Enough:
        return found[0]
    finally:
        handle.remove()
    raise MixDPOError(f"{type(model).__name__}: block {block} does not run; use IndependentExperts")


@dataclass(frozen=True)
class AdapterConstants:
    """What no adapter changes about a set of texts: tokens, the reference, and (if kept) the lower blocks' output.

    ids : token ids of prompt and response of each text. ref : (texts,) nats. lower : (positions, hidden) float32,
    memory-mapped, or None; text i owns offsets[i] ... offsets[i + 1] - 1, prompt and response together.
    """

    ids: list[tuple[list[int], list[int]]]
    ref: np.ndarray
    lower: np.ndarray | None
    offsets: np.ndarray


class AdapterExperts(Experts):
    """K LoRA adapters (Hu et al. 2021, arXiv 2106.09685; by peft) in chosen blocks of one frozen base.

    Expert k is the base with `W x + B_k A_k x` in the linear layers of these blocks; with the adapters off it is the
    reference. Blocks below the first adapted one are the same for all experts: they run once a batch, or once at all
    where their output is kept on disk.

    Parameters
    ----------
    base : the frozen language model, see `load_base`.
    n_experts : K >= 1; 1 is plain DPO with an adapter.
    rank : r >= 1 of every adapter; 8 by default.
    blocks : how many of the last blocks, or a list of block numbers from 0; 2 by default.
    target_modules : names of the linear layers, such as ("q_proj", "v_proj"); None: all of a block.
    keep_lower : keep the lower blocks' output on disk (float32: 4 bytes x width for each token of each text) instead of
        computing it at every step.

    Raises
    ------
    ValueError : blocks or modules that the base has not (what it has is named).

    Notes
    -----
    All experts start with the same A (drawn once, seed 0) and B = 0, which is the reference.
    """

    def __init__(
        self, base: Base, n_experts: int = 3, rank: int = 8, blocks: int | Sequence[int] = 2,
        target_modules: Sequence[str] | None = None, keep_lower: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(base, n_experts)
        from peft import get_peft_model

        if rank < 1:
            raise ValueError(f"rank={rank}: each adapter needs a rank of at least 1")
        n_blocks = len(block_list(base.model)[1])
        chosen = list(range(n_blocks - blocks, n_blocks)) if isinstance(blocks, int) else sorted(set(blocks))
        if not chosen or not 0 <= chosen[0] <= chosen[-1] < n_blocks:
            raise ValueError(f"blocks={blocks}: {base.name} has {n_blocks} blocks, 0 ... {n_blocks - 1}; give a number "
                             f"from 1 to {n_blocks}, or a list of them")  # fmt: skip
        known = _linear_names(block_list(base.model)[1][chosen[0]])
        unknown = sorted(set(target_modules or ()) - set(known))
        if unknown or (target_modules is not None and not target_modules):
            raise ValueError(
                f"target_modules={target_modules}: {unknown} not in the blocks of {base.name}; possible are {known}"
            )
        self.rank, self.blocks, self.keep_lower = rank, chosen, keep_lower
        self.target_modules = list(target_modules or known)
        config = self.lora_config()
        self._names = [f"expert{k}" for k in range(n_experts)]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = get_peft_model(shared_copy(base.model), config, adapter_name=self._names[0])
            for name in self._names[1:]:
                model.add_adapter(name, config)
        tensors = [adapter_tensors(model, name) for name in self._names]
        with torch.no_grad():
            for other in tensors[1:]:
                for key, value in other.items():
                    value.copy_(tensors[0][key])
        self._peft = [model.eval()]  # in a list: of the modules only the adapters belong to a checkpoint
        self._layers = [m for m in model.modules() if hasattr(m, "lora_A") and hasattr(m, "set_adapter")]
        self.adapters = registered({f"{k}.{key}": p for k, own in enumerate(tensors) for key, p in own.items()})
        self._kept: Tensor | None = None
        for block in block_list(self._model)[1][: chosen[0]]:
            block.forward = self._unless_kept(block.forward)
        self._speaks_as(0)

    def options(self) -> dict[str, Any]:
        """What makes equal experts but for their parameters."""
        names = ("n_experts", "rank", "blocks", "target_modules", "keep_lower")
        return {name: getattr(self, name) for name in names}

    def lora_config(self) -> Any:
        """Of one adapter, as peft takes it."""
        return lora_config(
            self.rank,
            self.target_modules,
            layers_to_transform=list(self.blocks),
            layers_pattern=block_list(self._base.model)[0].rsplit(".", 1)[-1],
            fan_in_fan_out=self._base.model.config.model_type == "gpt2",
        )

    @property
    def _model(self) -> Any:
        return self._peft[0].get_base_model()

    def _unless_kept(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A lower block gives what was kept of the last of them, where something was."""
        return lambda *args, **options: forward(*args, **options) if self._kept is None else self._kept

    def _speaks_as(self, k: int) -> None:
        for layer in self._layers:
            layer.set_adapter([self._names[k]])
        for p in self.adapters.values():  # peft freezes the adapters that are not active: their gradient would be lost
            p.requires_grad_(True)

    def perturb(self, scale: float, generator: torch.Generator) -> None:
        """Symmetry breaking "random_heads": B_k ~ N(0, scale^2), drawn for each expert; A stays."""
        with torch.no_grad():
            for name, p in self.adapters.items():
                if "lora_B" in name:
                    p.copy_(torch.randn(p.shape, generator=generator) * scale)

    def tensors(self, k: int) -> dict[str, nn.Parameter]:
        """The adapter of expert k by the names under which peft saves it."""
        return adapter_tensors(self._peft[0], self._names[k])

    # ------------------------------------------------------------------------------------------------- likelihoods

    def constants(self, texts: Texts) -> AdapterConstants:
        """Tokens, reference log-probabilities and (with keep_lower) the lower blocks' output, from the cache."""
        base = self._base
        ids = [tokenise(base, text) for text in texts.texts]
        offsets = np.concatenate([[0], np.cumsum([len(a) + len(b) for a, b in ids])])
        ref = reference_logps(base, texts)
        if not self.keep_lower or self.blocks[0] == 0:
            return AdapterConstants(ids, ref, None, offsets)

        def build(folder: Path) -> None:
            out = np.lib.format.open_memmap(
                folder / "lower.npy", mode="w+", dtype=np.float32, shape=(int(offsets[-1]), base.hidden_size)
            )
            order = sorted(range(len(ids)), key=lambda i: -len(ids[i][0]) - len(ids[i][1]))
            for start in range(0, len(order), 48):
                rows = order[start : start + 48]
                inputs = padded([ids[i] for i in rows])
                on = (inputs[name].to(base.device) for name in ("input_ids", "attention_mask"))
                states = entering(self._model, self.blocks[0], *on)
                for state, i in zip(states.float().cpu().numpy(), rows, strict=True):
                    out[offsets[i] : offsets[i + 1]] = state[: offsets[i + 1] - offsets[i]]
                progress("lower blocks", start + len(rows), len(order), "texts")
            out.flush()

        folder = cached(
            "lower", VERSION, {"block": self.blocks[0], "base": base.fingerprint}, build, inputs=[texts.key]
        )
        return AdapterConstants(ids, ref, np.load(folder / "lower.npy", mmap_mode="r", allow_pickle=False), offsets)

    def batch(self, constants: AdapterConstants, pairs: Int[Tensor, "pairs 2"]) -> dict[str, Tensor]:
        """Everything `logps` reads for these pairs; each distinct text is held once."""
        ids, place = torch.unique(pairs, return_inverse=True)
        own = [constants.ids[int(i)] for i in ids]
        batch = padded(own) | {"place": place, "text_ref_logps": torch.from_numpy(constants.ref)[ids][:, None]}
        if constants.lower is not None:
            lower = torch.zeros(*batch["input_ids"].shape, self._base.hidden_size)
            for row, i in enumerate(ids.tolist()):
                a, b = constants.offsets[i], constants.offsets[i + 1]
                lower[row, : b - a] = torch.from_numpy(np.array(constants.lower[a:b]))
            batch["lower"] = lower
        return batch

    def text_logps(
        self, batch: dict[str, Tensor], chosen: Bool[Tensor, "texts experts"] | None = None
    ) -> Float[Tensor, "texts experts"]:
        """See `Experts.text_logps`. The lower blocks run once for all experts, or not at all where they are kept."""
        lower = batch.get("lower")
        if lower is None and self.blocks[0] > 0:
            lower = entering(self._model, self.blocks[0], batch["input_ids"], batch["attention_mask"])

        def speak(k: int, rows: Tensor | None) -> Tensor:
            self._speaks_as(k)
            self._kept = None if lower is None else (lower if rows is None else lower[rows]).to(self._base.model.dtype)
            try:
                return response_logps(self._base, self._model, batch, rows, len(batch["input_ids"]))
            finally:
                self._kept = None

        return by_expert(speak, self.n_experts, batch, chosen)

    def voices(self, chosen: Bool[Tensor, "rows experts"] | None) -> Voices:
        """See `Experts.voices`: each expert that some row chose reads its rows with a cache of its own."""

        def speaker(k: int) -> Callable[[], Any]:
            def model() -> Any:
                self._speaks_as(k)
                return self._model

            return model

        return ModelVoices([self._base] * self.n_experts, [speaker(k) for k in range(self.n_experts)], chosen)

    def _wrapped(self, k: int, model: Any) -> Any:
        """`model`, which is the base or a copy of it, wrapped by peft with the adapter of expert k."""
        wrapped = with_lora(model, self.lora_config())
        with torch.no_grad():
            for name, p in adapter_tensors(wrapped, "default").items():
                p.copy_(self.tensors(k)[name])
        return wrapped

    def as_adapter(self, k: int) -> Any:
        """See `Experts.as_adapter`."""
        return self._wrapped(k, shared_copy(self._base.model))

    def as_model(self, k: int) -> Any:
        """See `Experts.as_model`."""
        return self._wrapped(k, copy.deepcopy(self._base.model)).merge_and_unload()
