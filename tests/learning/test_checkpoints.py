"""A folder of checkpoints belongs to one fit, and what is damaged or half-written in it never stands in the way."""

import os
import pickle
import resource
import shutil
import signal

import pytest
import torch
import transformers
from tiny import plain_fit, preference_rows

from mixdpo_lib.experts.heads import HeadExperts
from mixdpo_lib.gates.weights import FixedWeights, LearnedWeights
from mixdpo_lib.learning import checkpoints as checkpoints_file
from mixdpo_lib.learning.fit import fit
from mixdpo_lib.learning.identity import fit_identity
from mixdpo_lib.learning.trainer import MixDPOTrainer
from mixdpo_lib.policy.mixture import MixturePolicy
from mixdpo_lib.store import MixDPOError, files

CONFIG = plain_fit(batch_size=6, passes=2.0, learning_rate=0.02, evaluations_per_pass=1)  # 6 steps
ROWS = preference_rows(18)
LAST = "checkpoint-6"


def policy(base, n_experts=2, gate=None, beta=0.3):
    gate = gate or LearnedWeights(n_experts)
    return MixturePolicy(HeadExperts(base, n_experts, rank=2), gate, beta)


def run(base, folder, config=CONFIG, rows=ROWS, own=None, validation=None):
    own = own or policy(base)
    return own, fit(own, rows, config, validation=validation, folder=folder)


def same(a, b):
    return all(
        torch.equal(x, y)
        for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


@pytest.fixture(scope="module")
def whole(tiny_base):
    """The fit without any folder."""
    return run(tiny_base, None)


@pytest.fixture(scope="module")
def finished(tiny_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "fit"
    run(tiny_base, folder)
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "fit")


def checkpoints(folder):
    return sorted(path.name for path in folder.glob("*checkpoint-*"))


# --------------------------------------------------------------------------------------------------------- identity


def test_the_same_fit_is_read_back_to_the_bit(tiny_base, folder, whole):
    again, result = run(tiny_base, folder)
    assert result.losses == [] and same(again, whole[0])
    clock = "seconds"
    assert result.history.drop(columns=clock).equals(whole[1].history.drop(columns=clock))
    assert result.summary == whole[1].summary


OTHERS = {
    "seed: found 0, expected 7": {"config": CONFIG.change(seed=7)},
    r"learning_rate: found 0\.02, expected 0\.5": {"config": CONFIG.change(learning_rate=0.5)},
    r"passes: found 2\.0, expected 1\.0": {"config": CONFIG.change(passes=1.0)},
    "batch_size: found 6, expected 12": {"config": CONFIG.change(accumulate=2)},
    "keep: found .best., expected .all.": {"config": CONFIG.change(keep="all")},
    "training pairs, texts: found .*, expected": {
        "rows": ROWS.map(lambda r: {"chosen": r["rejected"], "rejected": r["chosen"]})
    },
    "training pairs, number: found 18, expected 24": {"rows": preference_rows(24)},
    "training pairs, column 'user': found": {"rows": ROWS.map(lambda r: {"user": r["user"] + "."})},
    "validation pairs: found null": {"validation": ROWS},
}


@pytest.mark.parametrize("message", OTHERS)
def test_another_fit_is_refused_and_what_differs_is_named(tiny_base, folder, message):
    before = checkpoints(folder)
    with pytest.raises(MixDPOError, match=f"found another fit there: .*{message}.*another folder"):
        run(tiny_base, folder, **OTHERS[message])
    assert checkpoints(folder) == before


def test_early_looks_belong_to_a_fit_and_only_where_there_are_any(tiny_base):
    """A look at all training pairs moves what the next E-step reads: the same fit without them is another."""
    data = policy(tiny_base).prepare(ROWS)
    for steps, validation, looked in ((0, data, False), (50, None, False), (50, data, True)):
        own = fit_identity(policy(tiny_base), data, validation, CONFIG.change(min_steps=steps))
        assert ("looked at" in own) == looked


@pytest.mark.parametrize(
    ("message", "make"),
    [
        ("beta: found 0.3, expected 0.4", lambda base: policy(base, beta=0.4)),
        ("experts, n_experts: found 2, expected 3", lambda base: policy(base, 3)),
        (
            "gate, gate: found .LearnedWeights., expected .FixedWeights.",
            lambda base: policy(base, gate=FixedWeights.uniform(2)),
        ),
    ],
)
def test_another_policy_is_refused(tiny_base, folder, message, make):
    with pytest.raises(MixDPOError, match=message):
        run(tiny_base, folder, own=make(tiny_base))


def test_a_policy_that_was_fitted_already_starts_elsewhere(tiny_base, folder, whole):
    with pytest.raises(MixDPOError, match="what the policy holds before the fit: .*made anew"):
        run(tiny_base, folder, own=whole[0])


def test_a_fit_that_was_interrupted_goes_on_with_the_same_policy(
    tiny_base, tmp_path, whole, monkeypatch
):
    def stop(after):
        seen = []

        def step(self, *arguments, **options):
            seen.append(1)
            if len(seen) > after:
                raise KeyboardInterrupt
            return real(self, *arguments, **options)

        return step

    own, real = policy(tiny_base), MixDPOTrainer.training_step
    for after in (2, 1, 1):
        with monkeypatch.context() as patch:
            patch.setattr(MixDPOTrainer, "training_step", stop(after))
            with pytest.raises(KeyboardInterrupt):
                run(tiny_base, tmp_path, own=own)
    _, result = run(tiny_base, tmp_path, own=own)
    assert len(result.losses) == 2 and same(own, whole[0])
    early = policy(tiny_base)
    monkeypatch.setattr(MixDPOTrainer, "training_step", stop(0))
    with pytest.raises(KeyboardInterrupt):
        run(tiny_base, tmp_path / "early", own=early)
    with pytest.raises(MixDPOError, match="no whole checkpoint there.*make the policy anew"):
        run(tiny_base, tmp_path / "early", own=early)


def test_columns_that_nobody_reads_make_no_other_fit(tiny_base, folder):
    assert run(tiny_base, folder, rows=ROWS.remove_columns("group"))[1].losses == []


def test_more_passes_go_on_where_the_stages_stay(tiny_base, folder, capsys):
    config = CONFIG.change(passes=3.0)
    first, result = run(tiny_base, folder, config)
    assert len(result.losses) == 3 and "had fewer passes" in capsys.readouterr().err
    again, more = run(tiny_base, folder, config)
    assert more.losses == [] and same(first, again)
    with pytest.raises(MixDPOError, match=r"passes: found 3\.0, expected 2\.0"):
        run(tiny_base, folder)


def test_passes_that_min_steps_stretches_are_another_fit(tiny_base, tmp_path):
    config = CONFIG.change(passes=1.0, min_steps=4)
    run(tiny_base, tmp_path, config)
    with pytest.raises(MixDPOError, match=r"passes: found 1\.0, expected 2\.0"):
        run(tiny_base, tmp_path, config.change(passes=2.0))


def test_an_early_end_and_half_a_pass_are_read_back(tiny_base, tmp_path):
    wrong = ROWS.map(lambda r: {"chosen": r["rejected"], "rejected": r["chosen"]})
    for name, config in {
        "early": CONFIG.change(passes=4.0, stop__patience=1),
        "half": CONFIG.change(passes=1.5),
    }.items():
        first, one = run(tiny_base, tmp_path / name, config, validation=wrong)
        again, two = run(tiny_base, tmp_path / name, config, validation=wrong)
        assert (
            one.stop_reason == two.stop_reason == {"early": "no_improvement"}.get(name, "max_iter")
        )
        assert two.losses == [] and same(first, again)
        assert one.history["step"].tolist() == two.history["step"].tolist()


# ----------------------------------------------------------------------------------------------------------- damage


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


DAMAGES = {  # how many steps are trained again
    "no model": (lambda f: (f / LAST / "model.safetensors").unlink(), 1),
    "no state": (lambda f: (f / LAST / "trainer_state.json").unlink(), 1),
    "no optimiser": (lambda f: (f / LAST / "optimizer.pt").unlink(), 1),
    "no record": (lambda f: (f / LAST / "whole.json").unlink(), 1),
    "short": (lambda f: os.truncate(f / LAST / "optimizer.pt", 100), 1),
    "flipped": (lambda f: flip(f / LAST / "model.safetensors"), 1),
    "no snapshot": (lambda f: (f / "snapshot-6.safetensors").unlink(), 1),
    "an empty one": (lambda f: (f / "checkpoint-100").mkdir(), 0),
    "another name": (lambda f: (f / "checkpoint-x").mkdir(), 0),
    "no table of restarts": (lambda f: (f / "restarts.csv").unlink(), 0),
    "no word of the fit": (lambda f: (f / "fit.json").unlink(), 0),
    "half a word of the fit": (lambda f: (f / "fit.json").write_text("{"), 0),
    "none whole": (lambda f: [p.unlink() for p in f.glob("*/model.safetensors")], 6),
    "no snapshots": (lambda f: [p.unlink() for p in f.glob("snapshot-*")], 6),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_newest_whole_checkpoint_is_taken(tiny_base, folder, whole, capsys, damage):
    change, steps = DAMAGES[damage]
    change(folder)
    again, result = run(tiny_base, folder)
    assert len(result.losses) == steps and same(again, whole[0])
    said = capsys.readouterr().err
    assert ("not whole, left out" in said) == (steps > 0 or damage == "an empty one")
    assert ("the fit starts anew" in said) == (steps == 6)
    again, result = run(tiny_base, folder)
    assert result.losses == [] and same(again, whole[0])


def test_checkpoints_of_nobody_are_set_aside(tiny_base, folder, whole, capsys):
    for path in [folder / "fit.json", *folder.glob("*/whole.json")]:
        path.unlink()
    again, result = run(tiny_base, folder)
    assert len(result.losses) == 6 and same(again, whole[0])
    assert f"unknown-0-{LAST}" in checkpoints(folder)
    assert "of an unknown fit, renamed to" in capsys.readouterr().err


def test_the_last_two_stay_and_nothing_half_done(folder):
    assert {path.name for path in folder.iterdir()} == {
        "checkpoint-5",
        LAST,
        "fit.json",
        "restarts.csv",
        "snapshot-3.safetensors",
        "snapshot-6.safetensors",
    }


def test_nothing_is_unpickled(tiny_base, folder):
    """A checkpoint whose record was made anew over a pickle that would run something."""

    class Bad:
        def __reduce__(self):
            return (os.system, ("touch /tmp/never",))

    shutil.rmtree(folder / LAST)
    place = folder / "checkpoint-5"
    with open(place / "optimizer.pt", "wb") as file:
        pickle.dump(Bad(), file)
    record = files.read_json(place / "whole.json")
    record["files"] = files.file_hashes(place)
    del record["files"]["whole.json"]
    files.write_json_atomic(place / "whole.json", record)
    with pytest.raises(MixDPOError, match="checkpoint-5: whole, but this version of"):
        run(tiny_base, folder)


# ------------------------------------------------------------------------------------------------------------ kills

KILLS = [
    (transformers.Trainer, "_save_rng_state", 2),
    (checkpoints_file, "write_json_atomic", 1),
    (checkpoints_file, "write_json_atomic", 3),
    (os, "replace", 8),
    (os, "replace", 12),
    (shutil, "rmtree", 3),
]


@pytest.mark.parametrize(("place", "name", "call"), KILLS)
def test_a_fit_that_was_killed_twice_is_the_fit(tiny_base, tmp_path, whole, place, name, call):
    for _ in range(2):
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)  # a fork has no other threads
            signal.alarm(60)
            real, seen = getattr(place, name), []

            def die(*arguments, real=real, seen=seen, **options):
                seen.append(1)
                if len(seen) == call:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments, **options)

            setattr(place, name, die)
            try:
                run(tiny_base, tmp_path)
            finally:
                os._exit(0)
        os.waitpid(child, 0)
    again, _ = run(tiny_base, tmp_path)
    assert same(again, whole[0])
    assert not [path for path in tmp_path.rglob(".*") if path.name != ".writing"]


# ------------------------------------------------------------------------------------------------------------ places


def test_a_folder_that_is_a_file(tiny_base, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(MixDPOError, match="file: found a file, expected a folder or nothing"):
        run(tiny_base, tmp_path / "file")
    with pytest.raises(MixDPOError, match=r"below: cannot be written \(Not a directory"):
        run(tiny_base, tmp_path / "file" / "below")


@pytest.mark.parametrize("limit", [300, 2000, 6000])
def test_a_full_place_is_one_clear_error_and_leaves_nothing_half_written(
    tiny_base, tmp_path, whole, limit
):
    """Files over a limit fail in the libraries that write them as a full disk makes them fail."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(MixDPOError, match="nothing half-written was kept; free some space"):
            run(tiny_base, tmp_path / "fit")
        if limit == 300:
            with pytest.raises(MixDPOError, match="mixture: a file is larger .*nothing half-writ"):
                whole[0].save_pretrained(tmp_path / "mixture")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "mixture").exists() and checkpoints(tmp_path / "fit") == []
    again, _ = run(tiny_base, tmp_path / "fit")
    assert same(again, whole[0])


def test_files_of_others_in_the_folder_of_a_fit_are_kept(tiny_base, tmp_path, capsys):
    names = ("fit.json", "restarts.csv", "snapshot-5.safetensors")
    for name in names:
        (tmp_path / name).write_text("mine")
    data = preference_rows(12)
    fit(policy(tiny_base), data, CONFIG.change(passes=1.0), folder=tmp_path)
    assert {(tmp_path / f"unknown-0-{name}").read_text() for name in names} == {"mine"}
    assert "fit.json: of an unknown fit, renamed to unknown-0-fit.json" in capsys.readouterr().err
    fit(policy(tiny_base), data, CONFIG.change(passes=1.0), folder=tmp_path)
    assert not list(tmp_path.glob("unknown-1-*"))
