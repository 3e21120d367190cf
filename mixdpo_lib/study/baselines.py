"""What do other methods of the field reach? The same users, head, lapses, beta and passes as DPO and Mix-DPO."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor

from ..data.pairs import Pairs
from ..elbo import correct
from ..experts.contract import Experts
from ..experts.copies import gathered
from ..experts.group_heads import GroupHeads
from ..experts.heads import HeadExperts
from ..gates.weights import FixedWeights
from ..learning.config import FitConfig
from ..learning.result import FitResult
from ..learning.starts import RANDOM_HEADS_SCALE
from ..policy.mixture import MixturePolicy
from .baseline_parts import GroupRobust, HardAssignment, simplex, soup
from .fits import Fitted, kept_rewards
from .review_users import Method, ReviewUsers
from .told_in_prompt import ToldInPrompt

# Basis heads and nodes of the grid: .39 standard deviations apart in one dimension, 1.7 in two
GRIDS = {"translations": (2, 32), "translations_2": (3, 64)}


class Described(NamedTuple):
    """A method, what it is told besides who answered, and where it comes from. profile : the smallest that affords it."""

    what: str
    source: str
    knows_groups: bool = False
    reads_metadata: bool = False
    profile: str = "default"


METHODS = {
    "dpo": Described("one policy for all", "Rafailov et al. 2023, arXiv 2305.18290"),
    "dpo_metadata": Described(
        "one policy that reads a sentence of the user's genre and age before the prompt",
        "common; the sentence is ours",
        reads_metadata=True,
        profile="full",
    ),
    "uniform": Described("K DPO policies of other starts and orders, equal weights", "an ensemble"),
    "hard_clusters": Described(
        "users are assigned to one of K policies each, a DPO of its users",
        "Chidambaram et al. 2024, arXiv 2405.15065; one-hot assignments are ours",
    ),
    "translations": Described(
        "a Gaussian number a user, by which a personal head adds to a common one",
        "Poddar et al. 2024 (VPL), arXiv 2408.10075; on a grid instead of by an encoder is ours",
    ),
    "translations_2": Described(
        "the same with two numbers and two personal heads", "the same", profile="full"
    ),
    "mix_dpo": Described("a mixture with one latent expert a user", "arXiv 2510.08256"),
    "moe_dpo": Described(
        "the same with a gate of genre and age", "arXiv 2510.08256", reads_metadata=True
    ),
    "robust": Described(
        "one policy for the worst group", "Ramesh et al. 2024, arXiv 2405.20304", knows_groups=True
    ),
    "soup_equal": Described(
        "mean of the heads of each group's DPO",
        "Rame et al. 2023, arXiv 2306.04488",
        knows_groups=True,
    ),
    "soup": Described(
        "averages of those heads with weights from a grid, chosen by a user's own pairs",
        "Rame et al. 2023, arXiv 2306.04488; the choice by pairs is ours",
        knows_groups=True,
    ),
    "oracle": Described("a DPO of each group", "the upper end", knows_groups=True),
}


def method_table() -> pd.DataFrame:
    """A row a method: what it is, its source, knows_groups (told each user's hidden group), reads_metadata, profile."""
    return pd.DataFrame(METHODS.values(), index=pd.Index(METHODS, name="method"))


class Baselines(ReviewUsers):
    """The study of review users with the methods of the field beside its own; `METHODS` says what each is.

    uniform : `n_experts` fits of "dpo" ("dpo_0", "dpo_1", ...), each with small random B and an order of its own, side by
        side. Every user is served with equal weights.
    hard_clusters : Mix-DPO from the same start with `HardAssignment` and equal weights.
    translations, translations_2 : `GroupHeads` with r_u = r_0 + sum_i a_ui r_i, a_u standard Gaussian, on `GRIDS`.
    robust : `GroupRobust`, told the groups of the training pairs.
    soup, soup_equal : `soup` of the experts of "oracle", which are a DPO each, fitted side by side; weights are all
        multiples of 1 / G. A corner of the simplex is that group's DPO.
    dpo_metadata : the DPO of `ToldInPrompt`, at nine times the cost.
    """

    @property
    def methods(self) -> dict[str, Method]:
        """Those of `ReviewUsers`, and the others of `METHODS` with the parts of "uniform"."""
        rank, k, n = self.config.rank, self.config.n_experts, len(self.groups)
        one, mixture = Method(1, rank, "unit"), Method(k, rank, "unit")
        return {
            **super().methods,
            **dict.fromkeys(("dpo_metadata", "robust", *map("dpo_{}".format, range(k))), one),
            **dict.fromkeys(("uniform", "hard_clusters"), mixture),
            **{name: Method(n_nodes, rank, "unit") for name, (_, n_nodes) in GRIDS.items()},
            "soup_equal": Method(1, n * rank, "unit"),
            "soup": Method(len(simplex(n, n)), n * rank, "unit"),
        }

    def new_policy(self, method: str, train: Pairs) -> MixturePolicy:
        """An untrained policy of a method that is fitted."""
        if method in GRIDS:
            n_basis, n_nodes = GRIDS[method]
            grid = GroupHeads(self.base, n_nodes, "translations", n_basis, **self.heads)
            return self._with_weights(grid, grid.nodes.log_prior.float())
        policy = super().new_policy(method, train)
        if (part := _part(method)) is not None:
            policy.experts.perturb(RANDOM_HEADS_SCALE, torch.Generator().manual_seed(part))
        return self._with_weights(policy.experts) if method == "hard_clusters" else policy

    def _with_weights(self, experts: Experts, log_w: Tensor | None = None) -> MixturePolicy:
        """Experts with given weights, or equal ones."""
        k = experts.n_experts
        gate = FixedWeights.uniform(k) if log_w is None else FixedWeights(log_w=log_w)
        return MixturePolicy(experts, gate, self.config.beta, self.config.lapse)

    def fit_config(self, method: str, seed: int) -> FitConfig:
        """The study's, with what the method does otherwise."""
        config = super().fit_config(method, seed)
        if (part := _part(method)) is not None:
            return config.change(seed=seed + 1000 * part)
        if method == "hard_clusters":
            return config.change(inference=HardAssignment())
        if method == "robust":
            return config.change(unit=self.group_column, inference=GroupRobust())
        return config

    def learned(
        self, method: str, seed: int, design: str
    ) -> tuple[MixturePolicy, FitResult, Tensor]:
        """See `Study.learned`; what is put together of other fits has the history of the first of them."""
        if method == "uniform":
            parts = [self.fitted(f"dpo_{k}", seed, design) for k in range(self.config.n_experts)]
            alone = [(f.policy.experts, 0) for f in parts]
            policy = self._with_weights(gathered(alone[0][0], alone))
            return policy, parts[0].result, torch.cat([f.rewards for f in parts], 1)
        if method in ("soup", "soup_equal"):
            oracle, n = self.fitted("oracle", seed, design), len(self.groups)
            weights = simplex(n, n) if method == "soup" else torch.full((1, n), 1 / n)
            heads: HeadExperts = oracle.policy.experts  # type: ignore[assignment]
            policy = self._with_weights(soup(heads, weights))
            return policy, oracle.result, kept_rewards(policy, self.texts)
        return super().learned(method, seed, design)

    def fitted(self, method: str, seed: int, design: str = "") -> Fitted:
        """See `Study.fitted`; "uniform" serves everybody with equal weights, whatever the own pairs say."""
        if method == "dpo_metadata":
            return replace(self.told.fitted("dpo", seed, design), method=method)
        found = super().fitted(method, seed, design)
        if method != "uniform":
            return found
        equal = torch.full_like(found.log_q, -math.log(found.policy.n_experts))
        return replace(found, log_q=equal, order=[-1] * len(self.groups))

    @cached_property
    def told(self) -> ToldInPrompt:
        """The same study with what is known of a user in the prompt."""
        other = ToldInPrompt(self.config)
        for name in ("base", "prompts", "candidates", "scores"):
            setattr(other, name, getattr(self, name))
        return other

    # ------------------------------------------------------------------------------------------------- evaluation

    def _accuracy(self, fitted: Fitted) -> pd.DataFrame:
        if fitted.method == "dpo_metadata":
            return self.told.accuracy_by_prompt([fitted])
        return super()._accuracy(fitted)

    def _by_user(self, fitted: Fitted) -> pd.DataFrame:
        if fitted.method == "dpo_metadata":
            return self.told.accuracy_by_user([fitted])
        return super()._by_user(fitted)

    def _routings(
        self, fitted: Fitted, log_q: Tensor, prior: Tensor, own: dict[str, Tensor]
    ) -> dict[str, dict[str, Tensor]]:
        found = super()._routings(fitted, log_q, prior, own)
        return {"none": found["prior"]} if fitted.method == "uniform" else found

    def validation_accuracy(self, fits: Sequence[Fitted]) -> pd.DataFrame:
        """Share of the users' own validation pairs that are predicted, each user by the own training pairs.

        sum_k q_uk sigma(D_nk) above one half, on labels that have the design's noise. Rows: a fit and group (mean over
        the group's pairs), and "mean" and "worst" of the groups; `knows_groups` as in `method_table`.
        """
        parts = []
        for f in fits:
            study = self.told if f.method == "dpo_metadata" else self
            data = study.pairs(f.design, f.seed)["validation"]
            place = {user: i for i, user in enumerate(f.units)}
            log_q = f.log_q[torch.tensor([place[user] for user in data.rows["user"]])]
            hits = correct((f.policy.loglik(data, f.rewards) + log_q).logsumexp(1).exp())
            by_group = pd.Series(hits.double().numpy()).groupby(list(data.rows["group"])).mean()
            values = {**by_group, "mean": by_group.mean(), "worst": by_group.min()}
            table = pd.DataFrame({"group": list(values), "accuracy": list(values.values())})
            told = METHODS[f.method].knows_groups if f.method in METHODS else False
            parts.append(f.named(table.assign(knows_groups=told)))
        return pd.concat(parts, ignore_index=True)


def _part(method: str) -> int | None:
    """The number of a part of "uniform"; None of other methods."""
    name, _, number = method.partition("_")
    return int(number) if name == "dpo" and number.isdigit() else None
