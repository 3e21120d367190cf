"""What is a comparison? A prompt, two answers, and which of them was chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from datasets import Dataset

TEXT_COLUMNS = ("prompt", "chosen", "rejected")


class Text(NamedTuple):
    """A prompt, the response to it, and whether the response ended by itself (then the end token belongs to it)."""

    prompt: str
    response: str
    ended: bool


def check_preferences(data: Dataset, place: str, columns: Sequence[str] = ()) -> Dataset:
    """Refuse a preference set with a missing column, an empty or non-text field, or equal answers; name the row."""
    for column in (*TEXT_COLUMNS, *columns):
        if column not in data.column_names:
            raise ValueError(f"{place}: column {column!r} is missing; found {data.column_names}; rename or add it")
    texts: Mapping[str, Any] = {c: data[c] for c in TEXT_COLUMNS}
    for i, fields in enumerate(zip(*(texts[c] for c in TEXT_COLUMNS), strict=True)):
        for column, value in zip(TEXT_COLUMNS, fields, strict=True):
            if not isinstance(value, str) or not value.strip():
                found = repr(value)[:40] if isinstance(value, str) else f"{type(value).__name__} {value!r}"[:40]
                raise ValueError(f"{place}: row {i}, column {column!r}: found {found}, expected a text with words")
        if fields[1] == fields[2]:
            raise ValueError(
                f"{place}: row {i}: chosen equals rejected ({fields[1][:40]!r}): a tie says nothing about preference; "
                "remove the row, or keep the pair only where one answer was better"
            )
    return data
