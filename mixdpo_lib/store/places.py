"""Where do things lie, and can they be written? The checkout, the cache, locks."""

from __future__ import annotations

import errno
import os
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import platformdirs
from filelock import FileLock, Timeout

from .reporting import HEARTBEAT_S, note

_FULL = {
    errno.ENOSPC: "no space left on the device",
    errno.EDQUOT: "the quota of the disk is used up",
    errno.EFBIG: "a file is larger than may be written there",
}
_TEXTS = {  # of libraries that wrap the system's error in classes of their own
    **{os.strerror(number): said for number, said in _FULL.items()},
    **dict.fromkeys(  # torch's writer does not say which
        ("PytorchStreamWriter failed writing", "inline_container.cc", "basic_ios::clear"),
        "no space left on the device, or a limit of file size was reached",
    ),
}
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR)


class MixDPOError(RuntimeError):
    """An error with a message for the person at the screen: place, found, expected, remedy."""


def _checkout() -> Path | None:
    if os.environ.get("MIXDPO_ROOT"):
        return Path(os.environ["MIXDPO_ROOT"]).expanduser().resolve()
    here = Path.cwd().resolve()
    for folder in (here, *here.parents, Path(__file__).resolve().parents[2]):
        try:
            if (
                tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"][
                    "name"
                ]
                == "mixdpo"
            ):
                return folder
        except (OSError, KeyError, ValueError):
            continue
    return None


def project_root() -> Path:
    """Folder that holds `data/`, `notebooks/` and `runs/`.

    The environment variable MIXDPO_ROOT wins; else the nearest folder above the working directory
    whose `pyproject.toml` is this project's (JupyterLab works in `notebooks/`, papermill in its
    caller's folder); else the checkout of this package.

    Raises
    ------
    MixDPOError : none of these, as after `pip install`. The method needs no checkout.

    >>> (project_root() / "pyproject.toml").exists()
    True
    """
    if folder := _checkout():
        return folder
    raise MixDPOError(
        f"{Path.cwd()}: found no checkout of mixdpo here or above; notebooks, profiles, titles and "
        "results lie in one: work inside it, or name its folder in MIXDPO_ROOT"
    )


def raw_folder() -> Path:
    """Files as they were fetched: `data/raw/` of the checkout, else `raw/` of the cache."""
    checkout = _checkout()
    return checkout / "data" / "raw" if checkout else cache_folder() / "raw"


def cache_folder() -> Path:
    """Everything that can be computed again.

    MIXDPO_CACHE, else `data/cache/` of the checkout, else the user's own cache.
    """
    if os.environ.get("MIXDPO_CACHE"):
        return Path(os.environ["MIXDPO_CACHE"]).expanduser()
    checkout = _checkout()
    return (
        checkout / "data" / "cache"
        if checkout
        else platformdirs.user_cache_path("mixdpo", appauthor=False)
    )


def cache_part(name: str) -> Path:
    """`cache/<name>/`, made if it is not there: for other libraries, which keep files in it.

    Raises
    ------
    MixDPOError : it cannot be written; the message names the place, the reason and what to do.
    """
    folder = cache_folder() / name
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    return folder


@contextmanager
def writing_to(place: Path) -> Iterator[None]:
    """While the block writes to `place`: a full disk, a quota, or no permission, is one clear error.

    Raises
    ------
    MixDPOError : the place, the reason and the variable that moves it. Errors of other places go
        through as they are.
    """
    try:
        yield
    except MixDPOError:
        raise
    except Exception as error:  # other libraries wrap the system's error in classes of their own
        number, where = (
            getattr(error, "errno", None),
            Path(getattr(error, "filename", None) or os.devnull),
        )
        full = _FULL.get(number or 0) or next(
            (said for text, said in _TEXTS.items() if text in str(error)), None
        )
        if full:
            raise MixDPOError(
                f"{place}: {full}; nothing half-written was kept; "
                f"free some space, or {_remedy(place)}, and start again"
            ) from error
        if number in _REFUSED and (where.is_relative_to(place) or place.is_relative_to(where)):
            reason = os.strerror(number) + ("" if where == place else f": {where}")
            raise MixDPOError(f"{place}: cannot be written ({reason}); {_remedy(place)}") from error
        raise


def _remedy(place: Path) -> str:
    for folder, variable in ((cache_folder(), "MIXDPO_CACHE"), (_checkout(), "MIXDPO_ROOT")):
        if folder and place.is_relative_to(folder):
            return f"name another folder in {variable}"
    return "give another folder"


@contextmanager
def locked(path: str | Path, what: str) -> Iterator[None]:
    """Hold the lock file `path`; while another process has it, say so every 5 seconds."""
    lock, began = FileLock(str(path)), time.monotonic()
    with writing_to(Path(path).parent):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        while not lock.is_locked:
            try:
                lock.acquire(timeout=HEARTBEAT_S)
            except Timeout:
                waited = time.monotonic() - began
                note(f"{what}: another process is making it, waiting for {waited:.0f} s")
    try:
        yield
    finally:
        lock.release()
