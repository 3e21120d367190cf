"""What are the words, sentences and pieces of a text? Plain Python."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from random import Random

WORD = re.compile(r"[A-Za-z]+(?:['’][A-Za-z]+)*")
N_COMMON = 300  # of `common_words`: function words and the words that every second review uses
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'])")


def sentences(text: str, shortest: int = 8, longest: int = 40) -> list[str]:
    """Sentences of `shortest` to `longest` words, from a capital to a full stop.

    >>> sentences("I saw it twice with my old friend Tom. Bad. it was, um, fine")
    ['I saw it twice with my old friend Tom.']
    """
    found = []
    for part in _SENTENCE_END.split(" ".join(text.split())):
        if part[:1].isupper() and part[-1:] in ".!?" and shortest <= len(part.split()) <= longest:
            found.append(part)
    return found


def piece(text: str, n_words: int, rng: Random, start: int | None = None) -> str:
    """`n_words` consecutive words from word `start`, or a random place; all of a shorter text.

    >>> piece("one two three four", 2, Random(0), start=1)
    'two three'
    """
    words = text.split()
    if start is None:
        start = rng.randint(0, max(0, len(words) - n_words))
    return " ".join(words[start : start + n_words])


def cut_pieces(
    texts: Iterable[str], n_pieces: int, piece_words: int, rng: Random
) -> list[list[str]]:
    """Of each text: itself, its first piece, and `n_pieces - 1` from random places.

    A piece has 0.6 to 1.5 times `piece_words` words, drawn evenly.
    """
    low, high = round(0.6 * piece_words), round(1.5 * piece_words)
    return [
        [t]
        + [
            piece(t, rng.randint(low, high), rng, start=0 if i == 0 else None)
            for i in range(n_pieces)
        ]
        for t in texts
    ]


def count_reviews(texts: Iterable[str]) -> Counter[str]:
    """In how many texts each lower-cased word occurs; in order of first appearance.

    >>> count_reviews(["the dog, the cat", "A dog"])
    Counter({'dog': 2, 'cat': 1, 'the': 1, 'a': 1})
    """
    counts: Counter[str] = Counter()
    for text in texts:  # sorted: a set has another order in every process; ties are broken by it
        counts.update(sorted({w.lower().replace("’", "'") for w in WORD.findall(text)}))
    return counts


def common_words(texts: Iterable[str], n_words: int = N_COMMON) -> frozenset[str]:
    """The `n_words` lower-cased words that most texts use; of equal ones the first to appear.

    >>> sorted(common_words(["A dog, a cat", "The dog", "the bird"], 3))
    ['a', 'dog', 'the']
    """
    return frozenset(word for word, _ in count_reviews(texts).most_common(n_words))


def replaced(text: str, match: re.Match, new: str) -> str:
    """`text` with `new` in the place of `match`, with a capital where the match has one."""
    if match.group()[:1].isupper():
        new = new[:1].upper() + new[1:]
    return text[: match.start()] + new + text[match.end() :]
