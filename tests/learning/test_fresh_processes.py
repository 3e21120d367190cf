"""Equal fits are equal: in another process to the last bit, with another number of threads to 1e-5."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny import plain_fit, preference_rows, save_tiny_base

from mixdpo_lib.base.model import load_base
from mixdpo_lib.experts.heads import HeadExperts
from mixdpo_lib.gates.weights import LearnedWeights
from mixdpo_lib.learning.fit import fit
from mixdpo_lib.policy.mixture import MixturePolicy


def fitted(folder, threads):
    """All numbers of a policy after a fit, made with so many threads from nothing that is kept."""
    os.environ["MIXDPO_CACHE"] = str(folder / f"cache-{threads}-{os.getpid()}")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    policy = MixturePolicy(HeadExperts(load_base(folder / "base"), 2, rank=4), LearnedWeights(2))
    fit(policy, preference_rows(24), plain_fit(passes=6.0, batch_size=6, learning_rate=0.01))
    torch.set_num_threads(before)
    return {name: value.detach().clone() for name, value in policy.state_dict().items()}


def test_equal_fits_are_equal(tmp_path, monkeypatch):
    monkeypatch.setenv("MIXDPO_CACHE", str(tmp_path / "cache"))
    save_tiny_base(tmp_path / "base")
    tests = Path(__file__).parents[1]
    subprocess.run(
        [sys.executable, __file__, str(tmp_path)],
        check=True,
        env={**os.environ, "PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}"},
    )
    own = fitted(tmp_path, 1)
    assert float(own["experts.up"].abs().max()) > 1e-3  # something was learned
    for threads in (1, 2):
        other = load_file(tmp_path / f"{threads}.safetensors")
        assert set(other) == set(own)
        for name, value in own.items():
            if threads == 1:
                assert torch.equal(other[name], value), name
            else:
                torch.testing.assert_close(other[name], value, atol=1e-5, rtol=1e-5)


if __name__ == "__main__":
    for threads in (1, 2):
        state = fitted(Path(sys.argv[1]), threads)
        save_file(state, Path(sys.argv[1]) / f"{threads}.safetensors")
