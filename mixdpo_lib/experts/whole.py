"""Experts that are whole models."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..base.features import padded, tokenised
from ..base.head import reference_logps, response_logps
from ..base.model import Base, need_memory
from ..data.pairs import Texts
from .contract import Experts, Voices
from .models import ModelVoices, by_expert, kinds, registered


class IndependentExperts(Experts):
    """K whole models, each trained in all its parameters and with a reference of its own, which may differ.

    Expert k starts as a copy of `bases[k]`, which stays frozen as its reference. A gate of prompts reads the states of
    the first of them.

    Parameters
    ----------
    bases : one `Base` an expert; the same one may stand several times. Tokenizers may differ: each expert reads texts
        in its own tokens (the posterior-weighted token form then has no meaning, and is refused).

    Raises
    ------
    MixDPOError : less free memory than the weights of K models need (what is needed is named); `fit` asks for what
        training needs besides.
    """

    rates = {"adamw": 2e-5, "sgd": 1e-3}

    def __init__(self, bases: Sequence[Base]) -> None:
        if not bases:
            raise ValueError(
                "bases: found none, expected one for each expert; the same one may stand several times"
            )
        super().__init__(bases[0], len(bases))
        size = sum(p.numel() for base in bases for p in base.model.parameters())
        what = f"{len(bases)} models of {size / 1e6:.1f} M parameters together"
        need_memory(4 * size, what, bases[0].device)
        self.bases, self.kinds = list(bases), kinds(bases)
        self._models = [copy.deepcopy(base.model).requires_grad_(True).eval() for base in bases]
        named = {
            f"{k}.{n}": p
            for k, model in enumerate(self._models)
            for n, p in model.named_parameters()
        }
        self.models = registered(named)

    def options(self) -> dict[str, Any]:
        """What makes equal experts but for their parameters."""
        return {
            "bases": [base.name for base in self.bases],
            "fingerprints": [base.fingerprint for base in self.bases],
        }

    @classmethod
    def from_options(
        cls, options: Mapping[str, Any], find_base: Callable[..., Base]
    ) -> IndependentExperts:
        """Copies of the bases of these names, which must be the ones that the experts were trained from."""
        return cls(
            [find_base(*one) for one in zip(options["bases"], options["fingerprints"], strict=True)]
        )

    def own(self, k: int) -> dict[str, Tensor]:
        """See `Experts.own`."""
        return {name: p.data for name, p in self._models[k].named_parameters()}

    def of_number(self, parts: Sequence[tuple[Experts, int]]) -> Experts:
        """Copies of the bases that these experts started from."""
        found: list[tuple[Any, int]] = list(parts)
        return IndependentExperts([experts.bases[k] for experts, k in found])

    def model(self, k: int) -> Any:
        """The model of expert k (transformers)."""
        return self._models[k]

    def perturb(self, scale: float, generator: torch.Generator) -> None:
        """Symmetry breaking "random_heads": N(0, scale^2) is added to each expert's last normalisation weights."""
        with torch.no_grad():
            for model in self._models:
                last = [p for p in model.base_model.parameters() if p.dim() == 1][-1]
                last.add_(torch.randn(last.shape, generator=generator) * scale)

    def unmoved(self, k: int) -> bool:
        """See `Experts.unmoved`: every weight is that of its base; the first one that is not ends the search."""
        both = zip(self._models[k].parameters(), self.bases[k].model.parameters(), strict=True)
        return all(torch.equal(own, base.to(own.device)) for own, base in both)

    def constants(self, texts: Texts) -> tuple[list[list[tuple[list[int], list[int]]]], np.ndarray]:
        """For each expert the token ids of every text; (texts, K) the log-probabilities of its reference, nats."""
        ids: list[list[tuple[list[int], list[int]]]] = []
        ref = np.empty((len(texts), self.n_experts), np.float32)
        for k, kind in enumerate(self.kinds):
            if kind < k:
                ids.append(ids[kind])
                ref[:, k] = ref[:, kind]
                continue
            base = self.bases[k]
            ids.append(tokenised(base, texts))
            ref[:, k] = reference_logps(base, texts)
        return ids, ref

    def batch(self, constants: Any, pairs: Int[Tensor, "pairs 2"]) -> dict[str, Tensor]:
        """Everything `logps` reads for these pairs; each distinct text is held once a tokenizer."""
        tokens, ref = constants
        ids, place = torch.unique(pairs, return_inverse=True)
        batch = {"place": place, "text_ref_logps": torch.from_numpy(ref)[ids]}
        for kind in set(self.kinds):
            own = padded([tokens[kind][int(i)] for i in ids])
            batch |= {f"{name}_{kind}": value for name, value in own.items()}
        return batch

    def text_logps(
        self, batch: dict[str, Tensor], chosen: Bool[Tensor, "texts experts"] | None = None
    ) -> Float[Tensor, "texts experts"]:
        """See `Experts.text_logps`."""

        def speak(k: int, rows: Tensor | None) -> Tensor:
            names = ("input_ids", "attention_mask", "column", "target", "segment")
            inputs = {name: batch[f"{name}_{self.kinds[k]}"] for name in names}
            return response_logps(
                self.bases[k], self._models[k], inputs, rows, len(inputs["input_ids"])
            )

        return by_expert(speak, self.n_experts, batch, chosen)

    def voices(self, chosen: Bool[Tensor, "rows experts"] | None) -> Voices:
        """See `Experts.voices`. Experts read token ids of the first base: generation needs one tokenizer for all."""
        tokenizers = {base.tokenizer_fingerprint for base in self.bases}
        if len(tokenizers) > 1:
            raise ValueError(
                "the experts' tokenizers differ: they score each other's texts, but cannot speak in one "
                "batch; use policy.experts.model(k).generate"
            )
        models = [partial(self._models.__getitem__, k) for k in range(self.n_experts)]
        return ModelVoices(self.bases, models, chosen)

    def as_adapter(self, k: int) -> Any:
        """Refused: whole models are no adapters."""
        raise ValueError("IndependentExperts are whole models, no adapters: use merge(k, folder)")

    def as_model(self, k: int) -> Any:
        """A copy of the model of expert k, frozen."""
        return copy.deepcopy(self._models[k]).requires_grad_(False)

    def tokenizer(self, k: int) -> Any:
        """That of the base that expert k started from."""
        return self.bases[k].tokenizer
