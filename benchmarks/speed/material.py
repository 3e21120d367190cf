"""On what is it measured? Review texts of exact length, the usual active tokens, small random models."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import mixdpo_lib as mx
from mixdpo_lib.base.model import Base
from mixdpo_lib.data.pairs import Pairs
from mixdpo_lib.study import load_reviews

USUAL_PAIRS, USUAL_COUNT = 1024, 2  # a set of 64 pairs has too few tokens; min_count is the study's


def length_rows(base: Base, n: int, prompt: int = 8, answer: int = 32) -> list[dict[str, str]]:
    """Pairs from the packaged reviews: prompts of `prompt` tokens, answers of `answer`, the end token included.

    The chosen answer is how the review went on, the rejected one a part of the next review.

    Raises
    ------
    ValueError : too few reviews of that length.
    """
    rows: list[dict[str, str]] = []
    before: list[int] | None = None
    for text in load_reviews()["text"]:
        ids = base.tokenizer(text[: 12 * (prompt + answer)], add_special_tokens=False)["input_ids"]
        if len(ids) < prompt + answer:
            continue
        if before is not None:
            parts = (before[:prompt], before[prompt:][: answer - 1], ids[prompt:][: answer - 1])
            given, *answers = map(base.tokenizer.decode, parts)
            if all(
                [len(part) for part in base.text_ids(given, one, True)] == [prompt, answer]
                for one in answers
            ):
                rows.append({"prompt": given, "chosen": answers[0], "rejected": answers[1]})
        before = ids
        if len(rows) == n:
            return rows
    raise ValueError(
        f"{len(rows)} pairs of {prompt} and {answer} tokens in the reviews, {n} wanted"
    )


def usual_tokens(base: Base, answer: int = 32) -> list[int]:
    """The tokens that occur at least twice in the answers of 1,024 pairs, sorted: about as many as the study's."""
    tokens: Counter[int] = Counter()
    for text in load_reviews()["text"][: 2 * USUAL_PAIRS]:
        ids = base.tokenizer(text[: 12 * (answer + 8)], add_special_tokens=False)["input_ids"]
        tokens.update(ids[8 : 8 + answer])
    return sorted(token for token, n in tokens.items() if n >= USUAL_COUNT)


def as_pairs(rows: list[dict[str, str]]) -> Pairs:
    """The rows as a preference set of the library; every answer ended, as TRL reads it."""
    return Pairs.of(Dataset.from_list(rows))


def on(batch: dict[str, Tensor], device: Any) -> dict[str, Tensor]:
    """A batch on the device."""
    return {name: value.to(device) for name, value in batch.items()}


def head_policy(
    base: Base, n_experts: int, pairs: Pairs, active: str | list[int] = "responses"
) -> mx.MixturePolicy:
    """An untrained mixture of heads of rank 8 with these active tokens: "responses", "all", or their ids."""
    from mixdpo_lib.gates.weights import FixedWeights

    experts = mx.HeadExperts(base, n_experts, 8, active="all" if active == "all" else "responses")
    if not isinstance(active, str):
        experts.activate(torch.tensor(active))
    experts.start(pairs)
    experts.perturb(0.01, torch.Generator().manual_seed(0))
    return mx.MixturePolicy(experts, FixedWeights.uniform(n_experts)).to(base.device)


def word_base(folder: Path, vocabulary: int, width: int = 64, blocks: int = 2) -> Base:
    """A randomly initialised small Llama whose tokens are the words w0, w1, ...; written to `folder`, then loaded."""
    words = {"<unk>": 0, "</s>": 1, **{f"w{i}": i for i in range(2, vocabulary)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        eos_token_id=1,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return mx.load_base(str(folder))


def word_rows(
    n: int, prompt: int, answer: int, distinct: int, seed: int = 0, per_prompt: int = 4
) -> list[dict[str, str]]:
    """Random pairs for `word_base`: all pairs among `per_prompt` answers of each prompt, of `distinct` words."""
    draw = torch.Generator().manual_seed(seed)

    def words(count: int) -> str:
        return " ".join(
            f"w{i}" for i in torch.randint(2, distinct, (count,), generator=draw).tolist()
        )

    rows: list[dict[str, str]] = []
    while len(rows) < n:
        given, answers = words(prompt), [words(answer - 1) for _ in range(per_prompt)]
        rows += [
            {"prompt": given, "chosen": answers[i], "rejected": answers[j]}
            for i in range(per_prompt)
            for j in range(i)
        ]
    return rows[:n]
