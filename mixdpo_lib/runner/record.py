"""What does a run leave, and what does it depend on?"""

from __future__ import annotations

import hashlib
import importlib.metadata
import math
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from .. import store
from ..store import MixDPOError
from .parameters import check_value, notebook_hash, notebook_parameters

_PACKAGES = ("torch", "transformers", "datasets", "safetensors", "scikit-learn", "harper-py", "numpy", "pandas",
             "matplotlib", "seaborn", "papermill")


def library_hash() -> str:
    """sha256 over the source of the library, 64 hex digits."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root).as_posix()} {store.sha256_of(path)}\n".encode())
    return digest.hexdigest()


@dataclass
class Run:
    """What a notebook leaves behind: `tables/`, `figures/`, `values.json` and at last `manifest.json` in `folder`."""

    notebook: str
    parameters: dict[str, Any]
    folder: Path
    id: str
    began: float = field(default_factory=time.time)
    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    _tables: dict[str, str] = field(default_factory=dict)

    def table(self, data: pd.DataFrame, name: str) -> pd.DataFrame:
        """Write `tables/<name>.csv` and hand the table back."""
        text = _csv(data)
        self._write(f"tables/{name}.csv", text)
        self._tables[_hash(text)] = name
        return data

    def figure(self, figure: Any, name: str, caption: str, data: pd.DataFrame | None = None,
               by: str | Callable[..., Any] | None = None) -> None:
        """Write `figures/<name>.png`, `.svg` and `.json` (run, function, hash of the data, caption).

        Equal figures give equal files: no dates, fixed SVG identifiers.

        Parameters
        ----------
        figure : a figure, axes, or a seaborn grid.
        data : the table that it shows; its hash, and its name when `table` wrote it, go into the sidecar.
        by : the function that drew it; default the figure's name.
        """
        import matplotlib

        figure = getattr(figure, "figure", figure)
        (self.folder / "figures").mkdir(parents=True, exist_ok=True)
        with matplotlib.rc_context({"svg.hashsalt": "mixdpo"}):
            figure.savefig(self.folder / f"figures/{name}.png", dpi=150, bbox_inches="tight",
                           metadata={"Software": None})
            figure.savefig(self.folder / f"figures/{name}.svg", bbox_inches="tight", metadata={"Date": None})
        data_hash = None if data is None else _hash(_csv(data))
        store.write_json_atomic(self.folder / f"figures/{name}.json", {
            "run": self.id, "notebook": self.notebook, "function": getattr(by, "__name__", by) or name,
            "caption": caption, "data_sha256": data_hash, "table": self._tables.get(data_hash or "")})

    def value(self, name: str, value: float, unit: str, interval: Sequence[float] | None = None,
              n: int | None = None, seeds: int | Sequence[int] | None = None) -> float:
        """Note a number that README or a text quotes, with its unit; it goes into `values.json`."""
        numbers = [float(value), *map(float, interval or ())]
        if not all(map(math.isfinite, numbers)) or (interval is not None and len(numbers) != 3):
            raise MixDPOError(f"{self.notebook}: value {name}: found {value}, interval {interval}; expected a finite "
                              "number and [low, high]")
        self.values[name] = {"value": numbers[0], "unit": unit, "interval": numbers[1:] or None, "n": n,
                             "seeds": seeds, "runs": [self.id]}
        return numbers[0]

    def finish(self, stop_reasons: Any = None) -> Path:
        """Write `values.json` and `manifest.json`; the last cell of every notebook. Returns the manifest's path."""
        if self.values:
            store.write_json_atomic(self.folder / "values.json", self.values)
        outputs = {path.relative_to(self.folder).as_posix(): {"sha256": store.sha256_of(path),
                                                              "bytes": path.stat().st_size}
                   for path in sorted(self.folder.rglob("*"))
                   if path.is_file() and path.name != "manifest.json" and not path.name.startswith(".")
                   and path.suffix not in (".ipynb", ".lock", ".log")}
        return store.write_json_atomic(self.folder / "manifest.json", {
            "run": self.id, "notebook": self.notebook, "parameters": self.parameters,
            "seeds": {name: value for name, value in self.parameters.items() if name in ("seed", "seeds")},
            "inputs": store.touched_artefacts(), "library_sha256": library_hash(),
            "notebook_sha256": notebook_hash(self.notebook), "versions": _versions(), "machine": _machine(),
            "stop_reasons": stop_reasons, "seconds": round(time.time() - self.began, 1),
            "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024), "outputs": outputs,
            "ended": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())})

    def _write(self, name: str, text: str) -> None:
        path = self.folder / name
        with store.writing_to(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")


def start_run(notebook: str, namespace: Mapping[str, Any]) -> Run:
    """Begin the record of a notebook: `run = start_run("04_mix_dpo", globals())` in the cell after the parameters.

    Reads the parameters' names from the notebook's `parameters` cell and their values from `namespace`, and checks
    their types. The folder is the runner's, or `runs/interactive/<notebook>/<time>` in JupyterLab and plain papermill.
    """
    known, values = notebook_parameters(notebook), {}
    for name, parameter in known.items():
        if name not in namespace:
            raise MixDPOError(f"{notebook}: parameter {name} has no value; run the parameters cell first")
        values[name] = namespace[name]
        check_value(notebook, parameter, values[name])
    key = store.artefact_key("run", 1, values, [notebook, library_hash(), notebook_hash(notebook)])
    folder = os.environ.get("MIXDPO_RUN_FOLDER") or (
        store.project_root() / "runs" / "interactive" / notebook / time.strftime("%Y%m%d-%H%M%S"))
    Path(folder).mkdir(parents=True, exist_ok=True)
    return Run(notebook, values, Path(folder), f"{notebook}-{key[:10]}")


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
    machine: dict[str, Any] = {"system": platform.system(), "processor": platform.machine(), "cores": os.cpu_count()}
    if torch := sys.modules.get("torch"):       # only where the notebook used it
        cuda = torch.cuda.is_available()
        machine |= {"device": torch.cuda.get_device_name() if cuda else "cpu", "threads": torch.get_num_threads()}
    return machine


def verify_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a run, after the sha256 of every output was computed again and compared."""
    folder = Path(folder)
    path = folder / "manifest.json"
    if not path.exists():
        raise MixDPOError(f"{folder}: no manifest.json: the notebook did not reach its last cell, `run.finish()`")
    manifest = store.read_json(path)
    for name, expected in manifest["outputs"].items():
        if name not in manifest.get("left_out", ()):
            verify_output(folder, name, expected)
    return manifest


def verify_output(folder: Path, name: str, expected: Mapping[str, Any]) -> None:
    found = store.sha256_of(folder / name) if (folder / name).exists() else "no such file"
    if found != expected["sha256"]:
        raise MixDPOError(f"{folder}: {name}: found {found[:16]}, expected sha256 {expected['sha256'][:16]} "
                          "(manifest.json); the file was changed after the run: run the notebook again")
