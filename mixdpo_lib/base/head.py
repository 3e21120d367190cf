"""What does the base's head say of every position?"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..store import MixDPOError, cached, progress
from .features import TextFeatures
from .model import Base

VERSION = 1


def logit_map(config: Any) -> Callable[[Tensor], Tensor] | None:
    """What a model does to its head's output: a factor (Cohere, Granite), then soft-capping (Gemma); None: nothing.

    c tanh(z / c) keeps every logit between -c and c (Gemma 2, arXiv 2408.00118).
    """
    factor = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    if factor == 1.0 and cap is None:
        return None
    return lambda z: factor * z if cap is None else cap * torch.tanh(factor * z / cap)


def head_logits(base: Base, hidden: Float[Tensor, "rows hidden"], model: Any = None) -> Float[Tensor, "rows tokens"]:
    """Logits of last hidden states by the head of `model` (that of the base by default), float32; gradients flow."""
    logits = (base.model if model is None else model).get_output_embeddings()(hidden).float()
    mapped = logit_map(base.model.config.get_text_config())
    return logits if mapped is None else mapped(logits)


@torch.no_grad()
def check_head(base: Base) -> None:
    """Refuse a model whose logits are not its head on the last hidden state, scaled and capped as `logit_map` knows.

    Raises
    ------
    MixDPOError : the largest difference is named.
    """
    ids = torch.arange(4, device=base.device)[None] % base.vocab_size
    out = base.model(input_ids=ids, use_cache=False)
    hidden = base.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    error = float((out.logits[0].float() - head_logits(base, hidden[0])).abs().max())
    if not error <= 1e-3 * max(1.0, float(out.logits.abs().max())):
        raise MixDPOError(f"base {base.name}: its logits differ by {error:.3g} from its head on the last hidden state: "
                          "this architecture does more there; use IndependentExperts")  # fmt: skip


@dataclass(frozen=True)
class HeadConstants:
    """What the frozen head says about every position, whatever the experts are: computed once, kept on disk.

    token_logit : (positions,) float32, logit of the response token under the base.
    lse : (positions,) float32, logsumexp of the base's logits over the whole vocabulary.
    lse_inactive : (positions,) float32, the same over the tokens outside the active set; -inf where all are active.
    """

    token_logit: np.ndarray
    lse: np.ndarray
    lse_inactive: np.ndarray


def reference_constants(base: Base, texts: TextFeatures, active: np.ndarray, block: int = 2048) -> HeadConstants:
    """The frozen head's constants for every position of `texts`, for this set of active tokens, from the cache.

    What an empty set gives is all that the reference needs: `lse_inactive` is then not filled (-inf).
    """
    digest = hashlib.sha256(active.tobytes()).hexdigest()
    rows = base.model.get_output_embeddings().weight.shape[0]
    inactive = np.setdiff1d(np.arange(rows), active) if len(active) else active

    def build(folder: Path) -> None:
        n = len(texts.tokens)
        out = np.empty((3, n), dtype=np.float32)
        inactive_ids = torch.from_numpy(inactive)
        for start in range(0, n, block):
            stop = min(start + block, n)
            hidden = torch.from_numpy(np.array(texts.hidden[start:stop])).to(base.device, base.model.dtype)
            with torch.inference_mode():
                logits = head_logits(base, hidden).cpu()
                tokens = torch.from_numpy(texts.tokens[start:stop])
                out[0, start:stop] = logits.gather(1, tokens[:, None]).squeeze(1)
                out[1, start:stop] = logits.logsumexp(1)
                out[2, start:stop] = logits.index_select(1, inactive_ids).logsumexp(1) if len(inactive) else -np.inf
            progress("head constants", stop, n, "positions")
        np.save(folder / "constants.npy", out, allow_pickle=False)

    folder = cached("head", VERSION, {"active": digest}, build, inputs=[texts.key])
    return HeadConstants(*np.load(folder / "constants.npy", allow_pickle=False))


def reference_logps(base: Base, texts: TextFeatures) -> np.ndarray:
    """log pi_ref of every text under the frozen base, nats, (texts,) float32."""
    constants = reference_constants(base, texts, np.zeros(0, dtype=np.int64))
    sums = np.concatenate([[0.0], np.cumsum((constants.token_logit - constants.lse).astype(np.float64))])
    return (sums[texts.offsets[1:]] - sums[texts.offsets[:-1]]).astype(np.float32)
