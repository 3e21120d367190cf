"""Does growth find the study's three groups of users, and in what share of the time of a grid of K?

    .venv/bin/python benchmarks/growing_study.py [--seeds 0] [--most 8] [--passes 5] [--kinds]

The default design of review users; validation pairs decide every proposal, and choose among K = 1 ... 8 by the rule of one
standard error.  Seconds of fitting alone, on this machine.  Some eight minutes a seed; with --kinds a few seconds, for what
linear rewards alone find of all three groups, of each two and of each.
"""

from __future__ import annotations

import argparse
import time
from itertools import combinations

import pandas as pd

import mixdpo_lib as mx
from mixdpo_lib.choosing import served_weights
from mixdpo_lib.evaluation import choose_n_experts, recovery
from mixdpo_lib.learning.deciding import Growth
from mixdpo_lib.learning.sketching import sketch
from mixdpo_lib.learning.teaching import Sets
from mixdpo_lib.study import ReviewUsers
from mixdpo_lib.study.fits import group_of
from mixdpo_lib.study.review_users import review_users_config


def kinds(study: ReviewUsers, seed: int) -> None:
    """How many kinds linear rewards find of all groups, of each two and of each alone."""
    sets = study.pairs("default", seed)
    policy = study.new_policy("dpo", sets["train"])
    train, held = (policy.prepare(sets[name]) for name in ("train", "validation"))
    of, groups = group_of(train, "user"), study.groups
    for n in range(len(groups), 0, -1):
        for some in combinations(groups, n):
            parts = [one.where([of[u] in some for u in one.rows["user"]]) for one in (train, held)]
            found, rows = sketch(policy.base, Sets.of(*parts, "user"), Growth(), seed)
            told = ", ".join(f"{row[1]} {row[4]:+.2f} ± {row[5]:.2f}" for row in rows)
            print(
                f"seed {seed}: of {n} groups {found} kinds ({', '.join(some)}): {told}", flush=True
            )


def main() -> None:
    """The decisions, the grid, and both times."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--most", type=int, default=8)
    parser.add_argument("--passes", type=float, default=5.0)
    parser.add_argument("--kinds", action="store_true")
    options = parser.parse_args()
    config = review_users_config(["default"], more_test_prompts=150, passes=options.passes)
    study = ReviewUsers(config)
    for seed in options.seeds:
        if options.kinds:
            kinds(study, seed)
            continue
        sets = study.pairs("default", seed)
        train, held = sets["train"], sets["validation"]
        of = group_of(train, "user")

        def nmi(policy: mx.MixturePolicy, train=train, of=of) -> float:
            log_q, users = policy.log_posterior(train, "user")
            return float(
                recovery(pd.DataFrame(log_q.exp().numpy()), [of[user] for user in users])["nmi"]
            )

        def by_user(policy: mx.MixturePolicy, train=train, held=held) -> pd.Series:
            log_w, _ = served_weights(policy, train, held)
            loglik = (policy.loglik(held) + log_w).logsumexp(1)
            return pd.Series(loglik.numpy()).groupby(list(held.rows["user"])).mean()

        policy = study.new_policy("dpo", train)
        policy = mx.MixturePolicy(policy.experts, mx.LearnedWeights(1), config.beta, config.lapse)
        began = time.perf_counter()
        grown = mx.grow(policy, train, study.fit_config("mix_dpo", seed), validation=held)
        spent = time.perf_counter() - began
        print(grown.table.round(3).to_string())
        print(
            f"seed {seed}: grown K = {grown.n_experts}, NMI {nmi(policy):.2f}, {spent:.0f} s, "
            f"{by_user(policy).mean():.4f} nats a validation pair",
            flush=True,
        )

        columns, seconds = {}, 0.0
        for k in range(1, options.most + 1):
            variant = study.variant(n_experts=k)
            one = variant.new_policy("mix_dpo", train)
            began = time.perf_counter()
            mx.fit(one, train, variant.fit_config("mix_dpo", seed), validation=held)
            seconds += time.perf_counter() - began
            columns[k] = by_user(one)
            print(
                f"  K = {k}: {columns[k].mean():.4f}, NMI {nmi(one):.2f}, {seconds:.0f} s so far",
                flush=True,
            )
        chosen = choose_n_experts(pd.DataFrame(columns))
        print(
            f"seed {seed}: the grid chooses K = {chosen} after {seconds:.0f} s; growth took {spent / seconds:.2f} of it"
        )


if __name__ == "__main__":
    main()
