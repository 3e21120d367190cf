"""Are personal parts found? 20 data sets of 64 pairs a user: the factor's correlation with the truth, beside the Bayes posterior.

    .venv/bin/python benchmarks/translations.py [--seeds 20] [--pairs 64] [--out FILE.csv]

1,000 users, 20 answers, a common reward and a personal one of standard deviation 2, a Gaussian factor a user.  "bayes" is
the posterior mean with the true rewards, by quadrature; "free" the Gaussian posterior of each user, "read" the amortised
one, whose network reads the user's pairs.  Some ten minutes on one core.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import pandas as pd
import torch

from mixdpo_lib.elbo import log_responsibilities
from mixdpo_lib.experts.group_tables import GroupTables
from mixdpo_lib.experts.groups import translated
from mixdpo_lib.experts.reward_table import sample_answers
from mixdpo_lib.gates.weights import FixedWeights
from mixdpo_lib.learning.quadrature import unit_log_likelihood
from mixdpo_lib.learning.tally import Tally
from mixdpo_lib.learning.translations import fit_translations

N_USERS, N_ANSWERS, NODES = 1000, 20, 256


def one(n_pairs: int, seed: int) -> dict[str, float]:
    """One data set."""

    def draw(stage: int) -> torch.Generator:
        return torch.Generator().manual_seed(1000 * stage + seed)

    truth = GroupTables(N_ANSWERS, NODES, group="translations")
    truth.rewards.data = 2 * torch.randn(2, N_ANSWERS, generator=draw(0), dtype=torch.float64)
    factor = torch.randn(N_USERS, 1, generator=draw(1), dtype=torch.float64)
    pairs, unit = sample_answers(translated(factor) @ truth.rewards.data, n_pairs, draw(2))

    def correlation(found: torch.Tensor) -> float:
        return abs(float(np.corrcoef(found[:, 0].numpy(), factor[:, 0].numpy())[0, 1]))

    tally = Tally(truth, pairs, unit)
    log_q = log_responsibilities(tally.loglik(tally.units).detach(), truth.nodes.log_prior)
    row: dict[str, float] = {"pairs": n_pairs, "seed": seed}
    row["bayes"] = correlation(truth.nodes.taste(log_q).direction)
    for name in ("free", "read"):
        experts, began = GroupTables(N_ANSWERS, NODES, group="translations"), time.perf_counter()
        found = fit_translations(
            experts, pairs, unit, amortised=name == "read", n_draws=4, rounds=5, seed=seed
        )
        gate = FixedWeights(log_w=experts.nodes.log_prior)
        exact = unit_log_likelihood(experts, gate, pairs, unit).detach()
        row |= {
            f"{name}_seconds": time.perf_counter() - began,
            name: correlation(found.mean),
            f"{name}_ratio": correlation(found.mean) / row["bayes"],
            f"{name}_bound_gap": float((exact - found.bound).mean()),
            f"{name}_importance_gap": float((exact - found.importance).mean()),
        }
    return row


def main() -> None:
    """Every seed a line, and a summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--pairs", type=int, nargs="+", default=[64])
    parser.add_argument("--out")
    options = parser.parse_args()
    rows = []
    for n_pairs in options.pairs:
        for seed in range(options.seeds):
            rows.append(one(n_pairs, seed))
            print({name: float(f"{value:.4g}") for name, value in rows[-1].items()}, flush=True)
    table = pd.DataFrame(rows)
    if options.out:
        table.to_csv(options.out, index=False)
    print(table.groupby("pairs").describe(percentiles=[0.5]).T.unstack().to_string())


if __name__ == "__main__":
    main()
