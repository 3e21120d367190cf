"""Damaged files: a small preference set in every format, its bytes changed, and what then is raised.

`python tests/data/mutations.py 100000` runs longer than a test does.
"""

import gzip
import json
import random
import sys
import tempfile
from pathlib import Path

import datasets

from mixdpo_lib.data.files import load_preferences
from mixdpo_lib.data.pairs import Pairs


def said(*texts):
    """Messages of a user and an assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(texts)]


TEXTS = [
    {"prompt": f"Film {i}?", "chosen": f" good é {i}", "rejected": " bad", "user": f"u{i % 2}"}
    for i in range(4)
]
TALKS = [
    {"chosen": said(f"Film {i}?", "Good."), "rejected": said(f"Film {i}?", "Bad."), "user": i % 2}
    for i in range(3)
]
PIECES = [
    b"",
    b"\x00",
    b"\xff",
    b"\n",
    b'"',
    b",",
    b"[",
    b"]",
    b"{",
    b"}",
    b"null",
    b"1e999",
    b"NaN",
    b": &a",
    b"\\ud800",
    b"\xef\xbb\xbf",
    b"[" * 2000,
    b"9" * 5000,
    b"[{'role': 'user', 'content': (((1",
]


def originals(folder):
    """The same rows in every format: name of a file and its bytes."""
    found = {}
    for name, rows in (("texts", TEXTS), ("talks", TALKS)):
        data = datasets.Dataset.from_list(rows)
        data.to_parquet(folder / "a.parquet")
        data.save_to_disk(folder / name)
        (arrow,) = (folder / name).glob("*.arrow")
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        data.to_pandas().to_csv(folder / "a.csv", index=False)
        table = (folder / "a.csv").read_bytes()
        if name == "talks":  # cells of messages, as JSON and in Python's notation
            cells = [
                {k: json.dumps(v) if k == "chosen" else str(v) for k, v in r.items()} for r in rows
            ]
            datasets.Dataset.from_list(cells).to_csv(folder / "a.csv")
            table = (folder / "a.csv").read_bytes()
        found |= {
            f"{name}.parquet": (folder / "a.parquet").read_bytes(),
            f"{name}.arrow": arrow.read_bytes(),
            f"{name}.jsonl": lines,
            f"{name}.json": json.dumps(rows).encode(),
            f"{name}.csv": table,
            f"{name}.csv.gz": gzip.compress(table, mtime=0),
        }
    return found


def mutate(content, rng):
    """Cut, overwrite, remove, double or put something in, once to three times."""
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(content) + 1)
        to = min(len(content), at + rng.choice([1, 2, 8, 64]))
        way = rng.randrange(5)
        if way == 0:
            content = content[:at]
        elif way == 1:
            content = content[:at] + rng.randbytes(to - at) + content[to:]
        elif way == 2:
            content = content[:at] + content[to:]
        elif way == 3:
            content = content[:to] + content[at:]
        else:
            content = content[:at] + rng.choice(PIECES) + content[at:]
    return content


def trouble(folder, n, seed=0):
    """Of `n` changed files: which raised something else than a clear error, or were read as something that is no set."""
    rng, found, read = random.Random(seed), [], 0
    kept = originals(folder)
    for i in range(n):
        name = rng.choice(sorted(kept))
        file = folder / f"m.{name.split('.', 1)[1]}"
        file.write_bytes(mutate(kept[name], rng))
        drop = rng.choice(["raise", "drop"])
        try:
            data = load_preferences(file, on_bad_rows=drop)["train"]
        except ValueError as error:
            if type(error) is not ValueError or "\n" in str(error) or "; " not in str(error):
                found.append((i, name, repr(error)))
            continue
        except Exception as error:
            found.append((i, name, repr(error)))
            continue
        try:
            Pairs.of(data)
            data.to_list()
            read += 1
        except Exception as error:
            found.append((i, name, f"read, and then {error!r}"))
    return found, read


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        for line in trouble(Path(place), int(sys.argv[1]), int((sys.argv + ["0"])[2]))[0]:
            print(*line)
