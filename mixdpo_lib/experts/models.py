"""What do experts share whose forward pass runs transformer blocks?"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..base.features import TextFeatures
from ..base.head import head_logits, logit_map
from ..base.model import Base
from ..store import cached, progress
from .contract import Voices, place_of, read_on

VERSION = 1


def shared_copy(model: nn.Module) -> Any:
    """The same modules anew around the same tensors: what is put into the copy does not reach the original."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def padded(ids: Sequence[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
    """Sequences padded on the right, and where each response token is predicted: column, token, text."""
    rows = [a + b for a, b in ids]
    input_ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for i, row in enumerate(rows):
        input_ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
    column = [len(a) - 1 + j for a, b in ids for j in range(len(b))]
    return {
        "input_ids": input_ids, "attention_mask": mask, "column": torch.tensor(column),
        "target": torch.tensor([t for _, b in ids for t in b]),
        "segment": torch.tensor([i for i, (_, b) in enumerate(ids) for _ in b]),
    }  # fmt: skip


class _FrozenHeadLogps(torch.autograd.Function):
    """log p(token) of every position under a frozen head, in blocks of positions; gradients for the hidden states.

    d log p(t) / dh = W_t - sum_v p_v W_v is made on the way, while the block's probabilities are at hand, so that no
    more than one block of (positions, vocabulary) is ever held.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, target, block=128):  # type: ignore[override]
        logps, slope = hidden.new_empty(len(hidden), dtype=torch.float32), None
        if ctx.needs_input_grad[0]:
            slope = torch.empty_like(hidden)
        for at in torch.arange(len(hidden), device=hidden.device).split(block):
            z = nn.functional.linear(hidden[at], weight, bias).float()
            token = z.gather(1, target[at, None]).squeeze(1)
            top = z.amax(1)
            total = z.sub_(top[:, None]).exp_().sum(1)
            logps[at] = token - top - total.log()
            if slope is not None:
                slope[at] = weight[target[at]] - (z.to(weight.dtype) @ weight) / total[:, None].to(weight.dtype)
        ctx.save_for_backward(slope)
        return logps

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        (slope,) = ctx.saved_tensors
        return (grad[:, None] * slope).to(slope.dtype), None, None, None


def token_logps(base: Base, model: Any, hidden: Tensor, target: Tensor) -> Float[Tensor, "positions"]:
    """log probability of the token at each position, nats, float32; gradients flow."""
    head = model.get_output_embeddings()
    plain = type(head) is nn.Linear and logit_map(base.model.config.get_text_config()) is None
    if plain and not head.weight.requires_grad:
        return _FrozenHeadLogps.apply(hidden.to(head.weight.dtype), head.weight, head.bias, target)
    logits = head_logits(base, hidden, model)
    return logits.gather(1, target[:, None]).squeeze(1) - logits.logsumexp(1)


def response_logps(
    base: Base, model: Any, inputs: dict[str, Tensor], rows: Tensor | None, n_texts: int
) -> Float[Tensor, "rows"]:
    """log probability of the responses of these rows (None: all), nats; gradients flow."""
    input_ids, mask = inputs["input_ids"], inputs["attention_mask"]
    column, target, segment = inputs["column"], inputs["target"], inputs["segment"]
    if rows is not None:
        place = place_of(rows, n_texts)
        own = (place[segment] >= 0).nonzero().squeeze(1)
        input_ids, mask = input_ids[rows], mask[rows]
        column, target, segment = column[own], target[own], place[segment[own]]
    hidden = model.base_model(input_ids=input_ids, attention_mask=mask, use_cache=False).last_hidden_state
    logps = token_logps(base, model, hidden[segment, column], target)
    return logps.new_zeros(len(input_ids)).index_add(0, segment, logps)


def registered(named: dict[str, nn.Parameter]) -> nn.ParameterDict:
    """Parameters of modules that are not submodules, by name, so that a checkpoint holds these alone."""
    return nn.ParameterDict({name.replace(".", "/"): p for name, p in named.items()})


def kinds(bases: Sequence[Base]) -> list[int]:
    """For each base, the first of the list that equals it: their tokens and references are the same."""
    prints = [base.fingerprint for base in bases]
    return [prints.index(one) for one in prints]


def by_expert(
    speak: Callable[[int, Tensor | None], Tensor], n_experts: int, batch: dict[str, Tensor],
    chosen: Bool[Tensor, "texts experts"] | None,
) -> Float[Tensor, "texts experts"]:  # fmt: skip
    """One column an expert; what was not chosen is -inf and costs nothing."""
    if chosen is None or bool(chosen.all()):
        return torch.stack([speak(k, None) for k in range(n_experts)], 1)
    columns = []
    for k in range(n_experts):
        rows = chosen[:, k].nonzero().squeeze(1)
        column = torch.full((len(chosen),), -torch.inf, device=batch["text_ref_logps"].device)
        columns.append(column.index_copy(0, rows, speak(k, rows)) if len(rows) else column)
    return torch.stack(columns, 1)


@torch.no_grad()
def plain_logps(base: Base, texts: TextFeatures, ids: list[tuple[list[int], list[int]]]) -> np.ndarray:
    """log pi_ref of texts under a base whose features are not at hand, nats; kept in the cache."""
    digest = hashlib.sha256(repr(ids).encode()).hexdigest()

    def build(folder: Path) -> None:
        out = []
        for start in range(0, len(ids), 32):
            inputs = {n: v.to(base.device) for n, v in padded(ids[start : start + 32]).items()}
            out.append(response_logps(base, base.model, inputs, None, 0).float().cpu())
            progress("reference", min(start + 32, len(ids)), len(ids), "texts")
        np.save(folder / "logps.npy", torch.cat(out).numpy(), allow_pickle=False)

    folder = cached("reference", VERSION, {"base": base.fingerprint, "ids": digest}, build)
    return np.load(folder / "logps.npy", allow_pickle=False)


class ModelVoices(Voices):
    """Next-token logits of experts that are models: each reads the rows that chose it, with a cache of its own.

    The reference of a row is that of the first expert it chose (of the first base, where it chose none).
    """

    def __init__(
        self, bases: Sequence[Base], models: Sequence[Callable[[], Any]], chosen: Bool[Tensor, "rows experts"] | None
    ) -> None:
        self._bases, self._models = bases, models
        self._rows: dict[tuple[str, int], Tensor] = {}  # of each that speaks: ("reference" or "expert", its number)
        if chosen is not None:
            kind = torch.tensor(kinds(bases), device=chosen.device)[chosen.int().argmax(1)]
            self._rows = {("reference", k): (kind == k).nonzero().squeeze(1) for k in kind.unique().tolist()}
            experts = {("expert", k): chosen[:, k].nonzero().squeeze(1) for k in range(len(bases))}
            self._rows |= {name: rows for name, rows in experts.items() if len(rows)}
        self._caches: dict[tuple[str, int], Any] = {}

    def reorder(self, source: Int[Tensor, "rows"]) -> None:
        """See `Voices.reorder`."""
        for name, cache in self._caches.items():
            rows = self._rows[name]
            cache.reorder_cache(place_of(rows, len(source))[source[rows]])

    def __call__(self, input_ids: Tensor, mask: Tensor) -> tuple[Tensor, list[tuple[int, Tensor, Tensor]]]:
        if not self._rows:
            self._rows = {("reference", 0): torch.arange(len(input_ids), device=input_ids.device)}
        refs: Tensor | None = None
        said = []
        for name, rows in self._rows.items():
            what, k = name
            base = self._bases[k]
            model = base.model if what == "reference" else self._models[k]()
            hidden, self._caches[name] = read_on(model, input_ids[rows], mask[rows], self._caches.get(name))
            logits = head_logits(base, hidden, model)
            if what == "expert":
                said.append((k, rows, logits))
            else:
                refs = logits.new_empty(len(input_ids), logits.shape[1]) if refs is None else refs
                refs[rows] = logits
        assert refs is not None
        return refs, said
