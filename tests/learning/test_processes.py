"""Several processes, and a step in several parts, give the training of one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import processes
import pytest

from mixdpo_lib.learning.inference import Recognition

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def single(tiny_base):
    return {name: processes.run(tiny_base, *case) for name, case in processes.CASES.items()}


@pytest.fixture(scope="module")
def two(tiny_folder, tmp_path_factory):
    """The same fits by two processes on this machine's processor."""
    place = tmp_path_factory.mktemp("processes")
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--main_process_port",
        "0",
        str(HERE / "processes.py"),
        str(place),
        str(tiny_folder),
    ]
    path = os.pathsep.join(
        [str(HERE.parents[1]), str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")]
    )
    environment = {
        **os.environ,
        "PYTHONPATH": path,
        "MIXDPO_CACHE": str(place / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((place / "found.json").read_text())


@pytest.mark.parametrize("name", [*processes.CASES, "resumed"])
def test_two_processes_train_as_one(single, two, name):
    own = single["unit" if name == "resumed" else name]
    losses, other = np.array(own["losses"]), np.array(two[name]["losses"])
    assert len(losses) >= 30
    losses = losses[-len(other) :]  # those of the steps after the last checkpoint
    assert len(other) >= (10 if name == "resumed" else 30) and losses[-1] < 0.6
    difference = (other - losses) / losses
    assert np.abs(difference).max() < 1e-4 and abs(difference.mean()) < 2e-5
    np.testing.assert_allclose(two[name]["final"], own["final"], atol=2e-4)
    np.testing.assert_allclose(two[name]["w"], own["w"], atol=1e-5)


def test_parts_of_a_step_are_the_step(single):
    whole, parts = (np.array(single[name]["losses"]) for name in ("unit", "accumulate"))
    assert np.abs((parts - whole) / whole).max() < 1e-4
    np.testing.assert_allclose(single["accumulate"]["final"], single["unit"]["final"], atol=2e-4)


def test_one_pair_at_a_time(tiny_base, single):
    found = processes.run(tiny_base, "head", {"batch_size": 1, "accumulate": 8})
    np.testing.assert_allclose(found["losses"], single["unit"]["losses"], rtol=1e-4)


def test_mixed_precision_is_near(tiny_base, single):
    found = processes.run(tiny_base, "adapter", {"bf16": True})
    np.testing.assert_allclose(found["losses"][:10], single["adapter"]["losses"][:10], rtol=0.05)
    exact = processes.run(tiny_base, "head", {"bf16": True})
    np.testing.assert_allclose(exact["losses"], single["unit"]["losses"], rtol=1e-5)


def test_recognition_takes_whole_steps(tiny_base):
    with pytest.raises(
        ValueError, match=r"inference=Recognition.* with accumulate=2 and 1 processes"
    ):
        processes.run(tiny_base, "head", {"inference": Recognition(), "accumulate": 2})
