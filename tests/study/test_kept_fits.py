"""A fit of a study is kept whole, and its checkpoints go only when it is."""

import os
import signal

import pytest
import torch
from tiny import plain_fit, preference_rows

from mixdpo_lib import store
from mixdpo_lib.data.pairs import Pairs
from mixdpo_lib.experts.heads import HeadExperts
from mixdpo_lib.gates.weights import LearnedWeights
from mixdpo_lib.policy.mixture import MixturePolicy
from mixdpo_lib.study import fits

CONFIG = plain_fit(batch_size=6, passes=2.0, learning_rate=0.02)


@pytest.fixture(scope="module")
def data():
    return Pairs.of(preference_rows(18))


def keep(base, data):
    policy = MixturePolicy(HeadExperts(base, 2, rank=2), LearnedWeights(2), 0.3)
    result, rewards, _ = fits.kept_fit(policy, data, data, CONFIG, data.texts)
    return policy, result, rewards


@pytest.mark.parametrize("name", ["rmtree", "replace", "write_json_atomic", "kept", "text_rewards"])
def test_a_kill_while_it_tidies_or_before_never_blocks(tiny_base, data, project, name):
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # a fork has no other threads
        signal.alarm(60)

        def die(*_, **__):
            os.kill(os.getpid(), signal.SIGKILL)

        places = {
            "rmtree": (store.files.shutil, "rmtree"),
            "replace": (store.files.os, "replace"),
            "write_json_atomic": (fits, "write_json_atomic"),
            "kept": (fits, "remove_folder"),
            "text_rewards": (MixturePolicy, "text_rewards"),
        }
        if name in ("rmtree", "replace"):  # in the tidying at the end alone
            real = fits.remove_folder

            def tidy(folder):
                setattr(*places[name], die)
                real(folder)

            fits.remove_folder = tidy
        else:
            setattr(*places[name], die)
        try:
            keep(tiny_base, data)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    checkpoints = store.cache_folder() / "checkpoints"
    policy, result, rewards = keep(tiny_base, data)
    again, read, same = keep(tiny_base, data)
    assert torch.equal(rewards, same) and result.best_step == read.best_step
    assert torch.equal(policy.experts.up, again.experts.up)
    assert torch.equal(policy.experts.active_ids, again.experts.active_ids)
    assert list(checkpoints.iterdir()) == []
