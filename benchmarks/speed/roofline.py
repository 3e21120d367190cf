"""Which share of what the machine can do does a step of the heads reach?

Counted are the products of the step (operations) and what has to pass through memory (bytes: the head's rows, the hidden
states, the kept probabilities once written and twice read). The bound is the larger of operations / rate of a matrix
product and bytes / rate of a copy, both measured here; exponentials are in neither and are shown apart.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks.speed.material import as_pairs, head_policy, length_rows, usual_tokens
from benchmarks.speed.measuring import Row, in_turns, row
from benchmarks.speed.scaling import head_step

SETTINGS: dict[str, Any] = {"experts": [1, 8], "batch": 32, "turns": 7, "side": 2048}
QUICK = {"experts": [1], "batch": 8, "turns": 2, "side": 256}


def work(positions: int, width: int, active: int, rank: int, n_experts: int) -> tuple[float, float]:
    """Operations and bytes of a step: see the top. float32."""
    base = 2.0 * positions * width * active
    one = (
        2.0 * positions * rank * active * 3
    )  # the correction, and the two products of its gradient
    one += 2.0 * active * width * rank * 2  # E = W B, and the gradient of B
    one += 2.0 * positions * width * rank * 2  # A h, and the gradient of A
    read = 4.0 * (active * width + positions * width)
    own = 4.0 * (3.0 * positions * active + 2.0 * active * width)
    return base + n_experts * one, read + n_experts * own


def rates(side: int, turns: int, device: str) -> dict[str, list[float]]:
    """What the machine does at best: operations, bytes, exponentials a second."""
    a, b = (torch.randn(side, side, device=device) for _ in range(2))
    product = torch.empty_like(a)
    source = torch.randn(16 * side * side if side > 1000 else side * side, device=device)
    target, small = torch.empty_like(source), torch.randn(256, side, device=device)
    calls = {
        "product": lambda: torch.mm(a, b, out=product),
        "copy": lambda: target.copy_(source),
        "exp": lambda: torch.exp(small, out=torch.empty_like(small)),
    }
    done = {"product": 2.0 * side**3, "copy": 8.0 * len(source), "exp": float(small.numel())}
    seconds = in_turns(calls, turns, least_s=0.2, device=device)
    return {name: [done[name] / s for s in seconds[name]] for name in calls}


def measure(settings: dict[str, Any], device: str, folder: Path) -> list[Row]:
    """Rates, counts and shares."""
    import mixdpo_lib as mx

    found = rates(settings["side"], settings["turns"], device)
    rows = [
        row("matrix product, float32", "GFLOP/s", [v / 1e9 for v in found["product"]]),
        row("copy, read and written", "GB/s", [v / 1e9 for v in found["copy"]]),
        row("exponential, in the cache", "G/s", [v / 1e9 for v in found["exp"]]),
    ]
    peak = {name: sorted(values)[len(values) // 2] for name, values in found.items()}
    base, batch = mx.load_base(device=device), settings["batch"]
    pairs, active = as_pairs(length_rows(base, batch)), usual_tokens(base)
    steps = {
        str(k): head_step(head_policy(base, k, pairs, active), pairs, batch)
        for k in settings["experts"]
    }
    seconds = in_turns(steps, settings["turns"], least_s=0.5, device=device)
    positions = 32 * len(pairs.texts)
    for k in settings["experts"]:
        operations, size = work(positions, base.hidden_size, len(active), 8, k)
        by = {"operations": operations / peak["product"], "bytes": size / peak["copy"]}
        bound, exps = max(by.values()), positions * len(active) * k / peak["exp"]
        own = seconds[str(k)]
        note = f"{operations / 1e9:.1f} GFLOP, {size / 1e9:.2f} GB; bound by {max(by, key=by.__getitem__)}"
        rows.append(row(f"a step, K = {k}, {batch} pairs", "s", own, note=note))
        rows.append(row(f"share of the bound, K = {k}", "share", [bound / s for s in own]))
        what = f"share of products, copies and exponentials one after the other, K = {k}"
        rows.append(row(what, "share", [(sum(by.values()) + exps) / s for s in own]))
    return rows
