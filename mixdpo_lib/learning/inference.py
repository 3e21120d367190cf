"""Who is thought to have answered? Exact responsibilities, relaxed draws from them, a recognition network.

A choice (`Exact`, `Relaxed`, `Recognition`) makes its part of the learner, which gives the weights of rows; the learner
has no branch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..base.features import TextFeatures, gather_positions, text_features
from ..base.model import Base
from ..data.pairs import Pairs
from ..elbo import elbo_terms, entropy, gumbel_softmax_samples, sum_over_units
from .table import LoglikTable

# --------------------------------------------------------------------------------------------------- the temperatures


@dataclass(frozen=True)
class Annealed:
    """A temperature that falls (or rises) geometrically from `start` to `end` over the fit, both above 0.

    >>> [round(Annealed(4.0, 0.25).at(share), 2) for share in (0.0, 0.5, 1.0)]
    [4.0, 1.0, 0.25]
    """

    start: float | int
    end: float | int

    def __post_init__(self) -> None:
        for name in ("start", "end"):
            _above_0(f"temperature {name}", getattr(self, name))

    def at(
        self,
        share: float | int,
        log_q: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> float:
        """At `share` (0 to 1) of the training."""
        return self.start * (self.end / self.start) ** min(1.0, max(0.0, share))


@dataclass(frozen=True)
class EffectiveExperts:
    """The temperature at which the mean of exp(entropy of z~) is `n`, above 1 and below K; found anew at every step."""

    n: float | int

    def __post_init__(self) -> None:
        if not 1 < self.n < math.inf:
            raise ValueError(f"EffectiveExperts({self.n}): expected above 1 and below K")

    @torch.no_grad()
    def at(
        self,
        share: float | int,
        log_q: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> float:
        """For the responsibilities log_q (rows, K) of the step.

        Raises
        ------
        ValueError : no responsibilities, or a target of K or more.
        """
        if log_q is None:
            raise ValueError("EffectiveExperts needs the responsibilities of the step: give log_q")
        n_experts = log_q.shape[-1]
        if n_experts > 1 and not self.n < n_experts:
            raise ValueError(
                f"EffectiveExperts({self.n}) with {n_experts} experts: expected below K"
            )
        noise = (
            torch.empty_like(log_q).exponential_(generator=generator).clamp_min(1e-30).log().neg()
        )
        low, high = math.log(0.01), math.log(100.0)
        for _ in range(30):  # exp(entropy) grows with the temperature
            middle = (low + high) / 2
            log_z = ((log_q.clamp_min(-1e4) + noise) / math.exp(middle)).log_softmax(-1)
            found = float(entropy(log_z).exp().mean())
            low, high = (middle, high) if found < self.n else (low, middle)
        return math.exp((low + high) / 2)


Temperature = float | int | Annealed | EffectiveExperts


def _above_0(name: str, value: float | int) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name}={value}: expected above 0, for example 1.0")


# ------------------------------------------------------------------------------------------------------- the choices


class Inference(ABC):
    """A choice; `part` makes what a learner holds of it.

    alone : whether it has something to weigh where there is one expert.
    """

    alone: ClassVar[bool] = False

    @abstractmethod
    def part(
        self, table: LoglikTable, data: Pairs, base: Base | None, seed: int
    ) -> Responsibilities:
        """What gives the weights of rows."""


@dataclass(frozen=True)
class Exact(Inference):
    """Responsibilities q ~ w prod sigma(D), of the table of last-seen log-likelihoods."""

    def part(
        self, table: LoglikTable, data: Pairs, base: Base | None, seed: int
    ) -> Responsibilities:
        """See `Inference.part`."""
        return Responsibilities(table)


@dataclass(frozen=True)
class Relaxed(Inference):
    """Gumbel-Softmax draws (Jang et al. 2017, arXiv 1611.01144) from the exact responsibilities.

    temperature : of the draws, above 0. n_samples : >= 1 draws a step. hard : one-hot draws with the gradient of the
    soft ones (straight-through).
    """

    temperature: Temperature = 1.0
    n_samples: int = 1
    hard: bool = False

    def __post_init__(self) -> None:
        _check_draws(self.temperature, self.n_samples)

    def part(
        self, table: LoglikTable, data: Pairs, base: Base | None, seed: int
    ) -> Responsibilities:
        """See `Inference.part`."""
        return RelaxedDraws(table, self, seed)


@dataclass(frozen=True)
class Recognition(Inference):
    """Gumbel-Softmax draws from a network that reads the pair, trained jointly with the experts.

    rate : learning rate of the network. The others : see `Relaxed`.
    """

    rate: float | int = 0.03
    temperature: Temperature = 1.0
    n_samples: int = 1
    hard: bool = False

    def __post_init__(self) -> None:
        _above_0("rate", self.rate)
        _check_draws(self.temperature, self.n_samples)

    def part(
        self, table: LoglikTable, data: Pairs, base: Base | None, seed: int
    ) -> Responsibilities:
        """See `Inference.part`.

        Raises
        ------
        ValueError : experts without a base, whose states the network reads.
        """
        if base is None:
            raise ValueError(
                "inference=Recognition(...) reads hidden states: give experts of a base, or use Exact()"
            )
        return RecognitionDraws(table, self, seed, text_features(base, data.texts), data.index)


def _check_draws(temperature: Temperature, n_samples: int) -> None:
    if isinstance(temperature, (float, int)):
        _above_0("gumbel temperature", temperature)
    if n_samples < 1:
        raise ValueError(f"n_samples={n_samples}: expected at least 1 draw a step")


# --------------------------------------------------------------------------------------------- parts of a learner


@dataclass(frozen=True)
class Moment:
    """Where a step stands: its number, share of the training (0 to 1), temperature of responsibilities, training?"""

    step: int
    share: float
    temperature: float
    training: bool


class Responsibilities(nn.Module):
    """Exact responsibilities; those who draw say otherwise where they differ.

    table : last-seen log-likelihoods of the training pairs, which the learner keeps up to date.
    """

    exact = True

    def __init__(self, table: LoglikTable) -> None:
        super().__init__()
        self._table = [table]  # in a list: the learner's own, not a second copy in a checkpoint

    @property
    def table(self) -> LoglikTable:
        """The evidence of every training pair by which the gate moves, nats."""
        return self._table[0]

    def describe(self, index: Int[Tensor, "pairs 2"]) -> Tensor | None:
        """What is read of these pairs besides the experts' likelihoods; None: nothing."""
        return None

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What is learned by gradient here."""
        return []

    def weights(
        self,
        row: Int[Tensor, "batch"],
        log_w: Float[Tensor, "latents experts"],
        now: Moment,
        described: Tensor | None = None,
    ) -> tuple[Float[Tensor, "batch experts"], Float[Tensor, ""]]:
        """Weight of each expert for these rows, and what the loss adds to the likelihoods' part, nats per pair."""
        return self.table.batch_log_q(row, log_w, now.temperature).exp(), log_w.new_zeros(())

    def measure(
        self, log_w: Float[Tensor, "latents experts"], index: Int[Tensor, "pairs 2"]
    ) -> dict[str, float]:
        """Further numbers of an evaluation."""
        return {}


class RelaxedDraws(Responsibilities):
    """z~ from the exact responsibilities, whose KL to the weights has no gradient."""

    exact = False

    def __init__(self, table: LoglikTable, choice: Relaxed | Recognition, seed: int) -> None:
        super().__init__(table)
        self.choice, self.seed = choice, seed

    def draw(
        self, log_q: Float[Tensor, "latents experts"], now: Moment
    ) -> Float[Tensor, "latents experts"]:
        """Mean of the draws of every latent; the generator is that of the step, so that a resumed fit repeats it."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + now.step)
        tau = self.choice.temperature
        tau = float(tau) if isinstance(tau, (float, int)) else tau.at(now.share, log_q, generator)
        return gumbel_softmax_samples(
            log_q, tau, self.choice.n_samples, self.choice.hard, generator
        ).mean(0)

    def weights(
        self,
        row: Int[Tensor, "batch"],
        log_w: Float[Tensor, "latents experts"],
        now: Moment,
        described: Tensor | None = None,
    ) -> tuple[Float[Tensor, "batch experts"], Float[Tensor, ""]]:
        """See `Responsibilities.weights`."""
        z = self.draw(self.table.log_q(log_w, now.temperature), now)
        return z[self.table.unit[row]], log_w.new_zeros(())


class RecognitionDraws(RelaxedDraws):
    """z~ from q_phi, through which gradients flow: a batch's evidence is fresh, that of other pairs as last seen."""

    def __init__(
        self,
        table: LoglikTable,
        choice: Recognition,
        seed: int,
        features: TextFeatures,
        index: Int[Tensor, "pairs 2"],
    ) -> None:
        super().__init__(table, choice, seed)
        self._features, self._rate = [features], choice.rate
        described = self.describe(index)
        n_features = described.shape[1]
        scale = described.std(0).clamp_min(1e-6) if len(described) > 1 else torch.ones(n_features)
        n_experts = table.loglik.shape[1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = RecognitionNetwork(
                n_features, n_experts, mean=described.mean(0), scale=scale
            )
        self.evidence = LoglikTable(table.unit.clone(), n_experts)
        self.evidence.fill(torch.zeros_like(self.evidence.loglik))

    @property
    def table(self) -> LoglikTable:
        """The network's own evidence."""
        return self.evidence

    def describe(self, index: Int[Tensor, "pairs 2"]) -> Float[Tensor, "pairs features"]:
        """The prompt's mean state, and the mean states of chosen minus rejected."""
        features = self._features[0]
        ids, place = torch.unique(index, return_inverse=True)
        hidden, _, segment = gather_positions(features, ids)
        total = torch.zeros(len(ids), hidden.shape[1]).index_add_(0, segment, hidden)
        mean = (total / torch.bincount(segment)[:, None])[place]
        prompt = torch.from_numpy(features.prompt_hidden)[index[:, 0]]
        return torch.cat([prompt, mean[:, 0] - mean[:, 1]], 1)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The network's."""
        return [{"params": list(self.network.parameters()), "lr": self._rate}]

    def weights(
        self,
        row: Int[Tensor, "batch"],
        log_w: Float[Tensor, "latents experts"],
        now: Moment,
        described: Tensor | None = None,
    ) -> tuple[Float[Tensor, "batch experts"], Float[Tensor, ""]]:
        """See `Responsibilities.weights`; the penalty is KL(q_phi || w)."""
        unit, n_units = self.evidence.unit[row], self.evidence.n_units
        fresh = self.network(described)
        if now.training:
            self.evidence.update(row, fresh)
        last = sum_over_units(self.evidence.loglik, self.evidence.unit, n_units)
        total = last + sum_over_units(fresh - fresh.detach(), unit, n_units)
        log_q = (log_w + total / now.temperature).log_softmax(1)
        kl = (log_q.exp() * (log_q - log_w)).sum(1) / torch.bincount(self.evidence.unit)
        return self.draw(log_q, now)[unit], kl[unit].mean()

    @torch.no_grad()
    def measure(
        self, log_w: Float[Tensor, "latents experts"], index: Int[Tensor, "pairs 2"]
    ) -> dict[str, float]:
        """`elbo_recognition`, the bound at q_phi: how far it lies below the bound is the amortisation gap."""
        device = self.network.mean.device
        parts = [self.network(self.describe(part).to(device)) for part in index.split(1024)]
        self.evidence.fill(torch.cat(parts))
        table = self._table[0]
        own = self.evidence.log_q(log_w)
        terms = elbo_terms(
            table.read(), log_w, own, table.unit, n_units=table.n_units, validate=False
        )
        return {"elbo_recognition": float(terms.elbo.sum()) / len(index)}


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
        self,
        n_features: int,
        n_experts: int,
        width: int = 32,
        mean: Tensor | None = None,
        scale: Tensor | None = None,
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
