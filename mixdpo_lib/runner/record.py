"""What does a run leave, and what does it depend on?"""

from __future__ import annotations

import ast
import gc
import hashlib
import importlib.metadata
import math
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from .. import store
from ..store import MixDPOError
from . import results
from .notebooks import nearest, notebook_hash
from .parameters import PROFILE, check_value, notebook_parameters, resolve_parameters

_PACKAGES = (
    "torch",
    "transformers",
    "datasets",
    "safetensors",
    "scikit-learn",
    "harper-py",
    "numpy",
    "pandas",
    "matplotlib",
    "seaborn",
    "papermill",
)
SHIPPED = ("arguments", "mixtures", "titles")  # folders of data/ that notebooks read


def library_hash() -> str:
    """sha256 over what results depend on besides their notebook, 64 hex digits: see `library_files`."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[2]
    for path in library_files():
        digest.update(f"{path.relative_to(root).as_posix()} {store.sha256_of(path)}\n".encode())
    return digest.hexdigest()


def library_files() -> list[Path]:
    """The library's files but for the command line, and in a checkout the data that are shipped beside it."""
    root = Path(__file__).parents[2]
    places = [root / "mixdpo_lib", *(root / "data" / name for name in SHIPPED)]
    found = [path for place in places for path in place.rglob("*") if path.is_file()]
    left_out = root / "mixdpo_lib" / "cli.py"
    return sorted(
        one
        for one in found
        if one != left_out
        and one.suffix not in (".pyc", ".md")
        and "/." not in one.relative_to(root).as_posix()
    )


@dataclass
class Run:
    """What a notebook leaves behind: `tables/`, `figures/`, `values.json` and at last `manifest.json` in `folder`."""

    notebook: str
    parameters: dict[str, Any]
    folder: Path
    id: str
    profile: str = "default"
    began: float = field(default_factory=time.time)
    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    _tables: dict[str, str] = field(default_factory=dict)

    def head(self, found: str = "") -> results.Sentence:
        """How long this notebook takes and what was found: ends the first cell of a notebook.

        `found` : a sentence with names of reference results' values, see `results.said`.
        """
        return results.head(self.notebook, found)

    def table(self, data: pd.DataFrame, name: str) -> pd.DataFrame:
        """Write `tables/<name>.csv` and hand the table back."""
        text = _csv(data)
        self._write(f"tables/{name}.csv", text)
        self._tables[name] = _hash(text)
        return data

    @property
    def note(self) -> str:
        """What every figure of this run says below its panels; nothing in a profile that means what it shows."""
        return results.NOTES.get(self.profile, "")

    def figure(
        self,
        figure: Any,
        name: str,
        caption: str,
        data: pd.DataFrame | None = None,
        by: str | Callable[..., Any] | None = None,
        table: str | None = None,
    ) -> None:
        """Write `figures/<name>.png`, `.svg`, `.pdf` (fonts embedded) and `.json`, at the figure's size.

        The `.json` holds run, function, table, hash of the data and caption.  Equal figures give
        equal files: no dates, fixed identifiers.

        Parameters
        ----------
        figure : a figure, axes, or a seaborn grid.
        data : what it shows, when that is not the whole of `table`; its hash goes into the record.
        by : the function that drew it; default the figure's name.
        table : the name that `Run.table` wrote it under, or "<notebook>/<table>" of another run,
            with `data`; default the table that equals `data`.

        Raises
        ------
        MixDPOError : the table is not one of this run's, or `data` is not and `table` does not say
            what it was taken from.
        """
        import matplotlib

        table, data_hash = self._shown(name, data, table)
        figure = getattr(figure, "figure", figure)
        if self.note:
            from ..figures import watermark

            watermark(figure, self.note)
        undated = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
        style: Any = {
            "svg.hashsalt": "mixdpo",
            "pdf.fonttype": 42,
            "savefig.bbox": None,
        }
        with store.writing_to(self.folder), matplotlib.rc_context(style):
            (self.folder / "figures").mkdir(parents=True, exist_ok=True)
            for end, metadata in undated.items():
                figure.savefig(self.folder / f"figures/{name}.{end}", dpi=300, metadata=metadata)
        store.write_json_atomic(
            self.folder / f"figures/{name}.json",
            {
                "run": self.id,
                "notebook": self.notebook,
                "function": getattr(by, "__name__", by) or name,
                "caption": caption,
                "data_sha256": data_hash,
                "table": table,
                **({"note": self.note} if self.note else {}),
            },
        )

    def _shown(
        self, figure: str, data: pd.DataFrame | None, table: str | None
    ) -> tuple[str | None, str | None]:
        """Name of the table that a figure shows, and the hash of what it shows of it."""
        place, known = f"{self.notebook}: figure {figure}", list(self._tables)
        written = f"this run has written {', '.join(known) or 'no table'}"
        if table and table not in known and ("/" not in table or data is None):
            raise MixDPOError(
                f"{place}: table {table!r} is not there; {written}; name another run's "
                "as '<notebook>/<table>' and give its data" + nearest(table, known)
            )
        data_hash = _hash(_csv(data)) if data is not None else self._tables.get(table or "")
        if data is not None and table is None:
            table = next((one for one in known if self._tables[one] == data_hash), None)
            if table is None:
                raise MixDPOError(
                    f"{place}: its data is no table that was written whole; {written}; "
                    "say which by table='<name>'"
                )
        return table, data_hash

    def value(
        self,
        name: str,
        value: float,
        unit: str,
        interval: Sequence[float] | None = None,
        n: int | None = None,
        seeds: int | Sequence[int] | None = None,
    ) -> float:
        """Note a number that README or a text quotes, with its unit; it goes into `values.json`."""
        numbers = [float(value), *map(float, interval or ())]
        if not all(map(math.isfinite, numbers)) or (interval is not None and len(numbers) != 3):
            raise MixDPOError(
                f"{self.notebook}: value {name}: found {value}, interval {interval}; expected a finite "
                "number and [low, high]"
            )
        self.values[name] = {
            "value": numbers[0],
            "unit": unit,
            "interval": numbers[1:] or None,
            "n": n,
            "seeds": seeds,
            "runs": [self.id],
        }
        return numbers[0]

    def finish(self, stop_reasons: Any = None) -> Path:
        """Write `values.json` and `manifest.json`; the last cell of every notebook. Returns the manifest's path."""
        if self.values:
            store.write_json_atomic(self.folder / "values.json", self.values)
        outputs = {
            path.relative_to(self.folder).as_posix(): {
                "sha256": store.sha256_of(path),
                "bytes": path.stat().st_size,
            }
            for path in sorted(self.folder.rglob("*"))
            if path.is_file()
            and path.name != "manifest.json"
            and not path.name.startswith(".")
            and path.suffix not in (".ipynb", ".lock", ".log")
        }
        return store.write_json_atomic(
            self.folder / "manifest.json",
            {
                "run": self.id,
                "notebook": self.notebook,
                "profile": self.profile,
                "git": _git(),
                "command": os.environ.get("MIXDPO_COMMAND"),
                "parameters": self.parameters,
                "seeds": {
                    name: value
                    for name, value in self.parameters.items()
                    if name in ("seed", "seeds")
                },
                "inputs": store.touched_artefacts(),
                "library_sha256": library_hash(),
                "notebook_sha256": notebook_hash(self.notebook),
                "versions": _versions(),
                "machine": _machine(),
                "stop_reasons": stop_reasons,
                "seconds": round(time.time() - self.began, 1),
                "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
                "outputs": outputs,
                "ended": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            },
        )

    def _write(self, name: str, text: str) -> None:
        path = self.folder / name
        with store.writing_to(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")


def start_run(notebook: str, namespace: MutableMapping[str, Any]) -> Run:
    """Begin the record of a notebook: `run = start_run("04_mix_dpo", globals())`.

    Reads the parameters' names from the notebook's `parameters` cell and their values from
    `namespace`, checks them, and writes them back as they are resolved: `common` whole, and with
    `profile = "smoke"` (in JupyterLab, or by plain papermill) that profile's value of every
    parameter that was left as the cell has it; what another cell assigns, as papermill does for
    `-p`, is given, whatever it is. Under the runner all values are resolved already.
    The folder is the runner's, else `runs/interactive/<notebook>/<time>`.
    """
    known, values = notebook_parameters(notebook), {}
    for name, parameter in known.items():
        if name not in namespace:
            raise MixDPOError(
                f"{notebook}: parameter {name} has no value; run the parameters cell first"
            )
        values[name] = namespace[name]
        check_value(notebook, parameter, values[name])
    profile = os.environ.get("MIXDPO_PROFILE")  # of the runner, which has resolved everything
    assigned = _assigned(namespace.get("In", []))
    given = {
        name: value
        for name, value in values.items()
        if profile or name in assigned or value != known[name].default
    }
    profile = profile or values.get(PROFILE, "default")
    values = resolve_parameters(notebook, profile, given)
    namespace.update(values)
    key = store.artefact_key("run", 1, values, [notebook, library_hash(), notebook_hash(notebook)])
    folder = os.environ.get("MIXDPO_RUN_FOLDER") or (
        store.project_root() / "runs" / "interactive" / notebook / time.strftime("%Y%m%d-%H%M%S")
    )
    with store.writing_to(Path(folder)):
        Path(folder).mkdir(parents=True, exist_ok=True)
    if profile in results.NOTES:
        print(results.NOTES[profile])
    if (
        "MIXDPO_RUN_FOLDER" in os.environ
    ):  # a kernel of this one run: what is imported stays, and no fit looks through it for
        gc.freeze()  # garbage; where cells run twice, what the first run left would stay too
    return Run(notebook, values, Path(folder), f"{notebook}-{key[:10]}", profile)


def _assigned(cells: Sequence[str]) -> set[str]:
    """Names that executed cells assigned last by plain `name = ...`; the `parameters` cell has types.

    >>> sorted(_assigned(["n: int = 4", "# Parameters\\nn = 4\\nprofile = 'smoke'", "%time x = 1"]))
    ['n', 'profile']
    """
    names: set[str] = set()
    for cell in cells:
        try:
            body = ast.parse(cell).body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue  # a magic command, or a cell that failed
        for node in body:
            if isinstance(node, ast.Assign):
                names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names.discard(node.target.id)  # the parameters cell run again
    return names


def _csv(data: pd.DataFrame) -> str:
    return data.to_csv(index=False, lineterminator="\n")


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _machine() -> dict[str, Any]:
    machine: dict[str, Any] = {
        "system": platform.system(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "device": "cpu",
    }
    if torch := sys.modules.get("torch"):  # only where the notebook used it
        machine["threads"] = torch.get_num_threads()
        if torch.cuda.is_initialized():  # not where a GPU was there and idle
            machine["device"] = torch.cuda.get_device_name()
    return machine


def _git() -> dict[str, Any]:
    """The project's commit, and whether tracked files differ from it; None outside a checkout."""
    try:
        root = store.project_root()
    except MixDPOError:
        return {"commit": None, "dirty": None}

    def ask(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "--no-optional-locks", "-C", str(root), *arguments],
                capture_output=True,
                text=True,
                timeout=30,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    top = ask("rev-parse", "--show-toplevel")
    if not top or Path(top).resolve() != root.resolve():  # none, or that of something around it
        return {"commit": None, "dirty": None}
    changes = ask("status", "--porcelain", "--untracked-files=no")
    return {"commit": ask("rev-parse", "HEAD"), "dirty": None if changes is None else bool(changes)}
