"""Ending well: whatever ends a command, and however, nothing goes on computing and nothing is lost."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from mixdpo_lib import store
from mixdpo_lib.runner import ending, evidence, results

ROOT = Path(__file__).parents[2]
BUSY = """import subprocess, time
from mixdpo_lib import store
child = subprocess.Popen(["sleep", "600"])
store.note("busy")
while True:
    time.sleep(0.01)"""
NAME = "01_reviews_and_rewards"


@pytest.fixture
def busy(write_notebook, project):
    """A project whose one notebook never ends, with an earlier result; `mixdpo ...` started in it, once it is busy."""
    for name in ("Snakefile", "notebooks.yaml"):
        shutil.copy(ROOT / "workflow" / name, project / "workflow" / name)
    write_notebook(NAME, BUSY)
    earlier = project / "runs" / "default" / NAME
    earlier.mkdir(parents=True)
    (earlier / "manifest.json").write_text("{}")
    os.utime(earlier / "manifest.json", (1, 1))
    started = []

    def start(*words):
        command = [sys.executable, "-m", "mixdpo_lib.cli", *words]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        started.append(process)
        for line in process.stderr:
            if "busy" in line:
                return process
        pytest.fail("the notebook did not start")

    yield start
    for process in [*started, *processes(project)]:
        process.kill()
    for process in started:
        process.communicate()


def processes(project, word=""):
    """Everything that was started in this project and computes still: guards only wait."""
    found = ending.marked("MIXDPO_ROOT", str(project))
    return [one for one in found if word in " ".join(one.cmdline()) and not guards(one)]


def guards(process):
    return "mixdpo_lib.runner.guard" in process.cmdline()


def wait_for_none(project, seconds=20.0):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            if not processes(project):
                return []
        except psutil.Error:
            pass
        time.sleep(0.1)
    return [one.cmdline() for one in processes(project)]


def wait_for_evidence(project, seconds=10.0):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        kept = list(project.glob("runs/failed/*/error.txt"))
        if kept:
            return kept
        time.sleep(0.1)
    return []


def left(project):
    """Names under `runs/default` that are no result."""
    names = {path.name for path in (project / "runs" / "default").iterdir()}
    return {name for name in names if not name.endswith(".lock")} - {NAME}


@pytest.mark.parametrize(
    "words, number",  # SIGTERM to `mixdpo run` is in test_runs.py
    [
        (["run", NAME], signal.SIGINT),
        (["run", NAME], signal.SIGHUP),
        (["reproduce"], signal.SIGTERM),
    ],
)
def test_a_signal_ends_everything(busy, project, words, number):
    process = busy(*words)
    assert len(processes(project)) >= 3  # runner, kernel, its child
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + number
    assert processes(project) == [], "it says that it has ended, and it has"
    last = said.splitlines()[-1]
    assert last.startswith("mixdpo: error: ") and "interrupted; " in last and "runs/failed" in last
    assert "Traceback" not in said
    (kept,) = wait_for_evidence(project)
    assert "Interrupted" in kept.read_text() and (kept.parent / "notebook.ipynb").exists()
    assert left(project) == set()
    assert (project / "runs" / "default" / NAME / "manifest.json").read_text() == "{}"


@pytest.mark.parametrize(
    "words, victim",  # a kernel that dies is in test_runs.py
    [
        (["run", NAME], "mixdpo_lib.cli run"),
        (["reproduce"], "mixdpo_lib.cli reproduce"),
        (["reproduce"], "-m snakemake"),
    ],
)
def test_a_killed_process_takes_the_others_along(busy, project, write_notebook, words, victim):
    process = busy(*words)
    (one,) = [p for p in processes(project, victim) if "bash" not in p.cmdline()[0]]
    one.kill()
    assert wait_for_none(project) == []
    said = process.communicate(timeout=60)[1]
    assert process.returncode not in (0, None) and "Traceback" not in said
    assert wait_for_evidence(project)
    assert left(project) == set()
    assert (project / "runs" / "default" / NAME / "manifest.json").read_text() == "{}"
    if words == ["reproduce"] and victim == "-m snakemake":
        return
    write_notebook(NAME, "")  # the next start finds no lock and nothing half done
    again = [sys.executable, "-m", "mixdpo_lib.cli", *words]
    done = subprocess.run(again, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    results.verify_manifest(project / "runs" / "default" / NAME)


def test_the_end_of_make_is_noticed(busy, project):
    line = f'MIXDPO_PARENT=$$ "{sys.executable}" -m mixdpo_lib.cli reproduce; exit'
    shell = subprocess.Popen(["bash", "-c", line], stderr=subprocess.PIPE, text=True)
    for said in shell.stderr:
        if "busy" in said:
            break
    shell.kill()
    assert wait_for_none(project) == []
    assert wait_for_evidence(project)
    shell.communicate()


def test_what_a_lost_runner_left_is_kept_and_an_earlier_result_comes_back(project):
    folder, failed = project / "runs" / "default" / "04 [mix]*", project / "runs" / "failed"
    for name in (".04 [mix]*.part-7", ".04 [mix]*.old-7", ".04 m.part-7"):
        (folder.parent / name).mkdir(parents=True)
        (folder.parent / name / "a").write_text(name)
    evidence.tidy("04_mix", folder, failed)
    (kept,) = failed.iterdir()
    assert (kept / "a").read_text() == ".04 [mix]*.part-7" and "killed" in (
        kept / "error.txt"
    ).read_text()
    assert (folder / "a").read_text() == ".04 [mix]*.old-7"
    assert {path.name for path in folder.parent.iterdir()} == {folder.name, ".04 m.part-7"}


def test_a_result_is_not_replaced_by_half(project, monkeypatch):
    old, new = project / "old", project / "new"
    for folder in (old, new):
        folder.mkdir()
        (folder / "a").write_text(folder.name)
    real, calls = os.replace, []

    def interrupted(source, target):
        calls.append(source)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)  # between the two steps
        real(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(ending.Interrupted), ending.interruptible():
        evidence.replace_folder(new, old)
    assert (old / "a").read_text() == "new" and not new.exists()
    assert not list(project.glob(".old*"))


def test_a_signal_waits_for_what_must_not_be_cut_in_two():
    steps = []
    with pytest.raises(ending.Interrupted), ending.interruptible():
        with ending.held():
            os.kill(os.getpid(), signal.SIGTERM)
            steps.append("whole")
        steps.append("never")
    assert steps == ["whole"] and ending.exit_code() == 143
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    with ending.interruptible(), ending.held(last=True):
        os.kill(os.getpid(), signal.SIGINT)


def test_nohup_is_respected():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ending.interruptible():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_command_that_does_not_listen_is_ended_for_good(project):
    code = (
        "import os, signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)\n"
        "os.kill(os.getppid(), signal.SIGTERM); time.sleep(600)\n"
    )
    began = time.monotonic()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ending.Interrupted):
        patch.setattr(ending, "GRACE_S", 0.3)
        ending.run_to_end([sys.executable, "-c", code], project)
    assert processes(project) == [] and time.monotonic() - began < 30


def test_a_status_is_passed_on(project):
    assert ending.run_to_end([sys.executable, "-c", "raise SystemExit(7)"], project) == 7
    with pytest.raises(store.MixDPOError, match="no-such-program: could not be started"):
        ending.run_to_end([str(project / "no-such-program")], project)
