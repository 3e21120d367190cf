"""What may be chosen of a fit, and when does it stop?"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from .choices import Choices
from .inference import Exact, Inference
from .routing import Routing
from .starts import Start

STOP_REASONS = (
    "tolerance",
    "max_iter",
    "bound_decreased",
    "no_improvement",
    "non_finite",
    "diverged",
    "dead_expert",
    "interrupted",
)
DIVERGED = 10.0  # nats a pair below the first bound: an answer wrong with odds of e^10, where ignorance costs .69

# further steps at which a small set, which is passed often, is looked at: it is soon learned by heart
EARLY = (2, 5, 10, 20)


@dataclass(frozen=True)
class Stop(Choices):
    """When a fit ends before its last step.

    patience : evaluations without a better validation likelihood, early ones not counted; 0: never.
    min_usage : in [0, 1), mean responsibility below which an expert ends the fit as dead; 0: reported, never fatal.
    best : which evaluation is called the best, and put back where there are validation pairs: that of their largest
        "likelihood", or the "last", which predicts better where experts still improve but grow too sure of themselves.
    """

    patience: int = 0
    min_usage: float | int = 0.0
    best: str = "likelihood"

    def __post_init__(self) -> None:
        if self.best not in ("likelihood", "last"):
            raise ValueError(f"best={self.best!r}: possible are 'likelihood' and 'last'")
        if self.patience < 0:
            raise ValueError(f"patience={self.patience}: expected 0 (never) or more evaluations")
        if not 0 <= self.min_usage < 1:
            raise ValueError(f"min_usage={self.min_usage}: expected in [0, 1); 0 never ends a fit")


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
    first_bound: float | None = None
    waited: int = 0

    def step(
        self,
        score: float,
        usage: list[float] | None = None,
        bound: float | None = None,
        early: bool = False,
    ) -> str | None:
        """Take the next score; returns a stop reason, or None to go on.

        bound : of the training pairs, nats per pair; the score, by default. More than `DIVERGED` below the first one
            ends the fit.
        early : a further look, see `EARLY`: it may be the best one, and is no reason to lose patience or call an expert dead.
        """
        self.scores.append(score)
        bound = score if bound is None else bound
        if not (math.isfinite(score) and math.isfinite(bound)):
            return "non_finite"
        self.first_bound = bound if self.first_bound is None else self.first_bound
        if bound < self.first_bound - DIVERGED:
            return "diverged"
        if usage and min(usage) < self.min_usage and not early:
            return "dead_expert"
        if score > self.best:
            self.best, self.best_step, self.waited = score, len(self.scores) - 1, 0
        elif not early:
            self.waited += 1
            if self.waited == self.patience:
                return "no_improvement"
        return None


@dataclass(frozen=True)
class FitConfig(Choices):
    """How a mixture is fitted. The defaults part experts on small sets too (docs/log.md has what was tried).

    latent : "unit": one latent expert a unit (user); "pair": one a comparison.
    unit : the column that says which pairs share a latent.
    learning_rate : of gradient steps; None: the family's own for this optimiser (`Experts.rates`).
    passes : over the training pairs. min_steps : a small set is passed more often, until there are so many steps; what
        is given in passes (start, tempering, evaluations) stretches with it.
    batch_size : pairs, or prompts with batch_by="prompt"; all processes together.
    accumulate : batches a step; each is computed alone, so that memory holds one of them.
    bf16 : blocks under bfloat16 autocast; heads and log-probabilities stay float32.
    batch_by : "pair", or "prompt": all pairs of a prompt in one batch, so that texts they share are computed once.
    optimizer : "adamw", or "sgd": momentum 0.9, no scaling by coordinate.
    start : see `Start`. stop : see `Stop`. inference : `Exact`, `Relaxed` or `Recognition`. routing : see `Routing`.
    evaluations_per_pass : below 1: one in several passes. Where `min_steps` stretches a fit with validation pairs, steps
        2, 5, 10 and 20 are evaluated too: few pairs are soon learned by heart.
    evaluate_training : an evaluation computes all training pairs anew; False: as last seen, faster.
    keep : "best": parameters of the best and the last evaluation; "all": of every one.
    """

    latent: str = "unit"
    unit: str = "user"
    learning_rate: float | None = None
    passes: float | int = 5.0
    min_steps: int = 200
    batch_size: int = 16
    accumulate: int = 1
    bf16: bool = False
    batch_by: str = "prompt"
    optimizer: str = "adamw"
    start: Start = Start()
    stop: Stop = Stop()
    inference: Inference = Exact()
    routing: Routing = Routing()
    evaluations_per_pass: float | int = 1
    evaluate_training: bool = True
    keep: str = "best"
    seed: int = 0

    def __post_init__(self) -> None:
        possible = {
            "latent": {"unit": "one a user", "pair": "one a comparison"},
            "batch_by": {"pair": "each alone", "prompt": "all pairs of a prompt"},
            "optimizer": {"adamw": "scaled by coordinate", "sgd": "momentum 0.9"},
            "keep": {"best": "and the last", "all": "every evaluated step"},
        }
        for name, choices in possible.items():
            if getattr(self, name) not in choices:
                known = " and ".join(f"{choice!r} ({what})" for choice, what in choices.items())
                raise ValueError(f"{name}={getattr(self, name)!r}: possible are {known}")
        for name in ("passes", "batch_size", "accumulate", "evaluations_per_pass"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: expected more than 0")
        if self.min_steps < 0:
            raise ValueError(f"min_steps={self.min_steps}: expected 0 or more")
        if self.learning_rate is not None and not 0 < self.learning_rate <= 1e30:
            raise ValueError(
                f"learning_rate={self.learning_rate}: expected above 0, or None for the family's own; at most 1e30: "
                "float32 ends soon after"
            )
        for name, kind in (
            ("start", Start),
            ("stop", Stop),
            ("inference", Inference),
            ("routing", Routing),
        ):
            if not isinstance(getattr(self, name), kind):
                found = getattr(self, name)
                raise ValueError(
                    f"{name}={found!r}: expected {kind.__name__}(...), see mixdpo_lib.{kind.__name__}"
                )
        if self.routing.top_s is not None and not isinstance(self.inference, Exact):
            raise ValueError(
                f"top_s={self.routing.top_s} with {self.inference}: expected Exact(), or no top_s"
            )

        if self.routing.top_s is not None and self.latent == "unit":
            raise ValueError(
                f"top_s={self.routing.top_s} with latent='unit': the responsibilities of a {self.unit} need what every "
                f"expert says of all its pairs, which a sparse fit does not compute; expected latent='pair', or no top_s"
            )

    def change(self, **choices: Any) -> FitConfig:
        """The same with other choices; those of a part are named after it, with two underscores.

        Raises
        ------
        ValueError : a name that there is not; the possible ones are listed.

        >>> FitConfig().change(passes=2.0, start__kind="none").start.kind
        'none'
        """
        parts: dict[str, dict[str, Any]] = {}
        for name, value in choices.items():
            part, _, inner = name.partition("__")
            parts.setdefault(part, {})[inner] = value
        known = {f.name for f in fields(self)}
        changed = {}
        for part, values in parts.items():
            own = getattr(self, part, None)
            names = {f.name for f in fields(own)} if dataclasses.is_dataclass(own) else set()
            unknown = set(values) - names - {""}
            if part not in known or unknown:
                possible = (
                    sorted(f"{part}__{name}" for name in names)
                    if unknown and names
                    else sorted(known)
                )
                found = f"{part}__{sorted(unknown)[0]}" if unknown else part
                raise ValueError(f"{found}: no choice of a fit; possible are {', '.join(possible)}")
            new = values.pop("", own)
            changed[part] = replace(new, **values) if values else new
        return replace(self, **changed)

    def identity(self, n_experts: int, reads: bool) -> dict[str, Any]:
        """What of it decides the result of a fit of K experts, by name: what is not used is left out.

        reads : whether the gate reads something. For the keys of what is kept.
        """
        unused = {"keep", "accumulate"}
        if n_experts == 1:
            unused |= set() if self.inference.alone else {"inference"}
        if n_experts == 1 or not reads:
            unused |= {"routing"}
        if self.latent == "pair":
            unused |= {"unit"}
        used = {f.name: _plain(getattr(self, f.name)) for f in fields(self) if f.name not in unused}
        return used | {"batch_size": self.batch_size * self.accumulate}  # of a step


def _plain(value: Any) -> Any:
    """A choice as plain values; the name of its kind stands with it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        inner: Mapping[str, Any] = {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
        return {"kind of choice": type(value).__name__, **inner}
    return value
