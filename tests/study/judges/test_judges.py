"""The judges: numbers worked out by hand, refusals, files, and what they can do on real reviews."""

import ast
import dataclasses
import math
from pathlib import Path
from random import Random

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from datasets import Dataset  # noqa: E402

from mixdpo_lib.store import MixDPOError  # noqa: E402
from mixdpo_lib.study import judges as judges_wing  # noqa: E402
from mixdpo_lib.study.judges import (
    contract,
    corruptions,
    exam,
    informativeness,
    nets,
    panel,
    probes,
    report,
    sentiment,
)  # noqa: E402
from mixdpo_lib.study.judges import figures as judge_figures  # noqa: E402
from mixdpo_lib.study.judges import grammar as grammar_file
from mixdpo_lib.study.judges.words import common_words, count_reviews, piece
from mixdpo_lib.study.reviews import load_reviews  # noqa: E402

SMALL = contract.JudgeConfig(pieces_per_review=2)


@pytest.fixture(scope="module")
def reviews():
    """800 real reviews, both labels."""
    rows = np.random.default_rng(3).permutation(25_000)[:800]
    return load_reviews("imdb-packaged").select(sorted(rows.tolist()))


@pytest.fixture(scope="module")
def judges(reviews):
    return panel.fit_judges(reviews, SMALL)


TEXTS = [
    "A gripping, beautiful film about two brothers.",
    "This was awful: boring, stupid and far too long.",
    "So so .",
]


# --- numbers worked out by hand
def test_informativeness_by_hand():
    judge = informativeness.InformativenessTraining(["dragon", "castle"], np.log([10.0, 100.0]))
    words = "the dragon and the castle and the dragon of it all in the end of one".split()
    assert len(words) == 16
    assert judge.score([" ".join(words)])[0] == pytest.approx(math.log(1000) / 16)
    assert judge.score([" ".join(words + ["oh"] * 16)])[0] == pytest.approx(
        math.log(1000) / 32
    )  # padding halves it
    assert judge.score(["dragon dragon dragon"])[0] == pytest.approx(
        math.log(10) / 16
    )  # short: counts as 16 words
    assert judge.score(["xyzzy qwerty \U0001f525"])[0] == 0.0  # non-words and symbols say nothing


def test_idf_counts_reviews_not_mentions():
    texts = ["dragon dragon house"] + ["house of cards"] * 4 + ["nothing here at all"] * 15
    data = Dataset.from_dict({"text": texts, "label": [0, 1] * 10})
    judge = informativeness.InformativenessTraining.fit(data, contract.JudgeConfig(min_reviews=1))
    assert judge.idf["dragon"] == pytest.approx(math.log(20))
    assert "house" not in judge.idf  # in 5 of 20 reviews: more than 10 %
    assert "the" not in judge.idf


def test_the_common_words_are_the_same_in_every_process():
    texts = [" ".join(f"word{chr(97 + i)}" for i in range(20)), "wordz"]
    assert list(count_reviews(texts))[:3] == [
        "worda",
        "wordb",
        "wordc",
    ]  # a set would have any order
    assert common_words(texts, 3) == {"worda", "wordb", "wordc"}


@pytest.fixture(scope="module")
def grammar():
    """Knows five words; "the film" is common, "film the" was never seen: expected 10 x 10 / 50 = 2 by chance."""
    return grammar_file.GrammarTraining(
        words=["the", "film", "was", "good", "story"],
        common=["film", "the"],
        counts=np.array([10, 10]),
        keys=np.array([1 * 2 + 0]),
        pairs=np.array([9]),
        total=50,
    )


def test_grammar_by_hand(grammar):
    assert grammar.findings("The film was good.") == dict.fromkeys(grammar.weights, 0)
    assert grammar.score(["The film was good."])[0] == 0.0
    found = grammar.findings("We saw a old film and and an user ### of graet story.")
    assert (found["article"], found["repetition"], found["stray_symbols"], found["non_words"]) == (
        2,
        1,
        1,
        1,
    )
    assert grammar.odd_neighbours("the film") == 0.0  # seen 9 times, expected 2
    assert grammar.odd_neighbours("film the") == pytest.approx(math.log(3 / 1))
    text = "It was a film the critics in old London liked."  # ten words, one odd pair
    assert grammar.findings(text)["odd_neighbours"] == pytest.approx(math.log(3))
    assert grammar.score([text])[0] == pytest.approx(
        -(0.3 * math.log(3) + 0.5 * grammar.findings(text)["checker"]) / 10
    )


def test_a_cut_off_end_is_not_judged(grammar):
    assert grammar.findings("The film was good and the stor")["non_words"] == 0
    assert grammar.findings("The film was good and the stroy.")["non_words"] == 1
    assert (
        grammar.score(["The film was good and gr"])[0]
        == grammar.score(["The film was good and grxx"])[0]
    )


def test_names_numbers_and_meant_repeats_are_no_findings(grammar):
    found = grammar.findings("Duran Duran had had 12 songs in Qwertzia.")
    assert found["repetition"] == found["non_words"] == 0


def test_articles():
    wrong = {
        "a": ["apple", "hour", "uninteresting", "honest"],
        "an": ["user", "one", "film", "European", "unique"],
    }
    for article, words in wrong.items():
        for word in words:
            assert grammar_file.wants_an(word) is (article == "a"), word


# --- corruptions
@pytest.mark.parametrize("kind", sorted({**corruptions.CORRUPTIONS, **corruptions.DAMAGE}))
def test_corruptions_change_something_and_follow_the_seed(kind):
    make = {**corruptions.CORRUPTIONS, **corruptions.DAMAGE}[kind]
    text = "It was a pleasure to see the old man, who has an odd way of walking to the river."
    changed = [make(text, Random(seed)) for seed in range(20)]
    assert all(c is not None and c != text for c in changed)
    assert changed == [make(text, Random(seed)) for seed in range(20)]


def test_places_of_corruptions():
    for seed in range(40):
        text, label = grammar_file.GrammarEvaluation.corrupted(
            "He has seen the old house of a friend in a town.", Random(seed)
        )
        assert len(label) == len(nets.tokens_of(text))
        assert (label.sum() > 0) == (
            text != "He has seen the old house of a friend in a town."
        ) or label.sum() > 0


def test_worse_texts_keep_their_length():
    text, rng = " ".join(f"word{i}" for i in range(32)), Random(0)
    for worse in (
        probes.diluted(text, rng),
        probes.repeated(text, rng),
        probes.generic(text, rng, frozenset()),
    ):
        assert len(worse.split()) == 32 and worse != text
    assert len(probes.padded(text, rng).split()) == 56
    assert not set(probes.FILLER_FIT) & set(probes.FILLER_PROBE)


# --- a reward is one file and one name
def test_every_reward_is_one_file_that_registers_both_judges():
    own = {
        name: kind
        for name, kind in contract.registered_judges().items()
        if kind.__module__.startswith("mixdpo_lib.")
    }
    assert set(own) == {
        f"{reward}/{role}" for reward in contract.REWARDS for role in contract.ROLES
    }
    for kind in own.values():
        assert kind.__module__ == f"mixdpo_lib.study.judges.{kind.reward}" and kind.bars
    assert len({kind.family for kind in own.values()}) == 6  # no two judges are the same instrument


def test_the_public_names_are_there():
    for name in judges_wing.__all__:
        assert getattr(judges_wing, name) is not None and name in dir(judges_wing)
    with pytest.raises(AttributeError, match="no attribute 'poetry'"):
        _ = judges_wing.poetry


@pytest.mark.parametrize("room", [contract, exam, nets, panel, report])
def test_no_other_room_knows_a_reward(room):
    tree = ast.parse(Path(room.__file__).read_text(encoding="utf-8"))
    rewards = set(contract.REWARDS)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.module not in rewards and not {name.name for name in node.names} & rewards
        elif isinstance(node, ast.Compare):
            assert not {c.value for c in ast.walk(node) if isinstance(c, ast.Constant)} & rewards, (
                ast.unparse(node)
            )


# --- splitting, fitting, files
def test_split_is_disjoint_by_text_and_seeded(reviews):
    double = Dataset.from_dict(
        {"text": reviews["text"][:] + reviews["text"][:20], "label": [0] * 820}
    )
    parts = contract.split_reviews(double, 1)
    texts = [t for part in parts.values() for t in part["text"]]
    assert list(parts) == list(contract.PARTS)
    assert len(texts) == len(set(texts)) == len(set(double["text"]))
    assert len(parts["prompts"]) >= 0.1 * len(texts)
    assert parts["report"]["text"] == contract.split_reviews(double, 1)["report"]["text"]
    assert parts["report"]["text"] != contract.split_reviews(double, 2)["report"]["text"]
    with pytest.raises(ValueError, match="at least 50"):
        contract.split_reviews(double.select(range(10)))


def test_scores_are_finite_and_do_not_depend_on_neighbours(judges):
    for role in contract.ROLES:
        table = panel.score_texts(TEXTS, getattr(judges, role))
        assert list(table) == list(contract.REWARDS) and table.shape == (3, 3)
        assert np.isfinite(table.to_numpy()).all() and (table.dtypes == np.float64).all()
        for reward, judge in getattr(judges, role).items():
            alone = np.array([judge.score([t])[0] for t in TEXTS])
            np.testing.assert_allclose(alone, table[reward], atol=1e-5)
            assert judge.name == f"{reward}/{role}" and judge.unit and judge.family


def test_saved_judges_score_the_same_and_hold_no_pickle(judges, tmp_path):
    judges.save(tmp_path)
    again = panel.Judges.load(tmp_path)
    assert again.config == judges.config
    for role in contract.ROLES:
        a, b = (panel.score_texts(TEXTS, getattr(j, role)) for j in (judges, again))
        np.testing.assert_array_equal(a, b)
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".safetensors"}
    (tmp_path / "grammar_training.json").write_text("{")
    with pytest.raises(MixDPOError, match="grammar_training"):
        panel.Judges.load(tmp_path)


def test_same_seed_same_judge(reviews):
    half = reviews.select(range(120))
    for kind in (sentiment.SentimentEvaluation, informativeness.InformativenessEvaluation):
        a, b = (kind.fit(half, SMALL).score(TEXTS) for _ in range(2))
        np.testing.assert_array_equal(a, b)
        assert not np.array_equal(
            a, kind.fit(half, dataclasses.replace(SMALL, seed=1)).score(TEXTS)
        )


def test_what_few_reviews_can_teach(judges, reviews):
    good = ["A wonderful, moving film with excellent acting; I loved it."] * 2
    bad = ["Awful, boring waste of time; the worst acting and a terrible script."] * 2
    for role in contract.ROLES:
        assert (
            getattr(judges, role)["sentiment"].score(good)
            > getattr(judges, role)["sentiment"].score(bad)
        ).all()
    rng = Random(0)
    pieces = [piece(t, 32, rng) for t in reviews["text"][:60]]
    for role in contract.ROLES:
        judge = getattr(judges, role)["informativeness"]
        rank = exam.paired_rank(
            judge.score(pieces), judge.score([probes.diluted(t, rng) for t in pieces])
        )
        assert rank.mean() > 0.65  # 350 reviews; 9,500 give .94 (notebook 01)


@pytest.fixture(scope="module")
def card(judges, reviews):
    return report.report_card(judges, reviews.select(range(100)), n=24)


def test_report_card(card):
    assert set(card) == {"validity", "spread", "agreement", "probes", "scores"}
    validity = card["validity"]
    assert set(validity["reward"]) == set(contract.REWARDS) and set(validity["judge"]) == set(
        contract.ROLES
    )
    assert ((validity["low"] <= validity["value"]) & (validity["value"] <= validity["high"])).all()
    assert validity["value"].between(0, 1).all() and (validity["n"] > 0).all()
    kinds = set(validity.query("reward == 'grammar'")["task"])
    assert kinds == {*corruptions.CORRUPTIONS, *corruptions.DAMAGE, "all kinds"}
    assert len(card["agreement"]) == 36 and set(card["probes"]["probe"]) == set(probes.PROBES)
    assert len(card["scores"]) == 6 * 24
    rule = validity.query(
        "reward == 'grammar' and judge == 'training' and measure == 'paired rank'"
    ).set_index("task")
    assert rule.loc[["article", "repetition"], "value"].min() >= 0.85


def test_figures_show_the_report_card(card):
    figure, ax = plt.subplots()
    shown = card["validity"].query("reward == 'grammar' and measure == 'auc'")
    assert judge_figures.judge_report(shown, ax) is ax
    assert len(ax.get_yticks()) == shown["task"].nunique()
    with pytest.raises(ValueError, match="filter the table"):
        judge_figures.judge_report(card["validity"], ax)
    for draw, table, texts in (
        (judge_figures.judge_agreement, "agreement", 36),
        (judge_figures.probe_scores, "probes", 54),
    ):
        ax.clear()
        draw(card[table], ax)
        assert len(ax.texts) == texts
    ax.clear()
    one = card["scores"].query("reward == 'sentiment' and judge == 'training'")
    judge_figures.reward_distributions(one, ax)
    assert sum(bar.get_height() for bar in ax.patches) == 24
    assert "logit" in ax.get_xlabel()
    plt.close(figure)


def test_auc_and_ties_by_hand():
    assert exam.auc(np.array([3.0, 1.0]), np.array([2.0, 1.0])) == (1 + 1 + 0 + 0.5) / 4


# --- refusals
@pytest.mark.parametrize("role", contract.ROLES)
@pytest.mark.parametrize(
    "bad, found", [("", "empty"), ("  \n", "empty"), (None, "NoneType"), (3.5, "float")]
)
def test_empty_and_non_text_rows_are_named(judges, role, bad, found):
    with pytest.raises(ValueError, match=rf"row 1: found .*{found}"):
        panel.score_texts(["A film.", bad], getattr(judges, role))


def test_one_string_is_not_a_list(judges):
    with pytest.raises(ValueError, match="expected a list"):
        judges.training["sentiment"].score("A film.")


def test_a_score_that_is_not_finite_is_refused():
    judge = informativeness.InformativenessTraining(["dragon"], np.array([np.nan]))
    with pytest.raises(ValueError, match="row 1.*nan"):
        judge.score(["A film.", "A dragon."])


def test_config_refuses_nonsense():
    with pytest.raises(ValueError, match="piece_words=0"):
        contract.JudgeConfig(piece_words=0)


def test_one_label_is_refused(reviews):
    one = reviews.filter(lambda row: row["label"] == 1)
    with pytest.raises(ValueError, match="one label"):
        sentiment.SentimentTraining.fit(one, SMALL)
