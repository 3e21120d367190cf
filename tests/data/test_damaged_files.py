"""Files that are not what their ending says: one clear error, whatever their bytes."""

import gzip
import json

import datasets
import pytest
from mutations import TEXTS, originals, trouble

from mixdpo_lib.data.files import load_preferences

ROW = '{"prompt": "a", "chosen": "b", "rejected": "c"}'
HEAD = "prompt,chosen,rejected"
DEEP = "[" * 900 + "]" * 900


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("a.jsonl", ROW + "\n{", "line 2: .*expected a row as an object in each line"),
        ("a.jsonl", ROW + "\n3\n", "row 1: found int, expected an object"),
        ("a.jsonl", f"{ROW}\n[{ROW}]", "row 1: found list"),
        ("a.jsonl", ROW[:-1] + ', "prompt": "d"}', "line 1: the key 'prompt' stands twice"),
        ("a.jsonl", '{"prompt": ' + "[" * 100_000, "line 1: "),
        ("a.jsonl", ROW[:-1] + ', "n": ' + "9" * 5000 + "}", "line 1: "),
        ("a.jsonl", ROW[:-1] + ', "n": ' + "9" * 30 + "}", "column 'n': found values of int"),
        ("a.jsonl", ROW[:-1] + ', "x": "\\ud800"}', "column 'x'"),
        ("a.jsonl", ROW[:-1] + ', "\\ud800": 1}', "has half a character"),
        ("a.jsonl", "", "the file is empty"),
        ("a.jsonl", "\n \n", "the file is empty"),
        ("a.json", "[]", "the file is empty"),
        ("a.json", '[{"prompt": "a"}', "Expecting"),
        ("a.json", "[1]", "row 0: found int"),
        ("a.json", '{\n "prompt": "a"\n}', "line 1: "),
        ("a.json", "null", "row 0: found NoneType"),
        ("a.jsonl", b"\xff\xfe{", "byte 0 is no UTF-8; save the file as UTF-8"),
        ("a.csv", f"{HEAD}\na,b,c\n".encode("utf-16"), "byte 0 is no UTF-8"),
        ("a.csv", f"{HEAD}\na,b,caf\xe9\n".encode("latin-1"), "byte 30 is no UTF-8"),
        ("a.csv", f"{HEAD}\na,b,c\na,b\n", "line 3, row 1: found 2 fields, expected 3"),
        (
            "a.csv",
            f"{HEAD}\na,b,c,d\n",
            "line 2, row 0: found 4 fields, expected 3; a text with commas",
        ),
        ("a.csv", f"{HEAD},prompt\na,b,c,d\n", "the column 'prompt' stands twice"),
        ("a.csv", f'{HEAD}\na,b,"c\n', "unexpected end of data"),
        ("a.csv", f'{HEAD}\na,"b"b,c\n', "expected after"),
        ("a.csv", "", "the file is empty"),
        ("a.csv.gz", gzip.compress(b"prompt", mtime=0)[:-4], "end-of-stream"),
        ("a.csv.gz", HEAD, "Not a gzipped file"),
        (
            "a.jsonl.gz",
            gzip.compress(ROW.encode(), mtime=0)[:12] + b"\x00" * 20,
            ".",
        ),
        ("a.parquet", "PAR1", "."),
        ("a.parquet", "", "."),
        (
            "a.csv",
            "version https://git-lfs.github.com/spec/v1\noid",
            "a pointer of git-lfs, .* git lfs pull",
        ),
        ("a.arrow", "ARROW1", "."),
        ("a.arrow", "", "."),
    ],
)
def test_unreadable_files(tmp_path, name, content, what):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    wanted = (
        rf"{name}: not readable as {name[1:]} \(.*{what}.*\); expected one row a pair with text"
    )
    for drop in ("raise", "drop"):
        with pytest.raises(ValueError, match=wanted) as error:
            load_preferences(file, on_bad_rows=drop)
        assert "\n" not in str(error.value) and type(error.value) is ValueError


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (
            '{"prompt": "a", "chosen": "b", "rejected": "\\ud83d"}',
            "column 'rejected': found half of a",
        ),
        (
            f'{{"prompt": "a", "chosen": {DEEP}, "rejected": {DEEP}}}',
            "column 'chosen': message 0",
        ),
        (
            ROW[:-1] + f', "x": {DEEP}}}',
            "columns that cannot be kept",
        ),
        ('{"chosen": "b", "rejected": NaN}', "row 0: no column 'prompt', and answers"),
        ('{"prompt": "a", "chosen": "b"}', "column 'rejected' is missing; found"),
        ("{}", "column 'chosen' is missing; found"),
    ],
)
def test_odd_rows(tmp_path, content, what):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ValueError, match=rf"a.jsonl( \(train\))?: .*{what}"):
        load_preferences(tmp_path / "a.jsonl")


def test_a_table_without_rows_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text(HEAD + "\n")
    with pytest.raises(ValueError, match=r"a.csv \(train\): no row is left, expected at least one"):
        load_preferences(tmp_path / "a.csv")


def test_columns_that_stand_twice_in_parquet(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = [pa.array([c]) for c in "abcd"]
    pq.write_table(pa.table(texts, names=[*HEAD.split(","), "chosen"]), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="the column 'chosen' stands twice"):
        load_preferences(tmp_path / "a.parquet")


def test_marks_ends_and_long_cells(tmp_path):
    long = "word " * 60_000
    rows = [{"prompt": "a\r\nb", "chosen": 'c "d", e\u2028f', "rejected": long}]
    for name, text in {
        "a.jsonl": "\ufeff" + json.dumps(rows[0], ensure_ascii=False) + "\r\n\r\n",
        "a.json": "\ufeff" + json.dumps(rows, ensure_ascii=False),
        "a.csv": f'\ufeff{HEAD}\r\n"a\r\nb","c ""d"", e\u2028f",{long}\r\n\r\n',
    }.items():
        (tmp_path / name).write_bytes(text.encode())
        assert load_preferences(tmp_path / name)["train"].to_list() == rows, name


def test_the_files_are_whole_before_they_are_damaged(tmp_path):
    for name, content in originals(tmp_path).items():
        file = tmp_path / f"whole-{name}"
        file.write_bytes(content)
        found = load_preferences(file)["train"]
        if name.startswith("texts"):
            assert found.to_list() == TEXTS, name
        else:
            assert found["prompt"][:] == [
                [{"role": "user", "content": f"Film {i}?"}] for i in range(3)
            ]
            assert set(found["chosen"]) == {"Good."} and isinstance(found, datasets.Dataset)


def test_damaged_files_give_clear_errors_or_whole_sets(tmp_path):
    found, read = trouble(tmp_path, 600)
    assert not found and 15 < read < 585


@pytest.mark.parametrize("mark, word", [(";", "semicolons"), ("\t", "tabs")])
def test_fields_that_are_parted_otherwise(tmp_path, mark, word):
    (tmp_path / "a.csv").write_text(f"prompt{mark}chosen{mark}rejected\na{mark}b{mark}c\n")
    with pytest.raises(ValueError, match=f"missing; .*fields are parted by {word}: save it with"):
        load_preferences(tmp_path / "a.csv")


def test_columns_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="columns=None: expected a list of names; leave it out"):
        load_preferences(tmp_path, columns=None)
