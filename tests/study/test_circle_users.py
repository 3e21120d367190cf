"""Users on the circle of two rewards: their angles, their answers, refusals."""

import numpy as np
import pandas as pd
import pytest

from mixdpo_lib.study.circle_users import simulate_circle
from mixdpo_lib.study.simulated_people import DesignConfig

SPLITS = {"train": range(0, 40), "validation": range(40, 50), "test": range(50, 60)}


@pytest.fixture(scope="module")
def world():
    rng = np.random.default_rng(0)
    candidates = pd.DataFrame(
        {
            "prompt_id": np.repeat(np.arange(60), 4),
            "prompt": [f"p{i}" for i in np.repeat(np.arange(60), 4)],
            "response": [f"r{i}" for i in range(240)],
        }
    )
    return candidates, pd.DataFrame({"a": 3 + 2 * rng.normal(size=240), "b": rng.normal(size=240)})


def test_users_stand_all_around_and_answer_by_their_own_reward(world):
    candidates, scores = world
    config = DesignConfig(n_users=40, pairs_per_user=100, validation_pairs_per_user=10)
    sets = simulate_circle(candidates, scores, config, SPLITS, test_pairs=30)
    train = sets["train"].to_pandas()
    assert {name: len(part) for name, part in sets.items()} == {
        "train": 4000,
        "validation": 400,
        "test": 1200,
    }
    angle = np.sort(train.groupby("user")["angle"].first().to_numpy())
    assert np.allclose(np.floor(angle / (2 * np.pi / 40)), np.arange(40))  # one in each share
    np.testing.assert_allclose(train["toward_0"], np.cos(train["angle"]), atol=1e-12)
    assert abs(train["flipped"].mean() - config.flip_rate) < 0.02
    test = sets["test"].to_pandas()
    z = ((scores - scores.mean()) / scores.std(ddof=0)).to_numpy()
    place = {text: i for i, text in enumerate(candidates["response"])}
    difference = z[test["chosen"].map(place)] - z[test["rejected"].map(place)]
    own = np.stack([np.cos(test["angle"]), np.sin(test["angle"])], 1)
    gap = (difference * own).sum(1)
    assert (gap > 0).all() and not test["flipped"].any()
    np.testing.assert_allclose(gap, test["gap"])
    again = simulate_circle(candidates, scores, config, SPLITS, test_pairs=30)
    assert again["train"].to_pandas().equals(train)


def test_what_is_no_circle_is_refused(world):
    candidates, scores = world
    with pytest.raises(ValueError, match="expected two: a circle lies between two rewards"):
        simulate_circle(candidates, scores[["a"]], DesignConfig(), SPLITS)
    with pytest.raises(ValueError, match="train pairs a user wanted, but there are 240"):
        simulate_circle(candidates, scores, DesignConfig(pairs_per_user=500), SPLITS)
