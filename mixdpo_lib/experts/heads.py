"""Low-rank heads on a shared frozen base.

`HeadExperts` share a frozen base: expert k adds a low-rank correction to the base's head,

    logits_k = W h + 1[v active] W B_k A_k h,

on the last hidden state h. Tokens outside the active set keep the base's logit, so their total mass is one constant per
position and every expert is exactly normalised over the whole vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..base.features import PairFeatures, TextFeatures, gather_positions
from ..base.head import HeadConstants, check_head, logit_map, reference_constants
from ..base.model import Base
from .contract import Experts, Voices, check_chosen, read_on
from .low_rank import LowRankTokenLogps, Workspace


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
        self._workspace = Workspace()
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
            check_chosen(chosen, n_texts, self.n_experts)
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
        return LowRankTokenLogps.apply(
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
        return HeadVoices(self._base, self, chosen)


class HeadVoices(Voices):
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
