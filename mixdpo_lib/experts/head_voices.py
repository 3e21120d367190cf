"""How do low-rank heads speak? One pass of the base, and the correction of its logits for each expert."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from ..base.architecture import logit_map, read_on
from ..base.model import Base
from .contract import Voices


@dataclass(frozen=True)
class HeadGroup:
    """One expert and the rows of a batch that it is computed for."""

    expert: int
    rows: Tensor
    active: Tensor
    down: Tensor
    up: Tensor

    def logits(
        self, hidden: Float[Tensor, "rows hidden"], ref_logits: Float[Tensor, "rows tokens"]
    ) -> Float[Tensor, "own tokens"]:
        """The expert's logits of its rows."""
        logits = ref_logits[self.rows]
        logits[:, self.active] += (hidden[self.rows] @ self.down.T) @ self.up.T
        return logits


class HeadVoices(Voices):
    """One pass of the base and, for each expert that some row chose, the correction of its logits.

    Without groups it is the reference alone.
    """

    def __init__(self, base: Base, groups: Sequence[HeadGroup] = ()) -> None:
        self._base, self._groups = base, groups
        self._cache: Any = None
        self._map = logit_map(base.model.config.get_text_config())

    def reorder(self, source: Int[Tensor, "rows"]) -> None:
        """See `Voices.reorder`."""
        if self._cache is not None:
            self._cache.reorder_cache(source)

    def __call__(
        self, input_ids: Tensor, mask: Tensor
    ) -> tuple[Tensor, list[tuple[int, Tensor, Tensor]]]:
        """See `Voices.__call__`."""
        model = self._base.model
        hidden, self._cache = read_on(model, input_ids, mask, self._cache)
        plain = model.get_output_embeddings()(hidden).float()
        mapped = self._map or (lambda z: z)
        said = [(g.expert, g.rows, mapped(g.logits(hidden.float(), plain))) for g in self._groups]
        return mapped(plain), said
