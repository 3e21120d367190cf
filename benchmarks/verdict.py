"""How often does `report` say that a mixture pays, where it does and where it does not? 100 data sets of each kind.

    .venv/bin/python benchmarks/verdict.py [--seeds 100] [--first 0] [--groups 1 3] [--users 20 40 60] [--out FILE.csv]

Users of one group, for whom no mixture pays, and of three, for whom one does (the tastes of
notebooks/theory/4_who_answered): 20 answers, rewards of standard deviation 2, a group drawn for each user, as many pairs
to learn from as to judge by.  Tables of rewards, K = 3 beside one policy, by full-batch EM.  Some ten minutes on one core;
with `--out` it can be stopped and goes on.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import pandas as pd
import torch

import mixdpo_lib as mx
from mixdpo_lib.experts.tables import numbered_answers, numbered_pairs
from mixdpo_lib.learning.full_batch import full_batch_em

N_ANSWERS, K = 20, 3


def fitted(n_experts: int, pairs: torch.Tensor, unit: torch.Tensor, seed: int) -> mx.MixturePolicy:
    """Exact experts: the likeliest of three starts."""
    experts = mx.TabularExperts(N_ANSWERS, n_experts, answers=numbered_answers(N_ANSWERS), beta=1.0)
    gate = mx.LearnedWeights(n_experts)
    options = {"restarts": 3 if n_experts > 1 else 1, "start_temperature": 4.0, "seed": seed}
    full_batch_em(experts, gate, pairs, unit, max_iter=200, tolerance=1e-6, **options)
    return mx.MixturePolicy(experts, gate, beta=1.0)


def one(n_groups: int, n_users: int, n_pairs: int, seed: int) -> dict[str, float]:
    """One data set, and what the report says of it."""
    truth = mx.TabularExperts(N_ANSWERS, n_groups)
    truth.perturb(2.0, torch.Generator().manual_seed(seed))
    draw = torch.Generator().manual_seed(seed + 100)
    belongs = torch.randint(n_groups, (n_users,), generator=draw)
    pairs, unit = truth.sample_pairs(belongs, 2 * n_pairs, draw.manual_seed(seed + 200))
    seen = torch.arange(len(pairs)) % (2 * n_pairs) < n_pairs
    train, test = (
        numbered_pairs(pairs[part], N_ANSWERS, user=unit[part].tolist()) for part in (seen, ~seen)
    )
    single, mixture = (fitted(k, pairs[seen], unit[seen], seed) for k in (1, K))
    found = mx.report(mixture, train, test, single=single)
    gain, (low, _) = float(found.units["difference"].mean()), found.bounds
    low_95 = float(found.totals.loc["difference", "loglik_low"])
    named = {"groups": n_groups, "users": n_users, "pairs": n_pairs, "seed": seed}
    return {**named, "gain": gain, "low": low, "low_95": low_95, "pays": found.pays}


def main() -> None:
    """How often a mixture is said to pay, by the report and by the 95 % bootstrap interval."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--users", type=int, nargs="+", default=[20, 40, 60])
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--out", type=Path, help="CSV; what it has already is not made again")
    options = parser.parse_args()
    done = pd.read_csv(options.out) if options.out and options.out.exists() else pd.DataFrame()
    for n_groups, n_users in itertools.product(options.groups, options.users):
        at = {"groups": n_groups, "users": n_users, "pairs": options.pairs}
        for seed in range(options.first, options.first + options.seeds):
            if not done.empty and (done[[*at, "seed"]] == [*at.values(), seed]).all(axis=1).any():
                continue
            row = pd.DataFrame([one(n_groups, n_users, options.pairs, seed)])
            done = pd.concat([done, row], ignore_index=True)
            if options.out:
                row.to_csv(options.out, mode="a", header=len(done) == 1, index=False)
        part = done[(done[[*at]] == [*at.values()]).all(axis=1)]
        print(
            f"{n_groups} group(s), {n_users} users, {options.pairs} pairs: pays in {part['pays'].sum()} of "
            f"{len(part)} (95 % interval: {(part['low_95'] > 0).sum()}), mean gain {part['gain'].mean():+.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
