"""At which strength are policies equally far from the reference? Every reward is compared there.

Reward rises with the distance from the reference, so policies are brought to the KL of DPO before they write. What does
this is chosen on validation prompts alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ..experts.heads import prefix_kl
from .fits import Fitted
from .review_users import ReviewUsers
from .texts import candidates_on, rewritten, sampled_texts

N_KL_TEXTS = 2  # sampled on each validation prompt, for each correction
N_CORRECTIONS = 2
SCALES = np.geomspace(0.05, 2.0, 24)  # factors between which a match is interpolated
SHARPNESS = np.geomspace(0.001, 4.0, 28)  # and s of the controls, likewise


@dataclass(frozen=True)
class StrengthPath:
    """A policy at every strength: `at(t)` is (factor on B_k of expert `expert` of `fitted`, s) for each t of `grid`."""

    policy: str
    fitted: Fitted
    expert: int
    at: Callable[[float], tuple[float, float]]
    grid: np.ndarray


def paths(
    study: ReviewUsers, design: str, seed: int, method: str = "mix_dpo"
) -> Iterator[StrengthPath]:
    """What is brought to the KL of DPO.

    dpo_plain, expert_<group> : c B and c s, as another beta would give (see `HeadExperts.scale`).
    base_sharpened : B = 0 and s > 0, pi proportional to pi_ref^(1+s) on active tokens: no preference was read.
    dpo_sharpened : DPO with half of its B and an s above its own.
    """
    dpo, mixture = study.fitted("dpo", seed, design), study.fitted(method, seed, design)
    fits = [("dpo_plain", study.fitted("dpo_plain", seed, design), 0)]
    fits += [
        (f"expert_{group}", mixture, k)
        for group, k in zip(study.groups, mixture.order, strict=True)
        if k >= 0
    ]
    for name, fitted, k in fits:
        s = fitted.sharpness[k]
        yield StrengthPath(name, fitted, k, lambda c, s=s: (c, c * s), SCALES)  # type: ignore[misc]
    own = dpo.sharpness[0]
    yield StrengthPath("base_sharpened", dpo, 0, lambda s: (0.0, s), SHARPNESS)
    yield StrengthPath("dpo_sharpened", dpo, 0, lambda s: (0.5, own + s), SHARPNESS)


def matched_scales(
    study: ReviewUsers, design: str, seeds: Sequence[int], method: str = "mix_dpo"
) -> pd.DataFrame:
    """DPO, and the strength at which every other policy (see `paths`) is as far from the reference as DPO is.

    On validation prompts: first the KL on the prefixes of the candidates (`heads.prefix_kl`) is made DPO's; then, twice,
    that aim is multiplied by (KL of DPO's own samples) / (KL of the policy's own samples).

    Returns
    -------
    design, policy, seed, method (of the fit), expert, scale (factor on B_k), sharpness (s as written), and in nats a text
    on the candidates' prefixes: prefix_kl, and of the same policy with its s alone (`prefix_kl_sharpness`, B = 0) or its
    head alone (`prefix_kl_head`, s = 0); they need not add up. sampled_kl : of its own samples, at the strength before
    the last correction.
    """
    validation = study.splits["validation"]
    _, ids = candidates_on(study, validation)
    prompt_ids = [i for i in validation for _ in range(N_KL_TEXTS)]

    def by_prefix(path: StrengthPath, settings: Sequence[tuple[float, float]]) -> np.ndarray:
        experts = rewritten(path.fitted.policy.experts, path.expert, settings)  # type: ignore[arg-type]
        return prefix_kl(experts, study.texts, ids)[0]

    def sampled_kl(path: StrengthPath, t: float) -> float:
        texts = sampled_texts(study, path.fitted, path.policy, path.expert, *path.at(t), prompt_ids)
        return float(np.mean(texts.kl))

    def row(path: StrengthPath, t: float, sampled: float) -> dict[str, object]:
        scale, s = path.at(t)
        both, alone, head = by_prefix(path, [(scale, s), (0.0, s), (scale, 0.0)])
        return {
            "design": design,
            "policy": path.policy,
            "seed": path.fitted.seed,
            "method": path.fitted.method,
            "expert": path.expert,
            "scale": scale,
            "sharpness": s,
            "prefix_kl": both,
            "prefix_kl_sharpness": alone,
            "prefix_kl_head": head,
            "sampled_kl": sampled,
        }

    found = []
    for seed in seeds:
        fitted = study.fitted("dpo", seed, design)
        own = fitted.sharpness[0]
        dpo = StrengthPath("dpo", fitted, 0, lambda c, own=own: (c, c * own), np.ones(1))  # type: ignore[misc]
        target, wanted = float(by_prefix(dpo, [dpo.at(1.0)])[0]), sampled_kl(dpo, 1.0)
        found.append(row(dpo, 1.0, wanted))
        for path in paths(study, design, seed, method):
            curve = by_prefix(path, [path.at(t) for t in path.grid])
            aim = target
            for _ in range(N_CORRECTIONS):
                sampled = sampled_kl(path, strength(aim, curve, path.grid))
                if min(sampled, wanted) > 0:
                    aim *= wanted / sampled
            found.append(row(path, strength(aim, curve, path.grid), sampled))
    return pd.DataFrame(found)


def strength(kl: float, curve: np.ndarray, grid: np.ndarray) -> float:
    """The t of `grid` at which a rising curve of KL is `kl`, between two points by straight lines in logarithms.

    The ends of the grid where the curve does not reach it.

    >>> round(strength(9.0, np.array([1.0, 4.0, 16.0]), np.array([1.0, 2.0, 4.0])), 6)
    3.0
    """
    rising = np.log(np.maximum.accumulate(curve).clip(1e-12))
    return float(np.exp(np.interp(np.log(max(kl, 1e-12)), rising, np.log(grid))))
