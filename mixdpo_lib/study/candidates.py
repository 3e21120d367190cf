"""What could be answered? Prompts, their split, and continuations of them by the base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from ..base.model import Base
from ..base.tokens import answer_text
from ..policy.next_token import reference_next_token
from ..policy.sampling import sample
from ..store import cached, hash_seed, progress

VERSION = 1


@dataclass(frozen=True)
class CandidateConfig:
    """How prompts are cut and candidates sampled: numbers of prompts, tokens and texts."""

    n_prompts: int = 700  # 70 % train, 10 % validation, 20 % test
    more_test_prompts: int = 0  # after those, all of them test; >= 0
    prompt_tokens: int = 10  # at most; cut back to a whole word
    response_tokens: int = (
        24  # with the prompt about 27 words: long enough to judge, short enough for a laptop
    )
    n_candidates: int = 4  # six pairs a prompt
    batch_size: int = 192
    seed: int = 0


def first_words(base: Base, text: str, n_tokens: int) -> str | None:
    """The first tokens of a text, cut back to whole words.

    Parameters
    ----------
    n_tokens : of the base's tokenizer, at most.

    Returns
    -------
    None for a text that is not longer than that, or of which no word is whole by then.
    """
    begin = text[: 40 * n_tokens]  # ten times what is needed
    ids = base.tokenizer(begin, add_special_tokens=False)["input_ids"][: n_tokens + 1]
    if len(ids) <= n_tokens:
        return None
    return str(base.tokenizer.decode(ids)).rpartition(" ")[0].strip() or None


def review_prompts(base: Base, texts: Sequence[str], config: CandidateConfig) -> list[str]:
    """The first words of reviews, at least four, distinct, in random order (seeded): `n_prompts`, and
    `more_test_prompts` after them.

    Raises
    ------
    ValueError : fewer of them than wanted.
    """
    wanted = config.n_prompts + config.more_test_prompts
    order = np.random.default_rng(config.seed).permutation(len(texts))
    prompts: dict[str, None] = {}
    for i in order:
        prompt = first_words(base, texts[i], config.prompt_tokens)
        if prompt is not None and prompt.count(" ") >= 3:
            prompts.setdefault(prompt)
        if len(prompts) == wanted:
            return list(prompts)
    raise ValueError(
        f"only {len(prompts)} distinct prompts of {config.prompt_tokens} tokens in {len(texts)} reviews, "
        f"n_prompts={config.n_prompts} and more_test_prompts={config.more_test_prompts} wanted: give more reviews or "
        "ask for fewer prompts"
    )


def sample_candidates(base: Base, prompts: Sequence[str], config: CandidateConfig) -> pd.DataFrame:
    """`n_candidates` continuations of each prompt, sampled from the base at temperature 1, untruncated.

    A batch has the seed of its first text, so that prompts which are added leave those of full batches as they were.

    Returns a table: prompt_id, candidate, prompt, response (keeps its leading space), ended.
    """
    parameters = {**asdict(config), "base": base.fingerprint, "prompts": list(prompts)}

    def build(folder: Path) -> None:
        ids = [base.prompt_ids(p) for p in prompts]
        for prompt, tokens in zip(prompts, ids, strict=True):
            if len(tokens) + config.response_tokens > base.context:
                raise ValueError(
                    f"prompt of {len(tokens)} tokens leaves no room for {config.response_tokens} response tokens in "
                    f"the context of {base.name} ({base.context}). It begins: {prompt[:60]!r}"
                )
        jobs = [(i, c) for i in range(len(prompts)) for c in range(config.n_candidates)]
        rows = []
        for start in range(0, len(jobs), config.batch_size):
            part = jobs[start : start + config.batch_size]
            generator = torch.Generator().manual_seed(hash_seed(config.seed, "candidates", start))
            out = sample(
                reference_next_token(base),
                [ids[i] for i, _ in part],
                config.response_tokens,
                eos_token_id=base.end_ids,
                generator=generator,
                progress=partial(_report, start, len(part), len(jobs)),
            )
            for (i, c), tokens, ended in zip(part, out.tokens, out.ended, strict=True):
                text = answer_text(base.tokenizer, ids[i], tokens)
                rows.append(
                    {
                        "prompt_id": i,
                        "candidate": c,
                        "prompt": prompts[i],
                        "response": text,
                        "ended": ended,
                    }
                )
        pd.DataFrame(rows).to_json(folder / "candidates.jsonl", orient="records", lines=True)

    folder = cached("candidates", VERSION, parameters, build)
    table = pd.read_json(
        folder / "candidates.jsonl", orient="records", lines=True, dtype=False, convert_dates=False
    )
    return table


def _report(start: int, rows: int, total: int, done: int, of: int) -> None:
    progress("candidates", start + rows * done // of, total, "texts")


def split_prompts(n_prompts: int, more_test_prompts: int = 0) -> dict[str, range]:
    """Prompts 0 ... n-1 (already in random order) as train (70 %), validation (10 %), test (20 % and those added).

    >>> split_prompts(10, more_test_prompts=3)
    {'train': range(0, 7), 'validation': range(7, 8), 'test': range(8, 13)}
    """
    a, b, end = round(0.7 * n_prompts), round(0.8 * n_prompts), n_prompts + more_test_prompts
    return {"train": range(0, a), "validation": range(a, b), "test": range(b, end)}


def usable(candidates: pd.DataFrame) -> pd.DataFrame:
    """Candidates that can be judged: a blank response has no words, a repeated one no rival. Says how many went."""
    words = candidates["response"].str.contains(r"[A-Za-z]{2}")
    repeated = candidates.duplicated(["prompt_id", "response"])
    gone = int((~words | repeated).sum())
    if gone:
        progress(
            "usable candidates",
            len(candidates) - gone,
            len(candidates),
            f"{gone} without words or repeated",
        )
    return candidates[words & ~repeated].reset_index(drop=True)
