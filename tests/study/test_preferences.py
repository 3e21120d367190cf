"""Prompts, candidates, simulated users and their noise; people's own preference sets."""

import json

import datasets
import numpy as np
import pandas as pd
import pytest
from tiny import WORDS

from mixdpo_lib.data.files import load_preferences
from mixdpo_lib.data.pairs import check_preferences
from mixdpo_lib.store import hash_seed
from mixdpo_lib.study.candidates import (
    CandidateConfig,
    first_words,
    review_prompts,
    sample_candidates,
    split_prompts,
    usable,
)
from mixdpo_lib.study.judges import REWARDS
from mixdpo_lib.study.simulated_people import (
    GENRES,
    DesignConfig,
    is_flipped,
    label_temperature,
    simulate_blends,
    simulate_preferences,
    untied_pairs,
)
from mixdpo_lib.study.tables import (
    group_agreement,
    label_temperatures,
    preference_counts,
    score_differences,
)

N_PROMPTS, N_CANDIDATES = 60, 4
DESIGN = DesignConfig(
    n_users=45, n_new_users=9, pairs_per_user=30, validation_pairs_per_user=8, context_pairs=6
)


@pytest.fixture(scope="module")
def candidates():
    rows = [(i, c) for i in range(N_PROMPTS) for c in range(N_CANDIDATES)]
    return pd.DataFrame(
        [
            {
                "prompt_id": i,
                "candidate": c,
                "prompt": f"prompt {i}",
                "response": f" answer {i} {c}",
            }
            for i, c in rows
        ]
    )


@pytest.fixture(scope="module")
def scores(candidates):
    rng = np.random.default_rng(0)
    table = pd.DataFrame(
        {
            g: rng.normal(size=len(candidates)) * s
            for g, s in zip(REWARDS, (1, 20, 0.1), strict=True)
        }
    )
    table.loc[:3, "grammar"] = 0.5  # a prompt whose candidates are tied
    return table


@pytest.fixture(scope="module")
def sets(candidates, scores):
    return simulate_preferences(candidates, scores, DESIGN)


def reward(data, candidates, scores, side):
    """The hidden reward of each answer for the group of its row."""
    place = dict(zip(candidates["response"], range(len(candidates)), strict=True))
    return np.array([scores[r["group"]][place[r[side]]] for r in data])


# ------------------------------------------------------------------------------------------------ simulated users


def test_sizes_and_columns(sets):
    assert (len(sets["train"]), len(sets["validation"]), len(sets["context"])) == (
        45 * 30,
        45 * 8,
        9 * 6,
    )
    for part in sets.values():
        assert {"prompt", "chosen", "rejected", "user", "group", "ended", "prompt_id"} <= set(
            part.column_names
        )
        assert set(part["group"]) == set(REWARDS)
        check_preferences(part, "simulated")
    users = pd.DataFrame({"user": sets["train"]["user"], "group": sets["train"]["group"]})
    assert (users.groupby("user").size() == 30).all() and (
        users.groupby("user")["group"].nunique() == 1
    ).all()
    assert users.drop_duplicates()["group"].value_counts().tolist() == [15, 15, 15]


def test_as_many_labels_are_flipped_as_wanted(sets, candidates, scores):
    for name in ("train", "validation", "context"):
        data = sets[name]
        gap = reward(data, candidates, scores, "chosen") - reward(
            data, candidates, scores, "rejected"
        )
        assert np.array_equal(gap < 0, np.array(data["flipped"])) and (gap != 0).all()
        np.testing.assert_allclose(np.abs(gap), data["gap"])
    train = pd.DataFrame({"group": sets["train"]["group"], "flipped": sets["train"]["flipped"]})
    assert abs(train["flipped"].mean() - 0.10) < 0.025
    assert (
        abs(train.groupby("group")["flipped"].mean() - 0.10) < 0.06
    ).all()  # in each reward, whatever its unit
    gap = np.array(sets["train"]["gap"]) / np.array(
        [scores[g].std() for g in sets["train"]["group"]]
    )
    wrong = np.array(sets["train"]["flipped"])
    assert (
        gap[wrong].mean() < 0.6 * gap[~wrong].mean()
    )  # close pairs are confused, clear ones are not


def test_the_temperatures_are_kept_with_the_sets(sets, candidates, scores):
    kept = label_temperatures({"default": sets}).set_index("group")["label_temperature"]
    for group in REWARDS:
        table = scores[group].to_numpy().reshape(N_PROMPTS, N_CANDIDATES)[:42]
        differences = np.array(
            [row[a] - row[b] for row in table for a in range(4) for b in range(a)]
        )
        assert kept[group] == pytest.approx(label_temperature(differences, 0.10))
    assert json.loads(sets["test"].info.description)["design"]["pairs_per_user"] == 30


@pytest.mark.parametrize("wanted", [0.02, 0.1, 0.3])
def test_label_temperature(wanted):
    differences = np.random.default_rng(1).normal(size=400) * 7
    t = label_temperature(differences, wanted)
    assert np.mean(1 / (1 + np.exp(np.abs(differences) / t))) == pytest.approx(wanted, abs=1e-6)
    assert label_temperature(differences * 10, wanted) == pytest.approx(10 * t)


def test_no_temperature_without_noise_or_differences():
    assert (
        label_temperature(np.array([1.0, 2.0]), 0.0) == 0.0 == label_temperature(np.zeros(3), 0.2)
    )
    with_ties = label_temperature(np.array([1.0, 0.0, -2.0]), 0.2)  # ties are no pairs
    assert with_ties == label_temperature(np.array([1.0, -2.0]), 0.2)


def test_a_label_is_flipped_with_the_probability_of_bradley_and_terry():
    rng = np.random.default_rng(0)
    for gap, temperature in ((1.0, 1.0), (0.5, 2.0), (3.0, 1.0)):
        share = np.mean([is_flipped(gap, temperature, rng) for _ in range(4000)])
        assert share == pytest.approx(1 / (1 + np.exp(gap / temperature)), abs=0.02)
    assert not is_flipped(1e-9, 0.0, rng) and not is_flipped(1e-9, 1.0, None)  # no noise
    assert not is_flipped(1e6, 1e-9, rng)  # no overflow
    drawn, other = (np.random.default_rng(1) for _ in range(2))
    is_flipped(1.0, 0.0, drawn)
    assert drawn.random() == other.random()  # where there is no noise no number is drawn


def test_without_noise_nothing_is_flipped(candidates, scores):
    config = DesignConfig(validation_pairs_per_user=20, flip_rate=0.0, n_users=6, n_new_users=3)
    sets = simulate_preferences(candidates, scores, config)
    assert not any(sets["train"]["flipped"])


def test_test_labels_are_free_of_noise(sets, candidates, scores):
    test = sets["test"]
    assert (
        reward(test, candidates, scores, "chosen") > reward(test, candidates, scores, "rejected")
    ).all()
    assert not any(test["flipped"]) and set(test["user"]) == {""}
    assert len(test) == 3 * 12 * 6  # every untied pair of every test prompt, once for each group
    assert len({(r["group"], r["chosen"], r["rejected"]) for r in test}) == len(test)


def test_parts_do_not_share_prompts(sets):
    ids = {name: set(part["prompt_id"]) for name, part in sets.items()}
    assert not ids["train"] & ids["validation"]
    assert not (ids["train"] | ids["validation"] | ids["context"]) & ids["test"]
    assert ids["train"] | ids["context"] <= set(range(42)) and ids["validation"] <= set(
        range(42, 48)
    )
    assert ids["test"] == set(range(48, 60))
    texts = {name: set(part["chosen"]) | set(part["rejected"]) for name, part in sets.items()}
    assert not texts["train"] & texts["test"] and not texts["train"] & texts["validation"]


@pytest.mark.parametrize("n", [5, 10, 33, 700])
def test_splits_cover_the_prompts(n):
    parts = split_prompts(n)
    assert [i for part in parts.values() for i in part] == list(range(n))
    assert list(parts) == ["train", "validation", "test"]
    assert len(parts["train"]) == round(0.7 * n)
    more = split_prompts(n, more_test_prompts=7)
    assert more | {"test": None} == parts | {"test": None}
    assert more["test"] == range(parts["test"].start, n + 7)


def test_new_users_are_other_users(sets):
    seen, new = set(sets["train"]["user"]), set(sets["context"]["user"])
    assert len(seen) == 45 and len(new) == 9 and not seen & new
    assert set(sets["validation"]["user"]) == seen
    assert pd.Series(sets["context"]["user"][:]).value_counts().unique().tolist() == [6]


def test_metadata_tell_something_and_not_everything(candidates, scores):
    config = DesignConfig(
        n_users=600, n_new_users=3, pairs_per_user=1, validation_pairs_per_user=1, context_pairs=1
    )
    train = simulate_preferences(candidates, scores, config)["train"]
    users = pd.DataFrame(
        {c: train[c] for c in ("user", "group", "genre", "age_band")}
    ).drop_duplicates()
    typical = dict(zip(REWARDS, GENRES[:3], strict=True))
    assert set(users["genre"]) == set(GENRES[:3])
    share = (users["genre"] == users["group"].map(typical)).mean()
    assert abs(share - 0.60) < 0.06
    for group in REWARDS:  # the other two genres as often as each other
        others = (
            users[users["group"] == group]["genre"]
            .value_counts(normalize=True)
            .drop(typical[group])
        )
        assert len(others) == 2 and (abs(others - 0.2) < 0.08).all()
    age = users.groupby("group")["age_band"].value_counts(normalize=True)
    assert len(age) == 9 and (abs(age - 1 / 3) < 0.12).all()  # says nothing
    assert (users.groupby("user").size() == 1).all()


def test_the_same_seed_gives_the_same_sets(candidates, scores, sets):
    again = simulate_preferences(candidates, scores, DESIGN)
    assert all(again[n].to_list() == sets[n].to_list() for n in sets)
    other = simulate_preferences(candidates, scores, DesignConfig(**{**vars(DESIGN), "seed": 1}))
    assert (
        other["train"].to_list() != sets["train"].to_list()
        and other["test"].to_list() == sets["test"].to_list()
    )


@pytest.mark.parametrize("n_groups", [1, 2, 4, 6])
def test_the_groups_are_the_columns_of_the_scores(candidates, n_groups):
    rng = np.random.default_rng(2)
    names = [f"reward_{i}" for i in range(n_groups)]
    scores = pd.DataFrame({name: rng.normal(size=len(candidates)) for name in names})
    config = DesignConfig(
        n_users=60,
        n_new_users=12,
        pairs_per_user=4,
        validation_pairs_per_user=2,
        context_pairs=3,
        metadata_accuracy=0.9,
    )
    sets = simulate_preferences(candidates, scores, config)
    assert (
        list(dict.fromkeys(sets["train"]["group"]))
        == names
        == list(dict.fromkeys(sets["test"]["group"]))
    )
    users = pd.DataFrame(
        {c: sets["train"][c] for c in ("user", "group", "genre")}
    ).drop_duplicates()
    assert users["group"].value_counts().nunique() == 1 and set(users["genre"]) == set(
        GENRES[: max(2, n_groups)]
    )
    assert all(
        part["genre"].mode()[0] == GENRES[names.index(group)]
        for group, part in users.groupby("group")
    )
    assert set(label_temperatures({"default": sets})["group"]) == set(names)
    agreement = group_agreement(candidates, scores)
    assert list(dict.fromkeys(agreement["group_a"])) == names and len(agreement) == n_groups**2
    if n_groups > 1:
        blends = simulate_blends(candidates, scores, config, n_users=30, test_pairs=2)
        assert len(set(blends["test"]["blend"])) == n_groups * (n_groups - 1) // 2


def test_clean_pairs_are_best_against_worst(candidates, scores):
    config = DesignConfig(
        name="clean",
        n_users=6,
        n_new_users=3,
        pairs_per_user=20,
        validation_pairs_per_user=4,
        context_pairs=5,
    )
    sets = simulate_preferences(candidates, scores, config)
    by_prompt = {g: scores[g].groupby(candidates["prompt_id"]) for g in REWARDS}
    for data in sets.values():
        high, low = (reward(data, candidates, scores, side) for side in ("chosen", "rejected"))
        for r, a, b in zip(data, high, low, strict=True):
            assert (
                a == by_prompt[r["group"]].max()[r["prompt_id"]]
                and b == by_prompt[r["group"]].min()[r["prompt_id"]]
            )
        assert not any(data["flipped"])
    assert len(sets["test"]) == 36
    assert not any(
        r["prompt_id"] == 0 and r["group"] == "grammar" for r in sets["train"]
    )  # tied: no best, no worst
    assert set(label_temperatures({"clean": sets})["label_temperature"]) == {0.0}


def testuntied_pairs_a_prompt():
    scores = np.array([0.0, 2.0, 1.0, 2.0])
    assert sorted(untied_pairs(scores, [0, 1, 2, 3], False)) == [
        (1, 0),
        (1, 2),
        (2, 0),
        (3, 0),
        (3, 2),
    ]
    assert (
        untied_pairs(scores, [0, 1, 2], True) == [(1, 0)]
        and untied_pairs(scores, [1, 3], True) == []
    )
    assert untied_pairs(scores, [], True) == [] == untied_pairs(scores, [2], False)


@pytest.mark.parametrize("name", ["default", "clean"])
def test_a_prompt_without_candidates_is_passed_over(candidates, scores, name):
    left = (candidates["prompt_id"] != 5) & ~(
        (candidates["prompt_id"] == 6) & (candidates["candidate"] > 0)
    )
    config = DesignConfig(
        name=name, n_users=6, n_new_users=3, pairs_per_user=20, validation_pairs_per_user=4
    )
    sets = simulate_preferences(
        candidates[left].reset_index(drop=True), scores[left].reset_index(drop=True), config
    )
    assert not {5, 6} & set(sets["train"]["prompt_id"])


def test_tables_about_the_design(sets, candidates, scores):
    counts = preference_counts({"default": sets}).set_index("part")
    assert counts.loc["train", "users"] == 45 and counts.loc["test", "users"] == 0
    assert counts.loc["train", "flipped"] == pytest.approx(np.mean(sets["train"]["flipped"]))
    differences = score_differences({"default": sets}, scores)
    assert len(differences) == len(sets["train"])
    assert (differences["score_difference"] < 0).mean() == pytest.approx(
        counts.loc["train", "flipped"]
    )
    agreement = group_agreement(candidates, scores.assign(grammar=-scores["sentiment"]))
    agreement = agreement.set_index(["group_a", "group_b"])
    assert agreement.loc[("sentiment", "sentiment"), "agreement"] == 1
    assert agreement.loc[("sentiment", "grammar"), "agreement"] == 0
    assert abs(agreement.loc[("sentiment", "informativeness"), "agreement"] - 0.5) < 0.1


# ------------------------------------------------------------------------------------------------------------ refusals


def test_a_score_that_is_no_number_is_refused(candidates, scores):
    for bad in (np.nan, np.inf):
        broken = scores.copy()
        broken.loc[7, "grammar"] = bad
        with pytest.raises(
            ValueError,
            match="scores: row 7, column 'grammar' is not a finite number; score that text",
        ):
            simulate_preferences(candidates, broken, DESIGN)
    with pytest.raises(
        ValueError, match="scores: column 'grammar' is not of numbers .*leave out the others"
    ):
        simulate_preferences(candidates, scores.assign(grammar="good"), DESIGN)
    for none_or_twice in (scores[[]], scores[["sentiment", "grammar", "sentiment"]]):
        with pytest.raises(
            ValueError, match=r"scores: found the columns \[.*\], expected one a group, each once"
        ):
            simulate_preferences(candidates, none_or_twice, DESIGN)
    with pytest.raises(ValueError, match="scores has 239 rows, candidates 240"):
        simulate_preferences(candidates, scores[1:], DESIGN)


def test_more_groups_than_genres_are_refused(candidates, scores):
    many = pd.concat(
        [scores["sentiment"].rename(f"reward_{i}") for i in range(len(GENRES) + 1)], axis=1
    )
    with pytest.raises(
        ValueError, match=f"found {len(GENRES) + 1} groups, expected at most {len(GENRES)}.*GENRES"
    ):
        simulate_preferences(candidates, many, DESIGN)
    with pytest.raises(
        ValueError, match=r"found one group \(grammar\), expected two or more to blend"
    ):
        simulate_blends(candidates, scores[["grammar"]], DESIGN, 4)


def test_too_few_pairs_are_refused(candidates, scores):
    config = DesignConfig(pairs_per_user=100, validation_pairs_per_user=37)
    with pytest.raises(
        ValueError,
        match="37 validation pairs a user wanted, but group 'sentiment' has only 36 untied",
    ):
        simulate_preferences(candidates, scores, config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "tidy"}, "design name='tidy': possible are 'default' and 'clean'"),
        ({"flip_rate": 0.5}, "flip_rate=0.5: expected at least 0 and below 0.5"),
        ({"flip_rate": -0.1}, "flip_rate=-0.1: expected at least 0"),
    ],
)
def test_bad_designs(options, message):
    with pytest.raises(ValueError, match=message):
        DesignConfig(**options)


# ------------------------------------------------------------------------------------------------ prompts, candidates


@pytest.fixture(scope="module")
def reviews():
    rng = np.random.default_rng(3)
    return [" ".join(rng.choice(WORDS, n)) for n in [20] * 30 + [4] * 5]


def test_prompts_are_the_first_whole_words_of_reviews(tiny_base, reviews):
    config = CandidateConfig(n_prompts=25, prompt_tokens=6)
    prompts = review_prompts(tiny_base, reviews, config)
    assert len(set(prompts)) == 25
    starts = [" ".join(r.split()[:6]) for r in reviews]
    assert all(p in starts for p in prompts)
    assert prompts == review_prompts(tiny_base, reviews, config)
    assert prompts != sorted(prompts, key=starts.index)
    assert prompts != review_prompts(
        tiny_base, reviews, CandidateConfig(n_prompts=25, prompt_tokens=6, seed=1)
    )
    with pytest.raises(
        ValueError,
        match="only 30 distinct prompts of 6 tokens in 65 reviews, n_prompts=31 and more_test_prompts=0 wanted",
    ):
        review_prompts(
            tiny_base, [*reviews, *reviews[:30]], CandidateConfig(n_prompts=31, prompt_tokens=6)
        )


def test_first_words_are_whole(tiny_base):
    assert first_words(tiny_base, "the film was very good", 3) == "the film was"
    assert first_words(tiny_base, "the film was", 3) is None  # not longer than three tokens
    assert first_words(tiny_base, "the film", 1) == "the"
    with pytest.MonkeyPatch.context() as patch:  # a token inside a word: the word goes
        patch.setattr(tiny_base.tokenizer, "decode", lambda _: "unbeliev")
        assert first_words(tiny_base, "the film was very good", 3) is None
        patch.setattr(tiny_base.tokenizer, "decode", lambda _: "an unbeliev")
        assert first_words(tiny_base, "the film was very good", 3) == "an"


def test_candidates_are_sampled_once(tiny_base, monkeypatch):
    config = CandidateConfig(n_prompts=3, response_tokens=6, n_candidates=4, batch_size=5)
    prompts = ["the film was", "a long story", "it"]
    table = sample_candidates(tiny_base, prompts, config)
    assert table["prompt_id"].tolist() == [i for i in range(3) for _ in range(4)]
    assert table["candidate"].tolist() == [0, 1, 2, 3] * 3
    assert table["prompt"].tolist() == [p for p in prompts for _ in range(4)]
    lengths = table["response"].str.split().str.len()
    assert (lengths[~table["ended"]] == 6).all() and (lengths <= 6).all() and lengths.max() == 6
    assert (table.groupby("prompt_id")["response"].nunique() > 1).all()
    with monkeypatch.context() as patch:
        patch.setattr(
            "mixdpo_lib.study.candidates.sample", lambda *_, **__: pytest.fail("sampled again")
        )
        pd.testing.assert_frame_equal(sample_candidates(tiny_base, prompts, config), table)
    other = sample_candidates(tiny_base, prompts, CandidateConfig(**{**vars(config), "seed": 1}))
    assert other["response"].tolist() != table["response"].tolist()


def test_more_test_prompts_change_no_other_prompt_and_no_candidate_of_theirs(tiny_base, reviews):
    few, more = (
        CandidateConfig(
            n_prompts=10, more_test_prompts=m, response_tokens=3, n_candidates=2, batch_size=6
        )
        for m in (0, 5)
    )
    prompts, longer = (review_prompts(tiny_base, reviews, config) for config in (few, more))
    assert len(longer) == 15 and longer[:10] == prompts
    tables = [sample_candidates(tiny_base, p, c) for p, c in ((prompts, few), (longer, more))]
    before, after = (table[table["prompt_id"] < 9] for table in tables)  # three full batches
    pd.testing.assert_frame_equal(before, after)


def test_texts_that_look_like_numbers_or_dates_stay_texts(tiny_base, monkeypatch):
    from mixdpo_lib.policy.sampling import Decoded

    texts = iter(["12", "2020-01-01", "null", "true"])
    monkeypatch.setattr(
        "mixdpo_lib.study.candidates.sample", lambda *_, **__: Decoded([[3]] * 4, [False] * 4)
    )
    monkeypatch.setattr("mixdpo_lib.study.candidates.answer_text", lambda *_: next(texts))
    table = sample_candidates(tiny_base, ["a film"], CandidateConfig(n_prompts=1, seed=77))
    assert table["response"].tolist() == ["12", "2020-01-01", "null", "true"]


def test_a_prompt_without_room_for_a_response_is_refused(tiny_base):
    with pytest.raises(
        ValueError, match="prompt of 40 tokens leaves no room for 9 response tokens .*context.*48"
    ):
        sample_candidates(tiny_base, ["a " * 40], CandidateConfig(response_tokens=9))


def test_unusable_candidates_go():
    table = pd.DataFrame(
        {"prompt_id": [0, 0, 0, 0, 1, 1], "response": [" ok", " ok", " . !", " a", " ok", ""]}
    )
    left = usable(table)
    assert left["response"].tolist() == [" ok", " ok"] and left["prompt_id"].tolist() == [0, 1]
    assert left.index.tolist() == [0, 1]


def test_seeds_depend_on_every_part():
    assert hash_seed(0, "a") == hash_seed(0, "a") and 0 <= hash_seed(0, "a") < 2**31
    assert len({hash_seed(s, stage, n) for s in range(3) for stage in "ab" for n in range(3)}) == 18


# --------------------------------------------------------------------------------------------------- people's own data

ROWS = [
    {"prompt": "The film", "chosen": " was good", "rejected": " was bad", "user": "ann"},
    {"prompt": "A story", "chosen": " is long", "rejected": " is short", "user": "bob"},
]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MIXDPO_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "csv"])
def test_files_are_read(tmp_path, cache, kind):
    folder = tmp_path / "own"
    folder.mkdir()
    data = datasets.Dataset.from_list(ROWS)
    write = {
        "jsonl": data.to_json,
        "json": data.to_json,
        "parquet": data.to_parquet,
        "csv": data.to_csv,
    }[kind]
    write(str(folder / f"validation.{kind}"))
    (folder / "notes.txt").write_text("not data")
    found = load_preferences(folder, columns=["user"])
    assert list(found) == ["validation"] and found["validation"].to_list() == ROWS
    (single,) = load_preferences(folder / f"validation.{kind}").items()
    assert single[0] == "train" and single[1].to_list() == ROWS


@pytest.mark.parametrize("whole", [True, False])
def test_saved_sets_are_read(tmp_path, whole):
    data = datasets.Dataset.from_list(ROWS)
    (datasets.DatasetDict({"train": data, "test": data}) if whole else data).save_to_disk(
        tmp_path / "saved"
    )
    found = load_preferences(str(tmp_path / "saved"))
    assert (
        list(found) == (["train", "test"] if whole else ["train"])
        and found["train"].to_list() == ROWS
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"rejected": None},
            r"train.jsonl.*: row 1, column 'rejected': found NoneType None, expected a text with words",
        ),
        ({"chosen": "   "}, r"row 1, column 'chosen': found '   ', expected a text with words"),
        (
            {"chosen": " is short"},
            r"row 1: chosen equals rejected \(' is short'\): a tie says nothing",
        ),
        ({"prompt": ""}, r"row 1, column 'prompt': found ''"),
        ({"prompt": 5}, r"row 1, column 'prompt': found int 5, expected a text with words"),
    ],
)
def test_bad_fields_are_refused(tmp_path, cache, change, message):
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in (ROWS[0], ROWS[1] | change)))
    with pytest.raises(ValueError, match=message) as error:
        load_preferences(file)
    assert "\n" not in str(error.value)


def test_numbers_are_no_texts(tmp_path, cache):
    row = ROWS[0] | {"chosen": 4}
    (tmp_path / "train.jsonl").write_text(json.dumps(row))
    with pytest.raises(
        ValueError, match="row 0, column 'chosen': found int 4, expected a text with words"
    ):
        load_preferences(tmp_path / "train.jsonl")


@pytest.mark.parametrize(
    ("name", "text"),
    [("train.jsonl", '{"prompt": "a",'), ("train.parquet", "no"), ("train.csv", '"a\nb')],
)
def test_files_that_are_something_else_are_refused(tmp_path, cache, name, text):
    (tmp_path / name).write_text(text)
    kind = name.split(".")[1]
    with pytest.raises(
        ValueError, match=rf"{name}: not readable as .{kind} \(.+\); expected one row a pair"
    ) as error:
        load_preferences(tmp_path / name)
    assert "\n" not in str(error.value)


def test_missing_columns_are_refused(tmp_path, cache):
    datasets.Dataset.from_list(ROWS).remove_columns("chosen").to_json(str(tmp_path / "train.jsonl"))
    with pytest.raises(
        ValueError, match=r"\(train\): column 'chosen' is missing; found .*; rename or add it"
    ):
        load_preferences(tmp_path / "train.jsonl")
    datasets.Dataset.from_list(ROWS).to_json(str(tmp_path / "other.jsonl"))
    with pytest.raises(ValueError, match="column 'person' is missing"):
        load_preferences(tmp_path / "other.jsonl", columns=["person"])


def test_a_place_without_data_is_refused(tmp_path):
    for place in (tmp_path, tmp_path / "nowhere", tmp_path / "nowhere.jsonl"):
        with pytest.raises(
            FileNotFoundError, match="no preference data found; expected a folder saved with"
        ):
            load_preferences(place)
