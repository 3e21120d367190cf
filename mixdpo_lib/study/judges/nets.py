"""What does a small net say of a text? Words and their spelling in, one number a text or a token out.

Made for judges: fitted from nothing in seconds on two cores, weights in safetensors. Nothing here knows a reward.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, TypeVar
from zlib import crc32

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.sparse import csr_matrix
from torch import Tensor, nn
from torch.nn import functional as F

from ...store import progress
from .contract import Judge, State

_TOKEN = re.compile(r"[A-Za-z]+(?:'[A-Za-z]+)*|[0-9]+|[^\w\s]|\w+|_+")
_STRAIGHT = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "–": "-", "—": "-", "…": "."})
_SHAPES = (
    "pad",
    "lower",
    "capital",
    "upper",
    "mixed",
    "number",
    "mark",
    "foreign",
)  # of a token; also its stand-in
NetT = TypeVar("NetT", bound=nn.Module)
AFFIXES = 4096  # buckets shared by prefixes and suffixes


def tokens_of(text: str) -> list[str]:
    """Words, numbers and single marks, quotation marks made straight.

    >>> tokens_of("It’s 1, no?")
    ["It's", '1', ',', 'no', '?']
    """
    return _TOKEN.findall(text.translate(_STRAIGHT))


def _shape(token: str) -> int:
    if token[0].isascii() and token[0].isalpha():
        kind = (
            "lower"
            if token.islower()
            else "upper"
            if token.isupper() and len(token) > 1
            else "mixed"
        )
        if kind == "mixed" and token[0].isupper() and (token[1:].islower() or len(token) == 1):
            kind = "capital"
    else:
        kind = "number" if token.isdigit() else "mark" if token.isascii() else "foreign"
    return _SHAPES.index(kind)


class Encoder:
    """Tokens as six integers: word (or its shape when unknown), shape, first letters, last letters, length, echo.

    Echo is 1 where the token is the same as the one before it, 2 where as the one before that, 3 where it occurred
    earlier in the text.

    Parameters
    ----------
    words : lower-cased vocabulary.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self.words = list(words)
        self._number = {w: i + len(_SHAPES) for i, w in enumerate(self.words)}
        self._known: dict[str, tuple[int, int, int, int, int]] = {}

    @classmethod
    def fit(cls, texts: Iterable[str], min_texts: int) -> Encoder:
        """Vocabulary of the tokens that at least `min_texts` texts use, in alphabetical order."""
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update({t.lower() for t in tokens_of(text)})
        return cls(sorted(t for t, c in counts.items() if c >= min_texts))

    @property
    def n_words(self) -> int:
        """Words and shapes that stand in for those that are not known."""
        return len(self.words) + len(_SHAPES)

    def _one(self, token: str) -> tuple[int, int, int, int, int]:
        low, shape = token.lower(), _shape(token)
        first, last = (crc32(part.encode()) % AFFIXES for part in ("<" + low[:2], low[-3:] + ">"))
        return self._number.get(low, shape), shape, first, last, min(len(low), 15)

    def __call__(self, text: str) -> Int[np.ndarray, "tokens 6"]:
        """The six integers of each token of a text; a text without any is one odd token."""
        tokens = tokens_of(text) or ["_"]
        rows = np.zeros((len(tokens), 6), np.int32)
        before = earlier = ""
        said: set[str] = set()
        for row, token in enumerate(tokens):
            if token not in self._known:
                self._known[token] = self._one(token)
            rows[row, :5], low = self._known[token], token.lower()
            rows[row, 5] = 1 if low == before else 2 if low == earlier else 3 if low in said else 0
            said.add(low)
            before, earlier = low, before
        return rows


def pad(
    encoded: Sequence[np.ndarray],
) -> tuple[Int[Tensor, "texts tokens 6"], Bool[Tensor, "texts tokens"]]:
    """One rectangle of ids (0 beyond the end) and a mask of what is text."""
    ids = np.zeros((len(encoded), max(len(e) for e in encoded), 6), np.int64)
    mask = np.zeros(ids.shape[:2], bool)
    for row, e in enumerate(encoded):
        ids[row, : len(e)], mask[row, : len(e)] = e, True
    return torch.from_numpy(ids), torch.from_numpy(mask)


class TextNet(nn.Module):
    """Embeddings of word, shape, first and last letters; residual convolutions; a number a token or a text.

    Parameters
    ----------
    n_words : of the encoder. width : channels. blocks : convolutions of three tokens; block b skips 2^b - 1 tokens.
    per_token : True: one logit a token; False: one a text, from the maximum and the mean over tokens.
    """

    def __init__(
        self,
        n_words: int,
        width: int = 64,
        blocks: int = 2,
        per_token: bool = False,
        dropout: float = 0.3,
    ):
        super().__init__()
        sizes = (n_words, len(_SHAPES), AFFIXES, AFFIXES, 16, 4)
        self.tables = nn.ModuleList(nn.Embedding(size, width) for size in sizes)
        for table in self.tables:
            nn.init.normal_(table.weight, std=0.1)  # type: ignore[arg-type]
        self.convolutions = nn.ModuleList(
            nn.Conv1d(width, width, 3, padding=2**b, dilation=2**b) for b in range(blocks)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(blocks))
        self.dropout, self.per_token = nn.Dropout(dropout), per_token
        self.head = nn.Linear(width if per_token else 2 * width, 1)

    def forward(
        self, ids: Int[Tensor, "texts tokens 6"], mask: Bool[Tensor, "texts tokens"]
    ) -> Float[Tensor, "texts *tokens"]:
        """Logits: one a text, or one a token (of what is no text: anything)."""
        keep = mask.unsqueeze(-1)
        h = sum(table(ids[..., i]) for i, table in enumerate(self.tables))
        h = self.dropout(h) * keep
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            h = h + F.gelu(norm(convolution(h.transpose(1, 2)).transpose(1, 2)))
            h = h * keep
        if self.per_token:
            return self.head(self.dropout(h)).squeeze(-1)
        largest = h.masked_fill(~keep, -1e4).amax(1)
        mean = h.sum(1) / keep.sum(1)
        return self.head(self.dropout(torch.cat([largest, mean], -1))).squeeze(-1)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Small nets: a second thread mostly waits, and a judge's numbers must not hang on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with _one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def batches(
    lengths: np.ndarray, batch_tokens: int, rng: np.random.Generator | None
) -> list[np.ndarray]:
    """Rows grouped by length so that a padded batch holds about `batch_tokens`; shuffled when `rng` is given."""
    noise = rng.uniform(0, 6, len(lengths)) if rng is not None else 0.0
    order = np.argsort(lengths + noise, kind="stable")
    groups, start = [], 0
    while start < len(order):
        end = start + 1
        while end < len(order) and (end + 1 - start) * lengths[order[end]] <= batch_tokens:
            end += 1
        groups.append(order[start:end])
        start = end
    if rng is not None:
        rng.shuffle(groups)  # type: ignore[arg-type]
    return groups


def fit_net(
    make: Callable[[], TextNet],
    epochs: Iterable[tuple[np.ndarray, Callable[[TextNet, np.ndarray], Tensor]]],
    n_epochs: int,
    *,
    stage: str,
    seed: int,
    learning_rate: float = 2e-3,
    batch_tokens: int = 4096,
) -> TextNet:
    """AdamW with one rise and fall of the learning rate.

    Parameters
    ----------
    make : builds the net (after the seed is set).
    epochs : for every pass, the length of each row and `loss(net, rows)`, the mean loss of those rows. A pass may bring
        new data (fresh corruptions).
    stage : name in the progress lines.
    """
    with _seeded(seed):
        net = make().train()
        rng = np.random.default_rng(seed)
        optimiser = torch.optim.AdamW(net.parameters(), lr=learning_rate, weight_decay=1e-2)
        for epoch, (lengths, loss_of) in enumerate(epochs):
            groups = batches(lengths, batch_tokens, rng)
            for step, rows in enumerate(groups):
                done = (epoch + step / len(groups)) / n_epochs
                for group in optimiser.param_groups:
                    group["lr"] = learning_rate * min(1.0, 10 * done + 0.05, 1.05 - done)
                loss = loss_of(net, rows)
                optimiser.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(net.parameters(), 1.0)
                optimiser.step()
                progress(
                    stage,
                    epoch * len(groups) + step + 1,
                    n_epochs * len(groups),
                    f"loss {loss.item():.3f}",
                )
    return net.eval()


@torch.inference_mode()
def apply_net(
    net: TextNet, encoded: Sequence[np.ndarray], batch_tokens: int = 16384
) -> list[np.ndarray]:
    """What the net says of each text: an array of one logit, or of one a token; in the order given."""
    net.eval()
    out: list[np.ndarray] = [np.empty(0)] * len(encoded)
    lengths = np.array([len(e) for e in encoded])
    with _one_thread():
        for rows in batches(lengths, batch_tokens, None):
            values = net(*pad([encoded[r] for r in rows])).double().numpy()
            for value, row in zip(values, rows, strict=True):
                out[row] = value[: lengths[row]] if net.per_token else value[None]
    return out


def net_arrays(net: nn.Module) -> dict[str, np.ndarray]:
    """Weights by name, for safetensors."""
    return {name: value.detach().numpy() for name, value in net.state_dict().items()}


def load_arrays(net: NetT, arrays: dict[str, np.ndarray]) -> NetT:
    """The net with these weights, for use."""
    net.load_state_dict(
        {name: torch.from_numpy(np.asarray(value)) for name, value in arrays.items()}
    )
    return net.eval()


class AveragingNet(nn.Module):
    """Deep averaging network: embeddings of the terms of a text, summed and scaled, one hidden layer, one logit.

    Source: Iyyer et al. 2015, "Deep unordered composition rivals syntactic methods for text classification".

    Parameters
    ----------
    n_terms : of the vocabulary. first : initial first coordinate of every embedding (what is known of the terms).
    """

    def __init__(
        self,
        n_terms: int,
        first: Float[np.ndarray, "terms"] | None = None,
        width: int = 16,
        hidden: int = 32,
    ):
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(n_terms, width) * 0.05)
        if first is not None:
            with torch.no_grad():
                self.embedding[:, 0] = torch.from_numpy(np.asarray(first)).float()
        self.hidden, self.head = nn.Linear(width, hidden), nn.Linear(hidden, 1)

    def forward(self, counts: csr_matrix, word_dropout: float = 0.0) -> Float[Tensor, "texts"]:
        """Rows of `counts` are texts; a text with no known term gives the logit of an empty text."""
        weights = torch.from_numpy(counts.data.astype(np.float32))
        if word_dropout:
            weights = weights * (torch.rand(len(weights)) > word_dropout) / (1 - word_dropout)
        where, start = (
            torch.from_numpy(a.astype(np.int64)) for a in (counts.indices, counts.indptr[:-1])
        )
        summed = F.embedding_bag(
            where, self.embedding, start, per_sample_weights=weights, mode="sum"
        )
        return self.head(F.gelu(self.hidden(summed))).squeeze(-1)


def fit_averaging_net(
    counts: csr_matrix,
    labels: np.ndarray,
    first: np.ndarray,
    *,
    stage: str,
    seed: int,
    n_epochs: int = 2,
    batch_size: int = 512,
    learning_rate: float = 2e-3,
    word_dropout: float = 0.3,
) -> AveragingNet:
    """AdamW on the logistic loss; terms are dropped at random, so that no text hangs on one of them."""
    with _seeded(seed):
        net, rng = AveragingNet(counts.shape[1], first), np.random.default_rng(seed)
        target = torch.from_numpy(np.asarray(labels)).float()
        batch_size = min(
            batch_size, max(16, len(labels) // 60)
        )  # few texts: still some 60 steps a pass
        optimiser = torch.optim.AdamW(net.parameters(), lr=learning_rate, weight_decay=0.0)
        total, done = n_epochs * -(-len(labels) // batch_size), 0
        for _ in range(n_epochs):
            order = rng.permutation(len(labels))
            for begin in range(0, len(order), batch_size):
                rows = order[begin : begin + batch_size]
                for group in optimiser.param_groups:
                    group["lr"] = learning_rate * min(
                        1.0, 10 * done / total + 0.05, 1.05 - done / total
                    )
                loss = F.binary_cross_entropy_with_logits(
                    net(counts[rows], word_dropout), target[torch.from_numpy(rows)]
                )
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                done += 1
                progress(stage, done, total, f"loss {loss.item():.3f}")
    return net.eval()


class NetJudge(Judge):
    """A judge that is an encoder and a convolutional `TextNet` of this `shape` (its options)."""

    shape: ClassVar[dict[str, Any]]

    def __init__(self, encoder: Encoder, net: TextNet) -> None:
        self.encoder, self.net = encoder, net

    def of_tokens(self, texts: list[str]) -> list[np.ndarray]:
        """What the net says of each token of each text: logits."""
        return apply_net(self.net, [self.encoder(t) for t in texts])

    def state(self) -> State:
        """Weights, and the vocabulary."""
        return net_arrays(self.net), {"words": self.encoder.words}

    @classmethod
    def from_state(cls, arrays: dict[str, np.ndarray], values: dict[str, Any]) -> NetJudge:
        """The judge that gave this `state`."""
        encoder = Encoder(values["words"])
        return cls(encoder, load_arrays(TextNet(encoder.n_words, **cls.shape), arrays))
