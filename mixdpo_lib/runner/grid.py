"""How are many fits made side by side, and may what they left stand in one figure?

A piece of the grid is one method and one seed: an ordinary run of a notebook with these parameters, whose fits and texts
stay in the cache. When all pieces are there the notebook runs whole and finds everything.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import store
from ..store import MixDPOError
from .parameters import COMMON, resolve_parameters
from .reproduce import is_dry, run_target
from .results import verify_manifest

GRID = "12_baselines"
COMPARED = ("dpo", "mix_dpo")  # in every piece: all others are compared with them
_VARIED = ("methods", "front_methods", "seeds")
_AGAIN = "make both by the same code on the same data: start the grid again"


def grid_pieces(profile: str) -> dict[str, dict[str, Any]]:
    """The pieces of a profile's grid, by name ("soup-0"): what they have otherwise than the notebook."""
    values = resolve_parameters(GRID, profile)
    pieces = {}
    for seed in values["seeds"]:
        for method in dict.fromkeys(values["methods"]):
            if method == COMPARED[0]:
                continue
            front = [one for one in (COMPARED[0], method) if one in values["front_methods"]]
            own = {
                "methods": list(dict.fromkeys((*COMPARED, method))),
                "front_methods": front or [COMPARED[0]],
            }
            pieces[f"{method}-{seed}"] = {**own, "seeds": [seed]}
    return pieces


def piece_command(profile: str, name: str, overrides: Mapping[str, Any]) -> str:
    """What makes a piece: words for a shell, after the interpreter."""
    chosen = [
        word for key, value in overrides.items() for word in ("-p", f"{key}={_compact(value)}")
    ]
    words = ["-m", "mixdpo_lib.cli", "run", GRID, "--profile", profile, *chosen]
    return shlex.join([*words, "--output", f"runs/{profile}/grid/{name}"])


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def run_grid(profile: str = "default", cores: int = 2, extra: Sequence[str] = ()) -> None:
    """Make the pieces that are not up to date, side by side within cores and memory, and then the notebook.

    A piece that fails stops no other. Started again, what is done is left alone, and a fit that was cut off goes on from
    its checkpoint.

    Parameters
    ----------
    extra : of Snakemake, for example ``--profile workflow/profiles/slurm``, or ``-n``: what would run.

    Raises
    ------
    MixDPOError : pieces that failed, each with its last line and its log; pieces of different code or data.
    RunInterrupted : a signal.
    """
    root = store.project_root()
    folder, names = root / "runs" / profile / "grid", list(grid_pieces(profile))
    here = not {"--profile", "--executor", "-e"} & {word.split("=")[0] for word in extra}
    memory = ["--resources", f"mem_mb={_memory_mb()}"] if here else []
    code = run_target("grid", profile, cores, [*memory, "--keep-going", *extra])
    if is_dry(extra) and not code:
        return
    if code:
        failed = {name: last for name in names if (last := _left(folder / f"{name}.log"))}
        told = "; ".join(f"{n}: {last} ({folder / n}.log)" for n, last in failed.items())
        raise MixDPOError(
            f"profile {profile}: {len(failed)} of {len(names)} pieces of the grid were not made: {told}; the others are "
            "kept, start again to go on"
            if failed
            else f"profile {profile}: a job of the grid was ended from outside, though its log in {folder} ends well; all "
            "that is done is kept, start again to go on"
        )
    made = [folder / name for name in names]
    check_one_making(made)
    whole = root / "runs" / profile / GRID
    if run_target(str(whole.relative_to(root) / "manifest.json"), profile, cores, extra):
        raise MixDPOError(
            f"profile {profile}: the pieces are made, {GRID} is not: see the line above"
        )
    check_one_making([whole, *made])
    store.note(f"profile {profile}: {len(names)} pieces in {folder}, all of them in {whole}")


def check_one_making(folders: Sequence[Path]) -> None:
    """Refuse results that must not stand in one figure: of different code, shared choices or data.

    Raises
    ------
    MixDPOError : the two folders, what differs, and what to do.
    """
    seen: dict[str, tuple[Path, Any]] = {}
    for folder in folders:
        manifest = verify_manifest(folder)
        own = {key: value for key, value in manifest["parameters"].items() if key not in _VARIED}
        shared = own.pop(COMMON, {})
        facts = {
            "code (library_sha256)": manifest["library_sha256"],
            "code (notebook_sha256)": manifest["notebook_sha256"],
            **{f"parameter {name}": value for name, value in own.items()},
            **{f"parameter {COMMON}.{name}": value for name, value in shared.items()},
            **{f"data ({name})": sha256 for name, sha256 in manifest["inputs"].items()},
        }
        for what, value in facts.items():
            other, first = seen.setdefault(what, (folder, value))
            if first != value:
                found = f"{store.shown(first)} and {store.shown(value)}"
                raise MixDPOError(
                    f"{other} and {folder}: different {what}: found {found}; {_AGAIN}"
                )


def _left(log: Path) -> str:
    """The last line of a piece that did not end well; nothing of one that did."""
    if not log.exists():
        return "not started"
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    last = next((line for line in reversed(lines) if line.strip()), "killed before its first line")
    return "" if ": finished in" in last else last.strip()


def _memory_mb() -> int:
    """Nine tenths of this machine's memory, MB."""
    return int(0.9 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e6)
