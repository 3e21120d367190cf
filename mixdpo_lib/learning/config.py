"""What may be chosen of a fit, when does it stop, and what does it leave?"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pandas as pd
from torch import Tensor

from .inference import GumbelSchedule
from .starts import SYMMETRY_BREAKING

STOP_REASONS = (
    "tolerance", "max_iter", "bound_decreased", "no_improvement", "non_finite", "dead_expert", "interrupted",
)  # fmt: skip


@dataclass
class Monitor:
    """Watches a score that should rise (validation log-likelihood, nats per pair) and says when and why to stop.

    >>> watch = Monitor(patience=2)
    >>> [watch.step(score) for score in (-0.70, -0.60, -0.61, -0.62)]
    [None, None, None, 'no_improvement']
    >>> watch.best_step
    1
    """

    patience: int
    min_usage: float = 0.0
    best: float = -math.inf
    best_step: int = -1
    scores: list[float] = field(default_factory=list)

    def step(self, score: float, usage: list[float] | None = None) -> str | None:
        """Take the next score; returns a stop reason, or None to go on."""
        self.scores.append(score)
        if not math.isfinite(score):
            return "non_finite"
        if usage and min(usage) < self.min_usage:
            return "dead_expert"
        if score > self.best:
            self.best, self.best_step = score, len(self.scores) - 1
        elif self.patience and len(self.scores) - 1 - self.best_step >= self.patience:
            return "no_improvement"
        return None


INFERENCE = ("exact", "relaxed", "recognition")


@dataclass(frozen=True)
class FitConfig:
    """How a mixture is fitted. The defaults are common values, not tuned ones; study/review_users.py has those of the study."""

    latent: str = "unit"  # "unit": one latent expert a unit (user); "pair": one a comparison
    unit: str = "user"  # the column that says which pairs share a latent
    learning_rate: float = 1e-3
    passes: float = 3.0  # over the training pairs
    batch_size: int = 32  # pairs, or prompts with batch_by="prompt"; all processes together
    accumulate: int = 1  # batches a step; each is computed alone, so that memory holds one of them
    bf16: bool = False  # blocks under bfloat16 autocast; heads and log-probabilities stay float32
    batch_by: str = "pair"  # "prompt": all pairs of a prompt in one batch, so that texts they share are computed once
    weight_decay: float = 0.0
    optimizer: str = "adamw"  # or "sgd": momentum 0.9, no scaling by coordinate
    warmup: float = 0.05  # share of the steps
    symmetry_breaking: str = "random_responsibilities"  # see SYMMETRY_BREAKING; "clusters" of what the gate reads
    cluster_by: str = ""  # column whose rows share a cluster, such as a work that several templates ask about
    cluster_certainty: float = 0.8  # responsibility of the expert of a row's cluster, above 1/K and below 1
    symmetry_passes: float = 0.25  # how long the random responsibilities (or the clusters) stand
    symmetry_scale: float = 1e-3  # standard deviation of B_k with "random_heads"
    start_temperature: float = 8.0  # of tempered responsibilities, q ~ w exp(sum loglik / T); falls to 1
    tempering_passes: float = 1.0  # T reaches 1 here
    restarts: int = 1  # short fits from other seeds; the one with the best training likelihood goes on
    restart_passes: float = 1.0  # length of each of them
    evaluations_per_pass: float | int = 2  # below 1: one in several passes
    evaluate_training: bool = True  # an evaluation computes all training pairs anew; False: as last seen, faster
    patience: int = 0  # evaluations without a better validation likelihood before stopping; 0: never
    min_usage: float = 0.0  # mean responsibility below which an expert ends the fit as dead; 0: reported, never fatal
    inference: str = "exact"  # responsibilities: "exact"; "relaxed" draws from them; "recognition" network, see inference.py
    recognition_rate: float = 0.03  # learning rate of the recognition network
    gumbel_temperature: float = 1.0  # of the relaxed draws; the first one where the schedule changes it
    gumbel_schedule: str = "constant"  # see GumbelSchedule
    gumbel_end: float = 0.1  # last temperature of "exponential"
    effective_experts: float = 1.5  # what "effective_experts" holds
    n_samples: int = 1  # relaxed draws a step
    hard: bool = False  # one-hot draws with the gradient of the soft ones (straight-through)
    gate_exponent: float = 0.6  # Robbins-Monro: rho_t = (t + 1) ** -gate_exponent, between 0.5 and 1
    gate_iterations: int = 5  # of L-BFGS in each M-step of a gate that reads
    gate_entropy: float = 0.0  # weight of the entropy of single weights in the gate's loss: keeps routing undecided
    gate_balance: float = 0.0  # weight of KL(mean weight || uniform): keeps any expert from starving
    top_s: int | None = None  # experts computed for a pair once tempering is over, by a gate that reads; None: all
    seed: int = 0

    def __post_init__(self) -> None:
        if self.latent not in ("unit", "pair"):
            raise ValueError(f"latent={self.latent!r}: possible are 'unit' (one a user) and 'pair' (one a comparison)")
        if self.symmetry_breaking not in SYMMETRY_BREAKING:
            raise ValueError(f"symmetry_breaking={self.symmetry_breaking!r}: possible are {SYMMETRY_BREAKING}")
        for name in (
            "learning_rate", "passes", "batch_size", "accumulate", "restarts", "evaluations_per_pass", "n_samples",
            "recognition_rate", "gate_iterations",
        ):  # fmt: skip
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: expected more than 0")
        if not 0 < self.cluster_certainty < 1:
            raise ValueError(f"cluster_certainty={self.cluster_certainty}: expected above 0 and below 1")
        if self.batch_by not in ("pair", "prompt"):
            raise ValueError(f"batch_by={self.batch_by!r}: possible are 'pair' and 'prompt' (all pairs of a prompt)")
        if self.optimizer not in ("adamw", "sgd"):
            raise ValueError(f"optimizer={self.optimizer!r}: possible are 'adamw' and 'sgd' (momentum 0.9)")
        if self.start_temperature < 1:
            raise ValueError(f"start_temperature={self.start_temperature}: expected at least 1, which is no tempering")
        if not 0 <= self.min_usage < 1:
            raise ValueError(f"min_usage={self.min_usage}: expected in [0, 1); 0 never ends a fit")
        if self.top_s is not None and self.inference != "exact":
            raise ValueError(f"top_s={self.top_s} with inference={self.inference!r}: expected 'exact', or no top_s")
        if self.inference not in INFERENCE:
            raise ValueError(f"inference={self.inference!r}: possible are {INFERENCE}")
        self.schedule()
        if not 0.5 < self.gate_exponent <= 1:
            raise ValueError(f"gate_exponent={self.gate_exponent}: expected in (0.5, 1], so that sum rho^2 is finite")

    def schedule(self) -> GumbelSchedule:
        """The temperatures of the relaxed draws."""
        return GumbelSchedule(
            self.gumbel_schedule, self.gumbel_temperature, self.gumbel_end, self.effective_experts
        )


@dataclass
class FitResult:
    """What a fit leaves: one row an evaluation, why it stopped, every restart, parameters at the best and last of them.

    losses : of each step since the start or the last resumption, nats per pair.
    """

    history: pd.DataFrame
    stop_reason: str
    best_step: int
    restarts: pd.DataFrame
    snapshots: dict[int, dict[str, Tensor]] = field(repr=False, default_factory=dict)
    losses: list[float] = field(repr=False, default_factory=list)
