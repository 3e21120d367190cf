"""What is a comparison? A prompt, two answers, and which of them was chosen. No model is known here."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from jaxtyping import Int
from torch import Tensor

from ..store import canonical_json
from .checks import (
    TEXT_COLUMNS,
    BadRows,
    RowError,
    check_comparison,
    check_ended,
    check_kind,
    check_present,
    unit_name,
)
from .messages import Prompt, as_prompt


class Text(NamedTuple):
    """A prompt, the response to it, and whether the response ended by itself (then the end token belongs to it).

    prompt : a text, or the messages before the answer as (role, content).
    """

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
        """sha256 of all texts in their order, 64 hex digits: a line of JSON each, so that no two lists share one."""
        found = hashlib.sha256()
        for text in self.texts:
            line = canonical_json([text.prompt, text.response, bool(text.ended)])
            found.update(line.encode(errors="surrogatepass") + b"\n")
        return found.hexdigest()


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

        The prompts are texts, or all of them lists of messages that end before the answer, see `as_prompt`.
        `texts` may hold the answers already (candidates that several sets share); else they are the set's own.

        Raises
        ------
        ValueError : no rows; what `check_preferences` refuses; an answer that is not among `texts`.
        """
        if len(rows) == 0:
            raise ValueError(
                "the preference set is empty: found 0 rows, expected at least one; where it was filtered, look whether "
                "the value is written as in the data (set(pairs['user']) has all of a column)"
            )
        check_preferences(rows, "preference set")
        prompts = [as_prompt(value) for value in values_of(rows, "prompt")]
        ended = values_of(rows, "ended") if "ended" in rows.column_names else [True] * len(rows)
        sides = [
            [Text(p, r, e) for p, r, e in zip(prompts, values_of(rows, side), ended, strict=True)]
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
        return {name: values_of(self.rows, name) for name in self.rows.column_names}

    @property
    def prompts(self) -> list[Prompt]:
        """The prompt of each pair."""
        return [self.texts.texts[i].prompt for i in self.index[:, 0].tolist()]

    def units(self, column: str) -> tuple[Int[Tensor, "pairs"], list[str]]:
        """Unit of each pair as 0 ... U-1, and the units' names in that order.

        A text is a name as it is, a whole number by its digits, a boolean as "true" or "false".

        Raises
        ------
        ValueError : no such column; a missing value, or one of another type: the rows are named.
        """
        if column not in self.rows.column_names:
            raise ValueError(
                f"unit column {column!r} is missing; found {self.rows.column_names}: name one of them"
            )
        values, bad = [], BadRows()
        for row, value in enumerate(values_of(self.rows, column)):
            try:
                values.append(unit_name(value, column))
            except RowError as error:
                bad.add("preference set", row, error)
        bad.refuse(len(self), 'or give each pair an expert of its own: latent="pair"')
        names = list(dict.fromkeys(values))
        place = {name: i for i, name in enumerate(names)}
        return torch.tensor([place[v] for v in values]), names

    def where(self, mask: Sequence[bool] | np.ndarray) -> Pairs:
        """The pairs for which `mask` is true."""
        keep = np.flatnonzero(np.asarray(mask))
        return Pairs(self.rows.select(keep), self.texts, self.index[torch.from_numpy(keep)])


_OTHERWISE = (
    "load_preferences(path) reads files; what is known of a user goes by name: metadata={...}"
)
_INSTEAD = {
    "DatasetDict": 'one part of it, such as pairs["train"]',
    "DataFrame": "datasets.Dataset.from_pandas(frame)",
    "list": "datasets.Dataset.from_list(rows)",
}


def as_pairs(data: Any) -> Pairs:
    """A preference set as `Pairs`, checked; refuses what is neither rows nor pairs.

    Raises
    ------
    ValueError : something else than a Dataset or Pairs; bad rows (see `Pairs.of`).
    """
    if not isinstance(data, (Dataset, Pairs)):
        raise ValueError(
            f"found {type(data).__name__}, expected a datasets.Dataset with the columns prompt, chosen and rejected: "
            f"{_INSTEAD.get(type(data).__name__, _OTHERWISE)}"
        )
    return data if isinstance(data, Pairs) else Pairs.of(data)


def check_preferences(data: Dataset, place: str, columns: Sequence[str] = ()) -> Dataset:
    """Refuse a preference set with a missing column, an empty or non-text field, or equal answers; name the rows.

    Parameters
    ----------
    columns : further columns in which no value may be missing.

    Raises
    ------
    ValueError : one message about all bad rows, counted from 0.
    """
    for column in (*TEXT_COLUMNS, *columns):
        if column not in data.column_names:
            raise ValueError(
                f"{place}: column {column!r} is missing; found {data.column_names}; rename or add it"
            )
    values = {name: values_of(data, name) for name in (*TEXT_COLUMNS, *columns)}
    ended = values_of(data, "ended") if "ended" in data.column_names else [True] * len(data)
    bad, first = BadRows(), None
    for i in range(len(data)):
        try:
            prompt = check_comparison(*(values[name][i] for name in TEXT_COLUMNS))[0]
            check_ended(ended[i])
            for name in columns:
                check_present(values[name][i], name)
            first = prompt if first is None else first
            check_kind(prompt, first)
        except RowError as error:
            bad.add(place, i, error)
    bad.refuse(len(data), "mend these rows, or leave them out")
    return data


def values_of(rows: Dataset, column: str) -> list[Any]:
    """A column as Python values, whatever format is set."""
    return list(rows.with_format(None)[column])
