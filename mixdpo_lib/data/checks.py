"""Which rows are refused, and how is that said?"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from .messages import Prompt, as_messages, check_turns, described, is_written

TEXT_COLUMNS = ("prompt", "chosen", "rejected")
NAMED = 10  # bad rows that a message names; all are counted


class RowError(ValueError):
    """What is wrong with one row, and in which column; who knows the row's number puts it in front."""

    def __init__(self, text: str, column: str | None = None):
        super().__init__(f", column {column!r}: {text}" if column else f": {text}")


class BadRows:
    """The rows that were refused: all are counted, the first ten are named.

    >>> bad = BadRows()
    >>> bad.add("pairs.csv", 3, RowError("found ''", "user"))
    >>> bad.text(10)
    "pairs.csv: row 3, column 'user': found ''"
    """

    def __init__(self) -> None:
        self.count = 0
        self.first: list[tuple[str, str]] = []

    def add(self, place: str, row: int, error: RowError) -> None:
        """Note a row, counted from 0."""
        self.count += 1
        if len(self.first) < NAMED:
            self.first.append((place, f"row {row}{error}"))

    def extend(self, other: BadRows) -> None:
        """Those of another part as well."""
        self.count += other.count
        self.first = [*self.first, *other.first][:NAMED]

    def text(self, total: int) -> str:
        """One line about all of them; `total` rows were looked at."""
        if self.count == 1:
            return ": ".join(self.first[0])
        said, last = [], self.first[0][0]
        for place, what in self.first:
            said.append(what if place == last else f"{place}: {what}")
            last = place
        more = "" if self.count <= NAMED else f", the first {NAMED}"
        return f"{self.first[0][0]}: {self.count} of {total} rows cannot be used{more}: {' | '.join(said)}"

    def refuse(self, total: int, remedy: str) -> None:
        """Raise one ValueError about all of them, if there are any.

        Raises
        ------
        ValueError : at least one row is bad; `remedy` says what to do.
        """
        if self.count:
            raise ValueError(f"{self.text(total)}; {remedy}")


def check_text(value: Any, column: str) -> str:
    """A text with words.

    Raises
    ------
    RowError : no text, no words, half a character, or messages that were written as a text.

    >>> check_text(" a bowline", "chosen")
    ' a bowline'
    """
    if not isinstance(value, str) or not value.strip():
        way = "; explicit_prompts reads conversations" if isinstance(value, (list, dict)) else ""
        raise RowError(f"found {described(value)}, expected a text with words{way}", column)
    if is_written(value):
        raise RowError(
            f"found messages written as a text ({value[:40]!r}), expected a text; explicit_prompts reads "
            "them",
            column,
        )
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RowError(
            f"found half of a character ({value[:40]!r}), expected a text; write the text as UTF-8",
            column,
        ) from None
    return value


def check_prompt(value: Any) -> Prompt:
    """A text with words, or the messages before an answer.

    Raises
    ------
    RowError : anything else.

    >>> check_prompt([{"role": "user", "content": "Which knot?"}])
    (('user', 'Which knot?'),)
    """
    if not isinstance(value, (list, tuple)):
        return check_text(value, "prompt")
    try:
        messages = check_turns(as_messages(value))
    except ValueError as error:
        raise RowError(str(error), "prompt") from None
    for _, content in messages:
        check_text(content, "prompt")
    return messages


def check_comparison(prompt: Any, chosen: Any, rejected: Any) -> tuple[Prompt, str, str]:
    """A prompt and two answers that differ.

    Raises
    ------
    RowError : a bad prompt or answer (see `check_prompt`, `check_text`); a tie.

    >>> check_comparison("Which knot?", " a bowline", " rope")
    ('Which knot?', ' a bowline', ' rope')
    """
    read = check_prompt(prompt), check_text(chosen, "chosen"), check_text(rejected, "rejected")
    if chosen == rejected:
        raise RowError(
            f"chosen equals rejected ({chosen[:40]!r}): a tie says nothing about preference; "
            "remove the row, or keep the pair only where one answer was better"
        )
    return read


def check_readable(
    row: tuple[Prompt, str, str], ended: bool, readable: Callable[[Prompt, str, bool], object]
) -> None:
    """A prompt and two answers that a model can read, by its own account.

    Raises
    ------
    RowError : what `readable` said of it.
    """
    for column, answer in (("chosen", row[1]), ("rejected", row[2])):
        try:
            readable(row[0], answer, ended)
        except ValueError as error:
            raise RowError(str(error), column) from error


def check_kind(prompt: Prompt, first: Prompt) -> None:
    """All prompts of a set are texts, or all are conversations.

    Raises
    ------
    RowError : this one is not what the first one is.

    >>> check_kind("Which knot?", (("user", "Which rope?"),))
    Traceback (most recent call last):
    mixdpo_lib.data.checks.RowError: , column 'prompt': found a text, expected a conversation as in ...
    """
    names = ["a text" if isinstance(one, str) else "a conversation" for one in (prompt, first)]
    if names[0] != names[1]:
        raise RowError(
            f"found {names[0]}, expected {names[1]} as in the rows before; keep texts and conversations in sets of "
            "their own",
            "prompt",
        )


def check_ended(value: Any) -> bool:
    """Whether the answers ended by themselves.

    Raises
    ------
    RowError : no boolean.

    >>> check_ended(False)
    False
    """
    if not isinstance(value, bool):
        raise RowError(
            f"found {described(value)}, expected true or false; leave the column out where every answer ended",
            "ended",
        )
    return value


def is_missing(value: Any) -> bool:
    """None, pandas' NA and NaT, not a number, or a text without words.

    >>> [is_missing(value) for value in (None, float("nan"), "", "None", 0)]
    [True, True, True, False, False]
    """
    return (
        value is None
        or type(value).__name__ in ("NAType", "NaTType")
        or (isinstance(value, float) and math.isnan(value))
        or (isinstance(value, str) and not value.strip())
    )


def check_present(value: Any, column: str) -> None:
    """A value is there.

    Raises
    ------
    RowError : it is missing, see `is_missing`.

    >>> check_present("None", "user")
    """
    if is_missing(value):
        raise RowError(
            f"found {described(value)}, expected a value; a missing one is nobody's: fill it in, or leave the row out",
            column,
        )


def unit_name(value: Any, column: str) -> str:
    """The name of a unit: a text as it is, a whole number as its digits, a boolean as true or false.

    Raises
    ------
    RowError : missing, or of another type; a decimal number has no one way to be written.

    >>> unit_name("007", "user"), unit_name(7, "user"), unit_name(True, "user")
    ('007', '7', 'true')
    """
    check_present(value, column)
    if not isinstance(value, (str, int)):
        raise RowError(
            f"found {described(value)}, expected a text or a whole number; write the column as text (a CSV file: "
            "name it in columns=)",
            column,
        )
    return written(value)


def written(value: Any) -> str:
    """A value as `unit_name` writes it, whatever it is: what can be no name is nobody's.

    >>> written(True), written(7), written(None)
    ('true', '7', 'None')
    """
    return str(value).lower() if isinstance(value, bool | np.bool_) else str(value)
