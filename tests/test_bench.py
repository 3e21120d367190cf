"""What measures speed: records, slopes, table, figure, resumption; nothing here is timed."""

import json
import math
import re
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread
from tiny import preference_rows

from benchmarks.speed import __main__ as driver
from benchmarks.speed import (
    measuring,
    picture,
    race,
    records,
    roofline,
    samples,
    stages,
    table,
    throughput,
)
from benchmarks.speed.contenders import OURS, TRL, Turns
from benchmarks.speed.material import as_pairs, head_policy, word_base, word_rows
from benchmarks.speed.scaling import head_step
from mixdpo_lib.data.pairs import Pairs
from mixdpo_lib.gates.weights import FixedWeights
from mixdpo_lib.policy.mixture import MixturePolicy
from mixdpo_lib.store import MixDPOError

ROOT = Path(__file__).resolve().parents[1]
MACHINE = {
    **{"processor": "A", "cores": 2, "threads": 2, "memory_gib": 8, "system": "Linux"},
    **{"device": "cpu", "python": "3", "torch": "2", "transformers": "5", "peft": "0", "trl": "1"},
}


def groups():
    """What throughput records of one batch size: TRL's full fine-tuning makes 1 pair a second, its best LoRA 4."""
    seconds = {"heads, K = 1": 0.02, "heads, K = 3": 0.04, "adapter, kept lower blocks": 0.4}
    seconds |= {"adapter": 1.6, "TRL, full": 8.0, "TRL, LoRA in all blocks": 4.0}
    seconds |= {"TRL, LoRA in the last two": 2.0}
    found = {
        name: {"ready": 1.0, "peak_gib": 1.0, "seconds": [s, s, 2 * s]}
        for name, s in seconds.items()
    }
    return {8: found}


def record(part="throughput", rows=None, **changed):
    rows = throughput.rows_of(groups(), 64, 4279) if rows is None else rows
    given = {
        "part": part,
        "machine": MACHINE,
        "code": "c",
        "settings": {"a": [1, 2]},
        "quick": False,
    }
    return {**given, "seconds": 60.0, "load": 0.1, "rows": rows, **changed}


def curve_rows(name, x):
    return [measuring.row(f"{name} {v}", "s", [0.1 * v, 0.2 * v], x=v, line=name) for v in x]


# ------------------------------------------------------------------------------------------------------------ measuring
@pytest.mark.parametrize("slope", [0.5, 1.0, 2.0])
def test_the_exponent_of_a_power_is_its_slope(slope):
    x = [1, 2, 4, 8, 16]
    found, low, high = measuring.exponent(x, [3 * v**slope for v in x])
    assert found == pytest.approx(slope, abs=1e-12) and high - low < 1e-6


def test_the_interval_of_an_exponent_is_that_of_least_squares():
    x, noise = [1, 2, 4, 8], [1.1, 0.9, 0.9, 1.1]
    found, low, high = measuring.exponent(x, [v * e for v, e in zip(x, noise, strict=True)])
    log_x, error = torch.tensor(x).log(), torch.tensor(noise).log()
    centred = log_x - log_x.mean()
    slope = float((centred * error).sum() / centred.square().sum())
    left = error - error.mean() - slope * centred
    half = 4.302653 * math.sqrt(float(left.square().sum() / 2 / centred.square().sum()))
    assert found == pytest.approx(1 + slope, abs=1e-6)
    assert (high - low) / 2 == pytest.approx(half, rel=1e-5)


@pytest.mark.parametrize(
    "x, y", [([1, 2], [1, 2]), ([1, 2, 3], [1, 2]), ([1, 1, 1], [1, 2, 3]), ([1, 2, 3], [1, 0, 2])]
)
def test_an_exponent_of_too_little_is_refused(x, y):
    with pytest.raises(ValueError, match="expected"):
        measuring.exponent(x, y)


def test_quartiles_take_infinities():
    assert measuring.quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)
    assert measuring.quartiles([1.0, 2.0, math.inf])[1:] == (2.0, math.inf)


@pytest.mark.parametrize("options", [{"values": []}, {"values": [math.nan]}, {"aim": (">", 1)}])
def test_a_line_that_says_nothing_is_refused(options):
    with pytest.raises(ValueError, match="a thing: "):
        measuring.row("a thing", "s", **{"values": [1.0], **options})


def test_an_aim_is_reached_by_the_median():
    assert measuring.reached(measuring.row("a", "s", [1, 2, 9], ("<=", 2.0))) is True
    assert measuring.reached(measuring.row("a", "s", [1, 2, 9], (">=", 2.5))) is False
    assert measuring.reached(measuring.row("a", "s", [1.0])) is None
    assert measuring.reached(measuring.absent("a", "not installed")) is None


def test_all_take_part_in_every_turn():
    calls = []
    made = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = measuring.in_turns(made, turns=4, warm_up=2)
    assert {name: len(values) for name, values in seconds.items()} == dict.fromkeys("abc", 4)
    turns = [calls[i : i + 3] for i in range(0, 18, 3)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in turns) and len({*map(tuple, turns)}) > 1


# -------------------------------------------------------------------------------------------------------------- records
def test_a_record_counts_only_on_its_machine_with_its_code_and_settings(tmp_path):
    path = tmp_path / "throughput.json"
    assert not records.counts(path, MACHINE, "c", {"a": [1, 2]})
    records.write(path, **record())
    assert records.counts(path, MACHINE, "c", {"a": (1, 2)})
    assert not records.counts(path, {**MACHINE, "cores": 4}, "c", {"a": [1, 2]})
    assert not records.counts(path, MACHINE, "d", {"a": [1, 2]})
    assert not records.counts(path, MACHINE, "c", {"a": [1, 3]})


@pytest.mark.parametrize("text", ["{", "[]", '{"part": "race"}'])
def test_a_damaged_record_is_named(tmp_path, text):
    path = tmp_path / "race.json"
    path.write_text(text)
    with pytest.raises(MixDPOError, match="race.json: .*measure again"):
        records.counts(path, MACHINE, "c", {})


def test_the_code_version_is_that_of_the_library_and_of_what_measures(tmp_path):
    for place in ("mixdpo_lib", "benchmarks/speed", "tests"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "a.py").write_text("1")
    first = records.code_version(tmp_path)
    (tmp_path / "tests" / "a.py").write_text("2")
    assert records.code_version(tmp_path) == first
    (tmp_path / "mixdpo_lib" / "a.py").write_text("2")
    assert records.code_version(tmp_path) != first


def test_what_was_made_is_remembered_by_its_identity(tmp_path):
    made = []

    def make():
        made.append(1)
        return {"curve": [(1.0, 0.5)]}

    path = tmp_path / "a" / "run.json"
    for identity in ({"seed": 0}, {"seed": 0}, {"seed": 1}):
        assert race.best(records.remembered(path, identity, make)["curve"]) == 0.5
    assert len(made) == 2


def test_the_driver_measures_what_does_not_count_yet(tmp_path, monkeypatch):
    ran = []

    def run(command, env):
        part = command[command.index("--one") + 1]
        ran.append(part)
        if part != "race":
            chosen = driver.settings(part, True)
            given = {"machine": MACHINE, "code": "c", "settings": chosen, "rows": []}
            records.write(tmp_path / f"{part}.json", **record(part, **given))
        return subprocess.CompletedProcess(command, part == "race")

    monkeypatch.setattr(driver.subprocess, "run", run)
    monkeypatch.setattr(records, "machine", lambda device: MACHINE)
    monkeypatch.setattr(records, "code_version", lambda: "c")
    options = (tmp_path, "cpu", True)
    assert driver.measure_all(["startup", "race"], *options, again=False) == ["race"]
    assert driver.measure_all(["startup", "race"], *options, again=False) == ["race"]
    assert ran == ["startup", "race", "race"]
    driver.measure_all(["startup"], *options, again=True)
    monkeypatch.setattr(records, "code_version", lambda: "d")
    driver.measure_all(["startup"], *options, again=False)
    assert ran[3:] == ["startup", "startup"]


def test_a_part_in_a_process_of_its_own_leaves_table_and_record(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "speed"), "--parts", "stages", "--out"]
    done = subprocess.run(
        [*command, str(tmp_path)], cwd=ROOT, capture_output=True, text=True,
        env={**driver.os.environ, "PYTHONPATH": str(ROOT), "MIXDPO_BENCH_RUNS": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "no run of it is here" in (tmp_path / "table.md").read_text()
    assert records.read(tmp_path / "stages.json")["settings"] == stages.SETTINGS


def test_without_records_there_is_no_table(tmp_path):
    with pytest.raises(MixDPOError, match="no records there"):
        driver.publish(tmp_path, None)
    with pytest.raises(SystemExit):
        driver.main(["--parts", "nothing"])
    assert picture.draw({"race": record("race", [])}, tmp_path / "a.png") is None


# ----------------------------------------------------------------------------------------------------- table and figure
def test_ratios_have_their_aims_beside_them():
    rows = {one["what"]: one for one in throughput.rows_of(groups(), 64, 4279)}
    assert rows["heads, K = 1 / TRL, full"]["values"] == pytest.approx([400.0] * 3)
    assert rows["heads, K = 1 / TRL's fastest LoRA"]["values"] == pytest.approx([100.0] * 3)
    assert measuring.reached(rows["heads, K = 1 / TRL, full"]) is True
    assert rows["adapter / TRL, LoRA in the last two"]["values"] == pytest.approx([1.25] * 3)
    assert measuring.reached(rows["adapter / TRL, LoRA in the last two"]) is False
    text = table.line(rows["adapter / TRL, LoRA in the last two"])
    assert "| 1.25 [1.25, 1.25] | times | 3 | ≥ 1.5 | **no** |" in text


def test_the_best_batch_of_each_side_counts():
    both = {**groups(), 32: {name: dict(one) for name, one in groups()[8].items()}}
    both[32]["TRL, full"] = {**both[32]["TRL, full"], "seconds": [16.0, 16.0, 16.0]}
    rows = {one["what"]: one for one in throughput.rows_of(both, 64, 10)}
    assert rows["heads, K = 1 / TRL, full"]["values"] == pytest.approx([800.0, 800.0, 400.0])
    assert "batches of 32, 32" in rows["heads, K = 1 / TRL, full"]["note"]
    both[32]["heads, K = 1"] = {**both[32]["heads, K = 1"], "seconds": [1.0, 1.0, 1.0]}
    (one,) = [
        r for r in throughput.rows_of(both, 64, 10) if r["what"] == "heads, K = 1 / TRL, full"
    ]
    assert "batches of 8, 32, one after the other" in one["note"]


def test_what_is_not_installed_is_a_line_that_says_so():
    found = groups()
    for name in TRL:
        found[8][name] = {"absent": "trl not installed"}
    rows = throughput.rows_of(found, 64, 10)
    text = table.section("throughput", record(rows=rows))
    assert text.count("trl not installed") == 3 and "| heads, K = 1 | 400 [300, 400] |" in text
    assert set(OURS) <= {one["what"] for one in rows}


def test_table_and_figure_of_records(tmp_path):
    lines = {
        "K": [1, 2, 4],
        "vocabulary, all tokens": [16, 32],
        "vocabulary, active tokens": [16, 32],
    }
    scaling = [one for name, x in lines.items() for one in curve_rows(name, x)]
    scaling.append(measuring.exponent_row("a step in K", scaling[:3]))
    given = {"throughput": record(load=1.9), "scaling": record("scaling", scaling, quick=True)}
    for part, one in given.items():
        records.write(tmp_path / f"{part}.json", **one)
    page = tmp_path / "page" / "README.md"
    page.parent.mkdir()
    page.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    driver.publish(tmp_path, page)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "A, 2 cores, 2 threads, 8 GiB, Linux; device cpu" in text and "(speed.png)" in text
    assert "| a step in K | 1.00 [1.00, 1.00] | exponent |" in text
    assert "load before it 1.9" in text and "no figures to quote" in text
    assert text.index("What had to be reached") < text.index("Pairs a second and memory")
    pixels = imread(page.with_name(driver.FIGURE)).shape[1]
    assert pixels / 300 * 25.4 == pytest.approx(85.0, abs=0.2)
    driver.publish(tmp_path, page)
    assert page.read_text() == text


def test_a_page_without_markers_is_refused(tmp_path):
    (tmp_path / "README.md").write_text("nothing")
    with pytest.raises(MixDPOError, match="put them back"):
        table.into(tmp_path / "README.md", "text")


# ---------------------------------------------------------------------------------------------------------------- parts
@pytest.mark.parametrize("part", driver.PARTS)
def test_every_part_has_sizes_and_smaller_ones(part):
    own = import_module(f"benchmarks.speed.{driver.PARTS[part]}")
    assert own.__doc__ and set(own.QUICK) <= set(own.SETTINGS) and callable(own.measure)
    assert part in table.TITLES


def test_a_step_of_the_heads_is_the_likelihood_and_sgd(tiny_base):
    pairs = Pairs.of(preference_rows(8))
    policy = head_policy(tiny_base, 2, pairs)
    other = MixturePolicy(head_policy(tiny_base, 2, pairs).experts, FixedWeights.uniform(2))
    batch = other.experts.batch(other.constants(pairs.texts), pairs.index[:4])
    loss = -other.batch_loglik(batch).mean()
    loss.backward()
    assert head_step(policy, pairs, 4)() == pytest.approx(loss.item(), abs=1e-6)
    expected = other.experts.up - 1e-4 * other.experts.up.grad
    assert torch.allclose(policy.experts.up, expected, atol=1e-7)
    assert not torch.equal(policy.experts.up, other.experts.up)


def test_a_step_on_the_small_random_model(tmp_path, monkeypatch):
    monkeypatch.setenv("MIXDPO_CACHE", str(tmp_path / "cache"))
    base = word_base(tmp_path / "model", 64, width=16)
    rows = word_rows(12, 3, 5, 32)
    assert len({one["prompt"] for one in rows}) == 2  # six pairs a prompt
    pairs = as_pairs(rows)
    assert [
        len(a) + len(b) for a, b in (base.text_ids(r["prompt"], r["chosen"], True) for r in rows)
    ] == [8] * 12
    assert head_step(head_policy(base, 1, pairs, "all"), pairs, 4)() == pytest.approx(
        0.69, abs=0.05
    )


@pytest.mark.parametrize("top_p", [None, 0.9])
def test_both_ways_of_sampling_count_tokens_alike(tiny_base, top_p):
    ids = [tiny_base.prompt_ids("the film"), tiny_base.prompt_ids("a very good plot")]
    for make in (samples.ours, samples.theirs):
        counts = [make(tiny_base, ids, 6, top_p)(seed) for seed in range(20)]
        assert all(2 <= n <= 12 for n in counts) and len(set(counts)) > 1


def test_the_time_to_an_accuracy_is_that_of_the_first_evaluation_with_it():
    slow = {"curve": [(10.0, 0.5), (100.0, 0.7), (190.0, 0.6)], "before": 10.0}
    fast = {"curve": [(2.0, 0.5), (3.0, 0.7), (4.0, 0.8)], "before": 1.0}
    never = {"curve": [(2.0, 0.5)], "before": 1.0}
    assert race.time_to(fast["curve"], 0.7) == 3.0 and race.time_to(never["curve"], 0.7) == math.inf
    rows = {one["what"]: one for one in race.rows_of([slow] * 3, [fast, fast, never], ("", ""))}
    assert rows["TRL / heads, K = 1"]["values"] == pytest.approx([100 / 3, 100 / 3, 0.0])
    assert "never" in table.line(rows["time to TRL's best accuracy, heads, K = 1"])


def test_the_race_is_against_the_lora_that_was_fastest(tmp_path):
    assert race.fastest(path := tmp_path / "throughput.json") == {}
    records.write(path, **record())
    assert race.fastest(path) == {"trl": "TRL, LoRA in the last two", "batch": 8}


def test_a_trainer_waits_for_its_turns(monkeypatch):
    said = []
    monkeypatch.setattr("benchmarks.speed.contenders.say", lambda **what: said.append(what))
    monkeypatch.setattr(sys, "stdin", iter_lines(["3\n", "1\n", ""]))
    turns, control = Turns("cpu"), type("Control", (), {"should_training_stop": False})()
    assert turns.ask()
    for done in (0, 0, 1, 2):
        turns.on_step_end(None, None, control)
        assert len(said) == done
    assert control.should_training_stop and all(one["seconds"] >= 0 for one in said)


def iter_lines(lines):
    """A standard input of these lines."""
    given = iter(lines)
    return type("Input", (), {"readline": staticmethod(lambda: next(given))})


def test_the_work_of_a_step_is_counted():
    operations, size = roofline.work(positions=10, width=4, active=6, rank=2, n_experts=3)
    assert operations == 2 * 10 * 4 * 6 + 3 * (
        3 * 2 * 10 * 2 * 6 + 2 * 2 * 6 * 4 * 2 + 2 * 2 * 10 * 4 * 2
    )
    assert size == 4 * (6 * 4 + 10 * 4) + 3 * 4 * (3 * 10 * 6 + 2 * 6 * 4)


def test_stages_are_read_from_manifests(tmp_path, monkeypatch):
    folder = tmp_path / "default" / "03_dpo"
    folder.mkdir(parents=True)
    content = {"notebook": "03_dpo", "seconds": 90.0, "peak_mb": 5369}
    content["machine"] = {"device": "cpu", "threads": 2}
    (folder / "manifest.json").write_text(json.dumps(content))
    (tmp_path / "default" / "09_results").mkdir()
    content = {**content, "notebook": "09_results", "seconds": 6.0, "machine": {"device": "cpu"}}
    (tmp_path / "default" / "09_results" / "manifest.json").write_text(json.dumps(content))
    monkeypatch.setenv("MIXDPO_BENCH_RUNS", str(tmp_path))
    rows = stages.measure(stages.SETTINGS, "cpu", tmp_path)
    assert [(one["what"], one["values"]) for one in rows] == [
        ("make reproduce PROFILE=smoke", []),
        ("default: 03_dpo", [1.5]),
        ("default: 09_results", [0.1]),
        ("default: all of these", [1.6]),
    ]
    assert "without torch" in rows[2]["note"]  # a notebook that draws alone


# -------------------------------------------------------------------------------------------------------------- project
def test_the_project_knows_the_benchmarks():
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(
        r"^bench: \$\(READY\)\n\t@.*benchmarks\.speed --readme \$\$BENCH$", makefile, re.M
    )
    assert '@echo "make bench ' in makefile
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert extras["bench"] == ["trl"]
    page = (ROOT / "benchmarks" / "README.md").read_text()
    assert page.count(table.BEGIN) == page.count(table.END) == 1


def test_files_are_short_and_ask_a_question():
    for path in (ROOT / "benchmarks" / "speed").glob("*.py"):
        text = path.read_text()
        assert len(text.splitlines()) <= 400 and "?" in text.split('"""')[1], path.name
