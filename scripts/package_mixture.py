"""Which mixture is shipped? `python scripts/package_mixture.py` writes data/mixtures/review_users/ anew.

It is Mix-DPO of notebook 04 under the default profile (one design, one seed): read from the cache where that notebook
has been run, fitted otherwise. Beside the mixture lie whom each expert serves, and comparisons of test prompts.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re

import torch

from mixdpo_lib import store
from mixdpo_lib.data.pairs import Text
from mixdpo_lib.policy.example import example_folder
from mixdpo_lib.runner.parameters import resolve_parameters
from mixdpo_lib.study import ReviewUsers, ReviewUsersConfig
from mixdpo_lib.study.fits import Fitted

NOTEBOOK = "04_mix_dpo"
NOT_SHOWN = re.compile(  # the base writes anything; these are not put before everybody
    r"rape|sex|porn|f[u*]+ck|shit|suicid|kill|murder|slut|whore|queer|nazi|drug|https?:",
    re.IGNORECASE,
)


def comparisons(study: ReviewUsers, fitted: Fitted, count: int) -> list[list[str]]:
    """The pairs of test prompts whose answer tells most about who answers, one a prompt: prompt, first, second.

    The most telling by the variance of sigma(D_k) over experts, of which no judge is asked.
    """
    table, place, found = study.candidates, study.texts.index, []
    rewards = [
        fitted.rewards[place[Text(prompt, response, False)]]
        for prompt, response in zip(table["prompt"], table["response"], strict=True)
    ]
    for number in study.splits["test"]:
        own = table.index[table["prompt_id"] == number].tolist()
        own = [i for i in own if not NOT_SHOWN.search(table["prompt"][i] + table["response"][i])]
        for a, b in itertools.combinations(own, 2):
            p = torch.sigmoid(rewards[a] - rewards[b])
            found.append((float(p.var()), number, a, b))
    best: dict[int, list[str]] = {}
    for _, number, a, b in sorted(found, reverse=True):
        if number not in best and len(best) < count:
            best[number] = [table["prompt"][a], table["response"][a], table["response"][b]]
    return list(best.values())


def provenance(
    config: ReviewUsersConfig, design: str, seed: int, n_pairs: int, serves: dict[int, str]
) -> dict[str, str]:
    """What the card of the mixture says."""
    flips = f"{config.design.flip_rate:.0%}" if design == "default" else "none"
    return {
        "What it is": f"Mix-DPO of `notebooks/{NOTEBOOK}.ipynb`, default profile, seed {seed}.",
        "Data": (
            f"{n_pairs:,} comparisons of {config.design.n_users} simulated users in three hidden groups ({design} design, "
            f"{flips} of the labels flipped) between continuations that the base wrote for the first words of film "
            f"reviews ({config.reviews}, see data/README.md)."
        ),
        "Who is served": "; ".join(f"expert {k}: {serves[k]}" for k in sorted(serves)),
        "Make it again": "`python scripts/package_mixture.py`",
        "Use": "`mx.example_mixture()`, `notebooks/00_start_here.ipynb`, `notebooks/explorer.ipynb`",
        "Limits": "simulated users; texts may be untrue, offensive or ungrammatical, as those of the base.",
    }


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--design", default="default", choices=("default", "clean"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--comparisons", type=int, default=24)
    options = parser.parse_args()
    parameters = resolve_parameters(NOTEBOOK, "default")
    study = ReviewUsers.from_parameters(parameters)
    fitted = study.fitted("mix_dpo", options.seed, options.design)
    if -1 in fitted.order or len(set(fitted.order)) != len(study.groups):
        raise SystemExit(f"experts {fitted.order} serve no group each: package another seed")
    serves = {k: group for group, k in zip(study.groups, fitted.order, strict=True)}
    train = study.pairs(options.design, options.seed)["train"]
    told = provenance(study.config, options.design, options.seed, len(train), serves)
    folder = example_folder()
    with store.writing_to(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        fitted.policy.save_pretrained(folder, told)
        about = {
            "design": options.design,
            "seed": options.seed,
            "serves": [serves[k] for k in sorted(serves)],
            "comparisons": comparisons(study, fitted, options.comparisons),
        }
        text = json.dumps(about, indent=1, ensure_ascii=False)
        (folder / "about.json").write_text(text + "\n", encoding="utf-8")
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(
        f"{folder}: {size / 1000:.0f} kB, {told['Who is served']}; stopped as {fitted.result.stop_reason}"
    )


if __name__ == "__main__":
    main()
