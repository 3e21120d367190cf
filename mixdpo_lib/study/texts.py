"""What do experts write at equal distance from the reference?"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from ..base.features import TextFeatures
from ..evaluation import bootstrap_means, interval
from ..policy.generating import Generated
from ..policy.mixture import MixturePolicy


def distinct_2(text: str) -> float:
    """Distinct pairs of neighbouring words over all such pairs of one text; 1 for texts of fewer than two words.

    >>> distinct_2("a b a b")
    0.6666666666666666
    """
    words = text.lower().split()
    bigrams = list(pairwise(words))
    return len(set(bigrams)) / len(bigrams) if bigrams else 1.0


def text_table(
    generated: Generated, prompts: Sequence[str] | pd.Series, prompt_ids: Sequence[int] | pd.Series,
    scores: pd.DataFrame,
) -> pd.DataFrame:  # fmt: skip
    """One row a sampled text: judges' scores, log_ratio, ref_logp (nats), n_tokens, distinct_2."""
    return pd.DataFrame(
        {
            "prompt_id": list(prompt_ids), "prompt": list(prompts), "text": generated.text,
            **{c: scores[c].to_numpy() for c in scores}, "log_ratio": generated.log_ratio,
            "ref_logp": generated.ref_logp, "n_tokens": generated.n_tokens,
            "distinct_2": [distinct_2(t) for t in generated.text],
        }
    )  # fmt: skip


def summarise_texts(texts: pd.DataFrame, rewards: Sequence[str], baseline: str = "dpo") -> pd.DataFrame:
    """Mean reward of each policy with its gain over `baseline`, and KL, perplexity, distinct-2, length beside it.

    `texts` has columns policy, seed, prompt_id and those of `text_table`. KL is mean log_ratio, nats a text; perplexity
    is exp(- sum ref_logp / sum n_tokens) under the reference. Intervals are paired and clustered by prompt.
    """
    rows = []
    for reward in rewards:
        wide = texts.pivot_table(index="prompt_id", columns="policy", values=reward, aggfunc="mean")
        draws = bootstrap_means(wide.to_numpy())
        means = wide.mean()
        base = list(wide.columns).index(baseline)
        for i, policy in enumerate(wide.columns):
            part = texts[texts["policy"] == policy]
            low, high = interval(draws[:, i])
            gain_low, gain_high = interval(draws[:, i] - draws[:, base])
            rows.append(
                {
                    "policy": policy, "reward": reward, "n": len(part), "mean": means.iloc[i], "low": low, "high": high,
                    "gain_over_dpo": means.iloc[i] - means.iloc[base], "gain_low": gain_low, "gain_high": gain_high,
                    "kl": part["log_ratio"].mean(),
                    "perplexity": np.exp(-part["ref_logp"].sum() / part["n_tokens"].sum()),
                    "distinct_2": part["distinct_2"].mean(), "length": part["n_tokens"].mean(),
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


@torch.no_grad()
def prefix_kl(
    policy: MixturePolicy, texts: TextFeatures, text_ids: Tensor, scales: Sequence[float] = (1.0,), block: int = 64
) -> Float[np.ndarray, "scales experts"]:
    """Mean over texts of sum_t KL(pi_k(. given prefix) || pi_ref(. given prefix)) on given texts, nats a text.

    The prefixes come from the reference, so this is not the KL of the policy's own samples; it rises with it and costs
    no sampling. `scales` multiply B_k, see `HeadExperts.scale`.
    """
    experts = policy.heads
    constants = policy.constants(texts)
    head = experts._require_active()
    total = np.zeros((len(scales), policy.n_experts))
    for start in range(0, len(text_ids), block):
        ids = text_ids[start : start + block]
        batch = experts.batch(texts, constants, torch.stack([ids, ids], 1))
        hidden = batch["hidden"]
        logits = hidden @ head.T
        if experts._bias is not None:
            logits += experts._bias[experts.active_ids]
        inactive = batch["lse_inactive"]
        lse = torch.logaddexp(logits.logsumexp(1), inactive)
        for k in range(policy.n_experts):
            shift = (hidden @ experts.down[k].T) @ (head @ experts.up[k]).T
            for i, scale in enumerate(scales):
                moved = logits + scale * shift
                lse_k = torch.logaddexp(moved.logsumexp(1), inactive)
                p = (moved - lse_k[:, None]).exp()
                total[i, k] += float((scale * (p * shift).sum(1) - lse_k + lse).sum())
    return total / len(text_ids)
