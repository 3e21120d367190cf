"""Is it the same? What two descriptions differ in, and whether options are those of what is made from them."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Mapping
from typing import Any

from .files import shown

_SIMPLE = (int, float, str, bool, type(None))


def differences(found: Any, expected: Any, at: str = "") -> dict[str, str]:
    """What two descriptions (JSON) differ in, by the names of the keys: "found ..., expected ...".

    >>> differences({"fit": {"seed": 0, "passes": 5}}, {"fit": {"seed": 3, "passes": 5}})
    {'fit.seed': 'found 0, expected 3'}
    """
    if isinstance(found, dict) and isinstance(expected, dict):
        differ: dict[str, str] = {}
        for name in [*expected, *(name for name in found if name not in expected)]:
            place = f"{at}.{name}" if at else str(name)
            if name not in found or name not in expected:
                differ[place] = (
                    f"found {_or_none(found, name)}, expected {_or_none(expected, name)}"
                )
            else:
                differ |= differences(found[name], expected[name], place)
        return differ
    same = type(found) is type(expected) or {type(found), type(expected)} <= {int, float}
    if same and found == expected:
        return {}
    return {at: f"found {shown(found)}, expected {shown(expected)}"}


def _or_none(values: Mapping[str, Any], name: str) -> str:
    return shown(values[name]) if name in values else "nothing"


def check_options(what: str, make: type, options: Mapping[str, Any]) -> None:
    """Refuse options whose simple types (numbers, text, truth values) are not those that the class `make` takes.

    Raises
    ------
    ValueError : what it is for, the option, found and expected.
    """
    try:
        hints = typing.get_type_hints(make.__init__)  # type: ignore[misc]
        parameters = inspect.signature(make).parameters
    except (TypeError, NameError, ValueError):  # of somebody else, without readable types
        return
    for name, value in options.items():
        if name not in parameters or name not in hints:
            continue
        union = typing.get_origin(hints[name]) in (typing.Union, types.UnionType)
        kinds = typing.get_args(hints[name]) if union else (hints[name],)
        if not all(kind in _SIMPLE for kind in kinds):
            continue
        kind = type(value)
        if not (kind in kinds or (kind is int and float in kinds)):
            names = " or ".join("null" if one is type(None) else one.__name__ for one in kinds)
            raise ValueError(f"{what}: {name}: found {shown(value)}, expected {names}")
