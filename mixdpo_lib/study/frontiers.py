"""How much reward does a method buy for how much distance from the base? Fronts instead of points.

One fit a method and seed; its points are factors on B and s, as another beta would give. Rewards are in standard
deviations of the base's texts above their mean, so that all have one scale.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float

from ..evaluation import bootstrap_means, interval
from ..experts.heads import HeadExperts
from ..store import hash_seed
from .baselines import Baselines
from .comparisons import bootstrap_p, holm
from .fits import Fitted, group_of
from .texts import base_texts, kept_texts

WORST = "worst"  # of the groups, at each factor
REFERENCE_GAIN = -1.0  # the corner of the hypervolume: the base's mean minus one standard deviation


# ------------------------------------------------------------------------------------------------------------- texts


@contextmanager
def at_strength(experts: HeadExperts, factor: float) -> Iterator[None]:
    """B and s of all heads times `factor` meanwhile, see `HeadExperts.scale`."""
    before = {name: value.clone() for name, value in experts.state_dict().items()}
    try:
        experts.scale(factor)
        yield
    finally:
        experts.load_state_dict(before)


def served_texts(
    study: Baselines, fits: Sequence[Fitted], factors: Sequence[float], n_texts: int
) -> pd.DataFrame:
    """What the users of every group are written on test prompts, by every fit at every factor.

    Text i of a group is for one of its users in turn, on test prompt i, by an expert drawn from the user's
    responsibilities; where two groups would get the same it is written once.

    Returns
    -------
    design, method, seed, group, factor, number (i), prompt_id, expert, prompt, text, kl (nats a text, of the expert that
    was drawn: on average an upper bound of the mixture's own), reward (the group's own, by its evaluation judge).
    """
    test = list(study.splits["test"])
    ids = [test[i % len(test)] for i in range(n_texts)]
    parts = []
    for f in fits:
        asked = _asked(study, f, ids)
        distinct = ["number", "expert", "said"]
        once = asked.drop_duplicates(distinct)
        heads: HeadExperts = f.policy.experts  # type: ignore[assignment]
        for factor in factors:
            with at_strength(heads, factor):
                seed = hash_seed(f.seed, "frontier")
                out = kept_texts(study, f.policy, list(once["said"]), list(once["expert"]), seed)
            scores = study.judged(list(once["prompt"]), out.text, "evaluation")
            written = once[distinct].assign(text=out.text, kl=out.kl, factor=factor)
            written[list(study.groups)] = scores[list(study.groups)].to_numpy()
            table = asked.merge(written, on=distinct)
            own = table[list(study.groups)].to_numpy()
            column = table["group"].map(list(study.groups).index).to_numpy()
            table["reward"] = own[np.arange(len(table)), column]
            parts.append(f.named(table.drop(columns=[*study.groups, "said"])))
    return pd.concat(parts, ignore_index=True)


def _asked(study: Baselines, f: Fitted, prompt_ids: Sequence[int]) -> pd.DataFrame:
    """Who asks on which prompt, and which expert answers: group, number, prompt_id, prompt, said (to the model), expert."""
    told = study.told if f.method == "dpo_metadata" else None
    train = (told or study).pairs(f.design, f.seed)["train"]
    of, sentence = group_of(train, study.unit), {}
    if told:
        sentence = dict(zip(train.rows["user"], train.rows["told"], strict=True))
    share = np.random.default_rng(hash_seed(f.seed, "served")).random(len(prompt_ids))
    below = f.log_q.exp().double().cumsum(1).numpy()
    rows = []
    for group in study.groups:
        users = [i for i, unit in enumerate(f.units) if of[unit] == group]
        for number, prompt_id in enumerate(prompt_ids):
            user, prompt = users[number % len(users)], study.prompts[prompt_id]
            expert = int((below[user] < share[number] * below[user, -1]).sum())
            said = sentence.get(f.units[user], "") + prompt
            rows.append((group, number, prompt_id, prompt, said, expert))
    names = ["group", "number", "prompt_id", "prompt", "said", "expert"]
    return pd.DataFrame(rows, columns=names)


def base_rewards(study: Baselines) -> pd.DataFrame:
    """Evaluation rewards of the base's own texts on test prompts: prompt_id and a column a group."""
    return base_texts(study)[["prompt_id", *study.groups]]


# ------------------------------------------------------------------------------------------------------------ fronts


def hypervolume(
    kl: Float[np.ndarray, "*any points"], gain: Float[np.ndarray, "*any points"], budget: float
) -> Float[np.ndarray, "*any"]:
    """What lies under a front, above a gain of -1 and up to a distance: int_0^budget (front(x) + 1) dx.

    front(x) is the most that can be gained within x nats by drawing, text by text, between two of the points and the base
    (0, 0): their concave hull. A step at each point would fall by a whole point where a KL, which is measured, passes the
    budget.

    Parameters
    ----------
    kl : nats, >= 0. gain : standard deviations. budget : nats, > 0.

    >>> hypervolume(np.array([1.0]), np.array([1.0]), 2.0)  # 2 below the base, a triangle, a square
    array(3.5)
    """
    kl, gain = (np.insert(np.asarray(one, float), 0, 0.0, -1) for one in (kl, gain))
    ends = np.sort(np.minimum(kl, budget), -1)
    ends = np.concatenate([ends, np.full_like(ends[..., :1], budget)], -1)
    x, near, far = ends[..., None, None], kl[..., None, :, None], kl[..., None, None, :]
    here, there = gain[..., None, :, None], gain[..., None, None, :]
    beyond = (near <= x) & (far > x)
    share = np.where(beyond, (x - near) / np.where(beyond, far - near, 1.0), 1.0)
    reached = np.where(near <= x, here + (there - here) * share, -np.inf).max((-1, -2))
    steps = np.diff(ends) * (reached[..., 1:] + reached[..., :-1]) / 2
    return np.asarray(steps.sum(-1) - REFERENCE_GAIN * budget)


class Drawn(NamedTuple):
    """Points of every method, first as found and then of bootstrap draws over prompts: (1 + draws, points) by name."""

    methods: list[str]
    factors: list[float]
    kl: dict[tuple[str, str], Float[np.ndarray, "draws factors"]]
    gain: dict[tuple[str, str], Float[np.ndarray, "draws factors"]]
    n_texts: int

    @property
    def fronts(self) -> list[str]:
        """The rewards, and the worst-served group."""
        return list(dict.fromkeys(front for _, front in self.kl))

    def budget(self, front: str) -> float:
        """The largest KL that every method reaches, nats."""
        return min(float(self.kl[method, front][0].max()) for method in self.methods)


def drawn_points(texts: pd.DataFrame, base: pd.DataFrame) -> Drawn:
    """Mean gain and KL of every method, group and factor, and their bootstrap draws over prompts, all seeds together.

    The worst-served group is that of the smallest gain at each factor (in each draw); its KL is the mean over the groups.

    Parameters
    ----------
    texts : as `served_texts` gives it. base : as `base_rewards`.

    Raises
    ------
    ValueError : methods that wrote on other prompts, or not at each factor; the first gap is named.
    """
    keys = ["method", "group", "factor"]
    wide = texts.pivot_table(index="prompt_id", columns=keys, values=["reward", "kl"])
    methods, groups = (list(dict.fromkeys(texts[name])) for name in keys[:2])
    factors = sorted(texts["factor"].unique())
    cells = pd.MultiIndex.from_product([["reward", "kl"], methods, groups, factors])
    wide = wide.reindex(columns=cells)
    gaps = wide.isna().stack([0, 1, 2, 3], future_stack=True)
    if gaps.any():
        prompt, _, *cell = gaps.idxmax()
        place = ", ".join(f"{name} {value}" for name, value in zip(keys, cell, strict=True))
        raise ValueError(f"{place}: no text on prompt {prompt}; expected one of every method")
    own = base.groupby("prompt_id")[groups].mean().reindex(wide.index)
    both = np.concatenate([wide.to_numpy(), own.to_numpy()], 1)
    means = np.concatenate([np.nanmean(both, 0)[None], bootstrap_means(both)])
    shape = (len(means), len(methods), len(groups), len(factors))
    n = len(cells) // 2
    reward, kl = (means[:, part].reshape(shape) for part in (slice(n), slice(n, 2 * n)))
    spread = base[groups].std().to_numpy()[:, None]
    gain = (reward - means[:, 2 * n :][:, None, :, None]) / spread
    by_kl, by_gain = {}, {}
    for m, method in enumerate(methods):
        for g, group in enumerate(groups):
            by_kl[method, group], by_gain[method, group] = kl[:, m, g], gain[:, m, g]
        by_kl[method, WORST], by_gain[method, WORST] = kl[:, m].mean(1), gain[:, m].min(1)
    sizes = texts.groupby(keys).size()
    return Drawn(methods, factors, by_kl, by_gain, int(sizes.min()))


def front_points(drawn: Drawn) -> pd.DataFrame:
    """method, front (a reward or "worst"), factor, kl (nats a text), gain, low, high (standard deviations), n (texts)."""
    rows = []
    for (method, front), gain in drawn.gain.items():
        for i, factor in enumerate(drawn.factors):
            low, high = interval(gain[1:, i])
            at = {"method": method, "front": front, "factor": factor}
            found = {"kl": drawn.kl[method, front][0, i], "gain": gain[0, i]}
            rows.append({**at, **found, "low": low, "high": high, "n": drawn.n_texts})
    return pd.DataFrame(rows)


def hypervolumes(drawn: Drawn, baseline: str = "dpo") -> pd.DataFrame:
    """The hypervolume of every front up to the KL that all methods reach, as a ratio to the baseline's.

    Returns
    -------
    method, front, budget (nats), hypervolume (nats times standard deviations), ratio, low, high (percentile interval of
    95 %), p (paired bootstrap, of a ratio of 1), p_holm (corrected over all rows but the baseline's, whose are 1).
    """
    rows = []
    for front in drawn.fronts:
        budget = drawn.budget(front)
        areas = {
            m: hypervolume(drawn.kl[m, front], drawn.gain[m, front], budget) for m in drawn.methods
        }
        for method, area in areas.items():
            ratio = area / areas[baseline]
            low, high = interval(ratio[1:])
            at = {"method": method, "front": front, "budget": budget, "hypervolume": area[0]}
            found = {"ratio": ratio[0], "low": low, "high": high}
            rows.append({**at, **found, "p": bootstrap_p(ratio[1:] - 1)})
    table = pd.DataFrame(rows).assign(p_holm=1.0)
    other = table["method"] != baseline
    table.loc[other, "p_holm"] = holm(table.loc[other, "p"].to_numpy())
    return table


def win_rates(texts: pd.DataFrame, baseline: str = "dpo", factor: float = 1.0) -> pd.DataFrame:
    """How often a method's text has more of the reader's own reward than the baseline's on the same prompt.

    Of each method and group the strongest point that is no further from the base than the baseline's at `factor` (the
    weakest, where all are). Ties count half.

    Returns
    -------
    method, group, factor, kl, kl_baseline (nats a text), win_rate, low, high (shares; percentile interval of 95 % over
    prompts), n (pairs of texts).

    Raises
    ------
    ValueError : the baseline wrote nothing at that factor.
    """
    at = texts[(texts["method"] == baseline) & (texts["factor"] == factor)]
    if at.empty:
        found = sorted(set(texts.loc[texts["method"] == baseline, "factor"]))
        raise ValueError(f"{baseline} at factor {factor}: no texts; it wrote at {found}")
    same = ["seed", "group", "number", "prompt_id"]
    limits = at.groupby("group")["kl"].mean()
    others = texts[texts["method"] != baseline]
    rows = []
    for (method, group), part in others.groupby(["method", "group"], sort=False):
        reached = part.groupby("factor")["kl"].mean()
        within = reached.index[reached <= limits[group]]
        chosen = within.max() if len(within) else reached.index.min()
        both = part[part["factor"] == chosen].merge(at, on=same, suffixes=("", "_baseline"))
        wins = np.sign(both["reward"] - both["reward_baseline"]) / 2 + 0.5
        by_prompt = wins.groupby(both["prompt_id"]).mean().to_numpy()[:, None]
        low, high = interval(bootstrap_means(by_prompt)[:, 0])
        rows.append(
            {
                "method": method,
                "group": group,
                "factor": chosen,
                "kl": reached[chosen],
                "kl_baseline": limits[group],
                "win_rate": by_prompt.mean(),
                "low": low,
                "high": high,
                "n": len(both),
            }
        )
    return pd.DataFrame(rows)
