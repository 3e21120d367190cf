"""Which experts are computed, and what keeps a gate from collapsing? Choices of sparse fits, and what they hold."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ..elbo import keep_top_s
from ..gates.contract import Gate
from .inference import Annealed, EffectiveExperts

DEAD_SHARE = 0.1  # of 1/K: an expert that is routed to less often is dead in a sparse fit


@dataclass(frozen=True)
class Routing:
    """Of gates that read; the defaults leave everything as it is.

    top_s : experts that a pair is routed to, those of largest weight; None: all of them. One more, drawn at random, is
        computed too, which keeps the table of last-seen likelihoods fresh.
    anneal : >= 0, passes in which the number of experts computed falls from K to `top_s`; 0: `top_s` from the first
        step on.
    noise : temperature of Gumbel noise on the weights by which experts are chosen: a number, `Annealed` or
        `EffectiveExperts`; 0: none.
    bias : >= 0, how far a step moves a number for each expert that is added to its log-weight where experts are chosen,
        up where it was chosen too rarely; it carries no gradient (Wang et al. 2024, arXiv 2408.15664).
    revival : whether a dead expert restarts after each pass as a copy of the busiest one, with half of its inputs.
    entropy : >= 0, weight of the entropy of single rows in the gate's loss: keeps routing undecided.
    balance : >= 0, weight of KL(mean weight || uniform) in it: keeps any expert from starving (Shazeer et al. 2017,
        arXiv 1701.06538, balance the load of sparse experts).

    >>> Routing(top_s=0)
    Traceback (most recent call last):
    ...
    ValueError: top_s=0: expected at least 1 expert, or None for all of them
    """

    top_s: int | None = None
    anneal: float | int = 0.0
    noise: float | int | Annealed | EffectiveExperts = 0.0
    bias: float | int = 0.0
    revival: bool = False
    entropy: float | int = 0.0
    balance: float | int = 0.0

    def __post_init__(self) -> None:
        if self.top_s is not None and self.top_s < 1:
            raise ValueError(
                f"top_s={self.top_s}: expected at least 1 expert, or None for all of them"
            )
        for name in ("anneal", "noise", "bias", "entropy", "balance"):
            value = getattr(self, name)
            if isinstance(value, (int, float)) and not 0 <= value < float("inf"):
                raise ValueError(f"{name}={value}: expected 0 or above; 0 leaves it out")
        if self.top_s is None:
            for name in ("anneal", "noise", "bias", "revival"):
                if getattr(self, name):
                    raise ValueError(
                        f"{name}={getattr(self, name)} without top_s: it acts on which experts are computed; give "
                        "top_s, or leave it out"
                    )
        if self.bias and self.balance:
            raise ValueError(
                f"bias={self.bias} with balance={self.balance}: the bias moves choices that the gate does not follow, "
                "the balance moves the gate; give one of the two"
            )
        if self.noise and self.entropy:
            raise ValueError(
                f"noise={self.noise} with entropy={self.entropy}: noise that falls lets routing decide, the entropy "
                "keeps it undecided; give one of the two"
            )

    def check(self, gate: Gate) -> None:
        """Refuse what this gate cannot do: all of it acts on gates that read.

        Raises
        ------
        ValueError : an input-free gate; top_s out of range.
        """
        if self != Routing() and not gate.reads:
            raise ValueError(
                f"{self} with {type(gate).__name__}, which reads nothing: the same experts would be left out of every "
                "pair, and never learn; use a gate that reads, or no routing"
            )
        if self.top_s is not None and self.top_s > gate.n_experts:
            raise ValueError(
                f"top_s={self.top_s} with {gate.n_experts} experts: expected 1 ... {gate.n_experts}"
            )


class Router(nn.Module):
    """Chooses the experts of rows, and holds the bias. Draws depend on seed and step alone, so that a fit resumes."""

    bias: Tensor

    def __init__(self, routing: Routing, n_experts: int, seed: int) -> None:
        super().__init__()
        self.routing, self.n_experts, self.seed = routing, n_experts, seed
        self.register_buffer("bias", torch.zeros(n_experts))

    def n_routed(self, passes: float) -> int:
        """How many experts a pair is routed to after so many passes: geometric from K to `top_s`.

        >>> router = Router(Routing(top_s=1, anneal=2.0), 16, seed=0)
        >>> [router.n_routed(passes) for passes in (0.0, 1.0, 1.9, 2.0)]
        [16, 4, 2, 1]
        """
        routing = self.routing
        s = self.n_experts if routing.top_s is None else routing.top_s
        share = min(1.0, passes / routing.anneal) if routing.anneal else 1.0
        exact: float = self.n_experts ** (1 - share) * s**share
        return max(s, -int(-(exact - 1e-9) // 1))

    @torch.no_grad()
    def chosen(
        self, log_w: Float[Tensor, "rows experts"], passes: float, share: float, step: int
    ) -> Bool[Tensor, "rows experts"] | None:
        """Which experts are computed for these rows: those routed to, and one at random. None: all.

        passes, share, step : where the fit stands.
        """
        s = self.n_routed(passes)
        if s >= self.n_experts:
            return None
        draw = torch.Generator().manual_seed(1_000_003 * self.seed + step)
        scores, noise = log_w + self.bias, self.routing.noise
        if noise:
            t = noise if isinstance(noise, (int, float)) else noise.at(share, log_w, draw)
            exponential = torch.empty(log_w.shape).exponential_(generator=draw).clamp_min(1e-30)
            scores = scores - t * exponential.log().to(log_w)
        routed = keep_top_s(scores, s) > -torch.inf
        if self.training and self.routing.bias:
            used = routed.float().mean(0)
            self.bias += self.routing.bias * (used.mean() - used).sign()
        other = torch.rand(log_w.shape, generator=draw).to(log_w.device).masked_fill(routed, -1.0)
        return routed.scatter(1, other.argmax(1, keepdim=True), True)


def routed_share(log_w: Float[Tensor, "latents experts"], top_s: int) -> Float[Tensor, "experts"]:
    """Share of the latents that are routed to each expert.

    >>> routed_share(torch.tensor([[0.6, 0.4], [0.7, 0.3]]).log(), 1)
    tensor([1., 0.])
    """
    return (keep_top_s(log_w, top_s) > -torch.inf).float().mean(0)


def dead_in_routing(share: Float[Tensor, "experts"]) -> list[int]:
    """Experts that less than a tenth of 1/K is routed to."""
    return (share < DEAD_SHARE / len(share)).nonzero().squeeze(1).tolist()
