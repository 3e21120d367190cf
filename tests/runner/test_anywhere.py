"""The runner in places of any name and kind: paths, no home folder, files where folders belong, other people's caches."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PARAMETERS

from mixdpo_lib import store
from mixdpo_lib.runner import execute, record, reproduce, results
from mixdpo_lib.store import MixDPOError

ROOT = Path(__file__).parents[2]
NAME = "01_reviews_and_rewards"
WORK = """import pandas as pd
from mixdpo_lib import store
store.cached("stage", 1, {}, lambda folder: (folder / "a").touch())
run.table(pd.DataFrame({"expert": range(n_experts)}), "experts")"""


def test_a_project_of_any_name_and_no_home_folder(write_notebook, project, tmp_path_factory):
    """Spaces, quotes, brackets, dollars, other alphabets, and braces with the name of a parameter in them."""
    write_notebook(NAME, WORK)
    odd = 'it\'s a "[p]*" $HOME {n_experts} {x} %s ü 漢字 ع & ; #'
    place = tmp_path_factory.mktemp("odd") / odd
    shutil.copytree(project, place)
    shutil.copy(ROOT / "workflow" / "Snakefile", place / "workflow")
    (place / "temporary:files").mkdir()
    env = os.environ | {
        "MIXDPO_ROOT": str(place),
        "MIXDPO_CACHE": str(place / f"cache {odd}"),
        "TMPDIR": str(place / "temporary:files"),
        "HOME": str(ROOT / "pyproject.toml"),  # no folder can be made in it
    }
    env = {name: value for name, value in env.items() if not name.startswith("XDG_")}
    command = [sys.executable, "-m", "mixdpo_lib.cli", "reproduce"]
    done = subprocess.run(command, cwd=place, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert results.verify_manifest(place / "runs" / "default" / NAME)["outputs"]
    assert [path.name for path in (place / f"cache {odd}").iterdir()] == ["stage"]
    assert list((place / "temporary:files").iterdir()) == [], "a run leaves no temporary files"


def test_a_file_where_results_belong(write_notebook, project):
    write_notebook(NAME)
    (project / "mine").touch()
    with pytest.raises(MixDPOError, match="mine: found a file, expected a folder or nothing"):
        execute.run_notebook(NAME, output=project / "mine")
    (project / "runs").touch()
    for call in (lambda: execute.run_notebook(NAME), lambda: reproduce.reproduce("default")):
        with pytest.raises(MixDPOError, match=r"runs.*: cannot be written \(.*MIXDPO_ROOT"):
            call()
    (project / "runs").unlink()
    (project / ".snakemake").touch()
    with pytest.raises(MixDPOError, match=r"\.snakemake: cannot be written \(.*MIXDPO_ROOT"):
        reproduce.reproduce("default")
    (project / "figures").touch()
    with pytest.raises(MixDPOError, match=r"figures: cannot be written \(.*MIXDPO_ROOT"):
        execute.run_notebook(NAME, {"n_experts": 2}, output=project / "figures" / "a")


def test_no_place_for_temporary_files(write_notebook, monkeypatch):
    write_notebook(NAME)

    def none(*_, **__):
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(execute.tempfile, "TemporaryDirectory", none)
    with pytest.raises(MixDPOError, match="no place for temporary files .*TMPDIR"):
        execute.run_notebook(NAME)


def test_a_record_in_a_place_that_is_taken(write_notebook, project, monkeypatch):
    write_notebook(NAME)
    names: dict = {}
    exec(PARAMETERS, names)
    (project / "taken").touch()
    monkeypatch.setenv("MIXDPO_RUN_FOLDER", str(project / "taken"))
    with pytest.raises(MixDPOError, match=r"taken: cannot be written \(File exists\)"):
        record.start_run(NAME, names)
    monkeypatch.setenv("MIXDPO_RUN_FOLDER", str(project / "run"))
    run = record.start_run(NAME, names)
    (project / "run" / "figures").touch()
    import matplotlib.pyplot as plt

    figure = plt.figure()
    with pytest.raises(MixDPOError, match=r"run: cannot be written \(.*figures"):
        run.figure(figure, "one", "A caption")
    plt.close(figure)


def test_clean_leaves_what_it_did_not_make(project, monkeypatch, tmp_path_factory):
    shared = tmp_path_factory.mktemp("shared")
    (shared / "photos").mkdir()
    (shared / "photos" / "a.jpg").touch()
    monkeypatch.setenv("MIXDPO_CACHE", str(shared))
    store.cached("stage", 1, {}, lambda folder: (folder / "a").touch())
    assert reproduce.clean() == [shared]
    assert [path.name for path in shared.iterdir()] == ["photos"]

    monkeypatch.delenv("MIXDPO_CACHE")  # a large disk behind a link
    (project / "data" / "cache").symlink_to(tmp_path_factory.mktemp("large"))
    store.cached("stage", 1, {}, lambda folder: (folder / "a").touch())
    assert reproduce.clean() == [project / "data" / "cache"]
    assert (project / "data" / "cache").is_symlink()
    assert list((project / "data" / "cache").iterdir()) == []

    (project / "data" / "cache").unlink()
    (project / "data" / "cache").touch()
    with pytest.raises(MixDPOError, match="data/cache: found a file, expected a folder"):
        reproduce.clean()


def test_clean_of_a_cache_leaves_folders_that_have_the_names_of_ours(
    project, monkeypatch, tmp_path_factory
):
    """Also of a cache inside the project, beside what is tracked there."""
    shared = tmp_path_factory.mktemp("shared")
    for place in (shared, project / "data"):
        for name in ("datasets", "checkpoints", "titles"):
            (place / name).mkdir(parents=True, exist_ok=True)
            (place / name / "mine.csv").touch()
        monkeypatch.setenv("MIXDPO_CACHE", str(place))
        store.cached("stage", 1, {}, lambda folder: (folder / "a").touch())
        (place / "checkpoints" / "0123456789abcdef").mkdir()
        (store.cache_part("lent") / "theirs").touch()
        assert store.cache_part("datasets") == place / "datasets"
        assert reproduce.clean() == [place]
        left = sorted(path.relative_to(place).as_posix() for path in place.rglob("*.csv"))
        assert left == ["checkpoints/mine.csv", "datasets/mine.csv", "titles/mine.csv"]
        assert not (place / "stage").exists() and not (place / "lent").exists()
        assert not (place / "checkpoints" / "0123456789abcdef").exists()
