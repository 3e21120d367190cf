"""How fast are candidates sampled, against `generate` of transformers?

    .venv/bin/python benchmarks/sampling.py [--prompts 12] [--each 4] [--tokens 24] [--repeats 5]

Continuations of the first words of packaged reviews by the packaged model in float32, `each` of every prompt, untruncated
and with top_p = 0.9; both sides stop a row at its end token. One JSON line a setting: the ratio of times, transformers
over this, median, smallest and largest over repeats in which both were timed, in turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from mixdpo_lib import load_base
from mixdpo_lib.base.model import Base
from mixdpo_lib.policy.next_token import reference_next_token
from mixdpo_lib.policy.sampling import left_pad, sample
from mixdpo_lib.study import load_reviews


def seconds(call: Callable[[], Any]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def compared(
    base: Base, ids: list[list[int]], tokens: int, top_p: float | None, repeats: int
) -> list[float]:
    """Time of `generate` over time of `sample`, by repeat; the first repeat is dropped."""
    pad = base.end_ids[0]
    input_ids, mask = left_pad(ids, pad)

    def ours(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        step = reference_next_token(base)
        options: dict[str, Any] = {"eos_token_id": base.end_ids, "generator": generator}
        sample(step, ids, tokens, top_p=top_p, **options)

    def theirs(seed: int) -> None:
        torch.manual_seed(seed)
        base.model.generate(
            input_ids=input_ids,
            attention_mask=mask,
            max_new_tokens=tokens,
            do_sample=True,
            top_k=0,
            top_p=1.0 if top_p is None else top_p,
            eos_token_id=list(base.end_ids),
            pad_token_id=pad,
        )

    ratios = []
    for repeat in range(repeats + 1):
        one, other = seconds(lambda: theirs(repeat)), seconds(lambda: ours(repeat))  # noqa: B023
        ratios.append(one / other)
    return ratios[1:]


def main() -> None:
    """Print the ratios."""
    parser = argparse.ArgumentParser(description="candidates, against generate of transformers")
    for name, value in (("prompts", 12), ("each", 4), ("tokens", 24), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    base = load_base("smollm2-135m")
    reviews = load_reviews()["text"][: options.prompts]
    ids = [base.prompt_ids(" ".join(r.split()[:8])) for r in reviews for _ in range(options.each)]
    for top_p in (None, 0.9):
        ratios = compared(base, ids, options.tokens, top_p, options.repeats)
        line = {
            "benchmark": "sampling",
            "top_p": top_p,
            "rows": len(ids),
            "tokens": options.tokens,
            "repeats": len(ratios),
            "ratio": round(statistics.median(ratios), 3),
            "low": round(min(ratios), 3),
            "high": round(max(ratios), 3),
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
