"""Which files are a preference set, and what do they hold?"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict

from ..store import note
from .checks import NAMED, BadRows
from .forms import read_forms
from .messages import Prompt, strict_json
from .pairs import TEXT_COLUMNS, values_of
from .tables import READERS, Table, as_dataset, file_kind, odd_cells, read_table

_TEXTS = ("string", "large_string")  # how datasets names a column of texts
_SHARD = re.compile(r"(?P<part>.+)-(?P<i>\d+)-of-(?P<n>\d+)(?:-[0-9a-f]{16})?", re.DOTALL)
_NOTES = (
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
)  # of datasets


def load_preferences(
    path: str | Path,
    columns: Sequence[str] | None = (),
    on_bad_rows: str = "raise",
    base: Any = None,
) -> DatasetDict:
    """Read preference sets: a file, a folder of files, a clone of a data set's repository, or a folder of `save_to_disk`.

    Every row becomes `prompt` (a text, or the list of messages before the answer) and the texts `chosen` and
    `rejected`, see `explicit_row` for the forms that are read; other columns stay. Files are Parquet, Arrow, JSON Lines,
    JSON or CSV, the last three also as .gz; a file `train.csv` or all of `train-00000-of-00002.parquet` ... are the part
    "train", from the folder or, where it has none, from `data/` in it. A file that is named itself is the part "train".

    Parameters
    ----------
    path : a path, never a pattern.
    columns : further columns that must be there, without a missing value. In CSV files these, and `user`, stay text;
        a column that is not named and holds numbers alone becomes numbers.
    on_bad_rows : "raise", or "drop": go on without the bad rows, which are counted in a printed line.
    base : a model (`load_base`); rows that it cannot read are bad rows too: longer than its context, a conversation
        without a template, an end token inside an answer.

    Raises
    ------
    FileNotFoundError : nothing readable there.
    ValueError : bad rows (all are counted, ten are named, from 0 in each file), files that are not what their ending
        says, two files for one part, a shard that is missing.
    """
    if on_bad_rows not in ("raise", "drop"):
        raise ValueError(f"on_bad_rows={on_bad_rows!r}: expected 'raise' or 'drop'")
    if columns is None or isinstance(columns, str):
        instead = "leave it out" if columns is None else f"write [{columns!r}]"
        raise ValueError(f"columns={columns!r}: expected a list of names; {instead}")
    bad, total, read = BadRows(), 0, {}
    for name, files in find_parts(Path(path)).items():
        own, before, tables = BadRows(), total, list[Table]()
        first: Prompt | None = None
        for file in files:
            given = read_table(file, columns)
            total += given.n
            readable = None if base is None else base.text_ids
            found, first = read_forms(given, f"{file} ({name})", own, columns, first, readable)
            tables.append(found)
        bad.extend(own)
        read[name] = tables, f"; {own.text(total - before)}" if own.count else ""
    if on_bad_rows == "raise":
        bad.refuse(total, "mend these rows, or on_bad_rows='drop' goes on without them")
    elif bad.count:
        note(f"dropped {bad.count} of {total} rows: {bad.text(total)}")
    sets: dict[str, Dataset] = {}
    for name, (tables, why) in read.items():
        left = [table for table in tables if table.n]
        if not left:
            raise ValueError(
                f"{path} ({name}): no row is left, expected at least one; remove the files of this part{why}"
            )
        sets[name] = as_dataset(left, f"{path} ({name})")
    for column in dict.fromkeys(("user", *columns)):
        if alike := nearly_the_same(sets.values(), column):
            named = ", ".join(f"{one!r} and {other!r}" for one, other in alike[:NAMED])
            note(
                f"{path}, column {column!r}: {named}{' ...' if len(alike) > NAMED else ''} ({len(alike)} in all) differ in "
                "spaces or capitals alone and count as two; mend the rows if they are one"
            )
    for name, rows in sets.items():
        for column in set(rows.column_names) - {*TEXT_COLUMNS, "user", *columns}:
            of_text = getattr(rows.features[column], "dtype", "") in _TEXTS
            if odd := odd_cells([c for c in rows.unique(column) if c] if of_text else []):
                row, more = values_of(rows, column).index(odd[0]), f" and {len(odd) - 1} more"
                note(
                    f"{path} ({name}), column {column!r}: numbers but for {odd[0]!r} (row {row})"
                    f"{more if len(odd) > 1 else ''}; the column stays text, which gates refuse; mend the cells, or, if it "
                    "is text, name the column in columns= and its categories in UserGate({...})"
                )
    return DatasetDict(sets)


def nearly_the_same(sets: Iterable[Dataset], column: str) -> list[tuple[str, str]]:
    """Texts of a column that are one but for spaces at their ends and capitals: each with the first like it.

    >>> nearly_the_same([Dataset.from_dict({"user": ["Ann", "bo", "ann "]})], "user")
    [('Ann', 'ann ')]
    """
    first: dict[str, str] = {}
    found = []
    of_text = [s for s in sets if getattr(s.features.get(column), "dtype", "") in _TEXTS]
    for text in dict.fromkeys(value for rows in of_text for value in rows.unique(column) if value):
        like = first.setdefault(text.strip().casefold(), text)
        if like != text:
            found.append((like, text))
    return found


def find_parts(place: Path) -> dict[str, list[Path]]:
    """The files of each part, shards in their order.

    Raises
    ------
    FileNotFoundError : nothing readable there.
    ValueError : two files for one part, a shard that is missing, a damaged record of `save_to_disk`.
    """
    try:
        there = place.is_file() or place.is_dir()
    except OSError as error:
        raise ValueError(
            f"{place}: cannot be looked at ({os.strerror(error.errno or 0)}); expected a path of a file or a folder"
        ) from error
    if place.is_file() and file_kind(place):
        return {"train": [place]}
    if not there or not place.is_dir():
        raise _nothing(place)
    if (place / "dataset_dict.json").is_file():
        names = _record(place / "dataset_dict.json", "splits")
        return {str(name): _saved(place / str(name)) for name in names}
    if (place / "state.json").is_file() or (
        (place / "dataset_info.json").is_file() and any(place.glob("data-*-of-*.arrow"))
    ):
        return {"train": _saved(place)}
    for folder in (place, place / "data"):
        if files := _data_files(folder):
            return _by_part(files)
    raise _nothing(place)


def _nothing(place: Path) -> FileNotFoundError:
    inside: list[str] = []
    if place.is_dir():
        try:
            inside = [
                f.name
                for f in sorted(place.iterdir())
                if f.is_dir() and (_data_files(f) or (f / "state.json").is_file())
            ]
        except OSError:
            inside = []
    hint = f"; its folders {', '.join(inside[:10])} have some: name one of them" if inside else ""
    return FileNotFoundError(
        f"{place}: no preference data found; expected a folder saved with save_to_disk, or files such as "
        f"train.parquet, train.jsonl or train.csv ({', '.join(READERS)}) with columns prompt, chosen, rejected{hint}"
    )


def _data_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    try:
        return [
            file
            for file in sorted(folder.iterdir())
            if file_kind(file)
            and not file.name.startswith(".")
            and file.name not in _NOTES
            and file.is_file()
        ]
    except OSError as error:
        raise ValueError(
            f"{folder}: cannot be listed ({os.strerror(error.errno or 0)}); give a folder that can be read"
        ) from error


def _by_part(files: Sequence[Path]) -> dict[str, list[Path]]:
    whole: dict[str, Path] = {}
    shards: dict[str, dict[int, Path]] = {}
    counts: dict[str, tuple[int, re.Match[str], Path]] = {}
    for file in files:
        stem = file.name[: -len(file_kind(file) or "")]
        shard = _SHARD.fullmatch(stem)
        part = shard["part"] if shard else stem
        other = whole.get(part)
        if shard:
            i, n = int(shard["i"]), int(shard["n"])
            other = other or shards.setdefault(part, {}).get(i)
            if part in counts and counts[part][0] != n:
                other = counts[part][2]
            shards[part][i], counts[part] = file, (n, shard, file)
        else:
            other = other or next(iter(shards.get(part, {}).values()), None)
            whole[part] = file
        if other:
            raise ValueError(
                f"{file.parent}: found {other.name} and {file.name} for the part {part!r}, expected one file, or the "
                "shards of one set; move one away"
            )
    for part, found in shards.items():
        n, shard, file = counts[part]
        missing = [i for i in range(min(n, len(found) + 3)) if i not in found]
        if missing or len(found) != n:
            width, ending = len(shard["i"]), file_kind(file)
            names = ", ".join(f"{part}-{i:0{width}}-of-{shard['n']}{ending}" for i in missing[:3])
            raise ValueError(
                f"{file.parent}: found {len(found)} shards of {part!r}, expected {n}"
                + (f"; missing: {names}" if names else ", numbered from 0")
                + "; fetch the set again"
            )
    ordered = {part: [found[i] for i in sorted(found)] for part, found in shards.items()}
    parts = {**{part: [file] for part, file in whole.items()}, **ordered}
    return {part: parts[part] for part in sorted(parts, key=lambda part: (part != "train", part))}


def _record(file: Path, key: str) -> list[object]:
    try:
        found = strict_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{file}: not readable ({error}); expected what save_to_disk writes; save the set again"
        ) from error
    value = found.get(key) if isinstance(found, dict) else None
    if not isinstance(value, list) or not value:
        raise ValueError(
            f"{file}: found no list {key!r}, expected what save_to_disk writes; save the set again"
        )
    return value


def _saved(folder: Path) -> list[Path]:
    named = _record(folder / "state.json", "_data_files")
    files = []
    for one in named:
        name = one.get("filename") if isinstance(one, dict) else None
        if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file():
            raise ValueError(
                f"{folder}: found no file {name!r:.60}, which state.json names; save the set again"
            )
        files.append(folder / name)
    return files


def example_preferences() -> DatasetDict:
    """A small set that was written by hand, to try things on: 3 users who want different answers about films.

    The same prompts for every user; "ann" prefers the enthusiastic answer, "ben" the informative one, "cleo" the terse
    one. Columns prompt, chosen, rejected, user, age, country; parts train (30 pairs), validation and test (9 pairs each,
    on prompts of their own). Three made-up people show how things work, never how well.

    >>> {name: len(part) for name, part in sorted(example_preferences().items())}
    {'test': 9, 'train': 30, 'validation': 9}
    """
    return load_preferences(Path(__file__).parent / "example", ["user", "age", "country"])
