"""Files, folders and clones as they are published: which are read, under which part, and whatever they are called."""

import gzip
import json
import os

import datasets
import pandas as pd
import pytest

from mixdpo_lib.data.files import load_preferences
from mixdpo_lib.data.tables import file_kind

ROWS = [
    {"prompt": f"Film {i}", "chosen": " good", "rejected": " bad", "user": f"u{i % 3}"}
    for i in range(7)
]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
NAMES = [
    "a [x]",
    "*",
    "what?",
    "{a,b}",
    'it\'s "so"',
    "été 日本 👍",
    "a b ",
    "train[0-9]",
    "100%",
    "http:",
    "zip::x",
    "user=3",
    "$HOME",
    "a\nb",
    "~",
    "#1",
    "train.csv",
]


def write(file, rows=ROWS):
    """The rows in the format that the file's ending says."""
    data = datasets.Dataset.from_list(rows)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    kind = (file_kind(file) or "")[1:]
    file.parent.mkdir(parents=True, exist_ok=True)
    if kind == "parquet":
        with open(file, "wb") as opened:
            data.to_parquet(opened)
    elif kind == "csv":
        with open(file, "wb") as opened:
            data.to_csv(opened)
    elif kind == "csv.gz":
        file.write_bytes(gzip.compress(data.to_pandas().to_csv(index=False).encode()))
    elif kind == "json":
        file.write_text(json.dumps(rows, indent=1))
    elif kind.endswith(".gz"):
        file.write_bytes(gzip.compress(lines.encode()))
    else:
        file.write_text(lines, encoding="utf-8")


def sizes(found):
    return {name: len(part) for name, part in found.items()}


@pytest.fixture(autouse=True)
def no_cache(tmp_path_factory, monkeypatch):
    """Nothing is written beside what is read."""
    place = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("MIXDPO_CACHE", str(place))
    yield
    assert not list(place.iterdir())


@pytest.mark.parametrize(
    "kind", ["parquet", "csv", "json", "jsonl", "csv.gz", "json.gz", "jsonl.gz", "JSONL", "Csv.GZ"]
)
def test_every_ending(tmp_path, kind):
    write(tmp_path / "set" / f"test.{kind}")
    before = sorted(os.walk(tmp_path))
    assert load_preferences(tmp_path / "set" / f"test.{kind}")["train"].to_list() == ROWS
    assert load_preferences(tmp_path / "set")["test"].to_list() == ROWS
    assert sorted(os.walk(tmp_path)) == before


@pytest.mark.parametrize("name", NAMES)
def test_a_path_is_never_a_pattern(tmp_path, monkeypatch, name):
    for kind in ("parquet", "csv", "jsonl"):
        write(tmp_path / name / kind / f"{name}.{kind}")
        write(tmp_path / name / kind / f"0.{kind}", ROWS[:2])  # what a pattern could mean
        file = tmp_path / name / kind / f"{name}.{kind}"
        assert load_preferences(file)["train"].to_list() == ROWS
        assert load_preferences(str(file))["train"].to_list() == ROWS
        assert sizes(load_preferences(file.parent)) == {"0": 2, name: 7}
    (tmp_path / "saved").mkdir()
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved").rename(tmp_path / f"s {name}")
    assert load_preferences(tmp_path / f"s {name}")["train"].to_list() == ROWS
    monkeypatch.chdir(tmp_path)
    assert sizes(load_preferences(f"{name}/csv")) == {"0": 2, name: 7}


def test_a_folder_of_parts(tmp_path):
    for name in ("train.jsonl", "validation.csv", "test.parquet"):
        write(tmp_path / name)
    for name in (
        "README.md",
        "LICENSE",
        ".gitattributes",
        "notes.txt",
        ".hidden.jsonl",
        "dataset_infos.json",
    ):
        (tmp_path / name).write_text("{not data")
    write(tmp_path / "data" / "raw.csv", ROWS[:1])
    (tmp_path / "folder.csv").mkdir()
    assert sizes(load_preferences(tmp_path)) == {"test": 7, "train": 7, "validation": 7}


@pytest.mark.parametrize("inside", ["", "data"])
@pytest.mark.parametrize("mark", ["", "-0123456789abcdef"])
def test_a_clone_of_shards(tmp_path, inside, mark):
    folder = tmp_path / inside
    for part, n in (("train_prefs", 3), ("test_prefs", 1)):
        for i in range(n):
            write(folder / f"{part}-{i:05}-of-{n:05}{mark}.parquet", ROWS[2 * i : 2 * i + 2])
    (tmp_path / "README.md").write_text("---\nconfigs: []\n---\n")
    (tmp_path / "dataset_infos.json").write_text("{}")
    found = load_preferences(tmp_path, columns=["user"])
    assert found["train_prefs"].to_list() == ROWS[:6] and found["test_prefs"].to_list() == ROWS[:2]
    (one,) = load_preferences(folder / f"train_prefs-00001-of-00003{mark}.parquet").items()
    assert one[0] == "train" and one[1].to_list() == ROWS[2:4]
    (folder / f"train_prefs-00001-of-00003{mark}.parquet").unlink()
    with pytest.raises(
        ValueError,
        match="found 2 shards of 'train_prefs', expected 3; missing: train_prefs-00001-of-00003.parquet",
    ):
        load_preferences(tmp_path)


def test_shards_are_in_order_and_alike(tmp_path):
    for i in range(11):
        write(tmp_path / f"train-{i}-of-11.jsonl.gz", [ROWS[i % 7] | {"n": i}])
    assert load_preferences(tmp_path)["train"]["n"][:] == list(range(11))
    write(tmp_path / "train-4-of-11.jsonl.gz", ROWS[:1])
    with pytest.raises(ValueError, match="expected the same in all files of one part"):
        load_preferences(tmp_path)
    write(tmp_path / "train-4-of-11.jsonl.gz", [ROWS[0] | {"n": "four"}])
    with pytest.raises(ValueError, match="columns that cannot be kept .*; write every column with"):
        load_preferences(tmp_path)


@pytest.mark.parametrize(
    "names",
    [
        ["train.csv", "train.jsonl"],
        ["train.jsonl", "train.jsonl.gz"],
        ["train.parquet", "train-00000-of-00001.parquet"],
        ["train-00000-of-00001.parquet", "train-00000-of-00001.csv"],
        ["train-00000-of-00001.csv", "train-00000-of-00002.csv", "train-00001-of-00002.csv"],
        ["train-00000-of-00001.csv", "train-00000-of-00001-0123456789abcdef.csv"],
    ],
)
def test_two_files_for_one_part_are_refused(tmp_path, names):
    for name in names:
        write(tmp_path / name)
    with pytest.raises(
        ValueError, match="found train.* and train.* for the part 'train', expected"
    ):
        load_preferences(tmp_path)


def test_shards_with_odd_numbers_are_refused(tmp_path):
    write(tmp_path / "train-00001-of-00001.csv")
    with pytest.raises(
        ValueError, match="found 1 shards of 'train', expected 1; missing: train-00000-of-00001.csv"
    ):
        load_preferences(tmp_path)


def test_saved_shards(tmp_path):
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(tmp_path / "one", num_shards=3)
    assert load_preferences(tmp_path / "one")["train"].to_list() == ROWS
    datasets.DatasetDict({"train": data, "my part": data.select([0])}).save_to_disk(
        tmp_path / "all"
    )
    assert sizes(load_preferences(tmp_path / "all")) == {"train": 7, "my part": 1}
    (tmp_path / "one" / "data-00001-of-00003.arrow").unlink()
    with pytest.raises(
        ValueError, match="found no file 'data-00001-of-00003.arrow', which state.json"
    ):
        load_preferences(tmp_path / "one")
    for content in (
        "{",
        "[]",
        "{}",
        '{"_data_files": 3}',
        '{"_data_files": [1]}',
        '{"_data_files": []}',
        "\0",
    ):
        (tmp_path / "one" / "state.json").write_text(content)
        with pytest.raises(ValueError, match="one.*save the set again"):
            load_preferences(tmp_path / "one")
    (tmp_path / "one" / "state.json").unlink()
    with pytest.raises(ValueError, match="state.json: not readable"):
        load_preferences(tmp_path / "one")


def test_places_without_data(tmp_path):
    write(tmp_path / "harmless" / "train.jsonl.gz")
    with pytest.raises(FileNotFoundError, match="its folders harmless have some: name one"):
        load_preferences(tmp_path)
    (tmp_path / "notes.txt").write_text(LINES)
    for place in (
        "notes.txt",
        "*",
        "harm*",
        "",
        "nowhere/train.csv",
        "harmless/train.jsonl.gz/x",
        "a\0b",
    ):
        with pytest.raises(FileNotFoundError, match="no preference data found"):
            load_preferences(tmp_path / place)
    with pytest.raises(ValueError, match="cannot be looked at"):
        load_preferences(tmp_path / ("x" * 5000))


def test_what_may_be_asked(tmp_path):
    write(tmp_path / "train.csv")
    with pytest.raises(ValueError, match="on_bad_rows='skip': expected 'raise' or 'drop'"):
        load_preferences(tmp_path, on_bad_rows="skip")
    with pytest.raises(
        ValueError, match=r"columns='user': expected a list of names; write \['user'\]"
    ):
        load_preferences(tmp_path, columns="user")


def test_an_index_of_pandas_and_categories(tmp_path):
    frame = pd.DataFrame(ROWS).astype({"user": "category"})
    frame.to_csv(tmp_path / "index.csv")
    frame.to_parquet(tmp_path / "index.parquet")
    for found in (
        load_preferences(tmp_path / "index.csv"),
        load_preferences(tmp_path / "index.parquet"),
    ):
        assert found["train"].select_columns(list(ROWS[0])).to_list() == ROWS


def test_bad_rows_are_counted_and_may_be_dropped(tmp_path, capsys):
    for part in ("test", "train"):
        rows = [row | {"chosen": " bad"} if i % 4 < 3 else row for i, row in enumerate(ROWS * 2)]
        write(tmp_path / f"{part}.jsonl", rows)
    with pytest.raises(
        ValueError, match="22 of 28 rows cannot be used, the first 10: row 0: chosen equals"
    ) as error:
        load_preferences(tmp_path)
    said = str(error.value)
    assert said.count("chosen equals rejected") == 10 and "train.jsonl (train): 22" in said
    assert "row 12: " in said and "on_bad_rows='drop'" in said and "\n" not in said
    found = load_preferences(tmp_path, on_bad_rows="drop")
    assert sizes(found) == {"test": 3, "train": 3} and found["train"].to_list() == [
        ROWS[3],
        ROWS[0],
        ROWS[4],
    ]
    assert "[mixdpo] dropped 22 of 28 rows: " in capsys.readouterr().err
    write(tmp_path / "test.jsonl", [ROWS[0] | {"chosen": ""}])
    with pytest.raises(
        ValueError, match=r"\(test\): no row is left, expected at least one.*row 0, column 'chosen'"
    ):
        load_preferences(tmp_path, on_bad_rows="drop")
