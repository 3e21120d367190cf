"""Which arrows make up the movie-review study?

reviews -> prompts -> candidates -> scores -> pairs -> features -> fits -> accuracy, responsibilities, texts. Each arrow
is a method of `Study` whose result is kept in the cache, so that each notebook opens on its own and none computes what
another has computed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import DatasetDict
from torch import Tensor

from ..base.features import PairFeatures, TextStore, pair_features, text_store
from ..base.model import Base, load_base
from ..data.pairs import Text
from ..elbo import log_responsibilities, sum_over_units
from ..evaluation import align, prompt_accuracy, recovery
from ..experts.heads import HeadExperts
from ..gates import Gate
from ..gates.user import UserGate, given_gate
from ..gates.weights import LearnedWeights
from ..learning.config import FitConfig, FitResult
from ..policy.generating import Generated
from ..policy.mixture import MixturePolicy
from ..store import artefact_key, cached, hash_seed
from .candidates import CandidateConfig, review_prompts, sample_candidates, split_prompts, usable
from .fits import VERSION, kept_fit
from .judges.contract import JudgeConfig, split_reviews
from .judges.panel import Judges, judges, score_texts
from .reviews import load_reviews
from .simulated_people import GROUPS, DesignConfig, simulate_preferences
from .tables import user_groups
from .texts import prefix_kl, text_table

# Optimiser, rate and passes: chosen on validation pairs of both designs, first seed (docs/log.md has what was tried).
# Temperature and its length: raised after an expert died.
STUDY_FIT: dict[str, Any] = {
    "batch_by": "prompt",
    "batch_size": 16,
    "optimizer": "sgd",
    "learning_rate": 0.03,
    "passes": 5.0,
    "start_temperature": 100.0,
    "tempering_passes": 2.0,
    "symmetry_passes": 0.5,
    "evaluations_per_pass": 1,
    "evaluate_training": False,
}
N_KL_TEXTS = 2  # sampled on each validation prompt, to match KL
KL_SCALES = np.geomspace(0.05, 2.0, 24).tolist()  # factors on B_k between which the match is interpolated
METADATA = ("genre", "age_band")  # what is known of a user
READING = ("gate_iterations", "gate_entropy", "gate_balance", "top_s", "cluster_by", "cluster_certainty",
           "accumulate", "bf16")  # of gates; and how a step is computed, which changes no result of heads


@dataclass(frozen=True)
class Method:
    """A way to learn from mixed preferences: K experts of a rank, with one latent a user or a comparison.

    gate : "learned" weights that read nothing; "metadata", a gate of the users' metadata; "given", the hidden group.
    """

    n_experts: int
    rank: int
    latent: str
    gate: str = "learned"


def study_methods(n_experts: int, rank: int) -> dict[str, Method]:
    """The methods that are compared.

    `dpo_rank_3r` is the control with the parameters of all experts in one policy; `oracle` is told each user's hidden
    group: one DPO a group, fitted side by side.
    """
    return {
        "dpo": Method(1, rank, "unit"),
        "dpo_rank_3r": Method(1, rank * n_experts, "unit"),
        "mix_dpo": Method(n_experts, rank, "unit"),
        "mix_dpo_pair": Method(n_experts, rank, "pair"),
        "moe_dpo": Method(n_experts, rank, "unit", "metadata"),
        "oracle": Method(len(GROUPS), rank, "unit", "given"),
    }


@dataclass(frozen=True)
class StudyConfig:
    """Every choice of the study. Profiles set these through the notebooks' parameters."""

    base: str = "smollm2-135m"
    reviews: str = "imdb-packaged"
    candidates: CandidateConfig = field(default_factory=CandidateConfig)
    judges: JudgeConfig = field(default_factory=JudgeConfig)
    designs: tuple[DesignConfig, ...] = (DesignConfig(), DesignConfig(name="clean"))
    n_experts: int = 3
    rank: int = 8
    min_count: int = 2  # occurrences of an active token in the training responses
    beta: float = 0.1
    fit: FitConfig = field(default_factory=lambda: FitConfig(**STUDY_FIT))


@dataclass(frozen=True)
class Fitted:
    """A fitted method: the policy at its best validation step, its history, and the users' weights under it."""

    design: str
    policy: MixturePolicy
    result: FitResult
    method: str
    seed: int
    rewards: Tensor  # (texts, experts) beta (log pi_k - log pi_ref) of every candidate
    user_log_q: Tensor  # (users, experts) from each user's own training pairs
    users: list[str]
    order: list[int]  # expert of each of GROUPS, aligned by training users' responsibilities


def study_config(designs: Sequence[str] = ("default", "clean"), **values: Any) -> StudyConfig:
    """A `StudyConfig` from flat values, each named as the field it sets (`n_prompts`, `flip_rate`, `passes`, ...).

    >>> study_config(["clean"], pairs_per_user=20, learning_rate=0.01).designs[0].pairs_per_user
    20
    """
    homes = _homes()
    own: dict[str, dict[str, Any]] = {home: {} for home in homes.values()}
    own["fit"] = dict(STUDY_FIT)
    for key, value in values.items():
        if key not in homes:
            raise ValueError(f"{key}={value!r} is no choice of the study; possible are {', '.join(sorted(homes))}")
        own[homes[key]][key] = value
    return StudyConfig(
        candidates=CandidateConfig(**own["candidates"]),
        judges=JudgeConfig(**own["judges"]), fit=FitConfig(**own["fit"]),
        designs=tuple(DesignConfig(name=name, **own["design"]) for name in designs), **own["study"],
    )  # fmt: skip


def _homes() -> dict[str, str]:
    """Part of a `StudyConfig` that each choice belongs to."""
    parts: dict[str, Any] = {"candidates": CandidateConfig, "judges": JudgeConfig,
                             "design": DesignConfig, "fit": FitConfig}  # fmt: skip
    homes = {f.name: home for home, kind in parts.items() for f in fields(kind)}
    for hidden in ("seed", "name", "latent"):
        del homes[hidden]
    own = ("base", "reviews", "n_experts", "rank", "beta", "min_count")
    return homes | dict.fromkeys(own, "study")


class Study:
    """The arrows of the study, each computed once."""

    def __init__(self, config: StudyConfig | None = None) -> None:
        self.config = config or StudyConfig()
        self._designs = {design.name: design for design in self.config.designs}
        self._pairs: dict[str, dict[str, PairFeatures]] = {}
        self._fitted: dict[tuple[str, str, int], Fitted] = {}
        self.methods = study_methods(self.config.n_experts, self.config.rank)

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Any], **choices: Any) -> Study:
        """The study of a notebook: its own parameters, what it shares (`common`), and `choices`.

        Parameters of the notebook's own that are no choice of the study are for its display and are
        left out. Nothing else is: a name in `common` or `choices` that is no choice is an error.

        >>> parameters = {"design": "clean", "n_shown": 3, "common": {"rank": 4}}
        >>> config = Study.from_parameters(parameters, n_experts=2).config
        >>> [design.name for design in config.designs], config.rank, config.n_experts
        (['clean'], 4, 2)
        """
        known = {*_homes(), "designs"}
        own = {name: value for name, value in parameters.items() if name in known}
        if "design" in parameters:
            own["designs"] = [parameters["design"]]
        return cls(study_config(**{**own, **parameters.get("common", {}), **choices}))

    @cached_property
    def base(self) -> Base:
        """The frozen base model."""
        return load_base(self.config.base)

    @cached_property
    def judges(self) -> Judges:
        """The three rewards, each with a training and an evaluation judge."""
        return judges(self.config.reviews, self.config.judges)

    @cached_property
    def prompts(self) -> list[str]:
        """First tokens of reviews that no judge was fitted on."""
        reviews = split_reviews(load_reviews(self.config.reviews), config=self.config.judges)["prompts"]
        return review_prompts(self.base, reviews["text"], self.config.candidates)

    @cached_property
    def candidates(self) -> pd.DataFrame:
        """Continuations of the prompts by the base, without the unusable ones."""
        return usable(sample_candidates(self.base, self.prompts, self.config.candidates))

    @cached_property
    def scores(self) -> pd.DataFrame:
        """What the training judges say of prompt and response together: the hidden rewards."""
        return score_texts(self._whole(self.candidates["prompt"], self.candidates["response"]), self.judges.training)

    @staticmethod
    def _whole(prompts, responses) -> list[str]:
        return [p + r for p, r in zip(prompts, responses, strict=True)]

    @cached_property
    def texts(self) -> TextStore:
        """Features of all candidates."""
        table = self.candidates
        pairs = zip(table["prompt"], table["response"], strict=True)
        return text_store(self.base, (Text(prompt, response, False) for prompt, response in pairs))

    def design(self, name: str) -> DesignConfig:
        """Who labels what in the design of this name."""
        return self._designs[name]

    def preferences(self, design: str) -> DatasetDict:
        """The preference sets of a design: train, validation, context, test."""
        return simulate_preferences(self.candidates, self.scores, self._designs[design])

    def pairs(self, design: str) -> dict[str, PairFeatures]:
        """The preference sets of a design with their features."""
        if design not in self._pairs:
            sets = self.preferences(design)
            self._pairs[design] = {name: pair_features(self.base, rows, self.texts) for name, rows in sets.items()}
        return self._pairs[design]

    # ------------------------------------------------------------------------------------------------------- fits

    def new_policy(self, method: str, train: PairFeatures | None = None) -> MixturePolicy:
        """An untrained policy of a method; a gate of metadata knows the columns from the training pairs."""
        m = self.methods[method]
        experts = HeadExperts(self.base, m.n_experts, m.rank, min_count=self.config.min_count)
        gate: Gate = LearnedWeights(m.n_experts)
        if m.gate == "given":
            gate = given_gate("group", GROUPS, m.n_experts)
        elif m.gate == "metadata":
            assert train is not None
            users = pd.DataFrame({c: train.rows[c] for c in ("user", *METADATA)}).drop_duplicates("user")
            gate = UserGate.from_metadata({c: users[c].tolist() for c in METADATA}, m.n_experts)
        return MixturePolicy(experts, gate, self.config.beta)

    def fitted(self, design: str, method: str, seed: int) -> Fitted:
        """Fit a method on a design's training pairs, or read the fit from the cache."""
        key = (design, method, seed)
        if key not in self._fitted:
            self._fitted[key] = self._fit(design, method, seed)
        return self._fitted[key]

    def fits(self, methods: Sequence[str], seeds: Sequence[int]) -> list[Fitted]:
        """Every method on every design with every seed."""
        return [self.fitted(d, m, s) for d in self._designs for m in methods for s in seeds]

    def variant(self, n_experts: int | None = None, **fit: Any) -> Study:
        """The same data and features with another K or other choices of the fit, for ablations.

        Raises
        ------
        ValueError : a choice that `FitConfig` does not have.
        """
        unknown = set(fit) - {f.name for f in fields(FitConfig)}
        if unknown:
            raise ValueError(f"{sorted(unknown)} are no choices of a fit; possible are those of FitConfig")
        config = replace(self.config, fit=replace(self.config.fit, **fit), n_experts=n_experts or self.config.n_experts)
        other = Study(config)
        for name in ("base", "prompts", "candidates", "scores", "texts", "_pairs"):
            setattr(other, name, getattr(self, name))
        return other

    def _fit(self, design: str, method: str, seed: int) -> Fitted:
        m, sets = self.methods[method], self.pairs(design)
        config = replace(self.config.fit, seed=seed, latent=m.latent)
        learned = {n: sets[n].rows.to_dict() for n in ("train", "validation")}
        digest = artefact_key("pairs", VERSION, learned)
        shape = asdict(m)
        if shape.pop("gate") == "given":
            config = replace(config, symmetry_breaking="none")  # the groups part the experts
        parameters = {
            "method": shape,
            "beta": self.config.beta,
            "min_count": self.config.min_count,
            "fit": {k: v for k, v in asdict(config).items() if k not in READING},
            "pairs": digest,
        }
        policy = self.new_policy(method, sets["train"])
        if policy.gate.reads:
            parameters |= {"fit": asdict(config), "gate": policy.gate.options()}
        result, rewards = kept_fit(policy, sets["train"], sets["validation"], config, self.texts.features, parameters)
        train = sets["train"]
        ids, users = train.units("user")
        log_q = log_responsibilities(policy.loglik(train, rewards), policy.log_w(train), ids, n_units=len(users))
        groups = user_groups(train)
        order = align(log_q.exp().numpy(), [groups[u] for u in users], GROUPS)
        return Fitted(design, policy, result, method, seed, rewards, log_q, users, order)

    # ------------------------------------------------------------------------------------------------- evaluation

    def history(self, fits: Sequence[Fitted]) -> pd.DataFrame:
        """Every evaluation of every fit, one row each."""
        return pd.concat([_named(f, f.result.history) for f in fits], ignore_index=True)

    def restarts(self, fits: Sequence[Fitted]) -> pd.DataFrame:
        """Every restart of every fit, with the kept one marked."""
        return pd.concat([_named(f, f.result.restarts) for f in fits], ignore_index=True)

    def stop_reasons(self, fits: Sequence[Fitted]) -> dict[str, str]:
        """Why each fit ended."""
        return {f"{f.design}/{f.method}/{f.seed}": f.result.stop_reason for f in fits}

    def accuracy_by_prompt(self, fits: Sequence[Fitted]) -> pd.DataFrame:
        """Test accuracy by group and prompt, for every fit, routing, seen and new users (see `prompt_accuracy`)."""
        return pd.concat([self._accuracy(f) for f in fits], ignore_index=True)

    def _accuracy(self, fitted: Fitted) -> pd.DataFrame:
        sets, policy = self.pairs(fitted.design), fitted.policy
        test_loglik = policy.loglik(sets["test"], fitted.rewards)
        ids, new_users = sets["context"].units("user")
        context = policy.loglik(sets["context"], fitted.rewards)
        new_log_q = log_responsibilities(context, policy.gate(), ids, n_units=len(new_users))
        parts = []
        for who, names, data, log_q in (
            ("seen", fitted.users, sets["train"], fitted.user_log_q), ("new", new_users, sets["context"], new_log_q)
        ):  # fmt: skip
            of = user_groups(data)
            own = {g: log_q[[i for i, u in enumerate(names) if of[u] == g]] for g in GROUPS}
            for routing, weights in _routings(policy, fitted.order, own).items():
                table = prompt_accuracy(policy, sets["test"], weights, test_loglik)
                parts.append(_named(fitted, table.assign(routing=routing, users=who)))
        return pd.concat(parts, ignore_index=True)

    def held_out(self, fits: Sequence[Fitted]) -> pd.DataFrame:
        """Validation pairs of every training user under the user's own posterior q_u: one row a fit and user, nats.

        `loglik`: log sum_k q_uk prod_n sigma(D_nk) over the user's validation pairs; `elbo`, its bound by Jensen:
        sum_k q_uk sum_n log sigma(D_nk). Source: docs/method.md.
        """
        parts = []
        for f in fits:
            data = self.pairs(f.design)["validation"]
            ids, users = data.units("user")
            total = sum_over_units(f.policy.loglik(data, f.rewards), ids, len(users))
            log_q = f.user_log_q[[f.users.index(user) for user in users]]
            table = {
                "user": users,
                "loglik": (log_q + total).logsumexp(1).tolist(),
                "elbo": (log_q.exp() * total).sum(1).tolist(),
            }
            parts.append(_named(f, pd.DataFrame(table)))
        return pd.concat(parts, ignore_index=True)

    def responsibilities(self, fits: Sequence[Fitted]) -> pd.DataFrame:
        """Tidy responsibilities of the training users, experts named by the group they serve."""
        parts = []
        for f in fits:
            of = user_groups(self.pairs(f.design)["train"])
            names = {k: g for g, k in zip(GROUPS, f.order, strict=True) if k >= 0}
            rows = [
                {"user": u, "group": of[u], "expert": k, "expert_serves": names.get(k, f"unmatched {k}"),
                 "responsibility": q}
                for u, row in zip(f.users, f.user_log_q.exp().tolist(), strict=True) for k, q in enumerate(row)
            ]  # fmt: skip
            parts.append(_named(f, pd.DataFrame(rows)))
        return pd.concat(parts, ignore_index=True)

    def recovery(self, fits: Sequence[Fitted]) -> pd.DataFrame:
        """How well the training users' responsibilities recover the hidden groups: NMI, ARI, aligned accuracy."""
        parts = []
        for f in fits:
            of = user_groups(self.pairs(f.design)["train"])
            found = recovery(pd.DataFrame(f.user_log_q.exp().numpy()), [of[u] for u in f.users])
            parts.append(_named(f, pd.DataFrame([found])))
        return pd.concat(parts, ignore_index=True)

    # ------------------------------------------------------------------------------------------------------ texts

    def matched_scales(self, design: str, seeds: Sequence[int], method: str = "mix_dpo") -> pd.DataFrame:
        """For each seed and expert: the factor on B_k at which the expert is as far from the reference as DPO is.

        A factor acts as another beta. It is chosen on validation prompts: first so that the KL on the prefixes of the
        candidates (`prefix_kl`) is DPO's, then once more by what both sampled there.

        Returns (design, policy, seed, expert, scale, prefix_kl, sampled_kl before the last correction, nats a text).
        """
        validation = split_prompts(len(self.prompts))["validation"]
        rows = np.flatnonzero(self.candidates["prompt_id"].isin(validation))
        ids = torch.tensor([self.texts.index[self._text(int(i))] for i in rows])
        prompt_ids = [i for i in validation for _ in range(N_KL_TEXTS)]

        def sampled_kl(fitted: Fitted, name: str, expert: int, scale: float) -> float:
            return float(np.mean(self._generated(fitted, name, expert, scale, prompt_ids).log_ratio))

        found = []
        for seed in seeds:
            dpo, mixture = self.fitted(design, "dpo", seed), self.fitted(design, method, seed)
            target = float(prefix_kl(dpo.policy, self.texts.features, ids)[0, 0])
            sampled = sampled_kl(dpo, "dpo", 0, 1.0)
            found.append({"policy": "dpo", "seed": seed, "expert": 0, "scale": 1.0, "prefix_kl": target,
                          "sampled_kl": sampled})  # fmt: skip
            curve = np.log(prefix_kl(mixture.policy, self.texts.features, ids, KL_SCALES).clip(1e-12))
            for group, expert in zip(GROUPS, mixture.order, strict=True):
                if expert < 0:
                    continue

                def at(kl: float, expert: int = expert, curve: np.ndarray = curve) -> float:
                    return float(np.exp(np.interp(np.log(max(kl, 1e-12)), curve[:, expert], np.log(KL_SCALES))))

                name = f"expert_{group}"
                first = sampled_kl(mixture, name, expert, at(target))
                scale = at(target * sampled / first) if min(sampled, first) > 0 else at(target)
                kl = float(prefix_kl(mixture.policy, self.texts.features, ids, [scale])[0, expert])
                found.append({"policy": name, "seed": seed, "expert": expert, "scale": scale, "prefix_kl": kl,
                              "sampled_kl": first})  # fmt: skip
        return pd.DataFrame(found).assign(design=design, method=lambda t: np.where(t["policy"] == "dpo", "dpo", method))

    def texts_of(self, policies: pd.DataFrame, n_texts: int) -> pd.DataFrame:
        """Sample `n_texts` texts of every row of `matched_scales` on test prompts; the evaluation judges score them.

        One row a text: design, policy, seed, prompt_id, prompt, text, one column a reward, log_ratio, ref_logp, ...
        """
        test = list(split_prompts(len(self.prompts))["test"])
        prompt_ids = [test[i % len(test)] for i in range(n_texts)]
        prompts = [self.prompts[i] for i in prompt_ids]
        parts = []
        for row in policies.itertuples():
            fitted = self.fitted(row.design, row.method, row.seed)
            generated = self._generated(fitted, row.policy, row.expert, row.scale, prompt_ids)
            scores = score_texts(self._whole(prompts, generated.text), self.judges.evaluation)
            table = text_table(generated, prompts, prompt_ids, scores)
            parts.append(table.assign(policy=row.policy, seed=row.seed, design=row.design))
        return pd.concat(parts, ignore_index=True)

    def base_texts(self) -> pd.DataFrame:
        """The base's own candidates on test prompts as texts of the policy "base" (log_ratio 0)."""
        rows = np.flatnonzero(self.candidates["prompt_id"].isin(split_prompts(len(self.prompts))["test"]))
        part = self.candidates.iloc[rows]
        ids = torch.tensor([self.texts.index[self._text(int(i))] for i in rows])
        policy = self.new_policy("dpo")
        policy.heads.activate_responses(self.pairs(next(iter(self._designs)))["train"])  # constants are there
        _, refs = policy.experts.all_text_logps(self.texts.features, policy.constants(self.texts.features))
        offsets = self.texts.features.offsets
        generated = Generated(
            text=part["response"].tolist(), expert=[0] * len(part), log_ratio=[0.0] * len(part),
            ref_logp=refs[ids, 0].tolist(), n_tokens=(offsets[ids + 1] - offsets[ids]).tolist(),
            ended=part["ended"].tolist(),
        )  # fmt: skip
        scores = score_texts(self._whole(part["prompt"], part["response"]), self.judges.evaluation)
        return text_table(generated, part["prompt"], part["prompt_id"], scores).assign(policy="base", seed=0)

    def _text(self, row: int) -> Text:
        return Text(self.candidates["prompt"].iat[row], self.candidates["response"].iat[row], False)

    def _generated(
        self, fitted: Fitted, name: str, expert: int, scale: float, prompt_ids: Sequence[int]
    ) -> Generated:
        """Texts of one expert, B_k times `scale`, on these prompts; kept in the cache."""
        prompts = [self.prompts[i] for i in prompt_ids]
        policy = self.new_policy(fitted.method)
        policy.heads.activate(fitted.policy.heads.active_ids)
        policy.load_state_dict(fitted.policy.state_dict())
        policy.heads.scale(scale)
        state = hashlib.sha256(b"".join(v.contiguous().numpy().tobytes() for v in policy.state_dict().values()))
        length = self.config.candidates.response_tokens
        seed = hash_seed(fitted.seed, "texts", name)
        parameters = {"state": state.hexdigest(), "expert": expert, "prompts": prompts, "length": length, "seed": seed,
                      "base": self.base.fingerprint}  # fmt: skip

        def build(folder: Path) -> None:
            out = policy.generate(prompts, expert=[expert] * len(prompts), max_new_tokens=length, seed=seed)
            pd.DataFrame(asdict(out)).to_json(folder / "texts.jsonl", orient="records", lines=True)

        folder = cached("texts", VERSION, parameters, build)
        table = pd.read_json(folder / "texts.jsonl", orient="records", lines=True, dtype=False, convert_dates=False)
        return Generated(**{c: table[c].tolist() for c in table})


def _named(fitted: Fitted, table: pd.DataFrame) -> pd.DataFrame:
    return pd.concat(
        [
            pd.DataFrame({"design": fitted.design, "method": fitted.method, "seed": fitted.seed}, index=table.index),
            table,
        ],
        axis=1,
    )


def _routings(policy: MixturePolicy, order: list[int], own: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """By routing and group the log_w rows that serve it: none (one policy), prior, own_pairs, oracle (the truth)."""
    prior = {g: policy.gate()[None] for g in GROUPS}
    if policy.n_experts == 1:
        return {"none": prior}
    one = torch.full((policy.n_experts,), -torch.inf)
    oracle = {g: one.index_fill(0, torch.tensor([k]), 0.0)[None] if k >= 0 else prior[g]
              for g, k in zip(GROUPS, order, strict=True)}  # fmt: skip
    return {"prior": prior, "own_pairs": own, "oracle": oracle}
