"""Does growth find K? 20 data sets for each K = 2, 3, 5 from one expert; a group that arrives after the fit.

    .venv/bin/python benchmarks/growing.py [--seeds 20] [--first 0] [--ks 2 3 5] [--out FILE.csv]

The data of known_experts.py: 1,000 users, 20 answers, rewards of standard deviation 2, 16 pairs a user; 500 other users
decide. The rule was made on seeds below 20 and from 1000 on; those from 20 on are reported. `late`: 3 groups, the third
of which arrives after a fit of two; accuracy on 8 more pairs of each user, by own pairs, against a fit of all from the
beginning.
"""

from __future__ import annotations

import argparse
import time

import pandas as pd
import torch

import mixdpo_lib as mx
from mixdpo_lib import elbo
from mixdpo_lib.data.pairs import Pairs
from mixdpo_lib.evaluation import recovery
from mixdpo_lib.experts.tables import numbered_answers, numbered_pairs
from mixdpo_lib.learning.full_batch import full_batch_em

N_USERS, N_HELD_OUT, N_ANSWERS, PAIRS = 1000, 500, 20, 16


def as_rows(pairs: torch.Tensor, unit: torch.Tensor) -> Pairs:
    """Numbers of answers as a preference set."""
    return numbered_pairs(pairs, N_ANSWERS, user=[f"user {u}" for u in unit.tolist()])


def generated(n_experts: int, seed: int, per_user: int = PAIRS) -> tuple:
    """Known experts, the group of each user, pairs and units."""
    truth = mx.TabularExperts(N_ANSWERS, n_experts)
    truth.perturb(2.0, torch.Generator().manual_seed(seed))
    belongs = torch.randint(
        n_experts, (N_USERS + N_HELD_OUT,), generator=torch.Generator().manual_seed(seed + 100)
    )
    draw = torch.Generator().manual_seed(seed + 200)
    return belongs, *truth.sample_pairs(belongs, per_user, draw)


def one_expert() -> mx.MixturePolicy:
    """A table of the answers with one expert."""
    experts = mx.TabularExperts(N_ANSWERS, 1, answers=numbered_answers(N_ANSWERS))
    return mx.MixturePolicy(experts, mx.LearnedWeights(1), beta=1.0)


def found_k(n_experts: int, seed: int, growth: mx.Growth) -> tuple[dict, pd.DataFrame]:
    """One data set: K at the end, NMI by the training pairs, decisions."""
    belongs, pairs, unit = generated(n_experts, seed)
    seen, policy, began = unit < N_USERS, one_expert(), time.monotonic()
    train, held = as_rows(pairs[seen], unit[seen]), as_rows(pairs[~seen], unit[~seen])
    grown = mx.grow(policy, train, validation=held, growth=growth)
    q = policy.posterior(train)
    found = recovery(q, [str(int(z)) for z in belongs[:N_USERS]])
    kept = grown.table["kept"]
    row = {"K": n_experts, "seed": seed, "found": grown.n_experts, "nmi": found["nmi"]}
    row |= {"proposals": len(kept), "kept": int(kept.sum())}
    row |= {"nats": float(grown.loglik.mean()), "seconds": time.monotonic() - began}
    return row, grown.table.assign(K=n_experts, seed=seed)


def late(seed: int) -> dict:
    """A third group after a fit of two: accuracy by group against a fit of all three; are the old experts equal?"""
    belongs, pairs, unit = generated(3, seed, 24)
    place = torch.arange(24).repeat(N_USERS + N_HELD_OUT)
    known = unit < N_USERS
    train, held = known & (place < 16), ~known & (place < 16)
    test, group = known & (place >= 16), belongs[unit]
    policy = one_expert()
    early = group < 2
    parts = (as_rows(pairs[mask], unit[mask]) for mask in (train & early, held & early))
    first = next(parts)
    mx.grow(policy, first, validation=next(parts))
    old = [
        {n: v.clone() for n, v in policy.experts.own(k).items()} for k in range(policy.n_experts)
    ]
    n_old, before = policy.n_experts, policy.log_posterior(first)[0].clone()
    everything = as_rows(pairs[train], unit[train])
    users = [f"user {u}" for u in range(N_USERS) if int(belongs[u]) < 2]
    mx.grow(
        policy,
        everything,
        validation=as_rows(pairs[held], unit[held]),
        freeze_others=True,
        freeze_users=users,
    )
    same = all(
        bool((policy.experts.own(k)[n] == v).all()) for k in range(n_old) for n, v in old[k].items()
    )
    after = policy.log_posterior(first)[0]
    moved = float((after[:, :n_old].exp() - before.exp()).abs().max())
    experts, gate = (
        mx.TabularExperts(N_ANSWERS, 3, answers=numbered_answers(N_ANSWERS)),
        mx.LearnedWeights(3),
    )
    full_batch_em(
        experts, gate, pairs[train], unit[train], restarts=5, max_iter=300, tolerance=1e-7
    )
    whole = mx.MixturePolicy(experts, gate.float(), beta=1.0)
    row = {
        "seed": seed,
        "K before": n_old,
        "K": policy.n_experts,
        "old equal": same,
        "moved": moved,
    }
    tested, names = as_rows(pairs[test], unit[test]), [f"user {u}" for u in range(N_USERS)]
    for name, one in (("grown", policy), ("from the beginning", whole)):
        log_q, own = one.log_posterior(everything)
        where = {n: i for i, n in enumerate(own)}
        log_q = log_q[[where[n] for n in names]][unit[test]]
        hits = elbo.correct((one.loglik(tested) + log_q).logsumexp(1).exp())
        for kind, mask in (("old", group[test] < 2), ("third", group[test] == 2)):
            row[f"{name}, {kind}"] = float(hits[mask].mean())
    return row


def main() -> None:
    """Every K and seed, a line each, and a summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first", type=int, default=20)
    parser.add_argument("--ks", type=int, nargs="+", default=[2, 3, 5])
    parser.add_argument("--late", type=int, default=5, help="data sets with a late group")
    parser.add_argument("--errors", type=float, default=mx.Growth().errors)
    parser.add_argument("--refusals", type=int, default=mx.Growth().refusals)
    parser.add_argument("--out")
    options = parser.parse_args()
    growth, seeds = mx.Growth(options.errors, options.refusals), range(options.seeds)
    rows, tables = [], []
    for n_experts in options.ks:
        for seed in seeds:
            row, table = found_k(n_experts, options.first + seed, growth)
            rows.append(row)
            tables.append(table)
            print({name: round(value, 3) for name, value in row.items()}, flush=True)
    if rows:
        table = pd.DataFrame(rows)
        decisions = pd.concat(tables)
        table["right"] = table["found"] == table["K"]
        print(
            table.groupby("K")[["right", "nmi", "proposals", "seconds"]].agg(
                ["sum", "median", "min"]
            )
        )
        print(decisions.groupby(["K", "proposal", "kept"]).size().unstack(fill_value=0))
        if options.out:
            table.to_csv(options.out, index=False)
    for seed in range(options.late):
        print({n: round(v, 4) for n, v in late(options.first + seed).items()}, flush=True)


if __name__ == "__main__":
    main()
