"""Which tokens does the model mean? Its start, its template, the border of prompt and answer, the end of an answer.

One room decides it for features, training, generation and what leaves the mixture. Without a template a prompt starts
as the tokenizer starts a text (a start token once), and prompt and answer are split where the text is: their tokens are
those of the joint text wherever the prompt's own tokens begin it, else each is tokenised alone. With a template both
are as it writes them. Where this differs from TRL stands in docs/using-your-own-model-and-data.md.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import lru_cache
from typing import Any, NamedTuple

from ..data.messages import Messages, Prompt, as_prompt

_DAY = datetime(2024, 7, 26)  # what a template that asks for the date is told, every day
_MARK = "mixdpoanswer"  # stands where an answer goes, to see what a template writes around one
_PROBE = (
    "The film was 1,024 times better than \u201cGood\u201d (2001)!\n\n\tIt\u2019s naïve \u2014 déjà vu; Привет, 世界 🎬 "
    "<s></s> def f(x): return x**2"
)


class Chat(NamedTuple):
    """How a template writes a conversation: the text before an answer when one is asked for, and around a given one."""

    prompt: str  # ends where the model goes on
    lead: str  # what stands between the prompt and a given answer
    tail: str  # what ends a given answer
    trims: bool  # blanks around an answer are dropped
    answers: bool  # the template writes answers at all


def _ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, without a start or an end."""
    return [int(i) for i in tokenizer(text, add_special_tokens=False)["input_ids"]]


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(
        tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    )


def _started(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text as the tokenizer starts it: its start tokens once, also where the text brings them itself."""
    plain = _ids(tokenizer, text)
    whole = [int(i) for i in tokenizer(text)["input_ids"]]
    for n in range(len(whole) - len(plain) + 1):
        if whole[n : n + len(plain)] == plain:
            start = whole[:n]
            return plain if plain[:n] == start else [*start, *plain]
    return plain  # no start that could be told from the text


# ------------------------------------------------------------------------------------------------------------ templates


@contextmanager
def _on_one_day() -> Iterator[None]:
    """transformers tells templates the date by `datetime.now` of one of its modules: here it is always `_DAY`."""
    from transformers.utils import chat_template_utils as module

    class Day(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:  # noqa: ARG003
            return _DAY

    before = module.datetime
    module.datetime = Day  # type: ignore[misc, attr-defined]
    try:
        yield
    finally:
        module.datetime = before  # type: ignore[misc, attr-defined]


def _rendered(tokenizer: Any, messages: Messages, answer: str | None, place: str) -> str:
    """The conversation as the template writes it: with the start of an answer, or with this answer at its end."""
    said = [{"role": role, "content": content} for role, content in messages]
    if answer is not None:
        said.append({"role": "assistant", "content": answer})
    try:
        with _on_one_day():
            return str(
                tokenizer.apply_chat_template(
                    said, tokenize=False, add_generation_prompt=answer is None
                )
            )
    except Exception as error:  # of jinja, or raised by the template itself
        found = (str(error).strip().splitlines() or [type(error).__name__])[0]
        roles = ", ".join(role for role, _ in messages)
        raise ValueError(
            f"{place}: the model's chat template cannot write messages of {roles} ({found}): give a conversation that "
            "it knows, for example without a system message"
        ) from error


@lru_cache(maxsize=4096)
def _chat(tokenizer: Any, template: str, messages: Messages, place: str) -> Chat:
    """See `Chat`. The template stands among the arguments: one that is changed is read anew."""
    prompt = _rendered(tokenizer, messages, None, place)
    marked = _rendered(tokenizer, messages, f" {_MARK} ", place)
    if _MARK not in marked:
        return Chat(prompt, "", "", False, False)
    trims = f" {_MARK} " not in marked
    before, _, tail = marked.rpartition(_MARK if trims else f" {_MARK} ")
    # a template that starts an answer with more than it keeps of one: the prompt stays as it is asked with
    lead = before.removeprefix(prompt) if before.startswith(prompt) else ""
    return Chat(prompt, lead, tail, trims, True)


def _template(tokenizer: Any) -> str:
    """The template of the live tokenizer, as text; empty where it has none."""
    found = getattr(tokenizer, "chat_template", None)
    return json.dumps(found, sort_keys=True) if isinstance(found, dict) else str(found or "")


def _messages(prompt: Prompt) -> Messages:
    return (("user", prompt),) if isinstance(prompt, str) else prompt


def _chat_of(tokenizer: Any, prompt: Prompt) -> Chat:
    words = prompt if isinstance(prompt, str) else prompt[-1][1]
    return _chat(tokenizer, _template(tokenizer), _messages(prompt), f"prompt {words[:40]!r}")


# --------------------------------------------------------------------------------------------------- prompts and answers


def prompt_ids(tokenizer: Any, prompt: Any, chat: bool) -> list[int]:
    """Token ids of a prompt: as the tokenizer starts a text, or in the chat template with the start of an answer.

    Parameters
    ----------
    prompt : a text, or a conversation (see `data.pairs.as_prompt`), which only a template can write.
    chat : whether the template is used; a text is then one message of the user.

    Raises
    ------
    ValueError : a conversation without a template, or one that the template refuses.
    """
    prompt = as_prompt(prompt)
    if chat:
        return _ids(tokenizer, _chat_of(tokenizer, prompt).prompt)
    if not isinstance(prompt, str):
        way = (
            "load the model by load_base(..., chat=True): its tokenizer has a chat template"
            if _template(tokenizer)
            else "its tokenizer has no chat template: take a model with one, or give prompts as texts"
        )
        raise ValueError(
            f"prompt of {len(prompt)} messages (the last: {prompt[-1][1][:40]!r}) for a model that reads plain texts; {way}"
        )
    return _started(tokenizer, prompt)


def text_ids(
    tokenizer: Any, prompt: Any, answer: str, ended: bool, chat: bool, ends: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Token ids of a prompt and of an answer to it, with the end of an answer where it `ended`.

    prompt + answer decodes to prompt + answer, for tokenizers of bytes and of words with their space. The end stands
    once: an answer that brings its end token is read as ended.

    Parameters
    ----------
    ends : ids that end a text, the tokenizer's own first (see `end_ids`).

    Raises
    ------
    ValueError : an end token in the middle of the answer; what `prompt_ids` refuses.
    """
    prompt = as_prompt(prompt)
    before = prompt_ids(tokenizer, prompt, chat)
    if not _ids(tokenizer, answer):
        return before, []
    answer, ended = _without_end(tokenizer, answer, ended, ends)
    return before, _answer_ids(tokenizer, prompt, before, answer, ended, chat, ends)


def _answer_ids(
    tokenizer: Any,
    prompt: Prompt,
    before: list[int],
    answer: str,
    ended: bool,
    chat: bool,
    ends: Sequence[int],
) -> list[int]:
    if not chat or not (around := _chat_of(tokenizer, prompt)).answers:
        text = around.prompt if chat else str(prompt)
        own = _after(tokenizer, before, text, answer)
        return [*own, ends[0]] if ended else own
    written = around.lead + (answer.strip() if around.trims else answer)
    closes = around.tail.strip() != ""
    own = _after(tokenizer, before, around.prompt, written + (around.tail if ended else ""))
    return [*own, ends[0]] if ended and not closes else own


def _without_end(tokenizer: Any, answer: str, ended: bool, ends: Sequence[int]) -> tuple[str, bool]:
    """The answer without an end token at its end, and whether it ended."""
    written = [text for i in ends if (text := _text(tokenizer, [i])).strip()]
    while end := next((one for one in written if answer.rstrip().endswith(one)), ""):
        answer, ended = answer.rstrip().removesuffix(end), True
    inside = [i for i in _ids(tokenizer, answer) if i in ends] if answer else []
    if inside:
        raise ValueError(
            f"answer {answer[:60]!r}: found the end token {_text(tokenizer, inside[:1])!r} in it, expected it at the end "
            "or not at all; cut the answer there, or remove the token"
        )
    return answer, ended


def _after(tokenizer: Any, before: list[int], prompt: str, answer: str) -> list[int]:
    """Token ids of what follows a prompt with these ids."""
    joint = _ids(tokenizer, prompt + answer)
    n_start = len(before) - len(_ids(tokenizer, prompt))  # start tokens, which the joint text lacks
    begins = before[max(n_start, 0) :]
    if joint[: len(begins)] == begins and len(joint) > len(begins):
        return joint[len(begins) :]
    alone = _ids(tokenizer, answer)  # tokens merge across the border: the prompt keeps its own
    wanted = _text(tokenizer, before) + answer
    if _text(tokenizer, [*before, *alone]) != wanted:  # words with their space: one was put before
        for mark in ("\n", ".", "x"):
            held = _ids(tokenizer, mark)
            own = _ids(tokenizer, mark + answer)
            if own[: len(held)] == held and (
                _text(tokenizer, [*before, *own[len(held) :]]) == wanted
            ):
                return own[len(held) :]
    return alone


def answer_text(tokenizer: Any, before: Sequence[int], tokens: Sequence[int]) -> str:
    """The text of sampled tokens after a prompt's; a space that parts them from it is kept."""
    last = list(before[-16:])
    start, whole = _text(tokenizer, last), _text(tokenizer, [*last, *tokens])
    return whole[len(start) :] if whole.startswith(start) else _text(tokenizer, tokens)


# ------------------------------------------------------------------------------------------------------ ends, and identity


def end_ids(tokenizer: Any, generation: Any, chat: bool) -> tuple[int, ...]:
    """Ids that end a text: the tokenizer's end token, those of the generation configuration, the template's end of turn.

    Parameters
    ----------
    generation : the model's generation configuration, or None.
    """
    given = getattr(generation, "eos_token_id", None)
    found = [int(tokenizer.eos_token_id), *(given if isinstance(given, list) else [given])]
    if chat:
        tail = _ids(tokenizer, _chat_of(tokenizer, "Hello").tail.strip())
        special = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}
        found += [i for i in tail[:1] if i in special]
    return tuple(dict.fromkeys(int(i) for i in found if i is not None))


def acts(tokenizer: Any, chat: bool, ends: Sequence[int]) -> str:
    """The tokenizer as it acts, 64 hex digits: its vocabulary, its ends, and what it makes of fixed texts.

    Names, versions and settings that change no token are not in it.
    """
    prompts: list[Prompt] = ["Tell me", _PROBE]
    seen: list[Any] = [
        [prompt_ids(tokenizer, one, chat), _ids(tokenizer, " " + _PROBE), sorted(ends), ends[0]]
        for one in prompts
    ]
    if chat:
        around = _chat_of(tokenizer, "Hello")
        seen.append([*around])
        seen.append([_template(tokenizer)])  # other conversations may take other ways through it
    digest = hashlib.sha256(json.dumps(seen).encode())
    digest.update(repr(sorted(tokenizer.get_vocab().items())).encode())
    return digest.hexdigest()
