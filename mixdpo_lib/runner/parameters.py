"""What may be chosen of a notebook?"""

from __future__ import annotations

import ast
import difflib
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .. import store
from ..store import MixDPOError


@dataclass(frozen=True)
class Parameter:
    """One line of a notebook's `parameters` cell: `name: type = literal  # help`."""

    name: str
    type: str
    default: Any
    help: str


def notebook_path(name: str) -> Path:
    """Path of `notebooks/<name>.ipynb`; accepts the bare name, the file name or the path.

    Raises
    ------
    MixDPOError : no such notebook; the message lists those that there are.
    """
    folder = store.project_root() / "notebooks"
    short = name.removeprefix("notebooks/").removesuffix(".ipynb")
    path = folder / f"{short}.ipynb"
    if not path.exists():
        path = folder / "theory" / f"{short.removeprefix('theory/')}.ipynb"
    if not path.exists():
        known = notebook_names() + theory_names()
        raise MixDPOError(f"notebook {name!r}: not found in {folder}; expected one of {', '.join(known) or 'none yet'}"
                          + nearest(short, known))
    return path


def notebook_names() -> list[str]:
    """Names of the notebooks that exist, in order."""
    return sorted(path.stem for path in (store.project_root() / "notebooks").glob("*.ipynb"))


def theory_names() -> list[str]:
    """Names of the theory notebooks: they need no reviews and no model, and no other result needs them."""
    return sorted(path.stem for path in (store.project_root() / "notebooks" / "theory").glob("*.ipynb"))


def notebook_parameters(name: str) -> dict[str, Parameter]:
    """The parameters of a notebook, read from its source without a kernel."""
    path = notebook_path(name)
    cells = [cell for cell in store.read_json(path).get("cells", [])
             if "parameters" in cell.get("metadata", {}).get("tags", [])]
    if len(cells) != 1:
        raise MixDPOError(f"{path}: found {len(cells)} cells tagged `parameters`, expected 1")
    source = "".join(cells[0]["source"])
    lines, parameters = source.splitlines(), {}
    for node in ast.parse(source).body:
        line = lines[node.lineno - 1]
        try:
            if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None):
                raise ValueError
            help_text = lines[(node.end_lineno or node.lineno) - 1][node.end_col_offset:].strip().lstrip("# ")
            parameters[node.target.id] = Parameter(node.target.id, ast.unparse(node.annotation),
                                                   ast.literal_eval(node.value), help_text)
        except ValueError:
            raise MixDPOError(f"{path}: parameters cell: found {line.strip()!r}, expected lines of the form "
                              "`name: type = literal  # help`") from None
    for parameter in parameters.values():
        check_value(name, parameter, parameter.default)
    return parameters


def _fits(value: Any, kind: ast.expr) -> bool:
    if isinstance(kind, ast.BinOp):
        return _fits(value, kind.left) or _fits(value, kind.right)
    if isinstance(kind, ast.Constant):
        return value is None
    if isinstance(kind, ast.Subscript):
        outer = ast.unparse(kind.value)
        inner = kind.slice.elts if isinstance(kind.slice, ast.Tuple) else [kind.slice]
        if outer in ("list", "tuple"):
            return isinstance(value, (list, tuple)) and all(_fits(one, inner[0]) for one in value)
        return isinstance(value, dict) and all(_fits(k, inner[0]) and _fits(v, inner[-1]) for k, v in value.items())
    name = ast.unparse(kind)
    if name == "float":
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if name == "int":
        return isinstance(value, int) and not isinstance(value, bool)
    types = {"str": str, "bool": bool, "list": list, "dict": dict, "None": type(None)}
    if name not in types:
        raise MixDPOError(f"found the parameter type {name!r}; expected {', '.join(['int', 'float', *types])}, "
                          "list[...], dict[..., ...] or a union by |")
    return isinstance(value, types[name])


def check_value(notebook: str, parameter: Parameter, value: Any) -> None:
    if not _fits(value, ast.parse(parameter.type, mode="eval").body):
        number = isinstance(value, str) and "float" in parameter.type
        remedy = "write the exponent as in 1.0e-3" if number else f"the default is {parameter.default!r}"
        raise MixDPOError(f"{notebook}: parameter {parameter.name}: found {value!r} ({type(value).__name__}), "
                          f"expected {parameter.type}; {remedy}")


def nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, 1, 0.5)
    return f"; did you mean {near[0]}?" if near else ""


def parse_overrides(pairs: Sequence[str]) -> dict[str, Any]:
    """`["n_experts=4", "seeds=[0, 1]"]` as values (JSON or YAML literals).

    >>> parse_overrides(["n_experts=4", "rate=1e-3", "designs=[clean]", "unit=user"])
    {'n_experts': 4, 'rate': 0.001, 'designs': ['clean'], 'unit': 'user'}
    """
    values = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name.strip():
            raise MixDPOError(f"-p {pair}: found no name=value; write for example -p n_experts=4")
        try:
            values[name.strip()] = json.loads(text)
        except ValueError:
            try:
                values[name.strip()] = yaml.safe_load(text)
            except yaml.YAMLError:
                raise MixDPOError(f"-p {pair}: found {text!r}, expected a number, text, true/false, null or "
                                  "[a, list]") from None
    return values


def profile_values(profile: str, notebook: str) -> dict[str, Any]:
    """What `notebooks/profiles/<profile>.yaml` says for one notebook (nothing: the notebook's own defaults)."""
    folder = store.project_root() / "notebooks" / "profiles"
    path = folder / f"{profile}.yaml"
    if not path.exists():
        known = sorted(p.stem for p in folder.glob("*.yaml"))
        raise MixDPOError(f"profile {profile!r}: {path} not found; expected one of {', '.join(known) or 'none yet'}"
                          + nearest(profile, known))
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        return dict(content.get(notebook) or {})
    except (yaml.YAMLError, AttributeError, TypeError, ValueError) as error:
        raise MixDPOError(f"{path}: found no mapping of notebooks to parameters ({error})") from None


def resolve_parameters(notebook: str, profile: str = "default",
                       overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Every parameter of a notebook: its default, unless the profile says otherwise, unless `overrides` does.

    Raises
    ------
    MixDPOError : an unknown name (valid ones and the nearest are listed) or a wrong type (name, found, expected).
    """
    known = notebook_parameters(notebook)
    values = {name: parameter.default for name, parameter in known.items()}
    for place, given in ((f"profile {profile}", profile_values(profile, notebook)), ("-p", overrides or {})):
        for name, value in given.items():
            if name not in known:
                raise MixDPOError(f"{notebook}: {place}: unknown parameter {name!r}; expected one of "
                                  f"{', '.join(known)}" + nearest(name, list(known)))
            check_value(notebook, known[name], value)
            values[name] = value
    return values


def notebook_hash(name: str) -> str:
    """sha256 over the cells' source of a notebook, 64 hex digits."""
    cells = store.read_json(notebook_path(name)).get("cells", [])
    text = store.canonical_json([[cell["cell_type"], "".join(cell["source"])] for cell in cells])
    return hashlib.sha256(text.encode()).hexdigest()
