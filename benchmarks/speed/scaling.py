"""How does a step grow with K, with the length of answers, with the active tokens, with the vocabulary?

A step is the batch, forward, backward and SGD of the heads alone, without the trainer around it.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.speed.material import (
    as_pairs,
    head_policy,
    length_rows,
    on,
    usual_tokens,
    word_base,
    word_rows,
)
from benchmarks.speed.measuring import (
    Row,
    exponent_row,
    forget_peak,
    in_own_process,
    in_turns,
    peak_gib,
    ratios,
    row,
)

SETTINGS: dict[str, Any] = {
    "experts": [1, 2, 4, 8, 16, 32],
    "lengths": [8, 16, 32, 64, 128],
    "active": [1024, 2048, 4096, 8192, 16384],
    "vocabulary": [16384, 65536, 262144],
    "batch": 8,
    "pairs": 64,  # of a step whose K is varied
    "turns": 7,
}
QUICK = {
    "pairs": 8,
    "experts": [1, 2, 4],
    "lengths": [8, 16, 32],
    "active": [256, 512, 1024],
    "vocabulary": [1024, 2048, 4096],
    "turns": 3,
}
LARGE = "MIXDPO_BENCH_LARGE_VOCABULARY"  # folder of a model with some 262,000 tokens


def head_step(policy: Any, pairs: Any, batch: int, routed: bool = False) -> Callable[[], float]:
    """A function that makes one step on the next `batch` pairs and gives its loss, nats a pair.

    routed : of each pair two experts alone are computed, at random: the one routed to and the one tried (S = 1).
    """
    experts, constants = policy.experts, policy.constants(pairs.texts)
    optimizer = torch.optim.SGD(experts.parameters(), lr=1e-4)
    device, turn, draw = policy.base.device, 0, torch.Generator().manual_seed(0)

    def step() -> float:
        nonlocal turn
        rows = torch.arange(turn, turn + batch) % len(pairs)
        turn += batch
        numbers = on(experts.batch(constants, pairs.index[rows]), device)
        if routed:
            two = torch.rand(batch, experts.n_experts, generator=draw).topk(2).indices
            chosen = torch.zeros(batch, experts.n_experts, dtype=torch.bool).scatter(1, two, True)
            chosen = chosen.to(device)
            loss = -policy.batch_log_sigma(numbers, chosen)[chosen].mean()
        else:
            loss = -policy.batch_loglik(numbers).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def peak(n_experts: int, batch: int, device: str) -> tuple[float, float]:
    """GiB: the largest memory of this process while it makes three steps with so many experts, and what it had before."""
    import mixdpo_lib as mx

    base = mx.load_base(device=device)
    pairs = as_pairs(length_rows(base, batch))
    step = head_step(head_policy(base, n_experts, pairs, usual_tokens(base)), pairs, batch)
    forget_peak()
    before = psutil.Process().memory_info().rss / 2**30
    for _ in range(3):
        step()
    return peak_gib(device), before


def in_experts(base: Any, settings: dict[str, Any], device: str) -> list[Row]:
    """Time of a step by K, as multiples of K = 1, and what is shared and what each expert adds."""
    batch, counts = settings["pairs"], settings["experts"]
    pairs, active = as_pairs(length_rows(base, batch)), usual_tokens(base)
    policies = {k: head_policy(base, k, pairs, active) for k in counts}
    steps = {str(k): head_step(policies[k], pairs, batch) for k in counts}
    steps["routed"] = head_step(policies[counts[-1]], pairs, batch, routed=True)
    seconds = in_turns(steps, settings["turns"], device=device)
    note = f"{batch} pairs, answers of 32, {len(active):,} active tokens"
    points = [
        row(f"a step, K = {k}", "s", seconds[str(k)], note=note, x=k, line="K") for k in counts
    ]
    one, most = seconds[str(counts[0])], seconds[str(counts[-1])]
    each = [(b - a) / (counts[-1] - counts[0]) for a, b in zip(one, most, strict=True)]
    shared = [a - counts[0] * e for a, e in zip(one, each, strict=True)]
    rows = [*points, exponent_row("a step in K", points)]
    rows += [row("each expert of a step", "s", each), row("what all experts share", "s", shared)]
    aims = {8: 2.5, 32: 8.0}
    for k in counts[1:]:
        aim = ("<=", aims[k]) if k in aims else None
        rows.append(
            row(f"a step, K = {k} / K = 1", "times", ratios(seconds[str(k)], seconds["1"]), aim)
        )
    what, aim = f"a step, S = 1 of {counts[-1]}", ("<=", 2.5) if counts[-1] == 32 else None
    rows.append(row(what, "s", seconds["routed"], note="two experts a pair are computed"))
    rows.append(row(f"{what} / K = 1", "times", ratios(seconds["routed"], seconds["1"]), aim))
    if 8 in counts:
        found = {k: in_own_process(peak, k, batch, device) for k in (1, 8)}
        rows += [row(f"peak memory of steps, K = {k}", "GiB", [found[k][0]]) for k in (1, 8)]
        what = "peak memory of steps, K = 8 / K = 1"
        rows.append(row(what, "times", [found[8][0] / found[1][0]], ("<=", 1.3)))
        if not device.startswith("cuda"):
            added = [
                row(f"what steps add to it, K = {k}", "GiB", [a - b]) for k, (a, b) in found.items()
            ]
            rows += added
    return rows


def in_lengths(base: Any, settings: dict[str, Any], device: str) -> list[Row]:
    """Time of a step by length of the answers, K = 1."""
    batch, steps, active = settings["batch"], {}, usual_tokens(base)
    for length in settings["lengths"]:
        pairs = as_pairs(length_rows(base, 2 * batch, answer=length))
        steps[length] = head_step(head_policy(base, 1, pairs, active), pairs, batch)
    seconds = in_turns(
        {str(n): s for n, s in steps.items()}, settings["turns"], least_s=0.5, device=device
    )
    points = [
        row(f"a step, answers of {n}", "s", seconds[str(n)], x=n, line="tokens of an answer")
        for n in steps
    ]
    return [*points, exponent_row("a step in the length of answers", points)]


def in_active(base: Any, settings: dict[str, Any], device: str) -> list[Row]:
    """Time of a step by number of active tokens, K = 1."""
    batch, counts = settings["batch"], settings["active"]
    pairs = as_pairs(length_rows(base, 4 * batch))
    steps = {
        str(n): head_step(head_policy(base, 1, pairs, list(range(n))), pairs, batch) for n in counts
    }
    seconds = in_turns(steps, settings["turns"], least_s=0.5, device=device)
    points = [
        row(f"a step, {n:,} active tokens", "s", seconds[str(n)], x=n, line="active tokens")
        for n in counts
    ]
    return [*points, exponent_row("a step in the active tokens", points)]


def in_vocabulary(settings: dict[str, Any], device: str, scratch: Path) -> list[Row]:
    """Time of a step by size of the vocabulary, K = 1: active tokens alone, and all."""
    import mixdpo_lib as mx

    batch, steps, rows = settings["batch"], {}, []
    given, sizes = os.environ.get(LARGE), settings["vocabulary"]
    used = min(sizes) // 4
    for size in sizes:
        folder = scratch / str(size)
        base = word_base(folder, size)
        if device != "cpu":
            base = mx.load_base(str(folder), device=device)
        pairs = as_pairs(word_rows(4 * batch, 8, 32, used))
        ids = list(range(2, used))
        for name, active in (("active tokens", ids), ("all tokens", "all")):
            steps[f"{name}, {size}"] = head_step(head_policy(base, 1, pairs, active), pairs, batch)
    seconds = in_turns(steps, settings["turns"], least_s=0.3, device=device)
    note = "randomly initialised small models of width 64"
    for name in ("active tokens", "all tokens"):
        points = [
            row(f"a step, {name}, vocabulary of {n:,}", "s", seconds[f"{name}, {n}"], note=note, x=n,
                line=f"vocabulary, {name}")
            for n in sizes
        ]  # fmt: skip
        rows += [*points, exponent_row(f"a step in the vocabulary, {name}", points)]
    if given:
        base = mx.load_base(given, device=device)
        pairs = as_pairs(length_rows(base, 4 * batch))
        step = {"own": head_step(head_policy(base, 1, pairs, usual_tokens(base)), pairs, batch)}
        own = in_turns(step, settings["turns"], least_s=0.3, device=device)["own"]
        name = Path(given).name
        rows.append(
            row(f"a step, {name}, vocabulary of {base.vocab_size:,}", "s", own, note="a real model")
        )
    return rows


def measure(settings: dict[str, Any], device: str, folder: Path) -> list[Row]:
    """All four."""
    import mixdpo_lib as mx

    base = mx.load_base(device=device)
    rows = in_experts(base, settings, device)
    print("[bench] scaling: K is done", flush=True)
    rows += in_lengths(base, settings, device)
    rows += in_active(base, settings, device)
    print("[bench] scaling: lengths and active tokens are done", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        return rows + in_vocabulary(settings, device, Path(scratch))
