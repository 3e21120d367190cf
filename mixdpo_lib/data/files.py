"""How are people's own preference files read?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, DatasetDict

from ..store import cache_part
from .pairs import TEXT_COLUMNS, check_preferences


def _read_table(file: Path, kind: str) -> Dataset:
    place = str(cache_part("datasets"))
    try:
        return datasets.load_dataset(kind, data_files=str(file), split="train", cache_dir=place)
    except (
        Exception
    ) as error:  # of datasets, pyarrow or pandas: the cause says more than the error itself
        said = (str(error.__cause__ or error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{file}: not readable as {file.suffix} ({said}); expected one row a pair with text in the columns "
            f"{', '.join(TEXT_COLUMNS)}"
        ) from error


def explicit_prompts(data: Dataset, place: str = "preference set") -> Dataset:
    """The same pairs with text in `prompt`, `chosen`, `rejected`; other columns stay.

    Three more forms of TRL are read: without a column `prompt` (what both answers begin with is the prompt; a space
    before the difference belongs to the answers), and conversations of one message of the user and one of the
    assistant, with or without `prompt`.

    Raises
    ------
    ValueError : a conversation of another shape, answers without a common beginning; the row is named.

    >>> explicit_prompts(Dataset.from_list([{"chosen": "A film that moves.", "rejected": "A film that bores."}]))[0]
    {'prompt': 'A film that', 'chosen': ' moves.', 'rejected': ' bores.'}
    """
    names = set(data.column_names)
    if not {"chosen", "rejected"} <= names or len(data) == 0:
        return data
    first = data[0]
    if "prompt" in names and not isinstance(first["chosen"], list):
        return data

    def texts(row: dict[str, Any], i: int) -> dict[str, str]:
        chosen, rejected, prompt = row["chosen"], row["rejected"], row.get("prompt")
        if isinstance(chosen, list):
            sides = []
            for side in (chosen, rejected):
                messages = [*(prompt or []), *(side or [])]
                roles = [message.get("role") for message in messages]
                if roles != ["user", "assistant"]:
                    raise ValueError(
                        f"{place}: row {i}: found messages of {roles}, expected one of the user and one "
                        "of the assistant; write longer conversations as text"
                    )
                sides.append([message["content"] for message in messages])
            if sides[0][0] != sides[1][0]:
                raise ValueError(f"{place}: row {i}: chosen and rejected answer different prompts")
            return {"prompt": sides[0][0], "chosen": sides[0][1], "rejected": sides[1][1]}
        if not isinstance(chosen, str) or not isinstance(rejected, str):
            raise ValueError(
                f"{place}: row {i}: no column 'prompt', and answers that are no text; give three texts"
            )
        n = next(
            (j for j, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b),
            min(len(chosen), len(rejected)),
        )
        n -= int(n > 0 and chosen[n - 1] == " ")
        if not chosen[:n].strip():
            raise ValueError(
                f"{place}: row {i}: no column 'prompt', and the answers have no common beginning that "
                "could be it; give the prompt"
            )
        return {"prompt": chosen[:n], "chosen": chosen[n:], "rejected": rejected[n:]}

    own = [texts(row, i) for i, row in enumerate(data)]  # type: ignore[arg-type]
    rest = data.remove_columns([c for c in ("prompt", "chosen", "rejected") if c in names])
    columns = {name: [row[name] for row in own] for name in ("prompt", "chosen", "rejected")}
    return Dataset.from_dict({**columns, **{name: rest[name] for name in rest.column_names}})


def load_preferences(path: str | Path, columns: Sequence[str] = ()) -> DatasetDict:
    """Read preference sets: a folder of `save_to_disk`, a file, or a folder of parquet, jsonl, csv or arrow files.

    The forms that TRL reads and writes are read too, see `explicit_prompts`.

    Raises
    ------
    FileNotFoundError : nothing readable there. ValueError : a bad row, see `check_preferences`.
    """
    folder = Path(path)
    found: dict[str, Dataset] = {}
    if (folder / "dataset_dict.json").is_file():
        found = dict(datasets.load_from_disk(str(folder)))
    elif (folder / "dataset_info.json").is_file():
        found = {"train": datasets.load_from_disk(str(folder))}
    else:
        kinds = {
            ".parquet": "parquet",
            ".jsonl": "json",
            ".json": "json",
            ".csv": "csv",
            ".arrow": "arrow",
        }
        files = (
            [folder] if folder.is_file() else sorted(folder.glob("*")) if folder.is_dir() else []
        )
        for file in files:
            if file.suffix in kinds:
                name = "train" if folder.is_file() else file.stem
                found[name] = _read_table(file, kinds[file.suffix])
    if not found:
        raise FileNotFoundError(
            f"{folder}: no preference data found; expected a folder saved with save_to_disk, or files such as "
            "train.parquet, train.jsonl or train.csv with columns prompt, chosen, rejected"
        )
    return DatasetDict(
        {
            n: check_preferences(explicit_prompts(d, f"{folder} ({n})"), f"{folder} ({n})", columns)
            for n, d in found.items()
        }
    )


def example_preferences() -> DatasetDict:
    """A small set that was written by hand, to try things on: 3 users who want different answers about films.

    The same prompts for every user; "ann" prefers the enthusiastic answer, "ben" the informative one, "cleo" the terse
    one. Columns prompt, chosen, rejected, user, age, country; parts train (30 pairs), validation and test (9 pairs each,
    on prompts of their own). Three made-up people show how things work, never how well.

    >>> {name: len(part) for name, part in sorted(example_preferences().items())}
    {'test': 9, 'train': 30, 'validation': 9}
    """
    return load_preferences(Path(__file__).parent / "example", ["user", "age", "country"])
