"""Which runs are there, in what state, and where do they lie?"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from .. import store
from ..store import MixDPOError
from .notebooks import notebook_hash, notebook_names, notebook_path, theory_names
from .results import read_manifest, verify_manifest

FINISHED = ("finished", "of older code")


class Found(NamedTuple):
    """A run: its notebook, its folder below `runs/`, its state, when it ended, and what there is to say.

    state : "finished"; "of older code" (library or notebook has changed since); "changed" (a file is not the one that
    was recorded); "running"; "not finished"; "interrupted"; "failed".
    """

    notebook: str
    place: str
    state: str
    ended: str = ""
    minutes: float | None = None
    said: str = ""


def found_runs(library: Callable[[], str]) -> list[Found]:
    """Every run below `runs/`, by profile, then custom, interactive and failed ones.

    library : gives the hash of the library's source as it is now; asked once, if at all.
    """
    root = store.project_root() / "runs"
    if not root.is_dir():
        return []
    known, found = {*notebook_names(), *theory_names()}, []
    now: list[str] = []
    for folder in sorted(root.iterdir(), key=lambda path: (path.name == "failed", path.name)):
        if folder.is_dir() and folder.name not in ("opened", "bench"):
            for run in _runs_in(folder):
                if folder.name != "failed" and not now:
                    now.append(library())
                found.append(_look(run, root, known, now))
    return found


def _runs_in(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.is_dir() and (folder.name == "interactive" or path.name == "grid"):
            yield from (
                run for run in sorted(path.iterdir()) if run.is_dir() and ".old-" not in run.name
            )
        elif path.is_dir() and ".old-" not in path.name:
            yield path


def _look(run: Path, root: Path, known: set[str], now: list[str]) -> Found:
    place = run.relative_to(root).as_posix()
    name = run.parent.name if place.startswith("interactive/") else run.name
    name, _, process = name.lstrip(".").partition(".part-")
    notebook = next((one for one in sorted(known, key=len)[::-1] if name.startswith(one)), name)
    if place.startswith("failed/"):
        said = _last_line(run / "error.txt")
        ended = [p.stat().st_mtime for p in (run / "error.txt", run) if p.exists()][0]
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(ended))
        if "Interrupted" in said.split(":")[0]:
            return Found(notebook, place, "interrupted", when)
        return Found(notebook, place, "failed", when, said=said)
    if process:
        return Found(notebook, place, "running" if _lives(process) else "not finished")
    if not (run / "manifest.json").exists():
        return Found(notebook, place, "not finished")
    try:
        manifest = read_manifest(run / "manifest.json")
        notebook = manifest["notebook"]
        told = (notebook, place)
        ended, minutes = manifest["ended"], manifest["seconds"] / 60
        verify_manifest(run)
    except MixDPOError as error:
        return Found(notebook, place, "changed", said=str(error))
    same = manifest["library_sha256"] in now and notebook in known
    same = same and manifest["notebook_sha256"] == notebook_hash(notebook)
    return Found(*told, FINISHED[0] if same else FINISHED[1], ended, minutes)


def _lives(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except PermissionError:  # somebody else's
        return True
    except (OSError, ValueError):
        return False
    return True


def _last_line(path: Path) -> str:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    except OSError:
        return ""
    return lines[-1] if lines else ""


def listing(runs: list[Found]) -> str:
    """Runs as a table of plain text, a line each.

    >>> print(listing([Found("04_mix_dpo", "smoke/04_mix_dpo", "finished", "2026-01-02T03:04:05Z", 1.5)]))
    run               state     ended             minutes
    smoke/04_mix_dpo  finished  2026-01-02 03:04  1.5
    """
    if not runs:
        return "no runs yet: `mixdpo run <notebook>` or `make reproduce` makes some"
    rows = [("run", "state", "ended", "minutes", "")]
    for run in runs:
        minutes = "" if run.minutes is None else f"{run.minutes:.1f}"
        said = run.said if len(run.said) <= 100 else run.said[:97] + "..."
        rows.append((run.place, run.state, run.ended[:16].replace("T", " "), minutes, said))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = ["  ".join((*map(str.ljust, row, widths), row[4])).rstrip() for row in rows]
    return "\n".join(lines)


def never_run(runs: list[Found]) -> list[str]:
    """The notebooks of which no run is finished."""
    done = {run.notebook for run in runs if run.state in FINISHED}
    return [name for name in (*notebook_names(), *theory_names()) if name not in done]


def opened_copy(what: str, runs: list[Found]) -> Path:
    """A copy, in `runs/opened/`, of the notebook that `what` names: the record of a run stays as it is.

    what : a run (`smoke/04_mix_dpo`, as `mixdpo list` shows it, or its folder), or a notebook: its last finished run,
        the default profile's first; one that was never run is copied bare.

    Raises
    ------
    MixDPOError : neither a run nor a notebook.
    """
    root = store.project_root() / "runs"
    place = Path(what).expanduser()
    if (place / "notebook.ipynb").is_file():
        source = place / "notebook.ipynb"
    elif (root / what / "notebook.ipynb").is_file():
        source = root / what / "notebook.ipynb"
    else:
        try:
            bare = notebook_path(what)
        except MixDPOError as error:
            raise MixDPOError(f"{error} (or a run, as `mixdpo list` names it)") from None
        done = [run for run in runs if run.notebook == bare.stem and run.state in FINISHED]
        done = [run for run in done if (root / run.place / "notebook.ipynb").is_file()]
        done.sort(key=lambda run: (run.place.startswith("default/"), run.ended))
        source = root / done[-1].place / "notebook.ipynb" if done else bare
    name = source.stem if source.stem != "notebook" else source.parent.name
    copy = (
        root
        / "opened"
        / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', name)}-{store.sha256_of(source)[:8]}.ipynb"
    )
    with store.writing_to(copy.parent):
        copy.parent.mkdir(parents=True, exist_ok=True)
        if not copy.exists():  # what was written into an earlier copy of the same stays
            part = copy.with_name(f".{copy.name}.part-{os.getpid()}")
            try:
                shutil.copyfile(source, part)
                os.replace(part, copy)
            finally:
                part.unlink(missing_ok=True)
    return copy


def show(notebook: Path, browser: bool = True) -> int:
    """Open a notebook in JupyterLab, the whole project beside it; returns when JupyterLab ends."""
    root = store.project_root()
    command = [sys.executable, "-m", "jupyterlab", f"--notebook-dir={root}"]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        command.append("--allow-root")
    if not browser:
        command.append("--no-browser")
    return subprocess.run([*command, str(notebook)], cwd=root).returncode
