"""Which experts are computed, and what keeps a gate from collapsing? Choices of sparse fits, and what they hold."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..elbo import keep_top_s
from ..gates.contract import Gate
from .choices import Choices

DEAD_SHARE = 0.1  # of 1/K: an expert that is routed to less often is dead in a sparse fit


@dataclass(frozen=True)
class Routing(Choices):
    """Of gates that read; the defaults leave everything as it is.

    top_s : experts that a pair is routed to, those of largest weight; None: all of them. One more, drawn at random, is
        computed too, which keeps the table of last-seen likelihoods fresh.
    anneal : >= 0, passes in which the number of experts computed falls from K to `top_s`; 0: `top_s` from the first
        step on.
    entropy : >= 0, weight of the entropy of single rows in the gate's loss: keeps routing undecided.
    balance : >= 0, weight of KL(mean weight || uniform) in it: keeps any expert from starving (Shazeer et al. 2017,
        arXiv 1701.06538, balance the load of sparse experts). None: 1 with `top_s` below K, where experts die without
        (docs/log.md), 0 otherwise.

    >>> Routing(top_s=0)
    Traceback (most recent call last):
    ...
    ValueError: top_s=0: expected at least 1 expert, or None for all of them
    """

    top_s: int | None = None
    anneal: float | int = 0.0
    entropy: float | int = 0.0
    balance: float | int | None = None

    def __post_init__(self) -> None:
        if self.top_s is not None and self.top_s < 1:
            raise ValueError(
                f"top_s={self.top_s}: expected at least 1 expert, or None for all of them"
            )
        for name in ("anneal", "entropy", "balance"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise ValueError(f"{name}={value}: expected 0 or above; 0 leaves it out")
        if self.top_s is None and self.anneal:
            raise ValueError(
                f"anneal={self.anneal} without top_s: it says when so few experts are computed; give top_s, or leave it "
                "out"
            )
        if self.top_s is not None and self.entropy:
            raise ValueError(
                f"entropy={self.entropy} with top_s={self.top_s}: the one keeps single rows undecided, the other decides "
                "them; give one of the two"
            )

    def balance_weight(self, n_experts: int) -> float:
        """`balance`, or what stands for None."""
        sparse = self.top_s is not None and self.top_s < n_experts
        return float(sparse if self.balance is None else self.balance)

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


class Router:
    """Chooses the experts of rows. Draws depend on seed and step alone, so that a fit resumes."""

    def __init__(self, routing: Routing, n_experts: int, seed: int) -> None:
        self.routing, self.n_experts, self.seed = routing, n_experts, seed

    def n_routed(self, passes: float | int) -> int:
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
        self, log_w: Float[Tensor, "rows experts"], passes: float | int, step: int
    ) -> Bool[Tensor, "rows experts"] | None:
        """Which experts are computed for these rows: those routed to, and one at random. None: all.

        passes, step : where the fit stands.
        """
        s = self.n_routed(passes)
        if s >= self.n_experts:
            return None
        routed = keep_top_s(log_w, s) > -torch.inf
        draw = torch.Generator().manual_seed(1_000_003 * self.seed + step)
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
