"""Who are the real people, and what did they prefer? Arguments, films and items of surveys, as preference sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset

from ..data.items import item_pairs
from ..data.pairs import Pairs
from ..data.tables import is_number
from ..store import MixDPOError, note, project_root
from .titles import split_items

PARTS = ("train", "validation", "test")
FILM_PROMPT = "A film that I would love to watch again:"
FILM_PAIRS = {"train": 60, "validation": 10, "test": 20}  # of each viewer
APART = 1.5  # stars between the two films of a pair
FEWEST_RATINGS = 60  # of a viewer: fewer give too few pairs of new films
HELD_OUT = 0.2  # share of a person's comparisons in a survey that is for testing, and as much for validation
OWN = ("person", "first", "second", "winner")  # columns of a survey; others are covariates


def _table(path: Path, columns: Sequence[str], what: str) -> pd.DataFrame:
    """A CSV file as texts.

    Raises
    ------
    MixDPOError : absent, not UTF-8, no table, without one of the columns, or empty in one.
    """
    if not path.is_file():
        raise MixDPOError(f"{path}: not found; expected {what}, with columns {', '.join(columns)}")
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except (UnicodeDecodeError, pd.errors.EmptyDataError, pd.errors.ParserError) as error:
        raise MixDPOError(f"{path}: not readable as a CSV file in UTF-8 ({error})") from error
    if missing := [name for name in columns if name not in table]:
        raise MixDPOError(f"{path}: column {missing[0]!r} is missing; found {list(table.columns)}")
    for name in columns:
        if name != "winner" and len(empty := np.flatnonzero(table[name].str.strip() == "")):
            raise MixDPOError(f"{path}: row {empty[0] + 1}, column {name!r} is empty")
    return table


def arguments(
    folder: str | Path | None = None, n_topics: int = 0
) -> tuple[dict[str, Pairs], dict[str, Pairs]]:
    """Which argument is more convincing? The judgments of `data/arguments`, by part: as texts, and as items by name alone.

    Prompts are topic and stance. Test judgments compare arguments that were compared with others in training. Source:
    UKPConvArg1 (Habernal and Gurevych 2016), CC BY 4.0.

    Parameters
    ----------
    n_topics : the prompts with most judgments that are kept, with the people of their training judgments; 0 keeps all.

    Raises
    ------
    MixDPOError : a file or column that is not there. ValueError : more topics than there are.

    Returns
    -------
    texts : rows with prompt, chosen, rejected, user, for experts that read. items : the same for tables of arguments.
    """
    folder = project_root() / "data" / "arguments" if folder is None else Path(folder)
    written = _table(folder / "arguments.csv", ("argument", "prompt", "text"), "the arguments")
    judged = _table(
        folder / "judgments.csv", ("part", "user", "first", "second", "winner"), "the judgments"
    )
    by_name = written.set_index("argument")
    topic = judged["first"].map(by_name["prompt"])
    if not 0 <= n_topics <= topic.nunique():
        raise ValueError(
            f"n_topics={n_topics}: expected 1 to {topic.nunique()}, as many as there are, or 0 for all"
        )
    if n_topics:
        judged = judged[topic.isin(topic.value_counts().index[:n_topics])]
        known = judged.loc[judged["part"] == "train", "user"]
        judged = judged[judged["user"].isin(known)].reset_index(drop=True)
    lost = judged["first"].where(judged["winner"] != judged["first"], judged["second"])
    rows = pd.DataFrame({"prompt": by_name.loc[judged["winner"], "prompt"].to_numpy()})
    for side, names in (("chosen", judged["winner"]), ("rejected", lost)):
        rows[side] = " " + by_name.loc[names, "text"].to_numpy()
    rows["user"] = judged["user"]
    whole = Pairs.of(Dataset.from_pandas(rows, preserve_index=False))
    items = item_pairs(judged["first"], judged["second"], judged["winner"], user=judged["user"])
    where = {part: (judged["part"] == part).to_numpy() for part in PARTS}
    return (
        {part: whole.where(mask) for part, mask in where.items()},
        {part: items.where(mask) for part, mask in where.items()},
    )


def film_tastes(
    folder: str | Path,
    n_viewers: int = 150,
    pairs_per_viewer: Mapping[str, int] = FILM_PAIRS,
    seed: int = 0,
    fewest_viewers: int = 20,
) -> dict[str, Pairs]:
    """Which of two films did a viewer rate higher? Pairs of a folder of the form of MovieLens, by part; test films are new.

    A viewer with at least 60 ratings gives pairs of films that they rated at least 1.5 stars apart. Films are parted 70,
    10 and 20 in a hundred, so that no film stands in two parts. Viewers are drawn (seeded) among those with enough pairs in
    each part. An answer is " Title (year). genre, genre."; Harper and Konstan (2015) describe the ratings.

    Parameters
    ----------
    folder : with `ratings.csv` (userId, movieId, rating) and `movies.csv` (movieId, title, genres).
    n_viewers : at most; where fewer have enough pairs, all of them are taken, and that is said.
    pairs_per_viewer : by part.
    fewest_viewers : a film that fewer rated is left out, whatever they said of it: each text costs a pass of the base, and of
        rare films it knows little. 1 keeps all.

    Raises
    ------
    MixDPOError : a file or column that is not there; fewer than two viewers with enough pairs.
    """
    folder = Path(folder)
    rated = _table(folder / "ratings.csv", ("userId", "movieId", "rating"), "ratings of films")
    films = _table(folder / "movies.csv", ("movieId", "title", "genres"), "films")
    if unknown := sorted(set(rated["movieId"]) - set(films["movieId"]))[:3]:
        raise MixDPOError(f"{folder}: ratings of films {unknown}, which movies.csv does not have")
    if len(again := rated[rated.duplicated(["userId", "movieId"])]):
        row = again.iloc[0]
        raise MixDPOError(
            f"{folder}: viewer {row['userId']} rated film {row['movieId']} twice, and {len(again)} such rows; expected one "
            "rating each: leave one out"
        )
    one_text = films.groupby(["title", "genres"])["movieId"].transform("first")  # is one film
    rated = rated.assign(
        movieId=rated["movieId"].map(dict(zip(films["movieId"], one_text, strict=True)))
    )
    if n := int(rated.duplicated(["userId", "movieId"]).sum()):
        note(f"films: {n} second ratings of films that stand twice under one title are left out")
        rated = rated.drop_duplicates(["userId", "movieId"])
    films = films[films["movieId"] == one_text]
    answer = {film.movieId: _film(film.title, film.genres) for film in films.itertuples()}
    part = dict(zip(answer, split_items(len(answer), seed), strict=True))
    stars = pd.to_numeric(rated["rating"], errors="coerce")
    if stars.isna().any():
        row = rated[stars.isna()].iloc[0]
        raise MixDPOError(
            f"{folder}/ratings.csv: viewer {row['userId']}, film {row['movieId']}: found rating {row['rating']!r}, expected "
            "a number such as 4.5"
        )
    rated = rated.assign(rating=stars, part=rated["movieId"].map(part)).sort_values(
        ["userId", "movieId"], kind="stable"
    )
    rated = rated[rated.groupby("userId")["userId"].transform("size") >= FEWEST_RATINGS]
    rated = rated[rated.groupby("movieId")["movieId"].transform("size") >= fewest_viewers]
    rng, viewers = np.random.default_rng(seed), list(rated.groupby("userId"))
    drawn: list[pd.DataFrame] = []
    for place in rng.permutation(len(viewers)):
        if len(drawn) < n_viewers:
            name, own = viewers[place]
            pairs = _drawn_pairs(own, pairs_per_viewer, rng)
            if pairs is not None:
                drawn.append(pairs.assign(user=name))
    if len(drawn) < 2:
        raise MixDPOError(
            f"{folder}: {len(drawn)} viewers of {len(viewers)} with {FEWEST_RATINGS} ratings have {dict(pairs_per_viewer)} "
            "pairs; expected at least 2: ask for fewer pairs"
        )
    if len(drawn) < n_viewers:
        note(f"films: {len(drawn)} viewers have enough pairs, of {n_viewers} wanted")
    rows = pd.concat(drawn, ignore_index=True)
    for side in ("chosen", "rejected"):
        rows[side] = rows[side].map(answer)
    rows.insert(0, "prompt", FILM_PROMPT)
    return {
        name: Pairs.of(Dataset.from_pandas(own.drop(columns="part"), preserve_index=False))
        for name, own in rows.groupby("part", sort=False)
    }


def _film(title: str, genres: str) -> str:
    """
    >>> _film("Toy Story (1995)", "Animation|Children")
    ' Toy Story (1995). animation, children.'
    """
    known = [] if genres.startswith("(no ") else genres.lower().split("|")
    return f" {title.strip()}." + (f" {', '.join(known)}." if known else "")


def _drawn_pairs(
    own: pd.DataFrame, wanted: Mapping[str, int], rng: np.random.Generator
) -> pd.DataFrame | None:
    """Pairs of one viewer: part, chosen, rejected (films); None where a part has too few."""
    found = []
    for name, n in wanted.items():
        films = own[own["part"] == name]
        stars, ids = films["rating"].to_numpy(), films["movieId"].to_numpy()
        better, worse = np.nonzero(stars[:, None] - stars >= APART)
        if len(better) < n:
            return None
        some = rng.permutation(len(better))[:n]
        found.append(
            pd.DataFrame({"part": name, "chosen": ids[better[some]], "rejected": ids[worse[some]]})
        )
    return pd.concat(found)


def _covariate(cells: list[str], place: str) -> list[Any]:
    """Numbers where every cell is one as Python writes it, else texts.

    Raises
    ------
    MixDPOError : most are numbers, and some are not: no category for each age because one is "NA".
    """
    other = [row for row, cell in enumerate(cells) if not is_number(cell)]
    if other and 2 * len(other) < len(cells):
        raise MixDPOError(
            f"{place}: found {cells[other[0]]!r} in row {other[0]} (from 0) and {len(other)} such cells among numbers; "
            "expected numbers alone or texts alone: fill them in, leave the rows out, or drop the column"
        )
    return cells if other else pd.to_numeric(pd.Series(cells)).tolist()


def survey(path: str | Path, seed: int = 0) -> dict[str, Pairs]:
    """A survey of paired comparisons by item names alone, by part: a fifth of each person's comparisons is for testing.

    Covariates are kept as columns. `Rscript benchmarks/peers/surveys.R FOLDER` writes such files.

    Parameters
    ----------
    path : CSV with the columns person, first, second and winner ("tie" is left out, see `item_pairs`).
    """
    rows = _table(Path(path), OWN, "a survey")
    known = {
        name: _covariate(rows[name].tolist(), f"{path}, column {name!r}")
        for name in rows
        if name not in OWN
    }
    pairs = item_pairs(
        rows["first"], rows["second"], rows["winner"], user=rows["person"], covariates=known
    )
    unit, _ = pairs.units("user")
    shuffled = np.random.default_rng(seed).permutation(len(pairs))
    ranks = pd.Series(unit.numpy()[shuffled], shuffled).groupby(lambda row: unit[row].item())
    place = (ranks.cumcount() / ranks.transform("size")).reindex(range(len(pairs))).to_numpy()
    parts = np.select([place < 1 - 2 * HELD_OUT, place < 1 - HELD_OUT], PARTS[:2], PARTS[2])
    return {part: pairs.where(parts == part) for part in PARTS}
