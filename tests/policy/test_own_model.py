"""The guide to one's own model and data runs as it stands; the forms of preference data that TRL knows."""

import functools
import importlib
import re
from pathlib import Path

import datasets
import pytest
from tiny import preference_rows, save_tiny_base

import mixdpo_lib as mx
from mixdpo_lib.data.files import load_preferences
from mixdpo_lib.data.forms import explicit_prompts

ROOT = Path(__file__).resolve().parents[2]
GUIDE = ROOT / "docs" / "using-your-own-model-and-data.md"


@pytest.fixture
def short_fits(monkeypatch):
    """Where a page gives no configuration: a tenth of the steps; what the defaults learn is tested in test_example.py."""
    few = functools.partial(mx.FitConfig, min_steps=20)
    for module in ("learning.fit", "choosing"):
        monkeypatch.setattr(importlib.import_module(f"mixdpo_lib.{module}"), "FitConfig", few)


@pytest.mark.usefixtures("short_fits")
def test_the_guide_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MIXDPO_CACHE", str(tmp_path / "cache"))
    tiny, load = mx.load_base(save_tiny_base(tmp_path / "my-model")), mx.load_base
    monkeypatch.setattr(
        mx,
        "load_base",
        lambda name, **options: tiny if name == "smollm2-135m" else load(name, **options),
        raising=False,
    )
    (tmp_path / "my-pairs").mkdir()
    preference_rows(24).to_json(tmp_path / "my-pairs" / "train.jsonl")
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.S)
    assert len(blocks) >= 5
    names = {}
    for block in blocks:
        exec(compile(block, str(GUIDE), "exec"), names)
    said = capsys.readouterr().out
    assert all(f"{family}Experts -0." in said for family in ("Head", "Adapter", "Independent"))
    assert names["new"].exp().sum() == pytest.approx(1) and "experts" in said
    assert (
        names["same"]
        .posterior(names["example"]["train"])
        .equals(names["policy"].posterior(names["example"]["train"]))
    )
    assert load_preferences("for-trl.jsonl")["train"]["prompt"] == names["pairs"]["train"]["prompt"]
    assert (
        names["again"]
        .loglik(names["pairs"]["train"])
        .equal(names["adapters"].loglik(names["pairs"]["train"]))
    )


@pytest.mark.usefixtures("short_fits")
def test_the_block_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MIXDPO_CACHE", str(tmp_path / "cache"))
    tiny = mx.load_base(save_tiny_base(tmp_path / "my-model"))  # in the place of the packaged one
    monkeypatch.setattr(mx, "load_base", lambda name, chat: tiny, raising=False)
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    names = {}
    exec(compile(block, "README.md", "exec"), names)
    assert names["result"].stop_reason and names["who"].shape == (3,)
    assert (tmp_path / "my-mixture" / "config.json").is_file()


def said(role, text):
    return {"role": role, "content": text}


def test_the_forms_of_trl(tmp_path):
    wanted = {
        "prompt": "A film",
        "chosen": " that moves.",
        "rejected": " that bores.",
        "user": "ann",
    }
    answers = {name: [said("assistant", wanted[name])] for name in ("chosen", "rejected")}
    forms = {
        "explicit": wanted,
        "conversation": {"prompt": [said("user", "A film")], **answers, "user": "ann"},
        "whole conversation": {n: [said("user", "A film"), *a] for n, a in answers.items()}
        | {"user": "ann"},
    }
    for name, row in forms.items():
        file = tmp_path / f"{name}.jsonl"
        datasets.Dataset.from_list([row, row]).to_json(file)
        prompt = "A film" if name == "explicit" else [said("user", "A film")]
        found = dict(load_preferences(file, ["user"])["train"][1])
        assert found == wanted | {"prompt": prompt}, name
    whole = {n: wanted["prompt"] + wanted[n] for n in ("chosen", "rejected")}
    found = explicit_prompts(datasets.Dataset.from_list([whole]))[0]  # the longest common beginning
    assert found == {"prompt": "A film that", "chosen": " moves.", "rejected": " bores."}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"chosen": "good", "rejected": "bad"},
            "row 0: no column 'prompt', and the answers have no common beginning",
        ),
        ({"chosen": 1, "rejected": 2}, "row 0: no column 'prompt', and answers that are no text"),
        (
            {
                "chosen": [said("user", "a"), said("assistant", "b"), said("user", "c")],
                "rejected": [said("user", "a"), said("assistant", "d")],
            },
            r"found messages of \['user', 'assistant', 'user'\]",
        ),
        (
            {
                "chosen": [said("user", "a"), said("assistant", "b")],
                "rejected": [said("user", "c"), said("assistant", "b")],
            },
            "row 0: chosen and rejected answer different prompts",
        ),
    ],
)
def test_forms_that_cannot_be_read(row, message):
    with pytest.raises(ValueError, match=message):
        explicit_prompts(datasets.Dataset.from_list([row]))
