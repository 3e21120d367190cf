"""Is what lies on disk what was written? Files written whole, their hashes, and the shape of a record."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from .places import MixDPOError, writing_to

_WORDS = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
    type(None): "null",
}
Shape = Mapping[str, type | tuple[type, ...]]  # the types that the keys of an object of JSON have
_SHA256 = re.compile("[0-9a-f]{64}")


def plain(value: Any) -> Any:
    """What JSON does not know, as what it knows: fields of a dataclass, numbers of numpy."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:  # numpy scalars
        return value.item()
    raise TypeError(
        f"found a {type(value).__name__} ({value!r:.60}); expected numbers, text, lists or mappings"
    )


def canonical_json(value: Any) -> str:
    """Text that is equal for equal content, whatever the order of keys.

    >>> canonical_json({"b": (1, 2), "a": 0.5})
    '{"a":0.5,"b":[1,2]}'
    """
    return json.dumps(
        value,
        sort_keys=True,
        separators=(",", ":"),
        ensure_ascii=False,
        allow_nan=False,
        default=plain,
    )


def sha256_of(path: str | Path) -> str:
    """sha256 of a file's bytes, 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: str | Path) -> Any:
    """Content of a JSON file; a missing or damaged file is one clear MixDPOError."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MixDPOError(f"{path}: not found; expected a JSON file there") from None
    except (OSError, ValueError, RecursionError) as error:
        raise MixDPOError(
            f"{path}: found no readable JSON ({error}); delete the file and make it again"
        ) from None


def write_json_atomic(path: str | Path, value: Any) -> Path:
    """Write JSON so that a reader sees the old file or the new one, never half of it."""
    path = Path(path)
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, default=plain) + "\n"
    with writing_to(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
        try:
            with open(partial, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    return path


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_folder(folder: Path) -> None:
    """Remove a folder; its name is free in one step, whenever the process is killed.

    It is renamed to a hidden `.gone-...` beside it first; what an earlier, killed removal left is removed too.
    """
    if not folder.parent.is_dir():
        return
    with writing_to(folder.parent):
        if folder.exists():
            os.replace(folder, folder.with_name(f".gone-{folder.name}-{uuid.uuid4().hex[:8]}"))
        for left_over in folder.parent.glob(f".gone-{folder.name}-*"):
            shutil.rmtree(left_over, ignore_errors=True)


# --------------------------------------------------------------------------------------------- the files of a folder


def file_hashes(folder: Path) -> dict[str, dict[str, Any]]:
    """sha256 and bytes of every file in a folder and below, by its path in it; hidden files are left out."""
    return {
        path.relative_to(folder).as_posix(): {
            "sha256": sha256_of(path),
            "bytes": path.stat().st_size,
        }
        for path in _files(folder)
    }


def _files(folder: Path) -> list[Path]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return sorted(
        path
        for path in found
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def unlisted(folder: Path, files: Mapping[str, Any], record: str) -> list[str]:
    """Files in a folder that its record does not list; the record itself and hidden files aside."""
    names = (path.relative_to(folder).as_posix() for path in _files(folder))
    return [name for name in names if name not in files and name != record]


# -------------------------------------------------------------------------------------------- the shape of a record


def shown(value: Any) -> str:
    """A value for a message, short."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 60 else f"{text[:57]}..."


def check_shape(
    place: str | Path,
    value: Any,
    shape: Shape,
    remedy: str,
    optional: Sequence[str] = (),
) -> dict[str, Any]:
    """The value, an object of JSON whose keys have the types of `shape`; `float` takes whole numbers too.

    Raises
    ------
    MixDPOError : the place, the key, what was found and expected, and the remedy.

    >>> check_shape("a.json", {"bytes": 3}, {"bytes": int}, "make it again")
    {'bytes': 3}
    """
    if not isinstance(value, dict):
        raise MixDPOError(
            f"{place}: found {shown(value)}, expected an object with {', '.join(shape)}; {remedy}"
        )
    for key, kinds in shape.items():
        allowed = kinds if isinstance(kinds, tuple) else (kinds,)
        if key not in value and key in optional:
            continue
        found = shown(value[key]) if key in value else "no such key"
        kind = type(value.get(key))
        if key not in value or not (kind in allowed or (kind is int and float in allowed)):
            expected = " or ".join(_WORDS[one] for one in allowed)
            raise MixDPOError(f"{place}: {key}: found {found}, expected {expected}; {remedy}")
    return value


def check_file_list(place: str | Path, files: Any, remedy: str) -> dict[str, dict[str, Any]]:
    """The list of files of a record: sha256 and bytes by path, each a path inside the folder.

    Raises
    ------
    MixDPOError : another shape; the entry is named.
    """
    if not isinstance(files, dict):
        raise MixDPOError(
            f"{place}: found {shown(files)}, expected an object with a file a key; {remedy}"
        )
    for name, entry in files.items():
        check_shape(f"{place}: {name}", entry, {"sha256": str, "bytes": int}, remedy)
        path = PurePosixPath(name)
        if not name or path.is_absolute() or ".." in path.parts or "\0" in name:
            raise MixDPOError(
                f"{place}: found {shown(name)}, expected a path inside the folder; {remedy}"
            )
        if not _SHA256.fullmatch(entry["sha256"]) or entry["bytes"] < 0:
            raise MixDPOError(
                f"{place}: {name}: found {shown(entry)}, expected 64 hex digits and a size; {remedy}"
            )
    return files
