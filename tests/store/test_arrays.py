"""Large arrays: their space is taken before they are filled, by whatever way the system offers."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mixdpo_lib import store
from mixdpo_lib.store import MixDPOError


def blocks(path):
    return os.stat(path).st_blocks * 512


@pytest.mark.parametrize("way", ["allocated", "unsupported", "absent"])
def test_a_large_array_has_no_holes(tmp_path, monkeypatch, way):
    def unsupported(*_):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    if way == "unsupported":
        monkeypatch.setattr(os, "posix_fallocate", unsupported, raising=False)
    if way == "absent":
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    array = store.large_array(tmp_path / "a.npy", (3000, 250))
    assert blocks(tmp_path / "a.npy") >= array.nbytes
    assert array.dtype == np.float32 and not array.any()
    array[:] = np.arange(250)
    array.flush()
    again = np.load(tmp_path / "a.npy", allow_pickle=False)
    assert again.shape == (3000, 250) and (again == np.arange(250)).all()
    assert (tmp_path / "a.npy").stat().st_size == array.offset + array.nbytes


def test_an_empty_one(tmp_path):
    assert store.large_array(tmp_path / "a.npy", (0, 8)).shape == (0, 8)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_no_space_is_said_before_anything_is_computed(project, monkeypatch, number):
    def full(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    filled = []

    def build(folder):
        filled.append(store.large_array(folder / "a.npy", (1000, 10)))

    with pytest.raises(MixDPOError, match="cache/stage: .*MIXDPO_CACHE"):
        store.cached("stage", 1, {}, build)
    assert not filled
    assert [p for p in (project / "data/cache/stage").iterdir() if p.is_dir()] == []


def test_a_file_that_may_not_grow_is_an_error_and_no_death(project, tiny_folder):
    """A limit of the system stands for a full disk: the process goes on and says so."""
    code = (
        "import resource, sys\nfrom mixdpo_lib import Pairs, load_base\n"
        "from mixdpo_lib.base.features import text_features\nfrom tiny import preference_rows\n"
        "base, texts = load_base(sys.argv[1]), Pairs.of(preference_rows(60)).texts\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "try:\n    text_features(base, texts)\n"
        "except Exception as error:\n    print(type(error).__name__, getattr(error, 'errno', ''), error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tiny_folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert done.returncode == 0, (done.returncode, done.stderr)
    assert "File too large" in done.stdout or "larger than may be written" in done.stdout
    left = [path for path in (project / "data/cache/features").rglob("*") if path.is_dir()]
    assert left == []
