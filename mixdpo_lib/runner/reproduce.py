"""All notebooks of a profile, and the reference set."""

from __future__ import annotations

import base64
import json
import os
import re
import resource
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from .. import store
from ..store import MixDPOError
from . import ending
from .evidence import RunInterrupted, replace_folder
from .notebooks import every_notebook, theory_names
from .parameters import profile_names, profile_values, resolve_parameters
from .results import NOTES, durations, load_values, verify_manifest

ROUNDED = 2.0  # seconds by which a manifest may be written after the time that it names
_LARGE = 1_000_000  # bytes; a larger table stays out of figures/reference
_ENTRY = re.compile(
    r"\.?[0-9a-f]{16}(\..*)?"
)  # of the cache: its folder, its lock, what was not finished


def reproduce(
    profile: str = "default", cores: int = 2, extra: Sequence[str] = (), everything: bool = False
) -> None:
    """The main study of a profile, in the order of its needs; what is up to date is left alone.

    The main study is Snakemake's target `main`; with `everything` it is `all`, with ablations,
    further studies, and the notebooks on generated data. When notebooks ran,
    `runs/<profile>/timing.json` says how long it took (from MIXDPO_STARTED, seconds since 1970, if
    that is set: `make` counts the environment in) and the peak memory of the largest process.

    Raises
    ------
    MixDPOError : a profile or a place that is refused before anything starts; a notebook that failed.
    RunInterrupted : a signal; everything that was started has ended, and what is done is kept.
    """
    root = store.project_root()
    profile_values(profile, "")
    names = [name for name, line in every_notebook().items() if everything or line.study == "main"]
    if not names:
        raise MixDPOError(f"{root / 'notebooks'}: found no notebooks of workflow/notebooks.yaml")
    for name in names:
        resolve_parameters(name, profile)  # every error in the profile before anything starts
    began = float(os.environ.get("MIXDPO_STARTED") or time.time())
    manifests = {name: root / "runs" / profile / name / "manifest.json" for name in names}

    def times() -> dict[str, int]:
        return {name: path.stat().st_mtime_ns for name, path in manifests.items() if path.exists()}

    as_recorded(root / "runs" / profile)
    before = times()
    if not is_dry(extra):
        store.note(_plan(profile, len(names), everything))
    code = run_target("all" if everything else "main", profile, cores, extra)
    if code:
        raise MixDPOError(
            f"profile {profile}: not finished (see the line above; what Snakemake says: mixdpo "
            f"reproduce --profile {profile} -- --quiet host); what is done is kept, start again to "
            "go on from it"
        )
    if is_dry(extra):  # Snakemake has said what it would do
        return
    after = times()
    ran = [name for name in names if after.get(name) != before.get(name)]
    if not ran:
        store.note(f"profile {profile}: everything is up to date in {root / 'runs' / profile}")
        return
    path = root / "runs" / profile / ("timing_everything.json" if everything else "timing.json")
    timing = {
        "minutes": round((time.time() - began) / 60, 2),
        "complete": ran == names,
        "peak_mb": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024),
        "notebooks": {name: store.read_json(manifests[name])["seconds"] for name in ran},
    }
    if timing["complete"] or not path.exists() or not store.read_json(path)["complete"]:
        store.write_json_atomic(path, timing)
    whole = ", the environment included" if os.environ.get("MIXDPO_STARTED") else ""
    store.note(
        f"profile {profile}: {len(ran)} of {len(names)} notebooks in {timing['minutes']:.1f} minutes{whole}, results in "
        f"{path.parent}"
    )


def _plan(profile: str, n_notebooks: int, everything: bool) -> str:
    """What is going to happen, for how long: by the complete runs of the reference results, where there was one.

    >>> _plan("none", 3, False)
    'profile none: 3 notebooks, what is up to date is left alone; results in runs/none'
    """
    try:
        values = load_values("reference")
    except MixDPOError:  # who needs them says what is wrong with them
        values = {}
    asked = [f"minutes_{profile}", *(["minutes_further"] if everything else [])]
    minutes = [values[name]["value"] for name in asked if name in values]
    whole = len(minutes) == len(asked) and (profile == "default" or not everything)
    about = (
        f", about {sum(minutes):.0f} minutes on 2 cores where nothing is done yet" if whole else ""
    )
    note = f"; {NOTES[profile]}" if profile in NOTES else ""
    meant = ', so fits that say "almost nothing was learned" are as they should be' if note else ""
    return (
        f"profile {profile}: {n_notebooks} notebooks{about}, what is up to date is left alone; results in "
        f"runs/{profile}{note}{meant}"
    )


def run_target(target: str, profile: str, cores: int, extra: Sequence[str]) -> int:
    """Status of Snakemake after it has made a target of the workflow, with everything it started at its end.

    `extra` : further words of its command line; with -n it says what would run.

    Raises
    ------
    MixDPOError, RunInterrupted : see `reproduce`.
    """
    root = store.project_root()
    command = [
        sys.executable,
        "-m",
        "snakemake",
        target,
        "-s",
        str(root / "workflow" / "Snakefile"),
        "--directory",
        str(root),
        "--config",
        f"profile={profile}",
        "--cores",
        str(cores),
        "--rerun-incomplete",
        "--nolock",
        "--scheduler",
        "greedy",  # the other one calls a solver in a folder that may have any name
        "--shared-fs-usage",  # all but `source-cache`, which lies in the home folder: there may be none
        "persistence",
        "input-output",
        "software-deployment",
        "sources",
        "storage-local-copies",
        "--quiet",
        "host" if is_dry(extra) else "all",
        *extra,
    ]
    with store.locked(root / "runs" / ".reproduce.lock", "make reproduce"):
        with store.writing_to(root / ".snakemake"):
            (root / ".snakemake").mkdir(exist_ok=True)
        as_recorded(root / "runs" / profile)
        try:
            return ending.run_to_end(command, root)
        except ending.Interrupted:
            raise RunInterrupted(
                f"profile {profile}: interrupted; nothing runs any more, what is done is kept, evidence of "
                f"what was not is in {root / 'runs' / 'failed'}; start again to go on"
            ) from None
        finally:
            as_recorded(root / "runs" / profile)


def as_recorded(folder: Path) -> None:
    """Give every manifest of a profile the time at which its run ended.

    Snakemake puts back the earlier manifest of a job that failed, as a copy that is newer than what has changed since, and
    writes down that it was made of that: the next start would take the old result for the new one. So the copy gets its
    time back, and what was written down goes.
    """
    known = store.project_root() / ".snakemake" / "metadata"
    for path in (*folder.glob("*/manifest.json"), *folder.glob("grid/*/manifest.json")):
        # a damaged one is named by who reads it
        with suppress(OSError, ValueError, KeyError, TypeError):
            ended = datetime.fromisoformat(json.loads(path.read_text("utf-8"))["ended"]).timestamp()
            if path.stat().st_mtime > ended + ROUNDED:
                name = path.relative_to(store.project_root()).as_posix().encode()
                (known / base64.b64encode(name).decode()).unlink(missing_ok=True)
                os.utime(path, (ended, ended))


def is_dry(extra: Sequence[str]) -> bool:
    """Whether these words ask Snakemake what would run, and for nothing else; short flags may stand together.

    >>> is_dry(["-np"]), is_dry(["--dry-run"]), is_dry(["--quiet", "host"])
    (True, True, False)
    """
    return any(re.fullmatch(r"-[a-zA-Z]*n[a-zA-Z]*|--dry-?run", word) for word in extra)


Rewrite = Callable[[str, Mapping[str, Any]], str]  # a page and the reference's values


def update_reference(profile: str, pages: Mapping[str, Rewrite]) -> Path:
    """Copy figures, tables, values and manifests of a finished profile to `figures/reference`.

    Values are merged. A notebook without a finished run keeps its earlier record, whose manifest
    names the library it was made with; so do times that were not measured anew. Theory notebooks
    are there once they have been run. Files over 1 MB stay out and are named in the copied manifest
    as `left_out`; `seconds_by_profile` there has the times of the runs of all profiles: of a complete
    run where there is one, since others find their fits in the cache. Minutes
    come from `timing.json` of the default and the smoke profile. Each of `pages` (its path in the
    project) becomes what its function makes of it and the values.
    """
    root = store.project_root()
    with store.writing_to(root / "figures"):
        return _update(profile, pages, root)


def _update(profile: str, pages: Mapping[str, Rewrite], root: Path) -> Path:
    target = root / "figures" / "reference"
    fresh = target.with_name(f".reference.part-{os.getpid()}")
    try:
        values = _gathered(profile, root, target, fresh)
        replace_folder(fresh, target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    for name, rewrite in pages.items():
        page = root / name
        if page.exists():
            text = rewrite(page.read_text(encoding="utf-8"), values)
            part = page.with_name(f".{page.name}.part-{os.getpid()}")
            with store.writing_to(page.parent):
                try:
                    part.write_text(text, encoding="utf-8")
                    os.replace(part, page)
                finally:
                    part.unlink(missing_ok=True)
    return target


def _from_nothing(root: Path, name: str) -> dict[str, float]:
    """Seconds of a notebook by profile, of runs of all notebooks: what it needs was there, and nothing of its own."""
    found: dict[str, float] = {}
    for profile in profile_names():
        for file in ("timing.json", "timing_everything.json"):
            path = root / "runs" / profile / file
            timing: dict[str, Any] = store.read_json(path) if path.exists() else {}
            if timing.get("complete") and name in timing["notebooks"]:
                found[profile] = timing["notebooks"][name]
    return found


def _gathered(profile: str, root: Path, target: Path, fresh: Path) -> dict[str, Any]:
    """What the reference set shall be, in `fresh`; its values are returned."""
    known = store.read_json(target / "values.json") if (target / "values.json").exists() else {}
    values: dict[str, Any] = {
        name: value for name, value in known.items() if name.startswith(("minutes_", "peak_gb_"))
    }
    for name in every_notebook():
        source, copy = root / "runs" / profile / name, fresh / name
        again = (source / "manifest.json").exists()
        if again:
            manifest = verify_manifest(source)
            kept = ("tables", "figures", "values.json")
            manifest["left_out"] = [
                n
                for n, e in manifest["outputs"].items()
                if e["bytes"] > _LARGE or n.split("/")[0] not in kept
            ]
            runs = {one: root / "runs" / one / name / "manifest.json" for one in profile_names()}
            alone = {p: store.read_json(m)["seconds"] for p, m in runs.items() if m.exists()}
            manifest["seconds_by_profile"] = alone | durations(name) | _from_nothing(root, name)
            for file in set(manifest["outputs"]) - set(manifest["left_out"]):
                (copy / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source / file, copy / file)
            store.write_json_atomic(copy / "manifest.json", manifest)
        elif (target / name / "manifest.json").exists():
            verify_manifest(target / name)
            shutil.copytree(target / name, copy)
        elif name in theory_names():
            continue
        else:
            raise MixDPOError(
                f"profile {profile}: no finished run of {name}; run `make reproduce-all "
                f"PROFILE={profile}` first"
            )
        for key, value in load_values(profile if again else "reference", name).items():
            if key in values:
                raise MixDPOError(
                    f"{name}: value {key} is there twice: also in {values[key]['runs'][0]}; rename "
                    "one"
                )
            values[key] = value
    for one in ("default", "smoke"):
        timing = root / "runs" / one / "timing.json"
        if timing.exists():
            found = store.read_json(timing)
            if not found["complete"]:
                raise MixDPOError(
                    f"{timing}: the run was not in one piece; remove runs/{one} and make it again"
                )
            values[f"minutes_{one}"] = {
                "value": found["minutes"],
                "unit": "min",
                "interval": None,
                "n": 1,
                "seeds": None,
                "runs": [f"make reproduce PROFILE={one}"],
            }
            values[f"peak_gb_{one}"] = {
                "value": round(found["peak_mb"] / 1024, 2),
                "unit": "GiB",
                "interval": None,
                "n": 1,
                "seeds": None,
                "runs": [f"make reproduce PROFILE={one}"],
            }
    everything = root / "runs" / "default" / "timing_everything.json"
    if everything.exists():
        found = store.read_json(everything)
        main = sum(
            seconds
            for name, seconds in found["notebooks"].items()
            if name in every_notebook() and every_notebook()[name].study == "main"
        )
        whole = found["complete"] and "minutes_default" in values  # the environment is in both
        alone = values["minutes_default"]["value"] if whole else main / 60
        values["minutes_further"] = {
            "value": round(found["minutes"] - alone, 2),
            "unit": "min",
            "interval": None,
            "n": 1,
            "seeds": None,
            "runs": [
                f"make reproduce-all beyond make reproduce, of {', '.join(found['notebooks'])}"
            ],
        }
    store.write_json_atomic(fresh / "values.json", values)
    return values


def clean(everything: bool = False) -> list[Path]:
    """Remove results and computed files; with `everything` also what was downloaded.

    The project's own folders (`runs`, `data/cache`, `data/raw`) go whole. Of a cache that
    MIXDPO_CACHE names, wherever it lies, only what was computed goes: other things may lie there.
    Of a folder that is a link the content goes, the link stays.

    Raises
    ------
    MixDPOError : a place that cannot be emptied, or is none.
    """
    root = store.project_root()
    whole = [root / "runs", root / ".snakemake", root / "data" / "cache", root / "data" / "raw"]
    gone = []
    for path in (
        root / "runs",
        root / ".snakemake",
        store.cache_folder(),
        *([store.raw_folder()] if everything else []),
    ):
        with store.writing_to(path):
            if not path.exists():
                continue
            if not path.is_dir():
                raise MixDPOError(f"{path}: found a file, expected a folder; look what it is")
            if path not in whole:
                own = [entry for part in path.iterdir() for entry in _computed(part)]
            else:
                own = list(path.iterdir()) if path.is_symlink() else [path]
            for part in own:
                if part.is_dir() and not part.is_symlink():
                    shutil.rmtree(part)
                else:
                    part.unlink()
            if path not in whole:
                for folder in {part.parent for part in own} - {path}:
                    if not any(folder.iterdir()):
                        folder.rmdir()
            gone.append(path)
    return gone


def _computed(folder: Path) -> list[Path]:
    """What this library keeps in a folder of a cache: its entries, or all that another library put there for it."""
    if not folder.is_dir() or folder.is_symlink():
        return []
    if (folder / store.OF_OTHERS).is_file():
        return [folder]
    entries = [one for one in folder.iterdir() if _ENTRY.fullmatch(one.name)]
    ours = folder.name == "checkpoints" or any((one / "artefact.json").is_file() for one in entries)
    return entries if ours else []
