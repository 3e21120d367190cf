"""One pass of a frozen base over texts, kept on disk and memory-mapped.

Experts that share a frozen base read nothing but its last hidden states, so every text is run through the base once.
A text is a (prompt, response, ended) triple; the positions kept are those that predict the response tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from jaxtyping import Float, Int
from torch import Tensor

from ..data.pairs import Text, check_preferences
from ..store import MixDPOError, cached, progress
from .model import Base

VERSION = 1


def tokenise(base: Base, text: Text) -> tuple[list[int], list[int]]:
    """Token ids of prompt and response, tokenised separately; the end token is appended where `ended` is true.

    Raises
    ------
    ValueError : an empty prompt or response; a text longer than the context of the base.
    """
    prompt = base.prompt_ids(text.prompt)
    response = base.tokenizer(text.response, add_special_tokens=False)["input_ids"]
    if not prompt or not response:
        what = "prompt" if not prompt else "response"
        raise ValueError(f"{what} {getattr(text, what)!r} has no tokens: every pair needs a prompt and two responses")
    if text.ended:
        response = [*response, base.eos_token_id]
    if len(prompt) + len(response) > base.context:
        raise ValueError(
            f"prompt of {len(prompt)} and response of {len(response)} tokens exceed the context of {base.name} "
            f"({base.context} tokens); shorten the text. It begins: {text.prompt[:60]!r}"
        )
    return list(prompt), list(response)


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
    texts : the texts themselves, in order.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    hidden: np.ndarray
    prompt_hidden: np.ndarray
    key: str
    texts: tuple[Text, ...]

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
            input_ids=input_ids.to(device), attention_mask=mask.to(device), use_cache=False,
            output_hidden_states=layer is not None,
        )  # fmt: skip
    return (out.last_hidden_state if layer is None else out.hidden_states[layer]).float().cpu().numpy()


def text_features(base: Base, texts: Sequence[Text], batch_size: int = 48) -> TextFeatures:
    """Run the frozen base once over `texts`; the result is kept in the cache under the hash of texts and base."""
    digest = hashlib.sha256("\x1e".join(f"{t.prompt}\x1f{t.response}\x1f{int(t.ended)}" for t in texts).encode())
    parameters = {"base": base.fingerprint, "texts": digest.hexdigest()}

    def build(folder: Path) -> None:
        ids = [tokenise(base, t) for t in texts]
        lengths = np.array([len(r) for _, r in ids], dtype=np.int64)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        hidden = np.lib.format.open_memmap(
            folder / "hidden.npy", mode="w+", dtype=np.float32, shape=(int(offsets[-1]), base.hidden_size)
        )
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
            raise MixDPOError(f"base {base.name} gives non-finite hidden states; check its weights and dtype")
        hidden.flush()
        np.save(folder / "tokens.npy", np.array([t for _, r in ids for t in r], dtype=np.int64), allow_pickle=False)
        np.save(folder / "offsets.npy", offsets, allow_pickle=False)
        np.save(folder / "prompt_hidden.npy", pooled, allow_pickle=False)

    folder = cached("features", VERSION, parameters, build)
    return TextFeatures(
        tokens=np.load(folder / "tokens.npy", allow_pickle=False),
        offsets=np.load(folder / "offsets.npy", allow_pickle=False),
        hidden=np.load(folder / "hidden.npy", mmap_mode="r", allow_pickle=False),
        prompt_hidden=np.load(folder / "prompt_hidden.npy", allow_pickle=False),
        key=folder.name,
        texts=tuple(texts),
    )


@dataclass(frozen=True)
class TextStore:
    """Features of a set of texts and where each text lies among them."""

    features: TextFeatures
    index: dict[Text, int]


def text_store(base: Base, texts: Iterable[Text]) -> TextStore:
    """Features of the distinct texts, in order of first appearance."""
    index = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    return TextStore(text_features(base, list(index)), index)


@dataclass(frozen=True)
class PairFeatures:
    """A preference set with its features: `pairs` is (pairs, 2) int64 into `texts`, column 0 chosen, 1 rejected.

    context : (pairs, 2 hidden), what a gate of prompts reads, where it is something else than the prompt of the answers
        (its first tokens, say); None: `prompt_states` of the prompt.
    """

    rows: Dataset
    texts: TextFeatures
    pairs: Int[Tensor, "pairs 2"]
    context: Float[Tensor, "pairs features"] | None = None

    def __len__(self) -> int:
        return len(self.pairs)

    def units(self, column: str) -> tuple[Int[Tensor, "pairs"], list[str]]:
        """Unit of each pair as 0 ... U-1, and the units' names in that order."""
        if column not in self.rows.column_names:
            raise ValueError(f"unit column {column!r} is missing; found {self.rows.column_names}: name one of them")
        values = [str(v) for v in self.rows[column]]
        names = list(dict.fromkeys(values))
        place = {name: i for i, name in enumerate(names)}
        return torch.tensor([place[v] for v in values]), names

    def where(self, mask: Sequence[bool] | np.ndarray) -> PairFeatures:
        """The pairs for which `mask` is true."""
        keep = np.flatnonzero(np.asarray(mask))
        places = torch.from_numpy(keep)
        context = None if self.context is None else self.context[places]
        return PairFeatures(self.rows.select(keep), self.texts, self.pairs[places], context)


def prompt_states(features: TextFeatures, text_ids: Int[Tensor, "texts"]) -> Float[Tensor, "texts context"]:
    """The pooled hidden state of each text's prompt, (texts, 2 hidden) float32: what a gate of prompts reads.

    Mean over the prompt's tokens, then the last token's state beside it: the mean knows the words, the last token what
    the base makes of them.
    """
    ids = text_ids.numpy()
    last = features.hidden[features.offsets[ids]]  # the state that predicts the first response token
    return torch.from_numpy(np.concatenate([features.prompt_hidden[ids], last], 1))


def encode_prompts(
    base: Base, prompts: Sequence[str], layer: int | None = None, batch_size: int = 48
) -> Float[Tensor, "prompts context"]:
    """The same pooled states (see `prompt_states`) for prompts without a response.

    layer : read after so many of the base's blocks, 1 or more; None, the default: the last hidden state.

    Raises
    ------
    ValueError : a prompt without tokens; a layer that the base has not.
    """
    n_blocks = int(base.model.config.get_text_config().num_hidden_layers)
    if layer is not None and not 1 <= layer <= n_blocks:
        raise ValueError(f"layer={layer}: {base.name} has {n_blocks} blocks; expected 1 ... {n_blocks}, or None")
    ids = [base.prompt_ids(p) for p in prompts]
    for prompt, tokens in zip(prompts, ids, strict=True):
        if not tokens:
            raise ValueError(f"prompt {prompt!r} has no tokens: give at least a word")
    out = np.empty((len(ids), 2 * base.hidden_size), np.float32)
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    for start in range(0, len(ids), batch_size):
        rows = order[start : start + batch_size]
        for i, state in zip(rows, _hidden(base, [ids[i] for i in rows], layer), strict=True):
            own = state[: len(ids[i])]
            out[i] = np.concatenate([own.mean(0), own[-1]])
    return torch.from_numpy(out)


def pair_features(base: Base, rows: Dataset, store: TextStore | None = None) -> PairFeatures:
    """Features of a preference set (columns prompt, chosen, rejected [, ended: true where absent]).

    `store` may hold the texts already (candidates shared by several sets); otherwise the base is run over them once.
    """
    if len(rows) == 0:
        raise ValueError("the preference set is empty: at least one pair is needed")
    check_preferences(rows, "preference set")
    n = len(rows)
    ended = list(rows["ended"]) if "ended" in rows.column_names else [True] * n
    sides = [
        [Text(p, r, bool(e)) for p, r, e in zip(rows["prompt"], rows[side], ended, strict=True)]
        for side in ("chosen", "rejected")
    ]
    if store is None:
        store = text_store(base, [*sides[0], *sides[1]])
    pairs = torch.tensor([[store.index[text] for text in side] for side in sides]).T.contiguous()
    return PairFeatures(rows, store.features, pairs)


def gather_positions(
    features: TextFeatures, text_ids: Int[Tensor, "texts"]
) -> tuple[Float[Tensor, "positions hidden"], Int[Tensor, "positions"], Int[Tensor, "positions"]]:
    """Hidden states of the chosen texts, their places in the flat arrays, and the text (0, 1, ...) each belongs to."""
    ids = text_ids.numpy()
    starts, stops = features.offsets[ids], features.offsets[ids + 1]
    places = np.concatenate([np.arange(a, b) for a, b in zip(starts, stops, strict=True)])
    segment = np.repeat(np.arange(len(ids)), stops - starts)
    return torch.from_numpy(features.hidden[places]), torch.from_numpy(places), torch.from_numpy(segment)
