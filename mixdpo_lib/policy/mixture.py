"""Gate, experts and beta as one policy: pi(y given x) = sum_k w_k(x) pi_k(y given x)  (arXiv 2510.08256)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from datasets import Dataset
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ..base.model import Base
from ..data.pairs import Pairs, Text, Texts, as_pairs
from ..elbo import keep_top_s, log_responsibilities, margins, predictive_probability
from ..experts.contract import Experts, chosen_texts
from ..gates.contract import Gate
from ..gates.inputs import distinct_rows
from . import generating, saving
from .causal_lm import MixtureForCausalLM
from .generating import Generated


class MixturePolicy(nn.Module):
    """K experts, a gate and the strength `beta` of the KL term, as one policy.

    Parameters
    ----------
    experts : see experts/contract.py. gate : see gates/contract.py; both with the same number of experts.
    beta : > 0, default 0.1 (DPO's usual value): large keeps close to the reference.
    """

    def __init__(self, experts: Experts, gate: Gate, beta: float = 0.1) -> None:
        super().__init__()
        if not (beta > 0 and math.isfinite(beta)):
            raise ValueError(f"beta={beta}: the strength of the KL term is a positive number; 0.1 is the usual value")
        if gate.n_experts != experts.n_experts:
            raise ValueError(f"the gate has {gate.n_experts} weights for {experts.n_experts} experts: make them equal")
        self.experts, self.gate, self.beta = experts, gate, float(beta)
        self._constants: dict[str, Any] = {}

    def __repr__(self) -> str:
        size = sum(p.numel() for p in self.experts.parameters()) / self.n_experts
        where = "no words" if self.base is None else self.base.name
        reads = ", ".join(self.gate.reads) or "nothing"
        return (
            f"MixturePolicy: {self.n_experts} {type(self.experts).__name__} of {size:,.0f} numbers each on {where}; "
            f"{type(self.gate).__name__} that reads {reads}; beta {self.beta:g}"
        )

    @property
    def n_experts(self) -> int:
        """K."""
        return self.experts.n_experts

    @property
    def base(self) -> Base:
        """The frozen base model."""
        return self.experts.base[0]

    # ------------------------------------------------------------------------------------------------ likelihoods

    def prepare(self, data: Dataset | Pairs) -> Pairs:
        """A preference set, checked, with its distinct texts."""
        return as_pairs(data)

    def constants(self, texts: Texts) -> Any:
        """What the experts compute once for these texts, kept while it stays the same (see `Experts.constants`)."""
        key = f"{texts.key}-{self.experts.constants_key()}"
        if key not in self._constants:
            self._constants = {**dict(list(self._constants.items())[-3:]), key: self.experts.constants(texts)}
        return self._constants[key]

    def batch_loglik(
        self, batch: dict[str, Tensor], chosen: Bool[Tensor, "pairs experts"] | None = None
    ) -> Float[Tensor, "pairs experts"]:
        """log sigma(D_k) of a batch, nats; gradients flow to the experts.

        With `chosen` only those experts are computed for a pair; the others are -inf, which adds nothing to
        `sum_k w_k sigma(D_k)`, and carry no gradient.
        """
        logps = self.experts.logps(batch, chosen)
        if chosen is not None:  # before the answers are subtracted: the difference of two infinities is NaN
            logps = logps.masked_fill(~chosen[:, None], 0.0)
        loglik = F.logsigmoid(margins(logps, self.experts.ref_logps(batch), self.beta))
        return loglik if chosen is None else loglik.masked_fill(~chosen, -math.inf)

    @torch.no_grad()
    def text_rewards(
        self, texts: Texts, ids: Tensor | None = None, chosen: Bool[Tensor, "ids experts"] | None = None
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
        """log sigma(D_k) of every pair, nats.

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
        loglik = F.logsigmoid(rewards[data.index[:, 0]] - rewards[data.index[:, 1]])
        return loglik if chosen is None else loglik.masked_fill(~chosen, -math.inf)

    # -------------------------------------------------------------------------------------------------- the gate

    def gate_inputs(self, data: Pairs) -> dict[str, Tensor]:
        """What the gate reads of each pair, see `Gate.inputs`."""
        names = [name for name in self.gate.reads if name in data.rows.column_names]
        return self.gate.inputs({name: list(data.rows[name]) for name in names}, self.base)

    def log_w(self, data: Dataset | Pairs) -> Float[Tensor, "pairs experts"]:
        """The gate's weights of each pair, nats; gradients flow to the gate."""
        data = self.prepare(data)
        inputs, place = distinct_rows(self.gate_inputs(data), len(data))
        return self.gate.log_w(inputs)[place]

    def prompt_log_w(self, prompts: Sequence[str]) -> Float[Tensor, "prompts experts"]:
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
        return self.gate.log_w(inputs).expand(len(prompts), self.n_experts)

    # ---------------------------------------------------------------------------------------------- who answered?

    @torch.no_grad()
    def log_posterior(
        self, data: Dataset | Pairs, unit: str | None = "user", rewards: Tensor | None = None
    ) -> tuple[Float[Tensor, "units experts"], list[Any]]:
        """log q of every unit (of every pair, with unit=None), nats, and the units' names (the rows' numbers).

        q_uk proportional to w_k prod_{n in u} sigma(D_nk). Source: docs/method.md. rewards : see `loglik`.
        """
        data = self.prepare(data)
        ids, names = (None, list(range(len(data)))) if unit is None else data.units(unit)
        n_units = None if unit is None else len(names)
        return log_responsibilities(self.loglik(data, rewards), self.log_w(data), ids, n_units=n_units), names

    def posterior(self, data: Dataset | Pairs, unit: str | None = "user") -> pd.DataFrame:
        """Who is served by which expert: one row a unit (a pair, with unit=None), one column an expert, probabilities.

        See `log_posterior`, which gives tensors.
        """
        log_q, names = self.log_posterior(data, unit)
        return pd.DataFrame(log_q.exp().numpy(), index=pd.Index(names, name=unit or "pair"))

    def responsibilities(self, data: Dataset | Pairs, unit: str | None = "user") -> pd.DataFrame:
        """The old name of `posterior`, for one version more."""
        warnings.warn("`responsibilities` is called `posterior` now", DeprecationWarning, stacklevel=2)
        return self.posterior(data, unit)

    @torch.no_grad()
    def user(
        self, pairs: Dataset | Pairs | None = None, metadata: Mapping[str, Any] | None = None
    ) -> Float[Tensor, "experts"]:
        """log_w (K,) of one user: the gate's weights given what is known of the user, updated by the user's own pairs.

        No expert is touched. See `Gate.served`.

        Parameters
        ----------
        pairs : preferences of this user alone; without them the gate's weights are returned.
        metadata : one value for each column that the gate reads; columns of `pairs` stand in for it.

        Raises
        ------
        ValueError : a gate that reads the prompt (its weights are no property of a user: `predict` and `generate` ask
            it for each prompt); metadata that the gate does not read, or lacks; pairs that differ in what it reads.
        """
        if self.gate.of_prompt:
            raise ValueError(
                f"the gate reads {', '.join(self.gate.reads)}: its weights belong to a prompt, not to a user; call "
                "predict or generate without `user`"
            )
        unread = [name for name in metadata or {} if name not in self.gate.reads]
        if unread:
            raise ValueError(
                f"metadata {unread}: the gate reads {', '.join(self.gate.reads) or 'nothing'}; leave them out"
            )
        data = None if pairs is None else self.prepare(pairs)
        columns = {name: [value] for name, value in (metadata or {}).items()}
        for name in self.gate.reads:
            if name not in columns and data is not None and name in data.rows.column_names:
                if len(set(values := list(data.rows[name]))) > 1:
                    raise ValueError(f"pairs, column {name!r}: found {sorted(map(str, set(values)))[:3]}, expected one "
                                     "user; give that user's pairs alone, or metadata")
                columns[name] = values[:1]
        inputs = self.gate.user_inputs(columns, self.base)
        return self.gate.served(inputs, None if data is None else self.loglik(data))

    @torch.no_grad()
    def predict(
        self, data: Dataset | Pairs, user: Float[Tensor, ...] | None = None, top_s: int | None = None
    ) -> Float[Tensor, "pairs"]:
        """Probability that `chosen` is preferred: sum_k w_k sigma(D_k), w the user's or the gate's.

        With `top_s` only the S experts of largest weight are computed for each pair, and their weights are divided by
        their total W_S: the two answers of a pair then still share a probability of 1. That is a prediction, not a
        bound; for the bound see `elbo.restricted_log_likelihood`.
        """
        data = self.prepare(data)
        log_w = self.log_w(data) if user is None else user
        if top_s is None:
            return predictive_probability(self.loglik(data), log_w)
        kept = keep_top_s(log_w, top_s)
        loglik = self.loglik(data, chosen=(kept > -math.inf).expand(len(data), -1))
        return predictive_probability(loglik, log_w if top_s == self.n_experts else kept.log_softmax(-1))

    @torch.no_grad()
    def logps(
        self, prompt: str, response: str, user: Tensor | None = None, ended: bool = True, top_s: int | None = None
    ) -> float:
        """log sum_k w_k pi_k(response given prompt), nats.

        With `top_s` only the S experts of largest weight are computed. Their weights are not renormalised: a lower
        bound, which grows with S and is exact for S = K.
        """
        constants = self.constants(Texts.of([Text(prompt, response, ended)]))
        log_w = (self.prompt_log_w([prompt]) if user is None else user).reshape(1, self.n_experts)
        log_w = log_w if top_s is None else keep_top_s(log_w, top_s)
        chosen = None if top_s is None else log_w > -math.inf
        logps, _ = self.experts.all_text_logps(constants, torch.zeros(1, dtype=torch.long), chosen=chosen)
        return float((logps + log_w).logsumexp(-1))

    # ------------------------------------------------------------------------------------------ speech and keeping

    def generate(
        self, prompts: Sequence[str], user: Float[Tensor, ...] | None = None, **options: Any
    ) -> Generated:
        """Sample one response a prompt, exactly from the mixture; see `generating.generate` for every option."""
        return generating.generate(self, prompts, user, **options)

    def say(self, prompts: Sequence[str], user: Float[Tensor, ...] | None = None, **options: Any) -> pd.DataFrame:
        """What the base and every expert write for the same prompts, side by side; see `generating.say`."""
        return generating.say(self, prompts, user, **options)

    def as_causal_lm(
        self, user: Float[Tensor, ...] | None = None, prompts: Sequence[str] | None = None
    ) -> MixtureForCausalLM:
        """The mixture as a transformers model: `generate` with sampling, greedy, beams, streamers.

        Parameters
        ----------
        user : log_w (K,) of one user, or (prompts, K); the gate's weights by default.
        prompts : what a gate of prompts reads: the prompts that will be continued, in their order.
        """
        if user is None and prompts is None and self.gate.reads:
            raise ValueError(f"the gate reads {', '.join(self.gate.reads)}: give prompts=[...], or user=")
        log_w = self.prompt_log_w([""] if prompts is None else prompts) if user is None else user
        return MixtureForCausalLM(self.experts, log_w.reshape(-1, self.n_experts).detach())

    def save_pretrained(self, folder: str | Path, provenance: Mapping[str, Any] | None = None) -> None:
        """Write the mixture, its configuration and a model card, all or nothing; see `saving.save`."""
        saving.save(self, folder, provenance)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, base: Base | None = None, bases: Sequence[Base] | None = None
    ) -> MixturePolicy:
        """Read a mixture back; its base is loaded by name unless given. See `saving.load`."""
        return cls(*saving.load(folder, base, bases))

    def export_adapter(self, k: int, folder: str | Path) -> None:
        """Write expert k as a PEFT adapter of the plain base, see `Experts.export_adapter`."""
        self.experts.export_adapter(k, folder)

    def merge(self, k: int, folder: str | Path) -> None:
        """Write expert k as a plain transformers checkpoint, see `Experts.merge`."""
        self.experts.merge(k, folder)

    @torch.no_grad()
    def export_model(self, k: int) -> Any:
        """Expert k as a plain transformers model in memory, see `Experts.as_model`."""
        self.experts.check_number(k)
        return self.experts.as_model(k)
