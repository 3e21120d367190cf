"""Can a new user be served without retraining? By metadata, by a few pairs of their own, by fitting the gate alone.

Experts are those of the study of review users. The pairs of a new user lie on training prompts, the scored ones on test
prompts.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ..data.pairs import Pairs
from ..elbo import correct
from ..evaluation import (
    bootstrap_means,
    by_prompt_and_group,
    group_accuracy,
    interval,
    prompt_accuracy,
)
from ..gates.membership import MixedMembershipGate
from ..learning.fit import fit_gate
from ..policy.mixture import MixturePolicy
from .fits import Fitted, group_of, unit_log_w
from .review_users import ReviewUsers
from .simulated_people import simulate_blends, simulate_preferences

SIZES = (0, 1, 2, 4, 8, 16, 32, 64)


def first_pairs(data: Pairs, size: int) -> Pairs:
    """The first `size` pairs of every user, in the order of the data."""
    seen: dict[str, int] = {}
    keep = []
    for user in data.rows["user"]:
        seen[user] = seen.get(user, 0) + 1
        keep.append(seen[user] <= size)
    return data.where(keep)


def serve_by_pairs(
    policy: MixturePolicy, context: Pairs, size: int, rewards: Tensor | None = None
) -> Tensor:
    """(users, K): log_q of each user from the gate and the user's first `size` pairs (latent per user)."""
    if size == 0:
        return unit_log_w(policy, context)[0]
    return policy.log_posterior(first_pairs(context, size), "user", rewards)[0]


def serve_by_gate(
    policy: MixturePolicy, context: Pairs, size: int, offset_scale: float = 1.0
) -> Tensor:
    """(users, K): weights of each user by an offset of their own, fitted to their first `size` pairs (latent per pair).

    What else the gate reads stays as it is, and so do the experts.
    """
    _, users = context.units("user")
    gates = [policy.gate] if policy.gate.reads else []
    gate = MixedMembershipGate(gates, policy.n_experts, users, offset_scale)
    own = MixturePolicy(policy.experts, gate, policy.beta, lapse=policy.lapse)
    if size:
        fit_gate(own, first_pairs(context, size), latent="pair", frozen=gate.shared)
    return unit_log_w(own, context)[0]


def accuracy_by_pairs(
    study: ReviewUsers, design: str, seeds: Sequence[int], sizes: Sequence[int] = SIZES
) -> pd.DataFrame:
    """Test accuracy of new users by way of serving and by m, the number of their own pairs.

    Returns one row a (served_by, m, seed, group, prompt_id): `dpo` and `oracle` (one DPO a hidden group) use no pairs.
    "metadata" is the gate of users with m pairs of their own, "pairs" the posterior without metadata, "gate" an offset
    of the user fitted on top of the metadata.
    """
    parts: list[pd.DataFrame] = []

    def score(fitted: Fitted, weights: Tensor, name: str, m: int, loglik: Tensor) -> None:
        of, (_, users) = group_of(context, "user"), context.units("user")
        rows = {g: weights[[i for i, u in enumerate(users) if of[u] == g]] for g in study.groups}
        table = prompt_accuracy(fitted.policy, test, rows, loglik)
        parts.append(table.assign(served_by=name, m=m, seed=fitted.seed))

    for seed in seeds:
        sets = study.pairs(design, seed)
        context, test = sets["context"], sets["test"]
        for name in ("dpo", "oracle"):
            fitted = study.fitted(name, seed, design)
            loglik = fitted.policy.loglik(test, fitted.rewards)
            score(fitted, unit_log_w(fitted.policy, context)[0], name, 0, loglik)
        for name, method in (("pairs", "mix_dpo"), ("metadata", "moe_dpo"), ("gate", "moe_dpo")):
            fitted = study.fitted(method, seed, design)
            loglik = fitted.policy.loglik(test, fitted.rewards)
            for m in sizes:
                if name == "gate":
                    weights = serve_by_gate(fitted.policy, context, m)
                else:
                    weights = serve_by_pairs(fitted.policy, context, m, fitted.rewards)
                score(fitted, weights, name, m, loglik)
    return pd.concat(parts, ignore_index=True)


def share_closed(by_prompt: pd.DataFrame) -> pd.DataFrame:
    """Accuracy over the groups, gain over DPO and share of the way from DPO to the oracle, by way of serving and m.

    Paired over prompts, seeds averaged; 95 % bootstrap intervals. The share's interval is that of a ratio, wide where
    the oracle is hardly better than DPO.
    """
    means, draws = {}, {}
    for key, part in by_prompt.groupby(["served_by", "m"], sort=False):
        accuracy, count, _ = by_prompt_and_group(part)
        group_means, group_draws = group_accuracy(accuracy, count)
        means[key], draws[key] = group_means.mean(), group_draws.mean(1)
    rows = []
    low_line, high_line = ("dpo", 0), ("oracle", 0)
    for key in means:
        gain, spread = means[key] - means[low_line], draws[key] - draws[low_line]
        way, ways = means[high_line] - means[low_line], draws[high_line] - draws[low_line]
        row = {
            "served_by": key[0],
            "m": key[1],
            "accuracy": means[key],
            "gain": gain,
            "share": gain / way,
        }
        for name, values in (("accuracy", draws[key]), ("gain", spread), ("share", spread / ways)):
            low, high = interval(values)
            row |= {f"{name}_low": low, f"{name}_high": high}
        rows.append(row)
    return pd.DataFrame(rows)


def blended_users(
    study: ReviewUsers, design: str, seeds: Sequence[int], n_users: int, m: int = 64
) -> pd.DataFrame:
    """Users each of whose comparisons is answered by one of two rewards: mixed membership against one latent a user.

    Both start from the same experts (`mix_dpo`) and the users' first m pairs; scored on comparisons of the same kind on
    test prompts. Rows: served_by, seed, prompt_id, loglik (nats per pair), accuracy.
    """
    parts = []
    for seed in seeds:
        config = replace(study.design(design, seed), context_pairs=m)
        sets = simulate_blends(study.candidates, study.scores, config, n_users, splits=study.splits)
        context, test = (Pairs.of(sets[name], study.texts) for name in ("context", "test"))
        ids, users = test.units("user")
        _, order = context.units("user")
        place = torch.tensor([order.index(user) for user in users])[ids]
        single, mixture = study.fitted("dpo", seed, design), study.fitted("mix_dpo", seed, design)
        ways = {
            "dpo": (single, unit_log_w(single.policy, context)[0]),
            "one latent a user": (
                mixture,
                serve_by_pairs(mixture.policy, context, m, mixture.rewards),
            ),
            "mixed membership": (mixture, serve_by_gate(mixture.policy, context, m)),
        }
        for name, (fitted, log_w) in ways.items():
            total = (fitted.policy.loglik(test, fitted.rewards) + log_w[place]).logsumexp(1)
            parts.append(
                pd.DataFrame(
                    {
                        "served_by": name,
                        "seed": seed,
                        "prompt_id": test.rows["prompt_id"],
                        "loglik": total.tolist(),
                        "accuracy": correct(total.exp()).tolist(),
                    }
                )
            )
    return pd.concat(parts, ignore_index=True)


def summarise_blends(table: pd.DataFrame) -> pd.DataFrame:
    """Means of `blended_users` with 95 % intervals over prompts, and gains of mixed membership over the others."""
    rows = []
    for value in ("loglik", "accuracy"):
        wide = table.pivot_table(
            index="prompt_id", columns="served_by", values=value, aggfunc="mean"
        )
        draws = bootstrap_means(wide.to_numpy())
        best = list(wide.columns).index("mixed membership")
        for i, name in enumerate(wide.columns):
            low, high = interval(draws[:, i])
            gain_low, gain_high = interval(draws[:, best] - draws[:, i])
            rows.append(
                {
                    "served_by": name,
                    "value": value,
                    "mean": wide[name].mean(),
                    "low": low,
                    "high": high,
                    "gain_of_mixed": wide["mixed membership"].mean() - wide[name].mean(),
                    "gain_low": gain_low,
                    "gain_high": gain_high,
                    "n_prompts": len(wide),
                }
            )
    return pd.DataFrame(rows)


def fingerprint(policy: MixturePolicy) -> str:
    """SHA-256 of the experts' parameters: the same before and after users are added."""
    digest = hashlib.sha256()
    for name, value in sorted(policy.experts.state_dict().items()):
        digest.update(name.encode() + value.contiguous().numpy().tobytes())
    return digest.hexdigest()


def add_users(
    study: ReviewUsers, design: str, seed: int, n_users: int, m: int = 16
) -> pd.DataFrame:
    """Serve `n_users` users whom no fit has seen, timed: by the posterior of their m pairs, and by an offset each.

    Returns one row a way: seconds, users, pairs, experts_untouched (their bytes before and after).
    """
    config = replace(study.design(design, seed), n_new_users=n_users, context_pairs=m)
    sets = simulate_preferences(study.candidates, study.scores, config, study.splits)
    context = Pairs.of(sets["context"], study.texts)
    fitted = study.fitted("moe_dpo", seed, design)
    rows = []
    for name in ("pairs", "gate"):
        before, start = fingerprint(fitted.policy), time.monotonic()
        if name == "pairs":
            weights = serve_by_pairs(fitted.policy, context, m)
        else:
            weights = serve_by_gate(fitted.policy, context, m)
        rows.append(
            {
                "served_by": name,
                "seconds": time.monotonic() - start,
                "users": len(weights),
                "pairs": len(context),
                "experts_untouched": fingerprint(fitted.policy) == before,
            }
        )
    return pd.DataFrame(rows)


def group_weights(study: ReviewUsers, design: str, seed: int, m: int = 16) -> pd.DataFrame:
    """Mean weight of each group's expert for the new users of each group: by metadata alone and by m pairs."""
    fitted, context = study.fitted("moe_dpo", seed, design), study.pairs(design, seed)["context"]
    of, (_, users) = group_of(context, "user"), context.units("user")
    rows = []
    for name, size in (("metadata", 0), (f"{m} pairs", m)):
        q = serve_by_pairs(fitted.policy, context, size, fitted.rewards).exp().numpy()
        for group in study.groups:
            mean = q[np.array([of[u] == group for u in users])].mean(0)
            rows += [
                {"known": name, "group": group, "expert_serves": other, "weight": float(mean[k])}
                for other, k in zip(study.groups, fitted.order, strict=True)
                if k >= 0
            ]
    return pd.DataFrame(rows)
