"""Which arrows make up the study of review users?

reviews -> prompts -> candidates -> scores -> pairs -> fits -> accuracy, responsibilities, texts. Each arrow is a method
of `ReviewUsers` whose result is kept in the cache, so that each notebook opens on its own and none computes what another
has computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import pandas as pd
import torch
from datasets import DatasetDict
from torch import Tensor

from ..data.pairs import Pairs
from ..elbo import correct, sum_over_units
from ..evaluation import prompt_accuracy, recovery
from ..experts.heads import HeadExperts
from ..gates.contract import Gate
from ..gates.user import UserGate, given_gate
from ..gates.weights import LearnedWeights
from ..learning.config import FitConfig, Stop
from ..learning.starts import Start
from ..policy.mixture import MixturePolicy
from .candidates import CandidateConfig, review_prompts, sample_candidates, split_prompts, usable
from .fits import Fitted, Study, choose, group_of, unit_log_w
from .judges.contract import REWARDS, JudgeConfig, split_reviews
from .reviews import load_reviews
from .simulated_people import DesignConfig, simulate_preferences

METADATA = ("genre", "age_band")  # what is known of a user
# Optimiser, rate, passes and start: chosen on validation pairs of both designs (docs/log.md has what was tried).
STUDY_FIT = FitConfig(
    batch_by="prompt",
    batch_size=16,
    optimizer="sgd",
    learning_rate=0.015,
    passes=5.0,
    min_steps=0,
    start=Start("linear", passes=0.5, temperature=1.0),
    stop=Stop(best="last"),
    evaluations_per_pass=1,
    evaluate_training=False,
)
AT_RANDOM: dict[str, Any] = {  # where a latent has one pair: tempered long, after an expert died
    "start__kind": "random_responsibilities",
    "start__temperature": 100.0,
    "start__tempering_passes": 2.0,
}


@dataclass(frozen=True)
class Method:
    """A way to learn from mixed preferences: K experts of a rank, with one latent a user or a comparison.

    gate : "learned" weights that read nothing; "metadata", a gate of the users' metadata; "given", the hidden group.
    plain : heads without sharpness and no lapses, whatever the study's policies have.
    """

    n_experts: int
    rank: int
    latent: str
    gate: str = "learned"
    plain: bool = False


def study_methods(n_experts: int, rank: int, n_groups: int = len(REWARDS)) -> dict[str, Method]:
    """The methods that are compared.

    `dpo` has the head of an expert, sharpness included, and its lapses; `dpo_plain` has neither; `dpo_rank_3r` is the
    control with the parameters of all experts in one policy; `oracle` is told each user's hidden group: one DPO a
    group, fitted side by side.
    """
    return {
        "dpo": Method(1, rank, "unit"),
        "dpo_plain": Method(1, rank, "unit", plain=True),
        "dpo_rank_3r": Method(1, rank * n_experts, "unit"),
        "mix_dpo": Method(n_experts, rank, "unit"),
        "mix_dpo_pair": Method(n_experts, rank, "pair"),
        "moe_dpo": Method(n_experts, rank, "unit", "metadata"),
        "oracle": Method(n_groups, rank, "unit", "given"),
    }


@dataclass(frozen=True)
class ReviewUsersConfig:
    """Every choice of the study. Profiles set these through the notebooks' parameters."""

    designs: Sequence[str] = ("default", "clean")
    base: str = "smollm2-135m"
    reviews: str = "imdb-packaged"
    rewards: tuple[str, ...] = REWARDS  # of which each group of users follows one
    candidates: CandidateConfig = field(default_factory=CandidateConfig)
    judges: JudgeConfig = field(default_factory=JudgeConfig)
    design: DesignConfig = field(default_factory=DesignConfig)  # of every design, but for its name
    n_experts: int = 3
    rank: int = 8
    min_count: int = 2  # occurrences of an active token in the training responses
    beta: float = 0.15
    sharpness: bool = True  # each head has an s of its own, see `HeadExperts`
    weight_decay: float = 0.2  # of B_k, see `HeadExperts`
    lapse: float | str = 0.1  # rate of answers at random, or "learn", see `MixturePolicy`
    fit: FitConfig = STUDY_FIT

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "designs", tuple(self.designs)
        )  # notebooks and profiles have lists


def review_users_config(
    designs: Sequence[str] = ("default", "clean"), **values: Any
) -> ReviewUsersConfig:
    """A `ReviewUsersConfig` from flat values, each named as the field it sets (`n_prompts`, `flip_rate`, `passes`, ...).

    >>> review_users_config(["clean"], pairs_per_user=20, learning_rate=0.01).fit.learning_rate
    0.01
    """
    return choose(ReviewUsersConfig(), {"designs": designs, **values})


class ReviewUsers(Study):
    """Users of hidden groups who answer comparisons of continued movie reviews."""

    unit, group_column = "user", "group"

    default = ReviewUsersConfig()
    config: ReviewUsersConfig

    def __init__(self, config: ReviewUsersConfig | None = None) -> None:
        super().__init__(config or self.default)
        self.designs, self.groups = self.config.designs, self.config.rewards
        for name in self.designs:
            self.design(name)

    @classmethod
    def own_parameters(cls, parameters: Mapping[str, Any]) -> Mapping[str, Any]:
        """A notebook that knows one design calls it `design`."""
        one = {"designs": (parameters["design"],)} if "design" in parameters else {}
        return {**parameters, **one}

    @property
    def methods(self) -> dict[str, Method]:
        """See `study_methods`."""
        return study_methods(self.config.n_experts, self.config.rank, len(self.groups))

    @cached_property
    def prompts(self) -> list[str]:
        """First tokens of reviews that no judge was fitted on."""
        reviews = split_reviews(load_reviews(self.config.reviews), config=self.config.judges)[
            "prompts"
        ]
        return review_prompts(self.base, reviews["text"], self.config.candidates)

    @cached_property
    def candidates(self) -> pd.DataFrame:  # type: ignore[override]
        """Continuations of the prompts by the base, without the unusable ones."""
        return usable(sample_candidates(self.base, self.prompts, self.config.candidates))

    @property
    def splits(self) -> dict[str, range]:
        """Which prompts, by number, are train, validation and test."""
        texts = self.config.candidates
        return split_prompts(texts.n_prompts, texts.more_test_prompts)

    def design(self, name: str, seed: int = 0) -> DesignConfig:
        """Who labels what in the design of this name. Each seed has users and labels of its own."""
        return replace(self.config.design, name=name, seed=self.config.design.seed + seed)

    def preferences(self, design: str, seed: int = 0) -> DatasetDict:
        """The preference sets of a design: train, validation, context, test; the last is the same for all seeds."""
        config = self.design(design, seed)
        return simulate_preferences(self.candidates, self.scores, config, self.splits)

    # ------------------------------------------------------------------------------------------------------- fits

    @property
    def heads(self) -> dict[str, Any]:
        """Options of every head of the study."""
        names = ("rank", "min_count", "sharpness", "weight_decay")
        return {name: getattr(self.config, name) for name in names}

    def new_policy(self, method: str, train: Pairs) -> MixturePolicy:
        """An untrained policy of a method; a gate of metadata knows the columns from the training pairs."""
        m = self.methods[method]
        own = {"rank": m.rank, "sharpness": self.config.sharpness and not m.plain}
        experts = HeadExperts(self.base, m.n_experts, **{**self.heads, **own})
        gate: Gate = LearnedWeights(m.n_experts)
        if m.gate == "given":
            gate = given_gate("group", self.groups, m.n_experts)
        elif m.gate == "metadata":
            users = pd.DataFrame({c: train.rows[c] for c in ("user", *METADATA)}).drop_duplicates(
                "user"
            )
            gate = UserGate.from_metadata({c: users[c].tolist() for c in METADATA}, m.n_experts)
        return MixturePolicy(
            experts, gate, self.config.beta, lapse=0.0 if m.plain else self.config.lapse
        )

    def fit_config(self, method: str, seed: int) -> FitConfig:
        """The study's, with the method's latent; given groups part the experts by themselves, single pairs at random."""
        m = self.methods[method]
        config = replace(self.config.fit, seed=seed, latent=m.latent)
        if m.gate == "given":
            return config.change(start__kind="none")
        alone = m.latent == "pair" and config.start.kind == "linear"
        return config.change(**AT_RANDOM) if alone else config

    def variant(self, n_experts: int | None = None, **fit: Any) -> ReviewUsers:
        """The same data with another K or other choices of the fit (see `FitConfig.change`), for ablations."""
        config = replace(
            self.config,
            fit=self.config.fit.change(**fit),
            n_experts=n_experts or self.config.n_experts,
        )
        other = ReviewUsers(config)
        for name in ("base", "prompts", "candidates", "scores", "texts", "_pairs"):
            setattr(other, name, getattr(self, name))
        return other

    # ------------------------------------------------------------------------------------------------- evaluation

    def accuracy_by_prompt(self, fits: Sequence[Fitted]) -> pd.DataFrame:
        """Test accuracy by group and prompt, for every fit, routing, seen and new users (see `prompt_accuracy`)."""
        return pd.concat([self._accuracy(f) for f in fits], ignore_index=True)

    def _accuracy(self, fitted: Fitted) -> pd.DataFrame:
        sets, policy = self.pairs(fitted.design, fitted.seed), fitted.policy
        test_loglik = policy.loglik(sets["test"], fitted.rewards)
        parts = []
        for who, name in (("seen", "train"), ("new", "context")):
            data = sets[name]
            log_q, users = policy.log_posterior(data, "user", fitted.rewards)
            prior, _ = unit_log_w(policy, data)
            of = group_of(data, "user")
            own = {g: torch.tensor([of[u] == g for u in users]) for g in self.groups}
            for routing, weights in self._routings(fitted, log_q, prior, own).items():
                table = prompt_accuracy(policy, sets["test"], weights, test_loglik)
                parts.append(fitted.named(table.assign(routing=routing, users=who)))
        return pd.concat(parts, ignore_index=True)

    def accuracy_by_user(self, fits: Sequence[Fitted]) -> pd.DataFrame:
        """Test accuracy of every training user on every prompt, each served by the own training pairs (q_u).

        Returns
        -------
        design, method, seed, group, user, prompt_id, accuracy (share of the prompt's pairs for the user's group), n_pairs.
        """
        return pd.concat([self._by_user(f) for f in fits], ignore_index=True)

    def _by_user(self, fitted: Fitted) -> pd.DataFrame:
        sets = self.pairs(fitted.design, fitted.seed)
        return fitted.named(_user_accuracy(fitted, sets["test"], group_of(sets["train"], "user")))

    def _routings(
        self, fitted: Fitted, log_q: Tensor, prior: Tensor, own: dict[str, Tensor]
    ) -> dict[str, dict[str, Tensor]]:
        """By routing and group the log_w rows that serve it: none (one policy), prior, own_pairs, oracle (the truth)."""
        by_prior = {g: _distinct(prior[mask]) for g, mask in own.items()}
        if fitted.policy.n_experts == 1:
            return {"none": by_prior}
        nobody = torch.full((1, fitted.policy.n_experts), -torch.inf)
        oracle = {
            g: nobody.index_fill(1, torch.tensor([k]), 0.0) if k >= 0 else by_prior[g]
            for g, k in zip(self.groups, fitted.order, strict=True)
        }
        return {
            "prior": by_prior,
            "own_pairs": {g: log_q[mask] for g, mask in own.items()},
            "oracle": oracle,
        }

    def held_out(self, fits: Sequence[Fitted]) -> pd.DataFrame:
        """Validation pairs of every training user under the user's own posterior q_u: one row a fit and user, nats.

        `loglik`: log sum_k q_uk prod_n sigma(D_nk) over the user's validation pairs; `elbo`, its bound by Jensen:
        sum_k q_uk sum_n log sigma(D_nk). Source: docs/method.md.
        """
        parts = []
        for f in fits:
            data = self.pairs(f.design, f.seed)["validation"]
            ids, users = data.units("user")
            total = sum_over_units(f.policy.loglik(data, f.rewards), ids, len(users))
            log_q = f.log_q[[f.units.index(user) for user in users]]
            table = {
                "user": users,
                "loglik": (log_q + total).logsumexp(1).tolist(),
                "elbo": (log_q.exp() * total).sum(1).tolist(),
            }
            parts.append(f.named(pd.DataFrame(table)))
        return pd.concat(parts, ignore_index=True)

    def responsibilities(self, fits: Sequence[Fitted]) -> pd.DataFrame:
        """Tidy responsibilities of the training users, experts named by the group they serve."""
        parts = []
        for f in fits:
            of = group_of(self.pairs(f.design, f.seed)["train"], "user")
            names = {k: g for g, k in zip(self.groups, f.order, strict=True) if k >= 0}
            wide = pd.DataFrame(f.log_q.exp().numpy(), index=pd.Index(f.units, name="user"))
            long = (
                wide.stack().rename_axis(["user", "expert"]).rename("responsibility").reset_index()
            )
            long.insert(1, "group", long["user"].map(of))
            long.insert(
                3, "expert_serves", [names.get(k, f"unmatched {k}") for k in long["expert"]]
            )
            parts.append(f.named(long))
        return pd.concat(parts, ignore_index=True)

    def recovery(self, fits: Sequence[Fitted]) -> pd.DataFrame:
        """How well the training users' responsibilities recover the hidden groups: NMI, ARI, aligned accuracy."""
        parts = []
        for f in fits:
            of = group_of(self.pairs(f.design, f.seed)["train"], "user")
            found = recovery(pd.DataFrame(f.log_q.exp().numpy()), [of[u] for u in f.units])
            parts.append(f.named(pd.DataFrame([found])))
        return pd.concat(parts, ignore_index=True)


def _distinct(rows: Tensor) -> Tensor:
    """One row where all are the same (weights that read nothing), else all of them."""
    return rows[:1] if bool((rows == rows[0]).all()) else rows


def _user_accuracy(fitted: Fitted, test: Pairs, of: Mapping[Any, str]) -> pd.DataFrame:
    """group, user, prompt_id, accuracy and n_pairs of the units of a fit, on the test pairs of their groups."""
    loglik, parts = fitted.policy.loglik(test, fitted.rewards), []
    asked = pd.DataFrame({c: list(test.rows[c]) for c in ("group", "prompt_id")})
    for group, rows in asked.groupby("group").groups.items():
        mine = [i for i, user in enumerate(fitted.units) if of[user] == group]
        likely = (loglik[list(rows)] + fitted.log_q[mine][:, None]).logsumexp(-1).exp()
        users = pd.Index([fitted.units[i] for i in mine], name="user")
        hits = pd.DataFrame(correct(likely).double().T.numpy(), columns=users)
        by_prompt = hits.groupby(asked.loc[rows, "prompt_id"].to_numpy())
        table = by_prompt.mean().rename_axis("prompt_id").stack().rename("accuracy").reset_index()
        n_pairs = table["prompt_id"].map(by_prompt.size())
        parts.append(table.assign(group=group, n_pairs=n_pairs))
    return pd.concat(parts, ignore_index=True)
