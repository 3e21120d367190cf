"""What may be chosen of a notebook?

A notebook's own parameters stand in its `parameters` cell, with the values of the default profile.
What several notebooks share stands once, in `notebooks/profiles/common.yaml`, likewise. The file
`notebooks/profiles/<profile>.yaml` says what differs in a profile: for all notebooks under
`common`, for one under its name.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import FiniteFloat, TypeAdapter, ValidationError

from .. import store
from ..store import MixDPOError
from .notebooks import listed_notebooks, nearest, notebook_path
from .plain_yaml import read_groups, read_text, read_yaml

COMMON, PROFILE = "common", "profile"  # of notebooks that share values, or that a profile changes
_TYPES = {"int": int, "float": FiniteFloat, "str": str, "bool": bool, "list": list, "dict": dict}


@dataclass(frozen=True)
class Parameter:
    """A line of a `parameters` cell, `name: type = literal  # help`, or of common.yaml."""

    name: str
    type: str
    default: Any
    help: str


def _tagged(book: Any, path: Path) -> list[str]:
    """Sources of the cells tagged `parameters` of what a notebook's file holds.

    Raises
    ------
    MixDPOError : the file is no notebook.
    """
    try:
        return [
            "".join(cell["source"])
            for cell in book["cells"]
            if "parameters" in cell.get("metadata", {}).get("tags", [])
        ]
    except (TypeError, KeyError, AttributeError) as error:
        raise MixDPOError(
            f"{path}: found no notebook ({type(error).__name__}: {error}), expected cells with source and metadata; open "
            "and save it in JupyterLab, or take the project's own"
        ) from None


def notebook_parameters(name: str) -> dict[str, Parameter]:
    """The parameters of a notebook, read from its source without a kernel."""
    path = notebook_path(name)
    sources = _tagged(store.read_json(path), path)
    if len(sources) != 1:
        raise MixDPOError(f"{path}: found {len(sources)} cells tagged `parameters`, expected 1")
    source = sources[0]
    lines, parameters = source.splitlines(), {}
    try:
        body = ast.parse(source).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise MixDPOError(f"{path}: parameters cell: no Python ({error})") from None
    for node in body:
        line = lines[node.lineno - 1]
        try:
            if not (
                isinstance(node, ast.AnnAssign)
                and isinstance(node.target, ast.Name)
                and node.value is not None
            ):
                raise ValueError
            help_text = (
                lines[(node.end_lineno or node.lineno) - 1][node.end_col_offset :]
                .strip()
                .lstrip("# ")
            )
            parameters[node.target.id] = Parameter(
                node.target.id,
                ast.unparse(node.annotation),
                ast.literal_eval(node.value),
                help_text,
            )
        except ValueError:
            raise MixDPOError(
                f"{path}: parameters cell: found {line.strip()!r}, expected lines of the form "
                "`name: type = literal  # help`"
            ) from None
    for parameter in parameters.values():
        check_value(name, parameter, parameter.default)
    return parameters


def common_parameters() -> dict[str, dict[str, Parameter]]:
    """What notebooks may share, by group: types, defaults and help of common.yaml."""
    path = store.project_root() / "notebooks" / "profiles" / f"{COMMON}.yaml"
    groups: dict[str, dict[str, Parameter]] = {}
    seen: set[str] = set()
    for group, lines in (read_groups(path) if path.exists() else {}).items():
        groups[group] = {}
        for name, line in lines.items():
            if (
                not isinstance(line, dict)
                or set(line) != {"type", "default", "help"}
                or name in seen
            ):
                raise MixDPOError(
                    f"{path}: {name}: found {line!r}, expected each name once, with "
                    "{type: ..., default: ..., help: ...}"
                )
            seen.add(name)
            groups[group][name] = Parameter(f"{COMMON}.{name}", **line)
            check_value(path.name, groups[group][name], line["default"])
    return groups


def shared_parameters(notebook: str) -> dict[str, Parameter]:
    """What a notebook shares: the groups and names of its line in `workflow/notebooks.yaml`.

    A parameter of the notebook's own takes the place of a shared one of the same name.
    """
    own = notebook_parameters(notebook)
    if COMMON not in own:
        return {}
    groups = common_parameters()
    single = {name: parameter for group in groups.values() for name, parameter in group.items()}
    notebook, shared = notebook_path(notebook).stem, dict[str, Parameter]()
    line = listed_notebooks().get(notebook)
    if line is None:
        raise MixDPOError(
            f"workflow/notebooks.yaml: found no line of {notebook}, which has a parameter "
            f"`{COMMON}`; add `{notebook}: {{shares: [...]}}` with some of {', '.join(groups)}"
        )
    for name in line.shares:
        if name not in groups and name not in single:
            known = [*groups, *single]
            raise MixDPOError(
                f"workflow/notebooks.yaml: {notebook}: found {name!r} among what it shares, "
                f"expected some of {', '.join(known)}" + nearest(name, known)
            )
        shared |= groups.get(name) or {name: single[name]}
    return {name: parameter for name, parameter in shared.items() if name not in own}


def _type(node: ast.AST) -> Any:
    """The type that an annotation names; nothing of it is executed."""
    match node:
        case ast.Name(id=name):
            return _TYPES[name]
        case ast.Constant(value=None):
            return None
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _type(left) | _type(right)
        case ast.Subscript(value=ast.Name(id="list"), slice=one):
            return list[_type(one)]  # type: ignore[misc]
        case ast.Subscript(value=ast.Name(id="dict"), slice=ast.Tuple(elts=[key, value])):
            return dict[_type(key), _type(value)]  # type: ignore[misc]
    raise ValueError(ast.dump(node))


@cache
def _adapter(kind: str) -> TypeAdapter:
    try:
        return TypeAdapter(_type(ast.parse(kind[:200], mode="eval").body))
    except Exception:
        raise MixDPOError(
            f"found the parameter type {kind!r}; expected {', '.join(_TYPES)}, list[...], "
            "dict[..., ...] or a union of them or None by |"
        ) from None


def check_value(notebook: str, parameter: Parameter, value: Any) -> None:
    """Raise MixDPOError (name, found, expected, remedy) unless a value is of a parameter's type.

    Types are strict: no text for a number, no 1 for true, no infinite float; but an int is a float.
    """
    try:
        _adapter(parameter.type).validate_python(value, strict=True)
    except ValidationError as error:
        number = isinstance(value, str) and "float" in parameter.type
        remedy = (
            "write the exponent as in 1.0e-3" if number else f"the default is {parameter.default!r}"
        )
        first = error.errors()[0]
        within = (
            f" (see {first['input']!r})" if isinstance(value, list | dict) and first["loc"] else ""
        )
        raise MixDPOError(
            f"{notebook}: parameter {parameter.name}: found {value!r} ({type(value).__name__}), "
            f"expected {parameter.type}{within}; {remedy}"
        ) from None
    below = [one for one in _numbers(value) if one < 0]
    if below and not any(one < 0 for one in _numbers(parameter.default)):
        raise MixDPOError(
            f"{notebook}: parameter {parameter.name}: found {below[0]!r}, expected 0 or more, as its default "
            f"{parameter.default!r} is"
        )


def _numbers(value: Any) -> Iterator[float]:
    """Every number in a value, at any depth."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            yield from _numbers(one)
    elif isinstance(value, int | float):
        yield value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name twice")
    return dict(pairs)


def parse_overrides(pairs: Sequence[str]) -> dict[str, Any]:
    """`["n_experts=4", "seeds=[0, 1]"]` as values (JSON or YAML); `common.name` is a shared one.

    >>> parse_overrides(["n_experts=4", "rate=1e-3", "designs=[clean]", "unit=user"])
    {'n_experts': 4, 'rate': 0.001, 'designs': ['clean'], 'unit': 'user'}
    >>> parse_overrides(["common.n_prompts=300", "common.rank=4"])
    {'common': {'n_prompts': 300, 'rank': 4}}
    """
    values: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name.strip():
            raise MixDPOError(f"-p {pair}: found no name=value; write for example -p n_experts=4")
        try:
            value = json.loads(text, object_pairs_hook=_once)  # YAML reads 1e-3 as text
        except (ValueError, RecursionError):
            try:
                value = read_text(text)
            except ValueError as error:
                raise MixDPOError(
                    f"-p {' '.join(pair.split()):.200}: {error}; expected a number, text, true/false, null or [a, list]"
                ) from None
        outer, _, inner = name.strip().partition(".")
        if outer == COMMON and inner:
            values[COMMON] = {**values.get(COMMON, {}), inner: value}
        else:
            values[name.strip()] = value
    return values


def profile_names() -> list[str]:
    """The profiles that there are."""
    folder = store.project_root() / "notebooks" / "profiles"
    return sorted(path.stem for path in folder.glob("*.yaml") if path.stem != COMMON)


def profile_values(profile: str, notebook: str) -> dict[str, Any]:
    """What a profile says for one notebook, or for all under "common" (nothing: defaults)."""
    path, known = (
        store.project_root() / "notebooks" / "profiles" / f"{profile}.yaml",
        profile_names(),
    )
    if profile not in known:
        raise MixDPOError(
            f"profile {profile!r}: {path} not found; expected one of "
            + (", ".join(known) or "none yet")
            + nearest(profile, known)
        )
    values = read_yaml(path).get(notebook) or {}
    if not isinstance(values, dict):
        raise MixDPOError(
            f"{path}: {notebook}: found {values!r}, expected a mapping of parameters to values"
        )
    return values


def resolve_parameters(
    notebook: str, profile: str = "default", overrides: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Every parameter of a notebook, its shared values whole under `common`.

    A value is its default, unless the profile says otherwise for all notebooks (`common`), unless
    it does for this one, unless `overrides` do.

    Raises
    ------
    MixDPOError : an unknown name (valid ones and the nearest are listed), or a wrong type (name,
        found, expected).
    """
    known, shared = notebook_parameters(notebook), shared_parameters(notebook)
    values = {name: parameter.default for name, parameter in known.items()}
    common = {name: parameter.default for name, parameter in shared.items()}
    place = f"{notebook}: profile {profile}"
    layers = [
        (place, {COMMON: _for_all(profile, shared)} if shared else {}),
        (place, profile_values(profile, notebook)),
        (notebook, overrides or {}),
    ]
    for place, given in layers:
        for name, value in given.items():
            if name not in known:
                raise _unknown(place, name, known, shared)
            check_value(place, known[name], value)
            if name == PROFILE and value != profile:
                raise MixDPOError(
                    f"{place}: found profile={value!r} under the profile {profile!r}; write "
                    f"--profile {value}"
                )
            values[name] = value
            for inner, choice in value.items() if name == COMMON else ():
                if inner not in shared:
                    raise _unknown(place, f"{COMMON}.{inner}", known, shared)
                check_value(place, shared[inner], choice)
                common[inner] = choice
    return values | {
        name: value for name, value in ((PROFILE, profile), (COMMON, common)) if name in known
    }


def _for_all(profile: str, shared: Mapping[str, Parameter]) -> dict[str, Any]:
    values = profile_values(profile, COMMON)
    known = [name for group in common_parameters().values() for name in group]
    for name in values:
        if name not in known:
            raise MixDPOError(
                f"profile {profile}: common: unknown name {name!r}; expected one of "
                + ", ".join(known)
                + nearest(name, known)
            )
    return {name: value for name, value in values.items() if name in shared}


def _unknown(
    place: str, name: str, known: Mapping[str, Any], shared: Mapping[str, Any]
) -> MixDPOError:
    names = [*(n for n in known if n != COMMON), *(f"{COMMON}.{n}" for n in shared)]
    other = name.removeprefix(f"{COMMON}.") if name.startswith(f"{COMMON}.") else f"{COMMON}.{name}"
    hint = f"; did you mean {other}?" if other in names else nearest(name, names)
    return MixDPOError(
        f"{place}: unknown parameter {name!r}; expected one of {', '.join(names)}{hint}"
    )
