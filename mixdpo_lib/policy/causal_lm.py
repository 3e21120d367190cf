"""How does a mixture speak through `transformers`? As a causal language model whose `generate` knows every option."""

from __future__ import annotations

import copy
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..experts.contract import Experts
from .next_token import MixtureNextToken


class MixtureForCausalLM(PreTrainedModel, GenerationMixin):
    """The mixture's next-token distribution, p(v given y_<t) = sum_k q_k(y_<t) p_k(v given y_<t), for `generate`.

    See `next_token.MixtureNextToken`. Sampling, greedy, beams and streamers work as for any model; temperature, top_k and
    top_p then act on the mixture (in `MixturePolicy.generate` on each expert). Made by `MixturePolicy.as_causal_lm`.

    Parameters
    ----------
    log_w : (1 or prompts, K), nats: weights of all prompts, or of each prompt of the calls to come.
    """

    main_input_name = "input_ids"
    _is_stateful = True

    def __init__(self, experts: Experts, log_w: Float[Tensor, "prompts experts"]) -> None:
        base = experts.base[0]
        config = copy.deepcopy(base.model.config)
        # this class has no attention of its own
        config._attn_implementation = "eager"  # noqa: SLF001
        super().__init__(config)
        self._experts, self._log_w = [experts], log_w
        ends = list(base.end_ids)
        pad = base.tokenizer.pad_token_id
        self.generation_config = GenerationConfig(
            eos_token_id=ends, pad_token_id=ends[0] if pad is None else pad
        )
        self._step: MixtureNextToken | None = None
        self._read = torch.zeros(0, 0, dtype=torch.long)
        self._anchor = torch.nn.Parameter(torch.zeros((), device=base.device), requires_grad=False)

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> dict[str, Any]:
        """Whole sequences: what is new in them is found by `forward`."""
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    @torch.no_grad()
    def generate(self, *args: Any, **options: Any) -> Any:
        """As `transformers`; each call starts anew."""
        self._step = None
        return super().generate(*args, **{**options, "use_cache": False})  # type: ignore[misc]

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> CausalLMOutputWithPast:
        """log p(v given the tokens so far), nats, (rows, 1, vocabulary), of sequences that grow by a token a call.

        Rows may come in another order than before (beams): each goes on from the row of the same prompt whose tokens it
        extends.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        rows, n = input_ids.shape
        if rows % len(self._log_w):
            raise ValueError(
                f"{rows} sequences for the weights of {len(self._log_w)} prompts: give each its own"
            )
        log_w = self._log_w.repeat_interleave(rows // len(self._log_w), 0)
        if self._step is None or self._read.shape != (rows, n - 1):
            self._step = MixtureNextToken(self._experts[0], log_w)
            log_p = self._step(input_ids, mask)
        else:
            prompt = torch.arange(rows) // (rows // len(self._log_w))
            same = (input_ids[:, None, :-1] == self._read[None]).all(2).cpu() & (
                prompt[:, None] == prompt[None]
            )
            if not bool(same.any(1).all()):
                raise ValueError(
                    "a sequence extends none of the call before: generate grows them by a token a call"
                )
            self._step.reorder(same.int().argmax(1))
            self._step.observe(input_ids[:, -1])
            log_p = self._step(input_ids[:, -1:], mask)
        self._read = input_ids.clone()
        return CausalLMOutputWithPast(logits=log_p[:, None].float())
