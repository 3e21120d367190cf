"""Are tastes on a circle found? 20 data sets of 16 and of 64 pairs a user: angles, nodes, and free mixtures beside them.

    .venv/bin/python benchmarks/circle.py [--seeds 20] [--pairs 16 64] [--out FILE.csv]

1,000 users at random angles, 20 answers, two rewards of standard deviation 2; 500 other users are held out.  Angles are
aligned (turn and reflection), their median error is put beside that of the posterior with the true rewards.  Half an
hour on one core; tests/experts/test_group_tables.py runs smaller versions.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings

import pandas as pd
import torch

from mixdpo_lib.elbo import elbo_terms
from mixdpo_lib.experts.tables import TabularExperts
from mixdpo_lib.gates.weights import LearnedWeights
from mixdpo_lib.learning.quadrature import doubling_gap, unit_log_likelihood
from mixdpo_lib.learning.tally import tally_em
from mixdpo_lib.study.circle_people import people_on_circle, placed

N_USERS, N_HELD_OUT, N_ANSWERS, FREE = 1000, 500, 20, (2, 3, 4, 6, 8)


def one(n_pairs: int, seed: int) -> dict[str, float]:
    """One data set."""

    def draw(stage: int) -> torch.Generator:
        return torch.Generator().manual_seed(1000 * stage + seed)

    rewards = 2 * torch.randn(2, N_ANSWERS, generator=draw(0), dtype=torch.float64)
    angle = 2 * math.pi * torch.rand(N_USERS + N_HELD_OUT, generator=draw(1), dtype=torch.float64)
    people = people_on_circle(angle, rewards, N_USERS, n_pairs, draw(2))
    train, of, test, of_test = people.train, people.of, people.held, people.of_held

    began = time.perf_counter()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        fit = placed(people, rewards, 32, seed)
    row: dict[str, float] = {"pairs": n_pairs, "seed": seed, "seconds": time.perf_counter() - began}
    experts, gate = fit.experts, fit.gate
    loglik, log_w = experts.loglik(train).detach(), gate.log_w().detach()
    likelihood = unit_log_likelihood(experts, gate, train, of)
    terms = elbo_terms(loglik, log_w, fit.log_q, of)
    twice = 2 * experts.n_experts
    double = unit_log_likelihood(experts.at_nodes(twice), gate.at_nodes(twice), train, of)
    row |= {
        "nodes": experts.n_experts,
        "doubling_gap": doubling_gap(likelihood, double, len(train)),
        "bound_gap": float((terms.elbo - likelihood).abs().max()),
        "narrowest": float(fit.users["spread"].min()),
        "warned": float(any("narrower" in str(one.message) for one in warned)),
        "bayes_error": math.radians(fit.error("known_rewards")),
        "error": math.radians(fit.error()),
    }
    row["ratio"] = row["error"] / row["bayes_error"]
    row["held_out_circle"] = float(unit_log_likelihood(experts, gate, test, of_test).mean())
    for k in FREE:
        free, weights = TabularExperts(N_ANSWERS, k), LearnedWeights(k)
        tally_em(
            free,
            weights,
            train,
            of,
            restarts=3,
            start_temperature=8.0,
            seed=seed,
            max_iter=200,
            tolerance=1e-6,
        )
        row[f"held_out_{k}"] = float(unit_log_likelihood(free, weights, test, of_test).mean())
    return row


def main() -> None:
    """Every number of pairs and seed, a line each, and a summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--pairs", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--out")
    options = parser.parse_args()
    rows = []
    for n_pairs in options.pairs:
        for seed in range(options.seeds):
            rows.append(one(n_pairs, seed))
            print(
                {name: float(f"{value:.4g}") for name, value in rows[-1].items()},
                flush=True,
            )
    table = pd.DataFrame(rows)
    if options.out:
        table.to_csv(options.out, index=False)
    free = table[[f"held_out_{k}" for k in FREE]]
    table["best_free"] = free.max(axis=1)
    table["circle_wins"] = table["held_out_circle"] > table["best_free"]
    print(
        table.groupby("pairs")
        .agg(
            seeds=("seed", "count"),
            nodes=("nodes", "max"),
            doubling_gap_max=("doubling_gap", "max"),
            bound_gap_max=("bound_gap", "max"),
            warned=("warned", "sum"),
            error=("error", "median"),
            bayes_error=("bayes_error", "median"),
            ratio_median=("ratio", "median"),
            ratio_max=("ratio", "max"),
            circle_wins=("circle_wins", "sum"),
        )
        .T.to_string()
    )


if __name__ == "__main__":
    main()
