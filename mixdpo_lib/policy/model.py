"""What does learning ask of a mixture? log w(x), log sigma(D_k) and the lapse rate, of a batch and of a preference set."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from jaxtyping import Bool, Float
from torch import Tensor

from ..base.features import check_rows
from ..data.pairs import Pairs, Texts, as_pairs, values_of
from ..elbo import margins
from ..experts.contract import Experts, chosen_texts
from ..experts.groups import Taste
from ..gates.contract import Gate
from ..gates.inputs import distinct_rows
from .lapses import Lapses

DPO_BETA = 0.1  # DPO's usual value


def as_user(user: Any, n_experts: int, rows: int | None = 1) -> Tensor:
    """`user` as it is, where it is log weights (K,) of one user (`MixturePolicy.user`), or (rows, K); None: of any number.

    Raises
    ------
    ValueError : a name, a dictionary, or weights of another number of experts or rows; weights that are no logarithms of
        shares, whose sum is 1.
    """
    if isinstance(user, Tensor) and user.is_floating_point() and user.shape[-1:] == (n_experts,):
        if user.dim() == 1 or (user.dim() == 2 and (rows is None or len(user) in (1, rows))):
            total = user.detach().double().logsumexp(-1)
            if not bool((total.abs() < 1e-3).all()):
                raise ValueError(
                    f"user: found {user.reshape(-1, n_experts)[0].tolist()}, expected log weights, whose exp sums to 1: give "
                    "policy.user(...) as it is, or probabilities as p.log()"
                )
            return user
        more = f", or ({rows}, {n_experts}), one user a row" if rows != 1 else ""
        raise ValueError(
            f"user: found {tuple(user.shape)}, expected log weights ({n_experts},) of one user{more}"
        )
    found = f"a tensor of shape {tuple(user.shape)}" if isinstance(user, Tensor) else repr(user)
    raise ValueError(
        f"user: found {found[:60]}, expected log weights of {n_experts} experts; make them by policy.user(pairs of this "
        "user) or policy.user(metadata={...})"
    )


def _weights(gate: Gate, inputs: dict[str, Tensor]) -> Float[Tensor, "rows experts"]:
    """The gate's, on the processor as its inputs are, wherever a fit that goes on has put it."""
    there = next(chain(gate.parameters(), gate.buffers()), torch.empty(0)).device
    return gate.log_w({name: value.to(there) for name, value in inputs.items()}).cpu()


class MixtureModel(Lapses):
    """The latent-variable model of preferences: p(y_w over y_l given x) = sum_k w_k(x) sigma(D_k)  (arXiv 2510.08256).

    With a lapse rate e an answer is (1 - e) sigma(D_k) + e / 2 likely (docs/method.md). What learning needs: log w,
    log sigma(D_k) and e. For its parameters see `MixturePolicy`, which serves people with it.
    """

    def __init__(
        self,
        experts: Experts,
        gate: Gate,
        beta: float | None = None,
        lapse: float | int | str = 0.0,
    ) -> None:
        super().__init__(lapse)
        if beta is None:
            beta = float(getattr(experts, "beta", DPO_BETA))  # a table is made for one
        given: Any = beta
        if not (isinstance(given, Real) and 0 < float(given) < math.inf):
            raise ValueError(
                f"beta={beta!r}: the strength of the KL term is a positive number; 0.1 is the usual value"
            )
        if gate.n_experts != experts.n_experts:
            raise ValueError(
                f"the gate has {gate.n_experts} weights for {experts.n_experts} experts: make them equal"
            )
        nodes, name = experts.nodes, type(gate).__name__
        if nodes is not None:
            nodes.check_gate(name, gate.density)
        elif gate.density == "circle":
            raise ValueError(
                f"{name} with {type(experts).__name__}, which have no place on a circle: use UserGate, or experts that "
                "are nodes of one, such as GroupTables"
            )
        self.experts, self.gate, self.beta = experts, gate, float(beta)
        self._constants: dict[str, Any] = {}

    def __repr__(self) -> str:
        size = sum(p.numel() for p in self.experts.parameters()) / self.n_experts
        where = "no words" if self.base is None else self.base.name
        reads = ", ".join(self.gate.reads) or "nothing"
        return (
            f"MixturePolicy: {self.n_experts} {type(self.experts).__name__} of {size:,.0f} numbers each on {where}; "
            f"{type(self.gate).__name__} that reads {reads}; beta {self.beta:g}"
            + (f"; lapse {self.lapse:.3g}" if self.given_lapse else "")
        )

    @property
    def n_experts(self) -> int:
        """K."""
        return self.experts.n_experts

    @property
    def base(self) -> Any:
        """The frozen base model (`Base`); None for tables without words."""
        return self.experts.base[0]

    # ------------------------------------------------------------------------------------------------ likelihoods

    def prepare(self, data: Dataset | Pairs) -> Pairs:
        """A preference set, checked, with its distinct texts.

        Raises
        ------
        ValueError : rows that are no comparisons, or that the base cannot read: all are counted, ten are named.
        """
        pairs = as_pairs(data)
        if self.base is not None:
            check_rows(self.base, pairs)
        return pairs

    def constants(self, texts: Texts) -> Any:
        """What the experts compute once for these texts, kept while it stays the same (see `Experts.constants`)."""
        key = f"{texts.key}-{self.experts.constants_key()}"
        if key not in self._constants:
            self._constants = {
                **dict(list(self._constants.items())[-3:]),
                key: self.experts.constants(texts),
            }
        return self._constants[key]

    def batch_loglik(
        self, batch: dict[str, Tensor], chosen: Bool[Tensor, "pairs experts"] | None = None
    ) -> Float[Tensor, "pairs experts"]:
        """Log-likelihood of the answers of a batch under each expert, nats: `batch_log_sigma` with the lapse rate."""
        return self.with_lapse(self.batch_log_sigma(batch, chosen))

    def batch_log_sigma(
        self, batch: dict[str, Tensor], chosen: Bool[Tensor, "pairs experts"] | None = None
    ) -> Float[Tensor, "pairs experts"]:
        """log sigma(D_k) of a batch, nats; gradients flow to the experts.

        With `chosen` only those experts are computed for a pair; the others are -inf, which adds nothing to
        `sum_k w_k sigma(D_k)`, and carry no gradient.
        """
        logps = self.experts.logps(batch, chosen)
        if (
            chosen is not None
        ):  # before the answers are subtracted: the difference of two infinities is NaN
            logps = logps.masked_fill(~chosen[:, None], 0.0)
        log_sigma = F.logsigmoid(margins(logps, self.experts.ref_logps(batch), self.beta))
        return log_sigma if chosen is None else log_sigma.masked_fill(~chosen, -math.inf)

    @torch.no_grad()
    def text_rewards(
        self,
        texts: Texts,
        ids: Tensor | None = None,
        chosen: Bool[Tensor, "ids experts"] | None = None,
    ) -> Float[Tensor, "texts experts"]:
        """beta (log pi_k - log pi_ref) of every text: the implicit reward of each expert, beta x nats.

        With `ids` only those texts are computed, with `chosen` only those experts of each of the ids; what is not
        computed is NaN.
        """
        ids = torch.arange(len(texts)) if ids is None else ids
        logps, refs = self.experts.all_text_logps(self.constants(texts), ids, chosen=chosen)
        found = self.beta * (logps - refs)
        rewards = torch.full((len(texts), self.n_experts), torch.nan)
        rewards[ids] = found if chosen is None else found.masked_fill(~chosen, torch.nan)
        return rewards

    @torch.no_grad()
    def loglik(
        self,
        data: Dataset | Pairs,
        rewards: Tensor | None = None,
        chosen: Bool[Tensor, "pairs experts"] | None = None,
    ) -> Float[Tensor, "pairs experts"]:
        """Log-likelihood of every pair's answer under each expert, nats: `log_sigma` with the lapse rate."""
        return self.with_lapse(self.log_sigma(data, rewards, chosen))

    @torch.no_grad()
    def log_sigma(
        self,
        data: Dataset | Pairs,
        rewards: Tensor | None = None,
        chosen: Bool[Tensor, "pairs experts"] | None = None,
    ) -> Float[Tensor, "pairs experts"]:
        """log sigma(D_k) of every pair, nats, whatever the lapse rate.

        Parameters
        ----------
        rewards : of the texts (see `text_rewards`), if they are known.
        chosen : which experts are computed for each pair, such as `elbo.keep_top_s(log_w, s) > -inf`; the others are
            -inf, so that `elbo.restricted_log_likelihood` and `elbo.certified_gap` read the rest. All by default.
        """
        data = self.prepare(data)
        if rewards is None and chosen is not None and not bool(chosen.all()):
            by_text = chosen_texts(chosen, data.index, len(data.texts))
            ids = by_text.any(1).nonzero().squeeze(1)
            rewards = self.text_rewards(data.texts, ids, by_text[ids])
        elif rewards is None:
            rewards = self.text_rewards(data.texts)
        log_sigma = F.logsigmoid(rewards[data.index[:, 0]] - rewards[data.index[:, 1]])
        return log_sigma if chosen is None else log_sigma.masked_fill(~chosen, -math.inf)

    # -------------------------------------------------------------------------------------------------- the gate

    def gate_inputs(self, data: Pairs) -> dict[str, Tensor]:
        """What the gate reads of each pair, see `Gate.inputs`."""
        names = [name for name in self.gate.reads if name in data.rows.column_names]
        return self.gate.inputs({name: values_of(data.rows, name) for name in names}, self.base)

    def log_w(self, data: Dataset | Pairs) -> Float[Tensor, "pairs experts"]:
        """The gate's weights of each pair, nats; gradients flow to the gate."""
        data = self.prepare(data)
        inputs, place = distinct_rows(self.gate_inputs(data), len(data))
        return _weights(self.gate, inputs)[place]

    def taste(self, log_w: Float[Tensor, "*users nodes"]) -> Taste:
        """Where on a group users are, by their weights of its nodes (`user`, `log_posterior`): see `groups.Taste`.

        Raises
        ------
        ValueError : experts that are nodes of no group.
        """
        if self.experts.nodes is None:
            raise ValueError(
                f"{type(self.experts).__name__} are nodes of no group: found {self.n_experts} experts; `posterior` says "
                "which of them serve whom; GroupTables and GroupHeads have a group"
            )
        return self.experts.nodes.taste(log_w.reshape(-1, self.n_experts))

    def prompt_log_w(self, prompts: Sequence[Any]) -> Float[Tensor, "prompts experts"]:
        """The gate's weights of each prompt, nats.

        Raises
        ------
        ValueError : a gate that reads what no prompt says, such as who the user is.
        """
        missing = [name for name in self.gate.reads if name not in self.gate.of_prompt]
        if missing:
            raise ValueError(
                f"the gate reads what is known of the user ({', '.join(missing)}): give user=policy.user(...)"
            )
        inputs = self.gate.inputs({name: list(prompts) for name in self.gate.of_prompt}, self.base)
        return _weights(self.gate, inputs).expand(len(prompts), self.n_experts)
