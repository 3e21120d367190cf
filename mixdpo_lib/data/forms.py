"""In which form is a comparison written, and what are its prompt and its two answers?"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa
from datasets import Dataset

from .checks import (
    TEXT_COLUMNS,
    BadRows,
    RowError,
    check_comparison,
    check_ended,
    check_kind,
    check_present,
    check_readable,
    check_text,
)
from .messages import (
    Messages,
    Prompt,
    as_messages,
    check_turns,
    described,
    is_written,
    read_written,
)
from .tables import Table, as_dataset, from_dataset

_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_MESSAGE = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
ENDED = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def explicit_row(row: Mapping[str, Any]) -> tuple[Prompt, str, str]:
    """Prompt, chosen and rejected of a row that is written in any of the forms.

    Texts with a prompt; texts without one (see `split_texts`); conversations with the messages before the answer in
    `prompt`, with all messages in both answers, or with the question as a text beside them; a conversation in `prompt`
    and texts as answers. A cell that holds messages as JSON or in Python's notation is read as messages.

    Raises
    ------
    RowError : none of the forms; two prompts; a tie; an empty text.

    >>> explicit_row({"chosen": "A film that moves.", "rejected": "A film that bores."})
    ('A film that', ' moves.', ' bores.')
    """
    given = {name: _unwritten(row[name], name) for name in TEXT_COLUMNS if name in row}
    lists = [isinstance(given[name], (list, tuple)) for name in ("chosen", "rejected")]
    if all(lists):
        return check_comparison(*_conversation(given))
    if any(lists):
        raise RowError(
            f"found {described(given['chosen'])} as chosen and {described(given['rejected'])} as rejected, expected "
            "two texts or two lists of messages"
        )
    if "prompt" in given:
        return check_comparison(given["prompt"], given["chosen"], given["rejected"])
    if not all(isinstance(given[name], str) for name in ("chosen", "rejected")):
        raise RowError("no column 'prompt', and answers that are no text; give three texts")
    for name in ("chosen", "rejected"):
        check_text(given[name], name)
    if given["chosen"] == given["rejected"]:
        check_comparison("-", given["chosen"], given["rejected"])
    return check_comparison(*split_texts(given["chosen"], given["rejected"]))


def _unwritten(value: Any, column: str) -> Any:
    if isinstance(value, Mapping) and {"role", "content"} <= set(value):  # a list for each key
        roles, contents = value["role"], value["content"]
        if isinstance(roles, list) and isinstance(contents, list) and len(roles) == len(contents):
            return list(zip(roles, contents, strict=True))
    if not is_written(value):
        return value
    try:
        return read_written(value)
    except ValueError as error:
        raise RowError(str(error), column) from None


def split_texts(chosen: str, rejected: str) -> tuple[str, str, str]:
    """The prompt that two texts begin with, and the two rests.

    A transcript (`\\n\\nHuman: ...\\n\\nAssistant: ...`) is cut behind the last `Assistant:` that both have, any other text
    at the last white space that both have before they differ: no word is cut, and the space belongs to the answers.

    Raises
    ------
    RowError : nothing to cut; a transcript whose last answer is not the only difference.

    >>> split_texts("The film is good", "The film is great")
    ('The film is', ' good', ' great')
    >>> split_texts("\\n\\nHuman: Tea?\\n\\nAssistant: Yes.", "\\n\\nHuman: Tea?\\n\\nAssistant: Yes!")
    ('\\n\\nHuman: Tea?\\n\\nAssistant:', ' Yes.', ' Yes!')
    """
    n = next(
        (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b),
        min(len(chosen), len(rejected)),
    )
    if all(_is_transcript(text) for text in (chosen, rejected)):
        return _split_transcripts(chosen, rejected, n)
    while n and not (
        not chosen[n - 1].isspace()
        and all(not text[n : n + 1].strip() for text in (chosen, rejected))
    ):
        n -= 1
    if not chosen[:n].strip():
        raise RowError(
            "no column 'prompt', and the answers have no common beginning that could be it; give the prompt"
        )
    if not (chosen[n:].strip() and rejected[n:].strip()):
        raise RowError(
            f"no column 'prompt', and one answer is the beginning of the other ({chosen[:n][-40:]!r}): found nothing "
            "behind the prompt, expected two answers; give the prompt"
        )
    return chosen[:n], chosen[n:], rejected[n:]


def _is_transcript(text: str) -> bool:
    return {turn[1] for turn in _TURN.finditer(text)} == {"Human", "Assistant"}


def _split_transcripts(chosen: str, rejected: str, n: int) -> tuple[str, str, str]:
    answers = [turn.end() for turn in _TURN.finditer(chosen[:n]) if turn[1] == "Assistant"]
    if not answers:
        raise RowError(
            "found two transcripts that differ before the first 'Assistant:', expected one prompt; leave the row out"
        )
    n = answers[-1]
    for name, text in (("chosen", chosen[n:]), ("rejected", rejected[n:])):
        if _TURN.search(" " + text):
            raise RowError(
                "found further turns behind the last 'Assistant:' that both sides share, expected one answer; the "
                "sides must differ in the last answer alone: leave the row out",
                name,
            )
        if not text.strip():
            raise RowError("found no words behind 'Assistant:', expected an answer", name)
    return chosen[:n], chosen[n:], rejected[n:]


def _messages(value: Any, column: str) -> Messages:
    try:
        return as_messages(value)
    except ValueError as error:
        raise RowError(str(error), column) from None


def _conversation(given: Mapping[str, Any]) -> tuple[Prompt, str, str]:
    sides = {name: _messages(given[name], name) for name in ("chosen", "rejected")}
    if "prompt" in given:
        prompt = given["prompt"]
        if isinstance(prompt, (list, tuple)):
            before = _messages(prompt, "prompt")
        else:
            before = (("user", check_text(prompt, "prompt")),)
            if any(len(side) > 1 for side in sides.values()):
                _check_part(prompt, sides)
                before = ()
        for name, side in sides.items():
            sides[name] = _joined(before, side)
    contexts, answers = [], []
    for name, side in sides.items():
        roles = [role for role, _ in side]
        if roles[-1:] != ["assistant"] or len(side) < 2:
            raise RowError(
                f"found messages of {roles}, expected at least one of the user, and the assistant's answer as the last",
                name,
            )
        try:
            contexts.append(check_turns(side[:-1]))
        except ValueError as error:
            raise RowError(str(error), name) from None
        answers.append(side[-1][1])
    if contexts[0] != contexts[1]:
        raise RowError(
            "chosen and rejected answer different prompts; they must agree in all messages but the last: leave the row out"
        )
    return contexts[0], answers[0], answers[1]


def _joined(before: Messages, side: Messages) -> Messages:
    """The prompt's messages and then the side's, which may repeat all of them or the last ones; blanks do not count."""

    def plain(messages: Messages) -> list[tuple[str, str]]:
        return [(role, " ".join(content.split())) for role, content in messages]

    for n in range(len(before)):
        tail = before[n:]
        if len(side) > len(tail) and plain(side[: len(tail)]) == plain(tail):
            return (*before, *side[len(tail) :])
    return (*before, *side)


def _check_part(prompt: str, sides: Mapping[str, Messages]) -> None:
    for name, side in sides.items():
        asked = " ".join(" ".join(content for _, content in side[:-1]).split())
        if " ".join(prompt.split()) not in asked:
            raise RowError(
                f"found the prompt {prompt[:40]!r}, expected the messages of {name} before the answer, or a part of "
                f"them ({asked[:40]!r}); correct it, or leave the column out",
                "prompt",
            )


def _remedy(names: list[str]) -> str:
    """What to do about columns of these names among which one is missing."""
    for mark, word in ((";", "semicolons"), ("\t", "tabs")):
        if len(names) == 1 and mark in names[0]:
            return f"fields are parted by {word}: save it with commas"
    return "rename or add it"


def read_forms(
    table: Table,
    place: str,
    bad: BadRows,
    columns: Sequence[str] = (),
    first: Prompt | None = None,
    readable: Callable[[Prompt, str, bool], object] | None = None,
) -> tuple[Table, Prompt | None]:
    """The rows of a table as prompt, chosen and rejected, without the bad ones, which are noted; and the first prompt.

    Parameters
    ----------
    columns : further columns in which no value may be missing.
    first : the first prompt of the set, if the set began in another file.
    readable : a model's tokens of prompt, answer and whether it ended; refuses by a ValueError what it cannot read.

    Raises
    ------
    ValueError : a column is missing.
    """
    for column in ("chosen", "rejected", *columns):
        if column not in table.names:
            raise ValueError(
                f"{place}: column {column!r} is missing; found {table.names}; {_remedy(table.names)}"
            )
    keep: list[int] = []
    read: list[tuple[Prompt, str, str]] = []
    ended: list[bool] = []
    named = {name: table.values(name) for name in columns if name not in TEXT_COLUMNS}
    for i in range(table.n):
        try:
            one = explicit_row(
                {name: table.own[name][i] for name in TEXT_COLUMNS if name in table.own}
            )
            for name, values in named.items():
                check_present(values[i], name)
            if "ended" in table.own:
                word = table.own["ended"][i]
                if table.words and isinstance(word, str):
                    word = ENDED.get(word.lower(), word)
                ended.append(check_ended(word))
            first = one[0] if first is None else first
            check_kind(one[0], first)
            if readable is not None:
                check_readable(one, ended[-1] if "ended" in table.own else True, readable)
        except RowError as error:
            del ended[len(keep) :]
            bad.add(place, i, error)
        else:
            keep.append(i)
            read.append(one)
    prompts: list[Any] = [one[0] for one in read]
    if isinstance(first, tuple):
        prompts = [[{"role": r, "content": c} for r, c in messages] for messages in prompts]
    kind = _MESSAGE if isinstance(first, tuple) else pa.string()
    made = {
        "prompt": pa.array(prompts, kind),
        "chosen": pa.array([one[1] for one in read], pa.string()),
        "rejected": pa.array([one[2] for one in read], pa.string()),
    }
    if "ended" in table.own:
        made["ended"] = pa.array(ended, pa.bool_())
    return table.replaced(made, keep), first


def explicit_prompts(data: Dataset, place: str = "preference set") -> Dataset:
    """The same pairs as `prompt` (a text or a list of messages) and the texts `chosen`, `rejected`; other columns stay.

    Raises
    ------
    ValueError : a row in none of the forms (see `explicit_row`); all such rows are counted, ten are named.

    >>> explicit_prompts(Dataset.from_list([{"chosen": "A film that moves.", "rejected": "A film that bores."}]))[0]
    {'prompt': 'A film that', 'chosen': ' moves.', 'rejected': ' bores.'}
    """
    if not {"chosen", "rejected"} <= set(data.column_names) or len(data) == 0:
        return data
    bad = BadRows()
    table, _ = read_forms(from_dataset(data), place, bad)
    bad.refuse(len(data), "mend these rows, or leave them out")
    return as_dataset([table], place)
