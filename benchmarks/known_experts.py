"""Are known experts recovered? 20 data sets for each K: classification, weights, and the choice of K.

    .venv/bin/python benchmarks/known_experts.py [--seeds 20] [--out FILE.csv]

1,000 users, 20 answers, rewards of standard deviation 2, 16 pairs a user, K = 2, 3, 5; K is chosen among 1 ... K + 2 by
the held-out log-likelihood of 500 other users (one-standard-error rule). Some ten minutes on 2 cores. The tests and
notebooks/theory/4_who_answered.ipynb run smaller versions.
"""

from __future__ import annotations

import argparse

import pandas as pd
import torch

from mixdpo_lib import elbo
from mixdpo_lib.evaluation import choose_n_experts, recovery
from mixdpo_lib.experts.tables import TabularExperts
from mixdpo_lib.gates.weights import LearnedWeights
from mixdpo_lib.learning.full_batch import full_batch_em

N_USERS, N_HELD_OUT, N_ANSWERS, PAIRS = 1000, 500, 20, 16


def one(n_experts: int, seed: int) -> dict[str, float]:
    """One data set: accuracy behind the Bayes rule, largest error of a weight, the K chosen."""
    truth = TabularExperts(N_ANSWERS, n_experts)
    truth.perturb(2.0, torch.Generator().manual_seed(seed))
    belongs = torch.randint(
        n_experts, (N_USERS + N_HELD_OUT,), generator=torch.Generator().manual_seed(seed + 100)
    )
    pairs, unit = truth.sample_pairs(belongs, PAIRS, torch.Generator().manual_seed(seed + 200))
    seen, known = unit < N_USERS, belongs[:N_USERS]
    log_shares = (torch.bincount(known, minlength=n_experts) / N_USERS).double().log()
    bayes = elbo.log_responsibilities(
        truth.loglik(pairs[seen]).detach(), log_shares, unit[seen]
    ).argmax(1)
    row: dict[str, float] = {
        "K": n_experts,
        "seed": seed,
        "bayes_accuracy": float((bayes == known).double().mean()),
    }
    held_out = {}
    for k in range(1, n_experts + 3):
        experts, gate = TabularExperts(N_ANSWERS, k), LearnedWeights(k)
        result = full_batch_em(
            experts,
            gate,
            pairs[seen],
            unit[seen],
            restarts=5,
            seed=seed,
            max_iter=300,
            tolerance=1e-7,
        )
        loglik = experts.loglik(pairs[~seen]).detach()
        held_out[k] = elbo.mixture_log_likelihood(loglik, gate(), unit[~seen] - N_USERS).numpy()
        if k == n_experts:
            found = recovery(
                pd.DataFrame(result.log_q.exp().numpy()), [str(z) for z in known.tolist()]
            )
            weights, shares = gate().exp()[0].sort().values, log_shares.exp().sort().values
            row |= {
                "accuracy": found["aligned_accuracy"],
                "weight_error": float((weights - shares).abs().max()),
            }
    row["behind_bayes"] = row["bayes_accuracy"] - row["accuracy"]
    row["chosen_k"] = choose_n_experts(pd.DataFrame(held_out))
    return row


def main() -> None:
    """Every K and seed, a line each, and a summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--out")
    options = parser.parse_args()
    rows = []
    for n_experts in (2, 3, 5):
        for seed in range(options.seeds):
            rows.append(one(n_experts, seed))
            print({name: round(value, 4) for name, value in rows[-1].items()}, flush=True)
    table = pd.DataFrame(rows)
    if options.out:
        table.to_csv(options.out, index=False)
    summary = table.groupby("K").agg(
        behind_bayes_max=("behind_bayes", "max"),
        weight_error_max=("weight_error", "max"),
        seeds=("seed", "count"),
    )
    summary["right_k"] = (table["chosen_k"] == table["K"]).groupby(table["K"]).sum()
    print(summary.to_string())


if __name__ == "__main__":
    main()
