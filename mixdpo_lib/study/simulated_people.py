"""Who prefers what, how noisily? Users who follow hidden rewards."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset, DatasetDict
from jaxtyping import Float
from scipy.optimize import brentq

from ..store import hash_seed
from .candidates import split_prompts

# Each group has its typical genre, in this order; a design of G groups knows max(2, G) of them.
GENRES = ("drama", "comedy", "thriller", "western", "musical", "documentary")
AGE_BANDS = ("18-34", "35-54", "55+")


@dataclass(frozen=True)
class DesignConfig:
    """Who labels which pairs. The design decides the outcome of a study: state it with numbers.

    Raises
    ------
    ValueError : a name that there is not, or a flip_rate outside 0 ... 0.5.
    """

    name: str = (
        "default"  # "default": random pairs, noisy labels; "clean": best against worst, no noise
    )
    n_users: int = 60  # training users, divided evenly over the groups
    n_new_users: int = 15
    pairs_per_user: int = (
        200  # labelled on training prompts; more labels cost little, the texts are shared
    )
    validation_pairs_per_user: int = 40  # labelled on validation prompts, with the same noise
    context_pairs: int = 16  # pairs of each new user, on training prompts
    flip_rate: float = (
        0.10  # mean probability that a label goes against the reward; sets label_temperature
    )
    metadata_accuracy: float = (
        0.60  # how often the favourite genre is the one typical of the user's group
    )
    seed: int = 0

    def __post_init__(self) -> None:
        if self.name not in ("default", "clean"):
            raise ValueError(f"design name={self.name!r}: possible are 'default' and 'clean'")
        if not 0 <= self.flip_rate < 0.5:
            raise ValueError(
                f"flip_rate={self.flip_rate}: expected at least 0 and below 0.5 (0 is no noise)"
            )


def label_temperature(differences: np.ndarray, flip_rate: float) -> float:
    """The temperature at which mean sigma(-|difference| / temperature) over random pairs is `flip_rate`.

    >>> round(label_temperature(np.array([1.0, -1.0]), 0.25), 4)       # sigma(-1/t) = 1/4: t = 1 / log 3
    0.9102
    """
    size = np.abs(differences[differences != 0])
    if flip_rate == 0 or len(size) == 0:
        return 0.0
    return float(
        brentq(
            lambda t: np.mean(1 / (1 + np.exp(np.minimum(size / t, 700)))) - flip_rate, 1e-9, 1e6
        )
    )


def is_flipped(gap: float, temperature: float, rng: np.random.Generator | None) -> bool:
    """Whether a label goes against the reward: with probability sigma(-gap / temperature).

    Source: Bradley and Terry 1952, with rewards in units of the temperature.

    Parameters
    ----------
    gap : by how much the better answer is better, above 0, in the unit of the reward.
    temperature : in that unit; 0 is no noise. See `label_temperature`.
    rng : gives one number where there is noise; None: no noise.
    """
    if rng is None or temperature == 0:
        return False
    return bool(rng.random() < 1 / (1 + math.exp(min(gap / temperature, 700))))


def untied_pairs(
    scores: Float[np.ndarray, "candidates"], ids: Sequence[int], clean: bool = False
) -> list[tuple[int, int]]:
    """Candidate pairs of one prompt, better first: all untied pairs, or only best against worst.

    Parameters
    ----------
    scores : of all candidates. ids : of those of the prompt. clean : only best against worst.

    >>> untied_pairs(np.array([0.0, 2.0, 1.0]), [0, 1, 2])
    [(1, 0), (2, 0), (1, 2)]
    >>> untied_pairs(np.array([0.0, 2.0, 1.0]), [0, 1, 2], clean=True)
    [(1, 0)]
    """
    if len(ids) < 2:
        return []
    if clean:
        best, worst = max(ids, key=lambda i: scores[i]), min(ids, key=lambda i: scores[i])
        return [(best, worst)] if scores[best] > scores[worst] else []
    both = itertools.combinations(ids, 2)
    ordered = [(a, b) if scores[a] > scores[b] else (b, a) for a, b in both]
    return [(a, b) for a, b in ordered if scores[a] != scores[b]]


def _group_values(scores: pd.DataFrame, n_candidates: int) -> dict[str, np.ndarray]:
    """The hidden reward of every candidate by group: the columns of `scores`, checked."""
    names = [str(name) for name in scores.columns]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"scores: found the columns {names}, expected one a group, each once")
    values = {}
    for group, column in zip(names, scores.columns, strict=True):
        if not pd.api.types.is_numeric_dtype(scores[column]):
            raise ValueError(
                f"scores: column {group!r} is not of numbers ({scores[column].dtype}); every "
                "column is a group and its reward: leave out the others"
            )
        values[group] = scores[column].to_numpy(float)
        bad = np.flatnonzero(~np.isfinite(values[group]))
        if len(bad):
            raise ValueError(
                f"scores: row {bad[0]}, column {group!r} is not a finite number; score that text "
                "again"
            )
    if len(scores) != n_candidates:
        raise ValueError(
            f"scores has {len(scores)} rows, candidates {n_candidates}: one row a candidate "
            "expected"
        )
    return values


class _World:
    """What can be asked and how it is answered: candidate pairs by group and split, and the noise of the labels."""

    def __init__(
        self,
        candidates: pd.DataFrame,
        scores: pd.DataFrame,
        config: DesignConfig,
        splits: Mapping[str, range] | None = None,
    ) -> None:
        self.values = _group_values(scores, len(candidates))
        self.groups = list(self.values)
        clean = config.name == "clean"
        by_prompt = {
            i: rows.tolist() for i, rows in candidates.groupby("prompt_id").indices.items()
        }
        self.splits = split_prompts(int(candidates["prompt_id"].max()) + 1)
        if splits is not None:
            self.splits = {name: splits.get(name, range(0)) for name in self.splits}
        self.pairs = {
            (group, split): [
                pair for i in prompts for pair in untied_pairs(value, by_prompt.get(i, []), clean)
            ]
            for group, value in self.values.items()
            for split, prompts in self.splits.items()
        }
        self.temperatures = {}  # of the labels, by group
        for group, value in self.values.items():
            difference = np.array([value[a] - value[b] for a, b in self.pairs[group, "train"]])
            rate = 0.0 if clean else config.flip_rate
            self.temperatures[group] = label_temperature(difference, rate)
        self.text, self.prompt = candidates["response"].to_list(), candidates["prompt"].to_list()
        self.prompt_id = candidates["prompt_id"].to_list()

    def row(
        self,
        group: str,
        user: dict[str, str],
        better: int,
        worse: int,
        rng: np.random.Generator | None,
    ) -> dict[str, Any]:
        """One answered comparison; without a generator, or in a clean design, there is no noise."""
        gap = self.values[group][better] - self.values[group][worse]
        flipped = is_flipped(gap, self.temperatures[group], rng)
        chosen, rejected = (worse, better) if flipped else (better, worse)
        return {
            "prompt": self.prompt[better],
            "chosen": self.text[chosen],
            "rejected": self.text[rejected],
            "ended": False,
            **user,
            "group": group,
            "prompt_id": int(self.prompt_id[better]),
            "flipped": flipped,
            "gap": gap,
        }


def simulate_preferences(
    candidates: pd.DataFrame,
    scores: pd.DataFrame,
    config: DesignConfig,
    splits: Mapping[str, range] | None = None,
) -> DatasetDict:
    """Preference sets of simulated users, each of whom follows one hidden reward.

    Parameters
    ----------
    candidates : table of `sample_candidates`; prompts in random order.
    scores : one column a group, named as it; one row a candidate (training judges); finite.
    config : the design. A user of the default one meets random untied pairs and answers by Bradley-Terry,
        p(better chosen) = sigma(difference / label_temperature); `flip_rate` sets the temperature of each reward.
    splits : prompts of train, validation and test, by number; `split_prompts` by default. An absent one is empty.

    Returns
    -------
    train : pairs of the training users on training prompts.
    validation : the same users and noise, validation prompts.
    context : pairs of new users on training prompts.
    test : noise-free labels of each group on test prompts, no users: a user is scored on its group's rows.

    Users are divided evenly over the groups. `genre` is typical of a user's group with probability
    `metadata_accuracy`, else one of the other genres (see GENRES); `age_band` says nothing.

    Raises
    ------
    ValueError : scores that are not one column of finite numbers a group, more groups than genres,
        or too few pairs.
    """
    world = _World(candidates, scores, config, splits)
    if len(world.groups) > len(GENRES):
        raise ValueError(
            f"scores: found {len(world.groups)} groups, expected at most {len(GENRES)}, for each "
            "has a typical genre; give fewer columns, or add to GENRES"
        )
    genres = GENRES[: max(2, len(world.groups))]
    rng = np.random.default_rng(hash_seed(config.seed, "users", config.name))
    pairs, splits = world.pairs, world.splits

    rows: dict[str, list[dict[str, Any]]] = {
        "train": [],
        "validation": [],
        "context": [],
        "test": [],
    }
    for kind, count in (("user", config.n_users), ("new", config.n_new_users)):
        for n in range(count):
            place = n % len(world.groups)
            group = world.groups[place]
            typical = rng.random() < config.metadata_accuracy
            away = 0 if typical else 1 + int(rng.integers(len(genres) - 1))
            genre = genres[(place + away) % len(genres)]
            user = {
                "user": f"{kind}{n:03d}",
                "genre": genre,
                "age_band": str(rng.choice(AGE_BANDS)),
            }
            wanted = [("context", "train", config.context_pairs)]
            if kind == "user":
                wanted = [
                    ("train", "train", config.pairs_per_user),
                    ("validation", "validation", config.validation_pairs_per_user),
                ]
            for name, split, size in wanted:
                pool = pairs[group, split]
                if size > len(pool):
                    raise ValueError(
                        f"design {config.name!r}: {size} {name} pairs a user wanted, but group {group!r} has only "
                        f"{len(pool)} untied pairs on {len(splits[split])} {split} prompts: sample more prompts"
                    )
                for chosen in rng.choice(len(pool), size, replace=False):
                    better, worse = pool[chosen]
                    rows[name].append(world.row(group, user, better, worse, rng))
    for group in world.groups:
        nobody = {"user": "", "genre": "", "age_band": ""}
        rows["test"] += [world.row(group, nobody, a, b, None) for a, b in pairs[group, "test"]]
    out = DatasetDict({name: Dataset.from_list(part) for name, part in rows.items()})
    for part in out.values():
        part.info.description = json.dumps(
            {"design": asdict(config), "label_temperature": world.temperatures}
        )
    return out


def simulate_blends(
    candidates: pd.DataFrame,
    scores: pd.DataFrame,
    config: DesignConfig,
    n_users: int,
    test_pairs: int = 40,
    splits: Mapping[str, range] | None = None,
) -> DatasetDict:
    """Blended users: one of two rewards of theirs answers each comparison, with equal chance.

    Parameters
    ----------
    config : the design; `context_pairs` of each user on training prompts.
    test_pairs : of each user on test prompts, answered in the same way, noise included.
    splits : as in `simulate_preferences`.

    Returns
    -------
    context, test : as in `simulate_preferences`; `group` is the reward that answered, `blend` the user's two.

    Raises
    ------
    ValueError : fewer than two groups, scores as in `simulate_preferences`, or no pairs of a group.
    """
    world = _World(candidates, scores, config, splits)
    if len(world.groups) < 2:
        raise ValueError(
            f"scores: found one group ({world.groups[0]}), expected two or more to blend"
        )
    rng = np.random.default_rng(hash_seed(config.seed, "blends", config.name))
    blends = list(itertools.combinations(world.groups, 2))
    rows: dict[str, list[dict[str, Any]]] = {"context": [], "test": []}
    for n in range(n_users):
        blend = blends[n % len(blends)]
        user = {"user": f"blend{n:03d}", "blend": " and ".join(blend)}
        for name, split, size in (
            ("context", "train", config.context_pairs),
            ("test", "test", test_pairs),
        ):
            for _ in range(size):
                group = blend[int(rng.integers(2))]
                pool = world.pairs[group, split]
                if not pool:
                    raise ValueError(f"no untied {split} pairs for {group!r}: sample more prompts")
                better, worse = pool[int(rng.integers(len(pool)))]
                rows[name].append(world.row(group, user, better, worse, rng))
    return DatasetDict({name: Dataset.from_list(part) for name, part in rows.items()})
