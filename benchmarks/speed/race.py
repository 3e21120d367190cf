"""How long until the held-out accuracy is that which TRL's fastest LoRA reaches at best?

The study's clean design, the pairs of its first group (each once), answered for held-out prompts. The clock of each side
has its own preparation (our features, TRL's reference) and its steps; evaluations are left out of TRL's and counted in
ours, where they take no time. The rate of each side is that with the best held-out accuracy of the first seed.
"""

from __future__ import annotations

import importlib.util
import math
import os
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.speed import records
from benchmarks.speed.contenders import trl_model, trl_trainer
from benchmarks.speed.measuring import Row, absent, quartiles, ratios, row
from benchmarks.speed.records import remembered

SETTINGS: dict[str, Any] = {
    "pairs": 320,
    "held_out": 200,
    "trl": "TRL, LoRA in the last two",  # with its batch, where no record of throughput says which is fastest
    "batch": 8,
    "seeds": [0, 1, 2],
    "trl_rates": [1e-3, 3e-3, 1e-2],
    "trl_passes": 2.0,
    "trl_evaluations": 3,  # a pass
    "own_rates": [1e-3, 3e-3, 1e-2],
    "own_passes": 20.0,
}
QUICK = {
    "pairs": 32,
    "held_out": 16,
    "seeds": [0],
    "trl_rates": [1e-3],
    "trl_passes": 1.0,
    "trl_evaluations": 2,
    "own_passes": 4.0,
}


def study_rows(pairs: int, held_out: int) -> tuple[str, list[dict[str, str]], list[dict[str, str]]]:
    """Name of the base, pairs to learn from, pairs of other prompts."""
    from mixdpo_lib.study import ReviewUsers, review_users_config

    study = ReviewUsers(review_users_config(["clean"], more_test_prompts=150))
    sets, group = study.preferences("clean"), study.groups[0]

    def distinct(*names: str) -> list[dict[str, str]]:
        found: dict[tuple[str, ...], None] = {}
        for name in names:
            for one in sets[name]:
                if one["group"] == group:
                    found.setdefault((one["prompt"], one["chosen"], one["rejected"]))
        return [dict(zip(("prompt", "chosen", "rejected"), one, strict=True)) for one in found]

    return study.config.base, distinct("train")[:pairs], distinct("validation", "test")[:held_out]


def fastest(record: Path) -> dict[str, Any]:
    """TRL's fastest LoRA and its batch, as the record of throughput has them; nothing where there is none."""
    if not record.exists():
        return {}
    rows = [one for one in records.read(record)["rows"] if one["line"] == "throughput"]
    loras = [one for one in rows if one["what"].startswith("TRL, LoRA")]
    if not loras:
        return {}
    first = max(loras, key=lambda one: quartiles(one["values"])[1])
    return {"trl": first["what"], "batch": int(first["x"])}


def trl_run(
    name: str, folder: str, rows: list, held_out: Callable[[], Any], batch: int, rate: float,
    seed: int, passes: float, evaluations: int, device: str,
) -> dict[str, Any]:  # fmt: skip
    """(seconds, held-out accuracy) of every evaluation; loading the model and the evaluations are off the clock."""
    from transformers import TrainerCallback

    every = max(1, round(math.ceil(len(rows) / batch) / evaluations))
    curve: list[tuple[float, float]] = []
    prepared, loaded = held_out(), trl_model(folder, device)
    with tempfile.TemporaryDirectory() as scratch:
        start = time.perf_counter()
        trainer = trl_trainer(
            name, loaded, rows, batch, scratch,
            learning_rate=rate, seed=seed, max_steps=round(passes * len(rows) / batch),
        )  # fmt: skip
        before = time.perf_counter() - start
        trainer.eval_dataset = prepared

        class Look(TrainerCallback):
            clock = before
            since = time.perf_counter()

            def on_train_begin(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
                self.since = time.perf_counter()

            def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
                if state.global_step % every and state.global_step < state.max_steps:
                    return
                self.clock += time.perf_counter() - self.since
                found = trainer.evaluate()
                curve.append((self.clock, found["eval_rewards/accuracies"]))
                print(f"[bench] {name} {rate:g}, seed {seed}: {curve[-1]}", flush=True)
                self.since = time.perf_counter()

        trainer.add_callback(Look())
        trainer.train()
    return {"curve": curve, "before": before}


def prepared_by_trl(name: str, folder: str, held_out: list, device: str) -> Any:
    """The held-out pairs with tokens and reference, as TRL's trainer evaluates them."""
    with tempfile.TemporaryDirectory() as scratch:
        loaded = trl_model(folder, device)
        return trl_trainer(name, loaded, held_out[:1], 1, scratch, held_out).eval_dataset


def own_run(
    base: Any, rows: list, held_out: list, batch: int, rate: float, seed: int, passes: float
) -> dict[str, Any]:
    """(seconds, held-out accuracy) of every evaluation of one head; features are computed anew, on the clock."""
    import mixdpo_lib as mx
    from benchmarks.speed.material import as_pairs
    from mixdpo_lib.gates.weights import FixedWeights

    train, other = as_pairs(rows), as_pairs(held_out)
    kept = os.environ.get("MIXDPO_CACHE")
    with tempfile.TemporaryDirectory() as fresh:
        os.environ["MIXDPO_CACHE"] = fresh
        try:
            from mixdpo_lib.base.features import text_features

            text_features(base, other.texts)  # of the held-out pairs, off the clock
            policy = mx.MixturePolicy(mx.HeadExperts(base, 1, 8), FixedWeights.uniform(1))
            config = mx.FitConfig(
                latent="pair",
                batch_by="pair",
                batch_size=batch,
                learning_rate=rate,
                passes=passes,
                min_steps=0,
                evaluations_per_pass=4,
                evaluate_training=False,
                seed=seed,
            )
            start = time.perf_counter()
            text_features(base, train.texts)
            before = time.perf_counter() - start
            result = mx.fit(policy, train, config, validation=other)
            total = time.perf_counter() - start
        finally:
            os.environ.pop("MIXDPO_CACHE")
            if kept is not None:
                os.environ["MIXDPO_CACHE"] = kept
    history = result.history
    offset = total - float(history["seconds"].iloc[-1])  # what stands before the trainer's clock
    times = [offset + seconds for seconds in history["seconds"]]
    return {
        "curve": list(zip(times, history["validation_accuracy"], strict=True)),
        "before": before,
    }


def best(curve: list) -> float:
    """The largest accuracy of a run."""
    return max(accuracy for _, accuracy in curve)


def time_to(curve: list, accuracy: float) -> float:
    """Seconds until a run had this accuracy; inf where it never had."""
    return min((seconds for seconds, found in curve if found >= accuracy), default=math.inf)


def rows_of(
    trl: list[dict[str, Any]], own: list[dict[str, Any]], notes: tuple[str, str]
) -> list[Row]:
    """The table's lines, from the runs of the same seeds."""
    targets = [best(run["curve"]) for run in trl]
    theirs = [time_to(run["curve"], goal) for run, goal in zip(trl, targets, strict=True)]
    ours = [time_to(run["curve"], goal) for run, goal in zip(own, targets, strict=True)]
    bare = [t - run["before"] for t, run in zip(theirs, trl, strict=True)]
    return [
        row("best held-out accuracy, TRL", "share", targets, note=notes[0]),
        row(
            "best held-out accuracy, heads, K = 1",
            "share",
            [best(r["curve"]) for r in own],
            note=notes[1],
        ),
        row("time to TRL's best accuracy, TRL", "s", theirs, note="reference pass included"),
        row("time to TRL's best accuracy, heads, K = 1", "s", ours, note="feature pass included"),
        row("our feature pass", "s", [run["before"] for run in own]),
        row("TRL / heads, K = 1", "times", ratios(theirs, ours), (">=", 30), "a seed each"),
        row("TRL without its reference pass / heads, K = 1", "times", ratios(bare, ours)),
    ]


def measure(settings: dict[str, Any], device: str, folder: Path) -> list[Row]:
    """Rates by the first seed, then every seed; each run is kept, so that the part goes on where it was stopped."""
    import mixdpo_lib as mx

    if importlib.util.find_spec("trl") is None:
        return [absent("TRL / heads, K = 1", "trl not installed")]
    settings = settings | fastest(folder.parent / "throughput.json")
    name, rows, held_out = study_rows(settings["pairs"], settings["held_out"])
    base = mx.load_base(name, device=device)
    of = {"of": os.environ.get("MIXDPO_BENCH_OF", ""), "settings": settings, "device": device}

    def kept(side: str, rate: float, seed: int, make: Any) -> dict[str, Any]:
        path = folder / f"{side}-{rate:g}-{seed}.json"
        return remembered(path, of | {"side": side, "rate": rate, "seed": seed}, make)

    held = cache(lambda: prepared_by_trl(settings["trl"], str(base.folder), held_out, device))

    def trl(rate: float, seed: int) -> dict[str, Any]:
        return kept("trl", rate, seed, lambda: trl_run(
            settings["trl"], str(base.folder), rows, held, settings["batch"], rate, seed,
            settings["trl_passes"], settings["trl_evaluations"], device,
        ))  # fmt: skip

    def own(rate: float, seed: int) -> dict[str, Any]:
        return kept("own", rate, seed, lambda: own_run(
            base, rows, held_out, settings["batch"], rate, seed, settings["own_passes"]
        ))  # fmt: skip

    first = settings["seeds"][0]
    chosen = {}
    for side, run in (("trl", trl), ("own", own)):
        rates = settings[f"{side}_rates"]
        chosen[side] = max(rates, key=lambda rate: best(run(rate, first)["curve"]))  # noqa: B023
    notes = tuple(
        f"rate {chosen[side]:g} of {settings[f'{side}_rates']}" for side in ("trl", "own")
    )
    size = f"{len(rows)} pairs, {len(held_out)} held out; "
    return rows_of(
        [trl(chosen["trl"], seed) for seed in settings["seeds"]],
        [own(chosen["own"], seed) for seed in settings["seeds"]],
        (f"{settings['trl']}, {size}{notes[0]}", notes[1]),
    )
