"""How do time and memory of a fit grow with the number of pairs?

A small random model, so that a hundred thousand pairs are read in minutes; answers of 32 words, four a prompt, six pairs
a prompt. Everything is on the clock: checks, tokens, features, constants of the head, one pass of steps. Each number
of pairs is a process of its own with an empty cache.
"""

from __future__ import annotations

import os
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.speed.material import as_pairs, word_base, word_rows
from benchmarks.speed.measuring import Row, exponent_row, in_own_process, peak_gib, row
from benchmarks.speed.records import remembered

SETTINGS: dict[str, Any] = {
    "pairs": [1000, 3000, 10_000, 30_000, 100_000],
    "words": 4096,
    "batch": 32,
}
QUICK = {"pairs": [200, 400, 800], "words": 512}


def whole_pass(n: int, words: int, batch: int, device: str) -> tuple[float, float]:
    """Seconds and peak memory (GiB) of a fit of one pass over n pairs, in this process, with an empty cache."""
    import mixdpo_lib as mx
    from mixdpo_lib.gates.weights import FixedWeights

    with tempfile.TemporaryDirectory() as scratch:
        os.environ["MIXDPO_CACHE"] = scratch
        base = word_base(Path(scratch) / "model", words)
        if device != "cpu":
            base = mx.load_base(str(Path(scratch) / "model"), device=device)
        rows = word_rows(n, 8, 32, words)
        start = time.perf_counter()
        policy = mx.MixturePolicy(mx.HeadExperts(base, 1, 8), FixedWeights.uniform(1))
        config = mx.FitConfig(
            latent="pair",
            batch_by="pair",
            batch_size=batch,
            passes=1,
            min_steps=0,
            evaluate_training=False,
        )
        mx.fit(policy, as_pairs(rows), config)
        return time.perf_counter() - start, peak_gib(device)


def measure(settings: dict[str, Any], device: str, folder: Path) -> list[Row]:
    """Seconds and peak memory by number of pairs; each is kept, so that the part goes on where it was stopped."""
    times, peaks = [], []
    for n in settings["pairs"]:
        given = (n, settings["words"], settings["batch"], device)
        identity = {"given": given, "of": os.environ.get("MIXDPO_BENCH_OF", "")}
        seconds, peak = remembered(
            folder / f"{n}.json", identity, partial(in_own_process, whole_pass, *given)
        )
        print(f"[bench] pairs: {n:,} in {seconds:.0f} s, {peak:.2f} GiB", flush=True)
        times.append(row(f"a pass over {n:,} pairs", "s", [seconds], x=n, line="pairs"))
        aim = ("<=", 8.0) if n >= 100_000 else None
        peaks.append(row(f"peak memory, {n:,} pairs", "GiB", [peak], aim, x=n))
    note = f"a random model of {settings['words']:,} words, width 64; nothing cached"
    times[0]["note"] = note
    return [*times, exponent_row("a pass in the number of pairs", times), *peaks]
