"""A reward of one's own, by its own lines alone: fitted, kept, asked, reported, and wanted by simulated people."""

import json
import re
import string
import sys
from pathlib import Path
from random import Random

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from mixdpo_lib.store import MixDPOError
from mixdpo_lib.study.judges import (
    REWARDS,
    Judge,
    JudgeConfig,
    Judges,
    Mark,
    fit_judges,
    judges,
    report_card,
    score_texts,
)
from mixdpo_lib.study.judges import figures as judge_figures
from mixdpo_lib.study.judges.contract import judge_classes
from mixdpo_lib.study.judges.probes import PROBES
from mixdpo_lib.study.judges.words import piece
from mixdpo_lib.study.reviews import load_reviews
from mixdpo_lib.study.simulated_people import DesignConfig, simulate_preferences

# ------------------------------------------------------------------------------------- the reward


class Loudness(Judge):
    """How much of a text is shouted."""

    reward = "loudness"
    bars = {"shouted": 0.9}

    def examine(self, exam):
        shouted = [text.upper() for text in exam.pieces]
        yield Mark.paired_rank("shouted", self.score(shouted), self.score(exam.pieces))


class CountedLoudness(Loudness):
    role, unit, family = "training", "share of words", "counted"

    @classmethod
    def fit(cls, reviews, config):
        return cls()

    def rate(self, texts):
        return np.array([np.mean([w.isupper() for w in t.split()]) for t in texts])

    def state(self):
        return {}, {}

    @classmethod
    def from_state(cls, arrays, values):
        return cls()


class LearnedLoudness(Loudness):
    role, unit, family = "evaluation", "logit", "linear, letters"
    letters = CountVectorizer(analyzer="char", lowercase=False, vocabulary=string.ascii_letters)

    def __init__(self, weight):
        self.weight = weight

    @classmethod
    def fit(cls, reviews, config):
        rng = Random(config.seed)
        quiet = [piece(text, config.piece_words, rng) for text in reviews["text"]]
        counts = cls.letters.transform([*quiet, *(text.upper() for text in quiet)])
        model = LogisticRegression(fit_intercept=False).fit(counts, np.repeat([0, 1], len(quiet)))
        return cls(model.coef_[0])

    def rate(self, texts):
        return self.letters.transform(texts) @ self.weight

    def state(self):
        return {"weight": self.weight}, {}

    @classmethod
    def from_state(cls, arrays, values):
        return cls(**arrays)


# ------------------------------------------------------------------------- what the library does

PAGE = Path(__file__).resolve().parents[3] / "docs" / "adding.md"
ASKED = ("loudness", "sentiment")
SMALL = JudgeConfig(pieces_per_review=2)
TEXTS = ["A film about two brothers.", "A FILM about TWO BROTHERS.", "A FILM ABOUT TWO BROTHERS."]


@pytest.fixture(scope="module")
def reviews():
    """300 real reviews, both labels."""
    rows = np.random.default_rng(5).permutation(25_000)[:300]
    return load_reviews("imdb-packaged").select(sorted(rows.tolist()))


@pytest.fixture(scope="module")
def fitted(reviews):
    return fit_judges(reviews, SMALL, rewards=ASKED)


def test_it_is_fitted_beside_a_reward_of_the_study(fitted):
    assert list(fitted.training) == list(fitted.evaluation) == list(ASKED)
    assert [type(judge) for judge in fitted.everyone[::2]] == [CountedLoudness, LearnedLoudness]
    assert fitted.training["loudness"].name == "loudness/training"
    assert "loudness" not in REWARDS  # the study's own stay what they are


def test_texts_are_scored_in_the_order_asked(fitted):
    for by in (fitted.training, fitted.evaluation):
        table = score_texts(TEXTS, by)
        assert list(table) == list(ASKED) and table["loudness"].is_monotonic_increasing
        assert table["loudness"].is_unique
    assert score_texts(TEXTS, fitted.training)["loudness"].tolist() == pytest.approx(
        [0.2, 0.8, 1.0]
    )
    with pytest.raises(ValueError, match="loudness/training: row 1: found an empty text"):
        fitted.training["loudness"].score(["A film.", ""])


def test_it_is_saved_and_loaded(fitted, tmp_path):
    fitted.save(tmp_path)
    again = Judges.load(tmp_path)
    assert again.config == SMALL and list(again.training) == list(again.evaluation) == list(ASKED)
    for before, after in zip(fitted.everyone, again.everyone, strict=True):
        assert type(after) is type(before)
        np.testing.assert_array_equal(after.score(TEXTS), before.score(TEXTS))
    (tmp_path / "loudness_evaluation.safetensors").unlink()
    with pytest.raises(MixDPOError, match="loudness_evaluation: found no readable judge"):
        Judges.load(tmp_path)


def test_an_unknown_judge_is_refused_and_nothing_is_imported(fitted, tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text("raise SystemExit('imported by a name in a file')\n")
    monkeypatch.syspath_prepend(tmp_path)
    fitted.save(tmp_path)
    record = json.loads((tmp_path / "judges.json").read_text())
    assert record["judges"]["loudness/training"] == __name__
    record["judges"] |= {"silence/training": "my_rewards"}
    (tmp_path / "judges.json").write_text(json.dumps(record))
    with pytest.raises(
        MixDPOError,
        match=r"holds the judge 'silence/training', which nothing that "
        r"is imported defines; import its module \(my_rewards\) first",
    ):
        Judges.load(tmp_path)
    assert "my_rewards" not in sys.modules


def test_a_damaged_record_is_refused(fitted, tmp_path):
    fitted.save(tmp_path)
    record = json.loads((tmp_path / "judges.json").read_text())
    for wrong in ({"piece_wrods": 3}, {"piece_words": 0}):
        (tmp_path / "judges.json").write_text(json.dumps(record | wrong))
        with pytest.raises(
            MixDPOError, match=r"judges.json: found no configuration of judges \(.*piece_w"
        ):
            Judges.load(tmp_path)


def test_folders_of_before_hold_the_rewards_of_the_study(fitted, tmp_path):
    fitted.save(tmp_path)
    record = json.loads((tmp_path / "judges.json").read_text())
    del record["judges"]
    (tmp_path / "judges.json").write_text(json.dumps(record))
    with pytest.raises(
        MixDPOError, match="informativeness_training"
    ):  # the second that is looked for
        Judges.load(tmp_path)


def test_it_is_kept_by_name_and_version(reviews, tmp_path, monkeypatch):
    monkeypatch.setenv("MIXDPO_CACHE", str(tmp_path / "cache"))
    reviews.to_csv(tmp_path / "reviews.csv")
    ask = {"source": tmp_path / "reviews.csv", "config": SMALL, "rewards": ["loudness"]}
    first = judges(**ask)
    assert list(first.training) == ["loudness"]
    with monkeypatch.context() as patch:
        patch.setattr(LearnedLoudness, "fit", lambda *_: pytest.fail("fitted again"))
        again = judges(**ask)
    pairs = zip(first.everyone, again.everyone, strict=True)
    assert all(np.array_equal(a.score(TEXTS), b.score(TEXTS)) for a, b in pairs)
    monkeypatch.setattr(LearnedLoudness, "version", 2)
    monkeypatch.setattr(LearnedLoudness, "fit", lambda *_: LearnedLoudness(np.ones(52)))
    assert judges(**ask).evaluation["loudness"].score(["abc"]) == 3


def test_it_is_in_the_report_card(fitted, reviews):
    card = report_card(fitted, reviews.select(range(100)), n=24)
    own = card["validity"].query("reward == 'loudness'")
    assert own["task"].tolist() == ["shouted"] * 2 and own["judge"].tolist() == [
        "training",
        "evaluation",
    ]
    assert (own["bar"] == 0.9).all() and (own["value"] >= 0.9).all() and (own["n"] == 24).all()
    assert set(card["validity"]["reward"]) == set(ASKED)
    assert len(card["agreement"]) == 16 and len(card["scores"]) == 4 * 24
    assert set(card["spread"]["unit"]) == {"share of words", "logit"}
    effect = card["probes"].query("reward == 'loudness'").set_index(["judge", "probe"])["effect"]
    assert len(effect) == 2 * len(PROBES) and effect["training", "lower_case"] < 0
    figure, ax = plt.subplots()
    judge_figures.judge_report(own, ax)
    judge_figures.judge_agreement(card["agreement"], ax)
    judge_figures.probe_scores(card["probes"], ax)
    plt.close(figure)


def test_people_who_want_it(fitted, reviews):
    rng = Random(0)
    texts = [
        " ".join(w.upper() if rng.random() < share else w for w in piece(text, 12, rng).split())
        for text in reviews["text"][:60]
        for share in (0.0, 0.3, 0.6, 1.0)
    ]
    candidates = pd.DataFrame(
        {"prompt_id": np.repeat(np.arange(60), 4), "prompt": "It is", "response": texts}
    )
    design = DesignConfig(
        n_users=8, n_new_users=2, pairs_per_user=60, validation_pairs_per_user=6, context_pairs=6
    )
    sets = simulate_preferences(candidates, score_texts(texts, fitted.training), design)
    assert set(sets["train"]["group"]) == set(ASKED) and len(set(sets["train"]["user"])) == 8
    rows = sets["train"].to_pandas()
    judge = fitted.training["loudness"]
    louder = judge.score(rows["chosen"].tolist()) > judge.score(rows["rejected"].tolist())
    share = pd.Series(louder).groupby(rows["group"]).mean()
    assert share["loudness"] > 0.85 and abs(share["sentiment"] - 0.5) < 0.15


def test_the_page_on_adding_a_reward_runs(tmp_path, monkeypatch):
    rows = np.random.default_rng(6).permutation(25_000)[:600]
    load_reviews("imdb-packaged").select(sorted(rows.tolist())).to_csv(tmp_path / "my-reviews.csv")
    monkeypatch.chdir(tmp_path)
    section = PAGE.read_text(encoding="utf-8").split("\n## A reward\n")[1].split("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, re.S)
    assert len(blocks) == 2 and len(section.splitlines()) <= 100  # a page
    names = {"__name__": "my_reward"}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    own = names["card"]["validity"].query("reward == 'plainness'")
    assert (
        own["judge"].tolist() == ["training", "evaluation"] and (own["value"] >= own["bar"]).all()
    )
    assert (
        names["scores"]["plainness"].is_monotonic_decreasing
        and list(names["scores"])[0] == "sentiment"
    )
    assert [type(j).__module__ for j in names["again"].everyone if j.reward == "plainness"] == [
        "my_reward"
    ] * 2


# --------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"role": "judging"}, "role='judging'; expected one of"),
        ({"reward": "my/reward"}, "reward='my/reward'; expected small letters, digits and _"),
        ({"unit": ""}, "no unit; expected a few words"),
        ({"family": ""}, "no family; expected a few words"),
        (
            {"reward": "loudness"},
            "the training judge of 'loudness' is already .*CountedLoudness; give",
        ),
        (
            {"reward": "grammar"},
            "the training judge of 'grammar' is already .*GrammarTraining; give",
        ),
    ],
)
def test_a_class_that_is_no_judge_is_refused_at_once(words, message):
    with pytest.raises(TypeError, match=message):
        type("Another", (CountedLoudness,), {"reward": "another", **words})
    with pytest.raises(ValueError, match="no training judge of 'another' is defined"):
        judge_classes(["another"])


def test_a_judge_that_lacks_a_method_cannot_be_made():
    with pytest.raises(TypeError, match="abstract.*examine"):
        type("Half", (Judge,), {"rate": len, "state": dict, "fit": None, "from_state": None})()


def test_a_class_may_be_defined_anew():
    for unit in ("first", "second"):
        kind = type("Again", (CountedLoudness,), {"reward": "again", "unit": unit})
    with pytest.raises(ValueError, match="no evaluation judge of 'again' is defined"):
        judge_classes(["again"])
    type("Other", (LearnedLoudness,), {"reward": "again"})
    assert judge_classes(["again"])[0] is kind


@pytest.mark.parametrize("rewards", ["loudness", [], ["loudness", "loudness"]])
def test_what_is_asked_for_are_different_names(reviews, rewards):
    with pytest.raises(ValueError, match="expected different names, such as"):
        fit_judges(reviews, SMALL, rewards)


def test_an_unknown_reward_is_named(reviews):
    with pytest.raises(
        ValueError, match="no training judge of 'lowdness' is defined; known are .*loudness.*import"
    ):
        fit_judges(reviews, SMALL, ["lowdness"])


def test_a_score_for_each_text():
    with pytest.raises(
        ValueError, match=r"scores of shape \(3,\) for 1 texts, expected one number a text"
    ):
        type("Three", (LearnedLoudness,), {"reward": "three", "rate": lambda *_: np.ones(3)})(
            None
        ).score(["A film."])
