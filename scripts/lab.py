"""JupyterLab on the whole project, on copies of its notebooks: `python scripts/lab.py [folder] [JupyterLab's options]`.

The copies lie in `lab/` (or another folder of the project), where they may be changed and run; the tracked notebooks stay
bare. A copy is renewed when the project has a newer version and nobody changed its cells; otherwise it is kept, and the
newer version is put beside it. Works for root, as in a container.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECORD = ".copied.json"  # by notebook: the cells that were copied


def cells_of(path: Path) -> str:
    """What the cells of a notebook say, as a hash: outputs and order of execution do not count."""
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        said = [[cell["cell_type"], "".join(cell["source"])] for cell in cells]
    except (OSError, ValueError, KeyError, TypeError):
        return "unreadable"
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def copy_notebooks(source: Path, target: Path) -> Iterator[str]:
    """Copy every notebook of `source`, and what stands beside them, to `target`; what is not just a copy is said.

    A copy whose cells somebody changed is never overwritten.
    """
    record = target / RECORD
    copied = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    for path in sorted(source.rglob("*.ipynb")):
        if ".ipynb_checkpoints" in path.parts:
            continue
        name = path.relative_to(source).as_posix()
        own, new, now = target / name, cells_of(path), cells_of(target / name)
        if own.exists() and now not in (copied.get(name), new):
            if copied.get(name) != new:
                beside = own.with_name(f"{own.stem}.new.ipynb")
                shutil.copy(path, beside)
                yield f"kept {own}, which you changed; the project's newer version is {beside.name} beside it"
        elif not own.exists() or now != new:
            if own.exists():
                yield f"renewed {own}: the project has a newer version, and its cells were as they were copied"
            own.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, own)
        copied[name] = new
    target.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(copied, indent=1), encoding="utf-8")


def main(arguments: list[str]) -> None:
    """Copy, then become JupyterLab."""
    folder = arguments.pop(0) if arguments and not arguments[0].startswith("-") else "lab"
    for line in copy_notebooks(ROOT / "notebooks", ROOT / folder):
        print(f"[lab] {line}")
    print(
        f"[lab] your copies of the notebooks are in {folder}/; what you do there changes no tracked file",
        flush=True,
    )
    first = f"{folder}/00_start_here.ipynb"
    options = [
        f"--ServerApp.root_dir={ROOT}",
        f"--LabApp.default_url=/lab/tree/{first}",
        "--LabApp.news_url=None",
    ]
    if os.geteuid() == 0:
        options.append("--allow-root")
    os.chdir(ROOT)
    os.execv(sys.executable, [sys.executable, "-m", "jupyterlab", *options, *arguments])


if __name__ == "__main__":
    main(sys.argv[1:])
