"""The grid of methods and seeds: what its pieces are, what is said of one that fails, and what must not stand together."""

import json
import shlex
import shutil
from pathlib import Path

import pytest

from mixdpo_lib import store
from mixdpo_lib.runner import grid
from mixdpo_lib.runner.parameters import parse_overrides
from mixdpo_lib.store import MixDPOError

PARAMETERS = """seeds: list[int] = [0, 1]  # one fit each
methods: list[str] = ["dpo", "soup", "mix_dpo"]  # compared
front_methods: list[str] = ["dpo", "soup"]  # that write
"""


@pytest.fixture
def notebook(write_notebook, project):
    source = Path(__file__).parents[2] / "workflow"
    for name in ("Snakefile", "notebooks.yaml"):
        shutil.copy(source / name, project / "workflow" / name)
    shutil.copytree(source / "profiles", project / "workflow" / "profiles")
    return write_notebook(grid.GRID, parameters=PARAMETERS)


def test_a_piece_is_a_method_and_a_seed_beside_what_it_is_compared_with(notebook):
    pieces = grid.grid_pieces("default")
    assert list(pieces) == ["soup-0", "mix_dpo-0", "soup-1", "mix_dpo-1"]
    soup = {"methods": ["dpo", "mix_dpo", "soup"], "front_methods": ["dpo", "soup"], "seeds": [1]}
    assert pieces["soup-1"] == soup
    assert pieces["mix_dpo-0"]["front_methods"] == ["dpo"]
    words = shlex.split(grid.piece_command("default", "soup-1", soup))
    given = [words[i + 1] for i, word in enumerate(words) if word == "-p"]
    assert parse_overrides(given) == soup and words[-1] == "runs/default/grid/soup-1"


def test_a_dry_run_says_what_would_run(notebook, project, capfd):
    grid.run_grid(
        "default", 2, ["--profile", "workflow/profiles/slurm", "--executor", "local", "-n"]
    )
    shown = capfd.readouterr().out
    assert all(f"grid_{name}" in shown for name in ("soup_0", "soup_1", "mix_dpo_0", "mix_dpo_1"))
    assert not list(project.glob("runs/default/*/*/manifest.json"))


def made(folder, **other):
    """A finished run of nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    manifest = {
        "outputs": {},
        "seconds": 1.0,
        "library_sha256": "a" * 64,
        "notebook_sha256": "b" * 64,
        "parameters": {"methods": [folder.name], "n_texts": 5, "common": {"beta": 0.1}},
        "inputs": {"fit/1": "c"},
        **other,
    }
    store.write_json_atomic(folder / "manifest.json", manifest)
    return folder


@pytest.mark.parametrize(
    "other, what",
    [
        ({"library_sha256": "d" * 64}, r"code \(library_sha256\)"),
        ({"inputs": {"fit/1": "d"}}, r"data \(fit/1\): found \"c\" and \"d\""),
        (
            {"parameters": {"n_texts": 6, "common": {"beta": 0.1}}},
            "parameter n_texts: found 5 and 6",
        ),
        ({"parameters": {"n_texts": 5, "common": {"beta": 0.2}}}, "parameter common.beta"),
    ],
)
def test_results_of_another_making_are_refused_by_name(tmp_path, other, what):
    first, same = made(tmp_path / "soup-0"), made(tmp_path / "soup-1", inputs={"fit/2": "d"})
    grid.check_one_making([first, same])
    with pytest.raises(MixDPOError, match=f"soup-0 and .*dpo-0: different {what}.*grid again"):
        grid.check_one_making([first, same, made(tmp_path / "dpo-0", **other)])


def test_a_piece_that_fails_is_named_with_its_log(notebook, project, monkeypatch):
    folder, calls = project / "runs/default/grid", []

    def pretend(target, profile, cores, extra):
        calls.append((target, list(extra)))
        for name in ("soup-0", "mix_dpo-0", "soup-1"):
            made(folder / name)
            said = "mixdpo: error: no memory" if name == "soup-1" else "[mixdpo] x: finished in 3 s"
            (folder / f"{name}.log").write_text(f"started\n{said}\n")
        return 1

    monkeypatch.setattr(grid, "run_target", pretend)
    with pytest.raises(MixDPOError) as error:
        grid.run_grid("default")
    told = str(error.value)
    assert "2 of 4 pieces of the grid were not made" in told and "soup-0" not in told
    assert f"soup-1: mixdpo: error: no memory ({folder / 'soup-1.log'})" in told
    assert "mix_dpo-1: not started" in told
    (target, words), *more = calls
    assert target == "grid" and "--keep-going" in words and not more
    assert words[0] == "--resources" and int(json.loads(words[1].removeprefix("mem_mb="))) > 500


def test_logs_do_not_matter_once_everything_is_made(notebook, project, monkeypatch, capsys):
    folder = project / "runs/default/grid"

    def pretend(target, profile, cores, extra):
        for name in grid.grid_pieces(profile) if target == "grid" else ():
            made(folder / name)
        if target != "grid":
            made(project / target.removesuffix("/manifest.json"))
        (folder / "soup-1.log").write_text("mixdpo: error: of an earlier try\n")
        return 0

    monkeypatch.setattr(grid, "run_target", pretend)
    grid.run_grid("default")
    assert "4 pieces in" in capsys.readouterr().err


def test_a_dry_run_that_cannot_be_made_says_so(notebook, project, monkeypatch):
    monkeypatch.setattr(grid, "run_target", lambda *_: 1)
    with pytest.raises(MixDPOError, match="4 of 4 pieces"):
        grid.run_grid("default", extra=["-n", "--no-such-option"])


def test_a_job_that_was_ended_from_outside_is_no_piece_that_failed(notebook, project, monkeypatch):
    def pretend(target, profile, cores, extra):
        for name in grid.grid_pieces(profile):
            made(project / "runs/default/grid" / name)
            log = project / "runs/default/grid" / f"{name}.log"
            log.write_text("[mixdpo] x: finished in 3 s\n")
        return 1

    monkeypatch.setattr(grid, "run_target", pretend)
    with pytest.raises(MixDPOError, match="a job of the grid was ended from outside.*start again"):
        grid.run_grid("default")
