"""What families of experts cost on the packaged model: trained parameters, bytes a further expert adds, time of a step.

Real reviews: prompts of 32 tokens, answers of 24 (the review's own words against those of another). A step is forward,
backward and SGD over 8 pairs. Families take turns within each repetition; printed are medians and the range of ratios.
"""

import statistics
import time

import torch
from datasets import Dataset

import mixdpo_lib as mx
from mixdpo_lib.data.pairs import Pairs
from mixdpo_lib.gates.weights import FixedWeights
from mixdpo_lib.study import load_reviews

REPETITIONS, PAIRS = 5, 8


def review_pairs(base, n):
    """Pairs from the first n reviews that are long enough."""
    rows, ids = [], []
    for text in load_reviews()["text"]:
        tokens = base.tokenizer(text[:600], add_special_tokens=False)["input_ids"]
        if len(tokens) >= 64:
            ids.append(tokens)
        if len(ids) == n + 1:
            break
    for own, other in zip(ids, ids[1:], strict=False):
        prompt, chosen, rejected = (
            base.tokenizer.decode(part) for part in (own[:32], own[32:56], other[32:56])
        )
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "ended": False})
    return Dataset.from_list(rows)


def stepper(experts, data):
    """A function that makes one step."""
    if isinstance(experts, mx.HeadExperts):
        experts.start(data)
    policy = mx.MixturePolicy(experts, FixedWeights.uniform(experts.n_experts))
    constants = policy.constants(data.texts)
    optimizer = torch.optim.SGD(policy.experts.parameters(), lr=1e-4)
    turn = 0

    def step():
        nonlocal turn
        rows = torch.arange(turn, turn + PAIRS) % len(data)
        turn += PAIRS
        loss = -policy.batch_loglik(experts.batch(constants, data.index[rows])).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def main():
    """Print the table and the ratios."""
    base = mx.load_base()
    data = Pairs.of(review_pairs(base, 64))
    size = sum(p.numel() for p in base.model.parameters())
    lora = {"rank": 8, "blocks": 2}
    makers = {
        "HeadExperts, K=1": lambda: mx.HeadExperts(base, 1, 8),
        "HeadExperts, K=4": lambda: mx.HeadExperts(base, 4, 8),
        "HeadExperts, K=1, all tokens": lambda: mx.HeadExperts(base, 1, 8, active="all"),
        "AdapterExperts, K=1": lambda: mx.AdapterExperts(base, 1, **lora),
        "AdapterExperts, K=4": lambda: mx.AdapterExperts(base, 4, **lora),
        "AdapterExperts, K=1, nothing kept": lambda: mx.AdapterExperts(
            base, 1, **lora, keep_lower=False
        ),
        "AdapterExperts, K=4, nothing kept": lambda: mx.AdapterExperts(
            base, 4, **lora, keep_lower=False
        ),
        "IndependentExperts, K=1": lambda: mx.IndependentExperts([base]),
    }
    times = {name: [] for name in makers}
    numbers = {}
    steps = {}
    for name, make in makers.items():
        experts = make()
        steps[name] = stepper(experts, data)
        numbers[name] = sum(p.numel() for p in experts.parameters()) / experts.n_experts
        steps[name]()  # what is only made once
    for _ in range(REPETITIONS):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    one = "HeadExperts, K=1"
    print("| family | parameters an expert | of the base | time of a step |\n|---|---|---|---|")
    for name, own in times.items():
        ratios = [a / b for a, b in zip(own, times[one], strict=True)]
        share = numbers[name] / size
        print(
            f"| {name} | {numbers[name]:,.0f} | {100 * share:.3g} % | {statistics.median(ratios):.2f} "
            f"[{min(ratios):.2f}, {max(ratios):.2f}] |"
        )

    def ratio(what, a, b, factor=1.0):
        own = [x / (factor * y) for x, y in zip(times[a], times[b], strict=True)]
        print(f"{what}: {statistics.median(own):.3f} [{min(own):.3f}, {max(own):.3f}]")

    whole = "AdapterExperts, K=4, nothing kept"
    ratio(
        "K=4 adapters / four runs with K=1, nothing kept",
        whole,
        "AdapterExperts, K=1, nothing kept",
        4,
    )
    ratio(
        "K=4 adapters / four runs with K=1, lower blocks kept",
        "AdapterExperts, K=4",
        "AdapterExperts, K=1",
        4,
    )
    ratio(
        "pairs per second with kept lower blocks / without, K=1",
        "AdapterExperts, K=1, nothing kept",
        "AdapterExperts, K=1",
    )
    ratio("pairs per second with kept lower blocks / without, K=4", whole, "AdapterExperts, K=4")


if __name__ == "__main__":
    main()
