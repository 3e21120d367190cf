"""The command line: every error is one line, with a status that is not zero."""

import importlib.metadata
import io
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mixdpo_lib import cli
from mixdpo_lib.runner import execute
from mixdpo_lib.runner import grid as side_by_side
from mixdpo_lib.runner import reproduce as reproduction

ROOT = Path(__file__).resolve().parents[2]


def call(*arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    return ended.value.code


def test_help_and_nothing(capsys):
    assert call("--help") == 0
    shown = capsys.readouterr().out
    for command in (
        *("run", "reproduce", "reference", "clean"),
        *("list", "open", "doctor", "figures"),
    ):
        assert f"\n  {command} " in shown
    assert call() == 0
    assert capsys.readouterr().out == shown
    assert call("run", "--help") == 0 and "--parameter" in capsys.readouterr().out


def test_version(capsys):
    assert call("--version") == 0
    assert capsys.readouterr().out == f"mixdpo {importlib.metadata.version('mixdpo')}\n"


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["run"], "Missing argument"),
        (["fly"], "No such command"),
        (["run", "04_mix", "--speed", "9"], "No such option"),
        (["run", "99_nothing"], "notebook '99_nothing': not found"),
        (["run", "04_mix", "-p", "n_experts"], "name=value"),
        (["run", "04_mix", "-p", "n_expert=4"], "did you mean n_experts"),
        (["run", "04_mix", "-p", "n_experts=four"], "found 'four' (str), expected int"),
        (["run", "04_mix", "--profile", "smock"], "profile 'smock'"),
        (["reproduce", "--profile", "smock"], "profile 'smock'"),
        (["reproduce", "--cores", "many"], "'--cores'"),
        (["reference"], "make reproduce-all PROFILE=default"),
        (["figures", "--size", "poster"], "size 'poster': expected one of column, page, slide"),
        (["figures", "--run", "custom"], "profile 'custom': "),
        (["figures", "--run", "default"], "make reproduce-all PROFILE=default"),
        (["open", "4"], "did you mean 04_mix? (or a run, as `mixdpo list` names it)"),
        (["open", "04_mox"], "did you mean 04_mix"),
        (["clean"], "nobody is there to ask: give --yes"),
    ],
)
def test_every_error_is_one_line(write_notebook, capsys, arguments, expected):
    write_notebook("04_mix")
    assert call(*arguments) not in (0, None)
    out, err = capsys.readouterr()
    assert err.startswith("mixdpo: error: ") and err.count("\n") == 1 and expected in err
    assert "Traceback" not in err + out


def test_debug_adds_the_traceback(write_notebook, capsys):
    write_notebook("04_mix")
    for arguments in (["--debug", "run", "99_nothing"], ["run", "99_nothing", "--debug"]):
        assert call(*arguments) == 1
        err = capsys.readouterr().err
        assert "Traceback" in err and err.splitlines()[-1].startswith("mixdpo: error: ")


def test_run_passes_what_was_asked_for(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(execute, "run_notebook", lambda *a, **k: seen.append((a, k)))
    assert (
        call(
            "run",
            "04_mix",
            "-p",
            "n_experts=4",
            "-p",
            "seeds=[1]",
            "--profile",
            "smoke",
            "--output",
            str(tmp_path),
        )
        == 0
    )
    assert seen == [
        (
            ("04_mix", {"n_experts": 4, "seeds": [1]}),
            {"profile": "smoke", "output": tmp_path, "cell_timeout": None},
        )
    ]


def test_reproduce_passes_the_rest_to_snakemake(monkeypatch):
    seen = []
    monkeypatch.setattr(reproduction, "reproduce", lambda *a: seen.append(a))
    assert call("reproduce", "--profile", "smoke", "--", "--executor", "slurm") == 0
    assert seen == [("smoke", 2, ["--executor", "slurm"], False)]
    assert call("reproduce", "--all") == 0 and seen[1] == ("default", 2, [], True)


def test_the_grid_is_passed_on_likewise(monkeypatch):
    seen = []
    monkeypatch.setattr(side_by_side, "run_grid", lambda *a: seen.append(a))
    assert call("grid", "--profile", "smoke", "--cores", "4", "--", "-n") == 0
    assert seen == [("smoke", 4, ["-n"])]


def test_an_unforeseen_error_is_named(monkeypatch, capsys):
    def broken(*_, **__):
        raise KeyError("x")

    monkeypatch.setattr(execute, "run_notebook", broken)
    assert call("run", "04_mix") == 1
    assert capsys.readouterr().err == "mixdpo: error: KeyError: 'x'; see `mixdpo --debug ...`\n"


def test_clean_removes_what_can_be_made_again(project, capsys):
    for folder in ("runs/default", "data/cache/x", "data/raw", "data/titles"):
        (project / folder).mkdir(parents=True)
    assert call("clean") == 1 and (project / "runs/default").exists()
    assert call("clean", "--yes") == 0
    assert (
        not (project / "runs").exists()
        and not (project / "data/cache").exists()
        and (project / "data/raw").exists()
    )
    assert call("clean", "--all", "--yes") == 0
    assert not (project / "data/raw").exists() and (project / "data/titles").exists()


@pytest.mark.parametrize("answer, left", [("n\n", True), ("y\n", False)])
def test_clean_asks_first(project, monkeypatch, answer, left):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    (project / "runs").mkdir()
    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    assert (call("clean") == 0) is not left
    assert (project / "runs").exists() is left


def test_make_clean_asks_first(tmp_path):
    """Without a terminal it refuses; with YES=1 it goes on."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "runs").mkdir()
    quiet = {"cwd": tmp_path, "stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
    done = subprocess.run(["make", "clean"], **quiet)
    assert done.returncode == 2 and "make clean YES=1" in done.stderr
    assert (tmp_path / "runs").exists()
    done = subprocess.run(["make", "clean", "YES=1"], **quiet)
    assert done.returncode == 0 and not (tmp_path / "runs").exists()
    assert subprocess.run(["make", "clean"], **quiet).returncode == 0  # nothing to ask about


def test_help_loads_nothing_heavy():
    code = "import sys, mixdpo_lib.cli; print(*{'torch', 'pandas', 'numpy'} & set(sys.modules))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == ""
