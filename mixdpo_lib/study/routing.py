"""Does the gate know a film from a book?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from ..evaluation import bootstrap_means, interval
from ..gates.inputs import standardise
from .fits import Fitted
from .two_domains import TwoDomains


@torch.no_grad()
def routing_of(study: TwoDomains, fits: Sequence[Fitted], less_known: bool = False) -> pd.DataFrame:
    """The gate on held-out prompts: one row a fit and prompt with `film`, the weight of the films' expert.

    `less_known` : on those of works that were left out because the base hardly knows them, instead.

    `supervised` is a logistic regression that was told the training prompts' domains and reads the same state: an
    upper line. Its penalty is that of the gate's prior, each training prompt counted with all of its answers.
    """
    table = study.asked.less_known if less_known else study.prompts[study.prompts["part"] == "test"]
    held_out, states = table[["item", "domain", "prompt"]], study.asked.states(table)
    parts = []
    for f in fits:
        weights = f.policy.gate.log_w({"state": states}).exp()
        film, book = (weights[:, k] for k in f.order[:2])
        parts.append(
            held_out.assign(method=f.method, seed=f.seed, film=(film / (film + book)).numpy())
        )
    parts.append(held_out.assign(method="supervised", seed=0, film=_supervised(study, states)))
    return pd.concat(parts, ignore_index=True)


def _supervised(study: TwoDomains, states: Tensor) -> np.ndarray:
    train = study.prompts[study.prompts["part"] == "train"]
    own = study.asked.states(train)
    mean, scale = standardise(own)
    answers = len(study.pairs()["train"]) / len(train)
    model = LogisticRegression(C=answers * study.config.weight_scale**2, max_iter=5000)
    model.fit(((own - mean) / scale).numpy(), train["domain"] == "film")
    return model.predict_proba(((states - mean) / scale).numpy())[:, 1]


def gate_accuracy(routing: pd.DataFrame) -> pd.DataFrame:
    """Share of held-out prompts, and of works or reviews (mean log odds of their prompts), sent to their own expert.

    Equal weights count as half right. Columns: method, seed ("mean": over seeds), of ("prompt" or "item"), accuracy,
    low, high (95 %, bootstrap over items), n.
    """
    rows = []
    film = routing["domain"] == "film"
    own = np.where(film, routing["film"], 1 - routing["film"]).clip(1e-9, 1 - 1e-9)
    table = routing.assign(hit=(own > 0.5) + 0.5 * (own == 0.5), odds=np.log(own / (1 - own)))
    items = table.groupby(["method", "seed", "item"], sort=False, as_index=False).agg(
        prompt=("hit", "mean"), odds=("odds", "mean")
    )
    items["item_hit"] = (items["odds"] > 0) + 0.5 * (items["odds"] == 0)
    for method, part in items.groupby("method", sort=False):
        for of, column in (("prompt", "prompt"), ("item", "item_hit")):
            wide = part.pivot_table(index="item", columns="seed", values=column)
            for seed in [*wide.columns, "mean"]:
                values = (wide.mean(axis=1) if seed == "mean" else wide[seed]).to_numpy()
                low, high = interval(bootstrap_means(values[:, None])[:, 0])
                rows.append(
                    {
                        "method": method,
                        "seed": str(seed),
                        "of": of,
                        "accuracy": values.mean(),
                        "low": low,
                        "high": high,
                        "n": len(values),
                    }
                )
    return pd.DataFrame(rows)


def worst_routed(routing: pd.DataFrame, n: int = 8) -> pd.DataFrame:
    """The held-out prompts that the gate sends most confidently to the wrong expert: mean weight over the seeds."""
    gate = routing[routing["method"] == "moe_dpo"]
    mean = gate.groupby(["domain", "prompt"], as_index=False)["film"].mean()
    mean["weight_of_its_expert"] = np.where(
        mean["domain"] == "film", mean["film"], 1 - mean["film"]
    )
    return mean.sort_values("weight_of_its_expert").head(n)[
        ["domain", "weight_of_its_expert", "prompt"]
    ]
