"""Who is thought to have answered? Relaxed draws and the recognition network."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..elbo import entropy


class RecognitionNetwork(nn.Module):
    """q_phi(z given x, y+, y-): an approximate posterior read from the pair itself, trained jointly with the experts.

    The network gives every pair its evidence f_nk, and log q = log_softmax(log w + f) for a latent per pair,
    log_softmax(log w + sum of f over the unit's pairs) for a latent per unit: the form of the exact posterior, with f
    in the place of log sigma(D). It starts at f = 0, where q is the gate. Source: derived in docs/method.md.

    Parameters
    ----------
    n_features : numbers that describe a pair. n_experts : K. width : hidden units, 32 by default.
    mean, scale : (features,), of the training pairs; inputs are standardised by them. Part of a checkpoint.

    >>> RecognitionNetwork(n_features=4, n_experts=2)(torch.ones(1, 4))
    tensor([[0., 0.]], grad_fn=<AddmmBackward0>)
    """

    mean: Tensor
    scale: Tensor

    def __init__(
        self, n_features: int, n_experts: int, width: int = 32, mean: Tensor | None = None, scale: Tensor | None = None
    ) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(n_features) if mean is None else mean)
        self.register_buffer("scale", torch.ones(n_features) if scale is None else scale)
        self.inner, self.outer = nn.Linear(n_features, width), nn.Linear(width, n_experts)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, features: Float[Tensor, "pairs features"]) -> Float[Tensor, "pairs experts"]:
        """Evidence f_nk of every pair, nats; gradients flow."""
        return self.outer(torch.tanh(self.inner((features - self.mean) / self.scale)))


GUMBEL_SCHEDULES = ("constant", "exponential", "effective_experts")


@dataclass(frozen=True)
class GumbelSchedule:
    """Which `gumbel_temperature` a step has.

    kind : "constant" (start throughout), "exponential" (geometric from start to end), or "effective_experts" (the
        temperature at which the mean of exp(entropy of z~) is `effective_experts`, found anew at every step).
    start, end : > 0. effective_experts : above 1 and below K.

    >>> [round(GumbelSchedule("exponential", 4.0, 0.25).temperature(share), 2) for share in (0.0, 0.5, 1.0)]
    [4.0, 1.0, 0.25]
    """

    kind: str = "constant"
    start: float = 1.0
    end: float = 0.1
    effective_experts: float = 1.5

    def __post_init__(self) -> None:
        if self.kind not in GUMBEL_SCHEDULES:
            raise ValueError(f"gumbel_schedule={self.kind!r}: possible are {GUMBEL_SCHEDULES}")
        for name in ("start", "end"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"gumbel_temperature {name}={getattr(self, name)}: expected above 0, for example 1.0")
        if not 1 < self.effective_experts < math.inf:
            raise ValueError(f"effective_experts={self.effective_experts}: expected above 1 and below K")

    @torch.no_grad()
    def temperature(
        self, share: float, log_q: Tensor | None = None, generator: torch.Generator | None = None
    ) -> float:
        """At `share` (0 to 1) of the training; "effective_experts" reads the responsibilities log_q (rows, K) as well.

        Raises
        ------
        ValueError : "effective_experts" without log_q, or a target of K or more.
        """
        if self.kind == "constant":
            return self.start
        if self.kind == "exponential":
            return self.start * (self.end / self.start) ** min(1.0, max(0.0, share))
        if log_q is None:
            raise ValueError("gumbel_schedule='effective_experts' needs the responsibilities of the step: give log_q")
        n_experts = log_q.shape[-1]
        if n_experts > 1 and not self.effective_experts < n_experts:
            raise ValueError(f"effective_experts={self.effective_experts} with {n_experts} experts: expected below K")
        noise = torch.empty_like(log_q).exponential_(generator=generator).clamp_min(1e-30).log().neg()
        low, high = math.log(0.01), math.log(100.0)
        for _ in range(30):  # exp(entropy) grows with the temperature
            middle = (low + high) / 2
            log_z = ((log_q.clamp_min(-1e4) + noise) / math.exp(middle)).log_softmax(-1)
            found = float(entropy(log_z).exp().mean())
            low, high = (middle, high) if found < self.effective_experts else (low, middle)
        return math.exp((low + high) / 2)
