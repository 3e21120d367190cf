"""How do low-rank heads speak? One pass of the base, and the correction of its logits for each expert."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from ..base.architecture import logit_map, read_on
from ..base.head import mean_logit
from ..base.model import Base
from ..base.read_prompts import read_prompts
from .contract import Voices
from .low_rank import corrected_logits


@dataclass(frozen=True)
class HeadGroup:
    """One expert and the rows of a batch that it is computed for."""

    expert: int
    rows: Tensor
    active: Tensor
    down: Tensor
    up: Tensor
    sharpness: float | None = None

    def logits(
        self,
        hidden: Float[Tensor, "rows hidden"],
        plain: Float[Tensor, "rows tokens"],
        mapped: Callable[[Tensor], Tensor] | None = None,
    ) -> Float[Tensor, "own tokens"]:
        """The expert's logits of its rows. plain : the head's output; mapped : what the model does to it."""
        logits = plain[self.rows]
        own = logits[:, self.active]
        logits = logits if mapped is None else mapped(logits)
        mean = None if self.sharpness is None else mean_logit(logits[:, self.active])
        shift = (hidden[self.rows] @ self.down.T) @ self.up.T
        logits[:, self.active] = corrected_logits(own, shift, self.sharpness, mean, mapped)
        return logits


class HeadVoices(Voices):
    """One pass of the base and, for each expert that some row chose, the correction of its logits.

    Without groups it is the reference alone.
    """

    def __init__(self, base: Base, groups: Sequence[HeadGroup] = ()) -> None:
        self._base, self._groups = base, groups
        self.moved = groups[0].active if groups else None  # all share one active set
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
        if self._cache is None:
            hidden, self._cache = read_prompts(model, input_ids, mask)
        else:
            hidden, self._cache = read_on(model, input_ids, mask, self._cache)
        plain = model.get_output_embeddings()(hidden).float()
        said = [
            (g.expert, g.rows, g.logits(hidden.float(), plain, self._map)) for g in self._groups
        ]
        return (plain if self._map is None else self._map(plain)), said
