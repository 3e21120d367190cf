"""How does a file become rows? Nothing is guessed of a text, and whatever is wrong with the bytes is one clear error."""

from __future__ import annotations

import csv
import gzip
import io
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from .checks import TEXT_COLUMNS
from .messages import strict_json

OWN = (*TEXT_COLUMNS, "ended")  # read value by value; all other columns stay what they are
_POINTER = b"version https://git-lfs"
_WHOLE = re.compile(r"0|-?[1-9][0-9]{0,17}")  # as Python writes it: 007 and +7 are texts
_DECIMAL = re.compile(r"-?(0|[1-9][0-9]{0,17})(\.[0-9]+)?([eE][+-]?[0-9]{1,2})?")


@dataclass(frozen=True)
class Table:
    """Rows as a file has them.

    names : all columns in order. n : rows. own : the columns of a comparison, as Python values.
    rest : the other columns, as arrow has them. words : the file has no types, a boolean is a word.
    metadata : what `datasets` wrote about the columns.
    """

    names: list[str]
    n: int
    own: dict[str, list[Any]]
    rest: dict[str, pa.Array | pa.ChunkedArray]
    words: bool = False
    metadata: dict[bytes, bytes] | None = field(default=None, repr=False)

    def values(self, name: str) -> list[Any]:
        """A column as Python values."""
        return self.own[name] if name in self.own else self.rest[name].to_pylist()

    def replaced(self, made: dict[str, pa.Array], keep: list[int]) -> Table:
        """The rows `keep`, with the columns of a comparison as they were `made`."""
        rows = pa.array(keep, pa.int64())
        rest = (
            self.rest
            if len(keep) == self.n
            else {name: column.take(rows) for name, column in self.rest.items()}
        )
        names = [*(name for name in made if name not in self.names), *self.names]
        return Table(
            names, len(keep), {}, {n: made.get(n, rest.get(n)) for n in names}, False, self.metadata
        )


def file_kind(file: Path) -> str | None:
    """The ending of a file that can be read, in small letters; None for any other.

    >>> file_kind(Path("Train.JSONL.gz")), file_kind(Path("README.md"))
    ('.jsonl.gz', None)
    """
    name = file.name.lower()
    return next((kind for kind in READERS if name.endswith(kind) and name != kind), None)


def read_table(file: Path, as_text: Sequence[str] = ()) -> Table:
    """The rows of one file.

    Parameters
    ----------
    as_text : columns of a CSV file that stay text where they look like numbers, beside prompt, chosen, rejected, ended
        and user. Any other column is whole or decimal numbers if every cell is one, as Python writes them; an empty
        cell of it is null.

    Raises
    ------
    ValueError : the bytes are not what the ending says; a column stands twice; what arrow cannot hold.
    """
    kind = file_kind(file) or file.suffix
    try:
        with open(file, "rb") as opened:
            if opened.read(len(_POINTER)) == _POINTER:
                raise ValueError("a pointer of git-lfs, not the file itself; run git lfs pull")
        return READERS[kind](file, as_text)
    except Exception as error:  # of pyarrow, csv, gzip, the system: whatever the bytes are
        said = " ".join(str(error).split())[:200] or type(error).__name__
        if isinstance(error, UnicodeDecodeError):
            said = f"byte {error.start} is no UTF-8; save the file as UTF-8"
        raise ValueError(
            f"{file}: not readable as {kind} ({said}); expected one row a pair with text in the columns "
            f"{', '.join(TEXT_COLUMNS)}"
        ) from error


def _text(file: Path) -> str:
    content = file.read_bytes()
    if file.name.lower().endswith(".gz"):
        content = gzip.decompress(content)
    return content.decode("utf-8-sig")


def _check_names(names: Sequence[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"the column {name!r:.60} stands twice; rename or remove one")
        seen.add(name)
        try:
            name.encode()
        except UnicodeEncodeError:
            raise ValueError(f"the column {name!r:.60} has half a character; rename it") from None


# ---------------------------------------------------------------------------------------------------------------- csv


@contextmanager
def _long_cells() -> Iterator[None]:
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _read_csv(file: Path, as_text: Sequence[str]) -> Table:
    with _long_cells():
        reader = csv.reader(io.StringIO(_text(file), newline=""), strict=True)
        names = next((line for line in reader if line), [])
        rows: list[list[str]] = []
        for line in reader:
            if line and len(line) != len(names):
                raise ValueError(
                    f"line {reader.line_num}, row {len(rows)}: found {len(line)} fields, expected {len(names)}; a text "
                    "with commas or line ends needs quotes"
                )
            if line:
                rows.append(line)
    if not names:
        raise ValueError("the file is empty")
    _check_names(names)
    columns = dict(zip(names, (list(c) for c in zip(*rows, strict=True)), strict=False))
    columns = {name: columns.get(name, []) for name in names}
    stay = {*OWN, "user", *as_text}
    return Table(
        names,
        len(rows),
        {name: columns[name] for name in names if name in OWN},
        {
            name: pa.array(columns[name], pa.string()) if name in stay else _numbers(columns[name])
            for name in names
            if name not in OWN
        },
        words=True,
    )


def is_number(cell: str) -> bool:
    """Whether a cell is a number as Python writes it.

    >>> is_number("-3"), is_number("2.5e3"), is_number("007"), is_number("NA")
    (True, True, False, False)
    """
    return bool(_WHOLE.fullmatch(cell) or _DECIMAL.fullmatch(cell))


def odd_cells(cells: Sequence[str]) -> list[str]:
    """The texts that are no numbers, where most of them are: of ages with one "forty" that one; else none.

    >>> odd_cells(["31", "forty", "28"]), odd_cells(["007", "12"]), odd_cells(["north", "7"])
    (['forty'], [], [])
    """
    odd = [cell for cell in cells if not (is_number(cell) or cell.isdigit())]
    return odd if len(odd) < len(cells) - len(odd) else []


def _numbers(cells: list[str]) -> pa.Array:
    known = [cell for cell in cells if cell]
    if known and all(_WHOLE.fullmatch(cell) for cell in known):
        return pa.array([int(cell) if cell else None for cell in cells], pa.int64())
    if known and all(_DECIMAL.fullmatch(cell) for cell in known):
        return pa.array([float(cell) if cell else None for cell in cells], pa.float64())
    return pa.array([cell or None for cell in cells], pa.string())


# --------------------------------------------------------------------------------------------------------------- json


def _read_json(file: Path, as_text: Sequence[str]) -> Table:
    text = _text(file)
    if text.lstrip().startswith("["):
        rows = strict_json(text)
    else:
        rows = []
        for i, line in enumerate(text.split("\n")):
            if line.strip():
                try:
                    rows.append(strict_json(line))
                except (ValueError, RecursionError) as error:
                    raise ValueError(
                        f"line {i + 1}: {error}; expected a row as an object in each line, or one list of them"
                    ) from None
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"row {i}: found {type(row).__name__}, expected an object")
    if not rows:
        raise ValueError("the file is empty")
    names = list(dict.fromkeys(name for row in rows for name in row))
    _check_names(names)
    columns = {name: [row.get(name) for row in rows] for name in names}
    return Table(
        names,
        len(rows),
        {name: columns[name] for name in names if name in OWN},
        {name: _arrow(name, columns[name]) for name in names if name not in OWN},
    )


def _arrow(name: str, values: list[Any]) -> pa.Array:
    try:
        return pa.array(values)
    except Exception as error:  # of arrow, or of Python under it
        kinds = sorted({type(value).__name__ for value in values if value is not None})
        raise ValueError(
            f"column {name!r:.60}: found values of {', '.join(kinds)} that are no one column ({error}); write them alike"
        ) from error


# -------------------------------------------------------------------------------------------------------------- arrow


def _read_parquet(file: Path, as_text: Sequence[str]) -> Table:
    with open(file, "rb") as opened:
        return from_arrow(pq.ParquetFile(opened).read())


def _read_arrow(file: Path, as_text: Sequence[str]) -> Table:
    content = pa.py_buffer(file.read_bytes())
    try:
        found = pa.ipc.open_file(content).read_all()
    except pa.ArrowInvalid:  # a stream, as datasets writes it
        found = pa.ipc.open_stream(content).read_all()
    return from_arrow(found)


def from_arrow(table: pa.Table) -> Table:
    """An arrow table as `Table`.

    Raises
    ------
    ValueError : a column stands twice; what arrow finds damaged (`pyarrow.ArrowInvalid` is one).

    >>> table = from_arrow(pa.table({"prompt": ["Which knot?"], "user": ["ann"]}))
    >>> table.names, table.own, table.values("user")
    (['prompt', 'user'], {'prompt': ['Which knot?']}, ['ann'])
    """
    names = table.column_names
    _check_names(names)
    table.validate(full=True)
    columns = {
        name: column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column
        for name, column in zip(names, table.columns, strict=True)
    }
    return Table(
        names,
        table.num_rows,
        {name: column.to_pylist() for name, column in columns.items() if name in OWN},
        {name: column for name, column in columns.items() if name not in OWN},
        metadata=table.schema.metadata,
    )


def from_dataset(data: Dataset) -> Table:
    """The rows of a `datasets.Dataset`, whatever its format is set to."""
    table = data.with_format("arrow")[:]
    return from_arrow(table.replace_schema_metadata(data.features.arrow_schema.metadata))


def as_dataset(tables: Sequence[Table], place: str) -> Dataset:
    """The rows of tables with the same columns, one after the other.

    Raises
    ------
    ValueError : their columns differ, or `datasets` has no type for one.

    >>> part = Table(["user"], 1, {}, {"user": pa.array(["ann"])})
    >>> as_dataset([part, part], "pairs")["user"][:]
    ['ann', 'ann']
    """
    made = [pa.table(t.rest).replace_schema_metadata(t.metadata) for t in tables]
    for other in made[1:]:
        if set(other.column_names) != set(made[0].column_names):
            raise ValueError(
                f"{place}: found files with the columns {made[0].column_names} and {other.column_names}, expected the "
                "same in all files of one part"
            )
    try:
        whole = made[0]
        if len(made) > 1:
            whole = pa.concat_tables(
                [one.select(whole.column_names) for one in made], promote_options="default"
            )
        return Dataset(whole)
    except Exception as error:  # of datasets and arrow, about types
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(
            f"{place}: found columns that cannot be kept ({said}); write every column with one type, or leave it out"
        ) from error


READERS: dict[str, Callable[[Path, Sequence[str]], Table]] = {
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".jsonl": _read_json,
    ".json": _read_json,
    ".csv": _read_csv,
    ".jsonl.gz": _read_json,
    ".json.gz": _read_json,
    ".csv.gz": _read_csv,
}
