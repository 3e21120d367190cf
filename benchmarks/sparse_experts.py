"""What does top-S save? Time of log-probabilities and of generation with S of 8 experts, against a single expert.

    .venv/bin/python benchmarks/sparse_experts.py [--texts 128] [--prompts 32] [--tokens 24] [--repeats 9]

The packaged model on excerpts of the packaged reviews: a prompt of 8 words, a response of up to 40. The experts are
drawn at random for each text and prompt ("spread") or are the same one for all ("one for all"). Every variant is timed
once in each repeat, in random order, and compared with K = 1 of the same repeat. Log-probabilities start from hidden
states of the base, which are computed once and kept; generation runs the base. Some eight minutes on one core.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from functools import partial

import datasets
import pandas as pd
import torch

from mixdpo_lib import HeadExperts, MixturePolicy, load_base
from mixdpo_lib.base.features import text_features
from mixdpo_lib.data.pairs import Pairs
from mixdpo_lib.elbo import keep_top_s
from mixdpo_lib.gates.weights import FixedWeights
from mixdpo_lib.study import load_reviews

K, PROMPT_WORDS, WORDS = 8, 8, 40


def excerpts(n: int) -> datasets.Dataset:
    """Pairs of excerpts behind the same prompt, two texts a pair."""
    words = [review.split() for review in load_reviews()["text"][: 4 * n]]
    words = [w for w in words if len(w) > PROMPT_WORDS + WORDS][: 2 * (n // 2)]
    return datasets.Dataset.from_list(
        [
            {
                "prompt": " ".join(a[:PROMPT_WORDS]),
                "chosen": " ".join(a[PROMPT_WORDS:][:WORDS]),
                "rejected": " ".join(b[PROMPT_WORDS:][:WORDS]),
                "ended": False,
            }
            for a, b in zip(words[::2], words[1::2], strict=True)
        ]
    )


def measure(variants: dict[str, Callable[[], object]], repeats: int) -> pd.DataFrame:
    """Seconds of every variant, a row a repeat; the order within a repeat is random, the first repeat is dropped."""
    order, rows = random.Random(0), []
    for repeat in range(repeats + 1):
        row: dict[str, float] = {}
        for name in order.sample(list(variants), len(variants)):
            start = time.perf_counter()
            variants[name]()
            row[name] = time.perf_counter() - start
        rows.append(row)
        print(f"repeat {repeat} of {repeats}", flush=True)
    return pd.DataFrame(rows[1:])[list(variants)]


def report(title: str, seconds: pd.DataFrame, sequences: int) -> None:
    """Milliseconds a sequence (median) and the ratio to K = 1 of the same repeat (median, min, max)."""
    ratio = seconds.div(seconds["K = 1"], axis=0)
    table = pd.DataFrame(
        {
            "ms a sequence": 1000 * seconds.median() / sequences,
            "ratio": ratio.median(),
            "min": ratio.min(),
            "max": ratio.max(),
        }
    )
    print(
        f"\n{title}, {sequences} sequences, {len(seconds)} repeats\n{table.round(3).to_string()}\n",
        flush=True,
    )


def main() -> None:
    """Both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("texts", 128), ("prompts", 32), ("tokens", 24), ("repeats", 9)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    base = load_base()
    data = Pairs.of(excerpts(options.texts))
    policies = {}
    for n_experts in (1, K):
        experts = HeadExperts(base, n_experts)
        experts.activate_responses(data)
        experts.perturb(0.1, torch.Generator().manual_seed(0))
        policies[n_experts] = MixturePolicy(experts, FixedWeights.uniform(n_experts))
        policies[n_experts].constants(data.texts)  # of the frozen head: computed once, kept on disk
    one, many = policies[1], policies[K]
    tokens = len(text_features(base, data.texts).tokens)
    n_texts, n_active = len(data.texts), len(many.experts.active_ids)
    print(f"{n_texts} texts of {tokens / n_texts:.0f} tokens, {n_active} active tokens, K = {K}")

    log_w = torch.randn(
        max(n_texts, options.prompts), K, generator=torch.Generator().manual_seed(1)
    ).log_softmax(-1)
    fixed = torch.arange(K, 0, -1).float().log().log_softmax(-1).expand_as(log_w)
    variants: dict[str, Callable[[], object]] = {
        "K = 1": partial(one.text_rewards, data.texts),
        f"K = {K}, all": partial(many.text_rewards, data.texts),
    }
    for routing, weights in (("spread", log_w), ("one for all", fixed)):
        for s in (1, 2, 4) if routing == "spread" else (1,):
            chosen = keep_top_s(weights[:n_texts], s) > -torch.inf
            variants[f"K = {K}, top-{s}, {routing}"] = partial(
                many.text_rewards, data.texts, chosen=chosen
            )
    report("log-probabilities", measure(variants, options.repeats), n_texts)

    prompts = list(data.rows["prompt"])
    prompts = (prompts * (1 + options.prompts // len(prompts)))[: options.prompts]
    speak = {"max_new_tokens": options.tokens, "seed": 0}
    variants = {
        "K = 1": partial(one.generate, prompts, **speak),
        f"K = {K}, all, an expert a text": partial(
            many.generate, prompts, log_w[: len(prompts)], **speak
        ),
        f"K = {K}, all, token form": partial(
            many.generate, prompts, log_w[: len(prompts)], form="token", **speak
        ),
    }
    for routing, weights in (("spread", log_w), ("one for all", fixed)):
        for s in (1, 2, 4) if routing == "spread" else (1,):
            rest = {"top_s": s, **speak}
            variants[f"K = {K}, top-{s}, {routing}"] = partial(
                many.generate, prompts, weights[: len(prompts)], **rest
            )
    variants[f"K = {K}, top-1, spread, token form"] = partial(
        many.generate, prompts, log_w[: len(prompts)], form="token", top_s=1, **speak
    )
    report(
        f"generation of {options.tokens} tokens", measure(variants, options.repeats), len(prompts)
    )


if __name__ == "__main__":
    main()
