"""What does every gate give? log w, the weights of the experts, from columns of the data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..base.model import Base
from ..elbo import check_n_experts, log_responsibilities
from ..store import MixDPOError, check_options
from .m_step import gate_m_step

GATES: dict[str, type[Gate]] = {}  # every gate that was defined, by the name of its class


class Gate(nn.Module, ABC):
    """log w of each row, nats: which expert is asked.

    A gate brings what is its own: `inputs` (numbers from the columns that it `reads`), `logits`, `log_prior` and
    `options`. Inherited are log_w, the M-step, serving, saving and the place in the registry: a subclass registers
    itself by its name, so that a saved mixture finds it once its module was imported.

    Parameters
    ----------
    n_experts : K >= 1.
    reads : names of the columns of the data that the gate reads; () for weights that read nothing.
    of_prompt : those of them that are texts of the prompt: where texts are written, the prompt stands in for them, and
        weights belong to a prompt and not to a user.
    """

    density = ""  # "circle": weights that are a density on it; "any": given ones; else one free weight an expert

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not cls.__name__.startswith("_"):
            GATES[cls.__name__] = cls

    def __init__(
        self, n_experts: int, reads: Sequence[str] = (), of_prompt: Sequence[str] = ()
    ) -> None:
        super().__init__()
        check_n_experts(n_experts)
        self.n_experts, self.reads, self.of_prompt = n_experts, tuple(reads), tuple(of_prompt)

    # ---------------------------------------------------------------------------------------- what a gate brings

    @abstractmethod
    def inputs(self, columns: Mapping[str, Sequence[Any]], base: Base | None) -> dict[str, Tensor]:
        """Numbers from the columns that the gate reads, one row each; nothing for a gate that reads nothing.

        Raises
        ------
        ValueError : a column that is missing, or a value that cannot be read (its row is named).
        """

    @abstractmethod
    def logits(self, inputs: Mapping[str, Tensor]) -> Float[Tensor, "rows experts"]:
        """Before the softmax; one row where the gate reads nothing. Gradients flow."""

    @abstractmethod
    def log_prior(self) -> Float[Tensor, ""]:
        """Log density of what is learned under its prior, without its constant; nats."""

    @abstractmethod
    def options(self) -> dict[str, Any]:
        """What makes an equal gate but for what is learned, as JSON."""

    # ------------------------------------------------------------------------------------------------- inherited

    def user_inputs(
        self, columns: Mapping[str, Sequence[Any]], base: Base | None
    ) -> dict[str, Tensor]:
        """`inputs` of a user who may be new."""
        return self.inputs(columns, base)

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Gate:
        """An equal gate as at the start."""
        return cls(**options)

    def describe(self) -> dict[str, Any]:
        """`options` with the gate's name, from which `make_gate` makes an equal gate."""
        return {"gate": type(self).__name__, **self.options()}

    @torch.no_grad()
    def resized(self, n_experts: int) -> Gate:
        """An equal gate for so many experts, which reads the same and has learned nothing."""
        made = make_gate({**self.describe(), "n_experts": n_experts})
        more = dict(make_gate({**self.describe(), "n_experts": n_experts + 1}).named_buffers())
        own = self.state_dict()
        for name, buffer in made.named_buffers():
            if more[name].shape == buffer.shape:  # no number an expert: of what is read
                buffer.copy_(own[name])
        return made

    def log_w(self, inputs: Mapping[str, Tensor] | None = None) -> Float[Tensor, "rows experts"]:
        """Weights of each row of the inputs, nats, normalised; one row where the gate reads nothing."""
        return self.logits(inputs or {}).log_softmax(-1)

    def forward(self, inputs: Mapping[str, Tensor] | None = None) -> Float[Tensor, "rows experts"]:
        """See `log_w`."""
        return self.log_w(inputs)

    @property
    def learns(self) -> bool:
        """Whether an M-step can move it."""
        return any(p.requires_grad for p in self.parameters())

    def n_free(self) -> int:
        """How many numbers are free to fit, for AIC and BIC; 0 where nothing is learned, refused by default."""
        if not self.learns:
            return 0
        raise ValueError(
            f"{type(self).__name__}: its free numbers are not counted; expected LearnedWeights, FixedWeights or UserGate, "
            "or compare by held-out pairs (report, choose_k)"
        )

    def m_step(
        self,
        inputs: Mapping[str, Tensor],
        log_q: Float[Tensor, "rows experts"],
        place: Int[Tensor, "rows"],
        share: float = 1.0,
        max_iter: int = 30,
        frozen: Sequence[nn.Parameter] = (),
        entropy_weight: float = 0.0,
        balance_weight: float = 0.0,
    ) -> None:
        """Move towards the responsibilities, in place; the bound cannot fall. A frozen gate stays as it is.

        Parameters
        ----------
        inputs : distinct rows of what the gate reads. place : which of them each responsibility belongs to.
        log_q : of every latent (unit, or pair) of the training data, nats, normalised.
        share : of the way, in (0, 1], for closed forms that average over steps; line-searched steps take all of it.
        max_iter : iterations of L-BFGS. frozen : parameters that stay as they are.
        entropy_weight, balance_weight : of `m_step.gate_loss`.
        """
        if self.learns:
            gate_m_step(
                self, inputs, log_q, entropy_weight, balance_weight, max_iter, frozen, place
            )

    @torch.no_grad()
    def served(
        self, inputs: Mapping[str, Tensor], loglik: Float[Tensor, "pairs experts"] | None = None
    ) -> Float[Tensor, "experts"]:
        """log w of one user, whose inputs are the one row: the gate's weights, updated by the user's own pairs.

        One latent for the user: q_k proportional to w_k prod_n sigma(D_nk). Source: docs/method.md.
        """
        prior = self.log_w(inputs)[0]
        if loglik is None:
            return prior.detach().clone()
        return log_responsibilities(loglik, prior, torch.zeros(len(loglik), dtype=torch.long))[0]


def make_gate(description: Mapping[str, Any]) -> Gate:
    """The gate that `describe()` describes, with what is learned as at the start.

    Raises
    ------
    MixDPOError : a gate of this name was not defined; its module has to be imported first.
    ValueError : an option of another type than the gate takes.
    """
    options = dict(description)
    kind = str(options.pop("gate", None))
    if kind not in GATES:
        raise MixDPOError(
            f"gate={kind!r}: no gate of this name is known; found {sorted(GATES)}; import the module that defines it "
            "before loading"
        )
    check_options(kind, GATES[kind], options)
    return GATES[kind].from_options(options)
