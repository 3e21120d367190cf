"""What does a worse version of a text look like? Corruptions of form, loss of content, odd strings: plain Python.

The judges are fitted on some of these versions and reported on all of them. Nothing here knows a judge.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from random import Random

WORD = re.compile(r"[A-Za-z]+(?:['’][A-Za-z]+)*")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'])")
# --- the indefinite article -------------------------------------------------------------------------------------------
_A_THOUGH_VOWEL = re.compile(
    r"(?:uni(?!n|m)|us(?:e|a|u)|ut(?:e|i)|eu|ewe|ubi|uk|one(?!i)|once|ouija)", re.I
)  # "a user", "a one-liner"
_AN_THOUGH_CONSONANT = re.compile(r"(?:hour|honest|hono|heir)", re.I)
_EITHER = re.compile(r"(?:herb|histor|hotel)", re.I)


def wants_an(word: str) -> bool | None:
    """Whether the indefinite article before `word` is "an"; None where spelling does not tell (acronyms, letters).

    The rule by first letter with its usual exceptions; a list made for this project.

    >>> wants_an("old"), wants_an("user"), wants_an("hour"), wants_an("film"), wants_an("uninspired"), wants_an("FBI")
    (True, False, True, False, True, None)
    """
    if len(word) < 2 or word.isupper() or _EITHER.match(word):
        return None
    if _AN_THOUGH_CONSONANT.match(word):
        return True
    return word[0].lower() in "aeiou" and not _A_THOUGH_VOWEL.match(word)


# --- sentences and pieces ---------------------------------------------------------------------------------------------
def sentences(text: str, shortest: int = 8, longest: int = 40) -> list[str]:
    """Sentences of `text` with `shortest` to `longest` words that begin with a capital and end with a full stop.

    >>> sentences("I saw it twice with my old friend Tom. Bad. it was, um, fine")
    ['I saw it twice with my old friend Tom.']
    """
    found = []
    for part in _SENTENCE_END.split(" ".join(text.split())):
        if part[:1].isupper() and part[-1:] in ".!?" and shortest <= len(part.split()) <= longest:
            found.append(part)
    return found


def piece(text: str, n_words: int, rng: Random, start: int | None = None) -> str:
    """`n_words` consecutive words of `text` from word `start` (default: a random place); all of a shorter text.

    >>> piece("one two three four", 2, Random(0), start=1)
    'two three'
    """
    words = text.split()
    if start is None:
        start = rng.randint(0, max(0, len(words) - n_words))
    return " ".join(words[start : start + n_words])


# --- corruptions of form: each returns None where a sentence offers no place for it -----------------------------------
def _replace(text: str, match: re.Match, new: str) -> str:
    if match.group()[:1].isupper():
        new = new[:1].upper() + new[1:]
    return text[: match.start()] + new + text[match.end() :]


def spelling(text: str, rng: Random) -> str | None:
    """One lower-case word of four letters or more gets one letter dropped, doubled, replaced or swapped."""
    places = [m for m in WORD.finditer(text) if len(m.group()) >= 4 and m.group().islower() and m.group().isalpha()]
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
            return _replace(text, match, new)
    return None


_ARTICLE = re.compile(r"\b[Aa]n?(?= [A-Za-z])")


def article(text: str, rng: Random) -> str | None:
    """One "a" becomes "an", or the other way round."""
    places = list(_ARTICLE.finditer(text))
    if not places:
        return None
    match = rng.choice(places)
    return _replace(text, match, "a" if match.group().lower() == "an" else "an")


def repetition(text: str, rng: Random) -> str | None:
    """One word is said twice in a row."""
    places = [m for m in WORD.finditer(text) if m.group().islower()]
    if not places:
        return None
    match = rng.choice(places)
    return _replace(text, match, f"{match.group()} {match.group()}")


_NUMBER_PAIRS = (
    "is are|was were|has have|does do|isn't aren't|wasn't weren't|doesn't don't|hasn't haven't|this these|that those"
)
_OTHER_NUMBER = {a: b for pair in _NUMBER_PAIRS.split("|") for a, b in (pair.split(), reversed(pair.split()))}
_VERB_NUMBER = {k: v for k, v in _OTHER_NUMBER.items() if k not in ("this", "these", "that", "those")}


def agreement(text: str, rng: Random) -> str | None:
    """One verb changes its number: is/are, was/were, has/have, does/do."""
    places = [m for m in WORD.finditer(text) if m.group().lower() in _VERB_NUMBER]
    if not places:
        return None
    match = rng.choice(places)
    return _replace(text, match, _VERB_NUMBER[match.group().lower()])


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
EMOJI = ("\U0001f600", "\U0001f525", "\U0001f3ac", "❤️", "\U0001f44d", "\U0001f62d", "\U0001f37f", "⭐")
_ODD_LETTERS = "abcdefghijklmnopqrstuvwxyz" * 2 + "éüñøßжиктраのアラ中文字"


def stray_symbol(text: str, rng: Random) -> str | None:
    """One to three symbols, emoji or foreign letters stand where a space was."""
    places = [m for m in re.finditer(" ", text)]
    if not places:
        return None
    match = rng.choice(places)
    found = "".join(rng.choice(SYMBOLS + EMOJI + tuple(_ODD_LETTERS[-10:])) for _ in range(rng.randint(1, 3)))
    return text[: match.start()] + rng.choice((" {} ", "{} ", " {}")).format(found) + text[match.end() :]


def garbled_word(text: str, rng: Random) -> str | None:
    """One word gives way to letters that make no word, at times joined to the next word."""
    places = list(WORD.finditer(text))
    if not places:
        return None
    match = rng.choice(places)
    odd = "".join(
        rng.choice(_ODD_LETTERS[: rng.choice((26, 26, len(_ODD_LETTERS)))]) for _ in range(rng.randint(3, 10))
    )
    odd = rng.choice((odd, odd, odd.capitalize(), match.group() + odd))
    return text[: match.start()] + odd + text[match.end() + rng.randint(0, 1) :]


DAMAGE: Mapping[str, Callable[[str, Random], str | None]] = {  # beyond what people write: what samplers write
    "stray_symbol": stray_symbol,
    "garbled_word": garbled_word,
}
# --- loss of content --------------------------------------------------------------------------------------------------
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


def padded(text: str, rng: Random, filler: Sequence[str] = FILLER_PROBE, share: float = 0.75) -> str:
    """The same text with filler after it, `share` times as many words."""
    return f"{text} {_filler(max(4, round(share * len(text.split()))), rng, filler)}"


def diluted(text: str, rng: Random, filler: Sequence[str] = FILLER_PROBE) -> str:
    """The second half gives way to filler; the number of words stays."""
    words = text.split()
    half = len(words) // 2
    return " ".join(words[:half]) + " " + _filler(len(words) - half, rng, filler)


def repeated(text: str, rng: Random) -> str:
    """The first part (a quarter to a half of the words) is said again and again up to the same number of words."""
    words = text.split()
    part = words[: max(3, round(len(words) * rng.uniform(0.25, 0.5)))]
    return " ".join((part * (len(words) // len(part) + 1))[: len(words)])


STAND_INS_FIT = {  # by ending; "" for every other word
    "ly": ("really", "just", "also"), "ing": ("doing", "being", "having"), "ed": ("made", "done", "had"),
    "": ("thing", "good", "people", "way", "something", "bad", "one", "movie", "time"),
}  # fmt: skip
STAND_INS_PROBE = {  # never seen in fitting
    "ly": ("very", "quite", "too"), "ing": ("going", "getting", "making"), "ed": ("got", "put", "went"),
    "": ("stuff", "great", "lot", "man", "thing", "someone", "nice", "film", "part", "bit"),
}  # fmt: skip


def generic(
    text: str, rng: Random, common: frozenset[str], stand_ins: Mapping[str, Sequence[str]] = STAND_INS_PROBE
) -> str:
    """Every word outside `common` (lower-cased) is replaced by a word that says little; the number of words stays."""

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
    "job": ("surgeon", "lighthouse keeper", "cellist", "blacksmith", "detective", "schoolteacher", "boxer", "priest"),
    "place": ("Lisbon", "Alaska", "Calcutta", "the Sahara", "Brooklyn", "Normandy", "Kyoto", "Sicily"),
    "thing": ("violin", "diamond", "manuscript", "vineyard", "telescope", "passport", "painting", "revolver"),
    "kin": ("daughter", "stepfather", "twin brother", "widow", "grandmother", "nephew"),
    "event": ("earthquake", "invasion", "strike", "plague", "revolution", "avalanche", "blackout"),
    "vehicle": ("submarine", "tractor", "biplane", "motorcycle", "steam train", "ambulance"),
    "name": ("Barbara Stanwyck", "Peter Lorre", "Sidney Poitier", "Ingrid Bergman", "Toshiro Mifune", "Gene Hackman"),
}


def written_pairs(n: int, rng: Random) -> list[tuple[str, str]]:
    """`n` pairs of a hand-written specific sentence (slots filled at random) and a hand-written unspecific one."""
    pairs = []
    for i in range(n):
        chosen = {slot: rng.choice(values) for slot, values in _SLOTS.items()}
        pairs.append(
            (_SPECIFIC[i % len(_SPECIFIC)].format(**chosen), _UNSPECIFIC[(i + i // len(_SPECIFIC)) % len(_UNSPECIFIC)])
        )
    return pairs


# --- probes of robustness: texts that a policy under optimisation may write -------------------------------------------
_NEGATIONS = {verb: f"{verb} not" for verb in "is was are were has can will does did would could should".split()}
_NEGATABLE = re.compile(r"\b(" + "|".join(_NEGATIONS) + r")\b(?! not|n't)")


def negated(text: str, rng: Random) -> str | None:
    """One verb is negated: "is" -> "is not"."""
    places = list(_NEGATABLE.finditer(text))
    if not places:
        return None
    match = rng.choice(places)
    return _replace(text, match, _NEGATIONS[match.group()])


_PRAISE = ("good", "funny", "great", "believable", "interesting", "convincing", "worth seeing", "well made")
_BLAME = ("bad", "boring", "terrible", "predictable", "stupid", "awful", "a waste of time", "disappointing")
_OF_WHAT = ("The film", "The acting", "The whole story", "In the end, the plot", "I must say that this movie")


def negated_pairs() -> list[tuple[str, str]]:
    """Hand-written sentences (better, worse) that differ by one "not", of praise and of blame.

    >>> negated_pairs()[0], negated_pairs()[-1]
    (('The film was good.', 'The film was not good.'),
     ('I must say that this movie was not disappointing.', 'I must say that this movie was disappointing.'))
    """
    praise = [(f"{what} was {word}.", f"{what} was not {word}.") for what in _OF_WHAT for word in _PRAISE]
    blame = [(f"{what} was not {word}.", f"{what} was {word}.") for what in _OF_WHAT for word in _BLAME]
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
