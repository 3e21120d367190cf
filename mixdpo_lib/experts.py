"""What does each expert say? Experts give log-probabilities of responses and next-token functions.

`HeadExperts` share a frozen base: expert k adds a low-rank correction to the base's head,

    logits_k = W h + 1[v active] W B_k A_k h,

on the last hidden state h. Tokens outside the active set keep the base's logit, so their total mass is one constant per
position and every expert is exactly normalised over the whole vocabulary.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from .decoding import truncated_log_probs
from .elbo import check_log_w
from .features import PairFeatures, TextFeatures, gather_positions
from .gating import check_n_experts
from .sources import Base
from .store import MixDPOError, cached, progress

VERSION = 1


def logit_map(config: Any) -> Callable[[Tensor], Tensor] | None:
    """What a model does to its head's output: a factor (Cohere, Granite), then soft-capping (Gemma); None: nothing.

    c tanh(z / c) keeps every logit between -c and c (Gemma 2, arXiv 2408.00118).
    """
    factor = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    if factor == 1.0 and cap is None:
        return None
    return lambda z: factor * z if cap is None else cap * torch.tanh(factor * z / cap)


def head_logits(base: Base, hidden: Float[Tensor, "rows hidden"], model: Any = None) -> Float[Tensor, "rows tokens"]:
    """Logits of last hidden states by the head of `model` (that of the base by default), float32; gradients flow."""
    logits = (base.model if model is None else model).get_output_embeddings()(hidden).float()
    mapped = logit_map(base.model.config.get_text_config())
    return logits if mapped is None else mapped(logits)


@torch.no_grad()
def check_head(base: Base) -> None:
    """Refuse a model whose logits are not its head on the last hidden state, scaled and capped as `logit_map` knows.

    Raises
    ------
    MixDPOError : the largest difference is named.
    """
    ids = torch.arange(4, device=base.device)[None] % base.vocab_size
    out = base.model(input_ids=ids, use_cache=False)
    hidden = base.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    error = float((out.logits[0].float() - head_logits(base, hidden[0])).abs().max())
    if not error <= 1e-3 * max(1.0, float(out.logits.abs().max())):
        raise MixDPOError(f"base {base.name}: its logits differ by {error:.3g} from its head on the last hidden state: "
                          "this architecture does more there; use IndependentExperts")  # fmt: skip


class _LowRankTokenLogps(torch.autograd.Function):
    """log pi_k(token) of every position and expert, (positions, experts); gradients for A and E = W B only.

    Written by hand because the logits of all experts are the largest tensors of a step: exp(logit) is kept once per
    expert in a buffer that is used again, and the backward pass reads it in two matrix products. `groups` holds the
    positions of each expert, or is None: all positions for all experts. What is not asked for is 0 in the result.
    """

    @staticmethod
    def forward(ctx, hidden, down, up, head, bias, target, token_logit, lse_inactive, groups, workspace):  # type: ignore[override]
        n_experts, n_positions = len(down), len(hidden)
        base_logits = workspace.take("base", (n_positions, len(head)), hidden)
        torch.mm(hidden, head.T, out=base_logits)
        if bias is not None:
            base_logits += bias
        sizes = [n_positions] * n_experts if groups is None else [len(at) for at in groups]
        keep = any(ctx.needs_input_grad[1:3])
        rows = sum(sizes) if keep else max(sizes, default=0)
        flat = workspace.take("experts", (rows, len(head)), hidden)
        buffers = flat.split(sizes) if keep else [flat[:size] for size in sizes]
        if groups is None:
            groups = [slice(None)] * n_experts
            states = list(torch.einsum("pd,krd->kpr", hidden, down))
        else:
            states = [hidden[at] @ down[k].T for k, at in enumerate(groups)]
        logps = hidden.new_zeros(n_positions, n_experts)
        totals = []
        for k, (at, z) in enumerate(zip(groups, buffers, strict=True)):
            torch.addmm(base_logits[at], states[k], up[k].T, out=z)
            token, known = token_logit[at].clone(), target[at] >= 0
            token[known] = z[known, target[at][known]]
            top = torch.maximum(z.amax(1), lse_inactive[at])
            z.sub_(top[:, None]).exp_()
            totals.append(z.sum(1) + (lse_inactive[at] - top).exp())
            logps[at, k] = token - top - totals[k].log()
        ctx.save_for_backward(hidden, up, target)
        ctx.groups, ctx.states, ctx.totals = groups, states, totals
        ctx.buffers, ctx.ticket, ctx.workspace = buffers, workspace.ticket(), workspace
        return logps

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        hidden, up, target = ctx.saved_tensors
        if ctx.ticket != ctx.workspace.ticket():
            raise RuntimeError("the experts' logits were overwritten by a later call before backward() was reached")
        grad_down = torch.zeros(len(up), up.shape[2], hidden.shape[1], dtype=hidden.dtype, device=hidden.device)
        grad_up = torch.zeros_like(up)
        for k, (at, probability) in enumerate(zip(ctx.groups, ctx.buffers, strict=True)):
            own, states = grad[at, k], ctx.states[k]
            weight = (own / ctx.totals[k])[:, None]
            torch.mm(probability.T, states * weight, out=grad_up[k])
            grad_up[k].neg_()
            grad_state = (probability @ up[k]) * -weight
            rows = (target[at] >= 0).nonzero().squeeze(1)
            columns = target[at][rows]
            grad_up[k].index_add_(0, columns, states[rows] * own[rows, None])
            grad_state.index_add_(0, rows, up[k][columns] * own[rows, None])
            torch.mm(grad_state.T, hidden[at], out=grad_down[k])
        return None, grad_down, grad_up, None, None, None, None, None, None, None


class _Workspace:
    """Large buffers that are used again, step after step, instead of being mapped anew."""

    def __init__(self) -> None:
        self._flat: dict[str, Tensor] = {}
        self._uses = 0

    def take(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        size = int(np.prod(shape))
        flat = self._flat.get(name)
        if flat is None or flat.numel() < size or flat.dtype != like.dtype or flat.device != like.device:
            flat = self._flat[name] = torch.empty(size, dtype=like.dtype, device=like.device)
        self._uses += 1
        return flat[:size].view(shape)

    def ticket(self) -> int:
        return self._uses


@dataclass(frozen=True)
class HeadConstants:
    """What the frozen head says about every position, whatever the experts are: computed once, kept on disk.

    token_logit : (positions,) float32, logit of the response token under the base.
    lse : (positions,) float32, logsumexp of the base's logits over the whole vocabulary.
    lse_inactive : (positions,) float32, the same over the tokens outside the active set; -inf where all are active.
    """

    token_logit: np.ndarray
    lse: np.ndarray
    lse_inactive: np.ndarray


def _check_chosen(chosen: Tensor, rows: int, n_experts: int) -> None:
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


def reference_constants(base: Base, texts: TextFeatures, active: np.ndarray, block: int = 2048) -> HeadConstants:
    """The frozen head's constants for every position of `texts`, for this set of active tokens, from the cache.

    What an empty set gives is all that the reference needs: `lse_inactive` is then not filled (-inf).
    """
    digest = hashlib.sha256(active.tobytes()).hexdigest()
    rows = base.model.get_output_embeddings().weight.shape[0]
    inactive = np.setdiff1d(np.arange(rows), active) if len(active) else active

    def build(folder: Path) -> None:
        n = len(texts.tokens)
        out = np.empty((3, n), dtype=np.float32)
        inactive_ids = torch.from_numpy(inactive)
        for start in range(0, n, block):
            stop = min(start + block, n)
            hidden = torch.from_numpy(np.array(texts.hidden[start:stop])).to(base.device, base.model.dtype)
            with torch.inference_mode():
                logits = head_logits(base, hidden).cpu()
                tokens = torch.from_numpy(texts.tokens[start:stop])
                out[0, start:stop] = logits.gather(1, tokens[:, None]).squeeze(1)
                out[1, start:stop] = logits.logsumexp(1)
                out[2, start:stop] = logits.index_select(1, inactive_ids).logsumexp(1) if len(inactive) else -np.inf
            progress("head constants", stop, n, "positions")
        np.save(folder / "constants.npy", out, allow_pickle=False)

    folder = cached("head", VERSION, {"active": digest}, build, inputs=[texts.key])
    return HeadConstants(*np.load(folder / "constants.npy", allow_pickle=False))


def reference_logps(base: Base, texts: TextFeatures) -> np.ndarray:
    """log pi_ref of every text under the frozen base, nats, (texts,) float32."""
    constants = reference_constants(base, texts, np.zeros(0, dtype=np.int64))
    sums = np.concatenate([[0.0], np.cumsum((constants.token_logit - constants.lse).astype(np.float64))])
    return (sums[texts.offsets[1:]] - sums[texts.offsets[:-1]]).astype(np.float32)


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
        _check_chosen(chosen, len(batch["place"]), self.n_experts)
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
            _check_chosen(chosen, len(ids), self.n_experts)
        device, logps, refs = next(self.parameters()).device, [], []
        for at in torch.arange(len(ids)).split(block):
            batch = self.batch(texts, constants, torch.stack([ids[at], ids[at]], 1))
            batch = {name: value.to(device) for name, value in batch.items()}
            logps.append(self.logps(batch, None if chosen is None else chosen[at].to(device))[:, 0].float().cpu())
            refs.append(batch["text_ref_logps"][batch["place"][:, 0]].float().cpu())
        return torch.cat(logps), torch.cat(refs)

    def next_token(self, expert: Int[Tensor, "rows"] | None = None) -> NextToken:
        """A next-token function where row i speaks as expert[i]; None: every row as the reference."""
        return NextToken(self._base, None if expert is None else self, expert)


def _forget_head_rows(experts: HeadExperts, _: object) -> None:
    experts._head_rows = None  # the active tokens that were loaded may be others


class HeadExperts(Experts):
    """K low-rank heads on one frozen base.

    Parameters
    ----------
    base : the frozen language model, see `load_base`. It is also the reference of every expert.
    n_experts : K >= 1; 1 is plain DPO.
    rank : r >= 1, rank of each head; 8 by default, not tuned.
    active : "responses" (tokens of the training responses, see `activate`) or "all".
    min_count : with "responses", how often a token has to occur in them to be active. Tokens seen once are half of all,
        and the head's cost grows with their number.

    Notes
    -----
    All experts start with the same A and B_k = 0, which is the reference; equal experts cannot part by themselves (see
    `perturb` and `FitConfig.symmetry_breaking`). A is random until `activate_responses` has seen the training
    responses: then its rows read the mean and the first r - 1 principal directions of their hidden states, each with
    mean square 1/r (after Paischer et al. 2024, arXiv 2410.07170, who start LoRA so). On frozen features a head learns
    little that A does not read at the start, and a step is of the same size for every rank.
    """

    def __init__(
        self, base: Base, n_experts: int = 3, rank: int = 8, active: str = "responses", min_count: int = 1
    ) -> None:
        super().__init__(base, n_experts)
        if rank < 1:
            raise ValueError(f"rank={rank}: each head needs a rank of at least 1")
        if active not in ("responses", "all"):
            raise ValueError(
                f"active={active!r}: possible are 'responses' (tokens of the training responses) and 'all'"
            )
        check_head(base)
        self.rank, self.active, self.min_count = rank, active, min_count
        self._map = logit_map(base.model.config.get_text_config())
        generator = torch.Generator().manual_seed(0)
        down = torch.randn(1, rank, base.hidden_size, generator=generator) / base.hidden_size**0.5
        self.down = nn.Parameter(down.repeat(n_experts, 1, 1))
        self.up = nn.Parameter(torch.zeros(n_experts, base.hidden_size, rank))
        self.register_buffer("active_ids", torch.zeros(0, dtype=torch.long))
        self._workspace = _Workspace()
        self._head_rows: Tensor | None = None
        self.register_load_state_dict_post_hook(_forget_head_rows)
        if active == "all":
            self.activate(torch.arange(self._head.shape[0]))

    def options(self) -> dict[str, Any]:
        """What makes equal experts but for their parameters."""
        return {"family": "HeadExperts", "n_experts": self.n_experts, "rank": self.rank, "active": self.active,
                "min_count": self.min_count}  # fmt: skip

    def start(self, data: PairFeatures) -> None:
        """Choose the active tokens and A by these training responses, unless it was done (`activate_responses`)."""
        fresh = self.active == "all" and not bool(self.up.any())
        if len(self.active_ids) == 0 or fresh:
            self.activate_responses(data)

    def constants_key(self) -> str:
        """Of the active tokens."""
        return str(hash(self.active_ids.cpu().numpy().tobytes()))

    @property
    def _head(self) -> Tensor:
        return self._base.model.get_output_embeddings().weight

    @property
    def _bias(self) -> Tensor | None:
        return getattr(self._base.model.get_output_embeddings(), "bias", None)

    def activate(self, token_ids: Int[Tensor, "tokens"]) -> None:
        """Set the tokens whose logits the experts may change (sorted, distinct; part of the saved mixture)."""
        self.active_ids = torch.unique(token_ids)
        self._head_rows = self._head[self.active_ids.to(self._head.device)].float().contiguous()

    def activate_responses(self, data: PairFeatures) -> None:
        """Start from these training responses: A reads their hidden states, and with active="responses" the active
        tokens are theirs."""
        hidden, positions, _ = gather_positions(data.texts, torch.unique(data.pairs))
        if self.active == "responses":
            tokens, counts = torch.unique(torch.from_numpy(data.texts.tokens)[positions], return_counts=True)
            self.activate(tokens[counts >= self.min_count])
        self._read_hidden_states(hidden)

    @torch.no_grad()
    def _read_hidden_states(self, hidden: Float[Tensor, "positions hidden"]) -> None:
        mean = hidden.mean(0)
        values, vectors = torch.linalg.eigh(torch.cov(hidden.T, correction=0))
        rows = [mean / mean.square().sum()]
        for i in range(1, min(self.rank, len(values) + 1)):
            if values[-i] > 1e-6 * values[-1]:  # fewer directions than rows in a tiny set: the random ones stay
                direction = vectors[:, -i] * vectors[:, -i].sum().sign()  # eigenvectors have no sign of their own
                rows.append(direction / values[-i].sqrt())
        start = torch.stack(rows) / self.rank**0.5
        self.down[:, : len(start)] = start.to(self.down.device)

    def _require_active(self) -> Tensor:
        if self._head_rows is None or len(self._head_rows) != len(self.active_ids):
            if len(self.active_ids) == 0:
                raise ValueError("the experts have no active tokens yet: call fit, or activate_responses, first")
            self._head_rows = self._head[self.active_ids.to(self._head.device)].float().contiguous()
        return self._head_rows

    def perturb(self, scale: float, generator: torch.Generator) -> None:
        """Symmetry breaking "random_heads": B_k ~ N(0, scale^2), drawn for each expert; A stays."""
        with torch.no_grad():
            self.up.copy_(torch.randn(self.up.shape, generator=generator) * scale)

    @torch.no_grad()
    def scale(self, factor: float) -> None:
        """Multiply every B_k, in place: pi_k proportional to pi_ref exp(factor x shift), as another beta would give."""
        self.up.mul_(factor)

    def constants(self, texts: TextFeatures) -> HeadConstants:
        """The frozen head's constants for every position of `texts` (see `HeadConstants`), from the cache if there."""
        self._require_active()
        return reference_constants(self._base, texts, self.active_ids.cpu().numpy())

    def batch(self, texts: TextFeatures, constants: HeadConstants, pairs: Int[Tensor, "pairs 2"]) -> dict[str, Tensor]:
        """Everything `logps` reads for these pairs; each distinct text is held, and later computed, once."""
        self._require_active()
        ids, place = torch.unique(pairs, return_inverse=True)
        hidden, positions, segment = gather_positions(texts, ids)
        tokens = torch.from_numpy(texts.tokens)[positions]
        active_ids = self.active_ids.cpu()
        slot = torch.searchsorted(active_ids, tokens).clamp(max=len(active_ids) - 1)
        target = torch.where(active_ids[slot] == tokens, slot, torch.full_like(slot, -1))
        token_logit = torch.from_numpy(constants.token_logit)[positions]
        ref = torch.zeros(len(ids)).index_add_(0, segment, token_logit - torch.from_numpy(constants.lse)[positions])
        return {
            "hidden": hidden,
            "target": target,
            "token_logit": token_logit,
            "lse_inactive": torch.from_numpy(constants.lse_inactive)[positions],
            "segment": segment,
            "place": place,
            "text_ref_logps": ref[:, None],
        }

    def text_logps(
        self, batch: dict[str, Tensor], chosen: Bool[Tensor, "texts experts"] | None = None
    ) -> Float[Tensor, "texts experts"]:
        """See `Experts.text_logps`. float32 whatever the blocks of a model are computed in."""
        with torch.autocast(self.up.device.type, enabled=False):
            return self._text_logps(batch, chosen)

    def _text_logps(self, batch: dict[str, Tensor], chosen: Tensor | None) -> Tensor:
        head = self._require_active().to(self.up.device)
        bias = None if self._bias is None else self._bias[self.active_ids.to(self._bias.device)].to(self.up.device)
        inputs = {name: batch[name] for name in ("hidden", "target", "token_logit", "lse_inactive", "segment")}
        n_texts = len(batch["text_ref_logps"])
        if chosen is not None:
            _check_chosen(chosen, n_texts, self.n_experts)
        if chosen is None or bool(chosen.all()):
            logps = self._token_logps(inputs, self.down, head @ self.up, head, bias, None)
            return logps.new_zeros(n_texts, self.n_experts).index_add(0, inputs["segment"], logps)
        asked = chosen[inputs["segment"]]
        here, speak = asked.any(1).nonzero().squeeze(1), asked.any(0).nonzero().squeeze(1)
        inputs = {name: values[here] for name, values in inputs.items()}
        groups = [asked[here, k].nonzero().squeeze(1) for k in speak]
        logps = self._token_logps(inputs, self.down[speak], head @ self.up[speak], head, bias, groups)
        sums = logps.new_zeros(n_texts, len(speak)).index_add(0, inputs["segment"], logps)
        return sums.new_zeros(chosen.shape).index_copy(1, speak, sums).masked_fill(~chosen, -torch.inf)

    def _token_logps(
        self, inputs: dict[str, Tensor], down: Tensor, up: Tensor, head: Tensor, bias: Tensor | None,
        groups: list[Tensor] | None,
    ) -> Tensor:  # fmt: skip
        if self._map is not None:
            return self._mapped_token_logps(inputs, down, up, head, bias, groups)
        return _LowRankTokenLogps.apply(
            inputs["hidden"], down, up, head, bias, inputs["target"], inputs["token_logit"], inputs["lse_inactive"],
            groups, self._workspace,
        )  # fmt: skip

    def _mapped_token_logps(
        self, inputs: dict[str, Tensor], down: Tensor, up: Tensor, head: Tensor, bias: Tensor | None,
        groups: list[Tensor] | None,
    ) -> Tensor:  # fmt: skip
        """The same for a head whose output is scaled or soft-capped: by plain operations, slower and larger."""
        assert self._map is not None
        plain = inputs["hidden"] @ head.T + (0 if bias is None else bias)
        every = torch.arange(len(plain), device=plain.device)
        columns = []
        for k in range(len(down)):
            at = every if groups is None else groups[k]
            z = self._map(plain[at] + (inputs["hidden"][at] @ down[k].T) @ up[k].T)
            target = inputs["target"][at]
            own = z.gather(1, target.clamp(min=0)[:, None]).squeeze(1)
            token = torch.where(target >= 0, own, inputs["token_logit"][at])
            lse = torch.logaddexp(z.logsumexp(1), inputs["lse_inactive"][at])
            columns.append(plain.new_zeros(len(plain)).index_copy(0, at, token - lse))
        return torch.stack(columns, 1)

    def head_correction(self, k: int) -> tuple[Float[Tensor, "rank hidden"], Float[Tensor, "tokens rank"]]:
        """A_k, and W B_k with zero rows for tokens that are not active: logits_k = W h + (W B_k) A_k h."""
        head = self._require_active().to(self.up.device)
        up = torch.zeros(self._head.shape[0], self.rank, device=self.up.device)
        up[self.active_ids.to(up.device)] = (head @ self.up[k]).detach()
        return self.down[k].detach(), up

    def voices(self, chosen: Bool[Tensor, "rows experts"] | None) -> Voices:
        """See `Experts.voices`: the base reads every row once, whatever experts it chose."""
        return _HeadVoices(self._base, self, chosen)


class _HeadVoices(Voices):
    """One pass of the base and, for each expert that some row chose, the correction of its logits."""

    def __init__(
        self, base: Base, experts: HeadExperts | None = None, chosen: Bool[Tensor, "rows experts"] | None = None
    ) -> None:
        self._base = base
        self._cache: Any = None
        self._map = logit_map(base.model.config.get_text_config())
        self._groups = [] if experts is None or chosen is None else _groups(experts, chosen)

    def reorder(self, source: Int[Tensor, "rows"]) -> None:
        """See `Voices.reorder`."""
        if self._cache is not None:
            self._cache.reorder_cache(source)

    def __call__(self, input_ids: Tensor, mask: Tensor) -> tuple[Tensor, list[tuple[int, Tensor, Tensor]]]:
        model = self._base.model
        hidden, self._cache = read_on(model, input_ids, mask, self._cache)
        plain = model.get_output_embeddings()(hidden).float()
        mapped = self._map or (lambda z: z)
        said = [(g.expert, g.rows, mapped(g.logits(hidden.float(), plain))) for g in self._groups]
        return mapped(plain), said


class NextToken:
    """Stateful next-token function of a base with optional expert heads, for `decoding.sample`.

    Called with (input_ids (rows, t), attention_mask (rows, total)); returns float32 logits (rows, vocabulary).
    With `observe`, called with the tokens that were drawn, it keeps log pi_k / pi_ref and log pi_ref of each of them.
    Only experts that a row speaks as are computed, each for its rows.
    """

    def __init__(
        self, base: Base, experts: Experts | None = None, expert: Int[Tensor, "rows"] | None = None
    ) -> None:
        self._expert = expert
        self._voices: Voices = _HeadVoices(base)
        if experts is not None:
            chosen = None if expert is None else nn.functional.one_hot(expert, experts.n_experts) > 0
            self._voices = experts.voices(chosen)
        self._spoken = False
        self._logits: Tensor | None = None
        self._ref_logits: Tensor | None = None
        self._seen: list[tuple[Tensor, Tensor]] = []

    @torch.inference_mode()
    def __call__(self, input_ids: Int[Tensor, "rows t"], attention_mask: Int[Tensor, "rows total"]) -> Tensor:
        logits, said = self._voices(input_ids, attention_mask)
        self._ref_logits, self._spoken = logits, bool(said)
        if said:
            logits = logits.clone()
            for _, rows, own in said:
                logits[rows] = own
        self._logits = logits
        return logits

    @torch.inference_mode()
    def observe(self, tokens: Int[Tensor, "rows"]) -> None:
        """Keep what policy and reference say of the tokens just drawn from the last logits."""
        assert self._logits is not None and self._ref_logits is not None
        ref = self._ref_logits.gather(1, tokens[:, None]).squeeze(1) - self._ref_logits.logsumexp(1)
        own = ref
        if self._spoken:
            own = self._logits.gather(1, tokens[:, None]).squeeze(1) - self._logits.logsumexp(1)
        self._seen.append((own - ref, ref))

    def scores(self) -> tuple[Float[Tensor, "rows steps"], Float[Tensor, "rows steps"]]:
        """(log pi_k - log pi_ref, log pi_ref) of every token observed, nats."""
        ratio, ref = zip(*self._seen, strict=True)
        return torch.stack(ratio, 1), torch.stack(ref, 1)

    def speaker(self, row: int, steps: int) -> int:
        """The expert that speaks in a row; -1 is the reference."""
        return -1 if self._expert is None else int(self._expert[row])


class MixtureNextToken(NextToken):
    """Next-token function of the whole mixture: experts weighted by their posterior given the text so far.

        p(v given y_<t) = sum_k q_k(y_<t) p_k(v given y_<t)
        q_k(y_<t) proportional to w_k prod_{s<t} p_k(y_s given y_<s)

    Sampled from, it is the same distribution of texts as an expert drawn once (docs/method.md); unlike that, it gives
    the next-token distribution of the mixture itself, which streaming, greedy decoding and beams ask for. Called as
    `NextToken`; after each call tell it the tokens that were taken (`observe`), from which the posterior follows.

    Parameters
    ----------
    log_w : (rows, K), nats, weights of each row, normalised here; an expert of weight 0 (-inf) is not computed.
    temperature, top_k, top_p : as in `decoding.sample`, but applied to each expert: p_k is then the truncated, tempered
        distribution, in the mixture and in the posterior. Sample from the result at temperature 1 without truncation.

    Notes
    -----
    Returns log-probabilities (rows, vocabulary), nats. Holds one such table for each (row, expert) of finite weight.
    `scores` gives log p - log pi_ref, with the mixture's p as it was sampled from.
    """

    def __init__(
        self, experts: Experts, log_w: Float[Tensor, "rows experts"], temperature: float | int = 1.0,
        top_k: int | None = None, top_p: float | int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(experts.base[0])
        log_w = log_w.detach()
        check_log_w(log_w)
        self._voices = experts.voices(log_w > -torch.inf)
        self._spoken = True
        self._log_q = [log_w.log_softmax(-1)]
        self._options = (temperature, top_k, top_p)
        self._log_p: list[tuple[int, Tensor, Tensor]] = []

    @torch.inference_mode()
    def __call__(self, input_ids: Int[Tensor, "rows t"], attention_mask: Int[Tensor, "rows total"]) -> Tensor:
        """log p(v given y_<t), nats, (rows, vocabulary)."""
        ref, said = self._voices(input_ids, attention_mask)
        self._log_p = [(k, rows, truncated_log_probs(own, *self._options)) for k, rows, own in said]
        mixed = torch.full_like(ref, -torch.inf)
        for k, rows, log_p in self._log_p:
            mixed[rows] = torch.logaddexp(mixed[rows], self._log_q[-1][rows, k, None] + log_p)
        self._logits, self._ref_logits = mixed, ref
        return mixed

    @torch.inference_mode()
    def observe(self, tokens: Int[Tensor, "rows"]) -> None:
        """Keep what mixture and reference say of the tokens just taken, and update the posterior by them.

        Raises
        ------
        ValueError : a token that no expert of its row can say (the row is named).
        """
        log_q = self._log_q[-1].clone()
        for k, rows, log_p in self._log_p:
            log_q[rows, k] += log_p.gather(1, tokens[rows, None]).squeeze(1)
        impossible = (log_q == -torch.inf).all(1)
        if bool(impossible.any()):
            row = int(impossible.nonzero()[0])
            raise ValueError(f"row {row}: token {int(tokens[row])} has probability 0 under every expert; take another")
        super().observe(tokens)
        self._log_q.append(log_q.log_softmax(-1))

    def reorder(self, source: Int[Tensor, "rows"]) -> None:
        """Row i goes on from row source[i], whose weights are the same (beams)."""
        assert self._logits is not None and self._ref_logits is not None
        self._voices.reorder(source)
        self._log_q = [log_q[source] for log_q in self._log_q]
        self._logits, self._ref_logits = self._logits[source], self._ref_logits[source]
        self._seen = [(ratio[source], ref[source]) for ratio, ref in self._seen]
        for i, (k, rows, log_p) in enumerate(self._log_p):
            self._log_p[i] = (k, rows, log_p[place_of(rows, len(source))[source[rows]]])

    def log_q(self) -> Float[Tensor, "rows steps experts"]:
        """Posterior of the experts, nats: at step t given the first t tokens observed; step 0 is the prior."""
        return torch.stack(self._log_q, 1)

    def speaker(self, row: int, steps: int) -> int:
        """The most probable expert of a row given its first `steps` tokens."""
        return int(self._log_q[steps][row].argmax())


@dataclass(frozen=True)
class _Group:
    """One expert and the rows of a batch that it is computed for."""

    expert: int
    rows: Tensor
    active: Tensor
    down: Tensor
    up: Tensor

    def logits(self, hidden: Tensor, ref_logits: Tensor) -> Tensor:
        """The expert's logits of its rows, (own rows, vocabulary)."""
        logits = ref_logits[self.rows]
        logits[:, self.active] += (hidden[self.rows] @ self.down.T) @ self.up.T
        return logits


def _groups(experts: HeadExperts, chosen: Bool[Tensor, "rows experts"]) -> list[_Group]:
    """The experts that some row chose, each with its rows."""
    head = experts._require_active()
    return [
        _Group(k, rows, experts.active_ids, experts.down[k].detach(), (head @ experts.up[k]).detach())
        for k in range(experts.n_experts)
        if len(rows := chosen[:, k].nonzero().squeeze(1))
    ]


def reference_next_token(base: Base) -> NextToken:
    """Next-token function of the plain base."""
    return NextToken(base)
