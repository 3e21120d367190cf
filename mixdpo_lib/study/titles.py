"""Which works of two domains are there, and what does the base know of them?"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pandas as pd

from ..base.head import reference_logps
from ..base.model import Base
from ..data.pairs import Text, Texts
from ..store import MixDPOError
from .candidates import split_prompts

DOMAINS = ("film", "book")
TITLE_FILES = {"film": "films.csv", "book": "books.csv"}
TEMPLATES = (
    "Having finished {title}, one of the best-known works of {maker}, I can say that this",
    "I have just finished {title}, one of the best-known works of {maker}, and I can say that this",
)


def load_titles(folder: str | Path, n_titles: int) -> pd.DataFrame:
    """All works of both domains, at least `n_titles` of each: domain, title, maker.

    Raises
    ------
    MixDPOError : a file that is absent, not UTF-8, without the columns title and maker, with an empty field or too few
        rows; file and row are named (row 1 is the first after the header).
    """
    parts = []
    for domain in DOMAINS:
        path = Path(folder) / TITLE_FILES[domain]
        if not path.is_file():
            raise MixDPOError(
                f"{path}: not found; expected a file with columns title and maker, one {domain} a row"
            )
        try:
            text = path.read_bytes().decode("utf-8-sig")
            table = pd.read_csv(io.StringIO(text), dtype=str, keep_default_na=False)
        except UnicodeDecodeError as error:
            raise MixDPOError(
                f"{path}: not UTF-8 (byte {error.start}); save the file as UTF-8"
            ) from error
        except (pd.errors.EmptyDataError, pd.errors.ParserError) as error:
            raise MixDPOError(
                f"{path}: not readable as a table ({error}); expected columns title and maker"
            ) from error
        for column in ("title", "maker"):
            if column not in table:
                raise MixDPOError(
                    f"{path}: column {column!r} is missing; found {list(table.columns)}"
                )
            empty = np.flatnonzero(table[column].str.strip() == "")
            if len(empty):
                raise MixDPOError(
                    f"{path}: row {empty[0] + 1}, column {column!r} is empty; expected text"
                )
        if not 0 < n_titles <= len(table):
            raise MixDPOError(
                f"{path}: {len(table)} rows, n_titles={n_titles} wanted: give more {domain}s, or ask for "
                "fewer"
            )
        parts.append(table[["title", "maker"]].assign(domain=domain))
    return pd.concat(parts, ignore_index=True)


def familiarity(base: Base, works: pd.DataFrame) -> np.ndarray:
    """How well the base knows each work: log p(maker given "title, one of the best-known works of"), nats, (works,).

    No domain is read. A gate cannot tell what its base does not know.
    """
    asked = [
        Text(f"{work.title}, one of the best-known works of", f" {work.maker}", False)
        for work in works.itertuples()
    ]
    texts = Texts.of(asked)
    return reference_logps(base, texts)[[texts.index[text] for text in asked]]


def split_items(n_items: int, seed: int) -> list[str]:
    """A part for each of n items in their own order: those of `split_prompts`, drawn (seeded)."""
    parts = [name for name, rows in split_prompts(n_items).items() for _ in rows]
    return np.array(parts)[np.random.default_rng(seed).permutation(n_items)].tolist()
