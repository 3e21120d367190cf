"""The example set that is shipped, and what the defaults of a fit make of it."""

import re

import pytest
from tiny import save_tiny_base
from tokenizers import pre_tokenizers

import mixdpo_lib as mx


def save_example_base(folder, seed=0):
    """A tiny random Llama whose words are those of the example set."""
    texts = [
        row[c]
        for part in mx.example_preferences().values()
        for row in part
        for c in ("prompt", "chosen")
    ]
    words = sorted(
        {word for text in [*texts, "This film"] for word in re.findall(r"\w+|[^\w\s]+", text)}
    )
    vocabulary = {word: i for i, word in enumerate(["<unk>", "</s>", *words])}
    return save_tiny_base(folder, seed, 64, vocabulary, pre_tokenizers.Whitespace())


@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.setenv("MIXDPO_CACHE", str(tmp_path / "cache"))
    return mx.load_base(save_example_base(tmp_path / "base"))


def test_three_users_want_three_kinds_of_answers():
    pairs = mx.example_preferences()
    assert {name: len(part) for name, part in pairs.items()} == {
        "train": 30,
        "validation": 9,
        "test": 9,
    }
    prompts = {name: set(part["prompt"]) for name, part in pairs.items()}
    assert [len(prompts[name]) for name in ("train", "validation", "test")] == [10, 3, 3]
    assert len(set.union(*prompts.values())) == 16  # no prompt in two parts
    for part in pairs.values():
        assert part.column_names == ["prompt", "chosen", "rejected", "user", "age", "country"]
        for prompt in set(part["prompt"]):
            own = part.filter(lambda row, prompt=prompt: row["prompt"] == prompt)
            assert sorted(own["user"]) == ["ann", "ben", "cleo"] and len(set(own["chosen"])) == 3
            assert set(own["rejected"]) <= set(own["chosen"])
            answers = set(zip(own["chosen"], own["rejected"], strict=True))
            assert any(
                (worse, better) in answers for better, worse in answers
            )  # two disagree about the same two answers


def test_the_defaults_part_three_users(base):
    pairs = mx.example_preferences()
    policy = mx.MixturePolicy(mx.HeadExperts(base, n_experts=3), mx.LearnedWeights(3))
    result = mx.fit(policy, pairs["train"])
    q = policy.posterior(pairs["train"])
    assert q.max(axis=1).min() > 0.9, q
    assert sorted(q.idxmax(axis=1)) == [0, 1, 2]
    assert "experts have parted" in result.summary
