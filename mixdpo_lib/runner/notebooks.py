"""Which notebooks are there, whose results does each need, and what does it share with others?"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import store
from ..store import MixDPOError
from .plain_yaml import read_groups

GENERATED = ("theory", "beyond")  # folders of notebooks on generated data


@dataclass(frozen=True)
class Listed:
    """A line of workflow/notebooks.yaml: a notebook's study, what it needs and what it shares."""

    study: str
    needs: tuple[str, ...] = ()
    shares: tuple[str, ...] = ()


def notebook_path(name: str) -> Path:
    """Path of `notebooks/<name>.ipynb`; accepts the bare name, the file name or the path.

    Raises
    ------
    MixDPOError : no such notebook; the message lists those that there are.
    """
    folder = store.project_root() / "notebooks"
    short = name.removeprefix("notebooks/").removesuffix(".ipynb")
    bare = short.split("/")[-1] if short.split("/")[0] in GENERATED else short
    places = [folder / f"{short}.ipynb", *(folder / one / f"{bare}.ipynb" for one in GENERATED)]
    path = next((path for path in places if path.exists()), None)
    if path is None:
        generated = [f"{one}/{path.stem}" for one in GENERATED for path in _inside(folder / one)]
        known = notebook_names() + generated
        raise MixDPOError(
            f"notebook {name!r}: not found in {folder}; expected one of "
            + (", ".join(known) or "none yet")
            + (nearest(short, known) or _by_number(short, known))
        )
    return path


def _by_number(name: str, known: Sequence[str]) -> str:
    """The notebooks of a number.

    >>> _by_number("4", ["04_mix_dpo", "05_moe_dpo", "theory/4_who_answered"])
    '; did you mean 04_mix_dpo or theory/4_who_answered?'
    """
    digits = name.split("_")[0].lstrip("0")
    like = [one for one in known if one.split("/")[-1].split("_")[0].lstrip("0") == digits]
    return f"; did you mean {' or '.join(like)}?" if digits.isdigit() and like else ""


def notebook_names() -> list[str]:
    """Names of the notebooks that exist, in order."""
    return sorted(path.stem for path in (store.project_root() / "notebooks").glob("*.ipynb"))


def theory_names() -> list[str]:
    """Names of the notebooks on generated data: they need no reviews and no model, and nothing needs them."""
    folder = store.project_root() / "notebooks"
    return [path.stem for one in GENERATED for path in _inside(folder / one)]


def _inside(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.ipynb"))


def listed_notebooks() -> dict[str, Listed]:
    """The notebooks of `workflow/notebooks.yaml` that exist, in order of their names."""
    path = store.project_root() / "workflow" / "notebooks.yaml"
    found: dict[str, Listed] = {}
    for study, lines in read_groups(path).items():
        for name, line in lines.items():
            if not _is_line(line) or name in found:
                raise MixDPOError(
                    f"{path}: {name}: found {line!r}, expected a notebook once, with "
                    "{needs: [...], shares: [...]} or a part of it"
                )
            found[name] = Listed(study, tuple(line.get("needs", ())), tuple(line.get("shares", ())))
    return {name: found[name] for name in notebook_names() if name in found}


def every_notebook() -> dict[str, Listed]:
    """What `make reproduce-all` runs: those that are listed, and those on generated data, of the study "generated"."""
    return {**listed_notebooks(), **{name: Listed("generated") for name in theory_names()}}


def _is_line(line: Any) -> bool:
    return (
        isinstance(line, dict)
        and not set(line) - {"needs", "shares"}
        and all(isinstance(names, list) for names in line.values())
        and all(isinstance(name, str) for names in line.values() for name in names)
    )


def notebook_hash(name: str) -> str:
    """sha256 over the cells' source of a notebook, 64 hex digits."""
    cells = store.read_json(notebook_path(name)).get("cells", [])
    text = store.canonical_json([[cell["cell_type"], "".join(cell["source"])] for cell in cells])
    return hashlib.sha256(text.encode()).hexdigest()


def nearest(name: str, known: Sequence[str]) -> str:
    """`; did you mean ...?`, or nothing when no name is near."""
    near = difflib.get_close_matches(name, known, 1, 0.5)
    return f"; did you mean {near[0]}?" if near else ""
