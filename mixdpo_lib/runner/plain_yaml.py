"""How is YAML read? Plain values, bounded in size and depth, each name once; everything else is refused with its line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ..store import MixDPOError

LIMIT = 200_000  # characters; the project's files have some thousands
DEPTH = 20  # mappings and lists within each other
NODES = 20_000  # names and values, what aliases stand for counted each time
_PLAIN = ("null", "bool", "int", "float", "str", "seq", "map")


class _Loader(yaml.SafeLoader):
    """No dates, no objects, no name twice, and no aliases that make a huge value of a short text."""

    yaml_implicit_resolvers = {
        start: [(tag, form) for tag, form in found if tag.rsplit(":", 1)[-1] in _PLAIN]
        for start, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    depth = nodes = 0

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.sizes: dict[int, int] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        event, before = self.peek_event(), self.nodes
        alias = self.check_event(yaml.AliasEvent)
        if self.depth >= DEPTH:
            raise _refused(f"more than {DEPTH} levels", event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        if alias and id(node) not in self.sizes:
            raise _refused(f"the alias *{event.anchor} within what it stands for", event.start_mark)
        self.nodes += self.sizes[id(node)] if alias else 1
        if self.nodes > NODES:
            raise _refused(f"more than {NODES:,} values", event.start_mark)
        if not alias:
            self.sizes[id(node)] = self.nodes - before
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if node.tag.removeprefix("tag:yaml.org,2002:") not in _PLAIN:
            raise _refused(f"the tag {node.tag}", node.start_mark)
        if isinstance(node, yaml.MappingNode):
            seen = set()
            for key, _ in node.value:
                name = super().construct_object(key)
                if not isinstance(name, str | int | float):
                    raise _refused(f"a name that is no text: {key.value!r:.60}", key.start_mark)
                if name in seen:
                    raise _refused(f"{name!r} twice", key.start_mark)
                seen.add(name)
        try:
            return super().construct_object(node, deep)
        except ValueError as error:  # a number of thousands of digits
            raise _refused(f"a value that cannot be read ({error})", node.start_mark) from None


def _refused(found: str, mark: yaml.Mark) -> yaml.YAMLError:
    return yaml.MarkedYAMLError(problem=f"found {found}", problem_mark=mark)


def read_text(text: str) -> Any:
    """The value of a YAML text.

    >>> read_text("{rate: 0.1, day: 2024-01-01}")
    {'rate': 0.1, 'day': '2024-01-01'}

    Raises
    ------
    ValueError : what was found, and in which line.
    """
    if len(text) > LIMIT:
        raise ValueError(f"found {len(text):,} characters, expected at most {LIMIT:,}")
    try:
        return yaml.load(text, _Loader)  # a loader of plain values
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise ValueError(f"line {mark.line + 1 if mark else 1}: {error.problem}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split())) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """A file of names and what is said of them.

    Raises
    ------
    MixDPOError : anything else: file, line, found.
    """
    try:
        with open(path, encoding="utf-8") as file:
            content = read_text(file.read(LIMIT + 1)) or {}
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
    except (OSError, ValueError) as error:
        raise MixDPOError(
            f"{path}: found no mapping of names ({error}); expected `name: value`, plain values, each name once"
        ) from None
    return content


def read_groups(path: Path) -> dict[str, dict[str, Any]]:
    """A file of named groups of names; a group may be empty."""
    groups = {name: lines or {} for name, lines in read_yaml(path).items()}
    for name, lines in groups.items():
        if not isinstance(lines, dict):
            raise MixDPOError(
                f"{path}: {name}: found {lines!r}, expected names and what is said of them"
            )
    return groups
