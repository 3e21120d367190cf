"""Gate, experts, beta and lapse rate as one policy: pi(y given x) = sum_k w_k(x) pi_k(y given x)  (arXiv 2510.08256)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import transformers
from datasets import Dataset
from jaxtyping import Float
from torch import Tensor

from ..base.model import Base
from ..data.messages import as_prompt
from ..data.pairs import Pairs, Text, Texts, values_of
from ..elbo import keep_top_s, log_responsibilities, predictive_probability
from . import generating, saving
from .generating import Generated
from .model import MixtureModel, as_user


def _by_weights(
    policy: MixtureModel,
    loglik: Callable[..., Tensor],
    data: Dataset | Pairs,
    user: Tensor | None,
    top_s: int | None,
) -> Float[Tensor, "pairs"]:
    """sum_k w_k exp(loglik_k), or of the S experts of largest weight, whose weights are divided by their total."""
    data = policy.prepare(data)
    log_w = policy.log_w(data) if user is None else as_user(user, policy.n_experts, len(data))
    if top_s is None:
        return predictive_probability(loglik(data), log_w)
    kept = keep_top_s(log_w, top_s)
    chosen = (kept > -math.inf).expand(len(data), -1)
    return predictive_probability(
        loglik(data, chosen=chosen), log_w if top_s == policy.n_experts else kept.log_softmax(-1)
    )


def _served(policy: MixtureModel, prompts: Sequence[Any] | None, user: Any) -> Tensor:
    """The weights of a user, where they are given; else the gate's of each prompt (None: of one that says nothing). Nats."""
    if user is None:
        return policy.prompt_log_w([""] if prompts is None else prompts)
    return as_user(user, policy.n_experts, None if prompts is None else len(prompts))


class MixturePolicy(MixtureModel):
    """K experts, a gate and the strength `beta` of the KL term, as one policy.

    Parameters
    ----------
    experts : see experts/contract.py. gate : see gates/contract.py; both with the same number of experts.
    beta : > 0: large keeps close to the reference. By default that of the experts, where they have one (tables), else
        0.1, DPO's usual value.
    lapse : e in [0, 1), how often an answer is given at random; default 0, never. "learn": from the training pairs, from
        .02 on, under a prior (`elbo.lapse_m_step`); `policy.lapse` is the rate as it is now. Texts have no lapses.
    """

    # ---------------------------------------------------------------------------------------------- who answered?

    @torch.no_grad()
    def log_posterior(
        self, data: Dataset | Pairs, unit: str | None = "user", rewards: Tensor | None = None
    ) -> tuple[Float[Tensor, "units experts"], list[Any]]:
        """log q of every unit (of every pair, with unit=None), nats, and the units' names (the rows' numbers).

        q_uk proportional to w_k prod_{n in u} exp(loglik_nk). Source: docs/method.md. rewards : see `log_sigma`.
        """
        data = self.prepare(data)
        ids, names = (None, list(range(len(data)))) if unit is None else data.units(unit)
        n_units = None if unit is None else len(names)
        return log_responsibilities(
            self.loglik(data, rewards), self.log_w(data), ids, n_units=n_units
        ), names

    def posterior(self, data: Dataset | Pairs, unit: str | None = "user") -> pd.DataFrame:
        """Who is served by which expert: one row a unit (a pair, with unit=None), one column an expert, probabilities.

        See `log_posterior`, which gives tensors.
        """
        log_q, names = self.log_posterior(data, unit)
        return pd.DataFrame(log_q.exp().numpy(), index=pd.Index(names, name=unit or "pair"))

    def responsibilities(self, data: Dataset | Pairs, unit: str | None = "user") -> pd.DataFrame:
        """The old name of `posterior`, for one version more."""
        warnings.warn(
            "`responsibilities` is called `posterior` now", DeprecationWarning, stacklevel=2
        )
        return self.posterior(data, unit)

    @torch.no_grad()
    def user(
        self, pairs: Dataset | Pairs | None = None, metadata: Mapping[str, Any] | None = None
    ) -> Float[Tensor, "experts"]:
        """log_w (K,) of one user: the gate's weights given what is known of the user, updated by the user's own pairs.

        No expert is touched. See `Gate.served`. Where the experts are nodes of a group the weights are a density on it, of
        which `taste` gives direction and concentration.

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
                if len(set(values := values_of(data.rows, name))) > 1:
                    raise ValueError(
                        f"pairs, column {name!r}: found {sorted(map(str, set(values)))[:3]}, expected one "
                        "user; give that user's pairs alone, or metadata"
                    )
                columns[name] = values[:1]
        inputs = self.gate.user_inputs(columns, self.base)
        return self.gate.served(inputs, None if data is None else self.loglik(data))

    @torch.no_grad()
    def predict(
        self,
        data: Dataset | Pairs,
        user: Float[Tensor, ...] | None = None,
        top_s: int | None = None,
    ) -> Float[Tensor, "pairs"]:
        """Probability that `chosen` is the answer: sum_k w_k ((1 - e) sigma(D_k) + e / 2), w the user's or the gate's.

        e is the lapse rate; `preference` leaves it out. Both lie on the same side of one half.

        With `top_s` only the S experts of largest weight are computed for each pair, and their weights are divided by
        their total W_S: the two answers of a pair then still share a probability of 1. That is a prediction, not a
        bound; for the bound see `elbo.restricted_log_likelihood`.
        """
        return _by_weights(self, self.loglik, data, user, top_s)

    @torch.no_grad()
    def preference(
        self,
        data: Dataset | Pairs,
        user: Float[Tensor, ...] | None = None,
        top_s: int | None = None,
    ) -> Float[Tensor, "pairs"]:
        """Probability that `chosen` is preferred, as an answer without lapse says: sum_k w_k sigma(D_k); see `predict`."""
        return _by_weights(self, self.log_sigma, data, user, top_s)

    @torch.no_grad()
    def logps(
        self,
        prompt: Any,
        response: str,
        user: Tensor | None = None,
        ended: bool = True,
        top_s: int | None = None,
    ) -> float:
        """log sum_k w_k pi_k(response given prompt), nats.

        With `top_s` only the S experts of largest weight are computed. Their weights are not renormalised: a lower
        bound, which grows with S and is exact for S = K.
        """
        constants = self.constants(Texts.of([Text(as_prompt(prompt), response, ended)]))
        log_w = _served(self, [prompt], user).reshape(1, self.n_experts)
        log_w = log_w if top_s is None else keep_top_s(log_w, top_s)
        chosen = None if top_s is None else log_w > -math.inf
        logps, _ = self.experts.all_text_logps(
            constants, torch.zeros(1, dtype=torch.long), chosen=chosen
        )
        return float((logps + log_w).logsumexp(-1))

    # ------------------------------------------------------------------------------------------ speech and keeping

    def generate(
        self, prompts: Sequence[Any], user: Float[Tensor, ...] | None = None, **options: Any
    ) -> Generated:
        """Sample one response a prompt, exactly from the mixture; see `generating.generate` for every option."""
        return generating.generate(self, prompts, user, **options)

    def say(
        self, prompts: Sequence[Any], user: Float[Tensor, ...] | None = None, **options: Any
    ) -> pd.DataFrame:
        """What the base and every expert write for the same prompts, side by side; see `generating.say`."""
        return generating.say(self, prompts, user, **options)

    def as_causal_lm(
        self, user: Float[Tensor, ...] | None = None, prompts: Sequence[Any] | None = None
    ) -> transformers.PreTrainedModel:
        """The mixture as a transformers model: `generate` with sampling, greedy, beams, streamers.

        Parameters
        ----------
        user : log_w (K,) of one user, or (prompts, K); the gate's weights by default.
        prompts : what a gate of prompts reads: the prompts that will be continued, in their order.
        """
        if user is None and prompts is None and self.gate.reads:
            raise ValueError(
                f"the gate reads {', '.join(self.gate.reads)}: give prompts=[...], or user="
            )
        self.experts.voices(None)  # refused by tables without words
        from .causal_lm import MixtureForCausalLM  # here: model code takes seconds to load

        log_w = _served(self, prompts, user)
        return MixtureForCausalLM(self.experts, log_w.reshape(-1, self.n_experts).detach())

    def save_pretrained(
        self, folder: str | Path, provenance: Mapping[str, Any] | None = None
    ) -> None:
        """Write the mixture, its configuration and a model card, all or nothing; see `saving.save`."""
        saving.save(self, folder, provenance)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, base: Base | None = None, bases: Sequence[Base] | None = None
    ) -> MixturePolicy:
        """Read a mixture back; its base is loaded by name unless given. See `saving.load`."""
        parts, learned = saving.load(folder, base, bases)
        policy = cls(*parts)
        policy.load_state_dict(learned, strict=False)
        return policy

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
