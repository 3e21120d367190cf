"""One pass of a frozen base over texts, kept on disk and memory-mapped.

Experts that share a frozen base read nothing but its last hidden states, so every text is run through the base once.
The positions kept are those that predict the response tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..data.checks import BadRows, RowError
from ..data.messages import as_prompt
from ..data.pairs import Pairs, Text, Texts
from ..store import MixDPOError, cached, large_array, progress
from .model import Base

VERSION = 2
TokenIds = list[tuple[list[int], list[int]]]
_PROMPT_VERSION = 1


def tokenise(base: Base, text: Text) -> tuple[list[int], list[int]]:
    """Token ids of prompt and response, see `Base.text_ids`."""
    return base.text_ids(text.prompt, text.response, text.ended)


def check_rows(base: Base, pairs: Pairs) -> None:
    """Refuse a set with texts that the base cannot read; what it makes of them is kept (see `tokenised`).

    Raises
    ------
    ValueError : all such rows are counted, ten are named.
    """
    kept = _tokenised.setdefault(pairs.texts, {})
    if base.fingerprint in kept:
        return
    refused: dict[int, ValueError] = {}
    ids: TokenIds = []
    for i, text in enumerate(pairs.texts.texts):
        try:
            ids.append(tokenise(base, text))
        except ValueError as error:
            refused[i] = error
    if not refused:
        kept[base.fingerprint] = ids
        return
    bad = BadRows()
    for row, sides in enumerate(pairs.index.tolist()):
        for column, i in zip(("chosen", "rejected"), sides, strict=True):
            if i in refused:
                bad.add("preference set", row, RowError(str(refused[i]), column))
                break
    way = "load_preferences(..., base=base, on_bad_rows='drop') goes on without them"
    bad.refuse(len(pairs), f"mend these rows, or {way}")
    raise next(iter(refused.values()))  # of texts that no pair asks for


_tokenised: WeakKeyDictionary[Texts, dict[str, TokenIds]] = WeakKeyDictionary()


def tokenised(base: Base, texts: Texts) -> TokenIds:
    """Token ids of prompt and response of every text, see `tokenise`; made once for a set of texts and a base."""
    kept = _tokenised.setdefault(texts, {})
    if base.fingerprint not in kept:
        kept[base.fingerprint] = [tokenise(base, text) for text in texts.texts]
    return kept[base.fingerprint]


def ids_key(ids: TokenIds) -> str:
    """sha256 of token ids, 64 hex digits: part of the key of everything that is computed from them."""
    return hashlib.sha256(repr(ids).encode()).hexdigest()


def padded(ids: Sequence[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
    """Sequences padded on the right, and where each response token is predicted: column, token, text."""
    rows = [a + b for a, b in ids]
    input_ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for i, row in enumerate(rows):
        input_ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
    column = [len(a) - 1 + j for a, b in ids for j in range(len(b))]
    return {
        "input_ids": input_ids,
        "attention_mask": mask,
        "column": torch.tensor(column),
        "target": torch.tensor([t for _, b in ids for t in b]),
        "segment": torch.tensor([i for i, (_, b) in enumerate(ids) for _ in b]),
    }


@dataclass(frozen=True)
class TextFeatures:
    """Hidden states of a list of texts, flattened over response tokens.

    Attributes
    ----------
    tokens : (positions,) int64, the response tokens of all texts, one text after the other.
    offsets : (texts + 1,) int64, text i owns positions offsets[i] ... offsets[i + 1] - 1.
    hidden : (positions, hidden) float32, memory-mapped: the base's last hidden state that predicts each token.
    prompt_hidden : (texts, hidden) float32, mean last hidden state over the prompt's tokens.
    key : identity of this set of texts under this base.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    hidden: np.ndarray
    prompt_hidden: np.ndarray
    key: str

    def __len__(self) -> int:
        return len(self.offsets) - 1


def _hidden(base: Base, sequences: Sequence[list[int]], layer: int | None = None) -> np.ndarray:
    """Hidden states of token sequences, padded on the right: (rows, longest, hidden) float32.

    layer : after so many blocks; None: the last hidden state, which the head reads.
    """
    width = max(map(len, sequences))
    input_ids = torch.zeros(len(sequences), width, dtype=torch.long)
    mask = torch.zeros(len(sequences), width, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        input_ids[row, : len(sequence)] = torch.tensor(sequence)
        mask[row, : len(sequence)] = 1
    device = base.model.device
    with torch.inference_mode():
        out = base.model.base_model(
            input_ids=input_ids.to(device),
            attention_mask=mask.to(device),
            use_cache=False,
            output_hidden_states=layer is not None,
        )
    states = out.last_hidden_state if layer is None else out.hidden_states[layer]
    return states.float().cpu().numpy()


def text_features(base: Base, texts: Texts, batch_size: int = 48) -> TextFeatures:
    """Run the frozen base once over `texts`; the result is kept in the cache under the key of texts and base."""
    ids = tokenised(base, texts)
    parameters = {"base": base.fingerprint, "ids": ids_key(ids)}

    def build(folder: Path) -> None:
        lengths = np.array([len(r) for _, r in ids], dtype=np.int64)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        hidden = large_array(folder / "hidden.npy", (int(offsets[-1]), base.hidden_size))
        pooled = np.zeros((len(ids), base.hidden_size), dtype=np.float32)
        order = sorted(range(len(ids)), key=lambda i: -sum(map(len, ids[i])))
        done = 0
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            states = _hidden(base, [ids[i][0] + ids[i][1] for i in rows])
            for j, i in enumerate(rows):
                n_prompt, n = len(ids[i][0]), len(ids[i][1])
                hidden[offsets[i] : offsets[i + 1]] = states[j, n_prompt - 1 : n_prompt - 1 + n]
                pooled[i] = states[j, :n_prompt].mean(0)
            done += len(rows)
            progress("features", done, len(ids), "texts")
        if not np.isfinite(hidden).all():
            raise MixDPOError(
                f"base {base.name} gives non-finite hidden states; check its weights and dtype"
            )
        hidden.flush()
        tokens = np.array([t for _, r in ids for t in r], dtype=np.int64)
        np.save(folder / "tokens.npy", tokens, allow_pickle=False)
        np.save(folder / "offsets.npy", offsets, allow_pickle=False)
        np.save(folder / "prompt_hidden.npy", pooled, allow_pickle=False)

    folder = cached("features", VERSION, parameters, build)
    return TextFeatures(
        tokens=np.load(folder / "tokens.npy", allow_pickle=False),
        offsets=np.load(folder / "offsets.npy", allow_pickle=False),
        hidden=np.load(folder / "hidden.npy", mmap_mode="r", allow_pickle=False),
        prompt_hidden=np.load(folder / "prompt_hidden.npy", allow_pickle=False),
        key=folder.name,
    )


def encode_prompts(
    base: Base, prompts: Sequence[Any], layer: int | None = None, batch_size: int = 48
) -> Float[Tensor, "prompts hidden"]:
    """The state of each prompt's last token, float32: what a gate of prompts reads. Kept in the cache.

    prompts : texts or conversations.
    layer : read after so many of the base's blocks, 1 or more; None, the default: the last hidden state.

    Raises
    ------
    ValueError : a prompt without tokens; a layer that the base has not.
    """
    n_blocks = int(base.model.config.get_text_config().num_hidden_layers)
    if layer is not None and not 1 <= layer <= n_blocks:
        raise ValueError(
            f"layer={layer}: {base.name} has {n_blocks} blocks; expected 1 ... {n_blocks}, or None"
        )
    prompts = [as_prompt(prompt) for prompt in prompts]
    distinct = list(dict.fromkeys(prompts))
    ids = [base.prompt_ids(p) for p in distinct]
    for prompt, tokens in zip(distinct, ids, strict=True):
        if not tokens:
            raise ValueError(f"prompt {prompt!r} has no tokens: give at least a word")
    digest = hashlib.sha256(repr(ids).encode()).hexdigest()

    def build(folder: Path) -> None:
        found: dict[int, np.ndarray] = {}
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        for start in range(0, len(ids), batch_size):
            rows = order[start : start + batch_size]
            for i, state in zip(rows, _hidden(base, [ids[i] for i in rows], layer), strict=True):
                found[i] = state[len(ids[i]) - 1]
        states = np.stack([found[i] for i in range(len(ids))])
        np.save(folder / "states.npy", states, allow_pickle=False)

    parameters = {"base": base.fingerprint, "ids": digest, "layer": layer}
    folder = cached("prompts", _PROMPT_VERSION, parameters, build)
    states = torch.from_numpy(np.load(folder / "states.npy", allow_pickle=False))
    place = {prompt: i for i, prompt in enumerate(distinct)}
    return states[torch.tensor([place[prompt] for prompt in prompts])]


def gather_positions(
    features: TextFeatures, text_ids: Int[Tensor, "texts"]
) -> tuple[Float[Tensor, "positions hidden"], Int[Tensor, "positions"], Int[Tensor, "positions"]]:
    """Hidden states of the chosen texts, their places in the flat arrays, and the text (0, 1, ...) each belongs to."""
    ids = text_ids.numpy()
    starts, stops = features.offsets[ids], features.offsets[ids + 1]
    places = np.concatenate([np.arange(a, b) for a, b in zip(starts, stops, strict=True)])
    segment = np.repeat(np.arange(len(ids)), stops - starts)
    return (
        torch.from_numpy(features.hidden[places]),
        torch.from_numpy(places),
        torch.from_numpy(segment),
    )
