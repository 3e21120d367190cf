"""What do experts write at equal distance from the reference?"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ..base.features import text_features
from ..base.head import reference_logps
from ..data.pairs import Text
from ..evaluation import bootstrap_means, interval
from ..experts.heads import prefix_kl
from ..policy.generating import Generated
from ..store import cached, hash_seed
from .candidates import split_prompts
from .fits import Fitted
from .review_users import ReviewUsers

VERSION = 4
N_KL_TEXTS = 2  # sampled on each validation prompt, to match KL
KL_SCALES = np.geomspace(
    0.05, 2.0, 24
).tolist()  # factors on B_k between which the match is interpolated


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
    """One row a sampled text: judges' scores, log_ratio, ref_logp (nats), n_tokens, distinct_2."""
    return pd.DataFrame(
        {
            "prompt_id": list(prompt_ids),
            "prompt": list(prompts),
            "text": generated.text,
            **{c: scores[c].to_numpy() for c in scores},
            "log_ratio": generated.log_ratio,
            "ref_logp": generated.ref_logp,
            "n_tokens": generated.n_tokens,
            "distinct_2": [distinct_2(t) for t in generated.text],
        }
    )


def summarise_texts(
    texts: pd.DataFrame, rewards: Sequence[str], baseline: str = "dpo"
) -> pd.DataFrame:
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
                    "policy": policy,
                    "reward": reward,
                    "n": len(part),
                    "mean": means.iloc[i],
                    "low": low,
                    "high": high,
                    "gain_over_dpo": means.iloc[i] - means.iloc[base],
                    "gain_low": gain_low,
                    "gain_high": gain_high,
                    "kl": part["log_ratio"].mean(),
                    "perplexity": np.exp(-part["ref_logp"].sum() / part["n_tokens"].sum()),
                    "distinct_2": part["distinct_2"].mean(),
                    "length": part["n_tokens"].mean(),
                }
            )
    return pd.DataFrame(rows)


# ------------------------------------------------------------------------------------------------ of the study's fits


def matched_scales(
    study: ReviewUsers, design: str, seeds: Sequence[int], method: str = "mix_dpo"
) -> pd.DataFrame:
    """For each seed and expert: the factor on B_k at which the expert is as far from the reference as DPO is.

    A factor acts as another beta. It is chosen on validation prompts: first so that the KL on the prefixes of the
    candidates (`heads.prefix_kl`) is DPO's, then once more by what both sampled there.

    Returns (design, policy, seed, expert, scale, prefix_kl, sampled_kl before the last correction, nats a text).
    """
    validation = split_prompts(len(study.prompts))["validation"]
    _, ids = _candidates_on(study, validation)
    prompt_ids = [i for i in validation for _ in range(N_KL_TEXTS)]

    def by_prefix(fitted: Fitted, scales: Sequence[float] = (1.0,)) -> np.ndarray:
        return prefix_kl(fitted.policy.experts, study.texts, ids, scales)  # type: ignore[arg-type]

    def sampled_kl(fitted: Fitted, name: str, expert: int, scale: float) -> float:
        return float(np.mean(_generated(study, fitted, name, expert, scale, prompt_ids).log_ratio))

    found = []
    for seed in seeds:
        dpo, mixture = study.fitted("dpo", seed, design), study.fitted(method, seed, design)
        target = float(by_prefix(dpo)[0, 0])
        sampled = sampled_kl(dpo, "dpo", 0, 1.0)
        one = {
            "policy": "dpo",
            "seed": seed,
            "expert": 0,
            "scale": 1.0,
            "prefix_kl": target,
            "sampled_kl": sampled,
        }
        found.append(one)
        curve = np.log(by_prefix(mixture, KL_SCALES).clip(1e-12))
        for group, expert in zip(study.groups, mixture.order, strict=True):
            if expert < 0:
                continue

            def at(kl: float, expert: int = expert, curve: np.ndarray = curve) -> float:
                return float(
                    np.exp(np.interp(np.log(max(kl, 1e-12)), curve[:, expert], np.log(KL_SCALES)))
                )

            name = f"expert_{group}"
            first = sampled_kl(mixture, name, expert, at(target))
            scale = at(target * sampled / first) if min(sampled, first) > 0 else at(target)
            kl = float(by_prefix(mixture, [scale])[0, expert])
            found.append(
                {
                    **one,
                    "policy": name,
                    "expert": expert,
                    "scale": scale,
                    "prefix_kl": kl,
                    "sampled_kl": first,
                }
            )
    return pd.DataFrame(found).assign(
        design=design, method=lambda t: np.where(t["policy"] == "dpo", "dpo", method)
    )


def texts_of(study: ReviewUsers, policies: pd.DataFrame, n_texts: int) -> pd.DataFrame:
    """Sample `n_texts` texts of every row of `matched_scales` on test prompts; the evaluation judges score them.

    One row a text: design, policy, seed, prompt_id, prompt, text, one column a reward, log_ratio, ref_logp, ...
    """
    test = list(split_prompts(len(study.prompts))["test"])
    prompt_ids = [test[i % len(test)] for i in range(n_texts)]
    prompts = [study.prompts[i] for i in prompt_ids]
    parts = []
    for row in policies.itertuples():
        fitted = study.fitted(row.method, row.seed, row.design)
        generated = _generated(study, fitted, row.policy, row.expert, row.scale, prompt_ids)
        scores = study.judged(prompts, generated.text, "evaluation")
        table = text_table(generated, prompts, prompt_ids, scores)
        parts.append(table.assign(policy=row.policy, seed=row.seed, design=row.design))
    return pd.concat(parts, ignore_index=True)


def base_texts(study: ReviewUsers) -> pd.DataFrame:
    """The base's own candidates on test prompts as texts of the policy "base" (log_ratio 0)."""
    part, ids = _candidates_on(study, split_prompts(len(study.prompts))["test"])
    offsets = text_features(study.base, study.texts).offsets
    generated = Generated(
        text=part["response"].tolist(),
        expert=[0] * len(part),
        log_ratio=[0.0] * len(part),
        ref_logp=reference_logps(study.base, study.texts)[ids].tolist(),
        n_tokens=(offsets[ids + 1] - offsets[ids]).tolist(),
        ended=part["ended"].tolist(),
    )
    scores = study.judged(part["prompt"], part["response"], "evaluation")
    return text_table(generated, part["prompt"], part["prompt_id"], scores).assign(
        policy="base", seed=0
    )


def _candidates_on(study: ReviewUsers, prompt_ids: Sequence[int]) -> tuple[pd.DataFrame, Tensor]:
    """The candidates on these prompts, and their numbers among the study's texts."""
    part = study.candidates[study.candidates["prompt_id"].isin(prompt_ids)]
    texts = [Text(p, r, False) for p, r in zip(part["prompt"], part["response"], strict=True)]
    return part, torch.tensor([study.texts.index[text] for text in texts])


def _generated(
    study: ReviewUsers,
    fitted: Fitted,
    name: str,
    expert: int,
    scale: float,
    prompt_ids: Sequence[int],
) -> Generated:
    """Texts of one expert, B_k times `scale`, on these prompts; kept in the cache."""
    prompts = [study.prompts[i] for i in prompt_ids]
    policy = study.new_policy(fitted.method, study.pairs(fitted.design)["train"])
    policy.experts.fit_state(fitted.policy.experts.state_dict())
    policy.load_state_dict(fitted.policy.state_dict())
    policy.experts.scale(scale)  # type: ignore[operator]
    state = hashlib.sha256(
        b"".join(v.contiguous().numpy().tobytes() for v in policy.state_dict().values())
    )
    length = study.config.candidates.response_tokens
    seed = hash_seed(fitted.seed, "texts", name)
    parameters = {
        "state": state.hexdigest(),
        "expert": expert,
        "prompts": prompts,
        "length": length,
        "seed": seed,
        "base": study.base.fingerprint,
    }

    def build(folder: Path) -> None:
        out = policy.generate(
            prompts, expert=[expert] * len(prompts), max_new_tokens=length, seed=seed
        )
        pd.DataFrame(asdict(out)).to_json(folder / "texts.jsonl", orient="records", lines=True)

    folder = cached("texts", VERSION, parameters, build)
    table = pd.read_json(
        folder / "texts.jsonl", orient="records", lines=True, dtype=False, convert_dates=False
    )
    return Generated(**{c: table[c].tolist() for c in table})
