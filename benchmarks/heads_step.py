"""What does a training step of K low-rank heads cost, in seconds and memory, against a single head?

    .venv/bin/python benchmarks/heads_step.py [--experts 1 2 8 32] [--tokens 24 32] [--pairs 64] [--repeats 9]

The packaged model on excerpts of the packaged reviews: prompts of 8 tokens, answers of 24 or 32, some 3,000 active
tokens. A step is what a fit does between two evaluations: forward, backward, AdamW, on the same pairs (the base's
hidden states are computed once and kept). Every K makes one step in each repeat, in random order, and is compared with
K = 1 of the same repeat. A line of JSON for every K and length:

    seconds, ratio        quartiles over the repeats
    shared, per_expert    seconds: a + b K through the medians of two K, the least and the largest (the first line only)
    peak_mb, increment_mb largest resident memory of a process that makes three steps, and how much of it came with the
                          first step (Linux; elsewhere null)

OMP_NUM_THREADS says how many threads compute. Some minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import datasets
import torch

from mixdpo_lib import FitConfig, HeadExperts, MixturePolicy, load_base
from mixdpo_lib.base.features import text_features
from mixdpo_lib.data.pairs import Pairs
from mixdpo_lib.gates.weights import LearnedWeights
from mixdpo_lib.learning.learner import Learner
from mixdpo_lib.study import load_reviews

PROMPT, ACTIVE = 8, 3000


def excerpts(tokenizer, pairs: int, tokens: int) -> Pairs:
    """Pairs of excerpts behind the same prompt; a word that is cut may be read as a token more or less."""
    texts = load_reviews()["text"]
    ids = [ids for ids in tokenizer(texts[: 4 * pairs])["input_ids"] if len(ids) > PROMPT + tokens]

    def answer(row: list[int]) -> str:
        return tokenizer.decode(row[PROMPT : PROMPT + tokens])

    rows = [
        {
            "prompt": tokenizer.decode(a[:PROMPT]),
            "chosen": answer(a),
            "rejected": answer(b),
            "ended": False,
        }
        for a, b in zip(ids[:pairs], ids[pairs : 2 * pairs], strict=True)
    ]
    return Pairs.of(datasets.Dataset.from_list(rows))


def a_step(n_experts: int, pairs: int, tokens: int) -> tuple[Callable[[], None], dict[str, int]]:
    """A function that makes one step, and the size of what it computes."""
    base = load_base()
    data = excerpts(base.tokenizer, pairs, tokens)
    experts = HeadExperts(base, n_experts)
    experts.activate_responses(data)
    more = torch.arange(len(base.tokenizer))[-ACTIVE:]  # rows like any other
    experts.activate(torch.cat([experts.active_ids, more])[:ACTIVE])
    experts.perturb(0.1, torch.Generator().manual_seed(0))
    policy = MixturePolicy(experts, LearnedWeights(n_experts))
    config = FitConfig(latent="pair")
    learner = Learner(policy, data, torch.arange(pairs), config, steps_per_pass=1).train()
    optimizer = torch.optim.AdamW(experts.parameter_groups(1e-3), weight_decay=0.0)
    constants = policy.constants(data.texts)

    def step() -> None:
        batch = experts.batch(constants, data.index)
        learner(row=torch.arange(pairs), **batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    positions = len(text_features(base, data.texts).tokens)
    return step, {"positions": positions, "active_tokens": len(experts.active_ids)}


def memory(n_experts: int, pairs: int, tokens: int) -> dict[str, float | None]:
    """In a process of its own; the peak of loading the model is forgotten before the first step."""
    step, _ = a_step(n_experts, pairs, tokens)
    status, forget = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not (status.exists() and os.access(forget, os.W_OK)):
        return {"peak_mb": None, "increment_mb": None}

    def resident(name: str) -> float:
        line = next(line for line in status.read_text().splitlines() if line.startswith(name))
        return int(line.split()[1]) / 1024

    forget.write_text("5")
    before = resident("VmRSS")
    for _ in range(3):
        step()
    peak = resident("VmHWM")
    return {"peak_mb": round(peak), "increment_mb": round(peak - before)}


def seconds(steps: dict[int, Callable[[], None]], repeats: int) -> dict[int, list[float]]:
    """Of every K one number a repeat; the first repeat is dropped."""
    order, found = random.Random(0), {k: [] for k in steps}
    for _ in range(repeats + 1):
        for k in order.sample(list(steps), len(steps)):
            start = time.perf_counter()
            steps[k]()
            found[k].append(time.perf_counter() - start)
    return {k: values[1:] for k, values in found.items()}


def quartiles(values: list[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    return [round(v, 4) for v in statistics.quantiles(values, n=4, method="inclusive")]


def main() -> None:
    """The lines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, nargs="+", default=[1, 2, 8, 32])
    parser.add_argument("--tokens", type=int, nargs="+", default=[24, 32])
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    few, *_, many = counts = sorted({1, 2, *options.experts})
    for tokens in options.tokens:
        made = {k: a_step(k, options.pairs, tokens) for k in counts}
        size = made[few][1]
        found = seconds({k: step for k, (step, _) in made.items()}, options.repeats)
        del made
        middle = {k: statistics.median(values) for k, values in found.items()}
        slope = (middle[many] - middle[few]) / (many - few)
        for k in counts:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as alone:
                kept = alone.submit(memory, k, options.pairs, tokens).result()
            ratio = [a / b for a, b in zip(found[k], found[1], strict=True)]
            line = {"K": k, "pairs": options.pairs, "tokens": tokens, **size}
            line |= {"threads": torch.get_num_threads(), "load": round(os.getloadavg()[0], 1)}
            line |= {"seconds": quartiles(found[k]), "ratio": quartiles(ratio)}
            line |= {"shared": round(middle[few] - few * slope, 4), "per_expert": round(slope, 4)}
            print(json.dumps(line | kept), flush=True)


if __name__ == "__main__":
    main()
