"""How does what is known of users become numbers? Categories one-hot, numbers standardised."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from decimal import Decimal
from numbers import Real
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..data.checks import is_missing
from ..data.tables import is_number, odd_cells

Columns = Mapping[str, list[str] | tuple[float, float]]


def read_columns(
    metadata: Mapping[str, Any],
) -> dict[str, list[str] | tuple[float, float]]:
    """By name, the categories of a column (text and truth values), or mean and standard deviation of its numbers.

    Numbers are Python's or numpy's.

    Raises
    ------
    ValueError : a missing or NaN value (row and column named); numbers and text in one column; a column that is the same
        in every row, of which a gate can learn nothing.

    >>> read_columns({"country": ["x", "y", "x"], "age": [20, 30, 40]})["country"]
    ['x', 'y']
    """
    if not hasattr(metadata, "items"):
        raise ValueError(
            f"metadata: found {type(metadata).__name__}, expected columns by name, a value a row: {{'age': data['age']}}"
        )
    columns: dict[str, list[str] | tuple[float, float]] = {}
    for name, values in metadata.items():
        values = _checked(name, values)
        if len(set(values)) < 2:
            raise ValueError(
                f"metadata column {name!r} is {values[0]!r} in every row: a gate can learn nothing from it; "
                "leave it out"
            )
        numeric = [isinstance(v, Real) and not isinstance(v, bool) for v in values]
        if any(numeric) and not all(numeric):
            row = numeric.index(sum(numeric) * 2 < len(values))  # the first of the rarer kind
            raise ValueError(
                f"metadata row {row}, column {name!r}: found {values[row]!r} among "
                f"{'texts' if numeric[row] else 'numbers'}; expected numbers alone, or text alone (categories)"
            )
        if all(numeric):
            numbers = torch.tensor([float(v) for v in values], dtype=torch.float64)
            columns[name] = (float(numbers.mean()), float(numbers.std(correction=0)))
        else:
            categories = columns[name] = sorted({str(v) for v in values})
            if odd := odd_cells(categories):
                row = [str(v) for v in values].index(odd[0])
                raise ValueError(
                    f"metadata row {row}, column {name!r}: found {odd[0]!r} among texts that are numbers, such as "
                    f"{next(one for one in categories if one not in odd)!r}; expected numbers alone (float(...) after the cell "
                    f"is mended); if they are categories, name all of them: UserGate({{{name!r}: {categories[:2]!r} ...}})"
                )
            if all(is_number(one) for one in categories):
                warnings.warn(
                    f"metadata column {name!r}: {categories[0]!r} and the like are texts, so that each is a category and a "
                    "user of another one is served by the other columns and the bias; give float(...) if a quantity is meant",
                    stacklevel=3,
                )
    return columns


def columns_of_json(
    columns: Mapping[str, Sequence[Any]],
) -> dict[str, list[str] | tuple[float, float]]:
    """Columns that were read back from JSON, which has no tuples: mean and standard deviation come as a list."""
    return {
        name: [str(one) for one in kind]
        if isinstance(kind[0], str)
        else (float(kind[0]), float(kind[1]))
        for name, kind in columns.items()
    }


def checked_columns(columns: Mapping[str, Any]) -> dict[str, list[str] | tuple[float, float]]:
    """Columns that somebody names to a gate: categories, a list of different texts, or (mean, standard deviation).

    Raises
    ------
    ValueError : anything else; the column is named.

    >>> checked_columns({"vip": [True, False], "age": (40, 12)})
    {'vip': ['True', 'False'], 'age': (40.0, 12.0)}
    """
    checked: dict[str, list[str] | tuple[float, float]] = {}
    for name, kind in columns.items():
        whole = isinstance(kind, tuple) and len(kind) == 2
        if whole and all(isinstance(v, Real) and math.isfinite(v) for v in kind) and kind[1] > 0:
            checked[name] = (float(kind[0]), float(kind[1]))
        elif (
            isinstance(kind, list)
            and all(isinstance(one, str | bool | np.bool_) for one in kind)
            and len(kind) == len(set(kind)) > 0
        ):
            checked[name] = [str(one) for one in kind]
        else:
            raise ValueError(
                f"columns[{name!r}]: found {kind!r}; expected a list of different texts (categories), or (mean, standard "
                "deviation) of a column of numbers, the second above 0; from_metadata reads both off the training users"
            )
    return checked


def n_features(columns: Columns) -> int:
    """How many numbers `encode` gives a row."""
    return sum(len(kind) if isinstance(kind, list) else 1 for kind in columns.values())


def encode(columns: Columns, metadata: Mapping[str, Any]) -> Float[Tensor, "rows features"]:
    """(rows, features) float32 of these users: what a gate reads.

    A category that is not among the columns' is all zeros, with a warning that names it.

    Raises
    ------
    ValueError : a column that is absent; a missing or NaN value; text in a numeric column.
    """
    parts, n_rows = [], None
    for name, kind in columns.items():
        if name not in metadata:
            raise ValueError(
                f"metadata column {name!r} is absent; found {list(metadata)}: the gate was trained with it, give it"
            )
        values = _checked(name, metadata[name])
        if n_rows is not None and len(values) != n_rows:
            raise ValueError(
                f"metadata column {name!r} has {len(values)} rows, the ones before it {n_rows}"
            )
        n_rows = len(values)
        if isinstance(kind, tuple):
            wrong = [i for i, v in enumerate(values) if not isinstance(v, Real)]
            if wrong:
                raise ValueError(
                    f"metadata row {wrong[0]}, column {name!r}: found {values[wrong[0]]!r}, expected a number"
                )
            numbers = torch.tensor([float(v) for v in values], dtype=torch.float64)
            parts.append(((numbers - kind[0]) / kind[1]).float()[:, None])
        else:
            place = {category: i for i, category in enumerate(kind)}
            unseen = sorted({str(v) for v in values} - set(place))
            if unseen:
                spelt = {one.strip().casefold(): one for one in kind}
                near = [
                    f"; did you mean {spelt[one.strip().casefold()]!r}?"
                    for one in unseen
                    if one.strip().casefold() in spelt
                ]
                warnings.warn(
                    f"metadata column {name!r}: {unseen[:3]} were not among the training users' categories; "
                    f"users with them are served by their other columns and the bias{''.join(near[:1])}",
                    stacklevel=3,
                )
            one_hot = torch.zeros(len(values), len(kind))
            for row, value in enumerate(values):
                if str(value) in place:
                    one_hot[row, place[str(value)]] = 1.0
            parts.append(one_hot)
    return torch.cat(parts, 1)


def naming_columns(
    columns: Columns, metadata: Mapping[str, Sequence[Any]], units: Sequence[int]
) -> list[str]:
    """The categorical columns of which every category is of one unit alone, so that they name it.

    units : of each row of `metadata`.

    >>> naming_columns({"town": ["x", "y"], "age": (30.0, 9.0)}, {"town": ["x", "y", "x"]}, [0, 1, 0])
    ['town']
    """
    found = []
    for name in (one for one, kind in columns.items() if isinstance(kind, list)):
        whose = set(zip(map(str, metadata.get(name, ())), units, strict=False))
        if len(whose) == len(set(units)) == len({category for category, _ in whose}):
            found.append(name)
    return found


def _checked(name: str, values: Any) -> list[Any]:
    """A column as a list: a list, a tuple, an array, a series."""
    if isinstance(values, str | Real):
        raise ValueError(
            f"metadata column {name!r}: found {values!r}, expected a list with a value a row; of one user: "
            "policy.user(metadata={...})"
        )
    values = [float(v) if isinstance(v, Decimal) else v for v in values]
    if not values:
        raise ValueError(f"metadata column {name!r} has no rows: give at least one user")
    for row, value in enumerate(values):
        if isinstance(value, list | tuple | set | Mapping):
            raise ValueError(
                f"metadata row {row}, column {name!r}: found {value!r}, expected one value, not several"
            )
        known = is_missing(value) or isinstance(value, str | Real | np.bool_)
        if not known:
            raise ValueError(
                f"metadata row {row}, column {name!r}: found {value!r} ({type(value).__name__}), expected text, a truth "
                "value or a number"
            )
        if is_missing(value) or (isinstance(value, Real) and not math.isfinite(value)):
            raise ValueError(
                f"metadata row {row}, column {name!r}: found {value!r}, expected text or a finite number; "
                "fill it in, in a column of text make it a category such as 'unknown', or leave the row out (rows count from 0)"
            )
    return values
