"""Are users placed on a circle by what they prefer among real texts? The circle beside DPO, free mixtures and told angles.

    .venv/bin/python benchmarks/circle_text.py [--seeds 3] [--kinds 2 3 4 6 8] [--passes 5] [--out FILE.csv]

60 users at every angle between praise and substance (the training judges of sentiment and informativeness) compare
candidates of the study, 200 pairs each; accuracy on noise-free pairs of test prompts, each user served by the own training
pairs.  "way": how far from DPO to experts that are told each user's angle.  About ten minutes a seed.
"""

from __future__ import annotations

import argparse

import pandas as pd

from mixdpo_lib.study.circle_users import CircleUsers
from mixdpo_lib.study.fits import choose


def main() -> None:
    """A line a fit, and a summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--kinds", type=int, nargs="*", default=[2, 3, 4, 6, 8])
    parser.add_argument("--passes", type=float, default=5.0)
    parser.add_argument("--nodes", type=int, default=16)
    parser.add_argument("--out")
    options = parser.parse_args()
    values = {"more_test_prompts": 150, "passes": options.passes, "n_nodes": options.nodes}
    study, rows = CircleUsers(choose(CircleUsers.default, values)), []
    for seed in options.seeds:
        for method in ["dpo", "circle", "told", *(f"mix_{k}" for k in options.kinds)]:
            fitted = study.fitted(method, seed, "default")
            rows.append({"seed": seed, "method": method, **study.scores_of(fitted)})
            print(
                {k: round(v, 4) if isinstance(v, float) else v for k, v in rows[-1].items()},
                flush=True,
            )
    table = pd.DataFrame(rows)
    if options.out:
        table.to_csv(options.out, index=False)
    wide = table.pivot(index="seed", columns="method", values="accuracy")
    wide["way"] = (wide["circle"] - wide["dpo"]) / (wide["told"] - wide["dpo"])
    print(wide.round(3).to_string())


if __name__ == "__main__":
    main()
