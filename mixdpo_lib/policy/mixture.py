"""Gate, experts and beta as one policy: pi(y given x) = sum_k w_k(x) pi_k(y given x)  (arXiv 2510.08256)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from datasets import Dataset
from jaxtyping import Bool, Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..base.features import PairFeatures, TextFeatures, encode_prompts, pair_features, prompt_states, text_store
from ..base.model import Base, load_base
from ..data.pairs import Text
from ..elbo import log_responsibilities, margins, predictive_probability
from ..experts.adapters import AdapterExperts
from ..experts.contract import Experts, chosen_texts
from ..experts.heads import HeadExperts
from ..experts.tables import TabularExperts
from ..experts.whole import IndependentExperts
from ..gates import Gate, make_gate
from ..gates.contract import top_s as keep_top_s
from ..gates.m_step import gate_em
from ..gates.membership import MixedMembershipGate
from ..store import MixDPOError, progress, read_json, whole_folder
from .causal_lm import MixtureForCausalLM
from .export import export_adapter, merge, merged_model
from .generating import Generated
from .next_token import MixtureNextToken, NextToken
from .sampling import sample
from .saving import check_base, model_card


def _report(start: int, rows: int, total: int, done: int, of: int) -> None:
    progress("texts", start + rows * done // of, total, "sampled")


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

    @property
    def n_experts(self) -> int:
        """K."""
        return self.experts.n_experts

    @property
    def base(self) -> Base:
        """The frozen base model."""
        return self.experts.base[0]

    @property
    def heads(self) -> HeadExperts:
        """The experts, where they are `HeadExperts`; an error where they are not."""
        if not isinstance(self.experts, HeadExperts):
            raise ValueError(f"{type(self.experts).__name__}: this is there for HeadExperts alone")
        return self.experts

    # ------------------------------------------------------------------------------------------------ likelihoods

    def prepare(self, data: Dataset | PairFeatures) -> PairFeatures:
        """Features of a preference set (from the cache where they are there)."""
        return data if isinstance(data, PairFeatures) else pair_features(self.base, data)

    def constants(self, texts: TextFeatures) -> Any:
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
        self, texts: TextFeatures, ids: Tensor | None = None, chosen: Bool[Tensor, "ids experts"] | None = None
    ) -> Float[Tensor, "texts experts"]:
        """beta (log pi_k - log pi_ref) of every text: the implicit reward of each expert, beta x nats.

        With `ids` only those texts are computed, with `chosen` only those experts of each of the ids; what is not
        computed is NaN.
        """
        ids = torch.arange(len(texts)) if ids is None else ids
        logps, refs = self.experts.all_text_logps(texts, self.constants(texts), ids, chosen=chosen)
        found = self.beta * (logps - refs)
        rewards = torch.full((len(texts), self.n_experts), torch.nan)
        rewards[ids] = found if chosen is None else found.masked_fill(~chosen, torch.nan)
        return rewards

    @torch.no_grad()
    def loglik(
        self, data: Dataset | PairFeatures, rewards: Tensor | None = None,
        chosen: Bool[Tensor, "pairs experts"] | None = None,
    ) -> Float[Tensor, "pairs experts"]:  # fmt: skip
        """log sigma(D_k) of every pair, nats.

        Parameters
        ----------
        rewards : of the texts (see `text_rewards`), if they are known.
        chosen : which experts are computed for each pair, such as `contract.top_s(log_w, s) > -inf`; the others are -inf,
            so that `elbo.restricted_log_likelihood` and `elbo.certified_gap` read the rest. All by default.
        """
        data = self.prepare(data)
        if rewards is None and chosen is not None and not bool(chosen.all()):
            by_text = chosen_texts(chosen, data.pairs, len(data.texts))
            ids = by_text.any(1).nonzero().squeeze(1)
            rewards = self.text_rewards(data.texts, ids, by_text[ids])
        elif rewards is None:
            rewards = self.text_rewards(data.texts)
        loglik = F.logsigmoid(rewards[data.pairs[:, 0]] - rewards[data.pairs[:, 1]])
        return loglik if chosen is None else loglik.masked_fill(~chosen, -math.inf)

    # -------------------------------------------------------------------------------------------------- the gate

    def gate_inputs(
        self, data: PairFeatures, metadata: Mapping[str, Sequence[Any]] | None = None
    ) -> dict[str, Tensor]:
        """What the gate reads of each pair: the prompt's pooled state, the user's metadata, the user's offset.

        `metadata` : columns with one value a pair; by default the columns of the data.
        """
        inputs: dict[str, Tensor] = {}
        if "context" in self.gate.reads:
            inputs["context"] = self._prompt_states(data) if data.context is None else data.context
        if "metadata" in self.gate.reads:
            given = {c: data.rows[c] for c in data.rows.column_names} if metadata is None else metadata
            inputs["metadata"] = self.gate.encode(given)  # type: ignore[union-attr, operator]
        if "unit" in self.gate.reads:
            assert isinstance(self.gate, MixedMembershipGate)
            if self.gate.column not in data.rows.column_names:
                raise ValueError(
                    f"column {self.gate.column!r} is missing; found {data.rows.column_names}: the gate's offsets "
                    "belong to its users"
                )
            inputs["unit"] = self.gate.places([str(name) for name in data.rows[self.gate.column]])
        return inputs

    def _prompt_states(self, data: PairFeatures) -> Float[Tensor, "pairs features"]:
        """The pooled state of each pair's prompt; with a suffix or a layer the base reads the prompts once more."""
        if not self.gate.suffix and self.gate.layer is None:
            return prompt_states(data.texts, data.pairs[:, 0])
        place = {prompt: i for i, prompt in enumerate(dict.fromkeys(data.rows["prompt"]))}
        return self._encode(list(place))[torch.tensor([place[prompt] for prompt in data.rows["prompt"]])]

    def _encode(self, prompts: Sequence[str]) -> Float[Tensor, "prompts features"]:
        gate: Any = self.gate
        return encode_prompts(self.base, [prompt + gate.suffix for prompt in prompts], gate.layer)

    def log_w(self, data: PairFeatures) -> Float[Tensor, ...]:
        """The gate's weights, nats: (K,) where it reads nothing, else (pairs, K); gradients flow to the gate."""
        return self.gate(self.gate_inputs(data)) if self.gate.reads else self.gate()

    # ---------------------------------------------------------------------------------------------- who answered?

    def responsibilities(self, data: Dataset | PairFeatures, unit: str | None = "user") -> pd.DataFrame:
        """Posterior of the experts: one row a unit (or a pair, with unit=None), one column an expert, probabilities.

        q_uk proportional to w_k prod_{n in u} sigma(D_nk). Source: docs/method.md.
        """
        data = self.prepare(data)
        loglik = self.loglik(data)
        if unit is None:
            return pd.DataFrame(log_responsibilities(loglik, self.log_w(data)).exp().numpy())
        ids, names = data.units(unit)
        q = log_responsibilities(loglik, self.log_w(data), ids, n_units=len(names)).exp()
        return pd.DataFrame(q.numpy(), index=pd.Index(names, name=unit))

    @torch.no_grad()
    def user(
        self, pairs: Dataset | PairFeatures | None = None, metadata: Mapping[str, Any] | None = None
    ) -> Float[Tensor, "experts"]:
        """log_w (K,) of one user: the gate's weights given what is known of the user, updated by the user's own pairs.

        One latent for the user: the posterior, q_k proportional to w_k prod_n sigma(D_nk). A `MixedMembershipGate`: the
        weights of the most probable offset given the pairs, found by EM; a user without pairs has the offset 0. No
        expert is touched.

        Parameters
        ----------
        pairs : preferences of this user alone; without them the gate's weights are returned.
        metadata : one value a column, for a gate that reads metadata; columns of `pairs` stand in for it.

        Raises
        ------
        ValueError : a gate that reads the prompt (its weights are no property of a user: `predict` and `generate` ask
            it for each prompt); metadata with a gate that reads none; neither pairs nor metadata where it reads them.
        """
        gate, reads = self.gate, self.gate.reads
        if "context" in reads:
            raise ValueError(
                f"the gate reads {', '.join(reads)}: its weights belong to a prompt, not to a user; call predict or "
                "generate without `user`"
            )
        if metadata is not None and "metadata" not in reads:
            raise ValueError(f"metadata {list(metadata)}: this gate reads none; use a UserGate, or leave it out")
        inputs: dict[str, Tensor] = {}
        if "metadata" in reads:
            if metadata is None and pairs is None:
                raise ValueError("the gate reads metadata: give the user's metadata, or pairs with its columns")
            if metadata is None:
                assert pairs is not None
                rows = self.prepare(pairs).rows
                metadata = {name: rows[0][name] for name in rows.column_names}
            inputs["metadata"] = gate.encode({name: [value] for name, value in metadata.items()})  # type: ignore[union-attr, operator]
        if isinstance(gate, MixedMembershipGate):
            gate = gate.with_units(["user"])
            gate.offset.zero_()
            inputs["unit"] = torch.zeros(1, dtype=torch.long)
        prior = gate(inputs)[0] if reads else gate()
        if pairs is None:
            return prior.detach().clone()
        loglik = self.loglik(pairs)
        n = len(loglik)
        if isinstance(gate, MixedMembershipGate):
            shared = [p for one in gate.gates for p in one.parameters()]
            gate_em(gate, {name: value.expand(n, *value.shape[1:]) for name, value in inputs.items()}, loglik,
                    frozen=shared)  # fmt: skip
            return gate(inputs)[0].detach()
        return log_responsibilities(loglik, prior, torch.zeros(n, dtype=torch.long), n_units=1)[0]

    @torch.no_grad()
    def predict(
        self, data: Dataset | PairFeatures, user: Float[Tensor, ...] | None = None, top_s: int | None = None
    ) -> Tensor:
        """Probability that `chosen` is preferred, (pairs,): sum_k w_k sigma(D_k), w the user's or the gate's.

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
        texts = text_store(self.base, [Text(prompt, response, ended)]).features
        log_w = (self._speech_weights([prompt]) if user is None else user).reshape(1, self.n_experts)
        log_w = log_w if top_s is None else keep_top_s(log_w, top_s)
        chosen = None if top_s is None else log_w > -math.inf
        logps, _ = self.experts.all_text_logps(texts, self.constants(texts), chosen=chosen)
        return float((logps + log_w).logsumexp(-1))

    def _speech_weights(self, prompts: Sequence[str]) -> Tensor:
        """log_w of each prompt by the gate alone; a gate that reads metadata needs a user."""
        if "metadata" in self.gate.reads or "unit" in self.gate.reads:
            raise ValueError("the gate reads what is known of the user: give user=policy.user(metadata=...)")
        if "context" in self.gate.reads:
            return self.gate({"context": self._encode(prompts)})
        return self.gate().expand(len(prompts), self.n_experts)

    # ----------------------------------------------------------------------------------------------------- speech

    def generate(
        self, prompts: Sequence[str], user: Float[Tensor, ...] | None = None, *, max_new_tokens: int = 32,
        seed: int = 0, top_s: int | None = None, expert: Sequence[int] | None = None, batch_size: int = 192,
        temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None, greedy: bool = False,
        form: str = "sequence",
    ) -> Generated:  # fmt: skip
        """Sample one response a prompt, exactly from the mixture: z ~ w once a sequence, then expert z decodes.

        Parameters
        ----------
        user : log_w (K,) of one user or (prompts, K) of one user a prompt (see `user`); the gate's weights by default.
        top_s : keep the S most likely experts of each row, renormalised. expert : the expert of each prompt, instead of
            drawing it. Only experts that a row needs are computed.
        temperature, top_k, top_p : of the text, applied to each expert; at the defaults the sample is exact and
            `log_ratio` unbiased for KL.
        greedy : take the most likely token instead of drawing it: of expert z, which excludes the three above, or of
            the mixture in the token form.
        form : "sequence", or "token": each token from the experts weighted by their posterior given the text so far
            (`next_token.MixtureNextToken`). The same distribution of texts; greedy texts differ. Its cost is that of
            every expert kept, for all rows.

        Raises
        ------
        ValueError : no prompt, a prompt that is empty or too long, experts or options out of range, an unknown form,
            `expert` in the token form (it draws none).
        """
        if len(prompts) == 0:
            raise ValueError("no prompts: give at least one")
        if form not in ("sequence", "token"):
            raise ValueError(f"form={form!r}: possible are 'sequence' (an expert a text) and 'token' (their posterior)")
        generator = torch.Generator().manual_seed(seed)
        if expert is None:
            log_w = self._speech_weights(prompts).detach() if user is None else user
            log_w = log_w.expand(len(prompts), self.n_experts)
            if top_s is not None:
                log_w = keep_top_s(log_w, top_s)
            if form == "sequence":
                expert = torch.multinomial(log_w.softmax(-1), 1, generator=generator).squeeze(1).tolist()
        elif form == "token":
            raise ValueError("expert is given and form='token': that form draws no expert; give user=, or drop one")
        elif len(expert) != len(prompts) or not all(0 <= k < self.n_experts for k in expert):
            raise ValueError(
                f"expert={list(expert)[:5]}...: expected {len(prompts)} numbers, one a prompt, "
                f"from 0 to {self.n_experts - 1}"
            )
        tokenizer = self.base.tokenizer
        ids = [self.base.prompt_ids(p) for p in prompts]
        for p, tokens in zip(prompts, ids, strict=True):
            if not tokens or len(tokens) + max_new_tokens > self.base.context:
                raise ValueError(
                    f"prompt {p[:40]!r} has {len(tokens)} tokens; with max_new_tokens={max_new_tokens} expected "
                    f"between 1 and {self.base.context - max_new_tokens}"
                )
        truncation: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        out = Generated([], [], [], [], [], [])
        for start in range(0, len(ids), batch_size):
            part = slice(start, start + batch_size)
            speak: NextToken
            if expert is None:  # experts are truncated, then mixed, and the mixture is drawn from as it is
                speak, drawn = MixtureNextToken(self.experts, log_w[part], **truncation), {}
            else:
                speak, drawn = NextToken(self.base, self.experts, torch.tensor(expert[part])), truncation
            decoded = sample(
                speak, ids[part], max_new_tokens, greedy=greedy, eos_token_id=self.base.eos_token_id,
                generator=generator, observe=speak.observe, progress=partial(_report, start, len(ids[part]), len(ids)),
                **drawn,
            )  # fmt: skip
            ratios, refs = speak.scores()
            for i, (tokens, ended) in enumerate(zip(decoded.tokens, decoded.ended, strict=True)):
                n = len(tokens) + int(ended)  # the end token counts, though it is no text
                out.text.append(str(tokenizer.decode(tokens)))
                out.expert.append(speak.speaker(i, n))
                out.log_ratio.append(float(ratios[i, :n].sum()))
                out.ref_logp.append(float(refs[i, :n].sum()))
                out.n_tokens.append(n)
                out.ended.append(bool(ended))
        return out

    # ------------------------------------------------------------------------------------------------------- life

    def save_pretrained(self, folder: str | Path, provenance: Mapping[str, Any] | None = None) -> None:
        """Write mixture.safetensors, config.json (base, family, sizes, gate, beta) and a model card, all or nothing.

        Parameters
        ----------
        provenance : what the card says of where the mixture comes from: data, run, seed, results; one line each.

        Raises
        ------
        MixDPOError : the folder cannot be written; nothing half-done is left.
        """
        config = {
            "format": 1, "base": self.base.name, "base_fingerprint": self.base.fingerprint, "chat": self.base.chat,
            "experts": self.experts.options(), "gate": self.gate.options(), "beta": self.beta,
        }  # fmt: skip
        with whole_folder(folder) as place:
            state = {k: v.detach().cpu().contiguous().clone() for k, v in self.state_dict().items()}
            save_file(state, place / "mixture.safetensors")
            (place / "config.json").write_text(json.dumps(config, indent=1) + "\n")
            (place / "README.md").write_text(model_card(config, provenance or {}))

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, base: Base | None = None, bases: Sequence[Base] | None = None
    ) -> MixturePolicy:
        """Read a mixture back; its base is loaded by name unless given, and must be the one it was trained on.

        `bases` : of `IndependentExperts`, one an expert, instead of loading them by name.

        Raises
        ------
        MixDPOError : a file is missing or damaged, or its tensors are not those of config.json.
        ValueError : another base than the one that the mixture was trained on.
        """
        folder = Path(folder)
        for name in ("config.json", "mixture.safetensors"):
            if not (folder / name).is_file():
                raise MixDPOError(
                    f"{folder / name}: not found; expected a folder written by MixturePolicy.save_pretrained"
                )
        config: dict[str, Any] = read_json(folder / "config.json")
        if config.get("format") != 1:
            raise MixDPOError(f"{folder}/config.json: format {config.get('format')!r}, expected 1: it was written by "
                              "another version, or is no mixture")  # fmt: skip
        try:
            state = load_file(folder / "mixture.safetensors")
        except Exception as error:
            raise MixDPOError(f"{folder}/mixture.safetensors: not readable ({error}); copy the folder again") from error
        own = dict(config["experts"])
        family = own.pop("family")
        experts: Experts
        if family == "IndependentExperts":
            found = list(bases) if bases is not None else [load_base(name) for name in own["bases"]]
            for one, wanted in zip(found, own["fingerprints"], strict=True):
                check_base(folder, one, wanted)
            experts = IndependentExperts(found, own["encoder"])
        else:
            base = base or load_base(config["base"], chat=config["chat"])
            check_base(folder, base, config["base_fingerprint"])
            if family == "TabularExperts":
                experts = TabularExperts(**own | {"answers": [Text(*answer) for answer in own["answers"]]}, base=base)
            else:
                families: dict[str, Any] = {"HeadExperts": HeadExperts, "AdapterExperts": AdapterExperts}
                experts = families[family](base, **own)
        policy = cls(experts, make_gate(config["gate"]), config["beta"])
        if isinstance(experts, HeadExperts):
            experts.activate(state["experts.active_ids"])
        try:
            policy.load_state_dict(state)
        except RuntimeError as error:
            said = str(error).splitlines()[-1].strip()
            raise MixDPOError(f"{folder}/mixture.safetensors: not the tensors of config.json ({said}); copy the folder "
                              "again") from error  # fmt: skip
        return policy

    def export_adapter(self, k: int, folder: str | Path) -> None:
        """Write expert k as a PEFT adapter of the plain base, see `export.export_adapter`."""
        export_adapter(self.experts, k, folder)

    def merge(self, k: int, folder: str | Path) -> None:
        """Write expert k as a plain transformers checkpoint, see `export.merge`."""
        merge(self.experts, k, folder)

    def export_model(self, k: int) -> Any:
        """Expert k as a plain transformers model in memory, see `export.merged_model`."""
        return merged_model(self.experts, k)

    def as_causal_lm(
        self, user: Float[Tensor, ...] | None = None, prompts: Sequence[str] | None = None
    ) -> MixtureForCausalLM:
        """The mixture as a transformers model: `generate` with sampling, greedy, beams, streamers.

        Parameters
        ----------
        user : log_w (K,) of one user, or (prompts, K); the gate's weights by default.
        prompts : what a gate of prompts reads: the prompts that will be continued, in their order.
        """
        if user is None:
            if prompts is None and self.gate.reads:
                raise ValueError(f"the gate reads {', '.join(self.gate.reads)}: give prompts=[...], or user=")
            log_w = self._speech_weights([""] if prompts is None else prompts)
        else:
            log_w = user.reshape(-1, self.n_experts)
        return MixtureForCausalLM(self.experts, log_w.detach())
