"""Missing is never a value, and a name is what was written."""

import json

import datasets
import pytest

from mixdpo_lib.data.files import load_preferences
from mixdpo_lib.data.pairs import Pairs
from mixdpo_lib.gates.user import UserGate

HEAD = "prompt,chosen,rejected"


def table(tmp_path, *values, head="user", **options):
    """A CSV file with one more column."""
    file = tmp_path / "train.csv"
    lines = [f"Film {i}, good, bad,{value}" for i, value in enumerate(values)]
    file.write_text("\n".join([f"{HEAD},{head}", *lines]) + "\n")
    return load_preferences(file, **options)["train"]


def in_memory(*values, **types):
    rows = [
        {"prompt": f"Film {i}", "chosen": " good", "rejected": " bad", "user": v}
        for i, v in enumerate(values)
    ]
    return Pairs.of(datasets.Dataset.from_list(rows))


WORDS = [
    "NA",
    "None",
    "null",
    "nan",
    "N/A",
    "#N/A",
    "NULL",
    "-",
    "true",
    "1",
    "1.0",
    "007",
    "7",
    "+7",
    "1e3",
    "-0",
]


@pytest.mark.parametrize("head", ["user", "person"])
def test_names_in_a_table_stay_what_was_written(tmp_path, head):
    for words in (
        WORDS,
        ["007", "7"],
        ["1", "2"],
        ["1.0", "1.10"],
        ["NA", "None"],
        ["true", "false"],
    ):
        found = table(tmp_path, *words, head=head, columns=[head])
        assert found[head][:] == words and Pairs.of(found).units(head)[1] == words


def test_words_of_a_table_are_texts(tmp_path):
    (tmp_path / "train.csv").write_text(f"{HEAD},more\n1,2,3,\nNA,null,None,x\n007,1.0,1e3,\n")
    found = load_preferences(tmp_path)["train"]
    assert [list(row.values()) for row in found.to_list()] == [
        ["1", "2", "3", None],
        ["NA", "null", "None", "x"],
        ["007", "1.0", "1e3", None],
    ]


@pytest.mark.parametrize(
    ("words", "values"),
    [
        (["34", "0", "-5"], [34, 0, -5]),
        (["34", "", "5"], [34, None, 5]),
        (["8.50", "3", "-1e-3"], [8.5, 3.0, -0.001]),
        (["34", "007"], ["34", "007"]),
        (["34", "NA"], ["34", "NA"]),
        (["8.5", "nan"], ["8.5", "nan"]),
        (["1_000", "٣"], ["1_000", "٣"]),
        (["123456789012345678901", "1"], ["123456789012345678901", "1"]),
        (["", ""], [None, None]),
    ],
)
def test_other_columns_of_a_table_are_numbers_where_all_cells_are(tmp_path, words, values):
    found = table(tmp_path, *words, head="age")["age"][:]
    assert found == values and [type(v) for v in found] == [type(v) for v in values]


@pytest.mark.parametrize("empty", ["", '""', " ", "\t"])
def test_an_empty_cell_is_nobody(tmp_path, empty):
    with pytest.raises(
        ValueError,
        match=r"train.csv \(train\): 2 of 3 rows .*row 0, column 'user': found '.*row 2, column 'user'",
    ):
        table(tmp_path, empty, "ann", empty, columns=["user"])
    assert table(tmp_path, empty, "ann", empty, columns=["user"], on_bad_rows="drop")["user"][
        :
    ] == ["ann"]
    pairs = Pairs.of(table(tmp_path, empty, "ann", empty))
    with pytest.raises(
        ValueError,
        match="2 of 3 rows .*row 0, column 'user': found .*; fill it in|row 2, .*latent=",
    ):
        pairs.units("user")


@pytest.mark.parametrize(
    ("values", "row"),
    [
        ([None, "None"], 0),
        (["ann", ""], 1),
        (["ann", " "], 1),
        ([1, None], 1),
        ([1.0, float("nan")], 0),
        ([float("nan"), 1.5], 0),
        ([True, None], 1),
        ([["ann"], ["ben"]], 0),
        ([{"name": "ann"}, {"name": "ben"}], 0),
    ],
)
def test_units_in_memory_are_names(values, row):
    pairs = in_memory(*values)
    with pytest.raises(
        ValueError,
        match=f"preference set: .*row {row}, column 'user': found .*expected a (text|value)",
    ):
        pairs.units("user")


def test_whole_numbers_and_booleans_are_named_in_one_way(tmp_path):
    assert in_memory(1, 2, 1).units("user")[1] == ["1", "2"]
    ids, names = in_memory(True, False, True).units("user")
    assert ids.tolist() == [0, 1, 0] and names == ["true", "false"]
    rows = in_memory(3, 4, 3).rows.with_format("torch")
    assert Pairs.of(rows).units("user")[1] == ["3", "4"]
    (tmp_path / "train.jsonl").write_text(
        "".join(
            f'{{"prompt": "a", "chosen": "b", "rejected": "c", "user": {user}}}\n'
            for user in (1, 2)
        )
    )
    found = load_preferences(tmp_path, columns=["user"])["train"]
    assert Pairs.of(found).units("user")[1] == ["1", "2"]


@pytest.mark.parametrize("user", ["null", '""', "NaN", '" "'])
def test_missing_names_in_typed_files(tmp_path, user):
    lines = [
        f'{{"prompt": "a", "chosen": "b", "rejected": "c", "user": {u}}}\n' for u in ('"x"', user)
    ]
    if user == "NaN":
        lines[0] = lines[0].replace('"x"', "1.5")
    (tmp_path / "train.jsonl").write_text("".join(lines))
    with pytest.raises(ValueError, match="row 1, column 'user': found .*a missing one is nobody's"):
        load_preferences(tmp_path, columns=["user"])
    (tmp_path / "train.jsonl").write_text(
        lines[0] + '{"prompt": "a", "chosen": "b", "rejected": "c"}\n'
    )
    with pytest.raises(ValueError, match="row 1, column 'user': found NoneType"):
        load_preferences(tmp_path, columns=["user"])


def test_one_column_holds_one_kind(tmp_path):
    lines = [
        f'{{"prompt": "a", "chosen": "b", "rejected": "c", "user": {u}}}\n' for u in ("1", '"1"')
    ]
    (tmp_path / "train.jsonl").write_text("".join(lines))
    with pytest.raises(
        ValueError, match="column 'user': found values of int, str that are no one column"
    ):
        load_preferences(tmp_path)


def test_ended_is_true_or_false(tmp_path):
    words = ["true", "False", "1", "0", "yes", "NO"]
    found = table(tmp_path, *words, head="ended")
    assert found["ended"][:] == [True, False, True, False, True, False]
    assert [Pairs.of(found).texts.texts[i].ended for i in Pairs.of(found).index[:, 0]] == found[
        "ended"
    ][:]
    for word in ("", "maybe", "2", "t", "1.0", "None"):
        with pytest.raises(
            ValueError, match="row 1, column 'ended': found .*, expected true or false"
        ):
            table(tmp_path, "true", word, head="ended")
        assert table(tmp_path, "no", word, "1", head="ended", on_bad_rows="drop")["ended"][:] == [
            False,
            True,
        ]
    for value in ('"False"', "null", "0", "1", "0.0", "[]"):
        row = f'{{"prompt": "a", "chosen": "b", "rejected": "c", "ended": {value}}}\n'
        (tmp_path / "other.jsonl").write_text(row.replace(value, "true") + row)
        with pytest.raises(
            ValueError, match="row 1, column 'ended': found .*, expected true or false"
        ):
            load_preferences(tmp_path / "other.jsonl")
    for value in ("no", None, 0):
        rows = [{"prompt": "a", "chosen": "b", "rejected": "c", "ended": value}]
        with pytest.raises(ValueError, match="row 0, column 'ended'"):
            Pairs.of(datasets.Dataset.from_list(rows))


def test_names_that_differ_in_spaces_or_capitals_alone_are_told(tmp_path, capsys):
    row = {"prompt": "Which knot?", "chosen": " a bowline", "rejected": " rope"}
    write = [{**row, "user": user, "country": "NL"} for user in ("Ann", "bo", "Ann ", "BO", "cy")]
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps(one) for one in write))
    (tmp_path / "test.jsonl").write_text(json.dumps({**row, "user": "cy", "country": "nl"}))
    sets = load_preferences(tmp_path, ["country"])
    assert list(sets) == ["train", "test"]  # the training pairs first, also in what is refused
    told = capsys.readouterr().err
    assert "column 'user': 'Ann' and 'Ann ', 'bo' and 'BO' (2 in all) differ in spaces" in told
    assert "column 'country': 'NL' and 'nl' (1 in all)" in told
    assert "'cy'" not in told and len(told.strip().splitlines()) == 2
    many = [{**row, "user": f"{u}{i}"} for i in range(40) for u in ("a", "A")]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, many)))
    load_preferences(tmp_path / "train.jsonl")
    told = capsys.readouterr().err
    assert "'a9' and 'A9' ... (40 in all)" in told and "'a10'" not in told


def test_nobody_is_no_name_that_nearly_agrees(tmp_path):
    row = {"prompt": "Which knot?", "chosen": " a bowline", "rejected": " rope"}
    rows = [{**row, "user": user} for user in ("ann", None, "bo")]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert load_preferences(tmp_path)["train"]["user"] == ["ann", None, "bo"]


def test_numbers_but_for_a_few_are_told_and_no_gate_takes_them_for_kinds(tmp_path, capsys):
    found = table(tmp_path, "31", "forty", "28", "nan", "55", "31", head="age")
    said = capsys.readouterr().err
    assert "train.csv (train), column 'age': numbers but for 'forty' (row 1) and 1 more; " in said
    with pytest.raises(
        ValueError, match=r"metadata row 1, column 'age': found 'forty' among texts"
    ):
        UserGate.from_metadata({"age": found["age"]}, 2)
    table(tmp_path, "31", "28", head="age")
    table(tmp_path, "north", "7", "south", head="town")  # mostly names
    table(tmp_path, "31", "forty", "28", head="age", columns=["age"])  # text is meant
    assert "numbers but" not in capsys.readouterr().err
    assert UserGate.from_metadata({"zip": ["007", "12", "99"]}, 2).columns == {
        "zip": ["007", "12", "99"]
    }
