"""What is a comparison? A prompt, two answers, and which of them was chosen. No model is known here."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from jaxtyping import Int
from torch import Tensor

TEXT_COLUMNS = ("prompt", "chosen", "rejected")
Messages = tuple[tuple[str, str], ...]
Prompt = str | Messages


def as_prompt(value: Any) -> Prompt:
    """TEMP (merged from the branch published-data)."""
    if isinstance(value, str):
        return value
    return tuple(
        (str(m["role"]), str(m["content"])) if isinstance(m, Mapping) else (m[0], m[1])
        for m in value
    )


class Text(NamedTuple):
    """A prompt, the response to it, and whether the response ended by itself (then the end token belongs to it)."""

    prompt: Prompt
    response: str
    ended: bool


@dataclass(frozen=True, eq=False)
class Texts:
    """Distinct texts in a fixed order: what is computed once for a text is kept under `key` and found by `index`.

    >>> texts = Texts.of([Text("a", "b", True), Text("a", "c", True), Text("a", "b", True)])
    >>> len(texts), texts.index[Text("a", "c", True)]
    (2, 1)
    """

    texts: tuple[Text, ...]

    @classmethod
    def of(cls, texts: Iterable[Text]) -> Texts:
        """The distinct ones, in order of first appearance."""
        return cls(tuple(dict.fromkeys(texts)))

    def __len__(self) -> int:
        return len(self.texts)

    def __repr__(self) -> str:
        return f"Texts: {len(self)} distinct texts"

    @cached_property
    def index(self) -> dict[Text, int]:
        """The number of each text."""
        return {text: i for i, text in enumerate(self.texts)}

    @cached_property
    def key(self) -> str:
        """sha256 of all texts in their order, 64 hex digits."""
        parts = (f"{t.prompt}\x1f{t.response}\x1f{int(t.ended)}" for t in self.texts)
        return hashlib.sha256("\x1e".join(parts).encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class Pairs:
    """A preference set: its rows, the distinct texts, and which of them each answer is.

    rows : the columns as they were given. texts : see `Texts`; several sets may share them.
    index : (pairs, 2) int64 into the texts, column 0 chosen, 1 rejected.
    """

    rows: Dataset
    texts: Texts
    index: Int[Tensor, "pairs 2"]

    @classmethod
    def of(cls, rows: Dataset, texts: Texts | None = None) -> Pairs:
        """Columns prompt, chosen, rejected [, ended: true where absent], checked row by row.

        `texts` may hold the answers already (candidates that several sets share); else they are the set's own.

        Raises
        ------
        ValueError : no rows; what `check_preferences` refuses; an answer that is not among `texts`.
        """
        if len(rows) == 0:
            raise ValueError("the preference set is empty: at least one pair is needed")
        check_preferences(rows, "preference set")
        ended = list(rows["ended"]) if "ended" in rows.column_names else [True] * len(rows)
        sides = [
            [Text(p, r, bool(e)) for p, r, e in zip(rows["prompt"], rows[side], ended, strict=True)]
            for side in ("chosen", "rejected")
        ]
        texts = Texts.of([*sides[0], *sides[1]]) if texts is None else texts
        for side, own in zip(("chosen", "rejected"), sides, strict=True):
            for row, text in enumerate(own):
                if text not in texts.index:
                    raise ValueError(
                        f"row {row}, column {side!r}: {text.response[:40]!r} is not among the {len(texts)} texts that "
                        "were given; give those of this set, or none"
                    )
        return cls(
            rows,
            texts,
            torch.tensor([[texts.index[t] for t in side] for side in sides]).T.contiguous(),
        )

    def __len__(self) -> int:
        return len(self.index)

    def __repr__(self) -> str:
        return f"Pairs: {len(self)} comparisons of {len(self.texts)} texts; columns {', '.join(self.rows.column_names)}"

    @property
    def columns(self) -> dict[str, list[Any]]:
        """The rows' columns by name, one value a pair."""
        return {name: list(self.rows[name]) for name in self.rows.column_names}

    def units(self, column: str) -> tuple[Int[Tensor, "pairs"], list[str]]:
        """Unit of each pair as 0 ... U-1, and the units' names in that order."""
        if column not in self.rows.column_names:
            raise ValueError(
                f"unit column {column!r} is missing; found {self.rows.column_names}: name one of them"
            )
        values = [str(v) for v in self.rows[column]]
        names = list(dict.fromkeys(values))
        place = {name: i for i, name in enumerate(names)}
        return torch.tensor([place[v] for v in values]), names

    def where(self, mask: Sequence[bool] | np.ndarray) -> Pairs:
        """The pairs for which `mask` is true."""
        keep = np.flatnonzero(np.asarray(mask))
        return Pairs(self.rows.select(keep), self.texts, self.index[torch.from_numpy(keep)])


def as_pairs(data: Any) -> Pairs:
    """A preference set as `Pairs`, checked; refuses what is neither rows nor pairs.

    Raises
    ------
    ValueError : something else than a Dataset or Pairs; bad rows (see `Pairs.of`).
    """
    if not isinstance(data, (Dataset, Pairs)):
        raise ValueError(
            f"found {type(data).__name__}, expected a datasets.Dataset with the columns prompt, chosen and rejected; "
            "what is known of a user goes by name: metadata={...}"
        )
    return data if isinstance(data, Pairs) else Pairs.of(data)


def check_preferences(data: Dataset, place: str, columns: Sequence[str] = ()) -> Dataset:
    """Refuse a preference set with a missing column, an empty or non-text field, or equal answers; name the row."""
    for column in (*TEXT_COLUMNS, *columns):
        if column not in data.column_names:
            raise ValueError(
                f"{place}: column {column!r} is missing; found {data.column_names}; rename or add it"
            )
    texts: Mapping[str, Any] = {c: data[c] for c in TEXT_COLUMNS}
    for i, fields in enumerate(zip(*(texts[c] for c in TEXT_COLUMNS), strict=True)):
        for column, value in zip(TEXT_COLUMNS, fields, strict=True):
            if not isinstance(value, str) or not value.strip():
                found = (
                    repr(value) if isinstance(value, str) else f"{type(value).__name__} {value!r}"
                )
                raise ValueError(
                    f"{place}: row {i}, column {column!r}: found {found[:40]}, expected a text with words"
                )
        if fields[1] == fields[2]:
            raise ValueError(
                f"{place}: row {i}: chosen equals rejected ({fields[1][:40]!r}): a tie says nothing about preference; "
                "remove the row, or keep the pair only where one answer was better"
            )
    return data
