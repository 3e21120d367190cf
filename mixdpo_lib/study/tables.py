"""What came out? Tables of the study."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from datasets import Dataset

from ..evaluation import accuracy_gain
from .fits import Fitted


def design_gains(by_prompt: pd.DataFrame, baseline: str = "dpo") -> pd.DataFrame:
    """Gain of every other method over `baseline` for seen users, by design (see `accuracy_gain`).

    A mixture is routed by each user's own training pairs, a single policy needs no routing.
    """
    seen = by_prompt[
        (by_prompt["users"] == "seen") & by_prompt["routing"].isin(["none", "own_pairs"])
    ]
    parts = []
    for design, part in seen.groupby("design", sort=False):
        single = part[part["method"] == baseline]
        for method, rows in part[part["method"] != baseline].groupby("method", sort=False):
            n_pairs = int(rows.groupby("seed")["n_pairs"].sum().iloc[0])
            parts.append(
                accuracy_gain(rows, single).assign(design=design, method=method, n_pairs=n_pairs)
            )
    return pd.concat(parts, ignore_index=True)


def preference_counts(sets: Mapping[str, Mapping[str, Dataset]]) -> pd.DataFrame:
    """Pairs, users and prompts of every part of every design, and the share of labels against the user's reward."""
    rows = [
        {
            "design": design,
            "part": name,
            "pairs": len(part),
            "users": len(set(part["user"]) - {""}),
            "prompts": len(set(part["prompt_id"])),
            "flipped": float(np.mean(part["flipped"])),
        }
        for design, parts in sets.items()
        for name, part in parts.items()
    ]
    return pd.DataFrame(rows)


def label_temperatures(sets: Mapping[str, Mapping[str, Dataset]]) -> pd.DataFrame:
    """The label temperature of each reward (in its own unit) in each design; 0 is no noise."""
    kept = {design: json.loads(parts["train"].info.description) for design, parts in sets.items()}
    return pd.DataFrame(
        [
            {"design": d, "group": g, "label_temperature": t}
            for d, k in kept.items()
            for g, t in k["label_temperature"].items()
        ]
    )


def score_differences(
    sets: Mapping[str, Mapping[str, Dataset]], scores: pd.DataFrame
) -> pd.DataFrame:
    """Score of chosen minus rejected of every training pair, in standard deviations of the user's own reward."""
    parts = []
    for design, data in sets.items():
        part = pd.DataFrame({c: data["train"][c] for c in ("group", "gap", "flipped")})
        sign = np.where(part["flipped"], -1.0, 1.0)
        part["score_difference"] = sign * part["gap"] / part["group"].map(scores.std())
        parts.append(part.assign(design=design)[["design", "group", "score_difference"]])
    return pd.concat(parts, ignore_index=True)


def group_agreement(candidates: pd.DataFrame, scores: pd.DataFrame) -> pd.DataFrame:
    """On what share of all untied candidate pairs of a prompt two groups prefer the same answer.

    Parameters
    ----------
    candidates : with the column prompt_id. scores : one column a group, one row a candidate.

    Returns
    -------
    group_a, group_b, agreement (share), n_pairs: a row for every two groups, itself included.
    """
    groups = list(scores)
    signs: dict[str, list[float]] = {g: [] for g in groups}
    for rows in candidates.groupby("prompt_id").indices.values():
        for a, b in itertools.combinations(rows, 2):
            for g in groups:
                signs[g].append(float(np.sign(scores[g].iat[a] - scores[g].iat[b])))
    table = pd.DataFrame(signs)
    out = []
    for a in groups:
        for b in groups:
            untied = (table[a] != 0) & (table[b] != 0)
            share = (table[a] == table[b])[untied].mean()
            out.append(
                {"group_a": a, "group_b": b, "agreement": share, "n_pairs": int(untied.sum())}
            )
    return pd.DataFrame(out)


def expert_sharpness(fits: Sequence[Fitted], groups: Sequence[str]) -> pd.DataFrame:
    """The sharpness s that every head found: pi_k proportional to pi_ref^(1 + s) times what its low-rank part says.

    Returns
    -------
    design, method, seed, expert, served ("all" of a single policy, the group that an expert is aligned with, or
    "nobody"), sharpness (a pure number, 0 in the reference and of heads that have none).
    """
    parts = []
    for f in fits:
        k = f.policy.n_experts
        names = {e: g for g, e in zip(groups, f.order, strict=True)}
        served = ["all"] if k == 1 else [names.get(e, "nobody") for e in range(k)]
        table = {"expert": range(k), "served": served, "sharpness": f.sharpness}
        parts.append(f.named(pd.DataFrame(table)))
    return pd.concat(parts, ignore_index=True)
