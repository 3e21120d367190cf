"""Can a gate route movies and books? Prompts of two domains, a hidden reward profile for each, fits, and the gate.

No learner sees the domain but the one that is called `oracle`. Two kinds of prompts: titles of well-known works in
templates that name neither domain, or the first words of real reviews.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from ..base.features import PairFeatures, TextStore, encode_prompts, pair_features, text_store
from ..base.model import Base, load_base
from ..data.pairs import Text
from ..elbo import log_responsibilities
from ..evaluation import align, prompt_accuracy
from ..experts.heads import HeadExperts
from ..gates import Gate
from ..gates.contract import standardise, top_s
from ..gates.prompt import ContextGate
from ..gates.user import given_gate
from ..gates.weights import FixedWeights, LearnedWeights
from ..learning.config import FitConfig, FitResult
from ..policy.mixture import MixturePolicy
from ..store import MixDPOError, hash_seed, project_root
from .candidates import CandidateConfig, sample_candidates, usable
from .fits import kept_fit
from .judges.contract import JudgeConfig, split_reviews
from .judges.panel import Judges, judges, score_texts
from .reviews import load_reviews
from .simulated_people import label_temperature
from .titles import DOMAINS, TEMPLATES, familiarity, first_tokens, load_titles, split_items

SUFFIXES = {
    "titles": " was good.\n\nThis is about a famous",
    "reviews": "...\n\nQuestion: What is this a review of?\nAnswer: It is a review of a",
}
LAYER = 28  # of the packaged model's 30; chosen by cross-validation on works that are not held out, see docs/log.md
PROFILES: dict[str, dict[str, float]] = {
    "film": {"sentiment": 1.0, "informativeness": -1.0},
    "book": {"sentiment": -1.0, "informativeness": 1.0},
}
DOMAIN_FIT: dict[str, Any] = {
    "latent": "pair",
    "batch_by": "prompt",
    "batch_size": 16,
    "optimizer": "sgd",
    "learning_rate": 0.03,
    "passes": 4.0,
    "start_temperature": 1.0,
    "symmetry_breaking": "clusters",
    "cluster_by": "item",
    "cluster_certainty": 0.95,
    "symmetry_passes": 1.0,
    "evaluations_per_pass": 1,
    "evaluate_training": False,
}


@dataclass(frozen=True)
class DomainConfig:
    """Every choice of the study of two domains."""

    prompts: str = "titles"  # "titles" in templates, or "reviews": the first words of real ones
    base: str = "smollm2-135m"
    reviews: str = "imdb-packaged"  # reviews of films; the judges are fitted on others of them
    book_reviews: str = ""  # file, folder or hub id with reviews of books; for "reviews" only
    titles: str = ""  # folder with films.csv and books.csv; the project's own by default
    n_titles: int = 150  # of each domain: those that the base knows best, see `familiarity`
    templates: tuple[str, ...] = TEMPLATES  # with {title} and {maker}; the same for both domains, every title in each
    n_prompts: int = 180  # of each domain, for "reviews"
    prompt_tokens: int = 32  # of a review
    gate_tokens: int = 32  # how many of them the gate reads
    n_candidates: int = 3
    response_tokens: int = 24
    labels_per_pair: int = 4  # independent noisy answers to each comparison
    flip_rate: float = 0.10
    n_experts: int = 2
    rank: int = 8
    min_count: int = 5  # occurrences of an active token in the training responses
    beta: float = 0.1
    pooling: str = "last"  # see ContextGate
    suffix: str | None = None  # of what the gate reads, see ContextGate; by default that of SUFFIXES, "" for none
    layer: int | None = LAYER  # whose state the gate reads, see ContextGate
    weight_scale: float = 0.03  # see ContextGate; each answer of a prompt counts: about 0.1 / sqrt(answers a prompt)
    judges: JudgeConfig = field(default_factory=JudgeConfig)
    fit: FitConfig = field(default_factory=lambda: FitConfig(**DOMAIN_FIT))
    seed: int = 0

    def __post_init__(self) -> None:
        if self.prompts not in ("titles", "reviews"):
            raise ValueError(f"prompts={self.prompts!r}: possible are 'titles' and 'reviews'")
        if self.prompts == "reviews" and not self.book_reviews:
            raise ValueError("prompts='reviews' needs book_reviews: a file, a folder or a hub id with reviews of books")
        if not 0 < self.gate_tokens <= self.prompt_tokens:
            raise ValueError(f"gate_tokens={self.gate_tokens}: expected 1 ... prompt_tokens={self.prompt_tokens}")
        for template in self.templates or ("",):
            if "{title}" not in template or "{maker}" not in template:
                raise ValueError(f"template {template!r}: expected a text with {{title}} and {{maker}}")
        if not 0 <= self.flip_rate < 0.5:
            raise ValueError(f"flip_rate={self.flip_rate}: expected at least 0 and below 0.5 (0 is no noise)")


def domain_config(**values: Any) -> DomainConfig:
    """A `DomainConfig` from flat values, each named as the field it sets (`n_titles`, `passes`, ...).

    >>> domain_config(n_titles=20, passes=1.0).fit.passes
    1.0
    """
    parts: dict[str, dict[str, Any]] = {"judges": {}, "fit": dict(DOMAIN_FIT), "study": {}}
    homes = _homes()
    for key, value in values.items():
        if key not in homes:
            possible = ", ".join(sorted(homes))
            raise ValueError(f"{key}={value!r} is no choice; possible are {possible}")
        parts[homes[key]][key] = value
    judge_config, fit_config = JudgeConfig(**parts["judges"]), FitConfig(**parts["fit"])
    return DomainConfig(judges=judge_config, fit=fit_config, **parts["study"])


def _homes() -> dict[str, str]:
    """Part of a `DomainConfig` that each choice belongs to."""
    homes = {f.name: "judges" for f in fields(JudgeConfig) if f.name != "seed"}
    homes |= {f.name: "fit" for f in fields(FitConfig) if f.name != "seed"}
    own = {f.name for f in fields(DomainConfig)} - {"judges", "fit"}
    return homes | dict.fromkeys(own, "study")


@dataclass(frozen=True)
class DomainFit:
    """A fitted method: the policy at its best validation step, its history, every text's rewards, expert of DOMAINS."""

    policy: MixturePolicy
    result: FitResult
    method: str
    seed: int
    rewards: Tensor
    order: list[int]


class DomainStudy:
    """The arrows of the study of two domains, each computed once."""

    def __init__(self, config: DomainConfig | None = None) -> None:
        self.config = config or DomainConfig()
        self._fitted: dict[tuple[str, int], DomainFit] = {}

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Any], **choices: Any) -> DomainStudy:
        """The study of a notebook: its own parameters, what it shares (`common`), and `choices`.

        Parameters of the notebook's own that are no choice of the study are for its display and are
        left out. Nothing else is: a name in `common` or `choices` that is no choice is an error.

        >>> parameters = {"n_titles": 20, "n_shown": 3, "common": {"passes": 1.0}}
        >>> DomainStudy.from_parameters(parameters).config.fit.passes
        1.0
        """
        own = {name: value for name, value in parameters.items() if name in _homes()}
        return cls(domain_config(**{**own, **parameters.get("common", {}), **choices}))

    @cached_property
    def base(self) -> Base:
        """The frozen base model."""
        return load_base(self.config.base)

    @cached_property
    def judges(self) -> Judges:
        """The judges of the reviews of films: both domains are scored by the same ones."""
        return judges(self.config.reviews, self.config.judges)

    # ------------------------------------------------------------------------------------------------------ prompts

    @cached_property
    def works(self) -> pd.DataFrame:
        """All works: title, maker, domain, `familiarity` to the base (nats) and its rank in the domain from 0."""
        config = self.config
        table = load_titles(config.titles or project_root() / "data" / "titles", config.n_titles)
        table["familiarity"] = familiarity(self.base, table)
        ranks = table.groupby("domain")["familiarity"].rank(method="first", ascending=False)
        return table.assign(rank=ranks.astype(int) - 1)

    @cached_property
    def items(self) -> pd.DataFrame:
        """The works that the base knows best, or reviews.

        Columns: domain, part (train, validation, test), and title and maker, or the text's beginning.
        """
        config = self.config
        if config.prompts == "titles":
            table = self.works[self.works["rank"] < config.n_titles].reset_index(drop=True)
        else:
            films = split_reviews(load_reviews(config.reviews), config=config.judges)["prompts"]["text"]
            books = load_reviews(config.book_reviews)["text"]
            parts = []
            for domain, texts in zip(DOMAINS, (films, books), strict=True):
                order = np.random.default_rng(hash_seed(config.seed, domain)).permutation(len(texts))
                found = (first_tokens(self.base, texts[int(i)], config.prompt_tokens) for i in order)
                distinct = list(dict.fromkeys(text for text in found if text))[: config.n_prompts]
                if len(distinct) < config.n_prompts:
                    place = config.reviews if domain == "film" else config.book_reviews
                    raise MixDPOError(
                        f"{place}: {len(distinct)} distinct reviews of more than {config.prompt_tokens} tokens, "
                        f"n_prompts={config.n_prompts} wanted: give more reviews, or ask for fewer prompts"
                    )
                parts.append(pd.DataFrame({"text": distinct, "domain": domain}))
            table = pd.concat(parts, ignore_index=True)
        seeds = {domain: hash_seed(config.seed, "split", domain) for domain in DOMAINS}
        table["part"] = ""
        for domain in DOMAINS:
            rows = table.index[table["domain"] == domain]
            table.loc[rows, "part"] = split_items(len(rows), seeds[domain])
        return table

    @cached_property
    def prompts(self) -> pd.DataFrame:
        """One row a prompt with candidates: item, domain, part, prompt."""
        if self.config.prompts == "reviews":
            return self.items.rename(columns={"text": "prompt"}).assign(item=lambda t: t.index)
        return self._in_templates(self.items)

    def _in_templates(self, works: pd.DataFrame) -> pd.DataFrame:
        return pd.DataFrame([
            {"item": item, "domain": work.domain, "part": work.part,
             "prompt": template.format(title=work.title, maker=work.maker)}
            for item, work in enumerate(works.itertuples()) for template in self.config.templates
        ])  # fmt: skip

    @cached_property
    def less_known(self) -> pd.DataFrame:
        """Prompts about works left out, at most n_titles / 5 of each domain: those that the base knows least."""
        least = self.works.sort_values("rank", ascending=False).groupby("domain").head(self.config.n_titles // 5)
        least = least[least["rank"] >= self.config.n_titles].sort_index()
        return self._in_templates(least.assign(part="less known"))

    @property
    def suffix(self) -> str:
        """What follows a prompt when the gate reads it: a question that both domains are asked alike."""
        return SUFFIXES[self.config.prompts] if self.config.suffix is None else self.config.suffix

    def gate_prompt(self, prompt: str) -> str:
        """What the gate reads of a prompt: all of it, or the first `gate_tokens` tokens of a review."""
        config = self.config
        if config.prompts == "titles" or config.gate_tokens == config.prompt_tokens:
            return prompt
        return first_tokens(self.base, prompt, config.gate_tokens) or prompt

    # ------------------------------------------------------------------------------------------------- preferences

    @cached_property
    def candidates(self) -> pd.DataFrame:
        """Continuations of the prompts by the base, without the unusable ones."""
        config = CandidateConfig(
            n_prompts=len(self.prompts), n_candidates=self.config.n_candidates, seed=self.config.seed,
            response_tokens=self.config.response_tokens,
        )  # fmt: skip
        return usable(sample_candidates(self.base, self.prompts["prompt"].tolist(), config))

    @cached_property
    def scores(self) -> pd.DataFrame:
        """Standardised scores of the training judges, one row a candidate."""
        whole = [p + r for p, r in zip(self.candidates["prompt"], self.candidates["response"], strict=True)]
        scores = score_texts(whole, self.judges.training)
        return (scores - scores.mean()) / scores.std().replace(0, 1)

    @cached_property
    def rewards(self) -> pd.DataFrame:
        """The hidden reward of every candidate under each domain's profile, in standard deviations."""
        return pd.DataFrame({
            domain: sum(weight * self.scores[reward] for reward, weight in profile.items())
            for domain, profile in PROFILES.items()
        })  # fmt: skip

    @cached_property
    def preferences(self) -> dict[str, Dataset]:
        """train, validation (noisy answers by each domain's profile) and test (noise-free). `group` is the domain."""
        config, table = self.config, self.candidates
        rng = np.random.default_rng(hash_seed(config.seed, "labels"))
        of = self.prompts.loc[table["prompt_id"]].reset_index(drop=True)
        gaps: dict[str, list[tuple[int, int, float]]] = {domain: [] for domain in DOMAINS}
        for rows in table.groupby("prompt_id").indices.values():
            domain = of["domain"].iat[rows[0]]
            value = self.rewards[domain].to_numpy()
            for x in range(len(rows)):
                for y in range(x + 1, len(rows)):
                    a, b = (rows[x], rows[y]) if value[rows[x]] > value[rows[y]] else (rows[y], rows[x])
                    if value[a] != value[b]:
                        gaps[domain].append((int(a), int(b), float(value[a] - value[b])))
        out: dict[str, list[dict[str, Any]]] = {"train": [], "validation": [], "test": []}
        for domain in DOMAINS:
            train = np.array([g for a, _, g in gaps[domain] if of["part"].iat[a] == "train"])
            t = label_temperature(train, config.flip_rate)
            for better, worse, gap in gaps[domain]:
                part = of["part"].iat[better]
                for _ in range(1 if part == "test" else config.labels_per_pair):
                    flipped = part != "test" and t > 0 and rng.random() < 1 / (1 + math.exp(min(gap / t, 700)))
                    a, b = (worse, better) if flipped else (better, worse)
                    out[part].append({
                        "prompt": table["prompt"].iat[a], "chosen": table["response"].iat[a],
                        "rejected": table["response"].iat[b], "ended": False, "domain": domain, "group": domain,
                        "prompt_id": int(table["prompt_id"].iat[a]), "item": int(of["item"].iat[a]), "gap": gap,
                        "flipped": bool(flipped),
                    })  # fmt: skip
        for part, rows_of in out.items():
            empty = set(DOMAINS) - {row["domain"] for row in rows_of}
            if empty:
                raise MixDPOError(f"no {part} pairs for {sorted(empty)}: ask for more prompts")
        return {part: Dataset.from_list(rows) for part, rows in out.items()}

    @cached_property
    def texts(self) -> TextStore:
        """Features of all candidates."""
        table = self.candidates
        pairs = zip(table["prompt"], table["response"], strict=True)
        return text_store(self.base, (Text(prompt, response, False) for prompt, response in pairs))

    @cached_property
    def pairs(self) -> dict[str, PairFeatures]:
        """The preference sets with their features, and what the gate reads of their prompts."""
        out = {part: pair_features(self.base, rows, self.texts) for part, rows in self.preferences.items()}
        return {
            part: PairFeatures(data.rows, data.texts, data.pairs, self.states[torch.tensor(data.rows["prompt_id"])])
            for part, data in out.items()
        }

    @cached_property
    def states(self) -> Tensor:
        """(prompts, 2 hidden): what the gate reads of each of the prompts."""
        return self._read(self.prompts)

    def _read(self, prompts: pd.DataFrame) -> Tensor:
        read = [self.gate_prompt(prompt) + self.suffix for prompt in prompts["prompt"]]
        return encode_prompts(self.base, read, self.config.layer)

    # -------------------------------------------------------------------------------------------------------- fits

    def methods(self) -> dict[str, tuple[int, int]]:
        """Experts and rank of each method; `dpo_rank_2r` has all experts' parameters in one policy."""
        k, r = self.config.n_experts, self.config.rank
        return {"dpo": (1, r), f"dpo_rank_{k}r": (1, k * r), "mix_dpo": (k, r), "moe_dpo": (k, r), "oracle": (k, r)}

    def _gate(self, method: str, n_experts: int) -> Gate:
        if method == "moe_dpo":
            states = self.pairs["train"].context
            assert states is not None
            return ContextGate.from_states(
                states, n_experts, pooling=self.config.pooling, weight_scale=self.config.weight_scale,
                suffix=self.suffix, layer=self.config.layer,
            )  # fmt: skip
        if method != "oracle":
            return LearnedWeights(n_experts) if n_experts > 1 else FixedWeights.uniform(1)
        return given_gate("domain", DOMAINS, n_experts)

    def fitted(self, method: str, seed: int) -> DomainFit:
        """Fit a method on the training pairs, or read the fit from the cache.

        `oracle` is the mixture whose gate is given the domain; no other method reads it.
        """
        if (method, seed) in self._fitted:
            return self._fitted[method, seed]
        known = self.methods()
        if method not in known:
            raise ValueError(f"method={method!r}: possible are {list(known)}")
        (k, rank), config = known[method], self.config
        options: dict[str, Any] = {**asdict(config.fit), "seed": seed}
        if method != "moe_dpo":  # gates that cannot say anything of a prompt without pairs
            options["latent"] = "pair"
            options["symmetry_breaking"] = "none" if method == "oracle" else "random_responsibilities"
        chosen = FitConfig(**options)
        experts = HeadExperts(self.base, k, rank, min_count=config.min_count)
        policy = MixturePolicy(experts, self._gate(method, k), config.beta)
        digest = hashlib.sha256()
        for part in ("train", "validation"):
            digest.update(repr(self.preferences[part].to_dict()).encode())
        parameters = {
            "method": method, "experts": (k, rank), "beta": config.beta, "fit": asdict(chosen),
            "min_count": config.min_count,
            "gate": [policy.gate.options(), config.gate_tokens if method == "moe_dpo" else config.prompt_tokens],
            "pairs": digest.hexdigest(),
        }  # fmt: skip
        train = self.pairs["train"]
        result, rewards = kept_fit(
            policy, train, self.pairs["validation"], chosen, self.texts.features, parameters
        )
        log_q = log_responsibilities(policy.loglik(train, rewards), policy.log_w(train).detach())
        order = align(log_q.exp().numpy(), train.rows["domain"], DOMAINS) if k > 1 else [0] * len(DOMAINS)
        self._fitted[method, seed] = DomainFit(policy, result, method, seed, rewards, order)
        return self._fitted[method, seed]

    def fits(self, methods: Sequence[str], seeds: Sequence[int]) -> list[DomainFit]:
        """Every method with every seed."""
        return [self.fitted(method, seed) for method in methods for seed in seeds]

    # -------------------------------------------------------------------------------------------------- evaluation

    def accuracy_by_prompt(self, fits: Sequence[DomainFit], last: bool = False) -> pd.DataFrame:
        """Test accuracy by domain (`group`) and prompt: sum_k w_k(x) sigma(D_k) > 0.5 by each policy's own gate.

        `moe_dpo_top_1` : the same fit, where each prompt is answered by the expert of largest weight alone.

        Parameters
        ----------
        last : after the last step instead of the best one on validation; methods are then called `..._last_step`.
        """
        test, parts = self.pairs["test"], []
        one = {domain: torch.zeros(1, 1) for domain in DOMAINS}
        for f in fits:
            steps = f.result.snapshots
            f.policy.load_state_dict(steps[max(steps) if last else f.result.best_step], strict=False)
            loglik, log_w = f.policy.loglik(test, None if last else f.rewards), f.policy.log_w(test).detach()
            f.policy.load_state_dict(steps[f.result.best_step], strict=False)
            weights = {f"{f.method}_last_step" if last else f.method: log_w}
            if f.method == "moe_dpo" and not last:
                weights["moe_dpo_top_1"] = top_s(log_w, 1)
            for name, own in weights.items():
                table = prompt_accuracy(f.policy, test, one, (loglik + own.log_softmax(-1)).logsumexp(1, keepdim=True))
                parts.append(table.assign(method=name, seed=f.seed))
        return pd.concat(parts, ignore_index=True)

    def history(self, fits: Sequence[DomainFit]) -> pd.DataFrame:
        """Every evaluation of every fit, one row each."""
        return pd.concat([f.result.history.assign(method=f.method, seed=f.seed) for f in fits], ignore_index=True)

    def routing(self, fits: Sequence[DomainFit], less_known: bool = False) -> pd.DataFrame:
        """The gate on held-out prompts: one row a fit and prompt with `film`, the weight of the films' expert.

        `less_known` : on those of works that were left out because the base hardly knows them, instead.

        `supervised` is a logistic regression that was told the training prompts' domains and reads the same state: an
        upper line. Its penalty is that of the gate's prior, each training prompt counted with all of its answers.
        """
        if less_known:
            table, states = self.less_known, self._read(self.less_known)
        else:
            test = (self.prompts["part"] == "test").to_numpy()
            table, states = self.prompts[test], self.states[torch.tensor(test)]
        held_out = table[["item", "domain", "prompt"]]
        parts = []
        for f in fits:
            with torch.no_grad():
                weights = f.policy.gate({"context": states}).exp()
            film, book = (weights[:, k] for k in f.order[:2])
            parts.append(held_out.assign(method=f.method, seed=f.seed, film=(film / (film + book)).numpy()))
        parts.append(held_out.assign(method="supervised", seed=0, film=self._supervised(states)))
        return pd.concat(parts, ignore_index=True)

    def _supervised(self, states: Tensor) -> np.ndarray:
        training = (self.prompts["part"] == "train").to_numpy()
        train, own = self.prompts[training], self.states[torch.tensor(training)]
        mean, scale = standardise(own)
        half = own.shape[1] // 2
        part = {"mean": slice(0, half), "last": slice(half, None), "both": slice(None)}[self.config.pooling]
        answers = len(self.preferences["train"]) / len(train)
        model = LogisticRegression(C=answers * self.config.weight_scale**2, max_iter=5000)
        model.fit(((own - mean) / scale)[:, part].numpy(), train["domain"] == "film")
        return model.predict_proba(((states - mean) / scale)[:, part].numpy())[:, 1]
