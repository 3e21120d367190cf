"""Where do things lie, and can they be written? The checkout, the cache, locks."""

from __future__ import annotations

import errno
import os
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
OF_OTHERS = ".made-by-mixdpo"  # in a folder of the cache that another library fills
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR)


class MixDPOError(RuntimeError):
    """An error with a message for the person at the screen: place, found, expected, remedy."""


_ODD = (errno.ENAMETOOLONG, errno.ELOOP, errno.EIO, errno.ESTALE, errno.EINVAL, errno.ENODEV)


def _named(variable: str) -> Path | None:
    """The folder that a variable of the environment names, in full."""
    text = os.environ.get(variable)
    if not text:
        return None
    try:
        return Path(os.path.abspath(Path(text).expanduser()))
    except (OSError, RuntimeError) as error:  # no home folder, no working directory
        raise MixDPOError(
            f"{variable}={text}: names no folder here ({error}); write it in full"
        ) from None


def _checkout() -> Path | None:
    if root := _named("MIXDPO_ROOT"):
        if not os.path.isdir(root / "notebooks"):
            raise MixDPOError(
                f"{root}: found no checkout of mixdpo there (no folder `notebooks`), and MIXDPO_ROOT names "
                "it; name the folder of one, or unset MIXDPO_ROOT"
            )
        return Path(os.path.realpath(root))
    try:
        here = Path.cwd().resolve()
    except OSError:  # it was removed
        here = Path(__file__).resolve()
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
    MixDPOError : none of these, as after `pip install`, or MIXDPO_ROOT names another folder. The method
        needs no checkout.

    >>> (project_root() / "pyproject.toml").exists()
    True
    """
    if folder := _checkout():
        return folder
    raise MixDPOError(
        f"{os.path.abspath('.')}: found no checkout of mixdpo here or above; notebooks, profiles, titles and "
        "results lie in one: work inside it, or name its folder in MIXDPO_ROOT"
    )


def raw_folder() -> Path:
    """Files as they were fetched: `data/raw/` of the checkout, else `raw/` of the cache."""
    checkout = _checkout()
    return checkout / "data" / "raw" if checkout else cache_folder() / "raw"


def cache_folder() -> Path:
    """Everything that can be computed again.

    MIXDPO_CACHE, else `data/cache/` of the checkout, else the user's own cache.

    Raises
    ------
    MixDPOError : there is no home folder, or a variable names none; which variable helps.
    """
    if cache := _named("MIXDPO_CACHE"):
        return cache
    if checkout := _checkout():
        return checkout / "data" / "cache"
    with suppress(RuntimeError):  # this user has no home folder
        own = platformdirs.user_cache_path("mixdpo", appauthor=False)
        if own.is_absolute():
            return own
    raise MixDPOError(
        "no home folder to keep computed files in; name a folder that can be written in MIXDPO_CACHE"
    )


def cache_part(name: str) -> Path:
    """`cache/<name>/`, made if it is not there, and marked then: for other libraries, which keep files in it.

    Raises
    ------
    MixDPOError : it cannot be written; the message names the place, the reason and what to do.
    """
    folder = cache_folder() / name
    with writing_to(folder):
        made = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
        if made:
            (folder / OF_OTHERS).touch()
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
        above = place.is_relative_to(where)
        refused = number in (*_REFUSED, *_ODD) or (number == errno.ENOENT and above)
        if refused and (above or where.is_relative_to(place)):
            reason = os.strerror(number or 0) + ("" if where == place else f": {where}")
            raise MixDPOError(f"{place}: cannot be written ({reason}); {_remedy(place)}") from error
        raise


def _remedy(place: Path) -> str:
    for find, variable in (
        (cache_folder, "MIXDPO_CACHE"),
        (lambda: _named("HF_HUB_CACHE"), "HF_HUB_CACHE"),
        (lambda: _named("HF_HOME"), "HF_HOME"),
        (_checkout, "MIXDPO_ROOT"),
    ):
        with suppress(MixDPOError):
            folder = find()
            if folder and place.is_relative_to(folder):
                return f"name another folder in {variable}"
    if "huggingface" in place.parts:
        return "name another folder in HF_HOME"
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
            except NotImplementedError:
                raise MixDPOError(
                    f"{path}: this file system cannot lock files; {_remedy(Path(path))}"
                ) from None
    try:
        yield
    finally:
        lock.release()
