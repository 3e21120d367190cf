"""Are our maxima those of others? Mixtures of Bradley-Terry models of surveys, beside R's flexmix, psychotools and choix.

    .venv/bin/python benchmarks/peers/surveys.py [--ks 1 2 3 4] [--starts 20] [--only NAME ...] [--out FILE.csv]

The surveys are those that psychotools and psychotree bring (German parties, first names, CEMS universities, top models),
written as CSV into a temporary folder by surveys.R, and the generated one of tests/data. Everything is fitted by maximum
likelihood, ties left out; a table comes out: maximised log-likelihoods (nats), the largest difference of a centred reward and of
a person's posterior, experts put beside components by their posteriors. `--keep tests/data/survey_peers.json` writes what the
others found of the generated survey, for the tests. What is not installed is named and left out: apt-get install r-base-core
r-cran-psychotools r-cran-psychotree r-cran-flexmix; pip install choix. `btmix` of psychomix is not run (Debian has it not):
flexmix itself, with a binomial model and `| person`, has the same likelihood.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.optimize import linear_sum_assignment

import mixdpo_lib as mx

HERE = Path(__file__).resolve().parent
GENERATED = HERE.parents[1] / "tests" / "data" / "survey.csv"
OWN = ("person", "first", "second", "winner")
KEYS = ["survey", "gate", "K"]
LOGLIK = ("program", "gate", "K", "loglik")


def from_r(folder: Path, *arguments: str) -> list[dict]:
    """What surveys.R writes into the folder: its surveys, and its fits where it is told to fit."""
    if not shutil.which("Rscript"):
        print("Rscript: not installed; no package of R and none of its surveys was run")
        return []
    script = ["Rscript", "--vanilla", str(HERE / "surveys.R"), str(folder), *arguments]
    subprocess.run(script, check=True)
    found, said = [], folder / "r.txt"
    for line in said.read_text().splitlines() if arguments else []:
        kind, *rest = line.split("\t")
        if kind == "package":
            print(f"R {rest[0]}: {rest[1]}")
        else:
            survey, program, gate, k, loglik, seconds = rest[:6]
            row = {"survey": survey, "program": program, "gate": gate, "K": int(k)}
            found.append(row | {"loglik": float(loglik), "seconds": float(seconds or "nan")})
    return found


def rewards_and_posterior(path: Path) -> tuple[pd.DataFrame, pd.DataFrame] | None:
    """Centred rewards (items, K) and posteriors (people, K) that surveys.R left of a fit."""
    if not path.with_name(f"{path.name}_rewards").is_file():
        return None
    rewards, posterior = (
        pd.read_csv(path.with_name(f"{path.name}_{part}"), header=None, index_col=0)
        for part in ("rewards", "posterior")
    )
    posterior.index = posterior.index.astype(str)
    return rewards - rewards.mean(), posterior


def apart(policy: mx.MixturePolicy, pairs: mx.Pairs, theirs: tuple) -> dict[str, float]:
    """Largest difference of a reward and of a posterior, after experts were put beside components."""
    posterior = policy.posterior(pairs)
    rewards = policy.experts.reward_table()
    other = theirs[1].loc[posterior.index].to_numpy()
    order = linear_sum_assignment(-(posterior.to_numpy().T @ other))[1]
    own = (rewards - rewards.mean()).to_numpy()
    return {
        "rewards_apart": np.abs(own - theirs[0].loc[rewards.index].to_numpy()[:, order]).max(),
        "posteriors_apart": np.abs(posterior.to_numpy() - other[:, order]).max(),
    }


def ours(path: Path, ks: list[int], starts: int) -> list[dict]:
    """Maximum likelihood by full-batch EM, for weights alone and for those that read the covariates."""
    rows = pd.read_csv(path, dtype={name: str for name in OWN}, keep_default_na=False)
    known = {name: rows[name].tolist() for name in rows if name not in OWN}
    pairs = mx.item_pairs(
        rows["first"], rows["second"], rows["winner"], user=rows["person"], covariates=known
    )
    found = []
    for gate in ("weights", *(["covariates"] if known else [])):
        for k in ks if gate == "weights" else [k for k in ks if k > 1]:
            read = {name: pairs.columns[name] for name in known}
            weights = (
                mx.LearnedWeights(k, alpha=1)
                if gate == "weights"
                else mx.UserGate.from_metadata(read, k, weight_scale=1e4)
            )
            experts = mx.TabularExperts.of(None, pairs, k, prior_scale=1e4)
            policy, began = mx.MixturePolicy(experts, weights), time.monotonic()
            fitted = mx.fit_table(
                policy, pairs, restarts=1 if k == 1 else starts, tolerance=1e-11, max_iter=3000
            )
            row = {"survey": path.stem, "program": "mixdpo", "gate": gate, "K": k}
            row |= {"seconds": time.monotonic() - began, "end": fitted.stop_reason}
            said = mx.information_criteria(policy, pairs)
            row |= {"loglik": said.loglik, "n_free": said.n_free, "aic": said.aic, "bic": said.bic}
            theirs = rewards_and_posterior(path.parent / "r" / f"{path.stem}_{gate}_{k}")
            found.append(row | (apart(policy, pairs, theirs) if theirs else {}))
    return found


def by_choix(path: Path) -> list[dict]:
    """One Bradley-Terry model by choix."""
    if importlib.util.find_spec("choix") is None:
        return []
    import choix

    rows = pd.read_csv(path, dtype=str, keep_default_na=False).query("winner != 'tie'")
    items = sorted({*rows["first"], *rows["second"]})
    lost = np.where(rows["winner"] == rows["first"], rows["second"], rows["first"])
    place = {name: i for i, name in enumerate(items)}
    data = [(place[a], place[b]) for a, b in zip(rows["winner"], lost, strict=True)]
    x = choix.opt_pairwise(len(items), data, alpha=1e-12, method="BFGS", tol=1e-9)
    won, lost_at = np.array(data).T
    loglik = -np.logaddexp(0, x[lost_at] - x[won]).sum()
    row = {"survey": path.stem, "program": "choix", "gate": "weights", "K": 1, "loglik": loglik}
    return [row | {"rewards": dict(zip(items, (x - x.mean()).tolist(), strict=True))}]


def kept(folder: Path, rows: list[dict]) -> dict:
    """What other programs found of the generated survey: log-likelihoods, and for K = 3 rewards and posteriors."""
    others = [row for row in rows if row["survey"] == "generated" and row["program"] != "mixdpo"]
    found: dict = {"loglik": [{name: row[name] for name in LOGLIK} for row in others]}
    found["choix_rewards"] = next(row["rewards"] for row in others if "rewards" in row)
    for row in (row for row in others if row["program"] == "flexmix" and row["K"] == 3):
        rewards, posterior = rewards_and_posterior(
            folder / "r" / f"generated_{row['gate']}_{row['K']}"
        )
        found[f"{row['gate']}_{row['K']}"] = {
            "rewards": {name: own.round(6).tolist() for name, own in rewards.iterrows()},
            "posterior": {name: own.round(6).tolist() for name, own in posterior.iterrows()},
        }
    return found


def main() -> None:
    """Every survey by every program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ks", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--starts", type=int, default=20)
    parser.add_argument("--only", nargs="+", help="names of surveys; all, by default")
    parser.add_argument("--out")
    parser.add_argument("--keep")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        from_r(folder)
        shutil.copy(GENERATED, folder / "generated.csv")
        for path in folder.glob("*.csv"):
            if options.only and path.stem not in options.only:
                path.unlink()
        rows = from_r(folder, ",".join(map(str, options.ks)), str(options.starts))
        if importlib.util.find_spec("choix") is None:
            print("choix: not installed; not run")
        for path in sorted(folder.glob("*.csv")):
            rows += [*ours(path, options.ks, options.starts), *by_choix(path)]
        if options.keep:
            Path(options.keep).write_text(json.dumps(kept(folder, rows)) + "\n")
    table = pd.DataFrame(rows).drop(columns="rewards", errors="ignore")
    own = table[table["program"] == "mixdpo"].set_index(KEYS)
    wide = table.pivot_table("loglik", KEYS, "program")
    wide = wide.join(own[["rewards_apart", "posteriors_apart", "bic", "seconds"]])
    print(wide.to_string(float_format="{:.4f}".format))
    if options.out:
        table.to_csv(options.out, index=False)


if __name__ == "__main__":
    main()
