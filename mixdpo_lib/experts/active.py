"""Which tokens may a head move?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..base.architecture import logit_map
from ..base.model import Base
from .contract import Experts


def _forget_head_rows(experts: ActiveHead, _: object) -> None:
    experts.forget_head_rows()  # the active tokens that were loaded may be others


class ActiveHead(Experts, family=False):
    """What families share that move the logits of *active* tokens alone: which these are, and the head's rows of them.

    Parameters
    ----------
    active : "responses" (tokens of the training responses, which the family chooses) or "all".
    min_count : with "responses", how often a token has to occur in them.
    """

    active_ids: Tensor

    def __init__(self, base: Base, n_experts: int, active: str, min_count: int) -> None:
        super().__init__(base, n_experts)
        if active not in ("responses", "all"):
            raise ValueError(
                f"active={active!r}: possible are 'responses' (tokens of the training responses) and 'all'"
            )
        self.active, self.min_count = active, min_count
        self._map = logit_map(base.model.config.get_text_config())
        self.register_buffer("active_ids", torch.zeros(0, dtype=torch.long))
        self._head_rows: Tensor | None = None
        self.register_load_state_dict_post_hook(_forget_head_rows)
        if active == "all":
            self.activate(torch.arange(self._head.weight.shape[0]))

    @property
    def _head(self) -> Any:
        return self._base.model.get_output_embeddings()

    def fit_state(self, state: Mapping[str, Tensor]) -> None:
        """The saved active tokens, on which the size of a buffer depends."""
        self.activate(saved_tokens(state["active_ids"], self._head.weight.shape[0]))

    def constants_key(self) -> str:
        """Of the active tokens."""
        return str(hash(self.active_ids.cpu().numpy().tobytes()))

    def activate(self, token_ids: Int[Tensor, "tokens"]) -> None:
        """Set the tokens whose logits the experts may change (sorted, distinct; part of the saved mixture)."""
        self.active_ids = torch.unique(token_ids)
        self.forget_head_rows()

    def place_among_active(self, tokens: Int[Tensor, "positions"]) -> Int[Tensor, "positions"]:
        """Which active token each of these is, from 0 on; -1 where it is not active."""
        ids = self.active_ids.cpu()
        slot = torch.searchsorted(ids, tokens).clamp(max=len(ids) - 1)
        return torch.where(ids[slot] == tokens, slot, torch.full_like(slot, -1))

    def forget_head_rows(self) -> None:
        """The head's rows of the active tokens are looked up anew."""
        self._head_rows = None

    def active_head(self) -> tuple[Float[Tensor, "tokens hidden"], Float[Tensor, "tokens"] | None]:
        """Weight and bias (None: it has none) of the head for the active tokens, float32.

        Raises
        ------
        ValueError : no tokens are active yet.
        """
        if self._head_rows is None:
            if len(self.active_ids) == 0:
                raise ValueError(
                    "these experts were not fitted: no tokens are active yet; call fit first, or activate_responses"
                )
            rows = self._head.weight[self.active_ids.to(self._head.weight.device)]
            self._head_rows = rows.float().contiguous()
        bias = getattr(self._head, "bias", None)
        return self._head_rows, None if bias is None else bias[self.active_ids.to(bias.device)]


def saved_tokens(ids: Tensor, size: int) -> Int[Tensor, "tokens"]:
    """Active tokens as they were saved: whole numbers from 0 to `size` - 1, rising.

    Raises
    ------
    ValueError : others.
    """
    whole = ids.dtype == torch.long and ids.dim() == 1
    if not whole or bool((ids[1:] <= ids[:-1]).any()) or bool(((ids < 0) | (ids >= size)).any()):
        raise ValueError(
            f"experts.active_ids: expected rising tokens from 0 to {size - 1} (int64), found others ({ids.dtype})"
        )
    return ids
