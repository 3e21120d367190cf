"""What do experts write at equal distance from the reference?"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ..base.features import text_features
from ..base.head import base_logps
from ..data.pairs import Text
from ..evaluation import bootstrap_means, interval
from ..experts.heads import HeadExperts
from ..gates.weights import LearnedWeights
from ..policy.generating import Generated
from ..policy.mixture import MixturePolicy
from ..store import cached, hash_seed
from .fits import Fitted
from .review_users import ReviewUsers

VERSION = 5


def distinct_2(text: str) -> float:
    """Distinct pairs of neighbouring words over all such pairs of one text; 1 for texts of fewer than two words.

    >>> distinct_2("a b a b")
    0.6666666666666666
    """
    words = text.lower().split()
    bigrams = list(pairwise(words))
    return len(set(bigrams)) / len(bigrams) if bigrams else 1.0


def text_table(
    generated: Generated,
    prompts: Sequence[str] | pd.Series,
    prompt_ids: Sequence[int] | pd.Series,
    scores: pd.DataFrame,
) -> pd.DataFrame:
    """One row a sampled text: judges' scores, log_ratio, kl, ref_logp (nats, see `Generated`), n_tokens, distinct_2."""
    return pd.DataFrame(
        {
            "prompt_id": list(prompt_ids),
            "prompt": list(prompts),
            "text": generated.text,
            **{c: scores[c].to_numpy() for c in scores},
            "log_ratio": generated.log_ratio,
            "kl": generated.kl,
            "ref_logp": generated.ref_logp,
            "n_tokens": generated.n_tokens,
            "distinct_2": [distinct_2(t) for t in generated.text],
        }
    )


def summarise_texts(texts: pd.DataFrame, rewards: Sequence[str]) -> pd.DataFrame:
    """Mean reward of each policy with its gains over DPO and the base, and KL, perplexity, distinct-2, length beside it.

    `texts` has columns policy, seed, prompt_id and those of `text_table`. Gains are the columns gain_over_dpo, gain_low,
    gain_high and gain_over_base, base_low, base_high, each where that policy is there. KL is mean kl, nats a
    text; perplexity is exp(- sum ref_logp / sum n_tokens) under the reference. Intervals (95 %) are paired and clustered
    by prompt.
    """
    rows = []
    for reward in rewards:
        wide = texts.pivot_table(index="prompt_id", columns="policy", values=reward, aggfunc="mean")
        draws = bootstrap_means(wide.to_numpy())
        means, places = wide.mean(), list(wide.columns)
        for i, policy in enumerate(places):
            part = texts[texts["policy"] == policy]
            low, high = interval(draws[:, i])
            row = {
                "policy": policy,
                "reward": reward,
                "n": len(part),
                "mean": means.iloc[i],
                "low": low,
                "high": high,
            }
            for baseline, ends in (("dpo", "gain"), ("base", "base")):
                if baseline in places:
                    both = wide[[policy, baseline]].dropna().to_numpy()  # on the same prompts
                    each = bootstrap_means(both)
                    row[f"gain_over_{baseline}"] = both[:, 0].mean() - both[:, 1].mean()
                    row[f"{ends}_low"], row[f"{ends}_high"] = interval(each[:, 0] - each[:, 1])
            row |= {
                "kl": part["kl"].mean(),
                "perplexity": np.exp(-part["ref_logp"].sum() / part["n_tokens"].sum()),
                "distinct_2": part["distinct_2"].mean(),
                "length": part["n_tokens"].mean(),
            }
            rows.append(row)
    return pd.DataFrame(rows)


# ------------------------------------------------------------------------------------------------ of the study's fits


def rewritten(
    experts: HeadExperts, expert: int, settings: Sequence[tuple[float, float]]
) -> HeadExperts:
    """Expert `expert` with other numbers, once for each of `settings`: (factor on its B, the s it has instead)."""
    out = HeadExperts(experts.base[0], len(settings), experts.rank)
    out.activate(experts.active_ids)
    factors, sharpness = torch.tensor(settings, dtype=torch.float32).unbind(1)
    with torch.no_grad():
        out.down.copy_(experts.down[expert].expand_as(out.down))
        out.up.copy_(factors[:, None, None] * experts.up[expert])
        out.sharpness.copy_(sharpness)  # type: ignore[union-attr]
    return out


def texts_of(study: ReviewUsers, policies: pd.DataFrame, n_texts: int) -> pd.DataFrame:
    """Sample `n_texts` texts of every row of `equal_kl.matched_scales` on test prompts; the evaluation judges score them.

    What stands beside DPO and the experts (plain DPO and the controls) writes half as many.

    One row a text: design, policy, seed, prompt_id, prompt, text, one column a reward, log_ratio, ref_logp, ...
    """
    test = list(study.splits["test"])
    parts = []
    for row in policies.itertuples():
        compared = row.policy == "dpo" or row.policy.startswith("expert_")
        size = n_texts if compared else math.ceil(n_texts / 2)
        prompt_ids = [test[i % len(test)] for i in range(size)]
        prompts = [study.prompts[i] for i in prompt_ids]
        fitted = study.fitted(row.method, row.seed, row.design)
        generated = sampled_texts(
            study, fitted, row.policy, row.expert, row.scale, row.sharpness, prompt_ids
        )
        scores = study.judged(prompts, generated.text, "evaluation")
        table = text_table(generated, prompts, prompt_ids, scores)
        parts.append(table.assign(policy=row.policy, seed=row.seed, design=row.design))
    return pd.concat(parts, ignore_index=True)


def base_texts(study: ReviewUsers) -> pd.DataFrame:
    """The base's own usable candidates on test prompts as texts of the policy "base" (log_ratio 0)."""
    part, ids = candidates_on(study, study.splits["test"])
    features = text_features(study.base, study.texts)
    offsets = features.offsets
    generated = Generated(
        text=part["response"].tolist(),
        expert=[0] * len(part),
        log_ratio=[0.0] * len(part),
        ref_logp=base_logps(study.base, features)[ids].tolist(),
        n_tokens=(offsets[ids + 1] - offsets[ids]).tolist(),
        ended=part["ended"].tolist(),
        kl=[0.0] * len(part),
    )
    scores = study.judged(part["prompt"], part["response"], "evaluation")
    return text_table(generated, part["prompt"], part["prompt_id"], scores).assign(
        policy="base", seed=0
    )


def candidates_on(study: ReviewUsers, prompt_ids: Sequence[int]) -> tuple[pd.DataFrame, Tensor]:
    """The candidates on these prompts, and their numbers among the study's texts."""
    part = study.candidates[study.candidates["prompt_id"].isin(prompt_ids)]
    texts = [Text(p, r, False) for p, r in zip(part["prompt"], part["response"], strict=True)]
    return part, torch.tensor([study.texts.index[text] for text in texts])


def sampled_texts(
    study: ReviewUsers,
    fitted: Fitted,
    name: str,
    expert: int,
    scale: float,
    sharpness: float,
    prompt_ids: Sequence[int],
) -> Generated:
    """Texts on these prompts of one expert with B_k times `scale` and s = `sharpness`; kept in the cache.

    name : of the policy; with the fit's seed it seeds the draws.
    """
    prompts = [study.prompts[i] for i in prompt_ids]
    experts = rewritten(fitted.policy.experts, expert, [(scale, sharpness)])  # type: ignore[arg-type]
    policy = MixturePolicy(experts, LearnedWeights(1), fitted.policy.beta)
    return kept_texts(
        study, policy, prompts, [0] * len(prompts), hash_seed(fitted.seed, "texts", name)
    )


def kept_texts(
    study: ReviewUsers, policy: MixturePolicy, prompts: list[str], expert: list[int], seed: int
) -> Generated:
    """A text of `expert[i]` of the policy on each of the prompts, as long as the study's; kept in the cache."""
    experts = policy.experts
    state = hashlib.sha256(
        b"".join(v.contiguous().numpy().tobytes() for v in experts.state_dict().values())
    )
    length = study.config.candidates.response_tokens
    parameters = {
        "state": state.hexdigest(),
        "prompts": prompts,
        "length": length,
        "seed": seed,
        "base": study.base.fingerprint,
        **({"expert": expert, "experts": experts.options()} if any(expert) else {}),
    }

    def build(folder: Path) -> None:
        out = policy.generate(prompts, expert=expert, max_new_tokens=length, seed=seed)
        pd.DataFrame(asdict(out)).to_json(folder / "texts.jsonl", orient="records", lines=True)

    folder = cached("texts", VERSION, parameters, build)
    table = pd.read_json(
        folder / "texts.jsonl", orient="records", lines=True, dtype=False, convert_dates=False
    )
    return Generated(**{c: table[c].tolist() for c in table})
