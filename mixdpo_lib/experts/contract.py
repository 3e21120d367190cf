"""What does every family of experts give? Log-probabilities of responses, and next-token logits."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..base.features import PairFeatures, TextFeatures
from ..base.model import Base
from ..elbo import check_n_experts


def check_chosen(chosen: Tensor, rows: int, n_experts: int) -> None:
    if chosen.shape != (rows, n_experts) or chosen.dtype != torch.bool:
        raise ValueError(
            f"chosen has shape {tuple(chosen.shape)} and dtype {chosen.dtype}; expected ({rows}, {n_experts}), bool: "
            "which experts are computed for each row"
        )


def chosen_texts(
    chosen: Bool[Tensor, "pairs experts"], pairs: Int[Tensor, "pairs 2"], n_texts: int
) -> Bool[Tensor, "texts experts"]:
    """Which experts each text is computed for, where both texts of a pair are computed for the pair's experts.

    >>> chosen_texts(torch.tensor([[True, False], [False, True]]), torch.tensor([[0, 1], [1, 2]]), 3).int()
    tensor([[1, 0],
            [1, 1],
            [0, 1]], dtype=torch.int32)
    """
    counts = torch.zeros(n_texts, chosen.shape[1], dtype=torch.long)
    return counts.index_add_(0, pairs.flatten(), chosen.long().repeat_interleave(2, 0)) > 0


def place_of(rows: Int[Tensor, "chosen"], n: int) -> Int[Tensor, "rows"]:
    """Where each of the rows 0 ... n-1 stands in `rows`; -1 where it does not.

    >>> place_of(torch.tensor([2, 0]), 4)
    tensor([ 1, -1,  0, -1])
    """
    return torch.full((n,), -1, device=rows.device).index_copy(0, rows, torch.arange(len(rows), device=rows.device))


def read_on(model: Any, input_ids: Tensor, mask: Tensor, cache: Any) -> tuple[Float[Tensor, "rows hidden"], Any]:
    """The last hidden state of each row after these further tokens, and the cache that remembers them.

    mask : (rows, total), 0 where left padding stands, over all tokens so far; positions are counted without it.
    """
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
    out = model.base_model(
        input_ids=input_ids, attention_mask=mask, position_ids=positions, use_cache=True, past_key_values=cache
    )
    return out.last_hidden_state[:, -1], out.past_key_values


class Voices:
    """Next-token logits of several experts at once; keeps its own cache."""

    @abstractmethod
    def reorder(self, source: Int[Tensor, "rows"]) -> None:
        """Row i goes on from what row source[i] has read; both chose the same experts."""

    @abstractmethod
    def __call__(self, input_ids: Tensor, mask: Tensor) -> tuple[Tensor, list[tuple[int, Tensor, Tensor]]]:
        """Logits of the reference (rows, V), and for each expert that speaks: its number, its rows, their logits."""


class Experts(nn.Module):
    """What every family of experts gives: log-probabilities of responses, of their reference, and next-token logits.

    base : [the frozen model that features and gates read], in a list, so that it is neither a parameter nor part of a
        checkpoint; [None] for tables without words. n_experts : K.
    """

    base: list[Any]

    def __init__(self, base: Base | None, n_experts: int) -> None:
        super().__init__()
        check_n_experts(n_experts)
        self.base, self.n_experts = [base], n_experts

    @property
    def _base(self) -> Base:
        return self.base[0]

    @abstractmethod
    def options(self) -> dict[str, Any]:
        """What makes equal experts but for their parameters, as JSON."""

    def start(self, data: PairFeatures) -> None:
        """What the training responses decide before the first step; nothing by default."""

    @abstractmethod
    def perturb(self, scale: float, generator: torch.Generator) -> None:
        """Symmetry breaking "random_heads": small random numbers of each expert's own."""

    def constants_key(self) -> str:
        """Changes whenever `constants` of the same texts would."""
        return ""

    @abstractmethod
    def constants(self, texts: TextFeatures) -> Any:
        """What is computed once for a set of texts, whatever the experts are."""

    @abstractmethod
    def batch(self, texts: TextFeatures, constants: Any, pairs: Int[Tensor, "pairs 2"]) -> dict[str, Tensor]:
        """Everything `logps` reads for these pairs; each distinct text is held, and later computed, once.

        "place" (pairs, 2) says which of the distinct texts each answer is, "text_ref_logps" (texts, 1 or K) their
        log-probabilities under the reference, nats.
        """

    @abstractmethod
    def text_logps(
        self, batch: dict[str, Tensor], chosen: Bool[Tensor, "texts experts"] | None = None
    ) -> Float[Tensor, "texts experts"]:
        """log pi_k of the distinct texts of a batch, nats, summed over response tokens. Gradients flow.

        Parameters
        ----------
        chosen : which experts are computed for each text; None: all of them. Each chosen (text, expert) is computed
            once, by expert, and the others cost nothing: they are -inf, no log-probability of a text, and carry no
            gradient. Where every entry is chosen the result is that of None, to the last bit.

        Raises
        ------
        ValueError : `chosen` of another shape or type.
        """

    @abstractmethod
    def voices(self, chosen: Bool[Tensor, "rows experts"] | None) -> Voices:
        """Next-token logits of the experts that each row chose; None: of the reference alone."""

    def logps(
        self, batch: dict[str, Tensor], chosen: Bool[Tensor, "pairs experts"] | None = None
    ) -> Float[Tensor, "pairs 2 experts"]:
        """log pi_k(y given x), nats, summed over response tokens; index 0 chosen, 1 rejected. Gradients flow.

        With `chosen`, which experts are computed for each pair, both of its texts are computed for them (a text that
        pairs share, for all of theirs, once); what a pair did not choose is -inf. See `text_logps`.
        """
        if chosen is None:
            return self.text_logps(batch)[batch["place"]]
        check_chosen(chosen, len(batch["place"]), self.n_experts)
        by_text = chosen_texts(chosen, batch["place"], len(batch["text_ref_logps"]))
        return self.text_logps(batch, by_text)[batch["place"]].masked_fill(~chosen[:, None], -torch.inf)

    def ref_logps(self, batch: dict[str, Tensor]) -> Float[Tensor, "pairs 2 references"]:
        """log pi_ref(y given x), nats: one column where the experts share a reference, else one an expert."""
        return batch["text_ref_logps"][batch["place"]]

    @torch.no_grad()
    def all_text_logps(
        self, texts: TextFeatures, constants: Any, ids: Int[Tensor, "texts"] | None = None, block: int = 64,
        chosen: Bool[Tensor, "texts experts"] | None = None,
    ) -> tuple[Float[Tensor, "texts experts"], Float[Tensor, "texts references"]]:  # fmt: skip
        """log pi_k and log pi_ref of the texts `ids` (all by default), nats, in blocks of `block` texts.

        `chosen` : which experts are computed for each of the ids; the others are -inf (see `text_logps`).
        """
        ids = torch.arange(len(texts)) if ids is None else ids
        if chosen is not None:
            check_chosen(chosen, len(ids), self.n_experts)
        device, logps, refs = next(self.parameters()).device, [], []
        for at in torch.arange(len(ids)).split(block):
            batch = self.batch(texts, constants, torch.stack([ids[at], ids[at]], 1))
            batch = {name: value.to(device) for name, value in batch.items()}
            logps.append(self.logps(batch, None if chosen is None else chosen[at].to(device))[:, 0].float().cpu())
            refs.append(batch["text_ref_logps"][batch["place"][:, 0]].float().cpu())
        return torch.cat(logps), torch.cat(refs)
