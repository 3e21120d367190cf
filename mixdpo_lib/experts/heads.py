"""Low-rank heads on a shared frozen base.

`HeadExperts` share a frozen base: expert k adds a low-rank correction to the base's head, and makes it sharper,

    logits_k(v) = z_v + 1[v active] ((W B_k A_k h)_v + s_k (z_v - mean_active(h))),        z = W h,

on the last hidden state h. Tokens outside the active set keep the base's logit, so their total mass is one constant per
position and every expert is exactly normalised over the whole vocabulary. mean_active is the mean logit of the active
tokens, weighed by their probability under the base: to first order in s_k their total mass stays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..base.architecture import logit_map
from ..base.features import TextFeatures, gather_positions, text_features
from ..base.head import HeadConstants, reference_constants
from ..base.model import Base
from ..data.pairs import Pairs, Texts
from .active import ActiveHead
from .contract import Experts, Voices, check_chosen, check_sharpness_rate
from .head_voices import HeadGroup, HeadVoices
from .leaving import head_as_adapter, head_as_model
from .low_rank import Workspace, corrected_logits, low_rank_text_logps


class HeadExperts(ActiveHead):
    """K low-rank heads on one frozen base.

    Parameters
    ----------
    base : the frozen language model, see `load_base`. It is also the reference of every expert.
    n_experts : K >= 1; 1 is plain DPO.
    rank : r >= 1, rank of each head; 8 by default, not tuned.
    active : "responses" (tokens of the training responses, see `activate`) or "all".
    min_count : with "responses", how often a token has to occur to be active. Seen once is half of all; each costs time.
    sharpness : whether each expert has a number s_k, 0 at the start: pi_k is proportional to pi_ref^(1 + s_k) where
        B_k = 0 and all tokens are active. No head of low rank can say that. `sharpness` is a parameter (K,), or None.
    sharpness_rate : learning rate of s_k as a share of the head's.
    weight_decay : >= 0, strength of a Gaussian prior on B_k: the optimiser's weight decay of B, divided by K, since an
        expert owns about 1/K of the pairs.

    Notes
    -----
    All experts start with the same A and B_k = 0, the reference (parting them: `FitConfig.start`). A is random until
    `activate_responses` has seen the training responses: then its rows read the mean and the first r - 1 principal
    directions of their hidden states, each with mean square 1/r (after Paischer et al. 2024, arXiv 2410.07170, who
    start LoRA so). On frozen features a head learns little that A does not read then.
    """

    rates = {"adamw": 3e-3, "sgd": 0.03}  # on 30 pairs and on the study, see docs/log.md

    def __init__(
        self,
        base: Base,
        n_experts: int = 3,
        rank: int = 8,
        active: str = "responses",
        min_count: int = 1,
        sharpness: bool = True,
        sharpness_rate: float | int = 1 / 3,
        weight_decay: float | int = 0.0,
    ) -> None:
        super().__init__(base, n_experts, active, min_count)
        if rank < 1:
            raise ValueError(f"rank={rank}: each head needs a rank of at least 1")
        check_sharpness_rate(sharpness_rate)
        if not 0 <= weight_decay < float("inf"):
            raise ValueError(f"weight_decay={weight_decay}: expected 0 (none) or above")
        self.rank = rank
        self.sharpness_rate, self.weight_decay = sharpness_rate, weight_decay
        generator = torch.Generator().manual_seed(0)
        down = torch.randn(1, rank, base.hidden_size, generator=generator) / base.hidden_size**0.5
        self.down = nn.Parameter(down.repeat(n_experts, 1, 1))
        self.up = nn.Parameter(torch.zeros(n_experts, base.hidden_size, rank))
        start = nn.Parameter(torch.zeros(n_experts)) if sharpness else None
        self.register_parameter("sharpness", start)
        self._workspace = Workspace()

    sharpness: nn.Parameter | None

    def options(self) -> dict[str, Any]:
        """What makes equal experts but for their parameters."""
        names = ("n_experts", "rank", "active", "min_count", "sharpness_rate", "weight_decay")
        sharpness = self.sharpness is not None
        return {name: getattr(self, name) for name in names} | {"sharpness": sharpness}

    @classmethod
    def from_options(cls, options: Mapping[str, Any], find_base: Callable[..., Base]) -> Experts:
        """See `Experts.from_options`; heads that were saved before there was sharpness have none."""
        return cls(find_base(), **{"sharpness": False, **options})

    def parameter_groups(self, rate: float) -> list[dict[str, Any]]:
        """A and B at the rate, B with its decay, s at `sharpness_rate` of the rate."""
        decay = self.weight_decay / self.n_sets
        up: dict[str, Any] = {"params": [self.up], "lr": rate, "weight_decay": decay}
        groups: list[dict[str, Any]] = [{"params": [self.down], "lr": rate}, up]
        if self.sharpness is not None:
            groups.append({"params": [self.sharpness], "lr": rate * self.sharpness_rate})
        return groups

    # ------------------------------------------------------------------------------------------------ active tokens

    def start(self, data: Pairs) -> None:
        """Choose the active tokens and A by these training responses, unless it was done (`activate_responses`)."""
        if len(self.active_ids) == 0 or (self.active == "all" and not bool(self.up.any())):
            self.activate_responses(data)

    def activate_responses(self, data: Pairs) -> None:
        """Start from these training responses: A reads their hidden states, and with active="responses" the active
        tokens are theirs."""
        features = text_features(self._base, data.texts)
        hidden, positions, _ = gather_positions(features, torch.unique(data.index))
        if self.active == "responses":
            tokens, counts = torch.unique(
                torch.from_numpy(features.tokens)[positions], return_counts=True
            )
            self.activate(tokens[counts >= self.min_count])
        rows = reading_directions(hidden, self.rank)
        with torch.no_grad():
            self.down[:, : len(rows)] = rows.to(self.down.device)

    def perturb(self, scale: float, generator: torch.Generator) -> None:
        """Symmetry breaking "random_heads": B_k ~ N(0, scale^2), drawn for each expert; A stays."""
        with torch.no_grad():
            self.up.copy_(torch.randn(self.up.shape, generator=generator) * scale)

    @torch.no_grad()
    def scale(self, factor: float) -> None:
        """Multiply every B_k and s_k, in place: pi_k proportional to pi_ref exp(factor x change of the logits), as
        another beta would give."""
        self.up.mul_(factor)
        if self.sharpness is not None:
            self.sharpness.mul_(factor)

    # ------------------------------------------------------------------------------------------------- likelihoods

    def constants(self, texts: Texts) -> tuple[TextFeatures, HeadConstants]:
        """Hidden states of the texts, and what the frozen head says of every position; from the cache if there."""
        self.active_head()
        features = text_features(self._base, texts)
        return features, reference_constants(self._base, features, self.active_ids.cpu().numpy())

    def batch(
        self, constants: tuple[TextFeatures, HeadConstants], pairs: Int[Tensor, "pairs 2"]
    ) -> dict[str, Tensor]:
        """Everything `logps` reads for these pairs; each distinct text is held, and later computed, once."""
        features, head = constants
        ids, place = torch.unique(pairs, return_inverse=True)
        hidden, positions, segment = gather_positions(features, ids)
        tokens = torch.from_numpy(features.tokens)[positions]
        token_logit = torch.from_numpy(head.token_logit)[positions]
        logps = token_logit - torch.from_numpy(head.lse)[positions]
        return {
            "hidden": hidden,
            "target": self.place_among_active(tokens),
            "token_logit": token_logit,
            "lse_inactive": torch.from_numpy(head.lse_inactive)[positions],
            "mean_active": torch.from_numpy(head.mean_active)[positions],
            "segment": segment,
            "place": place,
            "text_ref_logps": torch.zeros(len(ids)).index_add_(0, segment, logps)[:, None],
        }

    def text_logps(
        self, batch: dict[str, Tensor], chosen: Bool[Tensor, "texts experts"] | None = None
    ) -> Float[Tensor, "texts experts"]:
        """See `Experts.text_logps`. float32 whatever the blocks of a model are computed in."""
        device, texts = self.up.device, len(batch["text_ref_logps"])
        if chosen is not None:
            check_chosen(chosen, texts, self.n_experts)
        head, bias = self.active_head()
        head, bias = head.to(device), None if bias is None else bias.to(device)
        with torch.autocast(device.type, enabled=False):
            work = (chosen, self._map, self._workspace)
            return low_rank_text_logps(batch, self.down, self.up, self.sharpness, head, bias, *work)

    def unmoved(self, k: int) -> bool:
        """See `Experts.unmoved`: B_k = 0 and s_k = 0."""
        _, up, s = self.low_rank(k)
        return s == 0 and not bool(up.any())

    # ----------------------------------------------------------------------------------------- speaking and leaving

    def voices(self, chosen: Bool[Tensor, "rows experts"] | None) -> Voices:
        """See `Experts.voices`: the base reads every row once, whatever experts it chose."""
        groups = []
        for k in range(0 if chosen is None else self.n_experts):
            if len(rows := chosen[:, k].nonzero().squeeze(1)):  # type: ignore[index]
                down, up, s = self.low_rank(k)
                there = self._base.device  # experts that were not fitted there lie on the processor
                down, up = down.to(there), self.active_head()[0].to(there) @ up.to(there)
                own = None if self.sharpness is None else s
                groups.append(HeadGroup(k, rows, self.active_ids, down, up, own))
        return HeadVoices(self._base, groups)

    def low_rank(self, k: int) -> tuple[Tensor, Tensor, float]:
        """A_k (rank, hidden), B_k (hidden, rank) and s_k (0 without); no gradient flows."""
        s = 0.0 if self.sharpness is None else float(self.sharpness[k].detach())
        return self.down[k].detach(), self.up[k].detach(), s

    def head_correction(
        self, k: int
    ) -> tuple[Float[Tensor, "rank hidden"], Float[Tensor, "tokens rank"]]:
        """A_k, and W B_k with zero rows for tokens that are not active: logits_k = W h + (W B_k) A_k h, where s_k = 0."""
        down, own, _ = self.low_rank(k)
        up = torch.zeros(self._head.weight.shape[0], own.shape[1], device=own.device)
        up[self.active_ids.to(up.device)] = self.active_head()[0].to(up.device) @ own
        return down, up

    def as_adapter(self, k: int) -> Any:
        """Expert k as LoRA on the output head; refused where s_k is not 0. See `leaving.head_as_adapter`."""
        return head_as_adapter(k, self._base.model, *self.head_correction(k), self.low_rank(k)[2])

    def as_model(self, k: int) -> Any:
        """Expert k as a plain model; refused where no plain head says the same. See `leaving.head_as_model`."""
        whole = len(self.active_ids) == self._head.weight.shape[0] and self._map is None
        return head_as_model(
            k, self._base.model, *self.head_correction(k), self.low_rank(k)[2], whole
        )


def reading_directions(
    hidden: Float[Tensor, "positions hidden"], rank: int
) -> Float[Tensor, "directions hidden"]:
    """Where A starts: the mean and the first rank - 1 principal directions of hidden states, mean square 1 / rank.

    Fewer than `rank` rows where the states have fewer directions. After Paischer et al. 2024, arXiv 2410.07170.
    """
    mean = hidden.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov(hidden.T, correction=0))
    rows = [mean / mean.square().sum()]
    for i in range(1, min(rank, len(values) + 1)):
        if (
            values[-i] > 1e-6 * values[-1]
        ):  # fewer directions than rows in a tiny set: the random ones stay
            direction = (
                vectors[:, -i] * vectors[:, -i].sum().sign()
            )  # eigenvectors have no sign of their own
            rows.append(direction / values[-i].sqrt())
    return torch.stack(rows) / rank**0.5


@torch.no_grad()
def prefix_kl(
    experts: HeadExperts,
    texts: Texts,
    ids: Int[Tensor, "texts"],
    scales: Sequence[float] = (1.0,),
    block: int = 64,
) -> Float[np.ndarray, "scales experts"]:
    """Mean over texts of sum_t KL(pi_k(. given prefix) || pi_ref(. given prefix)) on given texts, nats a text.

    The prefixes come from the reference, so this is not the KL of the policy's own samples; it rises with it and costs
    no sampling. `scales` multiply B_k and s_k, see `HeadExperts.scale`. Source: docs/method.md.
    """
    constants, (head, bias) = experts.constants(texts), experts.active_head()
    mapped = logit_map(experts.base[0].model.config.get_text_config())
    total = np.zeros((len(scales), experts.n_experts))
    for at in ids.split(block):
        batch = experts.batch(constants, torch.stack([at, at], 1))
        hidden, inactive, mean = batch["hidden"], batch["lse_inactive"], batch["mean_active"]
        plain = hidden @ head.T
        if bias is not None:
            plain += bias
        logits = plain if mapped is None else mapped(plain)
        lse = torch.logaddexp(logits.logsumexp(1), inactive)
        for k in range(experts.n_experts):
            down, up, sharper = experts.low_rank(k)
            shift = (hidden @ down.T) @ (head @ up).T
            s = None if experts.sharpness is None else sharper
            for i, scale in enumerate(scales):
                own = None if s is None else scale * s
                moved = corrected_logits(plain, scale * shift, own, mean, mapped)
                lse_k = torch.logaddexp(moved.logsumexp(1), inactive)
                p = (moved - lse_k[:, None]).exp()
                total[i, k] += float(((p * (moved - logits)).sum(1) - lse_k + lse).sum())
    return total / len(ids)
