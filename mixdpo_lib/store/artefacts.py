"""Under which key does an artefact lie, whole or not at all? Verified cache entries."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .files import (
    canonical_json,
    check_file_list,
    check_shape,
    file_hashes,
    read_json,
    sha256_of,
    sync,
    unlisted,
    write_json_atomic,
)
from .places import MixDPOError, cache_folder, locked, writing_to
from .reporting import note

_RECORD = "artefact.json"
_verified: set[tuple[str, int, int, str]] = set()
_touched: dict[str, str] = {}


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
        named = {
            "stage": stage,
            "version": version,
            "parameters": dict(parameters),
            "inputs": list(inputs),
        }
        text = canonical_json(json.loads(canonical_json(named)))  # as its record will give it back
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"stage {stage!r}: its parameters cannot name an artefact: {error}"
        ) from None
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _damaged(folder: Path, name: str, found: str, expected: str) -> MixDPOError:
    return MixDPOError(
        f"{folder}: damaged cache entry: {name}: found {found}, expected {expected}; {_REMEDY}"
    )


_SHAPE = {"stage": str, "version": int, "parameters": dict, "inputs": list, "files": dict}
_REMEDY = "delete this folder, it will be made again"


def _record(folder: Path) -> dict[str, Any]:
    """The record of a cache entry, of the right shape and under the key that it gives."""
    path = folder / _RECORD
    if not path.exists():
        raise _damaged(folder, _RECORD, "no such file", "the record of a finished entry")
    try:
        content = read_json(path)
    except MixDPOError as error:
        raise _damaged(folder, _RECORD, f"unreadable content ({error})", "JSON") from None
    try:
        record = check_shape(_RECORD, content, _SHAPE, _REMEDY)
        check_file_list(_RECORD, record["files"], _REMEDY)
        key = artefact_key(*(record[name] for name in ("stage", "version", "parameters", "inputs")))
    except (MixDPOError, ValueError) as error:
        said = str(error).removesuffix(f"; {_REMEDY}")
        raise MixDPOError(f"{folder}: damaged cache entry: {said}; {_REMEDY}") from None
    if key != folder.name:
        raise _damaged(folder, _RECORD, f"what has the key {key}", folder.name)
    return record


def verify_artefact(folder: str | Path) -> dict[str, Any]:
    """Record of a cache entry, after it was checked: its shape, its key, and that its files are those it lists.

    The size of each file is compared always, the sha256 once per process and file.

    Raises
    ------
    MixDPOError : the entry is damaged; folder, file, found, expected, remedy.
    """
    folder = Path(folder)
    record = _record(folder)
    files = record["files"]
    if extra := unlisted(folder, files, _RECORD):
        raise _damaged(folder, extra[0], "a file that the record does not list", "none")
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
        record["files"] = file_hashes(partial)
        write_json_atomic(partial / _RECORD, record)
        for name in record["files"]:
            sync(partial / name)
        sync(partial)
        os.replace(partial, folder)
        sync(folder.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for name, entry in record["files"].items():  # just hashed: no need to read it all again
        status = (folder / name).stat()
        _verified.add((str(folder / name), status.st_size, status.st_mtime_ns, entry["sha256"]))


def touch(name: str, sha256: str) -> None:
    """Remember that this process has used something else that is kept, by its record's sha256."""
    _touched[name] = sha256


def touched_artefacts() -> dict[str, str]:
    """`stage/key` -> sha256 of the record, of all that is kept and that this process has used so far.

    Entries of the cache, and results of notebooks as `results/<profile>/<notebook>`.
    """
    return dict(sorted(_touched.items()))


@contextmanager
def _beside(folder: Path) -> Iterator[Path]:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".mixdpo-") as scratch:
        yield Path(scratch)


@contextmanager
def whole_folder(folder: str | Path, mark: str = "") -> Iterator[Path]:
    """A folder beside `folder` to write into; it takes its place when everything is there, and is removed otherwise.

    A link is followed: what it names is written.

    Parameters
    ----------
    mark : the file by which an earlier folder of the same making is known. One that has it, and beside it nothing but
        files of the names that are written now, is replaced, with a note; every other that is not empty is refused.

    Raises
    ------
    MixDPOError : the place is taken by a file, by a folder with other things in it (nothing of it is touched) or by the
        working folder, or cannot be written (disk full, no permission).
    """
    folder = Path(folder).expanduser().resolve()
    try:
        if folder.exists() and not folder.is_dir():
            raise MixDPOError(
                f"{folder}: found a file, expected a folder or nothing; give another name"
            )
        if Path.cwd().is_relative_to(folder):
            raise MixDPOError(
                f"{folder}: found the folder in which this program works, or one around it; expected a folder that can take "
                "the place of an earlier one; name one in it"
            )
        with (
            writing_to(folder),
            _beside(folder) as scratch,
        ):
            place, before = scratch / "whole", scratch / "before"
            place.mkdir()
            yield place
            written = {one.name for one in place.iterdir()}
            there = {one.name for one in folder.iterdir()} if folder.exists() else set()
            if foreign := sorted(there - written or (there if mark not in there else ())):
                raise MixDPOError(
                    f"{folder}: found {', '.join(foreign[:3])}{', ...' if len(foreign) > 3 else ''} there, which would be "
                    "lost; expected an empty or new folder, or what was written there in the same way before; give another "
                    "name"
                )
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
    if there:
        note(f"{folder}: what was saved there before is replaced")


def hash_seed(*parts: Any) -> int:
    """One integer seed, split by stage name: a 31-bit number that depends on every part."""
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:4], "big") >> 1
