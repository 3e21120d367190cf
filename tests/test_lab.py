"""`make lab` works on copies: what somebody changed is kept, what nobody changed is renewed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import lab  # noqa: E402


def write(path, source, outputs=()):
    cell = {"cell_type": "code", "source": [source], "outputs": list(outputs)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"cells": [cell]}))


def source(path):
    return json.loads(path.read_text())["cells"][0]["source"][0]


@pytest.fixture
def folders(tmp_path):
    write(tmp_path / "notebooks" / "a.ipynb", "1")
    write(tmp_path / "notebooks" / "theory" / "b.ipynb", "1")
    assert list(lab.copy_notebooks(tmp_path / "notebooks", tmp_path / "lab")) == []
    return tmp_path / "notebooks", tmp_path / "lab"


def test_every_notebook_is_copied_once(folders):
    notebooks, copies = folders
    assert source(copies / "a.ipynb") == source(copies / "theory" / "b.ipynb") == "1"
    write(copies / "a.ipynb", "1", ["an output"])  # it was run
    assert list(lab.copy_notebooks(notebooks, copies)) == []
    assert "an output" in (copies / "a.ipynb").read_text()


def test_what_somebody_changed_is_kept_and_the_newer_version_lies_beside_it(folders):
    notebooks, copies = folders
    write(copies / "a.ipynb", "mine")
    assert list(lab.copy_notebooks(notebooks, copies)) == []  # nothing newer
    write(notebooks / "a.ipynb", "2")
    (said,) = lab.copy_notebooks(notebooks, copies)
    assert "which you changed" in said and source(copies / "a.ipynb") == "mine"
    assert source(copies / "a.new.ipynb") == "2"
    assert list(lab.copy_notebooks(notebooks, copies)) == []  # said once


def test_what_nobody_changed_is_renewed_and_that_is_said(folders):
    notebooks, copies = folders
    write(notebooks / "a.ipynb", "2")
    (said,) = lab.copy_notebooks(notebooks, copies)
    assert said.startswith("renewed") and source(copies / "a.ipynb") == "2"


def test_a_copy_that_cannot_be_read_counts_as_changed(folders):
    notebooks, copies = folders
    (copies / "a.ipynb").write_text("{")
    write(notebooks / "a.ipynb", "2")
    (said,) = lab.copy_notebooks(notebooks, copies)
    assert "which you changed" in said and (copies / "a.ipynb").read_text() == "{"


@pytest.mark.parametrize("user, expected", [(0, True), (1000, False)])
def test_lab_opens_the_whole_project_for_root_too(monkeypatch, tmp_path, user, expected):
    called = []
    monkeypatch.setattr(os, "geteuid", lambda: user)
    monkeypatch.setattr(os, "execv", lambda path, words: called.append(words))
    monkeypatch.setattr(os, "chdir", lambda path: None)
    monkeypatch.setattr(lab, "ROOT", tmp_path)
    write(tmp_path / "notebooks" / "00_start_here.ipynb", "1")
    lab.main(["mine", "--no-browser"])
    (words,) = called
    assert f"--ServerApp.root_dir={tmp_path}" in words and words[-1] == "--no-browser"
    assert ("--allow-root" in words) == expected and (
        tmp_path / "mine" / "00_start_here.ipynb"
    ).exists()


def test_copies_and_screenshots_are_no_part_of_the_project():
    for place in ("lab/00_start_here.ipynb", "lab-browser/a.ipynb", "screenshots/a.png"):
        done = subprocess.run(["git", "check-ignore", "-q", place], cwd=ROOT)
        assert done.returncode in (0, 128), place  # 128: no checkout of git
