"""What does every family of experts give? Log-probabilities of responses, and next-token logits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..base.model import Base
from ..data.pairs import Pairs, Texts
from ..elbo import check_n_experts
from ..store import MixDPOError, check_options
from .groups import Nodes
from .leaving import write_adapter, write_model


def check_chosen(chosen: Tensor, rows: int, n_experts: int) -> None:
    """Refuse a choice of experts that is not (rows, experts) of truth values."""
    if chosen.shape != (rows, n_experts) or chosen.dtype != torch.bool:
        raise ValueError(
            f"chosen has shape {tuple(chosen.shape)} and dtype {chosen.dtype}; expected ({rows}, {n_experts}), bool: "
            "which experts are computed for each row"
        )


def check_sharpness_rate(rate: float | int) -> None:
    """Refuse a learning rate of s that is not above 0 and finite."""
    if not 0 < rate < float("inf"):
        raise ValueError(
            f"sharpness_rate={rate}: expected above 0, a share of the experts' rate; sharpness=False leaves s out"
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


class Voices(ABC):
    """Next-token logits of several experts at once; keeps its own cache.

    moved : the tokens (rising, distinct) whose logits alone differ from the reference's; None: any may.
    """

    moved: Tensor | None = None

    @abstractmethod
    def reorder(self, source: Int[Tensor, "rows"]) -> None:
        """Row i goes on from what row source[i] has read; both chose the same experts."""

    @abstractmethod
    def __call__(
        self, input_ids: Tensor, mask: Tensor
    ) -> tuple[Tensor, list[tuple[int, Tensor, Tensor]]]:
        """Logits of the reference (rows, V), and for each expert that speaks: its number, its rows, their logits."""


FAMILIES: dict[str, type[Experts]] = {}  # every family that was defined, by the name of its class


class Experts(nn.Module, ABC):
    """A family of experts: log-probabilities of responses, of their reference, and next-token logits.

    A subclass registers itself by its name, so that a saved mixture finds it once its module was imported. It gives
    `options`, `perturb`, `constants`, `batch`, `text_logps` and `voices`; what else it may give has a default here.

    base : [the frozen model that gates and the reference read], in a list, so that it is neither a parameter nor part
        of a checkpoint; [None] for tables without words. n_experts : K.
    """

    base: list[Any]
    bases: Sequence[Base] = ()  # of a family that has one for each expert
    nodes: Nodes | None = None  # where the experts are nodes of a group
    rates: ClassVar[Mapping[str, float]] = {"adamw": 1e-3, "sgd": 0.03}  # where none is given

    def __init_subclass__(cls, family: bool = True, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if family:  # and not what several families share
            FAMILIES[cls.__name__] = cls

    def __init__(self, base: Base | None, n_experts: int) -> None:
        super().__init__()
        check_n_experts(n_experts)
        self.base, self.n_experts = [base], n_experts

    @property
    def n_sets(self) -> int:
        """How many sets of parameters the training data are shared among: K, or J where K nodes have J basis experts."""
        return self.n_experts

    @property
    def _base(self) -> Base:
        return self.base[0]

    # --------------------------------------------------------------------------------------------- what it is made of

    @abstractmethod
    def options(self) -> dict[str, Any]:
        """What makes equal experts but for their parameters, as JSON."""

    @classmethod
    def from_options(cls, options: Mapping[str, Any], find_base: Callable[..., Base]) -> Experts:
        """Equal experts with parameters as at the start.

        find_base : gives the policy's base, or that of a name and a fingerprint, for a family that has several.
        """
        return cls(find_base(), **options)

    def describe(self) -> dict[str, Any]:
        """`options` with the family's name, from which `make_experts` makes equal experts."""
        return {"family": type(self).__name__, **self.options()}

    def fit_state(self, state: Mapping[str, Tensor]) -> None:
        """Prepare for parameters and buffers that were saved, before they are loaded; nothing by default."""

    def own(self, k: int) -> dict[str, Tensor]:
        """What is expert k's alone, by name: views into the parameters, each of which holds an expert a row by default."""
        return {name: p.data[k] for name, p in self.named_parameters()}

    def of_number(self, parts: Sequence[tuple[Experts, int]]) -> Experts:
        """As many experts of this family as there are parts, as at the start; see `copies.gathered`."""
        return make_experts({**self.describe(), "n_experts": len(parts)}, lambda *_: self.base[0])

    # ----------------------------------------------------------------------------------------------------- learning

    def start(self, data: Pairs) -> None:
        """What the training responses decide before the first step; nothing by default."""

    @abstractmethod
    def perturb(self, scale: float, generator: torch.Generator) -> None:
        """Symmetry breaking "random_heads": small random numbers of each expert's own."""

    def parameter_groups(self, rate: float) -> list[dict[str, Any]]:
        """Parameters with their learning rates, as an optimiser takes them; one rate for all by default."""
        return [{"params": list(self.parameters()), "lr": rate}]

    def log_prior(self) -> Float[Tensor, ""]:
        """Log density of the parameters under their prior, without its constant, nats; 0 without one. Gradients flow."""
        return torch.zeros(())

    # ------------------------------------------------------------------------------------------------- likelihoods

    def constants_key(self) -> str:
        """Changes whenever `constants` of the same texts would."""
        return ""

    @abstractmethod
    def constants(self, texts: Texts) -> Any:
        """What is computed once for a set of texts, whatever the experts are."""

    @abstractmethod
    def batch(self, constants: Any, pairs: Int[Tensor, "pairs 2"]) -> dict[str, Tensor]:
        """Everything `logps` reads for these pairs of texts; each distinct text is held, and later computed, once.

        "place" (pairs, 2) says which of the distinct texts each answer is, "text_ref_logps" (texts, 1 or K) their
        log-probabilities under the reference, nats.
        """

    @abstractmethod
    def text_logps(
        self, batch: dict[str, Tensor], chosen: Bool[Tensor, "texts experts"] | None = None
    ) -> Float[Tensor, "texts experts"]:
        """log pi_k of the distinct texts of a batch, nats, summed over response tokens. Gradients flow.

        chosen : which experts are computed for each text; None: all of them. Each chosen (text, expert) is computed
            once, by expert, and the others cost nothing: they are -inf, no log-probability of a text, and carry no
            gradient. Where every entry is chosen the result is that of None, to the last bit.

        Raises
        ------
        ValueError : `chosen` of another shape or type.
        """

    def logps(
        self, batch: dict[str, Tensor], chosen: Bool[Tensor, "pairs experts"] | None = None
    ) -> Float[Tensor, "pairs 2 experts"]:
        """log pi_k(y given x), nats, summed over response tokens; index 0 chosen, 1 rejected. Gradients flow.

        With `chosen`, which experts are computed for each pair, both of its texts are computed for them (a text that
        pairs share, for all of theirs, once); what a pair did not choose is -inf. See `text_logps`.
        """
        if chosen is None:
            return self.text_logps(batch)[batch["place"]]
        check_chosen(chosen, len(batch["place"]), self.n_experts)
        by_text = chosen_texts(chosen, batch["place"], len(batch["text_ref_logps"]))
        return self.text_logps(batch, by_text)[batch["place"]].masked_fill(
            ~chosen[:, None], -torch.inf
        )

    def ref_logps(self, batch: dict[str, Tensor]) -> Float[Tensor, "pairs 2 references"]:
        """log pi_ref(y given x), nats: one column where the experts share a reference, else one an expert."""
        return batch["text_ref_logps"][batch["place"]]

    @torch.no_grad()
    def all_text_logps(
        self,
        constants: Any,
        ids: Int[Tensor, "texts"],
        block: int = 64,
        chosen: Bool[Tensor, "texts experts"] | None = None,
    ) -> tuple[Float[Tensor, "texts experts"], Float[Tensor, "texts references"]]:
        """log pi_k and log pi_ref of the texts `ids`, nats, in blocks of `block` texts.

        Who has learned nothing (see `unmoved`) is the reference to the bit, not up to rounding: a tie is no prediction.
        `chosen` : which experts are computed for each of the ids; the others are -inf (see `text_logps`).
        """
        if chosen is not None:
            check_chosen(chosen, len(ids), self.n_experts)
        device, logps, refs = next(self.parameters()).device, [], []
        for at in torch.arange(len(ids)).split(block):
            batch = self.batch(constants, torch.stack([ids[at], ids[at]], 1))
            batch = {name: value.to(device) for name, value in batch.items()}
            own = None if chosen is None else chosen[at].to(device)
            logps.append(self.logps(batch, own)[:, 0].float().cpu())
            refs.append(batch["text_ref_logps"][batch["place"][:, 0]].float().cpu())
        found, ref = torch.cat(logps), torch.cat(refs)
        still = torch.tensor([self.unmoved(k) for k in range(self.n_experts)])
        return torch.where(still & found.isfinite(), ref, found), ref

    def unmoved(self, k: int) -> bool:
        """Whether expert k is its reference still, for sure; False by default."""
        return False

    @abstractmethod
    def voices(self, chosen: Bool[Tensor, "rows experts"] | None) -> Voices:
        """Next-token logits of the experts that each row chose; None: of the reference alone."""

    # ---------------------------------------------------------------------------------------- leaving the mixture

    def as_adapter(self, k: int) -> Any:
        """Expert k as a PEFT model around the base, whose `save_pretrained` writes an adapter; refused by default."""
        raise ValueError(f"{type(self).__name__} have no adapter to export")

    def as_model(self, k: int) -> Any:
        """Expert k as a plain transformers model with weights of its own; refused by default."""
        raise ValueError(f"{type(self).__name__} change no model: there is nothing to merge")

    def tokenizer(self, k: int) -> Any:
        """The tokenizer of expert k: the base's, by default."""
        return self._base.tokenizer

    def check_number(self, k: int) -> None:
        """Refuse a number that is no expert's."""
        if not 0 <= k < self.n_experts:
            raise ValueError(f"k={k}: expected an expert from 0 to {self.n_experts - 1}")

    def export_adapter(self, k: int, folder: str | Path) -> None:
        """Write expert k as an adapter that `peft.PeftModel.from_pretrained(base, folder)` reads; the same logits.

        Raises
        ------
        ValueError : no expert k; a family without adapters. MixDPOError : a folder with anything but an earlier export.
        """
        self.check_number(k)
        write_adapter(self, k, folder)

    def merge(self, k: int, folder: str | Path) -> None:
        """Write expert k as a plain checkpoint that transformers loads alone; refused as by `export_adapter`."""
        self.check_number(k)
        write_model(self, k, folder)


def make_experts(description: Mapping[str, Any], find_base: Callable[..., Base]) -> Experts:
    """The experts that `describe()` describes, with parameters as at the start.

    Raises
    ------
    MixDPOError : a family of this name was not defined; its module has to be imported first.
    ValueError : an option of another type than the family takes.
    """
    options = dict(description)
    family = str(options.pop("family", None))
    if family not in FAMILIES:
        raise MixDPOError(
            f"family={family!r}: no family of experts of this name is known; found {sorted(FAMILIES)}; import the "
            "module that defines it before loading"
        )
    check_options(family, FAMILIES[family], options)
    return FAMILIES[family].from_options(options, find_base)
