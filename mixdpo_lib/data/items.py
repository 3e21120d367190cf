"""Which of two things is preferred, where things have names and no texts? Paired comparisons of a survey, as pairs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from ..store import note
from .checks import BadRows, RowError, check_present, is_missing, unit_name
from .pairs import Pairs, Text, Texts

QUESTION = "which?"  # the one prompt of all items: it is read by nobody
TIE = "tie"
_OWN = ("prompt", "chosen", "rejected", "ended", "user", "first", "second", "winner")


def item(name: str) -> Text:
    """An item as an answer to the one question.

    >>> item("SPD").response
    'SPD'
    """
    return Text(QUESTION, name, True)


def item_pairs(
    first: Iterable[Any],
    second: Iterable[Any],
    winner: Iterable[Any],
    *,
    user: Iterable[Any] | None = None,
    covariates: Mapping[str, Iterable[Any]] | None = None,
) -> Pairs:
    """Comparisons of named items as a preference set: `Pairs.texts` are the items, `Pairs.index` the numbers of both.

    A tie is left out, and how many there were is printed. What is left is the likelihood of the decided comparisons,
    given that they were decided: Bradley-Terry too where ties follow Davidson (1970). Half a win each way is no
    likelihood of any answer, and a mixture has no responsibility for it.

    Parameters
    ----------
    first, second : names of the items of each comparison: texts, or whole numbers, which become their digits.
    winner : the name of one of the two; None, NaN, "tie" or a text without words is a tie.
    user : who compared, a text or a whole number; without it nobody is known, and each comparison has its own latent.
    covariates : columns by name, a value a comparison and one value a user: numbers (of numpy, too), or texts and
        truth values, which are categories.

    Returns
    -------
    Pairs with the columns prompt, chosen, rejected, user and the covariates. Items are numbered as they first appear, in
    `first` before `second` of a row; those of ties are among them.

    Raises
    ------
    ValueError : columns of different lengths; bad rows, all of which are counted and ten named; nothing but ties; a
        covariate of mixed kinds, of a name that is taken, or with two values for one user.

    >>> pairs = item_pairs(["tea", "tea", "milk"], ["milk", "water", "water"], ["tea", "water", None], user=[1, 1, 2])
    >>> [text.response for text in pairs.texts.texts], pairs.index.tolist(), pairs.columns["user"]
    (['tea', 'milk', 'water'], [[0, 1], [2, 0]], ['1', '1'])
    """
    known = {name: _plain(values) for name, values in (covariates or {}).items()}
    if taken := [name for name in known if name in _OWN]:
        raise ValueError(f"covariate {taken[0]!r}: expected another name than {', '.join(_OWN)}")
    asked = {"first": _plain(first), "second": _plain(second), "winner": _plain(winner)}
    users = {} if user is None else {"user": _plain(user)}
    lengths = {name: len(values) for name, values in {**asked, **users, **known}.items()}
    n = lengths["first"]
    if set(lengths.values()) != {n} or n == 0:
        raise ValueError(f"columns of {lengths} rows: expected as many in each, and at least one")
    bad, names, decided = BadRows(), [], []
    for row in range(n):
        try:
            pair, chosen = _comparison(*(values[row] for values in asked.values()))
            for name in users:
                users[name][row] = unit_name(users[name][row], name)
            for name, values in known.items():
                check_present(values[row], name)
        except RowError as error:
            bad.add("survey", row, error)
            continue
        names += pair
        if chosen is not None:
            decided.append((row, pair[chosen], pair[1 - chosen]))
    bad.refuse(n, "mend these rows, or leave them out")
    if not decided:
        raise ValueError(f"all {n} comparisons are ties: expected some that were decided")
    if len(decided) < n:
        note(f"survey: {n - len(decided)} of {n} comparisons are ties and are left out")
    rows, texts = [row for row, _, _ in decided], Texts.of(map(item, names))
    table: dict[str, list[Any]] = {
        "prompt": [QUESTION] * len(rows),
        "chosen": [chosen for _, chosen, _ in decided],
        "rejected": [rejected for _, _, rejected in decided],
    }
    for name, values in users.items():
        table[name] = [values[row] for row in rows]
    for name, values in known.items():
        table[name] = _of_one_kind(name, [values[row] for row in rows])
        if users:
            _check_constant(name, table[name], table["user"], rows)
    index = [[texts.index[item(name)] for name in pair] for _, *pair in decided]
    return Pairs(Dataset.from_dict(table), texts, torch.tensor(index))


def _plain(values: Iterable[Any]) -> list[Any]:
    """A column as Python values."""
    return [value.item() if isinstance(value, np.generic) else value for value in values]


def _comparison(first: Any, second: Any, winner: Any) -> tuple[list[str], int | None]:
    """The two names, and which of them won; None for a tie."""
    pair = [unit_name(first, "first"), unit_name(second, "second")]
    if pair[0] == pair[1]:
        raise RowError(f"found {pair[1]!r} in both columns, expected two different items", "second")
    if is_missing(winner):
        return pair, None
    won = unit_name(winner, "winner")
    if won in pair:
        return pair, pair.index(won)
    if won == TIE:
        return pair, None
    raise RowError(f"found {won!r}, expected {pair[0]!r}, {pair[1]!r}, None or {TIE!r}", "winner")


def _of_one_kind(name: str, values: list[Any]) -> list[Any]:
    """Truth values, whole numbers, numbers, or texts."""
    for kind, wide in ((bool, bool), (int, Integral), (float, Real), (str, str)):
        if all(
            isinstance(value, wide) and isinstance(value, bool) == (kind is bool)
            for value in values
        ):
            return [kind(value) for value in values]
    found = sorted({type(value).__name__ for value in values})
    raise ValueError(f"covariate {name!r}: found {found}, expected numbers alone or texts alone")


def _check_constant(name: str, values: list[Any], users: list[str], rows: list[int]) -> None:
    first: dict[str, tuple[int, Any]] = {}
    for row, who, value in zip(rows, users, values, strict=True):
        at, before = first.setdefault(who, (row, value))
        if before != value:
            raise ValueError(
                f"covariate {name!r} of user {who!r}: found {before!r} in row {at} and {value!r} in row {row}, expected "
                "one value a user; mend the rows, or leave the column out"
            )
