"""Artefacts: keys, atomic and verified entries, damage, a full disk, two processes."""

import errno
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixdpo_lib import store
from mixdpo_lib.store import MixDPOError

numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
plain = st.recursive(
    st.none() | st.booleans() | numbers | st.text(),
    max_leaves=8,
    extend=lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
    ),
)


def build_text(text, calls=None):
    def build(folder):
        if calls is not None:
            calls.append(folder)
        (folder / "part").mkdir()
        (folder / "part" / "a.txt").write_text(text)

    return build


@given(st.dictionaries(st.text(), plain, max_size=4))
def test_a_key_ignores_the_order_of_parameters(parameters):
    turned = dict(reversed(list(parameters.items())))
    key = store.artefact_key("stage", 1, parameters)
    assert key == store.artefact_key("stage", 1, turned)
    assert len(key) == 16 and int(key, 16) >= 0


def test_a_key_depends_on_everything_that_it_names():
    keys = {
        store.artefact_key(*arguments)
        for arguments in [
            ("a", 1, {"x": 1}),
            ("b", 1, {"x": 1}),
            ("a", 2, {"x": 1}),
            ("a", 1, {"x": 2}),
            ("a", 1, {"x": 1}, ["k"]),
        ]
    }
    assert len(keys) == 5
    assert store.artefact_key("a", 1, {"x": np.int64(1)}) == store.artefact_key("a", 1, {"x": 1})


@pytest.mark.parametrize("value", [{1, 2}, object(), float("nan")])
def test_a_value_without_a_stable_form_is_refused(value):
    with pytest.raises(ValueError, match="stage 'a'"):
        store.artefact_key("a", 1, {"x": value})


def test_an_entry_is_built_once_and_found_again(project):
    calls = []
    folder = store.cached("stage", 1, {"x": 1}, build_text("hello", calls))
    again = store.cached("stage", 1, {"x": 1}, build_text("hello", calls))
    assert folder == again and len(calls) == 1
    assert (folder / "part" / "a.txt").read_text() == "hello"
    record = store.read_json(folder / "artefact.json")
    assert record["stage"] == "stage" and record["parameters"] == {"x": 1}
    assert record["files"]["part/a.txt"]["bytes"] == 5
    assert f"stage/{folder.name}" in store.touched_artefacts()
    assert [p.name for p in folder.parent.iterdir() if ".part-" in p.name] == []


def damage_size(folder):
    (folder / "part" / "a.txt").write_text("hello, damaged")


def damage_content(folder):
    (folder / "part" / "a.txt").write_text("hallo")


def damage_missing(folder):
    (folder / "part" / "a.txt").unlink()


def damage_record(folder):
    (folder / "artefact.json").write_text('{"files": {')


def damage_half_written(folder):
    (folder / "artefact.json").unlink()


@pytest.mark.parametrize(
    "damage", [damage_size, damage_content, damage_missing, damage_record, damage_half_written]
)
def test_a_damaged_entry_is_refused_with_place_and_remedy(project, damage):
    folder = store.cached("stage", 1, {"x": 1}, build_text("hello"))
    damage(folder)
    with pytest.raises(MixDPOError) as caught:
        store.cached("stage", 1, {"x": 1}, build_text("hello"))
    message = str(caught.value)
    assert (
        str(folder) in message
        and "found" in message
        and "expected" in message
        and "delete this folder" in message
    )
    assert (
        "artefact.json"
        if "record" in damage.__name__ or "half" in damage.__name__
        else "part/a.txt"
    ) in message


def test_a_build_that_fails_leaves_nothing(project):
    def build(folder):
        (folder / "half").write_text("half")
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        store.cached("stage", 1, {}, build)
    assert [p for p in (project / "data" / "cache" / "stage").iterdir() if p.is_dir()] == []
    assert store.cached("stage", 1, {}, build_text("whole")).exists()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_while_building(project, error):
    def build(folder):
        (folder / "half").write_text("half")
        raise error

    with pytest.raises(MixDPOError, match="no space left.*MIXDPO_CACHE"):
        store.cached("stage", 1, {}, build)
    assert [p for p in (project / "data" / "cache" / "stage").iterdir() if p.is_dir()] == []


def test_a_full_disk_while_writing_json_keeps_the_old_file(tmp_path, monkeypatch):
    path = store.write_json_atomic(tmp_path / "a.json", {"x": 1})

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MixDPOError, match="no space left"):
        store.write_json_atomic(path, {"x": 2})
    assert store.read_json(path) == {"x": 1} and len(list(tmp_path.iterdir())) == 1


def test_what_a_killed_process_left_is_removed(project):
    key = store.artefact_key("stage", 1, {})
    left = project / "data" / "cache" / "stage" / f"{key}.part-99999"
    left.mkdir(parents=True)
    (left / "half").write_text("half")
    folder = store.cached("stage", 1, {}, build_text("whole"))
    assert not left.exists() and not (folder / "half").exists()


def test_two_processes_share_one_entry(project):
    code = (
        "import sys, time\nfrom mixdpo_lib import store\n"
        "def build(folder):\n"
        "    print('built', flush=True); time.sleep(1.0); (folder / 'a').write_text('x' * 1000)\n"
        "print(store.cached('stage', 1, {'x': 1}, build))\n"
    )
    both = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=60)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum("built" in text for text in said) == 1
    assert said[0].splitlines()[-1] == said[1].splitlines()[-1]


@pytest.mark.parametrize("content", [None, "{", ""])
def test_read_json_has_one_clear_error(tmp_path, content):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(MixDPOError, match="a.json"):
        store.read_json(path)


# ---------------------------------------------------------------------------------------------- records are checked


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "expected an object with"),
        ("3", "expected an object with"),
        ('{"files": {}}', "stage: found no such key"),
        ({"files": [[1, 2]]}, r"files: found \[\[1, 2\]\], expected an object"),
        ({"files": {}}, r"part/a.txt: found a file that the record does not list"),
        ({"files": {"part/a.txt": {}}}, "sha256: found no such key"),
        ({"files": {"part/a.txt": 1}}, "expected an object with sha256, bytes"),
        ({"files": {"part/a.txt": {"sha256": "x", "bytes": 5}}}, "expected 64 hex digits"),
        ({"files": {"../a.txt": {"sha256": "0" * 64, "bytes": 5}}}, "a path inside the folder"),
        ({"files": {"part/a.txt": {"sha256": "0" * 64, "bytes": "5"}}}, "bytes: found .5."),
        ({"stage": "another"}, "found what has the key"),
        ({"version": 2}, "found what has the key"),
        ({"parameters": {"x": 2}}, "found what has the key"),
        ({"inputs": ["other"]}, "found what has the key"),
        ({"inputs": None}, "inputs: found null, expected a list"),
    ],
)
def test_a_record_of_another_shape_or_key_is_refused(project, content, message):
    folder = store.cached("stage", 1, {"x": 1}, build_text("hello"))
    path = folder / "artefact.json"
    if isinstance(content, str):
        path.write_text(content)
    else:
        store.write_json_atomic(path, store.read_json(path) | content)
    with pytest.raises(MixDPOError, match=message) as caught:
        store.cached("stage", 1, {"x": 1}, build_text("hello"))
    assert str(folder) in str(caught.value) and "delete this folder" in str(caught.value)


def test_a_record_gives_its_key_back_whatever_the_parameters(project):
    parameters = {"by number": {10: 1, 2: 0.1}, "none": None, "array": np.float64(0.25), "t": (1,)}
    folder = store.cached("stage", 1, parameters, build_text("hello"))
    assert store.verify_artefact(folder)["stage"] == "stage"
    (folder / ".hidden").touch()  # of a file browser
    store.verify_artefact(folder)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.EFBIG, "File too large"), "a file is larger than may be written"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "the quota of the disk is used up"),
        (RuntimeError("Error while serializing: I/O error: File too large"), "a file is larger"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos"), "no space"),
        (RuntimeError("basic_ios::clear: iostream error"), "no space left on the device"),
    ],
)
def test_a_place_that_takes_no_more(tmp_path, error, said):
    with pytest.raises(MixDPOError, match=f"{said}.*nothing half-written was kept"):
        with store.writing_to(tmp_path):
            raise error
    with pytest.raises(MixDPOError, match=f"whole: {said}"):  # and so for all that is written whole
        with store.whole_folder(tmp_path / "whole") as place:
            (place / "half").touch()
            raise error
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_removed_in_one_step(tmp_path):
    for name in (".gone-a-1", "a", "ab"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    store.remove_folder(tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["ab"]
    store.remove_folder(tmp_path / "a")
    store.remove_folder(tmp_path / "nowhere" / "a")
