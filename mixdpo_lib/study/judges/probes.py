"""What does a text look like that says little, or that a policy under optimisation may write?

The judges are fitted on some of these versions and reported on all of them. Plain Python; nothing
here knows a judge.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from random import Random

from .corruptions import EMOJI, SYMBOLS, full_shuffle
from .words import WORD, replaced

# --- loss of content
FILLER_FIT = (  # seen by the judges that learn from degraded texts
    "I have to say that this is something that I would say about it.",
    "It was what it was and that is all there is to it.",
    "You know what I mean, it is just one of those things.",
    "There is a lot going on here and some of it is good and some of it is not.",
    "I do not really know what else to say about this one.",
    "All in all it is what you would think it is.",
    "It is a movie and you can see it if you want to.",
    "Well, that is how it is and I guess that is fine.",
    "I mean, it is not like it is the best or the worst.",
    "Some people will like it and some people will not.",
    "In my opinion it really is a very, very good thing.",
    "To be honest with you, I thought it was okay, more or less.",
)
FILLER_PROBE = (  # never seen in fitting
    "When it comes down to it, what more can anybody say?",
    "This is the kind of thing that you either like or you don't like.",
    "Anyway, I just wanted to let everybody know what I think.",
    "As far as I am concerned, it is pretty much the way it should be.",
    "It has its good parts and it has its bad parts, like most things do.",
    "So yeah, that is about it, take it or leave it.",
    "It makes you feel the way it makes you feel, and so on and so forth.",
    "If you like this sort of thing, then this is the sort of thing you will like.",
    "At the end of the day, it's really up to you.",
    "There are things in it that happen, and then other things happen.",
)


def _filler(n_words: int, rng: Random, filler: Sequence[str]) -> str:
    words: list[str] = []
    while len(words) < n_words:
        words += rng.choice(filler).split()
    return " ".join(words[:n_words])


def padded(
    text: str, rng: Random, filler: Sequence[str] = FILLER_PROBE, share: float = 0.75
) -> str:
    """The same text with filler after it, `share` times as many words."""
    return f"{text} {_filler(max(4, round(share * len(text.split()))), rng, filler)}"


def diluted(text: str, rng: Random, filler: Sequence[str] = FILLER_PROBE) -> str:
    """The second half gives way to filler; the number of words stays."""
    words = text.split()
    half = len(words) // 2
    return " ".join(words[:half]) + " " + _filler(len(words) - half, rng, filler)


def repeated(text: str, rng: Random) -> str:
    """The first quarter to half is said again and again, up to the same number of words."""
    words = text.split()
    part = words[: max(3, round(len(words) * rng.uniform(0.25, 0.5)))]
    return " ".join((part * (len(words) // len(part) + 1))[: len(words)])


STAND_INS_FIT = {  # by ending; "" for every other word
    "ly": ("really", "just", "also"),
    "ing": ("doing", "being", "having"),
    "ed": ("made", "done", "had"),
    "": ("thing", "good", "people", "way", "something", "bad", "one", "movie", "time"),
}
STAND_INS_PROBE = {  # never seen in fitting
    "ly": ("very", "quite", "too"),
    "ing": ("going", "getting", "making"),
    "ed": ("got", "put", "went"),
    "": ("stuff", "great", "lot", "man", "thing", "someone", "nice", "film", "part", "bit"),
}


def generic(
    text: str,
    rng: Random,
    common: frozenset[str],
    stand_ins: Mapping[str, Sequence[str]] = STAND_INS_PROBE,
) -> str:
    """Every word outside `common` (lower-cased) gives way to one that says little."""

    def stand_in(match: re.Match) -> str:
        word = match.group().lower()
        if word in common:
            return match.group()
        return rng.choice(next(stand_ins[end] for end in stand_ins if word.endswith(end)))

    return WORD.sub(stand_in, text)


_SPECIFIC = (
    "A retired {job} returns to {place} to find the {thing} that his {kin} buried before the {event}.",
    "The {event} in {place} is filmed from the cabin of a {vehicle}, with a {kin} counting the wounded by lantern.",
    "{name} plays a bankrupt {job} whose {kin} gambles away the family {thing} during the {event}.",
    "Shot on grainy stock in {place}, it follows a {job} who smuggles a {thing} past the border guards.",
    "The screenplay borrows its courtroom climax from {place}, where a {job} was hanged after the {event}.",
    "In the third act {name} crashes a {vehicle} into the cathedral and confesses to the {kin} of the murdered {job}.",
)
_UNSPECIFIC = (
    "A person goes back to a place to find something that someone he knew left there before it all began.",
    "It is about some things that happen to some people, and you see a lot of it the way that they see it.",
    "The main person has a problem because somebody does something bad with what they have at that time.",
    "It was made in a nice way, and it is about a man who has to do something that is not so easy to do.",
    "The story is a lot like other stories, and at the end there is a big part where it all comes together.",
    "In the last part the main man does something big, and then he tells everyone what he did and why.",
)
_SLOTS = {
    "job": (
        "surgeon",
        "lighthouse keeper",
        "cellist",
        "blacksmith",
        "detective",
        "schoolteacher",
        "boxer",
        "priest",
    ),
    "place": (
        "Lisbon",
        "Alaska",
        "Calcutta",
        "the Sahara",
        "Brooklyn",
        "Normandy",
        "Kyoto",
        "Sicily",
    ),
    "thing": (
        "violin",
        "diamond",
        "manuscript",
        "vineyard",
        "telescope",
        "passport",
        "painting",
        "revolver",
    ),
    "kin": ("daughter", "stepfather", "twin brother", "widow", "grandmother", "nephew"),
    "event": ("earthquake", "invasion", "strike", "plague", "revolution", "avalanche", "blackout"),
    "vehicle": ("submarine", "tractor", "biplane", "motorcycle", "steam train", "ambulance"),
    "name": (
        "Barbara Stanwyck",
        "Peter Lorre",
        "Sidney Poitier",
        "Ingrid Bergman",
        "Toshiro Mifune",
        "Gene Hackman",
    ),
}


def written_pairs(n: int, rng: Random) -> list[tuple[str, str]]:
    """`n` pairs of hand-written sentences: a specific one (slots filled at random), an unspecific."""
    pairs = []
    for i in range(n):
        chosen = {slot: rng.choice(values) for slot, values in _SLOTS.items()}
        pairs.append(
            (
                _SPECIFIC[i % len(_SPECIFIC)].format(**chosen),
                _UNSPECIFIC[(i + i // len(_SPECIFIC)) % len(_UNSPECIFIC)],
            )
        )
    return pairs


# --- probes of robustness
_NEGATIONS = {
    verb: f"{verb} not"
    for verb in "is was are were has can will does did would could should".split()
}
_NEGATABLE = re.compile(r"\b(" + "|".join(_NEGATIONS) + r")\b(?! not|n't)")


def negated(text: str, rng: Random) -> str | None:
    """One verb is negated: "is" -> "is not"."""
    places = list(_NEGATABLE.finditer(text))
    if not places:
        return None
    match = rng.choice(places)
    return replaced(text, match, _NEGATIONS[match.group()])


_PRAISE = (
    "good",
    "funny",
    "great",
    "believable",
    "interesting",
    "convincing",
    "worth seeing",
    "well made",
)
_BLAME = (
    "bad",
    "boring",
    "terrible",
    "predictable",
    "stupid",
    "awful",
    "a waste of time",
    "disappointing",
)
_OF_WHAT = (
    "The film",
    "The acting",
    "The whole story",
    "In the end, the plot",
    "I must say that this movie",
)


def negated_pairs() -> list[tuple[str, str]]:
    """Hand-written sentences (better, worse) that differ by one "not", of praise and of blame.

    >>> negated_pairs()[0], negated_pairs()[-1]
    (('The film was good.', 'The film was not good.'),
     ('I must say that this movie was not disappointing.', 'I must say that this movie was disappointing.'))
    """
    praise = [
        (f"{what} was {word}.", f"{what} was not {word}.") for what in _OF_WHAT for word in _PRAISE
    ]
    blame = [
        (f"{what} was not {word}.", f"{what} was {word}.") for what in _OF_WHAT for word in _BLAME
    ]
    return praise + blame


def _half_tail(text: str, tail: Sequence[str], rng: Random) -> str:
    words = text.split()
    half = len(words) // 2
    return " ".join(words[:half] + [rng.choice(tail) for _ in range(len(words) - half)])


PROBES: Mapping[str, Callable[[str, Random], str | None]] = {
    "negation": negated,
    "shuffled_words": full_shuffle,
    "repeated_part": repeated,
    "one_word_repeated": lambda text, rng: " ".join([rng.choice(text.split())] * len(text.split())),
    "emoji_tail": lambda text, rng: _half_tail(text, EMOJI, rng),
    "symbol_tail": lambda text, rng: _half_tail(text, SYMBOLS, rng),
    "cut_mid_word": lambda text, rng: text[: max(8, len(text) - rng.randint(2, 12))].rstrip(),
    "filler_tail": lambda text, rng: diluted(text, rng),
    "lower_case": lambda text, rng: text.lower() if text.lower() != text else None,
}
