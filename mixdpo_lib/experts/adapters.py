"""LoRA adapters in chosen blocks of one frozen base."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..base.features import padded, tokenised
from ..base.head import reference_logps, response_logps
from ..base.model import Base
from ..data.pairs import Texts
from ..store import MixDPOError
from .blocks import (
    block_gives,
    block_list,
    chosen_layers,
    entering,
    lower_states,
    turned,
    unless_kept,
)
from .contract import Experts, Voices, check_sharpness_rate
from .leaving import (
    adapter_tensors,
    check_no_sharpness,
    lora_config,
    shared_copy,
    with_equal_adapters,
    with_power,
    with_tensors,
)
from .models import ModelVoices, by_expert, registered


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


def padded_lower(
    lower: Float[np.ndarray, "positions hidden"], spans: Sequence[tuple[int, int]], columns: int
) -> Float[Tensor, "texts columns hidden"]:
    """What was kept of these texts (first position and the one behind the last), one a row, zeros behind."""
    out = torch.zeros(len(spans), columns, lower.shape[1])
    for row, (a, b) in enumerate(spans):
        out[row, : b - a] = torch.from_numpy(np.array(lower[a:b]))
    return out


class AdapterExperts(Experts):
    """K LoRA adapters (Hu et al. 2021, arXiv 2106.09685; by peft) in chosen blocks of one frozen base.

    Expert k is the base with `W x + B_k A_k x` in the linear layers of these blocks; with the adapters off it is the
    reference. Blocks below the first adapted one are the same for all experts: they run once a batch, or once at all
    where their output is kept on disk. All experts start with the same A (drawn once, seed 0) and B = 0: the reference.

    Parameters
    ----------
    base : the frozen language model, see `load_base`.
    n_experts : K >= 1; 1 is plain DPO with an adapter.
    rank : r >= 1 of every adapter; 8 by default.
    blocks : how many of the last blocks, or a list of block numbers from 0; 2 by default.
    target_modules : names of the linear layers, such as ("q_proj", "v_proj"); None: all of a block.
    keep_lower : keep the lower blocks' output on disk (float32: 4 bytes x width for each token of each text) instead of
        computing it at every step.
    sharpness : whether each expert has a number s_k as well, 0 at the start: pi_k is proportional to the adapted model's
        distribution to the power 1 + s_k. Such an expert can be merged, and is no LoRA. `sharpness` is a parameter (K,),
        or None. sharpness_rate : learning rate of s_k as a share of the adapters'; not tuned.

    Raises
    ------
    ValueError : blocks or modules that the base has not (what it has is named).
    """

    def __init__(
        self,
        base: Base,
        n_experts: int = 3,
        rank: int = 8,
        blocks: int | Sequence[int] = 2,
        target_modules: Sequence[str] | None = None,
        keep_lower: bool = True,
        sharpness: bool = False,
        sharpness_rate: float | int = 1.0,
    ) -> None:
        super().__init__(base, n_experts)
        if rank < 1:
            raise ValueError(f"rank={rank}: each adapter needs a rank of at least 1")
        check_sharpness_rate(sharpness_rate)
        chosen, modules = chosen_layers(base, blocks, target_modules)
        self.rank, self.blocks, self.keep_lower = rank, chosen, keep_lower
        self.target_modules, self.sharpness_rate = modules, sharpness_rate
        self._names = [f"expert{k}" for k in range(n_experts)]
        try:
            model = with_equal_adapters(shared_copy(base.model), self.lora_config(), self._names)
        except (ValueError, NotImplementedError, TypeError) as error:  # peft: no such layers
            raise MixDPOError(
                f"{type(base.model).__name__}: no adapters on {', '.join(modules)} ({error}); name other layers by "
                "target_modules=[...], or take HeadExperts"
            ) from error
        tensors = [adapter_tensors(model, name) for name in self._names]
        self._peft = [model]  # in a list: of the modules only the adapters belong to a checkpoint
        self._layers = [
            m for m in model.modules() if hasattr(m, "lora_A") and hasattr(m, "set_adapter")
        ]
        self.adapters = registered(
            {f"{k}.{key}": p for k, own in enumerate(tensors) for key, p in own.items()}
        )
        start = nn.Parameter(torch.zeros(n_experts)) if sharpness else None
        self.register_parameter("sharpness", start)
        self._kept: Tensor | None = None
        gives = block_gives(base.model)
        for block in block_list(self._model)[1][: chosen[0]]:
            block.forward = unless_kept(block.forward, lambda: self._kept, gives)
        self._speaks_as(0)

    sharpness: nn.Parameter | None

    def options(self) -> dict[str, Any]:
        """What makes equal experts but for their parameters."""
        names = ("n_experts", "rank", "blocks", "target_modules", "keep_lower", "sharpness_rate")
        return {n: getattr(self, n) for n in names} | {"sharpness": self.sharpness is not None}

    def parameter_groups(self, rate: float) -> list[dict[str, Any]]:
        """The adapters at the rate, s at `sharpness_rate` of it."""
        groups: list[dict[str, Any]] = [{"params": list(self.adapters.values()), "lr": rate}]
        if self.sharpness is not None:
            groups.append({"params": [self.sharpness], "lr": rate * self.sharpness_rate})
        return groups

    def lora_config(self) -> Any:
        """Of one adapter, as peft takes it."""
        return lora_config(
            self.rank,
            self.target_modules,
            layers_to_transform=list(self.blocks),
            layers_pattern=block_list(self._base.model)[0].rsplit(".", 1)[-1],
            fan_in_fan_out=turned(block_list(self._base.model)[1][self.blocks[0]]),
        )

    @property
    def _model(self) -> Any:
        return self._peft[0].get_base_model()

    def _speaks_as(self, k: int) -> None:
        for layer in self._layers:
            layer.set_adapter([self._names[k]])
        for p in self.adapters.values():  # peft freezes those that are not active
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

    def own(self, k: int) -> dict[str, Tensor]:
        """See `Experts.own`."""
        s = {} if self.sharpness is None else {"sharpness": self.sharpness.data[k]}
        return {name: p.data for name, p in self.tensors(k).items()} | s

    def unmoved(self, k: int) -> bool:
        """See `Experts.unmoved`: B_k = 0 in every layer and s_k = 0."""
        up = [p for name, p in self.tensors(k).items() if "lora_B" in name]
        return self.power(k) == 1 and not any(map(torch.any, up))

    # ------------------------------------------------------------------------------------------------- likelihoods

    def constants(self, texts: Texts) -> AdapterConstants:
        """Tokens, reference log-probabilities and (with keep_lower) the lower blocks' output, from the cache."""
        base = self._base
        ids = tokenised(base, texts)
        offsets = np.concatenate([[0], np.cumsum([len(a) + len(b) for a, b in ids])])
        ref = reference_logps(base, texts)
        lower = None
        if self.keep_lower and self.blocks[0] > 0:
            lower = lower_states(base, self._model, self.blocks[0], ids)
        return AdapterConstants(ids, ref, lower, offsets)

    def batch(
        self, constants: AdapterConstants, pairs: Int[Tensor, "pairs 2"]
    ) -> dict[str, Tensor]:
        """Everything `logps` reads for these pairs; each distinct text is held once."""
        ids, place = torch.unique(pairs, return_inverse=True)
        own = [constants.ids[int(i)] for i in ids]
        batch = padded(own) | {
            "place": place,
            "text_ref_logps": torch.from_numpy(constants.ref)[ids][:, None],
        }
        if constants.lower is not None:
            spans = [tuple(constants.offsets[i : i + 2].tolist()) for i in ids.tolist()]
            batch["lower"] = padded_lower(constants.lower, spans, batch["input_ids"].shape[1])
        return batch

    def text_logps(
        self, batch: dict[str, Tensor], chosen: Bool[Tensor, "texts experts"] | None = None
    ) -> Float[Tensor, "texts experts"]:
        """See `Experts.text_logps`. The lower blocks run once for all experts, or not at all where they are kept."""
        lower = batch.get("lower")
        if lower is None and self.blocks[0] > 0:
            lower = entering(
                self._model, self.blocks[0], batch["input_ids"], batch["attention_mask"]
            )

        def speak(k: int, rows: Tensor | None) -> Tensor:
            self._speaks_as(k)
            if lower is not None:
                own = lower if rows is None else lower[rows]
                self._kept = own.to(self._base.model.dtype)
            power = None if self.sharpness is None else 1 + self.sharpness[k]
            try:
                n = len(batch["input_ids"])
                return response_logps(self._base, self._model, batch, rows, n, power)
            finally:
                self._kept = None

        return by_expert(speak, self.n_experts, batch, chosen)

    def voices(self, chosen: Bool[Tensor, "rows experts"] | None) -> Voices:
        """See `Experts.voices`: each expert that some row chose reads its rows with a cache of its own."""

        def speaking(k: int) -> Any:
            self._speaks_as(k)
            return self._model

        every = range(self.n_experts)
        speakers, powers = [partial(speaking, k) for k in every], [self.power(k) for k in every]
        return ModelVoices([self._base] * self.n_experts, speakers, chosen, powers)

    def power(self, k: int) -> float:
        """1 + s_k; 1 without sharpness."""
        return 1.0 if self.sharpness is None else 1.0 + float(self.sharpness[k].detach())

    def as_adapter(self, k: int) -> Any:
        """See `Experts.as_adapter`; refused where s_k is not 0."""
        check_no_sharpness(k, self.power(k) - 1, "merge(k, folder)")
        return with_tensors(shared_copy(self._base.model), self.lora_config(), self.tensors(k))

    def as_model(self, k: int) -> Any:
        """See `Experts.as_model`: with a head of (1 + s_k) W where s_k is not 0, which a scaled or capped head refuses."""
        model = copy.deepcopy(self._base.model)
        merged = with_tensors(model, self.lora_config(), self.tensors(k)).merge_and_unload()
        return with_power(k, merged, self.power(k))
