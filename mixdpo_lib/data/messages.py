"""What is a conversation? Messages of a system, a user and an assistant, and the prompt that they make."""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Mapping
from typing import Any

ROLES = ("system", "user", "assistant")
Messages = tuple[tuple[str, str], ...]  # role and content of each
Prompt = str | Messages

LONGEST_CELL = (
    4_000_000  # characters of a cell that are looked at for messages in Python's notation
)
_OPENING = re.compile(r"""\s*["']?\s*(?:array\s*\(|list\s*\()?\s*[\[(]?\s*\{""")
_KEYS = tuple(
    tuple(re.compile(rf"""\\?['"]{key}\\?['"]\s*:""") for key in keys)
    for keys in (("role", "content"), ("from", "value"))
)


def as_prompt(value: Any) -> Prompt:
    """A prompt in the one form that is computed with: a text stays, a list of messages becomes a tuple of pairs.

    Parameters
    ----------
    value : a text, or a list of {"role": ..., "content": ...} or of (role, content). Keys whose value is None are
        dropped: arrow adds them where another row has the key.

    Raises
    ------
    ValueError : anything else; an unknown role; a message without words, with tool calls or with a list of parts.

    >>> as_prompt("Which knot?"), as_prompt([{"role": "user", "content": "Which knot?"}])
    ('Which knot?', (('user', 'Which knot?'),))
    """
    if isinstance(value, str):
        return value
    messages = as_messages(value)
    if not messages:
        raise ValueError("found a list without messages, expected a text or at least one message")
    return messages


def as_messages(value: Any) -> Messages:
    """A list of messages as a tuple of (role, content); the list may be empty.

    Raises
    ------
    ValueError : see `as_prompt`; the number of the message is named, counted from 0.

    >>> as_messages([("user", "Hello"), {"role": "assistant", "content": "Hi", "tool_calls": None}])
    (('user', 'Hello'), ('assistant', 'Hi'))
    """
    if not isinstance(value, (list, tuple)):
        raise ValueError(
            f"found {described(value)}, expected a text, or a list of messages with 'role' and 'content'"
        )
    return tuple(_message(message, i) for i, message in enumerate(value))


def _message(value: Any, i: int) -> tuple[str, str]:
    if isinstance(value, Mapping):
        known = {key: inner for key, inner in value.items() if inner is not None}
        if "from" in known and "value" in known:
            raise ValueError(
                f"message {i}: found the keys 'from' and 'value', expected 'role' and 'content'; rename them "
                f"and write the roles as {', '.join(ROLES)}"
            )
        if more := [key for key in known if key not in ("role", "content")]:
            raise ValueError(
                f"message {i}: found {more[:3]} beside 'role' and 'content', which is not learned from; leave the "
                "row out, or the key where it says nothing"
            )
        role, content = known.get("role"), known.get("content")
    elif isinstance(value, (list, tuple)) and len(value) == 2:
        role, content = value
    else:
        raise ValueError(
            f"message {i}: found {described(value)}, expected a mapping with 'role' and 'content'"
        )
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(
            f"message {i}: found the role {role!r:.40}, expected one of {', '.join(ROLES)}; rename the role, or "
            "leave the row out"
        )
    if not isinstance(content, str) or not content.strip():
        raise ValueError(
            f"message {i}: found the content {described(content)}, expected a text with words; "
            + (
                "write its parts as one text"
                if isinstance(content, (list, tuple))
                else "leave the message out"
            )
        )
    return role, content


def check_turns(messages: Messages) -> Messages:
    """The messages before an answer, refused where no answer can follow them.

    Raises
    ------
    ValueError : a system message that is not the first; a last message that is not the user's.

    >>> check_turns((("system", "Be brief."), ("user", "Which knot?")))
    (('system', 'Be brief.'), ('user', 'Which knot?'))
    """
    roles = [role for role, _ in messages]
    if "system" in roles[1:] or roles[-1:] != ["user"]:
        raise ValueError(
            f"found messages of {roles} before the answer, expected the user's as the last and one of the system "
            "at most, as the first"
        )
    return messages


def is_written(value: Any) -> bool:
    """Whether a text is messages that were written into one cell, as JSON or in Python's notation.

    >>> is_written("[{'role': 'user', 'content': 'Hello'}]"), is_written('[{"role": "admin"}] is the answer')
    (True, False)
    """
    return (
        isinstance(value, str)
        and _OPENING.match(value) is not None
        and any(all(key.search(value) for key in keys) for keys in _KEYS)
    )


def read_written(text: str) -> list[Any]:
    """The list of messages that a cell holds: JSON, or the Python notation that pandas writes.

    Raises
    ------
    ValueError : neither of them.

    >>> read_written("[{'role': 'user', 'content': 'Hello'}]")
    [{'role': 'user', 'content': 'Hello'}]
    """
    found: Any = None
    try:
        found = strict_json(text)
    except (ValueError, RecursionError):
        if len(text) <= LONGEST_CELL:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # about backslashes
                    found = ast.literal_eval(text.strip())
            except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
                found = None
    if not isinstance(found, (list, tuple)):
        raise ValueError(
            f"found messages written as a text that is neither a JSON list nor a Python list ({text[:40]!r}); save the "
            "set as JSONL or Parquet, where a list stays a list"
        )
    return list(found)


def strict_json(text: str) -> Any:
    """Content of a JSON text; a key that stands twice in one object is an error.

    Raises
    ------
    ValueError : no JSON, or a key twice.

    >>> strict_json('{"role": "user"}')
    {'role': 'user'}
    """
    return json.loads(text, object_pairs_hook=_once)


def _once(items: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(items)
    if len(found) < len(items):
        names = [name for name, _ in items]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r:.40} stands twice in one object")
    return found


def described(value: Any) -> str:
    """A value as messages show it, 40 characters at most.

    >>> described(None), described(" ")
    ('NoneType None', "' '")
    """
    if isinstance(value, str):
        return repr(value[:60])[:40]
    try:
        return f"{type(value).__name__} {value!r:.60}"[:40]
    except RecursionError:
        return f"{type(value).__name__}, deeply nested"
