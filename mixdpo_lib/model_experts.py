"""What do experts say that change the base's blocks? LoRA adapters in chosen blocks, or whole models.

Both keep the contract of `experts.Experts`. Their forward pass runs transformer blocks at every step, where
`HeadExperts` read what the frozen base has said once.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from .experts import Experts, Voices, head_logits, logit_map, place_of, read_on, reference_logps
from .features import TextFeatures, tokenise
from .sources import Base, need_memory
from .store import MixDPOError, cached, progress

VERSION = 1


def shared_copy(model: nn.Module) -> Any:
    """The same modules anew around the same tensors: what is put into the copy does not reach the original."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def block_list(model: Any) -> tuple[str, nn.ModuleList]:
    """The transformer blocks of a causal language model and their name inside it.

    Raises
    ------
    MixDPOError : a model without one list of `num_hidden_layers` blocks.
    """
    n = int(model.config.get_text_config().num_hidden_layers)
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == n]
    if not found:
        raise MixDPOError(f"{type(model).__name__}: no list of {n} blocks found; adapters need one")
    return found[0]


def _linear_names(block: nn.Module) -> list[str]:
    """Names of the linear layers of a block, without what is above them, in order."""
    found = [name.rsplit(".", 1)[-1] for name, m in block.named_modules()
             if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"]  # fmt: skip
    return list(dict.fromkeys(found))


def lora_config(base: Base, rank: int, blocks: Sequence[int], modules: Sequence[str]) -> Any:
    """The LoRA configuration of these linear layers in these blocks; B A is added as it is (alpha = rank)."""
    from peft import LoraConfig

    where = block_list(base.model)[0].rsplit(".", 1)[-1]
    return LoraConfig(
        r=rank, lora_alpha=rank, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM", target_modules=list(modules),
        layers_to_transform=list(blocks), layers_pattern=where,
        fan_in_fan_out=base.model.config.model_type == "gpt2",
    )  # fmt: skip


def adapter_tensors(peft_model: Any, adapter: str) -> dict[str, nn.Parameter]:
    """The tensors of one adapter by the names under which peft saves them."""
    mark = f".{adapter}."
    return {n.replace(mark, "."): p for n, p in peft_model.named_parameters() if mark in n and "lora_" in n}


def _padded(ids: Sequence[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
    """Sequences padded on the right, and where each response token is predicted: column, token, text."""
    rows = [a + b for a, b in ids]
    input_ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for i, row in enumerate(rows):
        input_ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
    column = [len(a) - 1 + j for a, b in ids for j in range(len(b))]
    return {
        "input_ids": input_ids, "attention_mask": mask, "column": torch.tensor(column),
        "target": torch.tensor([t for _, b in ids for t in b]),
        "segment": torch.tensor([i for i, (_, b) in enumerate(ids) for _ in b]),
    }  # fmt: skip


class _FrozenHeadLogps(torch.autograd.Function):
    """log p(token) of every position under a frozen head, in blocks of positions; gradients for the hidden states.

    d log p(t) / dh = W_t - sum_v p_v W_v is made on the way, while the block's probabilities are at hand, so that no
    more than one block of (positions, vocabulary) is ever held.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, target, block=128):  # type: ignore[override]
        logps, slope = hidden.new_empty(len(hidden), dtype=torch.float32), None
        if ctx.needs_input_grad[0]:
            slope = torch.empty_like(hidden)
        for at in torch.arange(len(hidden), device=hidden.device).split(block):
            z = nn.functional.linear(hidden[at], weight, bias).float()
            token = z.gather(1, target[at, None]).squeeze(1)
            top = z.amax(1)
            total = z.sub_(top[:, None]).exp_().sum(1)
            logps[at] = token - top - total.log()
            if slope is not None:
                slope[at] = weight[target[at]] - (z.to(weight.dtype) @ weight) / total[:, None].to(weight.dtype)
        ctx.save_for_backward(slope)
        return logps

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        (slope,) = ctx.saved_tensors
        return (grad[:, None] * slope).to(slope.dtype), None, None, None


def _token_logps(base: Base, model: Any, hidden: Tensor, target: Tensor) -> Float[Tensor, "positions"]:
    """log probability of the token at each position, nats, float32; gradients flow."""
    head = model.get_output_embeddings()
    plain = type(head) is nn.Linear and logit_map(base.model.config.get_text_config()) is None
    if plain and not head.weight.requires_grad:
        return _FrozenHeadLogps.apply(hidden.to(head.weight.dtype), head.weight, head.bias, target)
    logits = head_logits(base, hidden, model)
    return logits.gather(1, target[:, None]).squeeze(1) - logits.logsumexp(1)


def _response_logps(
    base: Base, model: Any, inputs: dict[str, Tensor], rows: Tensor | None, n_texts: int
) -> Float[Tensor, "rows"]:
    """log probability of the responses of these rows (None: all), nats; gradients flow."""
    input_ids, mask = inputs["input_ids"], inputs["attention_mask"]
    column, target, segment = inputs["column"], inputs["target"], inputs["segment"]
    if rows is not None:
        place = place_of(rows, n_texts)
        own = (place[segment] >= 0).nonzero().squeeze(1)
        input_ids, mask = input_ids[rows], mask[rows]
        column, target, segment = column[own], target[own], place[segment[own]]
    hidden = model.base_model(input_ids=input_ids, attention_mask=mask, use_cache=False).last_hidden_state
    logps = _token_logps(base, model, hidden[segment, column], target)
    return logps.new_zeros(len(input_ids)).index_add(0, segment, logps)


def _registered(named: dict[str, nn.Parameter]) -> nn.ParameterDict:
    """Parameters of modules that are not submodules, by name, so that a checkpoint holds these alone."""
    return nn.ParameterDict({name.replace(".", "/"): p for name, p in named.items()})


def _kinds(bases: Sequence[Base]) -> list[int]:
    """For each base, the first of the list that equals it: their tokens and references are the same."""
    prints = [base.fingerprint for base in bases]
    return [prints.index(one) for one in prints]


class _Enough(Exception):
    """Raised where the lower blocks have said what was asked."""


@dataclass(frozen=True)
class AdapterConstants:
    """What no adapter changes about a set of texts: tokens, the reference, and (if kept) the lower blocks' output.

    ids : token ids of prompt and response of each text. ref : (texts,) nats. lower : (positions, hidden) float32,
    memory-mapped, or None; text i owns offsets[i] ... offsets[i + 1] - 1, prompt and response together.
    """

    ids: list[tuple[list[int], list[int]]]
    ref: np.ndarray
    lower: np.ndarray | None
    offsets: np.ndarray


class AdapterExperts(Experts):
    """K LoRA adapters (Hu et al. 2021, arXiv 2106.09685; by peft) in chosen blocks of one frozen base.

    Expert k is the base with `W x + B_k A_k x` in the linear layers of these blocks; with the adapters off it is the
    reference. Blocks below the first adapted one are the same for all experts: they run once a batch, or once at all
    where their output is kept on disk.

    Parameters
    ----------
    base : the frozen language model, see `load_base`.
    n_experts : K >= 1; 1 is plain DPO with an adapter.
    rank : r >= 1 of every adapter; 8 by default.
    blocks : how many of the last blocks, or a list of block numbers from 0; 2 by default.
    target_modules : names of the linear layers, such as ("q_proj", "v_proj"); None: all of a block.
    keep_lower : keep the lower blocks' output on disk (float32: 4 bytes x width for each token of each text) instead of
        computing it at every step.

    Raises
    ------
    ValueError : blocks or modules that the base has not (what it has is named).

    Notes
    -----
    All experts start with the same A (drawn once, seed 0) and B = 0, which is the reference.
    """

    def __init__(
        self, base: Base, n_experts: int = 3, rank: int = 8, blocks: int | Sequence[int] = 2,
        target_modules: Sequence[str] | None = None, keep_lower: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(base, n_experts)
        from peft import get_peft_model

        if rank < 1:
            raise ValueError(f"rank={rank}: each adapter needs a rank of at least 1")
        n_blocks = len(block_list(base.model)[1])
        chosen = list(range(n_blocks - blocks, n_blocks)) if isinstance(blocks, int) else sorted(set(blocks))
        if not chosen or not 0 <= chosen[0] <= chosen[-1] < n_blocks:
            raise ValueError(f"blocks={blocks}: {base.name} has {n_blocks} blocks, 0 ... {n_blocks - 1}; give a number "
                             f"from 1 to {n_blocks}, or a list of them")  # fmt: skip
        known = _linear_names(block_list(base.model)[1][chosen[0]])
        unknown = sorted(set(target_modules or ()) - set(known))
        if unknown or (target_modules is not None and not target_modules):
            raise ValueError(
                f"target_modules={target_modules}: {unknown} not in the blocks of {base.name}; possible are {known}"
            )
        self.rank, self.blocks, self.keep_lower = rank, chosen, keep_lower
        self.target_modules = list(target_modules or known)
        config = lora_config(base, rank, chosen, self.target_modules)
        self._names = [f"expert{k}" for k in range(n_experts)]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = get_peft_model(shared_copy(base.model), config, adapter_name=self._names[0])
            for name in self._names[1:]:
                model.add_adapter(name, config)
        tensors = [adapter_tensors(model, name) for name in self._names]
        with torch.no_grad():
            for other in tensors[1:]:
                for key, value in other.items():
                    value.copy_(tensors[0][key])
        self._peft = [model.eval()]  # in a list: of the modules only the adapters belong to a checkpoint
        self._layers = [m for m in model.modules() if hasattr(m, "lora_A") and hasattr(m, "set_adapter")]
        self.adapters = _registered({f"{k}.{key}": p for k, own in enumerate(tensors) for key, p in own.items()})
        self._kept: Tensor | None = None
        for block in block_list(self._model)[1][: chosen[0]]:
            block.forward = self._unless_kept(block.forward)
        self._speaks_as(0)

    def options(self) -> dict[str, Any]:
        """What makes equal experts but for their parameters."""
        return {"family": "AdapterExperts", "n_experts": self.n_experts, "rank": self.rank, "blocks": self.blocks,
                "target_modules": self.target_modules, "keep_lower": self.keep_lower}  # fmt: skip

    @property
    def _model(self) -> Any:
        return self._peft[0].get_base_model()

    def _unless_kept(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A lower block gives what was kept of the last of them, where something was."""
        return lambda *args, **options: forward(*args, **options) if self._kept is None else self._kept

    def _speaks_as(self, k: int) -> None:
        for layer in self._layers:
            layer.set_adapter([self._names[k]])
        for p in self.adapters.values():  # peft freezes the adapters that are not active: their gradient would be lost
            p.requires_grad_(True)

    def perturb(self, scale: float, generator: torch.Generator) -> None:
        """Symmetry breaking "random_heads": B_k ~ N(0, scale^2), drawn for each expert; A stays."""
        with torch.no_grad():
            for name, p in self.adapters.items():
                if "lora_B" in name:
                    p.copy_(torch.randn(p.shape, generator=generator) * scale)

    def tensors(self, k: int) -> dict[str, nn.Parameter]:
        """The adapter of expert k by the names under which peft saves it."""
        return adapter_tensors(self._peft[0], self._names[k])

    # ------------------------------------------------------------------------------------------------- likelihoods

    def _lower(self, input_ids: Tensor, mask: Tensor) -> Float[Tensor, "rows columns hidden"]:
        """What enters the first adapted block."""
        found: list[Tensor] = []

        def stop(_: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
            found.append(args[0] if args else options["hidden_states"])
            raise _Enough

        handle = block_list(self._model)[1][self.blocks[0]].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            with torch.no_grad():
                self._model.base_model(input_ids=input_ids, attention_mask=mask, use_cache=False)
        except _Enough:
            return found[0]
        finally:
            handle.remove()
        raise AssertionError("the blocks of this model do not run in their order")

    def constants(self, texts: TextFeatures) -> AdapterConstants:
        """Tokens, reference log-probabilities and (with keep_lower) the lower blocks' output, from the cache."""
        base = self._base
        ids = [tokenise(base, text) for text in texts.texts]
        offsets = np.concatenate([[0], np.cumsum([len(a) + len(b) for a, b in ids])])
        ref = reference_logps(base, texts)
        if not self.keep_lower or self.blocks[0] == 0:
            return AdapterConstants(ids, ref, None, offsets)

        def build(folder: Path) -> None:
            out = np.lib.format.open_memmap(
                folder / "lower.npy", mode="w+", dtype=np.float32, shape=(int(offsets[-1]), base.hidden_size)
            )
            order = sorted(range(len(ids)), key=lambda i: -len(ids[i][0]) - len(ids[i][1]))
            for start in range(0, len(order), 48):
                rows = order[start : start + 48]
                inputs = _padded([ids[i] for i in rows])
                states = self._lower(inputs["input_ids"].to(base.device), inputs["attention_mask"].to(base.device))
                for state, i in zip(states.float().cpu().numpy(), rows, strict=True):
                    out[offsets[i] : offsets[i + 1]] = state[: offsets[i + 1] - offsets[i]]
                progress("lower blocks", start + len(rows), len(order), "texts")
            out.flush()

        folder = cached("lower", VERSION, {"block": self.blocks[0]}, build, inputs=[texts.key])
        return AdapterConstants(ids, ref, np.load(folder / "lower.npy", mmap_mode="r", allow_pickle=False), offsets)

    def batch(
        self, texts: TextFeatures, constants: AdapterConstants, pairs: Int[Tensor, "pairs 2"]
    ) -> dict[str, Tensor]:
        """Everything `logps` reads for these pairs; each distinct text is held once."""
        ids, place = torch.unique(pairs, return_inverse=True)
        own = [constants.ids[int(i)] for i in ids]
        batch = _padded(own) | {"place": place, "text_ref_logps": torch.from_numpy(constants.ref)[ids][:, None]}
        if constants.lower is not None:
            lower = torch.zeros(*batch["input_ids"].shape, self._base.hidden_size)
            for row, i in enumerate(ids.tolist()):
                a, b = constants.offsets[i], constants.offsets[i + 1]
                lower[row, : b - a] = torch.from_numpy(np.array(constants.lower[a:b]))
            batch["lower"] = lower
        return batch

    def text_logps(
        self, batch: dict[str, Tensor], chosen: Bool[Tensor, "texts experts"] | None = None
    ) -> Float[Tensor, "texts experts"]:
        """See `Experts.text_logps`. The lower blocks run once for all experts, or not at all where they are kept."""
        lower = batch.get("lower")
        if lower is None and self.blocks[0] > 0:
            lower = self._lower(batch["input_ids"], batch["attention_mask"])

        def speak(k: int, rows: Tensor | None) -> Tensor:
            self._speaks_as(k)
            self._kept = None if lower is None else (lower if rows is None else lower[rows]).to(self._base.model.dtype)
            try:
                return _response_logps(self._base, self._model, batch, rows, len(batch["input_ids"]))
            finally:
                self._kept = None

        return _by_expert(speak, self.n_experts, batch, chosen)

    def voices(self, chosen: Bool[Tensor, "rows experts"] | None) -> Voices:
        """See `Experts.voices`: each expert that some row chose reads its rows with a cache of its own."""

        def speaker(k: int) -> Callable[[], Any]:
            def model() -> Any:
                self._speaks_as(k)
                return self._model

            return model

        return ModelVoices([self._base] * self.n_experts, [speaker(k) for k in range(self.n_experts)], chosen)


def _by_expert(
    speak: Callable[[int, Tensor | None], Tensor], n_experts: int, batch: dict[str, Tensor],
    chosen: Bool[Tensor, "texts experts"] | None,
) -> Float[Tensor, "texts experts"]:  # fmt: skip
    """One column an expert; what was not chosen is -inf and costs nothing."""
    if chosen is None or bool(chosen.all()):
        return torch.stack([speak(k, None) for k in range(n_experts)], 1)
    columns = []
    for k in range(n_experts):
        rows = chosen[:, k].nonzero().squeeze(1)
        column = torch.full((len(chosen),), -torch.inf, device=batch["text_ref_logps"].device)
        columns.append(column.index_copy(0, rows, speak(k, rows)) if len(rows) else column)
    return torch.stack(columns, 1)


class IndependentExperts(Experts):
    """K whole models, each trained in all its parameters and with a reference of its own, which may differ.

    Expert k starts as a copy of `bases[k]`, which stays frozen as its reference. A gate of prompts reads the states of
    one of them, the encoder.

    Parameters
    ----------
    bases : one `Base` an expert; the same one may stand several times. Tokenizers may differ: each expert reads texts
        in its own tokens (the posterior-weighted token form then has no meaning, and is refused).
    encoder : which of them gates and features read; 0 by default.

    Raises
    ------
    MixDPOError : less free memory than the weights of K models need (what is needed is named); `fit` asks for what
        training needs besides.
    """

    def __init__(self, bases: Sequence[Base], encoder: int = 0) -> None:
        if not bases or not 0 <= encoder < len(bases):
            raise ValueError(f"{len(bases)} bases, encoder={encoder}: expected at least one, and an encoder among them")
        super().__init__(bases[encoder], len(bases))
        size = sum(p.numel() for base in bases for p in base.model.parameters())
        what = f"{len(bases)} models of {size / 1e6:.1f} M parameters together"
        need_memory(4 * size, what, bases[0].device)
        self.bases, self.encoder, self._kinds = list(bases), encoder, _kinds(bases)
        self._models = [copy.deepcopy(base.model).requires_grad_(True).eval() for base in bases]
        named = {f"{k}.{n}": p for k, model in enumerate(self._models) for n, p in model.named_parameters()}
        self.models = _registered(named)

    def options(self) -> dict[str, Any]:
        """What makes equal experts but for their parameters."""
        return {"family": "IndependentExperts", "n_experts": self.n_experts, "encoder": self.encoder,
                "bases": [base.name for base in self.bases],
                "fingerprints": [base.fingerprint for base in self.bases]}  # fmt: skip

    def model(self, k: int) -> Any:
        """The model of expert k (transformers)."""
        return self._models[k]

    def perturb(self, scale: float, generator: torch.Generator) -> None:
        """Symmetry breaking "random_heads": N(0, scale^2) is added to each expert's last normalisation weights."""
        with torch.no_grad():
            for model in self._models:
                last = [p for p in model.base_model.parameters() if p.dim() == 1][-1]
                last.add_(torch.randn(last.shape, generator=generator) * scale)

    def constants(self, texts: TextFeatures) -> tuple[list[list[tuple[list[int], list[int]]]], np.ndarray]:
        """For each expert the token ids of every text; (texts, K) the log-probabilities of its reference, nats."""
        ids: list[list[tuple[list[int], list[int]]]] = []
        ref = np.empty((len(texts), self.n_experts), np.float32)
        for k, kind in enumerate(self._kinds):
            if kind < k:
                ids.append(ids[kind])
                ref[:, k] = ref[:, kind]
                continue
            base = self.bases[k]
            ids.append([tokenise(base, text) for text in texts.texts])
            same = base.fingerprint == self._base.fingerprint
            ref[:, k] = reference_logps(base, texts) if same else _plain_logps(base, texts, ids[k])
        return ids, ref

    def batch(self, texts: TextFeatures, constants: Any, pairs: Int[Tensor, "pairs 2"]) -> dict[str, Tensor]:
        """Everything `logps` reads for these pairs; each distinct text is held once a tokenizer."""
        tokens, ref = constants
        ids, place = torch.unique(pairs, return_inverse=True)
        batch = {"place": place, "text_ref_logps": torch.from_numpy(ref)[ids]}
        for kind in set(self._kinds):
            own = _padded([tokens[kind][int(i)] for i in ids])
            batch |= {f"{name}_{kind}": value for name, value in own.items()}
        return batch

    def text_logps(
        self, batch: dict[str, Tensor], chosen: Bool[Tensor, "texts experts"] | None = None
    ) -> Float[Tensor, "texts experts"]:
        """See `Experts.text_logps`."""

        def speak(k: int, rows: Tensor | None) -> Tensor:
            names = ("input_ids", "attention_mask", "column", "target", "segment")
            inputs = {name: batch[f"{name}_{self._kinds[k]}"] for name in names}
            return _response_logps(self.bases[k], self._models[k], inputs, rows, len(inputs["input_ids"]))

        return _by_expert(speak, self.n_experts, batch, chosen)

    def voices(self, chosen: Bool[Tensor, "rows experts"] | None) -> Voices:
        """See `Experts.voices`. Experts read token ids of the encoder: generation needs one tokenizer for all."""
        tokenizers = {base.tokenizer_fingerprint for base in self.bases}
        if len(tokenizers) > 1:
            raise ValueError("the experts' tokenizers differ: they score each other's texts, but cannot speak in one "
                             "batch; use policy.experts.model(k).generate")  # fmt: skip
        return ModelVoices(self.bases, [lambda k=k: self._models[k] for k in range(self.n_experts)], chosen)  # type: ignore[misc]


@torch.no_grad()
def _plain_logps(base: Base, texts: TextFeatures, ids: list[tuple[list[int], list[int]]]) -> np.ndarray:
    """log pi_ref of texts under a base whose features are not at hand, nats; kept in the cache."""
    digest = hashlib.sha256(repr(ids).encode()).hexdigest()

    def build(folder: Path) -> None:
        out = []
        for start in range(0, len(ids), 32):
            inputs = {n: v.to(base.device) for n, v in _padded(ids[start : start + 32]).items()}
            out.append(_response_logps(base, base.model, inputs, None, 0).float().cpu())
            progress("reference", min(start + 32, len(ids)), len(ids), "texts")
        np.save(folder / "logps.npy", torch.cat(out).numpy(), allow_pickle=False)

    folder = cached("reference", VERSION, {"base": base.fingerprint, "ids": digest}, build)
    return np.load(folder / "logps.npy", allow_pickle=False)


class ModelVoices(Voices):
    """Next-token logits of experts that are models: each reads the rows that chose it, with a cache of its own.

    The reference of a row is that of the first expert it chose (of the first base, where it chose none).
    """

    def __init__(
        self, bases: Sequence[Base], models: Sequence[Callable[[], Any]], chosen: Bool[Tensor, "rows experts"] | None
    ) -> None:
        self._bases, self._models = bases, models
        self._rows: dict[tuple[str, int], Tensor] = {}  # of each that speaks: ("reference" or "expert", its number)
        if chosen is not None:
            kind = torch.tensor(_kinds(bases), device=chosen.device)[chosen.int().argmax(1)]
            self._rows = {("reference", k): (kind == k).nonzero().squeeze(1) for k in kind.unique().tolist()}
            experts = {("expert", k): chosen[:, k].nonzero().squeeze(1) for k in range(len(bases))}
            self._rows |= {name: rows for name, rows in experts.items() if len(rows)}
        self._caches: dict[tuple[str, int], Any] = {}

    def reorder(self, source: Int[Tensor, "rows"]) -> None:
        """See `Voices.reorder`."""
        for name, cache in self._caches.items():
            rows = self._rows[name]
            cache.reorder_cache(place_of(rows, len(source))[source[rows]])

    def __call__(self, input_ids: Tensor, mask: Tensor) -> tuple[Tensor, list[tuple[int, Tensor, Tensor]]]:
        if not self._rows:
            self._rows = {("reference", 0): torch.arange(len(input_ids), device=input_ids.device)}
        refs: Tensor | None = None
        said = []
        for name, rows in self._rows.items():
            what, k = name
            base = self._bases[k]
            model = base.model if what == "reference" else self._models[k]()
            hidden, self._caches[name] = read_on(model, input_ids[rows], mask[rows], self._caches.get(name))
            logits = head_logits(base, hidden, model)
            if what == "expert":
                said.append((k, rows, logits))
            else:
                refs = logits.new_empty(len(input_ids), logits.shape[1]) if refs is None else refs
                refs[rows] = logits
        assert refs is not None
        return refs, said
