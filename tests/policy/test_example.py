"""The mixture that is shipped: whole, small, and with a base it has the words for."""

import json

import pytest
from safetensors.torch import load_file

import mixdpo_lib as mx
from mixdpo_lib.policy import example
from mixdpo_lib.policy.saving import read_config
from mixdpo_lib.store import MixDPOError, sha256_of


def test_the_packaged_mixture_is_whole_and_small():
    folder = example.example_folder()
    config = read_config(folder / "config.json")
    assert config["base"] == "smollm2-135m" and config["n_experts"] == 3
    assert config["tensors_sha256"] == sha256_of(folder / "mixture.safetensors")
    state = load_file(folder / "mixture.safetensors")
    assert state["experts.up"].shape == (3, 576, 8) and state["experts.down"].shape == (3, 8, 576)
    assert sum(path.stat().st_size for path in folder.iterdir()) < 500_000
    card = (folder / "README.md").read_text()
    assert "python scripts/package_mixture.py" in card and "simulated users" in card


def test_what_is_said_of_it_is_of_its_study():
    about = example.example_about()
    assert sorted(about["serves"]) == ["grammar", "informativeness", "sentiment"]
    assert len(about["comparisons"]) == 24
    for prompt, first, second in about["comparisons"]:
        assert prompt.strip() and first.strip() and second.strip() and first != second
    card = (example.example_folder() / "README.md").read_text()
    told = "; ".join(f"expert {k}: {reward}" for k, reward in enumerate(about["serves"]))
    assert told in card and f"seed {about['seed']}" in card and about["design"] in card


def test_another_base_and_a_damaged_file_are_refused(tiny_base, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="fingerprint"):
        mx.example_mixture(tiny_base)
    (tmp_path / "about.json").write_text(json.dumps({"serves": []}))
    monkeypatch.setattr(example, "example_folder", lambda: tmp_path)
    with pytest.raises(MixDPOError, match="package_mixture"):
        example.example_about()
