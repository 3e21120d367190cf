"""Which frozen model? A packaged one, a local folder or a hub id, loaded by one path."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers

from .. import store
from ..store import MixDPOError
from . import tokens
from .architecture import check_model
from .gguf import convert_packaged
from .packaged import packaged, quiet

_BASE_VERSION = 1
UNLIMITED = 1 << 20  # tokens; what a model without a limit of its own is taken to read
# of config.json: what changes no number (names, versions, what is asked for at a call)
_NO_NUMBERS = frozenset(
    "_name_or_path architectures auto_map dtype id2label label2id torch_dtype transformers_version use_cache return_dict "
    "output_attentions output_hidden_states torchscript eos_token_id bos_token_id pad_token_id problem_type".split()
)
_SHARD = r"[A-Za-z0-9_][A-Za-z0-9_ .+-]{0,200}\.safetensors"


@dataclass(frozen=True)
class Base:
    """A frozen causal language model with its tokenizer (evaluation mode, no gradients)."""

    name: str
    model: transformers.PreTrainedModel
    tokenizer: transformers.PreTrainedTokenizerBase
    folder: str | None
    fingerprint: (
        str  # 64 hex digits: weights, configuration that changes numbers, the tokenizer as it acts
    )
    chat: bool = False  # prompts are put into the chat template

    def __repr__(self) -> str:
        size = sum(p.numel() for p in self.model.parameters()) / 1e6
        kind = type(self.model).__name__
        return f"Base: {self.name}, {kind} of {size:,.0f} M parameters, {self.vocab_size:,} tokens, on {self.device}"

    def prompt_ids(self, prompt: Any) -> list[int]:
        """Token ids of a prompt, a text or a conversation, as the model means it: see `tokens.prompt_ids`."""
        return tokens.prompt_ids(self.tokenizer, prompt, self.chat)

    def text_ids(self, prompt: Any, answer: str, ended: bool) -> tuple[list[int], list[int]]:
        """Token ids of a prompt and of an answer to it as the model means them, see `tokens.text_ids`.

        Raises
        ------
        ValueError : an empty prompt or answer; a text longer than the context, or with tokens that the model does not
            know; an end token inside the answer; a conversation without a template.
        """
        before, own = tokens.text_ids(
            self.tokenizer, prompt, answer, ended, self.chat, self.end_ids
        )
        for what, words, ids in (("prompt", prompt, before), ("response", answer, own)):
            if not ids:
                raise ValueError(
                    f"{what} {words!r} has no tokens: every pair needs a prompt and two responses"
                )
            if max(ids) >= self.vocab_size:
                token = self.tokenizer.convert_ids_to_tokens(max(ids))
                raise ValueError(
                    f"{what} {str(words)[:60]!r}: token {token!r} has number {max(ids)}, and {self.name} has "
                    f"{self.vocab_size} rows: remove the token from the text, or resize the model's embeddings"
                )
        if len(before) + len(own) > self.context:
            raise ValueError(
                f"prompt of {len(before)} and response of {len(own)} tokens exceed the context of {self.name} "
                f"({self.context} tokens); shorten the text. It begins: {str(prompt)[:60]!r}"
            )
        return before, own

    @cached_property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end a text, the tokenizer's own first: see `tokens.end_ids`."""
        generation = getattr(self.model, "generation_config", None)
        return tokens.end_ids(self.tokenizer, generation, self.chat)

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
        """Width of the last hidden state, which the head reads."""
        return int(self.model.get_output_embeddings().weight.shape[1])

    @property
    def vocab_size(self) -> int:
        """Rows of the output head."""
        return int(self.model.get_output_embeddings().weight.shape[0])

    @property
    def context(self) -> int:
        """Largest number of tokens of prompt and response together.

        Of a model without positions of its own (ALiBi, a state space): what its tokenizer was made for, else no limit.
        """
        config = self.model.config.get_text_config()
        for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
            if isinstance(found := getattr(config, name, None), int):
                return found
        return int(min(self.tokenizer.model_max_length, UNLIMITED))

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
    free = (
        torch.cuda.mem_get_info(device)[0]
        if device.type == "cuda"
        else psutil.virtual_memory().available
    )
    if size > free:
        raise MixDPOError(
            f"{what} need about {size / 2**30:.1f} GiB on {device}, {free / 2**30:.1f} GiB are free: "
            "take fewer or smaller ones, or AdapterExperts or HeadExperts, which share one model"
        )


def load_base(
    name: str | os.PathLike[str] = "smollm2-135m",
    *,
    revision: str | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    chat: bool = False,
) -> Base:
    """A base model: a packaged name, a local folder, or a hub id; all end in a local folder and load by one path.

    The packaged 4-bit file is converted to float32 safetensors once (538 MB in the cache, under a minute). No code from
    a folder or the hub is run, and only safetensors weights are read.

    Parameters
    ----------
    revision : of a hub id.
    dtype : "float32" or "bfloat16", of weights and blocks; log-probabilities are float32 in any case.
    device : "cpu", "cuda", "mps", ...
    chat : write prompts and answers in the tokenizer's chat template; a prompt that is a text is one message of the user.

    Raises
    ------
    MixDPOError : folder without configuration, tokenizer, weights or a shard; weights that do not fit; no end token; a
        chat template that is asked for and not there; a device that is absent; tokens that the model has no row for.
    """
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype={dtype!r}: possible are 'float32' and 'bfloat16'")
    label = os.fspath(name)
    hashes: dict[str, str] = {}
    if label in packaged("base"):
        entry = packaged("base")[label]
        folder = store.cached(
            "base",
            _BASE_VERSION,
            {"name": label, "dtype": "float32"},
            lambda path: convert_packaged(label, path),
            inputs=[entry["sha256"]],
        )
        hashes = {
            file: kept["sha256"] for file, kept in store.verify_artefact(folder)["files"].items()
        }
    elif Path(label).expanduser().is_dir():
        folder = Path(label).expanduser()
    else:
        folder = _snapshot(label, revision)
    weights = _weight_files(folder)
    try:
        with quiet():
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            loader: Any = transformers.AutoModelForCausalLM
            model, report = loader.from_pretrained(
                folder,
                dtype=getattr(torch, dtype),
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
    except Exception as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise MixDPOError(
            f"{folder}: not a causal language model that can be loaded ({said}); expected config.json, "
            "tokenizer files and undamaged safetensors of one model"
        ) from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise MixDPOError(
            f"{folder}: the weights lack {len(missing)} tensors that config.json asks for (first: "
            f"{missing[0]}); expected the weights of this very configuration"
        )
    if tokenizer.eos_token_id is None:
        raise MixDPOError(
            f"{folder}: the tokenizer has no end token; set eos_token in tokenizer_config.json: it marks "
            "the end of a response"
        )
    if chat and not getattr(tokenizer, "chat_template", None):
        raise MixDPOError(
            f"{folder}: chat=True, and the tokenizer has no chat template; leave chat out: prompts are "
            "then read as they stand"
        )
    try:
        model.to(device).eval().requires_grad_(False)
    except (RuntimeError, AssertionError) as error:
        said = str(error).splitlines()[0]
        raise MixDPOError(
            f"device={device!r}: not usable here ({said}); 'cpu' always is"
        ) from error
    check_model(model, folder)
    base = Base(label, model, tokenizer, str(folder), "", chat)
    try:
        _check_vocabulary(folder, base)
        acts = tokens.acts(tokenizer, chat, base.end_ids)
    except MixDPOError:
        raise
    except Exception as error:  # of a tokenizer that was read and cannot be used
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise MixDPOError(
            f"{folder}: its tokenizer (or the end tokens of its generation configuration) cannot be used "
            f"({type(error).__name__}: {said}); expected the files of the model as they were saved; copy the folder again"
        ) from error
    parts = {
        "weights": [hashes.get(n) or store.sha256_of(folder / n) for n in weights],
        "config": _numbers(store.read_json(folder / "config.json")),
        "tokenizer": acts,
        "dtype": dtype,
    }
    return replace(
        base, fingerprint=hashlib.sha256(store.canonical_json(parts).encode()).hexdigest()
    )


def _numbers(config: Any) -> Any:
    """A configuration without what changes no number."""
    if not isinstance(config, dict):
        return config
    return {name: _numbers(value) for name, value in config.items() if name not in _NO_NUMBERS}


def _check_vocabulary(folder: Path, base: Base) -> None:
    """Refuse a tokenizer with tokens that the model has no row for, unless no text uses them.

    Raises
    ------
    MixDPOError : the first such token and both sizes are named.
    """
    embeddings: Any = base.model.get_input_embeddings()
    rows = min(base.vocab_size, len(embeddings.weight))
    beyond = {token: i for token, i in base.tokenizer.get_vocab().items() if i >= rows}
    special = set(base.tokenizer.all_special_tokens) | {
        str(token)
        for token in getattr(base.tokenizer, "added_tokens_decoder", {}).values()
        if token.special
    }
    used = [*base.end_ids, *base.prompt_ids("Hello")]
    if (beyond and not set(beyond) <= special) or max(used) >= rows:
        first = min(beyond, key=lambda token: beyond[token]) if beyond else str(max(used))
        raise MixDPOError(
            f"{folder}: the tokenizer has {len(beyond)} tokens more than the model (first: {first!r}), which has {rows} "
            "rows: the embeddings were not resized when tokens were added; resize them (`resize_token_embeddings`), "
            "train, and save model and tokenizer together"
        )
    if beyond:
        store.note(
            f"{base.name}: {', '.join(sorted(beyond))} of the tokenizer are unknown to the model; texts with them are "
            "refused"
        )


def _snapshot(name: str, revision: str | None) -> Path:
    from huggingface_hub import constants, snapshot_download

    try:
        if Path(name).is_absolute() or name.startswith((".", "~")):
            raise ValueError("no such folder")
        with store.writing_to(Path(constants.HF_HUB_CACHE)):
            return Path(
                snapshot_download(
                    name,
                    revision=revision,
                    ignore_patterns=["*/*"],
                    allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"],
                )
            )
    except MixDPOError:
        raise
    except Exception as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise MixDPOError(
            f"{name!r}: no base model there ({said}); expected {', '.join(packaged('base'))}, a local "
            "folder, or a hub id that can be reached"
            + "".join(
                f"; did you mean {one}?" for one in get_close_matches(name, packaged("base"), 1)
            )
        ) from error


def _weight_files(folder: Path) -> list[str]:
    if not (folder / "config.json").is_file():
        raise MixDPOError(
            f"{folder}: no config.json; expected the folder of a saved model (`save_pretrained`)"
        )
    if (folder / "adapter_config.json").exists():  # it names another model, which would be loaded
        raise MixDPOError(
            f"{folder}: found adapter_config.json: an adapter, which points to a model elsewhere; merge it "
            "(`merge_and_unload`) and save the whole model, or remove that file"
        )
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        if not (folder / "model.safetensors").is_file():
            others = sorted(p.name for p in folder.glob("*.bin")) or sorted(
                p.name for p in folder.iterdir()
            )
            raise MixDPOError(
                f"{folder}: no weights: found {others}, expected model.safetensors; save the model again "
                "with `save_pretrained` (pickled weights are not read)"
            )
        return ["model.safetensors"]
    content = store.read_json(index)
    named = content.get("weight_map") if isinstance(content, dict) else content
    if not isinstance(named, dict) or not all(isinstance(one, str) for one in named.values()):
        raise MixDPOError(
            f"{index}: found {str(named):.60}, expected a `weight_map` from names of tensors to names of "
            "files in this folder; copy the folder again"
        )
    shards = sorted(set(named.values()))
    outside = [shard for shard in shards if not re.fullmatch(_SHARD, shard)]
    if outside:
        raise MixDPOError(
            f"{index}: found {outside[0]!r:.80} as the name of a weight file, expected a plain name such as "
            "model-00001-of-00002.safetensors: weights lie in the folder itself"
        )
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing or not shards:
        raise MixDPOError(
            f"{folder}: {len(missing)} of {len(shards)} weight files are missing ({', '.join(missing)}); "
            "expected every file that model.safetensors.index.json names; copy the folder again"
        )
    whole = [
        name for name in ("model.safetensors",) if (folder / name).exists()
    ]  # read where both are
    return sorted({*shards, *whole})
