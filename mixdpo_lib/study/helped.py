"""Does a mixture help these people, by how much, whom, how many experts, and what are they?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from ..base.model import Base
from ..choosing import Report, report
from ..data.pairs import Pairs
from ..evaluation import choose_n_experts
from ..experts.heads import HeadExperts
from ..experts.tables import TabularExperts
from ..gates.weights import LearnedWeights
from ..learning.config import FitConfig
from ..learning.exact import fit_table
from ..policy.mixture import MixturePolicy
from .fits import kept_fit


@dataclass(frozen=True)
class Helped:
    """One policy and mixtures of the same people.

    policies : by K, fitted on training pairs. reports : by K > 1, see `report`, on test pairs. held_out : a row a person, a
    column a K: log-likelihood of validation pairs, nats per pair. chosen : K by `choose_n_experts` on these.
    """

    policies: Mapping[int, MixturePolicy]
    reports: Mapping[int, Report]
    held_out: pd.DataFrame
    chosen: int

    def table(self) -> pd.DataFrame:
        """A row a K: accuracy (share of test pairs, mean over people) and loglik (nats per test pair) first.

        gain : loglik minus that of one policy, between low and high at 99 % each; pays : whether low is above 0.
        people_gaining : share of people whose test pairs the mixture predicts better. used : exp of the entropy of mean
        responsibilities; certainty : see `Report`. Neither of the two is evidence of groups.
        """
        first = next(iter(self.reports.values())).totals.loc["one policy"]
        rows: list[dict[str, Any]] = [
            {"K": 1, "accuracy": first["accuracy"], "loglik": first["loglik"]}
        ]
        for k, said in self.reports.items():
            mean, usage = said.totals.loc["mixture"], said.experts["usage"].to_numpy()
            row = {"K": k, "accuracy": mean["accuracy"], "loglik": mean["loglik"]}
            row |= {"gain": mean["loglik"] - first["loglik"]}
            row |= dict(zip(("low", "high"), said.bounds, strict=True)) | {"pays": said.pays}
            row |= {"people_gaining": float((said.units["difference"] > 0).mean())}
            used = float(np.exp(-(usage * np.log(np.maximum(usage, 1e-12))).sum()))
            rows.append(row | {"used": used, "certainty": said.certainty})
        people = len(next(iter(self.reports.values())).units)
        return pd.DataFrame(rows).assign(
            chosen=lambda table: table["K"] == self.chosen, people=people
        )

    def people(self) -> pd.DataFrame:
        """A row a person and K > 1: the gain on the own test pairs (nats per pair), who serves, numbers of pairs."""
        columns = ["n_train", "n_test", "served_by", "accuracy", "single_accuracy"]
        parts = [
            said.units[[*columns, "difference"]]
            .rename(columns={"difference": "gain"})
            .assign(K=k)
            .reset_index()
            for k, said in self.reports.items()
        ]
        return pd.concat(parts, ignore_index=True)


def helped(
    make: Callable[[int], MixturePolicy],
    learn: Callable[[MixturePolicy], Any],
    parts: Mapping[str, Pairs],
    ks: Sequence[int],
) -> Helped:
    """Fit every K alike, choose K on validation pairs, and compare with one policy on test pairs.

    make : an unfitted policy of K experts. learn : fits it in place. parts : train, validation, test. ks : 1 and others.

    Raises
    ------
    ValueError : ks without 1, or without a mixture.
    """
    if 1 not in ks or len(set(ks)) < 2:
        raise ValueError(f"ks={list(ks)}: expected 1, one policy, and at least one mixture")
    policies = {k: make(k) for k in sorted(set(ks))}
    for policy in policies.values():
        learn(policy)
    one, reports = policies[1], {}
    held_out: dict[int, pd.Series] = {}
    for k, policy in policies.items():
        if k > 1:
            reports[k] = report(policy, parts["train"], parts["test"], single=one)
            units = report(policy, parts["train"], parts["validation"], single=one).units
            held_out |= {1: units["single_loglik"], k: units["loglik"]}
    likely = pd.DataFrame(held_out)
    return Helped(policies, reports, likely, choose_n_experts(likely))


def by_reading(
    base: Base,
    parts: Mapping[str, Pairs],
    ks: Sequence[int],
    passes: float,
    seed: int = 0,
    min_count: int = 2,
) -> Helped:
    """Experts that read: heads of rank 8 on `base`, the step of the best validation likelihood, for every K alike.

    The lapse rate is learned: else one text on which people slip, and which a head takes for very bad, decides the likelihood.

    passes : over the training pairs, by SGD with a rate of .01. min_count : see `HeadExperts`. Fits are kept in the cache.
    """
    config = FitConfig(
        batch_by="pair",  # films share one prompt
        optimizer="sgd",
        learning_rate=0.01,
        passes=passes,
        min_steps=0,
        seed=seed,
    )

    def learn(policy: MixturePolicy) -> None:
        kept_fit(policy, parts["train"], parts["validation"], config, parts["train"].texts)

    def make(k: int) -> MixturePolicy:
        experts = HeadExperts(base, k, min_count=min_count)
        return MixturePolicy(experts, LearnedWeights(k), lapse="learn")

    return helped(make, learn, parts, ks)


def by_name(
    parts: Mapping[str, Pairs], ks: Sequence[int], restarts: int = 5, seed: int = 0
) -> Helped:
    """Tables of items that have names alone, by full-batch EM; rewards have the prior N(0, 2^2)."""

    def learn(policy: MixturePolicy) -> None:
        fit_table(policy, parts["train"], restarts=restarts, seed=seed)

    def make(k: int) -> MixturePolicy:
        return MixturePolicy(TabularExperts.of(None, parts["train"], k), LearnedWeights(k))

    return helped(make, learn, parts, ks)


@torch.no_grad()
def leanings(policy: MixturePolicy, pairs: Pairs, traits: pd.DataFrame) -> pd.DataFrame:
    """What experts lean to: rank correlation (Spearman) of each expert's reward of an answer with traits of the answer.

    traits : a row a text of `pairs.texts`, in their order; a column a trait, numbers. One that does not vary is left out.

    Returns
    -------
    A row a trait, a column an expert, in [-1, 1].
    """
    rewards = pd.DataFrame(policy.text_rewards(pairs.texts).double().numpy()).rank()
    ranks = traits.loc[:, traits.std() > 0].rank()
    found = {k: ranks.corrwith(own) for k, own in rewards.items()}
    return pd.DataFrame(found).rename_axis("trait")


def traits_of_writing(pairs: Pairs) -> pd.DataFrame:
    """How an argument is written: words, letters a word, shares of capital letters and of exclamation marks."""
    texts = pd.Series([text.response.strip() for text in pairs.texts.texts])
    words = texts.str.split().str.len()
    letters = texts.str.count(r"[A-Za-z]")
    return pd.DataFrame(
        {
            "words": words,
            "letters a word": letters / words,
            "capital letters": texts.str.count(r"[A-Z]") / letters.clip(lower=1),
            "exclamation marks": texts.str.count("!") / texts.str.len(),
        }
    )


def traits_of_films(pairs: Pairs) -> pd.DataFrame:
    """Year and genres of films as `film_tastes` writes them."""
    texts = pd.Series([text.response for text in pairs.texts.texts])
    found = texts.str.extract(r"\((?P<year>\d{4})\)\.(?P<genres>[^(]*)$")
    year = found["year"].astype(float)
    genres = (
        found["genres"]
        .fillna("")
        .str.strip(" .")
        .str.get_dummies(", ")
        .drop(columns="", errors="ignore")
    )
    return pd.concat([year.fillna(year.mean()), genres], axis=1)
