"""The runner: parameters checked before a kernel starts, results recorded and verified, failures kept as evidence."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pandas as pd
import pytest
import torch
from conftest import PARAMETERS

from mixdpo_lib import store
from mixdpo_lib.runner import execute, record, reproduce, results
from mixdpo_lib.runner import parameters as parameters_file
from mixdpo_lib.store import MixDPOError
from mixdpo_lib.study.readme import with_results

TABLE = pd.DataFrame({"group": ["a", "b"], "accuracy": [0.5, 0.75]})
WORK = """import pandas as pd
from mixdpo_lib import store
for done in range(1, n_experts + 1):
    store.progress("work", done, n_experts, "as usual")
data = run.table(pd.DataFrame({"expert": range(n_experts), "rate": rate}), "experts")
run.value("gain", 0.25, "nats", [0.2, 0.3], n=4, seeds=seeds)"""


@pytest.fixture
def no_kernel(monkeypatch):
    monkeypatch.setattr(execute, "_execute", lambda *_: pytest.fail("a kernel was started"))


# ------------------------------------------------------------------------------------------------------- parameters
def test_parameters_are_read_from_the_source(write_notebook):
    write_notebook("04_mix")
    parameters = parameters_file.notebook_parameters("04_mix")
    assert list(parameters) == ["n_experts", "seeds", "rate", "latent"]
    assert parameters["n_experts"] == parameters_file.Parameter("n_experts", "int", 3, "K")
    assert parameters["seeds"] == parameters_file.Parameter(
        "seeds", "list[int]", [0, 1], "one run each"
    )


def test_default_profile_and_override_in_that_order(write_notebook, project):
    write_notebook("04_mix")
    (project / "notebooks/profiles/smoke.yaml").write_text("04_mix:\n  n_experts: 2\n  rate: 1\n")
    assert parameters_file.resolve_parameters("04_mix", "smoke", {"n_experts": 5}) == {
        "n_experts": 5,
        "seeds": [0, 1],
        "rate": 1,
        "latent": "unit",
    }


@pytest.mark.parametrize(
    "given, expected",
    [
        (
            {"n_expert": 4},
            "unknown parameter 'n_expert'; expected one of n_experts, seeds.*; did you mean n_experts",
        ),
        ({"n_experts": "4"}, r"parameter n_experts: found '4' \(str\), expected int"),
        ({"n_experts": 4.0}, r"found 4.0 \(float\), expected int"),
        ({"n_experts": True}, r"found True \(bool\), expected int"),
        (
            {"rate": "1e-3"},
            r"found '1e-3' \(str\), expected float; write the exponent as in 1.0e-3",
        ),
        ({"rate": float("inf")}, "found inf"),
        ({"rate": None}, "found None"),
        ({"seeds": 1}, r"found 1 \(int\), expected list\[int\]"),
        ({"seeds": [0, "a"]}, r"expected list\[int\]"),
        ({"latent": 1}, "expected str"),
    ],
)
def test_a_wrong_parameter_stops_before_a_kernel_starts(
    write_notebook, no_kernel, project, given, expected
):
    write_notebook("04_mix")
    with pytest.raises(MixDPOError, match=expected):
        execute.run_notebook("04_mix", given)
    (project / "notebooks/profiles/bad.yaml").write_text(
        json.dumps({"04_mix": given}).replace("Infinity", ".inf")
    )
    with pytest.raises(MixDPOError, match=expected):
        execute.run_notebook("04_mix", profile="bad")
    assert not (project / "runs").exists()


@pytest.mark.parametrize(
    "kind, good, bad",
    [
        ("float", [1, 0.5], ["a", True, None]),
        ("int | None", [1, None], ["a", 0.5]),
        ("bool", [True], [1]),
        ("dict[str, float]", [{"a": 1}, {}], [{1: 1}, {"a": "b"}]),
        ("list[list[int]]", [[[1], []]], [[1]]),
        ("list", [[1, "a"]], ["a"]),
    ],
)
def test_types(kind, good, bad):
    parameter = parameters_file.Parameter("x", kind, None, "")
    for value in good:
        parameters_file.check_value("n", parameter, value)
    for value in bad:
        with pytest.raises(MixDPOError, match="parameter x"):
            parameters_file.check_value("n", parameter, value)


@pytest.mark.parametrize(
    "cell",
    [
        "n_experts = 3\n",
        "n_experts: int = 1 + len([])\n",
        "import os\n",
        "n: int = 'a'\n",
        "n: Tensor = 1\n",
    ],
)
def test_a_parameters_cell_of_another_form_is_refused(write_notebook, cell):
    write_notebook("04_mix", parameters=cell)
    with pytest.raises(MixDPOError, match="04_mix.*expected|expected"):
        parameters_file.notebook_parameters("04_mix")


def test_unknown_notebook_and_profile(write_notebook, no_kernel):
    write_notebook("04_mix_dpo")
    with pytest.raises(
        MixDPOError,
        match="'04_mix': not found .* expected one of 04_mix_dpo; did you mean 04_mix_dpo",
    ):
        execute.run_notebook("04_mix")
    with pytest.raises(
        MixDPOError, match="profile 'defaults': .* expected one of default; did you mean default"
    ):
        execute.run_notebook("04_mix_dpo", profile="defaults")


@pytest.mark.parametrize("pair", ["n_experts", "=4", "x=[1", "x={"])
def test_malformed_overrides(pair):
    with pytest.raises(MixDPOError, match="-p"):
        parameters_file.parse_overrides([pair])


# -------------------------------------------------------------------------------------------------- inside a notebook
@pytest.fixture
def run(write_notebook, monkeypatch, project):
    write_notebook("04_mix")
    monkeypatch.setenv("MIXDPO_RUN_FOLDER", str(project / "out"))
    return record.start_run(
        "04_mix", {"n_experts": 3, "seeds": [0], "rate": 0.1, "latent": "unit", "other": 1}
    )


def test_start_run_reads_and_checks_the_namespace(run, monkeypatch, project):
    assert run.parameters == {"n_experts": 3, "seeds": [0], "rate": 0.1, "latent": "unit"}
    assert run.folder == project / "out" and run.id.startswith("04_mix-")
    with pytest.raises(MixDPOError, match="parameter rate has no value"):
        record.start_run("04_mix", {"n_experts": 3, "seeds": [0]})
    with pytest.raises(MixDPOError, match="found 'four'"):
        record.start_run(
            "04_mix", {"n_experts": "four", "seeds": [0], "rate": 0.1, "latent": "unit"}
        )
    monkeypatch.delenv("MIXDPO_RUN_FOLDER")
    values = {"n_experts": 3, "seeds": [0], "rate": 0.1, "latent": "unit"}
    assert (
        record.start_run("04_mix", values).folder.parent
        == project / "runs" / "interactive" / "04_mix"
    )


def plot():
    figure, axes = plt.subplots(figsize=(3.3, 2), layout="constrained")
    axes.plot(TABLE["accuracy"], label="accuracy")
    axes.legend()
    return figure


def test_equal_figures_are_equal_files(run):
    run.table(TABLE, "accuracy")
    content = []
    for _ in range(2):
        figure = plot()
        run.figure(figure, "by_group", "Two groups, n = 2", TABLE, by=plot)
        plt.close(figure)
        ends = ("png", "svg", "pdf", "json")
        content.append([(run.folder / f"figures/by_group.{end}").read_bytes() for end in ends])
    assert content[0] == content[1]
    side = store.read_json(run.folder / "figures/by_group.json")
    assert side == {
        "run": run.id,
        "notebook": "04_mix",
        "function": "plot",
        "caption": "Two groups, n = 2",
        "table": "accuracy",
        "data_sha256": store.sha256_of(run.folder / "tables/accuracy.csv"),
    }
    assert plt.imread(run.folder / "figures/by_group.png").shape[:2] == (
        600,
        990,
    )  # 300 dots an inch, nothing cut off
    pdf = (run.folder / "figures/by_group.pdf").read_bytes()
    assert b"/FontFile2" in pdf and b"/Type3" not in pdf and b"CreationDate" not in pdf


def test_a_figure_says_which_table_it_shows(run):
    run.table(TABLE, "accuracy")
    whole = store.sha256_of(run.folder / "tables/accuracy.csv")
    part = TABLE[TABLE["group"] == "a"]
    of_part = hashlib.sha256(part.to_csv(index=False, lineterminator="\n").encode()).hexdigest()
    figure = plot()
    for given, table, hashed in (
        ({"table": "accuracy"}, "accuracy", whole),
        ({"data": TABLE}, "accuracy", whole),
        ({"data": part, "table": "accuracy"}, "accuracy", of_part),
        ({"data": part, "table": "03_dpo/accuracy"}, "03_dpo/accuracy", of_part),
        ({}, None, None),
    ):
        run.figure(figure, "one", "A caption", **given)
        side = store.read_json(run.folder / "figures/one.json")
        assert (side["table"], side["data_sha256"], side["function"]) == (table, hashed, "one")
    with pytest.raises(
        MixDPOError,
        match="04_mix: figure one: its data is no table .* written accuracy; say which by table=",
    ):
        run.figure(figure, "one", "A caption", part)
    with pytest.raises(
        MixDPOError,
        match="table 'acuracy' is not there; .* written accuracy; .* did you mean accuracy",
    ):
        run.figure(figure, "one", "A caption", part, table="acuracy")
    with pytest.raises(MixDPOError, match="table '03_dpo/accuracy' is not there; .* give its data"):
        run.figure(figure, "one", "A caption", table="03_dpo/accuracy")
    plt.close(figure)


def test_figures_of_a_profile_that_means_nothing_say_so(run):
    figure = plot()
    run.figure(figure, "one", "A caption")
    assert (
        run.note == ""
        and not figure.texts
        and "note" not in store.read_json(run.folder / "figures/one.json")
    )
    run.profile = "smoke"
    run.figure(figure, "one", "A caption")
    assert run.note == "smoke: too small to mean anything" == figure.texts[0].get_text()
    assert store.read_json(run.folder / "figures/one.json")["note"] == run.note
    assert figure.get_size_inches()[0] == 3.3 and figure.texts[0].get_fontsize() >= 7
    plt.close(figure)


def test_manifest_records_and_verifies(run):
    run.table(TABLE, "accuracy")
    run.value("gain", 0.25, "nats", [0.2, 0.3], n=4, seeds=[0])
    store.cached("stage", 1, {}, lambda folder: (folder / "a").write_text("a"))
    run.finish({"seed 0": "tolerance"})
    manifest = results.verify_manifest(run.folder)
    assert set(manifest["outputs"]) == {"tables/accuracy.csv", "values.json"}
    assert manifest["parameters"] == run.parameters and manifest["seeds"] == {"seeds": [0]}
    assert manifest["stop_reasons"] == {"seed 0": "tolerance"}
    assert any(key.startswith("stage/") for key in manifest["inputs"])
    assert manifest["machine"]["threads"] == torch.get_num_threads() and manifest["versions"][
        "torch"
    ].startswith("2.")
    assert store.read_json(run.folder / "values.json")["gain"] == {
        "value": 0.25,
        "unit": "nats",
        "interval": [0.2, 0.3],
        "n": 4,
        "seeds": [0],
        "runs": [run.id],
    }
    (run.folder / "tables/accuracy.csv").write_text("group,accuracy\na,0.9\n")
    with pytest.raises(MixDPOError, match="tables/accuracy.csv: found .* expected sha256"):
        results.verify_manifest(run.folder)
    (run.folder / "tables/accuracy.csv").unlink()
    with pytest.raises(MixDPOError, match="no such file"):
        results.verify_manifest(run.folder)


def test_manifest_names_command_device_and_commit(run, project, monkeypatch):
    monkeypatch.setenv("MIXDPO_COMMAND", "mixdpo run 04_mix")

    def manifest():
        return store.read_json(run.finish())

    first = manifest()
    assert first["command"] == "mixdpo run 04_mix" and first["machine"]["device"] == "cpu"
    assert first["git"] == {"commit": None, "dirty": None}  # no checkout
    git = ["git", "-C", str(project), "-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init", "-q"], ["add", "notebooks"], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *arguments], check=True)
    head = subprocess.run(
        [*git, "rev-parse", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    assert manifest()["git"] == {"commit": head, "dirty": False}  # new files do not count
    (project / "notebooks/04_mix.ipynb").write_text(
        (project / "notebooks/04_mix.ipynb").read_text() + "\n"
    )
    assert manifest()["git"] == {"commit": head, "dirty": True}
    monkeypatch.setenv("PATH", str(project))
    assert manifest()["git"] == {"commit": None, "dirty": None}  # no git
    monkeypatch.undo()
    monkeypatch.setenv("MIXDPO_ROOT", str(project / "data"))  # the checkout of something around it
    assert record._git() == {"commit": None, "dirty": None}


@pytest.mark.parametrize(
    "value, interval", [(float("nan"), None), (1.0, [0.0, float("inf")]), (1.0, [0.0])]
)
def test_values_are_finite(run, value, interval):
    with pytest.raises(MixDPOError, match="value gain"):
        run.value("gain", value, "nats", interval)


# ------------------------------------------------------------------------------------------------------- execution
def test_a_run_is_recorded_shown_and_replaced_in_one_step(write_notebook, project, capsys):
    write_notebook("04_mix", WORK)
    folder = execute.run_notebook("04_mix")
    assert folder == project / "runs" / "default" / "04_mix"
    manifest = results.verify_manifest(folder)
    assert manifest["parameters"] == {
        "n_experts": 3,
        "seeds": [0, 1],
        "rate": 0.1,
        "latent": "unit",
    }
    shown = capsys.readouterr().err
    assert (
        "[mixdpo] work 1/3 as usual" in shown
        and "[mixdpo] work 3/3 as usual" in shown
        and "finished in" in shown
    )
    assert results.load_table("default", "04_mix", "experts")["expert"].tolist() == [0, 1, 2]
    assert results.load_values("default", "04_mix")["gain"]["value"] == 0.25
    with pytest.raises(
        MixDPOError, match="no table 'expert'; expected one of experts; did you mean experts"
    ):
        results.load_table("default", "04_mix", "expert")
    with pytest.raises(MixDPOError, match="no finished run of 05.*mixdpo run 05"):
        results.load_table("default", "05", "experts")
    assert nbformat.read(folder / "notebook.ipynb", 4).cells[-1].execution_count

    other = execute.run_notebook(
        "04_mix", {"n_experts": 2}
    )  # other parameters never replace a profile's run
    assert other.parent == project / "runs" / "custom"
    assert len(results.load_table(str(other.parent), other.name, "experts")) == 2
    assert results.verify_manifest(folder) == manifest

    for cell, cause in [
        ("raise ValueError('not\\nthis')", r"cell \[4\] failed: ValueError: not;"),
        ("import os; os._exit(9)", "the kernel died"),
        ("import time; time.sleep(60)", "longer than allowed"),
        ("run.parameters['rate'] = 7", "manifest.json is of 04_mix with .*'rate': 7"),
    ]:
        write_notebook("04_mix", cell)
        with pytest.raises(execute.RunFailed, match=cause) as caught:
            execute.run_notebook("04_mix", cell_timeout=2 if "sleep" in cell else None)
        if "sleep" in cell:
            assert "[mixdpo] 04_mix: cell 4 of 5\n" in capsys.readouterr().err
        evidence = str(caught.value).split("evidence in ")[1].split(";")[0]
        assert os.path.exists(evidence + "/notebook.ipynb") and os.path.exists(
            evidence + "/error.txt"
        )
        assert results.verify_manifest(folder) == manifest  # the earlier run is as it was
    write_notebook("04_mix", WORK, finish=False)
    with pytest.raises(execute.RunFailed, match="did not reach its last cell"):
        execute.run_notebook("04_mix")
    assert results.verify_manifest(folder) == manifest
    assert not [
        path for path in folder.parent.iterdir() if ".part-" in path.name or ".old-" in path.name
    ]


def test_an_interruption_keeps_evidence_and_the_earlier_run(write_notebook, project):
    write_notebook(
        "04_mix", "from mixdpo_lib import store\nstore.note('busy')\nimport time\ntime.sleep(60)"
    )
    earlier = project / "runs" / "default" / "04_mix"
    earlier.mkdir(parents=True)
    (earlier / "manifest.json").write_text("{}")
    process = subprocess.Popen(
        [sys.executable, "-m", "mixdpo_lib.cli", "run", "04_mix"], stderr=subprocess.PIPE, text=True
    )
    for line in process.stderr:
        if "busy" in line:
            break
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=180)[1]
    assert process.returncode == 128 + signal.SIGTERM
    assert said.splitlines()[-1].startswith("mixdpo: error: 04_mix: interrupted; evidence in ")
    assert "Traceback" not in said
    assert (earlier / "manifest.json").read_text() == "{}"
    assert len(list((project / "runs" / "failed").iterdir())) == 1


def test_the_runner_speaks_when_the_notebook_is_silent(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(execute, "_HEARTBEAT_S", 0.2)
    (tmp_path / "log").touch()
    with execute._shown(tmp_path / "log", "04_mix"):
        (tmp_path / "log").write_text("[mixdpo] work 1/3\n")
        time.sleep(1.2)
    shown = capsys.readouterr().err
    assert (
        "[mixdpo] work 1/3\n" in shown
        and "04_mix: still running, " in shown
        and "last: work 1/3" in shown
    )


def test_an_output_folder_with_other_things_is_refused(write_notebook, project, no_kernel):
    write_notebook("04_mix")
    (project / "mine").mkdir()
    (project / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(MixDPOError, match="mine: found thesis.txt, which would be lost"):
        execute.run_notebook("04_mix", output=project / "mine")


def test_an_earlier_run_with_other_things_beside_it_is_refused(
    write_notebook, project, run, no_kernel
):
    """By --output; what the run and JupyterLab wrote may go, whatever else there is may not."""
    write_notebook("04_mix")
    run.table(TABLE, "accuracy")
    run.finish()
    for name in ("notebook.ipynb", ".ipynb_checkpoints/notebook-checkpoint.ipynb"):
        (run.folder / name).parent.mkdir(exist_ok=True)
        (run.folder / name).write_text("x")
    assert results.not_of_the_run(run.folder) == []
    for name in ("tables/my notes.txt", ".git/config", ".env", "job.log", "uv.lock"):
        (run.folder / name).parent.mkdir(exist_ok=True)
        (run.folder / name).write_text("precious")
        with pytest.raises(
            MixDPOError, match="found .* beside an earlier run, which would be lost"
        ):
            execute.run_notebook("04_mix", output=run.folder)
        assert name in results.not_of_the_run(run.folder)
        (run.folder / name).unlink()
    (run.folder / ".git").rmdir()
    (run.folder / "plots").mkdir()
    (run.folder / "data").symlink_to("/nowhere")
    assert results.not_of_the_run(run.folder) == ["data", "plots"]


def test_a_run_of_another_notebook_is_no_earlier_run(write_notebook, project, run, no_kernel):
    run.finish()
    write_notebook("05_other")
    with pytest.raises(
        MixDPOError, match="found a run of 04_mix, which would be lost; name another"
    ):
        execute.run_notebook("05_other", output=run.folder)
    assert (run.folder / "manifest.json").exists()


def test_what_came_into_the_place_while_a_notebook_ran_is_not_replaced(write_notebook, project):
    write_notebook("04_mix", WORK)
    place = execute.run_notebook("04_mix", output=project / "mine")
    write_notebook("04_mix", WORK + f"\nopen({str(place / 'notes.txt')!r}, 'w').write('mine')")
    with pytest.raises(execute.RunFailed, match=r"found notes.txt .*evidence in (\S+);") as error:
        execute.run_notebook("04_mix", output=place)
    assert (place / "notes.txt").read_text() == "mine" and (place / "manifest.json").exists()
    kept = Path(str(error.value).split("evidence in ")[1].split("; earlier")[0])
    assert (kept / "manifest.json").exists()  # what was finished is there, whole


def test_results_that_were_read_are_inputs_and_the_sentence_at_the_top_is_none(project, run):
    run.table(TABLE, "accuracy")
    run.value("gain", 0.25, "nats")
    run.finish()
    where = run.folder.parent
    before = set(store.touched_artefacts())
    results.head("04_mix", "{gain:.2f}")
    assert set(store.touched_artefacts()) == before
    results.load_table(f"{where}", run.folder.name, "accuracy")
    (new,) = set(store.touched_artefacts()) - before
    assert new == f"results/{where}/{run.folder.name}"
    assert store.touched_artefacts()[new] == store.sha256_of(run.folder / "manifest.json")


# ------------------------------------------------------------------------------------------------- whole workflow
def test_a_result_whose_making_anew_failed_is_not_taken_for_new(write_notebook, project, capfd):
    for name in ("Snakefile", "notebooks.yaml"):
        shutil.copy(Path(__file__).parents[2] / "workflow" / name, project / "workflow" / name)
    write_notebook("01_reviews_and_rewards", WORK)
    reproduce.reproduce("default")
    manifest = project / "runs/default/01_reviews_and_rewards/manifest.json"
    before = manifest.read_bytes()
    write_notebook("01_reviews_and_rewards", "raise ValueError('not today')")
    for _ in range(2):
        old = store.read_json(manifest)
        old["ended"] = "2026-01-02T03:04:05Z"  # an hour ago, as it were
        manifest.write_text(json.dumps(old))
        with pytest.raises(MixDPOError, match="not finished"):
            reproduce.reproduce("default")
        assert "not today" in capfd.readouterr().err
        assert store.read_json(manifest) == old  # what was there is kept
    manifest.write_bytes(before)
    write_notebook("01_reviews_and_rewards", WORK)
    reproduce.reproduce("default")
    assert "01_reviews_and_rewards: started" in capfd.readouterr().err


def test_reproduce_and_reference(write_notebook, project, capfd):
    for name in ("Snakefile", "notebooks.yaml"):
        shutil.copy(Path(__file__).parents[2] / "workflow" / name, project / "workflow" / name)
    write_notebook("01_reviews_and_rewards", WORK)
    write_notebook("07_ablation_temperature", "")
    shutil.copy(
        Path(__file__).parents[2] / "notebooks/profiles/common.yaml",
        project / "notebooks/profiles/common.yaml",
    )
    write_notebook(
        "02_preferences",
        "assert results.load_table('default', '01_reviews_and_rewards', 'experts').size",
        parameters=PARAMETERS + "common: dict = {}  # shared\n",
    )
    reproduce.reproduce("default")
    timing = store.read_json(project / "runs/default/timing.json")
    assert timing["complete"] and list(timing["notebooks"]) == [
        "01_reviews_and_rewards",
        "02_preferences",
    ]

    (
        project / "notebooks/profiles/default.yaml"
    ).write_text(  # of another notebook, and nothing that 02 shares
        "common: {passes: 1.0}\n05_moe_dpo: {k: 1}\n"
    )
    done = [p.stat().st_mtime_ns for p in sorted(project.glob("runs/default/*/manifest.json"))]
    capfd.readouterr()
    reproduce.reproduce("default")
    shown = capfd.readouterr().err
    assert "everything is up to date" in shown and ": started" not in shown
    reproduce.reproduce("default", extra=["-n"])
    assert "[mixdpo]" not in capfd.readouterr().err  # Snakemake alone says what it would do
    assert done == [
        p.stat().st_mtime_ns for p in sorted(project.glob("runs/default/*/manifest.json"))
    ]
    assert store.read_json(project / "runs/default/timing.json") == timing
    (project / "notebooks/profiles/default.yaml").write_text("common: {n_users: 5}\n")
    reproduce.reproduce("default")
    shown = capfd.readouterr().err
    assert "02_preferences: started" in shown and "01_reviews_and_rewards: started" not in shown
    assert (
        results.verify_manifest(project / "runs/default/02_preferences")["parameters"]["common"][
            "n_users"
        ]
        == 5
    )
    assert (
        store.read_json(project / "runs/default/timing.json") == timing
    )  # that of the whole study

    with pytest.raises(
        MixDPOError, match="no finished run of 07_ablation_temperature; run `make reproduce-all"
    ):
        reproduce.update_reference("default", {"README.md": with_results})
    (project / "notebooks/profiles/smoke.yaml").write_text("{}\n")
    execute.run_notebook("01_reviews_and_rewards", profile="smoke")
    capfd.readouterr()
    reproduce.reproduce("default", everything=True)
    assert list(store.read_json(project / "runs/default/timing_everything.json")["notebooks"]) == [
        "07_ablation_temperature"
    ]
    assert store.read_json(project / "runs/default/timing.json") == timing
    target = reproduce.update_reference("default", {"README.md": with_results})
    values = store.read_json(target / "values.json")
    assert "07_ablation_temperature" in values["minutes_further"]["runs"][0]
    assert (
        values["gain"]["unit"] == "nats" and values["minutes_default"]["value"] == timing["minutes"]
    )
    assert (
        results.verify_manifest(target / "01_reviews_and_rewards")["notebook"]
        == "01_reviews_and_rewards"
    )
    assert len(results.load_table("reference", "01_reviews_and_rewards", "experts")) == 3
    assert results.load_values("reference")["gain"]["value"] == 0.25
    assert set(results.durations("01_reviews_and_rewards")) == {"default", "smoke"}
    # of the complete run: the second run of this one, with another number of users, may have found what it needs
    assert results.durations("02_preferences") == {"default": timing["notebooks"]["02_preferences"]}

    earlier = (target / "07_ablation_temperature/manifest.json").read_bytes()
    shutil.rmtree(project / "runs/default/07_ablation_temperature")
    (project / "runs/default/timing.json").unlink()
    reproduce.update_reference(
        "default", {"README.md": with_results}
    )  # what was not run again keeps its record
    assert (target / "07_ablation_temperature/manifest.json").read_bytes() == earlier
    assert store.read_json(target / "values.json") == values

    manifest = (project / "runs/default/02_preferences/manifest.json").read_bytes()
    write_notebook("02_preferences", "raise ValueError('broken')")
    with pytest.raises(MixDPOError, match="profile default: not finished"):
        reproduce.reproduce("default")
    shown = capfd.readouterr().err
    assert (
        "ValueError: broken; evidence in" in shown
        and "01_reviews_and_rewards: started" not in shown
    )
    assert (project / "runs/default/02_preferences/manifest.json").read_bytes() == manifest
