"""How fast are candidates sampled, several of a prompt, beside `generate`? The same prompts, lengths and end tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed.material import length_rows
from benchmarks.speed.measuring import Row, ratios, row

SETTINGS: dict[str, Any] = {"prompts": 24, "each": 4, "tokens": 24, "turns": 5}
QUICK = {"prompts": 4, "each": 2, "tokens": 4, "turns": 2}
AIMS = {"untruncated": 1.4, "top_p = .9": 2.0}


def ours(base: Any, ids: list[list[int]], tokens: int, top_p: float | None) -> Callable[[int], int]:
    """The candidates' way: a function of the seed that samples once and gives how many tokens it sampled."""
    from mixdpo_lib.policy.next_token import reference_next_token
    from mixdpo_lib.policy.sampling import sample

    def call(seed: int) -> int:
        found = sample(
            reference_next_token(base),
            ids,
            tokens,
            top_p=top_p,
            eos_token_id=base.end_ids,
            generator=torch.Generator().manual_seed(seed),
        )
        return sum(len(own) + int(end) for own, end in zip(found.tokens, found.ended, strict=True))

    return call


def theirs(
    base: Any, ids: list[list[int]], tokens: int, top_p: float | None
) -> Callable[[int], int]:
    """`generate`, drawing, without any other processing of logits."""
    from mixdpo_lib.policy.sampling import left_pad

    ends = list(base.end_ids)
    input_ids, mask = (part.to(base.device) for part in left_pad(ids, ends[0]))

    def call(seed: int) -> int:
        torch.manual_seed(seed)
        out = base.model.generate(
            input_ids=input_ids,
            attention_mask=mask,
            do_sample=True,
            top_k=0,
            top_p=1.0 if top_p is None else top_p,
            temperature=1.0,
            max_new_tokens=tokens,
            eos_token_id=ends,
            pad_token_id=ends[0],
        )[:, input_ids.shape[1] :]
        ended = torch.isin(out, torch.tensor(ends, device=out.device)).int()
        return int((ended.cumsum(1) - ended).eq(0).sum())  # up to the first end token, it included

    return call


def measure(settings: dict[str, Any], device: str, folder: Path) -> list[Row]:
    """Tokens a second of both, and their ratio."""
    import random
    import time

    import mixdpo_lib as mx
    from benchmarks.speed.measuring import wait_for

    base = mx.load_base(device=device)
    prompts = [one["prompt"] for one in length_rows(base, settings["prompts"])]
    each, tokens, rows = settings["each"], settings["tokens"], []
    ids = [base.prompt_ids(p) for p in prompts for _ in range(each)]
    for name, top_p in (("untruncated", None), ("top_p = .9", 0.9)):
        calls = {
            "ours": ours(base, ids, tokens, top_p),
            "generate": theirs(base, ids, tokens, top_p),
        }
        rate: dict[str, list[float]] = {side: [] for side in calls}
        order = random.Random(0)
        for turn in range(settings["turns"] + 1):
            for side in order.sample(list(calls), 2):
                start = time.perf_counter()
                n = calls[side](turn)
                wait_for(device)
                if turn:
                    rate[side].append(n / (time.perf_counter() - start))
        note = f"{len(prompts)} prompts of 8, {each} candidates each, up to {tokens} tokens"
        rows += [row(f"{side}, {name}", "tokens/s", rate[side], note=note) for side in calls]
        aim = (">=", AIMS[name])
        what = f"candidates / generate, {name}"
        rows.append(row(what, "times", ratios(rate["ours"], rate["generate"]), aim))
    return rows
