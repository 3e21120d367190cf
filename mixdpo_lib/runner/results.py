"""What have finished runs left, is it whole, and how is it told?"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .. import store
from ..store import MixDPOError
from .notebooks import nearest, theory_names

if TYPE_CHECKING:  # half of the time of `mixdpo --help`
    import pandas as pd

# by profile: what figures and tables must say
NOTES = {"smoke": "smoke: too small to mean anything"}
_AGAIN = "run the notebook again"
_NONE = type(None)
_VALUE: store.Shape = {
    "value": float,
    "unit": str,
    "interval": (list, _NONE),
    "n": (int, _NONE),
    "seeds": (list, int, _NONE),
}


def results_folder(where: str | Path, notebook: str) -> Path:
    """Folder of a notebook's results; `where`: a profile, "reference", or a folder of such."""
    root = store.project_root()
    if str(where) == "reference":
        return root / "figures" / "reference" / notebook
    return (Path(where) if os.sep in str(where) else root / "runs" / str(where)) / notebook


class Finished(NamedTuple):
    """The finished runs of a profile, or the reference results: what a paper is made of, each file checked."""

    where: str

    @property
    def note(self) -> str:
        """What every figure and table of it must say; nothing of a profile that means what it shows."""
        return NOTES.get(Path(self.where).name, "")

    def has(self, notebook: str) -> bool:
        """Whether this notebook has a finished run."""
        return (results_folder(self.where, notebook) / "manifest.json").exists()

    def table(self, notebook: str, name: str) -> pd.DataFrame:
        """See `load_table`."""
        return load_table(self.where, notebook, name)

    def values(self, notebook: str) -> dict[str, dict[str, Any]]:
        """See `load_values`."""
        return load_values(self.where, notebook)

    def caption(self, notebook: str, figure: str) -> str:
        """What its record says of a figure, and of a profile that is too small to mean anything."""
        folder, file = results_folder(self.where, notebook), f"figures/{figure}.json"
        verify_output(folder, file, _outputs(folder, self.where, notebook)[file])
        record = store.read_json(folder / file)
        return (
            f"{record['caption']} ({record['note']})" if record.get("note") else record["caption"]
        )


def load_table(where: str | Path, notebook: str, name: str) -> pd.DataFrame:
    """A table of a finished run, checked against its manifest.

    For example `load_table("default", "04_mix_dpo", "accuracy")`.
    """
    folder, file = results_folder(where, notebook), f"tables/{name}.csv"
    outputs = _outputs(folder, where, notebook)
    if file not in outputs:
        known = [Path(n).stem for n in outputs if n.startswith("tables/")]
        raise MixDPOError(
            f"{folder}: no table {name!r}; expected one of {', '.join(known)}"
            + nearest(name, known)
        )
    import pandas as pd

    verify_output(folder, file, outputs[file])
    _note_use(where, notebook, folder / "manifest.json")
    return pd.read_csv(folder / file)


def _note_use(where: str | Path, what: str, record: Path) -> None:
    """These results are among what this process has used, by their record."""
    store.touch(f"results/{where}/{what}", store.sha256_of(record))


def load_values(where: str | Path, notebook: str | None = None) -> dict[str, dict[str, Any]]:
    """Quoted numbers of one finished run, checked against its manifest; with `notebook=None` of the whole reference.

    Raises
    ------
    MixDPOError : values.json is not the one that the manifest names, or of the wrong shape; of the whole reference:
        it says something else than the verified values of a notebook.
    """
    if notebook is not None:
        own = _own_values(where, notebook)
        _note_use(where, notebook, results_folder(where, notebook) / "manifest.json")
        return own
    if (path := results_folder(where, "values.json")).exists():
        _note_use(where, "values.json", path)
    return _every_value(where)


def _every_value(where: str | Path) -> dict[str, dict[str, Any]]:
    """Of the whole reference, checked against the values of its notebooks; nothing where there is none."""
    path = results_folder(where, "values.json")
    if not path.exists():
        return {}
    values = _values(path)
    for manifest in sorted(path.parent.glob("*/manifest.json")):
        for name, own in _own_values(where, manifest.parent.name).items():
            if values.get(name) != own:
                found = store.shown(values[name]["value"]) if name in values else "no such value"
                raise MixDPOError(
                    f"{path}: {name}: found {found}, expected {store.shown(own['value'])} with all that stands beside "
                    f"it, as {manifest.parent.name}/values.json has it; restore the file, or collect the results again"
                )
    return values


def _own_values(where: str | Path, notebook: str) -> dict[str, dict[str, Any]]:
    """Quoted numbers of one finished run, checked against its manifest."""
    folder = results_folder(where, notebook)
    outputs = _outputs(folder, where, notebook)
    if "values.json" not in outputs:
        if (folder / "values.json").exists():
            raise MixDPOError(
                f"{folder}: values.json: found a file that manifest.json does not list; {_AGAIN}"
            )
        return {}
    verify_output(folder, "values.json", outputs["values.json"])
    return _values(folder / "values.json")


def _values(path: Path) -> dict[str, dict[str, Any]]:
    values = store.read_json(path)
    if not isinstance(values, dict):
        raise MixDPOError(
            f"{path}: found {store.shown(values)}, expected an object with a value a key; {_AGAIN}"
        )
    for name, value in values.items():
        store.check_shape(f"{path}: {name}", value, _VALUE, _AGAIN, ("unit", "n", "seeds"))
    return values


def values_table(values: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """Quoted numbers as a table: name, value, low, high, unit, n, seeds (how many)."""
    import pandas as pd

    rows = []
    for name, v in sorted(values.items()):
        low, high = v["interval"] or (None, None)
        seeds = v.get("seeds")
        rows.append(
            {
                "name": name,
                "value": v["value"],
                "low": low,
                "high": high,
                "unit": v.get("unit"),
                "n": v.get("n"),
                "seeds": len(seeds) if isinstance(seeds, list) else seeds,
            }
        )
    return pd.DataFrame(rows, columns=["name", "value", "low", "high", "unit", "n", "seeds"])


def _outputs(folder: Path, where: str | Path, notebook: str) -> dict[str, Any]:
    if not (folder / "manifest.json").exists():
        raise MixDPOError(
            f"{folder}: no finished run of {notebook}; make it by `mixdpo run {notebook} --profile "
            f"{where}` or `make reproduce`"
        )
    manifest = read_manifest(folder / "manifest.json")
    return {
        n: entry
        for n, entry in manifest["outputs"].items()
        if n not in manifest.get("left_out", ())
    }


def read_manifest(path: Path) -> dict[str, Any]:
    """A manifest of the right shape.

    Raises
    ------
    MixDPOError : a missing or unreadable file, a key that is absent or of another type, no list of files.
    """
    shape: store.Shape = {
        "outputs": dict,
        "seconds": float,
        "seconds_by_profile": dict,
        "left_out": list,
    }
    manifest = store.check_shape(
        path, store.read_json(path), shape, _AGAIN, ("seconds_by_profile", "left_out")
    )
    store.check_file_list(f"{path}: outputs", manifest["outputs"], _AGAIN)
    for profile, seconds in manifest.get("seconds_by_profile", {}).items():
        store.check_shape(path, {profile: seconds}, {profile: float}, _AGAIN)
    return manifest


class Sentence(str):
    """A text that a notebook shows as a paragraph."""

    def _repr_markdown_(self) -> str:
        return str(self)


@dataclass(frozen=True)
class _Quoted:
    value: float
    interval: Sequence[float] | None

    def __format__(self, spec: str) -> str:
        ends = ", ".join(format(end, spec) for end in self.interval or ())
        return format(self.value, spec) + (f" [{ends}]" if ends else "")


def said(sentence: str, values: Mapping[str, Mapping[str, Any]]) -> Sentence:
    """A sentence with its numbers: names of quoted values in braces, with a format.

    An interval follows its number by itself.

    >>> values = {"gain": {"value": 0.048, "interval": [0.031, 0.067]},
    ...           "k": {"value": 3.0, "interval": None}}
    >>> said("{k:.0f} experts gain {gain:+.3f}.", values)
    '3 experts gain +0.048 [+0.031, +0.067].'

    Raises
    ------
    KeyError : a name that `values` does not have.
    """
    return Sentence(
        sentence.format_map(
            {name: _Quoted(v["value"], v["interval"]) for name, v in values.items()}
        )
    )


def durations(notebook: str) -> dict[str, float]:
    """Seconds that a notebook took for the reference results, by profile (none: not there)."""
    path = results_folder("reference", notebook) / "manifest.json"
    if not path.exists():
        return {}
    manifest = read_manifest(path)
    return manifest.get("seconds_by_profile") or {
        str(manifest.get("profile", "default")): manifest["seconds"]
    }


def head(notebook: str, found: str = "") -> Sentence:
    """How long a notebook takes in which profile, and what was found.

    `found` : a sentence, see `said`, that gets the numbers of the reference results.
    """
    times = ", ".join(
        f"{seconds / 60:.0f} min ({profile})"
        if seconds > 90
        else f"{max(seconds, 1):.0f} s ({profile})"
        for profile, seconds in durations(notebook).items()
    )
    needs = "" if notebook in theory_names() else ", where other notebooks have made what it needs"
    takes = f"{times}{needs}" if times else "not measured yet"
    if not found:
        return Sentence(f"**Takes** {takes}.")
    try:
        told = f"**Found** (reference results): {said(found, _every_value('reference'))}"
    except KeyError as name:
        told = f"**Found**: {name} is not among the reference results yet."
    return Sentence(f"**Takes** {takes}.\n\n{told}")


def verify_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a run, after the sha256 of every output was computed again and compared."""
    folder = Path(folder)
    path = folder / "manifest.json"
    if not path.exists():
        raise MixDPOError(
            f"{folder}: no manifest.json: the notebook did not reach its last cell, `run.finish()`"
        )
    manifest = read_manifest(path)
    for name, expected in manifest["outputs"].items():
        if name not in manifest.get("left_out", ()):
            verify_output(folder, name, expected)
    return manifest


def not_of_the_run(folder: Path) -> list[str]:
    """What lies in the folder of an earlier run that neither the run nor JupyterLab (its checkpoints) wrote.

    In a folder without a manifest that is everything.
    """
    own: set[Path] = set()
    if (folder / "manifest.json").exists():
        outputs = [Path(name) for name in read_manifest(folder / "manifest.json")["outputs"]]
        own = {Path("manifest.json"), Path("notebook.ipynb"), *outputs}
        own |= {place for name in outputs for place in name.parents}
    there = [p.relative_to(folder) for p in sorted(folder.rglob("*"))]
    return [p.as_posix() for p in there if p not in own and ".ipynb_checkpoints" not in p.parts]


def verify_output(folder: Path, name: str, expected: Mapping[str, Any]) -> None:
    """Refuse a file of a run that is absent or is not the one that its manifest names."""
    try:
        found = store.sha256_of(folder / name)
    except FileNotFoundError:
        found = "no such file"
    except OSError as error:  # a folder, no permission
        found = error.strerror or "no file"
    if found != expected["sha256"]:
        raise MixDPOError(
            f"{folder}: {name}: found {found[:40]}, expected sha256 {expected['sha256'][:16]} "
            "(manifest.json); the file was changed after the run: run the notebook again"
        )
