"""Every form in which comparisons are published gives one prompt and two answers, or a clear refusal."""

import json

import datasets
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutations import said

from mixdpo_lib.data.files import load_preferences
from mixdpo_lib.data.forms import explicit_prompts, explicit_row, split_texts
from mixdpo_lib.data.messages import as_prompt
from mixdpo_lib.data.pairs import Pairs, Text, Texts, check_preferences

SYSTEM = {"role": "system", "content": "Be brief."}
Q, GOOD, BAD = "Which knot?", "A bowline.", "Rope."
ANSWERS = {"chosen": said("", GOOD)[1:], "rejected": said("", BAD)[1:]}
WHOLE = {"chosen": said(Q, GOOD), "rejected": said(Q, BAD)}
TURNS = said("Hello", "Hi", Q)
HH = "\n\nHuman: Tea, or coffee?\n\nAssistant: Tea.\n\nHuman: Why?\n\nAssistant:"


def read(tmp_path, *rows, name="train.jsonl", **options):
    """The rows of a file that holds these."""
    file = tmp_path / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_preferences(file, **options)["train"].to_list()


def messages(prompt):
    return [{"role": role, "content": content} for role, content in prompt]


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": said(Q), **ANSWERS}, said(Q)),
        ({"prompt": [SYSTEM, *said(Q)], **ANSWERS}, [SYSTEM, *said(Q)]),
        ({"prompt": TURNS, **ANSWERS}, TURNS),
        ({"prompt": [SYSTEM, *TURNS], **ANSWERS}, [SYSTEM, *TURNS]),
        (WHOLE, said(Q)),
        ({k: [SYSTEM, *v] for k, v in WHOLE.items()}, [SYSTEM, *said(Q)]),
        ({k: TURNS + v[1:] for k, v in WHOLE.items()}, TURNS),
        ({"prompt": said(Q), **WHOLE}, said(Q)),
        ({"prompt": [], **WHOLE}, said(Q)),
        ({"prompt": said("Hello"), **{k: TURNS[1:] + v[1:] for k, v in WHOLE.items()}}, TURNS),
        ({"prompt": Q, **WHOLE}, said(Q)),
        ({"prompt": f" {Q}\n", **{k: [SYSTEM, *v] for k, v in WHOLE.items()}}, [SYSTEM, *said(Q)]),
        ({"prompt": "Hello", **{k: TURNS + v[1:] for k, v in WHOLE.items()}}, TURNS),
        ({"prompt": "knot", **WHOLE}, said(Q)),
        ({"prompt": Q, **ANSWERS}, said(Q)),
        ({"prompt": TURNS, "chosen": GOOD, "rejected": BAD}, TURNS),
    ],
)
def test_conversations(tmp_path, row, prompt):
    wanted = {"prompt": prompt, "chosen": GOOD, "rejected": BAD}
    assert read(tmp_path, row) == [wanted]
    assert explicit_prompts(datasets.Dataset.from_list([row]))[0] == wanted
    pairs = Pairs.of(explicit_prompts(datasets.Dataset.from_list([row, row])))
    as_pairs = tuple((m["role"], m["content"]) for m in prompt)
    assert pairs.prompts == [as_pairs] * 2
    assert pairs.texts.texts[0] == Text(as_pairs, GOOD, True)
    again = explicit_prompts(datasets.Dataset.from_list([wanted]))  # what was read is read again
    assert again[0] == wanted


def test_other_columns_stay(tmp_path):
    more = {"prompt_id": "01", "messages": WHOLE["chosen"], "score_chosen": 8.0, "user": "ann"}
    (row,) = read(tmp_path, {"prompt": Q, **WHOLE, **more}, columns=["user"])
    assert row == {"prompt": said(Q), "chosen": GOOD, "rejected": BAD, **more}
    features = datasets.Features(
        {k: datasets.Value("string") for k in ("chosen", "rejected")}
        | {"kind": datasets.ClassLabel(names=["film", "book"]), "age": datasets.Value("int8")}
    )
    rows = [{"chosen": "A film is", "rejected": "A film was", "kind": 1, "age": 9}]
    data = datasets.Dataset.from_list(rows * 3, features=features).with_format("numpy")
    found = explicit_prompts(data.select([2, 0]))
    assert found.features["kind"].names == ["film", "book"]
    assert found.features["age"].dtype == "int8" and len(found) == 2


@pytest.mark.parametrize("kind", ["parquet", "arrow", "jsonl", "saved"])
def test_keys_that_arrow_adds(tmp_path, kind):
    rows = [
        {k: [{**m, "tool_calls": None, "name": None} for m in v] for k, v in WHOLE.items()},
        {k: [SYSTEM, *v] for k, v in WHOLE.items()},
    ]
    data = datasets.Dataset.from_list(rows)
    place = tmp_path / f"train.{kind}"
    if kind == "saved":
        data.save_to_disk(place)
    elif kind == "arrow":
        import pyarrow as pa

        with pa.OSFile(str(place), "wb") as file, pa.ipc.new_file(file, data.data.schema) as out:
            out.write_table(data.data.table)
    else:
        {"parquet": data.to_parquet, "jsonl": data.to_json}[kind](str(place))
    found = load_preferences(place)["train"]
    assert found["prompt"][:] == [said(Q), [SYSTEM, *said(Q)]]


def test_messages_as_a_list_for_each_key():
    row = {
        k: {"role": ["user", "assistant"], "content": [Q, a]}
        for k, a in (("chosen", GOOD), ("rejected", BAD))
    }
    assert explicit_prompts(datasets.Dataset.from_list([row]))[0]["prompt"] == said(Q)


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"prompt": "Other?", **WHOLE}, "column 'prompt': found the prompt 'Other\\?', expected"),
        ({"prompt": "", **WHOLE}, "column 'prompt': found ''"),
        ({"prompt": None, **WHOLE}, "column 'prompt': found NoneType"),
        (
            {"prompt": said(Q), "chosen": GOOD, "rejected": WHOLE["rejected"]},
            "found 'A bowline.' as chosen and list",
        ),
        ({"prompt": said(Q), "chosen": None, "rejected": None}, "column 'chosen': found NoneType"),
        ({"chosen": None, "rejected": WHOLE["rejected"]}, "found NoneType None as chosen"),
        (
            {"chosen": said(Q, GOOD, "Thanks"), "rejected": said(Q, BAD, "Oh")},
            r"found messages of \['user', 'assistant', 'user'\]",
        ),
        (
            {"chosen": said("", GOOD)[1:], "rejected": said("", BAD)[1:]},
            r"found messages of \['assistant'\], expected",
        ),
        ({"chosen": [], "rejected": []}, r"found messages of \[\], expected"),
        ({"chosen": said(Q, GOOD), "rejected": said("Why?", BAD)}, "answer different prompts"),
        (
            {"chosen": [SYSTEM, *said(Q, GOOD)], "rejected": said(Q, BAD)},
            "answer different prompts",
        ),
        (
            {k: said("Hello", a, Q, GOOD) for k, a in (("chosen", "Hi"), ("rejected", "Ho"))},
            "answer different prompts",
        ),
        ({k: said(Q, GOOD) for k in ("chosen", "rejected")}, "chosen equals rejected"),
        (
            {k: [*v[:1], SYSTEM, *v[1:]] for k, v in WHOLE.items()},
            "expected the user's as the last",
        ),
        (
            {k: [v[0], *said("", "Hm")[1:], v[1]] for k, v in WHOLE.items()},
            "expected the user's as the last",
        ),
        ({k: [SYSTEM, v[1]] for k, v in WHOLE.items()}, "expected the user's as the last"),
        (
            {"prompt": said(Q, "Hm"), "chosen": GOOD, "rejected": BAD},
            "expected the user's as the last",
        ),
        ({"prompt": [], "chosen": GOOD, "rejected": BAD}, "column 'prompt': found messages of"),
        ({k: said(Q, "") for k in ("chosen", "rejected")}, "message 1: found the content ''"),
        ({k: said(" ", k) for k in ("chosen", "rejected")}, "message 0: found the content ' '"),
        (
            {k: [said(Q)[0], {"role": "assistant", "content": None}] for k in WHOLE},
            "message 1: found the content NoneType",
        ),
        (
            {k: [{"role": "human", "content": Q}, v[1]] for k, v in WHOLE.items()},
            "message 0: found the role 'human', expected one of",
        ),
        (
            {k: [{"role": "tool", "content": Q}, v[1]] for k, v in WHOLE.items()},
            "found the role 'tool'",
        ),
        ({k: [{"content": Q}, v[1]] for k, v in WHOLE.items()}, "found the role None"),
        ({k: [{"role": 3, "content": Q}, v[1]] for k, v in WHOLE.items()}, "found the role 3"),
        (
            {k: [v[0], {**v[1], "tool_calls": [{"id": "1"}]}] for k, v in WHOLE.items()},
            r"message 1: found \['tool_calls'\] beside",
        ),
        (
            {
                k: [{"role": "user", "content": [{"type": "text", "text": Q}]}, v[1]]
                for k, v in WHOLE.items()
            },
            "message 0: found the content list .*; write its parts as one text",
        ),
        (
            {k: [{"from": "human", "value": Q}, {"from": "gpt", "value": k}] for k in WHOLE},
            "found the keys 'from' and 'value', expected 'role' and 'content'; rename",
        ),
        (
            {"chosen": ["a", "b"], "rejected": ["a", "c"]},
            "message 0: found 'a', expected a mapping",
        ),
        ({"chosen": {"a": 1}, "rejected": {"a": 1}}, "answers that are no text"),
        ({"chosen": "a b", "rejected": 4}, "answers that are no text"),
        ({"chosen": True, "rejected": False, "prompt": "a"}, "column 'chosen': found bool True"),
    ],
)
def test_rows_in_no_form_are_refused(tmp_path, row, what):
    fine = dict.fromkeys(row) | {"prompt": "A film", "chosen": " good", "rejected": " bad"}
    fine = fine if "prompt" in row else {"chosen": "A film is", "rejected": "A film was"}
    with pytest.raises(ValueError, match=f"row 1(: |, ).*{what}") as error:
        read(tmp_path, fine, row)
    assert "\n" not in str(error.value) and type(error.value) is ValueError
    assert len(read(tmp_path, fine, row, on_bad_rows="drop")) == 1


# ----------------------------------------------------------------------------------------------------- cells of messages


@pytest.mark.parametrize("write", [json.dumps, str, lambda v: json.dumps(v, indent=1)])
@pytest.mark.parametrize("name", ["train.csv", "train.jsonl", "train.parquet"])
def test_messages_in_a_cell(tmp_path, write, name):
    quoted = said(Q, 'A "bow\\line"; it\'s\ngood, é')
    row = {"chosen": write(quoted), "rejected": write(said(Q, BAD)), "user": "7"}
    frame = pd.DataFrame([row, row])
    {"csv": lambda f: frame.to_csv(f, index=False), "parquet": frame.to_parquet}.get(
        name[6:], lambda f: frame.to_json(f, orient="records", lines=True)
    )(tmp_path / name)
    found = load_preferences(tmp_path / name, ["user"])["train"].to_list()
    wanted = {"prompt": said(Q), "chosen": quoted[1]["content"], "rejected": BAD, "user": "7"}
    assert found == [wanted] * 2


@pytest.mark.parametrize(
    "cell",
    [
        str(np.array(said(Q, GOOD))),  # pandas of a list that it read from Parquet: no commas
        repr(np.array(said(Q, GOOD))),
        str(said(Q, GOOD))[:-3],
        json.dumps(json.dumps(said(Q, GOOD))),
        str(said(Q)[0]),
        "[{'role': 'user', 'content': __import__('os').getcwd()}]",
        "[{'role': 'user', 'content': " + "(" * 5000,
    ],
)
def test_cells_that_are_nearly_messages_are_refused(tmp_path, cell):
    for row in (
        {"prompt": Q, "chosen": cell, "rejected": BAD},
        {"chosen": cell, "rejected": cell + " "},
    ):
        with pytest.raises(ValueError, match="row 0, column 'chosen': found messages written as"):
            read(tmp_path, row)
    rows = datasets.Dataset.from_list([{"prompt": Q, "chosen": cell, "rejected": BAD}])
    with pytest.raises(ValueError, match="found messages written as a text"):
        Pairs.of(rows)


def test_brackets_are_text(tmp_path):
    row = {
        "prompt": "[INST] a list? [/INST]",
        "chosen": "[1, 2]",
        "rejected": '[{"role": "admin"}]',
    }
    assert read(tmp_path, row) == [row]


# ------------------------------------------------------------------------------------------------- texts without a prompt


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The film is good", "The film is great", "The film is"),
        ("The film", "The films", "The"),
        ("The film  was", "The film  is", "The film"),
        ("Who?\nAnn is.", "Who?\nAnd?", "Who?"),
        ("A film-maker", "A film-buff", "A"),
        ("I don't", "I don", "I"),
        ("Caf\u00e9 cafe\u0301s", "Caf\u00e9 cafe", "Caf\u00e9"),
        ("Say it now", "Say it\nnow", "Say it"),
        ("Good 👍🏽 yes", "Good 👍🏿 yes", "Good"),
        (HH + " Yes.", HH + " Yes, it is.", HH),
        (HH + " I think tea", HH + " I think not", HH),
        (HH + " Yes", HH + " Yes, of course", HH),
        (HH + "Yes", HH + "Yeah", HH),
        (HH[2:] + " Yes.", HH[2:] + " No.", HH[2:]),
        ("Talk.\n\n" + HH[2:] + " It is.", "Talk.\n\n" + HH[2:] + " It was.", "Talk.\n\n" + HH[2:]),
    ],
)
def test_the_prompt_that_both_begin_with(tmp_path, chosen, rejected, prompt):
    (row,) = read(tmp_path, {"chosen": chosen, "rejected": rejected})
    n = len(prompt)
    assert row == {"prompt": prompt, "chosen": chosen[n:], "rejected": rejected[n:]}


@given(st.text("ab \n'é", max_size=12), st.text("ab \n'é", max_size=12), st.text("ab ", max_size=9))
def test_no_word_is_cut(chosen, rejected, start):
    chosen, rejected = start + chosen, start + rejected
    try:
        prompt, *answers = split_texts(chosen, rejected)
    except ValueError:
        return
    assert [prompt + answer for answer in answers] == [chosen, rejected]
    assert not prompt[-1].isspace() and all(answer[0].isspace() for answer in answers)
    words = [text.split()[: len(prompt.split())] for text in (chosen, rejected)]
    assert words == [prompt.split()] * 2


@pytest.mark.parametrize(
    ("chosen", "rejected", "what"),
    [
        ("good", "bad", "no common beginning"),
        ("goodness", "good", "no common beginning"),
        ("", "bad", "column 'chosen': found ''"),
        ("The film", "The film", "chosen equals rejected"),
        ("The film is", "The film is good", "one answer is the beginning of the other"),
        ("The film ", "The film is", "one answer is the beginning of the other"),
        (HH + " Yes.", HH, "column 'rejected': found no words behind 'Assistant:'"),
        (HH + " Yes.", HH + " ", "column 'rejected': found no words"),
        (HH + " a\n\nHuman: b\n\nAssistant: c", HH + " d", "column 'chosen': found further turns"),
        (HH.replace("Tea.", "No.") + " a", HH + " b", "found further turns"),
        (HH.replace("coffee", "milk") + " a", HH + " b", "differ before the first 'Assistant:'"),
        (HH + " a", HH.removesuffix(":"), "found further turns"),
    ],
)
def test_texts_without_one_prompt_are_refused(tmp_path, chosen, rejected, what):
    with pytest.raises(ValueError, match=f"row 0.*{what}"):
        read(tmp_path, {"chosen": chosen, "rejected": rejected})


# -------------------------------------------------------------------------------------------------------- what a prompt is


def test_prompts_have_one_form():
    assert as_prompt("a") == "a" and as_prompt("") == ""
    pairs = (("system", "s"), ("user", "a"))
    for value in (
        messages(pairs),
        list(pairs),
        pairs,
        [{"role": "system", "content": "s", "x": None}, ("user", "a")],
    ):
        assert as_prompt(value) == pairs
    for value in (
        None,
        3,
        [],
        (),
        ["a"],
        {"role": "user", "content": "a"},
        [("user",)],
        [("user", 3)],
        ("user", "a"),
    ):
        with pytest.raises(ValueError, match="found .*expected"):
            as_prompt(value)


def test_keys_tell_all_texts_apart():
    lists = [
        [Text("a", "b", True)],
        [Text("a", "b", False)],
        [Text((("user", "a"),), "b", True)],
        [Text((("system", "a"),), "b", True)],
        [Text((("user", "a"), ("user", "a")), "b", True)],
        [Text('[["user","a"]]', "b", True)],
        [Text("a\x1fb", "c", True)],
        [Text("a", "b\x1fc", True)],
        [Text("a", "b\x1f1\x1ec\x1fd", True)],
        [Text("a", "b", True), Text("c", "d", True)],
        [Text("a", 'b",true]\n["c","d', True)],
        [Text("\ud800", "b", True)],
    ]
    assert len({Texts.of(texts).key for texts in lists}) == len(lists)
    assert Texts.of(lists[0]).key == Texts.of([Text("a", "b", True)]).key


def test_texts_and_conversations_are_sets_of_their_own(tmp_path):
    rows = [{"prompt": Q, "chosen": GOOD, "rejected": BAD}, {"prompt": said(Q), **ANSWERS}]
    with pytest.raises(
        ValueError, match="row 1, column 'prompt': found a conversation, expected a text as"
    ):
        read(tmp_path, *rows)
    assert [r["prompt"] for r in read(tmp_path, *rows, on_bad_rows="drop")] == [Q]
    assert [r["prompt"] for r in read(tmp_path, *rows[::-1], on_bad_rows="drop")] == [said(Q)]


def test_sets_in_memory(tmp_path):
    rows = datasets.Dataset.from_list([{"prompt": TURNS, "chosen": GOOD, "rejected": BAD}] * 2)
    assert check_preferences(rows, "mine") is rows
    assert Pairs.of(rows.with_format("numpy")).prompts == Pairs.of(rows).prompts
    with pytest.raises(ValueError, match="row 0, column 'prompt': found messages of .*'assistant'"):
        Pairs.of(
            datasets.Dataset.from_list([{"prompt": said(Q, "Hm"), "chosen": GOOD, "rejected": BAD}])
        )
    with pytest.raises(
        ValueError, match="row 0, column 'chosen': found list .*; explicit_prompts reads"
    ):
        Pairs.of(datasets.Dataset.from_list([{"prompt": Q, **WHOLE}]))


@pytest.mark.parametrize("before", [[SYSTEM, *said(Q)], TURNS])
def test_conversations_are_parted_as_trl_parts_them(before):
    from trl import extract_prompt

    row = {
        k: [*before, {"role": "assistant", "content": a}]
        for k, a in (("chosen", GOOD), ("rejected", BAD))
    }
    theirs = extract_prompt(row)
    ours = explicit_prompts(datasets.Dataset.from_list([row]))[0]
    assert ours["prompt"] == theirs["prompt"]
    assert [ours[k] for k in row] == [theirs[k][0]["content"] for k in row]


@pytest.mark.parametrize("asked", ["Which knot?", "Which  knot? "])
@pytest.mark.parametrize("first", [[], [{"role": "system", "content": "Be brief."}]])
def test_a_side_that_repeats_the_end_of_its_prompt_asks_once(first, asked):
    question = {"role": "user", "content": "Which knot?"}
    sides = {
        name: [{**question, "content": asked}, {"role": "assistant", "content": answer}]
        for name, answer in (("chosen", "A reef knot."), ("rejected", "None."))
    }
    prompt = explicit_row({"prompt": [*first, question], **sides})[0]
    assert prompt == tuple((one["role"], one["content"]) for one in [*first, question])
    sides["chosen"][0]["content"] = question["content"]  # blanks differ between the sides
    assert explicit_row({"prompt": [*first, question], **sides})[0] == prompt
