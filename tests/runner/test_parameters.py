"""Shared values and profiles: what a notebook has in the end, by whatever way it is run."""

import os
import subprocess
import sys

import pytest
import yaml

from mixdpo_lib import store
from mixdpo_lib.runner import execute, notebooks, parameters, record, results
from mixdpo_lib.store import MixDPOError

CELL = """n_experts: int = 3  # K
seeds: list[int] = [0, 1]  # one run each
profile: str = "default"  # its size
common: dict = {}  # shared choices that differ from the profile's
"""
SCHEMA = {
    "texts": {
        "n_prompts": {"type": "int", "default": 700, "help": "prompts"},
        "rate": {"type": "float", "default": 0.1, "help": "step"},
    },
    "users": {
        "n_users": {"type": "int", "default": 60, "help": "users"},
        "n_experts": {"type": "int", "default": 9, "help": "K of other notebooks"},
    },
}
SMOKE = {
    "common": {"n_prompts": 60, "n_users": 12},
    "04_mix": {"n_experts": 2, "seeds": [0], "common": {"rate": 1.0}},
}


@pytest.fixture
def shared(write_notebook, project):
    """04_mix shares all but `n_experts`, which it has itself; 02_pairs shares texts and users."""
    profiles = project / "notebooks" / "profiles"
    (profiles / "common.yaml").write_text(yaml.safe_dump(SCHEMA, sort_keys=False))
    (profiles / "smoke.yaml").write_text(yaml.safe_dump(SMOKE))
    write_notebook("04_mix", parameters=CELL, shares=["texts", "users"])
    write_notebook(
        "02_pairs", parameters=CELL.replace("n_experts", "n_shown"), shares=["texts", "n_users"]
    )
    write_notebook("00_start", parameters="reference: str = 'reference'  # where\n")
    return profiles


def test_a_parameter_whose_default_is_below_zero_may_be(write_notebook):
    write_notebook("09_low", parameters="low: float = -1.0  # nats\nhigh: float = 1.0  # nats\n")
    assert parameters.resolve_parameters("09_low", overrides={"low": -3.5})["low"] == -3.5
    with pytest.raises(
        MixDPOError, match="parameter high: found -2.0, expected 0 or more, as its default 1.0"
    ):
        parameters.resolve_parameters("09_low", overrides={"high": -2.0})


def test_shared_values_come_from_schema_profile_notebook_and_caller_in_that_order(shared):
    common = {"n_prompts": 700, "rate": 0.1, "n_users": 60}
    assert parameters.resolve_parameters("04_mix") == {
        "n_experts": 3,
        "seeds": [0, 1],
        "profile": "default",
        "common": common,
    }
    small = parameters.resolve_parameters("04_mix", "smoke")
    assert small == {
        "n_experts": 2,
        "seeds": [0],
        "profile": "smoke",
        "common": {"n_prompts": 60, "rate": 1.0, "n_users": 12},
    }
    given = parameters.parse_overrides(["common.rate=2", "common.n_users=3", "seeds=[7]"])
    assert given == {"common": {"rate": 2, "n_users": 3}, "seeds": [7]}
    own = parameters.resolve_parameters("04_mix", "smoke", given)
    assert own == {**small, "seeds": [7], "common": {"n_prompts": 60, "rate": 2, "n_users": 3}}
    assert parameters.resolve_parameters("00_start", "smoke") == {"reference": "reference"}


def test_a_notebook_has_what_it_shares_and_nothing_else(shared):
    """A changed value runs again what depends on it, and only that: Snakemake sees these."""
    names = parameters.common_parameters()
    assert list(names) == ["texts", "users"] and names["texts"]["n_prompts"].help == "prompts"
    before = {
        name: parameters.resolve_parameters(name, "smoke") for name in notebooks.listed_notebooks()
    }
    assert set(before["02_pairs"]["common"]) == {"n_prompts", "rate", "n_users"}
    changed = {**SMOKE, "common": {**SMOKE["common"], "n_experts": 5, "n_users": 13}}
    (shared / "smoke.yaml").write_text(yaml.safe_dump(changed))
    after = {name: parameters.resolve_parameters(name, "smoke") for name in before}
    assert after["00_start"] == before["00_start"] and after["04_mix"]["common"]["n_users"] == 13
    assert (
        after["04_mix"]["n_experts"] == 2
    )  # a parameter of its own, which takes the shared one's place


@pytest.mark.parametrize(
    "given, expected",
    [
        (
            {"common.n_prompt": 1},
            "04_mix: unknown parameter 'common.n_prompt'; .* mean common.n_prompts",
        ),
        (
            {"n_prompts": 1},
            "unknown parameter 'n_prompts'; expected one of n_experts, .* mean common.n_prompts",
        ),
        (
            {"common.n_experts": 1},
            "unknown parameter 'common.n_experts'; .*; did you mean n_experts",
        ),
        (
            {"common.n_prompts": "'300'"},
            r"04_mix: parameter common.n_prompts: found '300' \(str\), expected int; the",
        ),
        (
            {"n_experts": -1},
            "04_mix: parameter n_experts: found -1, expected 0 or more, as its default 3 is",
        ),
        ({"seeds": [0, -7]}, "parameter seeds: found -7, expected 0 or more"),
        (
            {"common.n_prompts": 0.5},
            r"parameter common.n_prompts: found 0.5 \(float\), expected int",
        ),
        (
            {"common.rate": "1e-x"},
            "common.rate: found '1e-x' .str., expected float; write the exponent",
        ),
        ({"common": 3}, r"parameter common: found 3 \(int\), expected dict"),
        (
            {"profile": "smoke"},
            "profile='smoke' under the profile 'default'; write --profile smoke",
        ),
    ],
)
def test_a_wrong_shared_value_is_refused_like_any_other(shared, monkeypatch, given, expected):
    monkeypatch.setattr(execute, "_execute", lambda *_: pytest.fail("a kernel was started"))
    overrides = parameters.parse_overrides([f"{name}={value}" for name, value in given.items()])
    with pytest.raises(MixDPOError, match=expected):
        execute.run_notebook("04_mix", overrides)


@pytest.mark.parametrize(
    "profile, expected",
    [
        (
            {"common": {"n_prompt": 1}},
            "profile smoke: common: unknown name 'n_prompt'; .* mean n_prompts",
        ),
        ({"common": {"n_prompts": "a"}}, "04_mix: profile smoke: .* common.n_prompts: found 'a'"),
        (
            {"04_mix": {"common": {"n_experts": 1}}},
            "profile smoke: unknown parameter 'common.n_experts'",
        ),
        ({"04_mix": 3}, "smoke.yaml: 04_mix: found 3, expected a mapping"),
        ([1], "smoke.yaml: found no mapping of names"),
    ],
)
def test_a_wrong_profile_is_refused(shared, profile, expected):
    (shared / "smoke.yaml").write_text(yaml.safe_dump(profile))
    with pytest.raises(MixDPOError, match=expected):
        parameters.resolve_parameters("04_mix", "smoke")


@pytest.mark.parametrize(
    "schema, expected",
    [
        (
            {"texts": ["n_prompts"]},
            r"texts: found \['n_prompts'\], expected names and what is said",
        ),
        (
            {"texts": {"n_prompts": 700}},
            "common.yaml: n_prompts: found 700, expected each name once, with {",
        ),
        (
            {**SCHEMA, "more": {"rate": SCHEMA["texts"]["rate"]}},
            "common.yaml: rate: .* each name once",
        ),
        (
            {"texts": {"n": {"type": "int", "default": "a", "help": ""}}},
            "common.yaml: parameter common.n: found",
        ),
        (
            {"texts": {"n": {"type": "Tensor", "default": 1, "help": ""}}},
            "type 'Tensor'; expected int",
        ),
    ],
)
def test_a_wrong_schema_is_refused(shared, schema, expected):
    (shared / "common.yaml").write_text(yaml.safe_dump(schema))
    with pytest.raises(MixDPOError, match=expected):
        parameters.resolve_parameters("04_mix")


def test_a_wrong_list_of_notebooks_is_refused(shared, write_notebook, project):
    listed = project / "workflow" / "notebooks.yaml"
    with pytest.raises(
        MixDPOError, match="05: found 'text' among what it shares, .*; did you mean texts"
    ):
        write_notebook("05", parameters=CELL, shares=["text"])
        parameters.resolve_parameters("05")
    listed.write_text("main: {04_mix: {share: []}}\n")
    with pytest.raises(
        MixDPOError, match="04_mix: found {'share': ..}, expected a notebook once, with {needs"
    ):
        parameters.resolve_parameters("04_mix")
    listed.write_text("main: {}\n")
    with pytest.raises(
        MixDPOError, match="no line of 04_mix.*add `04_mix: {shares: .*` with some of texts, users"
    ):
        parameters.resolve_parameters("04_mix")


def test_common_is_no_profile(shared):
    assert parameters.profile_names() == ["default", "smoke"]
    with pytest.raises(MixDPOError, match="profile 'common': .* expected one of default, smoke"):
        parameters.resolve_parameters("04_mix", "common")


# ---------------------------------------------------------------------------------- in the notebook
def test_in_jupyterlab_a_profile_sets_what_was_left_alone(shared, capsys):
    cell = {"n_experts": 3, "seeds": [4], "profile": "smoke", "common": {"n_users": 5}, "other": 1}
    run = record.start_run("04_mix", cell)
    assert capsys.readouterr().out.startswith("smoke: too small to mean anything")
    expected = {
        "n_experts": 2,
        "seeds": [4],
        "profile": "smoke",
        "common": {"n_prompts": 60, "rate": 1.0, "n_users": 5},
    }
    assert run.parameters == expected and run.profile == "smoke"
    assert cell == {**expected, "other": 1}  # the cells below see what is resolved
    assert record.start_run("04_mix", cell).parameters == expected  # the cell run a second time
    with pytest.raises(MixDPOError, match="profile 'smoek': .*did you mean smoke"):
        record.start_run("04_mix", {**cell, "profile": "smoek"})
    with pytest.raises(
        MixDPOError,
        match="04_mix: unknown parameter 'common.n_user'; .*; did you mean common.n_users",
    ):
        record.start_run("04_mix", {**cell, "common": {"n_user": 5}})


def test_what_papermill_injects_is_given_even_where_it_is_the_cells_own_value(shared):
    """`-p n_experts 3 -p profile smoke`: 3 is the cell's default, and the smoke profile's is 2."""
    cells = [
        "n_experts: int = 3",
        "%time other = 1",
        "# Parameters\nn_experts = 3\nprofile = 'smoke'",
    ]
    cell = {"n_experts": 3, "seeds": [0, 1], "profile": "smoke", "common": {}}
    assert record.start_run("04_mix", {**cell, "In": cells}).parameters["n_experts"] == 3
    again = [*cells, cells[0]]  # the parameters cell run once more: left as it has it
    assert record.start_run("04_mix", {**cell, "In": again}).parameters["n_experts"] == 2


def test_without_a_word_it_is_the_default_profile(shared, capsys):
    cell = {"n_experts": 3, "seeds": [0, 1], "profile": "default", "common": {}}
    assert record.start_run("04_mix", cell).parameters == parameters.resolve_parameters("04_mix")
    assert capsys.readouterr().out == ""


def test_the_runner_resolves_and_the_kernel_takes_it_as_it_is(
    shared, write_notebook, project, capsys
):
    """A value equal to the cell's was chosen under the runner; in JupyterLab it was left alone."""
    work = "import os\nassert n_experts == 3 and os.environ['MIXDPO_PROFILE'] == 'smoke'"
    write_notebook("04_mix", work, parameters=CELL, shares=["texts", "users"])
    folder = execute.run_notebook("04_mix", {"n_experts": 3}, profile="smoke")
    manifest = results.verify_manifest(folder)
    assert manifest["parameters"] == parameters.resolve_parameters(
        "04_mix", "smoke", {"n_experts": 3}
    )
    assert manifest["profile"] == "smoke" and folder.parent == project / "runs" / "custom"
    assert manifest["command"] == "mixdpo run 04_mix --profile smoke -p n_experts=3"
    assert "smoke: too small to mean anything" in (folder / "notebook.ipynb").read_text()


def test_plain_papermill_resolves_a_profile_too(shared, project, tmp_path):
    chosen = ["-p", "profile", "smoke", "-p", "n_experts", "4", "-y", "common: {rate: 3}"]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "papermill",
            "notebooks/04_mix.ipynb",
            str(tmp_path / "out.ipynb"),
            *chosen,
        ],
        cwd=project,
        capture_output=True,
        text=True,
        env={**os.environ, "MIXDPO_RUN_FOLDER": str(tmp_path / "run")},
    )
    assert done.returncode == 0, done.stderr
    manifest = results.verify_manifest(tmp_path / "run")
    assert manifest["parameters"] == {
        "n_experts": 4,
        "seeds": [0],
        "profile": "smoke",
        "common": {"n_prompts": 60, "rate": 3, "n_users": 12},
    }
    assert manifest["command"] is None


# ----------------------------------------------------------------------------------------- the head
def test_a_head_says_how_long_and_what_was_found(shared, project):
    run = record.start_run("00_start", {"reference": "reference"})
    assert run.head() == "**Takes** not measured yet."
    reference = project / "figures" / "reference"
    store.write_json_atomic(
        reference / "00_start" / "manifest.json", {"seconds": 20.4, "outputs": {}}
    )
    assert results.durations("00_start") == {"default": 20.4}
    times = {"seconds_by_profile": {"default": 240.0, "smoke": 20.4}}
    store.write_json_atomic(
        reference / "00_start" / "manifest.json", {"seconds": 20.4, "outputs": {}, **times}
    )
    store.write_json_atomic(
        reference / "values.json",
        {
            "gain": {"value": 0.048, "interval": [0.031, 0.067]},
            "nmi": {"value": 1.0, "interval": None},
        },
    )
    told = run.head("The gain is {gain:+.2f}, at an NMI of {nmi:.1f}.")
    assert told.startswith("**Takes** 4 min (default), 20 s (smoke)")
    assert told.endswith("The gain is +0.05 [+0.03, +0.07], at an NMI of 1.0.")
    assert told._repr_markdown_() == told
    assert run.head("{loss}").endswith("**Found**: 'loss' is not among the reference results yet.")
