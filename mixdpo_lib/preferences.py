"""Which of two texts does this user prefer? Prompts, candidates, users, pairs and splits.

Preference data are `Dataset`s in the explicit-prompt form: prompt, chosen, rejected [, user, group, ended,
metadata]. `group` is the hidden truth of simulated users: evaluation and the oracle alone may read it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import torch
from datasets import Dataset, DatasetDict
from scipy.optimize import brentq

from .decoding import sample
from .experts import reference_next_token
from .features import TEXT_COLUMNS, check_preferences
from .sources import Base
from .store import cache_folder, cached, progress

VERSION = 1
GROUPS = ("sentiment", "informativeness", "grammar")
GENRES = ("drama", "comedy", "thriller")


@dataclass(frozen=True)
class CandidateConfig:
    """How prompts are cut and candidates sampled."""

    n_prompts: int = 700  # 70 % train, 10 % validation, 20 % test
    prompt_tokens: int = 10  # at most; cut back to a whole word
    response_tokens: int = 24  # with the prompt about 27 words: long enough to judge, short enough for a laptop
    n_candidates: int = 4  # six pairs a prompt
    batch_size: int = 192
    seed: int = 0


@dataclass(frozen=True)
class DesignConfig:
    """Who labels which pairs. The design decides the outcome of a study: state it with every number."""

    name: str = "default"  # "default": random pairs, noisy labels; "clean": best against worst, no noise
    n_users: int = 60  # training users, divided evenly over the groups
    n_new_users: int = 15
    pairs_per_user: int = 200  # labelled on training prompts; more labels cost little, the texts are shared
    validation_pairs_per_user: int = 40  # labelled on validation prompts, with the same noise
    context_pairs: int = 16  # pairs of each new user, on training prompts
    flip_rate: float = 0.10  # mean probability that a label goes against the reward; sets label_temperature
    metadata_accuracy: float = 0.60  # how often the favourite genre is the one typical of the user's group
    seed: int = 0

    def __post_init__(self) -> None:
        if self.name not in ("default", "clean"):
            raise ValueError(f"design name={self.name!r}: possible are 'default' and 'clean'")
        if not 0 <= self.flip_rate < 0.5:
            raise ValueError(f"flip_rate={self.flip_rate}: expected at least 0 and below 0.5 (0 is no noise)")


def review_prompts(base: Base, texts: Sequence[str], config: CandidateConfig) -> list[str]:
    """The first tokens of reviews, cut back to whole words, distinct, in random order (seeded)."""
    order = np.random.default_rng(config.seed).permutation(len(texts))
    prompts: dict[str, None] = {}
    for i in order:
        ids = base.tokenizer(texts[i][:400], add_special_tokens=False)["input_ids"][: config.prompt_tokens + 1]
        if len(ids) <= config.prompt_tokens:
            continue
        words = str(base.tokenizer.decode(ids)).split(" ")[:-1]
        prompt = " ".join(words).strip()
        if len(words) >= 4:
            prompts.setdefault(prompt)
        if len(prompts) == config.n_prompts:
            return list(prompts)
    raise ValueError(
        f"only {len(prompts)} distinct prompts of {config.prompt_tokens} tokens in {len(texts)} reviews, "
        f"n_prompts={config.n_prompts} wanted: give more reviews or ask for fewer prompts"
    )


def sample_candidates(base: Base, prompts: Sequence[str], config: CandidateConfig) -> pd.DataFrame:
    """`n_candidates` continuations of each prompt, sampled from the base at temperature 1, untruncated.

    Returns a table: prompt_id, candidate, prompt, response (keeps its leading space), ended.
    """
    parameters = {**asdict(config), "base": base.fingerprint, "prompts": list(prompts)}

    def build(folder: Path) -> None:
        ids = [base.tokenizer(p, add_special_tokens=False)["input_ids"] for p in prompts]
        for prompt, tokens in zip(prompts, ids, strict=True):
            if len(tokens) + config.response_tokens > base.context:
                raise ValueError(
                    f"prompt of {len(tokens)} tokens leaves no room for {config.response_tokens} response tokens in "
                    f"the context of {base.name} ({base.context}). It begins: {prompt[:60]!r}"
                )
        jobs = [(i, c) for i in range(len(prompts)) for c in range(config.n_candidates)]
        rows = []
        for start in range(0, len(jobs), config.batch_size):
            part = jobs[start : start + config.batch_size]
            generator = torch.Generator().manual_seed(hash_seed(config.seed, "candidates", start))
            out = sample(
                reference_next_token(base), [ids[i] for i, _ in part], config.response_tokens,
                eos_token_id=base.eos_token_id, generator=generator,
                progress=partial(_report, start, len(part), len(jobs)),
            )  # fmt: skip
            for (i, c), tokens, ended in zip(part, out.tokens, out.ended, strict=True):
                text = base.tokenizer.decode(tokens)
                rows.append({"prompt_id": i, "candidate": c, "prompt": prompts[i], "response": text, "ended": ended})
        pd.DataFrame(rows).to_json(folder / "candidates.jsonl", orient="records", lines=True)

    folder = cached("candidates", VERSION, parameters, build)
    table = pd.read_json(folder / "candidates.jsonl", orient="records", lines=True, dtype=False, convert_dates=False)
    return table


def _report(start: int, rows: int, total: int, done: int, of: int) -> None:
    progress("candidates", start + rows * done // of, total, "texts")


def hash_seed(*parts: Any) -> int:
    """One integer seed, split by stage name: a 31-bit number that depends on every part."""
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:4], "big") >> 1


def split_prompts(n_prompts: int) -> dict[str, range]:
    """Prompts 0 ... n-1 (already in random order) as train (70 %), validation (10 %), test (20 %)."""
    a, b = round(0.7 * n_prompts), round(0.8 * n_prompts)
    return {"train": range(0, a), "validation": range(a, b), "test": range(b, n_prompts)}


def usable(candidates: pd.DataFrame) -> pd.DataFrame:
    """Candidates that can be judged: a blank response has no words, a repeated one no rival. Says how many went."""
    words = candidates["response"].str.contains(r"[A-Za-z]{2}")
    repeated = candidates.duplicated(["prompt_id", "response"])
    gone = int((~words | repeated).sum())
    if gone:
        progress("usable candidates", len(candidates) - gone, len(candidates), f"{gone} without words or repeated")
    return candidates[words & ~repeated].reset_index(drop=True)


def label_temperature(differences: np.ndarray, flip_rate: float) -> float:
    """The temperature at which mean sigma(-|difference| / temperature) over random pairs is `flip_rate`.

    >>> round(label_temperature(np.array([1.0, -1.0]), 0.25), 4)       # sigma(-1/t) = 1/4: t = 1 / log 3
    0.9102
    """
    size = np.abs(differences[differences != 0])
    if flip_rate == 0 or len(size) == 0:
        return 0.0
    return float(brentq(lambda t: np.mean(1 / (1 + np.exp(np.minimum(size / t, 700)))) - flip_rate, 1e-9, 1e6))


def _pairs_of(scores: np.ndarray, ids: Sequence[int], clean: bool) -> list[tuple[int, int]]:
    """Candidate pairs of one prompt, better first: all untied pairs, or only best against worst."""
    if len(ids) < 2:
        return []
    if clean:
        best, worst = max(ids, key=lambda i: scores[i]), min(ids, key=lambda i: scores[i])
        return [(best, worst)] if scores[best] > scores[worst] else []
    ordered = [(a, b) if scores[a] > scores[b] else (b, a) for a, b in itertools.combinations(ids, 2)]
    return [(a, b) for a, b in ordered if scores[a] != scores[b]]


class _World:
    """What can be asked and how it is answered: candidate pairs by group and split, and the noise of the labels."""

    def __init__(
        self, candidates: pd.DataFrame, scores: pd.DataFrame, config: DesignConfig,
        splits: Mapping[str, range] | None = None,
    ) -> None:  # fmt: skip
        for group in GROUPS:
            if group not in scores:
                raise ValueError(f"scores: column {group!r} is missing, found {list(scores.columns)}")
            bad = np.flatnonzero(~np.isfinite(scores[group].to_numpy(float)))
            if len(bad):
                raise ValueError(
                    f"scores: row {bad[0]}, column {group!r} is not a finite number; score that text again"
                )
        if len(scores) != len(candidates):
            raise ValueError(
                f"scores has {len(scores)} rows, candidates {len(candidates)}: one row a candidate expected"
            )
        self.clean = config.name == "clean"
        by_prompt = {i: rows.tolist() for i, rows in candidates.groupby("prompt_id").indices.items()}
        self.splits = split_prompts(int(candidates["prompt_id"].max()) + 1)
        if splits is not None:
            self.splits = {name: splits.get(name, range(0)) for name in self.splits}
        self.values: dict[str, np.ndarray] = {g: scores[g].to_numpy(float) for g in GROUPS}
        self.pairs = {
            (g, s): [p for i in self.splits[s] for p in _pairs_of(self.values[g], by_prompt.get(i, []), self.clean)]
            for g in GROUPS for s in self.splits  # every group, every split
        }  # fmt: skip
        self.temperatures = {}
        for g in GROUPS:
            difference = np.array([self.values[g][a] - self.values[g][b] for a, b in self.pairs[g, "train"]])
            self.temperatures[g] = 0.0 if self.clean else label_temperature(difference, config.flip_rate)
        self.text, self.prompt = candidates["response"].to_list(), candidates["prompt"].to_list()
        self.prompt_id = candidates["prompt_id"].to_list()

    def row(
        self, group: str, user: dict[str, str], better: int, worse: int, rng: np.random.Generator | None
    ) -> dict[str, Any]:
        """One answered comparison; without a generator, or in a clean design, there is no noise."""
        gap, t = self.values[group][better] - self.values[group][worse], self.temperatures[group]
        noisy = rng is not None and not self.clean and t > 0
        flipped = bool(noisy and rng.random() < 1 / (1 + math.exp(min(gap / t, 700))))  # type: ignore[union-attr]
        chosen, rejected = (worse, better) if flipped else (better, worse)
        return {
            "prompt": self.prompt[better], "chosen": self.text[chosen], "rejected": self.text[rejected],
            "ended": False, **user, "group": group, "prompt_id": int(self.prompt_id[better]), "flipped": flipped,
            "gap": gap,
        }  # fmt: skip


def simulate_preferences(
    candidates: pd.DataFrame, scores: pd.DataFrame, config: DesignConfig, splits: Mapping[str, range] | None = None
) -> DatasetDict:
    """Preference sets of simulated users, each of whom follows one hidden reward.

    Parameters
    ----------
    candidates : table of `sample_candidates`; prompts in random order.
    scores : one column a group, one row a candidate (training judges); finite.
    config : the design. A user of the default one meets random untied pairs and answers by Bradley-Terry,
        p(better chosen) = sigma(difference / label_temperature); `flip_rate` sets the temperature of each reward.
    splits : prompts of train, validation and test, by number; `split_prompts` by default. An absent one is empty.

    Returns
    -------
    train : pairs of the training users on training prompts.
    validation : the same users and noise, validation prompts.
    context : pairs of new users on training prompts.
    test : noise-free labels of each group on test prompts, no users: a user is scored on its group's rows.
    """
    world = _World(candidates, scores, config, splits)
    rng = np.random.default_rng(hash_seed(config.seed, "users", config.name))
    pairs, splits = world.pairs, world.splits

    rows: dict[str, list[dict[str, Any]]] = {"train": [], "validation": [], "context": [], "test": []}
    for kind, count in (("user", config.n_users), ("new", config.n_new_users)):
        for n in range(count):
            place = n % len(GROUPS)
            group = GROUPS[place]
            typical = rng.random() < config.metadata_accuracy
            genre = GENRES[place] if typical else GENRES[(place + 1 + int(rng.integers(2))) % 3]
            user = {"user": f"{kind}{n:03d}", "genre": genre, "age_band": str(rng.choice(["18-34", "35-54", "55+"]))}
            wanted = [("context", "train", config.context_pairs)]
            if kind == "user":
                wanted = [("train", "train", config.pairs_per_user),
                          ("validation", "validation", config.validation_pairs_per_user)]  # fmt: skip
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
    for group in GROUPS:
        nobody = {"user": "", "genre": "", "age_band": ""}
        rows["test"] += [world.row(group, nobody, a, b, None) for a, b in pairs[group, "test"]]
    out = DatasetDict({name: Dataset.from_list(part) for name, part in rows.items()})
    for part in out.values():
        part.info.description = json.dumps({"design": asdict(config), "label_temperature": world.temperatures})
    return out


def simulate_blends(
    candidates: pd.DataFrame, scores: pd.DataFrame, config: DesignConfig, n_users: int, test_pairs: int = 40
) -> DatasetDict:
    """Blended users: each comparison is answered by one of two rewards of theirs, drawn anew with equal chance.

    Parameters
    ----------
    config : the design; `context_pairs` of each user on training prompts.
    test_pairs : of each user on test prompts, answered in the same way, noise included.

    Returns
    -------
    context, test : as in `simulate_preferences`; `group` is the reward that answered, `blend` the user's two.
    """
    world = _World(candidates, scores, config)
    rng = np.random.default_rng(hash_seed(config.seed, "blends", config.name))
    blends = list(itertools.combinations(GROUPS, 2))
    rows: dict[str, list[dict[str, Any]]] = {"context": [], "test": []}
    for n in range(n_users):
        blend = blends[n % len(blends)]
        user = {"user": f"blend{n:03d}", "blend": " and ".join(blend)}
        for name, split, size in (("context", "train", config.context_pairs), ("test", "test", test_pairs)):
            for _ in range(size):
                group = blend[int(rng.integers(2))]
                pool = world.pairs[group, split]
                if not pool:
                    raise ValueError(f"no untied {split} pairs for {group!r}: sample more prompts")
                better, worse = pool[int(rng.integers(len(pool)))]
                rows[name].append(world.row(group, user, better, worse, rng))
    return DatasetDict({name: Dataset.from_list(part) for name, part in rows.items()})


# ------------------------------------------------------------------------------------------- tables about the designs


def preference_counts(sets: Mapping[str, DatasetDict]) -> pd.DataFrame:
    """Pairs, users and prompts of every part of every design, and the share of labels against the user's reward."""
    rows = [
        {"design": design, "part": name, "pairs": len(part), "users": len(set(part["user"]) - {""}),
         "prompts": len(set(part["prompt_id"])), "flipped": float(np.mean(part["flipped"]))}
        for design, parts in sets.items() for name, part in parts.items()
    ]  # fmt: skip
    return pd.DataFrame(rows)


def label_temperatures(sets: Mapping[str, DatasetDict]) -> pd.DataFrame:
    """The label temperature of each reward (in its own unit) in each design; 0 is no noise."""
    kept = {design: json.loads(parts["train"].info.description) for design, parts in sets.items()}
    return pd.DataFrame(
        [
            {"design": d, "group": g, "label_temperature": t}
            for d, k in kept.items()
            for g, t in k["label_temperature"].items()
        ]
    )


def score_differences(sets: Mapping[str, DatasetDict], scores: pd.DataFrame) -> pd.DataFrame:
    """Score of chosen minus rejected of every training pair, in standard deviations of the user's own reward."""
    parts = []
    for design, data in sets.items():
        part = pd.DataFrame({c: data["train"][c] for c in ("group", "gap", "flipped")})
        sign = np.where(part["flipped"], -1.0, 1.0)
        part["score_difference"] = sign * part["gap"] / part["group"].map(scores.std())
        parts.append(part.assign(design=design)[["design", "group", "score_difference"]])
    return pd.concat(parts, ignore_index=True)


def group_agreement(candidates: pd.DataFrame, scores: pd.DataFrame) -> pd.DataFrame:
    """On what share of all untied candidate pairs of a prompt two groups prefer the same answer."""
    signs: dict[str, list[float]] = {g: [] for g in GROUPS}
    for rows in candidates.groupby("prompt_id").indices.values():
        for a, b in itertools.combinations(rows, 2):
            for g in GROUPS:
                signs[g].append(float(np.sign(scores[g].iat[a] - scores[g].iat[b])))
    table = pd.DataFrame(signs)
    out = []
    for a in GROUPS:
        for b in GROUPS:
            untied = (table[a] != 0) & (table[b] != 0)
            share = (table[a] == table[b])[untied].mean()
            out.append({"group_a": a, "group_b": b, "agreement": share, "n_pairs": int(untied.sum())})
    return pd.DataFrame(out)


# -------------------------------------------------------------------------------------------------- people's own data


def _read_table(file: Path, kind: str) -> Dataset:
    try:
        place = str(cache_folder() / "datasets")
        return datasets.load_dataset(kind, data_files=str(file), split="train", cache_dir=place)
    except Exception as error:  # of datasets, pyarrow or pandas: the cause says more than the error itself
        said = (str(error.__cause__ or error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{file}: not readable as {file.suffix} ({said}); expected one row a pair with text in the columns "
            f"{', '.join(TEXT_COLUMNS)}"
        ) from error


def explicit_prompts(data: Dataset, place: str = "preference set") -> Dataset:
    """The same pairs with text in `prompt`, `chosen`, `rejected`; other columns stay.

    Three more forms of TRL are read: without a column `prompt` (what both answers begin with is the prompt; a space
    before the difference belongs to the answers), and conversations of one message of the user and one of the
    assistant, with or without `prompt`.

    Raises
    ------
    ValueError : a conversation of another shape, answers without a common beginning; the row is named.

    >>> explicit_prompts(Dataset.from_list([{"chosen": "A film that moves.", "rejected": "A film that bores."}]))[0]
    {'prompt': 'A film that', 'chosen': ' moves.', 'rejected': ' bores.'}
    """
    names = set(data.column_names)
    if not {"chosen", "rejected"} <= names or len(data) == 0:
        return data
    first = data[0]
    if "prompt" in names and not isinstance(first["chosen"], list):
        return data

    def texts(row: dict[str, Any], i: int) -> dict[str, str]:
        chosen, rejected, prompt = row["chosen"], row["rejected"], row.get("prompt")
        if isinstance(chosen, list):
            sides = []
            for side in (chosen, rejected):
                messages = [*(prompt or []), *(side or [])]
                roles = [message.get("role") for message in messages]
                if roles != ["user", "assistant"]:
                    raise ValueError(f"{place}: row {i}: found messages of {roles}, expected one of the user and one "
                                     "of the assistant; write longer conversations as text")  # fmt: skip
                sides.append([message["content"] for message in messages])
            if sides[0][0] != sides[1][0]:
                raise ValueError(f"{place}: row {i}: chosen and rejected answer different prompts")
            return {"prompt": sides[0][0], "chosen": sides[0][1], "rejected": sides[1][1]}
        if not isinstance(chosen, str) or not isinstance(rejected, str):
            raise ValueError(f"{place}: row {i}: no column 'prompt', and answers that are no text; give three texts")
        n = next((j for j, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b),
                 min(len(chosen), len(rejected)))  # fmt: skip
        n -= int(n > 0 and chosen[n - 1] == " ")
        if not chosen[:n].strip():
            raise ValueError(f"{place}: row {i}: no column 'prompt', and the answers have no common beginning that "
                             "could be it; give the prompt")  # fmt: skip
        return {"prompt": chosen[:n], "chosen": chosen[n:], "rejected": rejected[n:]}

    own = [texts(row, i) for i, row in enumerate(data)]  # type: ignore[arg-type]
    rest = data.remove_columns([c for c in ("prompt", "chosen", "rejected") if c in names])
    columns = {name: [row[name] for row in own] for name in ("prompt", "chosen", "rejected")}
    return Dataset.from_dict({**columns, **{name: rest[name] for name in rest.column_names}})


def load_preferences(path: str | Path, columns: Sequence[str] = ()) -> DatasetDict:
    """Read preference sets: a folder of `save_to_disk`, a file, or a folder of parquet, jsonl, csv or arrow files.

    The forms that TRL reads and writes are read too, see `explicit_prompts`.

    Raises
    ------
    FileNotFoundError : nothing readable there. ValueError : a bad row, see `check_preferences`.
    """
    folder = Path(path)
    found: dict[str, Dataset] = {}
    if (folder / "dataset_dict.json").is_file():
        found = dict(datasets.load_from_disk(str(folder)))
    elif (folder / "dataset_info.json").is_file():
        found = {"train": datasets.load_from_disk(str(folder))}
    else:
        kinds = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".arrow": "arrow"}
        files = [folder] if folder.is_file() else sorted(folder.glob("*")) if folder.is_dir() else []
        for file in files:
            if file.suffix in kinds:
                name = "train" if folder.is_file() else file.stem
                found[name] = _read_table(file, kinds[file.suffix])
    if not found:
        raise FileNotFoundError(
            f"{folder}: no preference data found; expected a folder saved with save_to_disk, or files such as "
            "train.parquet, train.jsonl or train.csv with columns prompt, chosen, rejected"
        )
    return DatasetDict({
        n: check_preferences(explicit_prompts(d, f"{folder} ({n})"), f"{folder} ({n})", columns)
        for n, d in found.items()
    })  # fmt: skip
