"""Under which key does an artefact lie, whole or not at all? Atomic files, verified cache entries."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .places import MixDPOError, cache_folder, locked, writing_to

_RECORD = "artefact.json"
_verified: set[tuple[str, int, int, str]] = set()
_touched: dict[str, str] = {}


def _plain(value: Any) -> Any:
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
        default=_plain,
    )


def sha256_of(path: str | Path) -> str:
    """sha256 of a file's bytes, 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def artefact_key(
    stage: str, version: int, parameters: Mapping[str, Any], inputs: Sequence[str] = ()
) -> str:
    """16 hex digits that name an artefact: its stage, the version of the stage's code, parameters and inputs' keys.

    >>> artefact_key("pairs", 1, {"seed": 0}) == artefact_key("pairs", 1, {"seed": 0})
    True
    >>> artefact_key("pairs", 1, {"seed": 0}) == artefact_key("pairs", 2, {"seed": 0})
    False
    """
    try:
        text = canonical_json(
            {
                "stage": stage,
                "version": version,
                "parameters": dict(parameters),
                "inputs": list(inputs),
            }
        )
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"stage {stage!r}: its parameters cannot name an artefact: {error}"
        ) from None
    return hashlib.sha256(text.encode()).hexdigest()[:16]


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
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, default=_plain) + "\n"
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


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _damaged(folder: Path, name: str, found: str, expected: str) -> MixDPOError:
    return MixDPOError(
        f"{folder}: damaged cache entry: {name}: found {found}, expected {expected}; "
        "delete this folder, it will be made again"
    )


def verify_artefact(folder: str | Path) -> dict[str, Any]:
    """Record of a cache entry, after its files were checked (size always, sha256 once per process and file)."""
    folder = Path(folder)
    try:
        record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        files = dict(record["files"])
    except FileNotFoundError:
        raise _damaged(folder, _RECORD, "no such file", "the record of a finished entry") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(
            folder, _RECORD, f"unreadable content ({error})", "the record of a finished entry"
        ) from None
    for name, expected in files.items():
        try:
            status = (folder / name).stat()
        except OSError:
            raise _damaged(folder, name, "no such file", f"{expected['bytes']} bytes") from None
        if status.st_size != expected["bytes"]:
            raise _damaged(folder, name, f"{status.st_size} bytes", f"{expected['bytes']} bytes")
        seen = (str(folder / name), status.st_size, status.st_mtime_ns, expected["sha256"])
        if seen not in _verified:
            found = sha256_of(folder / name)
            if found != expected["sha256"]:
                raise _damaged(folder, name, f"sha256 {found[:16]}", expected["sha256"][:16])
            _verified.add(seen)
    return record


def cached(
    stage: str,
    version: int,
    parameters: Mapping[str, Any],
    build: Callable[[Path], Any],
    inputs: Sequence[str] = (),
) -> Path:
    """Folder `cache/<stage>/<key>/` of an artefact, made by `build(folder)` if it is not there yet.

    The entry appears in one step, with the sha256 of every file, and is verified whenever it is read. Two processes
    may ask for one entry: the second waits for the first. A build that fails leaves nothing behind.

    Parameters
    ----------
    stage, version : name of the stage, and a number to raise when its code changes what comes out.
    parameters : everything else that the result depends on (plain values, or a dataclass' fields).
    build : writes files (and folders) into the empty folder that it is given.
    inputs : keys or hashes of the artefacts that it is made from.

    Raises
    ------
    MixDPOError : the entry is damaged (folder, file, found, expected, remedy), or the disk is full.
    """
    key = artefact_key(stage, version, parameters, inputs)
    folder = cache_folder() / stage / key
    with writing_to(folder.parent):
        absent = not folder.exists()
    if absent:
        with writing_to(folder.parent), locked(folder.with_name(f"{key}.lock"), f"{stage} {key}"):
            if not folder.exists():
                _make(
                    folder,
                    build,
                    {
                        "stage": stage,
                        "version": version,
                        "parameters": dict(parameters),
                        "inputs": list(inputs),
                    },
                )
    verify_artefact(folder)
    _touched[f"{stage}/{key}"] = sha256_of(folder / _RECORD)
    return folder


def _make(folder: Path, build: Callable[[Path], Any], record: dict[str, Any]) -> None:
    for left_over in folder.parent.glob(
        f"{folder.name}.part-*"
    ):  # of a killed process: we hold the lock
        shutil.rmtree(left_over, ignore_errors=True)
    partial = folder.with_name(f"{folder.name}.part-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        build(partial)
        made = sorted(path for path in partial.rglob("*") if path.is_file())
        record["files"] = {
            path.relative_to(partial).as_posix(): {
                "sha256": sha256_of(path),
                "bytes": path.stat().st_size,
            }
            for path in made
        }
        write_json_atomic(partial / _RECORD, record)
        for path in made:
            _sync(path)
        _sync(partial)
        os.replace(partial, folder)
        _sync(folder.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for name, entry in record["files"].items():  # just hashed: no need to read it all again
        status = (folder / name).stat()
        _verified.add((str(folder / name), status.st_size, status.st_mtime_ns, entry["sha256"]))


def touched_artefacts() -> dict[str, str]:
    """`stage/key` -> sha256 of the record, of every cache entry that this process has used so far."""
    return dict(sorted(_touched.items()))


@contextmanager
def _beside(folder: Path) -> Iterator[Path]:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".mixdpo-") as scratch:
        yield Path(scratch)


@contextmanager
def whole_folder(folder: str | Path) -> Iterator[Path]:
    """A folder beside `folder` to write into; it takes its place when everything is there, and is removed otherwise.

    Raises
    ------
    MixDPOError : the place is taken by a file, or cannot be written (disk full, no permission).
    """
    folder = Path(folder)
    try:
        if folder.exists() and not folder.is_dir():
            raise MixDPOError(
                f"{folder}: found a file, expected a folder or nothing; give another name"
            )
        with (
            writing_to(folder),
            _beside(folder) as scratch,
        ):
            place, before = scratch / "whole", scratch / "before"
            place.mkdir()
            yield place
            try:
                if folder.exists():
                    folder.rename(before)
                place.rename(folder)
            except BaseException:
                if before.exists() and not folder.exists():
                    before.rename(folder)
                raise
    except OSError as error:
        raise MixDPOError(
            f"{folder}: not written ({error}); nothing was left there half-done"
        ) from error


def hash_seed(*parts: Any) -> int:
    """One integer seed, split by stage name: a 31-bit number that depends on every part."""
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:4], "big") >> 1
