"""Do experts die when one of many is routed to? 32 groups in generated data, S = 1, with and without each remedy.

    .venv/bin/python benchmarks/extreme_sparsity.py [--k 32] [--seeds 10] [--only NAME ...] [--out FILE.csv]

Each group has two topics and its own rewards (standard deviation 2) of 20 answers; 60 training and 30 held-out pairs a
topic. The gate reads the topic; each pair has a latent of its own. Two arms at an equal number of expert evaluations
over the whole fit: S = 1 from the first step (two computed: the one routed to and one at random), and S falling from K
over a pass. "dense" computes all experts for as many passes as the first arm. Dead: routed to by less than a tenth of
1/K. NMI and ARI of the topics' experts with the groups (two topics a group: topics put into 32 experts at random have an NMI of
.76 and an ARI of 0); bound: held-out log-likelihood by the gate's weights, nats a pair.
"""

from __future__ import annotations

import argparse
import time

import pandas as pd
import torch

import mixdpo_lib as mx
from mixdpo_lib.data.pairs import Pairs
from mixdpo_lib.evaluation import recovery
from mixdpo_lib.experts.tables import numbered_answers, numbered_pairs
from mixdpo_lib.learning.routing import Router, dead_in_routing, routed_share

N_ANSWERS, TOPICS, TRAIN, HELD, PASSES, ANNEAL, BATCH = 20, 2, 60, 30, 60, 1.0, 768
REMEDIES = {
    "none": {"routing__balance": 0.0},
    "balance": {},
    "tempering": {
        "routing__balance": 0.0,
        "start__temperature": 4.0,
        "start__tempering_passes": 5.0,
    },
}


def generated(n_groups: int, seed: int) -> tuple[Pairs, Pairs, list[str]]:
    """Training and held-out pairs with a column topic; topic t belongs to group t % n_groups."""
    truth = mx.TabularExperts(N_ANSWERS, n_groups)
    truth.perturb(2.0, torch.Generator().manual_seed(seed))
    group = torch.arange(TOPICS * n_groups) % n_groups
    draw = torch.Generator().manual_seed(seed + 100)
    pairs, topic = truth.sample_pairs(group, TRAIN + HELD, draw)
    seen = torch.arange(TRAIN + HELD).repeat(len(group)) < TRAIN
    found = [
        numbered_pairs(pairs[mask], N_ANSWERS, topic=[f"topic {t}" for t in topic[mask].tolist()])
        for mask in (seen, ~seen)
    ]
    return found[0], found[1], [str(int(g)) for g in group]


def passes_of(k: int, anneal: float) -> float:
    """Passes of a fit that costs as many expert evaluations as S = 1 for PASSES passes."""
    if not anneal:
        return PASSES
    router = Router(mx.Routing(top_s=1, anneal=anneal), k, 0)
    grid = [router.n_routed(anneal * i / 200) for i in range(200)]
    spent = anneal * sum(min(s + 1, k) for s in grid) / len(grid)
    return max(anneal, anneal + (2 * PASSES - spent) / 2)


def one(k: int, seed: int, arm: str, remedy: str, start: str = "random_responsibilities") -> dict:
    """One fit."""
    train, held, groups = generated(k, seed)
    names = [f"topic {t}" for t in range(len(groups))]
    answers = numbered_answers(N_ANSWERS)
    experts = mx.TabularExperts(N_ANSWERS, k, answers=answers, prior_scale=1e3)  # next to none
    gate = mx.UserGate.from_metadata({"topic": names}, k, weight_scale=3.0)
    policy = mx.MixturePolicy(experts, gate, beta=1.0)
    anneal = ANNEAL if arm == "annealed" else 0.0
    config = mx.FitConfig(latent="pair", batch_by="pair", batch_size=BATCH, min_steps=0, seed=seed)
    config = config.change(
        passes=passes_of(k, anneal),
        evaluations_per_pass=0.05,
        start__kind=start,
        start__passes=0.5,
        start__temperature=1.0,
    )
    if arm != "dense":
        config = config.change(routing__top_s=1, routing__anneal=anneal, **REMEDIES[remedy])
    began = time.monotonic()
    mx.fit(policy, train, config)
    seconds = time.monotonic() - began
    with torch.no_grad():
        log_w = gate.log_w(gate.inputs({"topic": names}, None))
        bound = float((policy.loglik(held) + policy.log_w(held)).logsumexp(1).mean())
    found = recovery(pd.DataFrame(log_w.exp().numpy()), groups)
    dead = len(dead_in_routing(routed_share(log_w, 1)))
    row = {"K": k, "arm": arm, "remedy": remedy, "seed": seed, "dead": dead}
    row |= {name: found[name] for name in ("nmi", "ari", "aligned_accuracy")}
    return row | {"bound": bound, "passes": config.passes, "seconds": seconds}


def main() -> None:
    """Every arm, remedy and seed, a line each, and medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=list(REMEDIES))
    parser.add_argument("--start", default="random_responsibilities", help="of dense fits too")
    parser.add_argument("--out")
    options = parser.parse_args()
    rows = []
    for seed in range(options.first, options.first + options.seeds):
        cases = [("dense", "none")]
        cases += [(arm, name) for arm in ("S = 1", "annealed") for name in options.only]
        for arm, name in cases:
            rows.append(one(options.k, seed, arm, name, options.start))
            print(
                {
                    n: round(v, 3) if n != "arm" and n != "remedy" else v
                    for n, v in rows[-1].items()
                },
                flush=True,
            )
    table = pd.DataFrame(rows)
    if options.out:
        table.to_csv(options.out, index=False)
    numbers = ["dead", "nmi", "ari", "aligned_accuracy", "bound", "passes", "seconds"]
    print(table.groupby(["arm", "remedy"], sort=False)[numbers].median().round(3).to_string())
    print(
        table.groupby(["arm", "remedy"], sort=False)[numbers[:5]]
        .agg(["min", "max"])
        .round(3)
        .to_string()
    )


if __name__ == "__main__":
    main()
