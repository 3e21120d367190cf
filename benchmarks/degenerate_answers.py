"""What does one answer in a hundred that says nothing cost, with a lapse rate and without?

    .venv/bin/python benchmarks/degenerate_answers.py [--seeds 3] [--lapse learn] [--methods mix_dpo] [--out FILE.csv]

The study's default design; a hundredth of the training rows have one fixed text of 150 tokens as `chosen`. Validation and
test pairs stay as they are. Accuracy by each user's own pairs, mean over groups; fits take one to two minutes each.
"""

from __future__ import annotations

import argparse
from functools import cached_property

import numpy as np
import pandas as pd
from datasets import Dataset, DatasetDict

from mixdpo_lib.data.pairs import Text, Texts
from mixdpo_lib.study import ReviewUsers
from mixdpo_lib.study.review_users import review_users_config

SHARE, TOKENS = 0.01, 150


class Spoiled(ReviewUsers):
    """The study's users, of whose training answers some are replaced by one text."""

    share = 0.0

    @property
    def degenerate(self) -> str:
        """A text of 150 tokens that says nothing."""
        ids = self.base.tokenizer(" lol" + "lol" * TOKENS)["input_ids"][:TOKENS]
        return self.base.tokenizer.decode(ids)

    def preferences(self, design: str, seed: int = 0) -> DatasetDict:
        """See `ReviewUsers.preferences`."""
        sets = super().preferences(design, seed)
        rows = sets["train"].to_pandas()
        at = np.random.default_rng(seed).choice(len(rows), round(self.share * len(rows)), False)
        rows.loc[at, "chosen"] = self.degenerate
        sets["train"] = Dataset.from_pandas(rows, preserve_index=False)
        return sets

    @cached_property
    def texts(self) -> Texts:
        """All candidates, and the degenerate text after each training prompt."""
        table, prompts = self.candidates, [self.prompts[i] for i in self.splits["train"]]
        texts = [Text(p, r, False) for p, r in zip(table["prompt"], table["response"], strict=True)]
        return Texts.of([*texts, *(Text(p, self.degenerate, False) for p in prompts)])


def main() -> None:
    """Print the table: accuracy with and without the degenerate answers, by lapse rate and seed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lapse", nargs="+", default=["0", "learn"])
    parser.add_argument("--methods", nargs="+", default=["mix_dpo"])
    parser.add_argument("--out")
    chosen = parser.parse_args()
    rows = []
    for lapse in chosen.lapse:
        rate = lapse if lapse == "learn" else float(lapse)
        for share in (0.0, SHARE):
            study = Spoiled(review_users_config(["default"], lapse=rate, more_test_prompts=150))
            study.share = share
            for fitted in study.fits(chosen.methods, range(chosen.seeds)):
                table = study.accuracy_by_prompt([fitted])
                own = table[
                    table["users"].eq("seen") & table["routing"].isin(["own_pairs", "none"])
                ]
                accuracy = own.groupby("group")["accuracy"].mean().mean()
                rows.append(
                    {
                        "method": fitted.method,
                        "lapse": lapse,
                        "spoiled": share,
                        "seed": fitted.seed,
                        "accuracy": accuracy,
                        "learned": fitted.policy.lapse,
                        "best_step": fitted.result.best_step,
                    }
                )
                print(rows[-1], flush=True)
    table = pd.DataFrame(rows)
    wide = table.pivot_table(
        index=["method", "lapse", "seed"], columns="spoiled", values="accuracy"
    )
    wide["fall"] = wide[0.0] - wide[SHARE]
    print(wide.round(4).to_string())
    print(wide.groupby(["method", "lapse"]).mean().round(4).to_string())
    if chosen.out:
        table.to_csv(chosen.out, index=False)


if __name__ == "__main__":
    main()
