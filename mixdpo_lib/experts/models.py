"""What do experts share whose forward pass runs transformer blocks?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..base.architecture import read_on
from ..base.head import head_logits, place_of
from ..base.model import Base
from .contract import Voices


def registered(named: dict[str, nn.Parameter]) -> nn.ParameterDict:
    """Parameters of modules that are not submodules, by name, so that a checkpoint holds these alone."""
    return nn.ParameterDict({name.replace(".", "/"): p for name, p in named.items()})


def kinds(bases: Sequence[Base]) -> list[int]:
    """For each base, the first of the list that equals it: their tokens and references are the same."""
    prints = [base.fingerprint for base in bases]
    return [prints.index(one) for one in prints]


def by_expert(
    speak: Callable[[int, Tensor | None], Tensor],
    n_experts: int,
    batch: dict[str, Tensor],
    chosen: Bool[Tensor, "texts experts"] | None,
) -> Float[Tensor, "texts experts"]:
    """One column an expert; what was not chosen is -inf and costs nothing."""
    if chosen is None or bool(chosen.all()):
        return torch.stack([speak(k, None) for k in range(n_experts)], 1)
    columns = []
    for k in range(n_experts):
        rows = chosen[:, k].nonzero().squeeze(1)
        column = torch.full((len(chosen),), -torch.inf, device=batch["text_ref_logps"].device)
        columns.append(column.index_copy(0, rows, speak(k, rows)) if len(rows) else column)
    return torch.stack(columns, 1)


class ModelVoices(Voices):
    """Next-token logits of experts that are models: each reads the rows that chose it, with a cache of its own.

    The reference of a row is that of the first expert it chose (of the first base, where it chose none).

    powers : 1 + s of each expert, whose logits are multiplied by it; None: 1.
    """

    def __init__(
        self,
        bases: Sequence[Base],
        models: Sequence[Callable[[], Any]],
        chosen: Bool[Tensor, "rows experts"] | None,
        powers: Sequence[float] | None = None,
    ) -> None:
        self._bases, self._models, self._powers = bases, models, powers
        self._rows: dict[
            tuple[str, int], Tensor
        ] = {}  # of each that speaks: ("reference" or "expert", its number)
        if chosen is not None:
            kind = torch.tensor(kinds(bases), device=chosen.device)[chosen.int().argmax(1)]
            self._rows = {
                ("reference", k): (kind == k).nonzero().squeeze(1) for k in kind.unique().tolist()
            }
            experts = {("expert", k): chosen[:, k].nonzero().squeeze(1) for k in range(len(bases))}
            self._rows |= {name: rows for name, rows in experts.items() if len(rows)}
        self._caches: dict[tuple[str, int], Any] = {}

    def reorder(self, source: Int[Tensor, "rows"]) -> None:
        """See `Voices.reorder`."""
        for name, cache in self._caches.items():
            rows = self._rows[name]
            cache.reorder_cache(place_of(rows, len(source))[source[rows]])

    def __call__(
        self, input_ids: Tensor, mask: Tensor
    ) -> tuple[Tensor, list[tuple[int, Tensor, Tensor]]]:
        """See `Voices.__call__`."""
        if not self._rows:
            self._rows = {("reference", 0): torch.arange(len(input_ids), device=input_ids.device)}
        refs: Tensor | None = None
        said = []
        for name, rows in self._rows.items():
            what, k = name
            base = self._bases[k]
            model = base.model if what == "reference" else self._models[k]()
            hidden, self._caches[name] = read_on(
                model, input_ids[rows], mask[rows], self._caches.get(name)
            )
            logits = head_logits(base, hidden, model)
            if what == "expert":
                own = logits if self._powers is None else self._powers[k] * logits
                said.append((k, rows, own))
            else:
                refs = logits.new_empty(len(input_ids), logits.shape[1]) if refs is None else refs
                refs[rows] = logits
        if refs is None:
            raise ValueError("no rows to continue: give at least one")
        return refs, said
