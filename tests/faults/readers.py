"""Every text that the library reads, and who reads it."""

import json
from pathlib import Path

import nbformat
from damage import copy_of
from work import NAME, REVIEW, features, reading, serving

import mixdpo_lib as mx
from mixdpo_lib.runner import notebooks, parameters
from mixdpo_lib.study import load_reviews
from mixdpo_lib.study.titles import load_titles

CELL = "seeds: list[int] = [0, 1]  # one run each\nrate: float = 0.1  # of a step\n"
PROFILE = f"common:\n  rank: 8\n{NAME}:\n  seeds: [0]\n  rate: 0.5\n"
COMMON = "fits:\n  rank:\n    type: int\n    default: 8\n    about: of a head\n"
LISTED = f"main:\n  {NAME}: {{shares: []}}\nfurther: {{}}\n"
SAID = "\n\nHuman: Is it good?\n\nAssistant:"


def originals(folder):
    """By name: a file, and a function of the base that reads it."""
    (folder / "workflow" / "notebooks.yaml").write_text(LISTED)
    (folder / "notebooks" / "profiles" / "default.yaml").write_text(PROFILE.split("\n", 2)[2])
    (folder / "notebooks" / "profiles" / "smoke.yaml").write_text(PROFILE.split("\n", 2)[2])
    book = nbformat.v4.new_notebook()
    book.cells = [nbformat.v4.new_code_cell(CELL), nbformat.v4.new_code_cell("run = 1")]
    book.cells[0].metadata["tags"] = ["parameters"]
    notebook = folder / "notebooks" / f"{NAME}.ipynb"
    nbformat.write(book, notebook)
    overrides = folder / "overrides.txt"
    overrides.write_text("seeds=[0, 1]\nrate=0.5\n")
    with open(folder / "reviews.csv", "w") as file:
        file.write("text,label\n" + "".join(f'"{text}",{label}\n' for text, label, _ in REVIEW))
    (folder / "reviews.jsonl").write_text(
        "".join(json.dumps({"text": text, "label": int(label)}) + "\n" for text, label, _ in REVIEW)
    )
    load_reviews(folder / "reviews.csv").to_parquet(folder / "reviews.parquet")
    talk = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "It is."}]
    (folder / "talks.json").write_text(
        json.dumps([{"chosen": talk, "rejected": [talk[0], {**talk[1], "content": "No."}]}] * 3)
    )
    (folder / "said.csv").write_text(
        "chosen,rejected,user\n" + f'"{SAID} Yes.","{SAID} No.",a\n' * 3
    )
    titles = copy_of(Path(__file__).parents[2] / "data" / "titles", folder / "titles")
    run, cache = folder / "runs" / "default" / NAME, folder / "cache" / "features"
    (entry,) = (path for path in cache.iterdir() if path.is_dir())

    def load(_):
        mx.load_base(folder / "base")

    def pairs(name, whole=True):
        return lambda base: mx.load_preferences(folder / name, base=base if whole else None)

    def quoted(base):
        return reading(base, folder)

    def resolved(base):
        notebooks.listed_notebooks()
        parameters.resolve_parameters(NAME, "smoke")

    def given(base):
        lines = overrides.read_text(errors="surrogateescape").splitlines()
        parameters.resolve_parameters(NAME, "default", parameters.parse_overrides(lines))

    found = {
        "preferences (jsonl)": (folder / "train.jsonl", pairs("train.jsonl")),
        "preferences (messages)": (folder / "talks.json", pairs("talks.json", False)),
        "preferences (transcripts)": (folder / "said.csv", pairs("said.csv")),
        "reviews (csv)": (folder / "reviews.csv", lambda _: load_reviews(folder / "reviews.csv")),
        "reviews (jsonl)": (
            folder / "reviews.jsonl",
            lambda _: load_reviews(folder / "reviews.jsonl"),
        ),
        "reviews (parquet)": (
            folder / "reviews.parquet",
            lambda _: load_reviews(folder / "reviews.parquet"),
        ),
        "titles": (sorted(titles.glob("*.csv"))[0], lambda _: load_titles(titles, 4)),
        "notebook": (notebook, resolved),
        "profile": (folder / "notebooks" / "profiles" / "smoke.yaml", resolved),
        "list of notebooks": (folder / "workflow" / "notebooks.yaml", resolved),
        "parameters on the command line": (overrides, given),
        "config of a mixture": (folder / "mixture" / "config.json", lambda b: serving(b, folder)),
        "record of the cache": (entry / "artefact.json", lambda b: features(b, folder)),
        "manifest": (run / "manifest.json", quoted),
        "values": (run / "values.json", quoted),
    }
    for name in ("config", "generation_config", "tokenizer", "tokenizer_config"):
        found[f"{name}.json of a model"] = (folder / "base" / f"{name}.json", load)
    return found
