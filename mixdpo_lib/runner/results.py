"""Reading what finished runs have left."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from .. import store
from ..store import MixDPOError
from .parameters import nearest
from .record import verify_output


def results_folder(where: str | Path, notebook: str) -> Path:
    """Folder of one notebook's results: `where` is a profile, "reference", or a folder that holds such folders."""
    root = store.project_root()
    if str(where) == "reference":
        return root / "figures" / "reference" / notebook
    return (Path(where) if os.sep in str(where) else root / "runs" / str(where)) / notebook


def load_table(where: str | Path, notebook: str, name: str) -> pd.DataFrame:
    """A table of a finished run, checked against its manifest: `load_table("default", "04_mix_dpo", "accuracy")`."""
    folder, file = results_folder(where, notebook), f"tables/{name}.csv"
    outputs = _outputs(folder, where, notebook)
    if file not in outputs:
        known = [Path(n).stem for n in outputs if n.startswith("tables/")]
        raise MixDPOError(f"{folder}: no table {name!r}; expected one of {', '.join(known)}" + nearest(name, known))
    verify_output(folder, file, outputs[file])
    return pd.read_csv(folder / file)


def load_values(where: str | Path, notebook: str | None = None) -> dict[str, dict[str, Any]]:
    """Quoted numbers of one finished run, or with `notebook=None` those of `figures/reference` together."""
    if notebook is None:
        path = results_folder(where, "values.json")
        return store.read_json(path) if path.exists() else {}
    folder = results_folder(where, notebook)
    return store.read_json(folder / "values.json") if "values.json" in _outputs(folder, where, notebook) else {}


def values_table(values: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """Quoted numbers as a table: name, value, low, high, unit, n, seeds (how many)."""
    rows = []
    for name, v in sorted(values.items()):
        low, high = v["interval"] or (None, None)
        count = len(v["seeds"]) if isinstance(v["seeds"], list) else v["seeds"]
        rows.append({"name": name, "value": v["value"], "low": low, "high": high, "unit": v["unit"], "n": v["n"],
                     "seeds": count})
    return pd.DataFrame(rows, columns=["name", "value", "low", "high", "unit", "n", "seeds"])


def _outputs(folder: Path, where: str | Path, notebook: str) -> dict[str, Any]:
    if not (folder / "manifest.json").exists():
        raise MixDPOError(f"{folder}: no finished run of {notebook}; make it by `mixdpo run {notebook} --profile "
                          f"{where}` or `make reproduce`")
    manifest = store.read_json(folder / "manifest.json")
    return {n: entry for n, entry in manifest["outputs"].items() if n not in manifest.get("left_out", ())}
