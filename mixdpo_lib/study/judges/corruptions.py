"""What does a text look like that is badly formed? Corruptions by kind: plain Python.

Each takes a text and a generator of random numbers, and returns None where the text offers no place
for it. The judges are fitted on some of these versions and reported on all of them. Nothing here
knows a judge.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from random import Random

from .words import WORD, replaced


def spelling(text: str, rng: Random) -> str | None:
    """One letter of a word of four or more is dropped, doubled, replaced or swapped."""
    places = [
        m
        for m in WORD.finditer(text)
        if len(m.group()) >= 4 and m.group().islower() and m.group().isalpha()
    ]
    for _ in range(8 if places else 0):
        match = rng.choice(places)
        word, i, kind = match.group(), rng.randrange(1, len(match.group()) - 1), rng.randrange(4)
        new = (
            word[:i] + word[i + 1 :],
            word[:i] + word[i] + word[i:],
            word[:i] + rng.choice("abcdefghijklmnopqrstuvwxyz") + word[i + 1 :],
            word[:i] + word[i + 1] + word[i] + word[i + 2 :],
        )[kind]
        if new != word:
            return replaced(text, match, new)
    return None


_ARTICLE = re.compile(r"\b[Aa]n?(?= [A-Za-z])")


def article(text: str, rng: Random) -> str | None:
    """One "a" becomes "an", or the other way round."""
    places = list(_ARTICLE.finditer(text))
    if not places:
        return None
    match = rng.choice(places)
    return replaced(text, match, "a" if match.group().lower() == "an" else "an")


def repetition(text: str, rng: Random) -> str | None:
    """One word is said twice in a row."""
    places = [m for m in WORD.finditer(text) if m.group().islower()]
    if not places:
        return None
    match = rng.choice(places)
    return replaced(text, match, f"{match.group()} {match.group()}")


_NUMBER_PAIRS = "is are|was were|has have|does do|isn't aren't|wasn't weren't|doesn't don't|hasn't haven't|this these|that those"
_OTHER_NUMBER = {
    a: b for pair in _NUMBER_PAIRS.split("|") for a, b in (pair.split(), reversed(pair.split()))
}
_VERB_NUMBER = {
    k: v for k, v in _OTHER_NUMBER.items() if k not in ("this", "these", "that", "those")
}


def agreement(text: str, rng: Random) -> str | None:
    """One verb changes its number: is/are, was/were, has/have, does/do."""
    places = [m for m in WORD.finditer(text) if m.group().lower() in _VERB_NUMBER]
    if not places:
        return None
    match = rng.choice(places)
    return replaced(text, match, _VERB_NUMBER[match.group().lower()])


_PAST_FORMS = (
    "go:went see:saw make:made get:got take:took give:gave find:found think:thought know:knew come:came "
    "say:said tell:told feel:felt become:became keep:kept leave:left write:wrote begin:began lose:lost "
    "fall:fell meet:met hold:held bring:brought buy:bought do:did have:had be:was watch:watched like:liked "
    "love:loved look:looked want:wanted try:tried enjoy:enjoyed believe:believed seem:seemed play:played "
    "use:used work:worked call:called help:helped start:started turn:turned live:lived save:saved "
    "follow:followed show:showed understand:understood spend:spent stand:stood sit:sat run:ran waste:wasted "
    "end:ended kill:killed"
)
_PAST = {base: past for base, past in (form.split(":") for form in _PAST_FORMS.split())}
_BASE_AFTER = re.compile(
    r"\b(?:to|will|would|can|could|should|must|did|didn't|don't|doesn't|can't|won't|couldn't|wouldn't) ("
    + "|".join(_PAST)
    + r")\b",
    re.I,
)


def tense(text: str, rng: Random) -> str | None:
    """One base form after "to", a modal or "did" becomes a past form ("to see" -> "to saw")."""
    places = list(_BASE_AFTER.finditer(text))
    if not places:
        return None
    match = rng.choice(places)
    return text[: match.start(1)] + _PAST[match.group(1).lower()] + text[match.end(1) :]


_ANY_ARTICLE = re.compile(r"(?<=\s)(?:the|an?) (?=[A-Za-z])")


def dropped_article(text: str, rng: Random) -> str | None:
    """One "the", "a" or "an" inside the sentence is left out."""
    places = list(_ANY_ARTICLE.finditer(text))
    if not places:
        return None
    match = rng.choice(places)
    return text[: match.start()] + text[match.end() :]


_NEIGHBOURS = re.compile(r"\b(?=([a-z]+) ([a-z]+)\b)")


def swapped_neighbours(text: str, rng: Random) -> str | None:
    """Two different neighbouring lower-case words change places."""
    places = [m for m in _NEIGHBOURS.finditer(text) if m.group(1) != m.group(2)]
    if not places:
        return None
    match = rng.choice(places)
    return f"{text[: match.start(1)]}{match.group(2)} {match.group(1)}{text[match.end(2) :]}"


def full_shuffle(text: str, rng: Random) -> str | None:
    """All words in a random order."""
    words = text.split()
    mixed = rng.sample(words, len(words))
    return None if mixed == words else " ".join(mixed)


CORRUPTIONS: Mapping[str, Callable[[str, Random], str | None]] = {
    "spelling": spelling,
    "article": article,
    "repetition": repetition,
    "agreement": agreement,
    "tense": tense,
    "dropped_article": dropped_article,
    "swapped_neighbours": swapped_neighbours,
    "full_shuffle": full_shuffle,
}
SYMBOLS = ("###", "***", "@@@", "%%", "=>", "~~~", "|||", "{}", "[[", "^^", "\\\\", "<>")
EMOJI = (
    "\U0001f600",
    "\U0001f525",
    "\U0001f3ac",
    "❤️",
    "\U0001f44d",
    "\U0001f62d",
    "\U0001f37f",
    "⭐",
)
_ODD_LETTERS = "abcdefghijklmnopqrstuvwxyz" * 2 + "éüñøßжиктраのアラ中文字"


def stray_symbol(text: str, rng: Random) -> str | None:
    """One to three symbols, emoji or foreign letters stand where a space was."""
    places = [m for m in re.finditer(" ", text)]
    if not places:
        return None
    match = rng.choice(places)
    found = "".join(
        rng.choice(SYMBOLS + EMOJI + tuple(_ODD_LETTERS[-10:])) for _ in range(rng.randint(1, 3))
    )
    return (
        text[: match.start()]
        + rng.choice((" {} ", "{} ", " {}")).format(found)
        + text[match.end() :]
    )


def garbled_word(text: str, rng: Random) -> str | None:
    """One word gives way to letters that make no word, at times joined to the next word."""
    places = list(WORD.finditer(text))
    if not places:
        return None
    match = rng.choice(places)
    odd = "".join(
        rng.choice(_ODD_LETTERS[: rng.choice((26, 26, len(_ODD_LETTERS)))])
        for _ in range(rng.randint(3, 10))
    )
    odd = rng.choice((odd, odd, odd.capitalize(), match.group() + odd))
    return text[: match.start()] + odd + text[match.end() + rng.randint(0, 1) :]


DAMAGE: Mapping[
    str, Callable[[str, Random], str | None]
] = {  # beyond what people write: what samplers write
    "stray_symbol": stray_symbol,
    "garbled_word": garbled_word,
}
