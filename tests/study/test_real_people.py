"""Real people as preference sets, and whether a mixture helps: small made-up folders of the same form, and what is shipped."""

import numpy as np
import pandas as pd
import pytest
import survey

import mixdpo_lib as mx
from mixdpo_lib.store import MixDPOError
from mixdpo_lib.study import helped, real_people

GENRES = ("Comedy", "Drama", "Horror|Sci-Fi", "(no genres listed)")
PAIRS = {"train": 8, "validation": 4, "test": 4}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """Six viewers of 100 films; one rated too few, one gave every film the same."""
    folder, rng = tmp_path_factory.mktemp("films"), np.random.default_rng(0)
    films = [[i, f"Film {i} ({1950 + i % 60})", GENRES[i % 4]] for i in range(100)]
    pd.DataFrame(films, columns=["movieId", "title", "genres"]).to_csv(
        folder / "movies.csv", index=False
    )
    rows = []
    for viewer in range(6):
        for film in range(59 if viewer == 4 else 100):
            likes = (film % 4 == viewer % 2) + rng.integers(0, 3)
            rows.append([viewer, film, 3.0 if viewer == 5 else 1 + 1.5 * likes, 0])
    table = pd.DataFrame(rows, columns=["userId", "movieId", "rating", "timestamp"])
    table.to_csv(folder / "ratings.csv", index=False)
    return folder, table


def test_pairs_of_films_are_of_one_viewer_far_apart_and_new_in_the_test(shelf, capsys):
    folder, ratings = shelf
    sets = real_people.film_tastes(folder, 150, PAIRS, 1, fewest_viewers=1)
    assert "4 viewers have enough pairs, of 150 wanted" in capsys.readouterr().err
    stars = {(str(r.userId), r.movieId): r.rating for r in ratings.itertuples()}
    seen = {}
    for part, n in PAIRS.items():
        rows = sets[part].rows.to_pandas()
        assert rows["user"].value_counts().to_dict() == dict.fromkeys("0123", n)
        numbers = rows[["chosen", "rejected"]].map(lambda text: int(text.split()[1]))
        gap = [
            stars[user, a] - stars[user, b]
            for user, a, b in zip(rows["user"], *numbers.to_numpy().T, strict=True)
        ]
        assert min(gap) >= 1.5 and not rows.duplicated().any()
        seen[part] = set(numbers.to_numpy().ravel())
    assert not seen["train"] & seen["test"] and not seen["validation"] & seen["test"]
    answers = {text.response for part in sets.values() for text in part.texts.texts}
    assert all(text.prompt == real_people.FILM_PROMPT for text in sets["test"].texts.texts)
    assert any(text.endswith("). horror, sci-fi.") for text in answers)
    assert any(text.endswith(").") for text in answers)  # without genres
    again = real_people.film_tastes(folder, 150, PAIRS, 1, fewest_viewers=1)
    assert again["train"].rows.to_pandas().equals(sets["train"].rows.to_pandas())
    with pytest.raises(MixDPOError, match="0 viewers of 0 with 60 ratings"):  # no film has seven
        real_people.film_tastes(folder, 150, PAIRS, fewest_viewers=7)
    traits = helped.traits_of_films(sets["train"])
    assert list(traits) == ["year", "comedy", "drama", "horror", "sci-fi"]
    first = sets["train"].texts.texts[0].response
    assert traits["year"][0] == float(first[first.index("(") + 1 :][:4])
    assert traits["drama"].sum() == sum("drama" in t.response for t in sets["train"].texts.texts)


def test_films_that_cannot_be_read_are_refused(shelf, tmp_path):
    folder, ratings = shelf
    with pytest.raises(MixDPOError, match=r"ratings.csv: not found; expected ratings of films"):
        real_people.film_tastes(tmp_path)
    with pytest.raises(
        MixDPOError, match="0 viewers of 5 with 60 ratings have .* expected at least 2"
    ):
        real_people.film_tastes(folder, pairs_per_viewer={"test": 500}, fewest_viewers=1)
    ratings.assign(movieId=777).to_csv(tmp_path / "ratings.csv", index=False)
    (tmp_path / "movies.csv").write_text((folder / "movies.csv").read_text())
    with pytest.raises(MixDPOError, match=r"ratings of films \['777'\], which movies.csv does not"):
        real_people.film_tastes(tmp_path)
    ratings.drop(columns="userId").to_csv(tmp_path / "ratings.csv", index=False)
    with pytest.raises(MixDPOError, match="column 'userId' is missing; found"):
        real_people.film_tastes(tmp_path)


def test_the_arguments_that_are_shipped():
    texts, items = real_people.arguments()
    assert {part: len(pairs) for part, pairs in texts.items()} == {
        "train": 875,
        "validation": 119,
        "test": 364,
    }
    assert len(texts["train"].texts) == len(items["train"].texts) == 151
    both = {part: set(map(frozenset, pairs.index.tolist())) for part, pairs in items.items()}
    assert not both["train"] & both["test"] and not both["validation"] & both["test"]
    counts = [pd.Series(texts[part].rows["user"]).value_counts() for part in ("train", "test")]
    assert len(counts[0]) == 34 and counts[0].min() >= 10 and counts[1].min() >= 3
    assert max(len(t.response.split()) for t in texts["train"].texts.texts) <= 32
    few, _ = real_people.arguments(n_topics=2)
    asked = pd.concat([pairs.rows.to_pandas()["prompt"] for pairs in texts.values()]).value_counts()
    kept = pd.concat([pairs.rows.to_pandas()["prompt"] for pairs in few.values()]).value_counts()
    assert set(kept.index) == set(asked.index[:2]) and (kept >= 0.95 * asked[:2]).all()
    assert set(few["test"].rows["user"]) <= set(few["train"].rows["user"])
    for wrong in (-1, 11):
        with pytest.raises(ValueError, match=f"n_topics={wrong}: expected 1 to 10"):
            real_people.arguments(n_topics=wrong)
    traits = helped.traits_of_writing(texts["train"])
    assert traits["words"].max() <= 32 and traits["capital letters"].between(0, 1).all()


def test_a_survey_keeps_a_fifth_of_each_persons_comparisons(tmp_path):
    sets = real_people.survey(survey.FILE)
    n = survey.columns()
    decided = pd.Series(np.array(n["person"])[np.array(n["winner"]) != "tie"]).value_counts()
    for part, most in (("test", 2), ("validation", 2), ("train", 6)):
        own = pd.Series(sets[part].rows["user"]).value_counts()
        assert own.max() == most and set(own.index) <= set(decided.index)
    assert sum(map(len, sets.values())) == decided.sum()
    assert isinstance(sets["train"].rows["age"][0], int)
    (tmp_path / "few.csv").write_text("person,first,second,winner\na,x,y,x\na,x,z,z\na,y,z,y\n")
    few = real_people.survey(tmp_path / "few.csv")
    assert {part: len(pairs) for part, pairs in few.items()} == {
        "train": 2,
        "validation": 1,
        "test": 0,
    }


def test_a_mixture_helps_people_of_three_groups_and_who_they_are_is_told():
    found = helped.by_name(real_people.survey(survey.FILE), [1, 3], restarts=1)
    table = found.table().set_index("K")
    assert found.chosen == 3 and table["chosen"].tolist() == [False, True]
    assert table["pays"][3] and 0 < table["low"][3] < table["gain"][3] < table["high"][3]
    assert table["accuracy"][3] > table["accuracy"][1] + 0.05
    assert table["loglik"][3] - table["loglik"][1] == pytest.approx(table["gain"][3])
    assert 2 < table["used"][3] <= 3 and table["people"].eq(found.reports[3].units.shape[0]).all()
    people = found.people()
    assert people["gain"].mean() == pytest.approx(table["gain"][3])
    assert (people["gain"] > 0).mean() == pytest.approx(table["people_gaining"][3])


def test_experts_that_read_are_compared_with_one(tiny_base, shelf):
    sets = real_people.film_tastes(shelf[0], 4, PAIRS, fewest_viewers=1)
    found = helped.by_reading(tiny_base, sets, [1, 2], passes=1.0)
    table = found.table()
    assert table["K"].tolist() == [1, 2] and table["accuracy"].between(0, 1).all()
    assert table["loglik"].max() < 0 and np.isnan(table["gain"][0])
    leaning = helped.leanings(
        found.policies[2], sets["train"], helped.traits_of_films(sets["train"])
    )
    assert leaning.shape == (5, 2) and leaning.abs().max().max() <= 1
    with pytest.raises(ValueError, match=r"ks=\[2, 3\]: expected 1, one policy"):
        helped.by_reading(tiny_base, sets, [2, 3], passes=1.0)
    assert isinstance(found.policies[1], mx.MixturePolicy)


def test_ages_of_which_some_are_missing_are_no_categories(tmp_path):
    rows = [f"p{i},x,y,x,{age}" for i, age in enumerate(("23", "45", "NA", "31", "50"))]
    (tmp_path / "s.csv").write_text("person,first,second,winner,age\n" + "\n".join(rows))
    with pytest.raises(MixDPOError, match=r"s.csv, column 'age': found 'NA' in row 2 \(from 0\)"):
        real_people.survey(tmp_path / "s.csv")
    text = (tmp_path / "s.csv").read_text()
    for age in ("23", "45", "31", "50"):
        text = text.replace(age, f"00{age}")
    (tmp_path / "s.csv").write_text(text)
    sets = real_people.survey(tmp_path / "s.csv")  # postcodes are texts
    assert "0023" in {a for part in sets.values() if len(part) for a in part.columns["age"]}


def test_one_text_is_one_film_and_ratings_are_numbers(shelf, tmp_path, capsys):
    _, table = shelf
    films = [[i, f"Film {i % 99} (1980)", "Drama"] for i in range(100)]  # 99 is 0
    pd.DataFrame(films, columns=["movieId", "title", "genres"]).to_csv(tmp_path / "movies.csv")
    table.to_csv(tmp_path / "ratings.csv")
    sets = real_people.film_tastes(tmp_path, 150, PAIRS, 1, fewest_viewers=1)
    assert "5 second ratings of films that stand twice" in capsys.readouterr().err
    by_part = [{text.response for text in part.texts.texts} for part in sets.values()]
    assert not set.intersection(*by_part)
    for odd, message in (
        (
            table.assign(rating=table["rating"].astype(str).str.replace(".", ",")),
            "viewer 0, film 0: found rating '",
        ),
        (pd.concat([table, table.iloc[:1]]), "viewer 0 rated film 0 twice, and 1 such rows"),
    ):
        odd.to_csv(tmp_path / "ratings.csv")
        with pytest.raises(MixDPOError, match=message):
            real_people.film_tastes(tmp_path, 150, PAIRS, fewest_viewers=1)
