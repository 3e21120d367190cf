"""Weights that read the prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..base.features import encode_prompts
from ..base.model import Base
from ..data.messages import Prompt, as_prompt
from .contract import Gate
from .inputs import column, given, log_normal, positive, standardise, zero_linear


def _with(suffix: str, prompt: Any) -> Prompt:
    """A prompt with the suffix at its end; of a conversation at the end of the last message."""
    prompt = as_prompt(prompt)
    if isinstance(prompt, str):
        return prompt + suffix
    *earlier, (role, content) = prompt
    return (*earlier, (role, content + suffix))


class ContextGate(Gate):
    """Reads the prompt: ``log_w = log_softmax(W x + b)``, x the standardised state of the prompt's last token.

    For ``latent="pair"``: prompts differ inside a unit.  Moved by its M-step towards the responsibilities
    (`m_step.gate_loss`).  The weights start at 0, where every expert has weight 1/K.

    Parameters
    ----------
    n_features : size of the state: ``base.hidden_size``.
    n_experts : K >= 1.
    mean, scale : (n_features,) of the training prompts, see `inputs.standardise`; part of the saved gate.
    weight_scale : > 0, nats for each standard deviation of a feature: the weights have the prior N(0, weight_scale^2).
        A state has hundreds of numbers and a study hundreds of prompts: without a prior the gate learns them by heart.
    suffix : text that is put after a prompt before the base reads it for the gate, "" for none. A question about the
        prompt makes the last token's state an answer to it (Jiang et al. 2023, arXiv 2307.16645).
    layer : the state after so many of the base's blocks is read; None, the default: the last hidden state. The last
        blocks turn what a prompt is about into its next token, so that a state a few blocks below may say more.
    column : the column of the data that is read; "prompt" by default.

    Raises
    ------
    ValueError : no features, weight_scale not above 0, a scale that is not above 0.

    >>> ContextGate(n_features=3, n_experts=2).log_w({"state": torch.ones(1, 3)}).exp()
    tensor([[0.5000, 0.5000]], grad_fn=<ExpBackward0>)
    """

    mean: Tensor
    scale: Tensor

    def __init__(
        self,
        n_features: int,
        n_experts: int,
        mean: Tensor | None = None,
        scale: Tensor | None = None,
        weight_scale: float | int = 0.1,
        suffix: str = "",
        layer: int | None = None,
        column: str = "prompt",
    ) -> None:
        super().__init__(n_experts, reads=(column,), of_prompt=(column,))
        if n_features < 1:
            raise ValueError(f"n_features={n_features}: expected at least 1, the size of the state")
        self.weight_scale = positive("weight_scale", weight_scale)
        self.suffix, self.layer, self.column = suffix, layer, column
        self.register_buffer("mean", torch.zeros(n_features) if mean is None else mean.float())
        self.register_buffer("scale", torch.ones(n_features) if scale is None else scale.float())
        if not (self.scale > 0).all():
            raise ValueError(
                "scale: expected every entry above 0; `standardise` gives 1 where nothing varies"
            )
        self.outer = zero_linear(n_features, n_experts)

    @classmethod
    def from_prompts(
        cls,
        base: Base,
        prompts: Sequence[Any],
        n_experts: int,
        suffix: str = "",
        layer: int | None = None,
        **options: Any,
    ) -> ContextGate:
        """A gate that standardises by the states of these training prompts. options : weight_scale, column.

        Raises
        ------
        ValueError : prompts that are all the same; see `features.encode_prompts`.
        """
        states = encode_prompts(base, [_with(suffix, prompt) for prompt in prompts], layer)
        return cls.from_states(states, n_experts, suffix=suffix, layer=layer, **options)

    @classmethod
    def from_states(
        cls, states: Float[Tensor, "rows features"], n_experts: int, **options: Any
    ) -> ContextGate:
        """A gate that standardises by these states of training prompts, one row each (`features.encode_prompts`).

        Raises
        ------
        ValueError : a value that is not finite; prompts that are all the same.
        """
        states = given({"state": states}, "state", states.shape[-1])
        if not bool((states.std(0, correction=0) > 1e-6).any()):
            raise ValueError(
                f"all {len(states)} prompts have the same state: a gate can learn nothing from it; "
                "use LearnedWeights, or give prompts that differ"
            )
        mean, scale = standardise(states)
        return cls(states.shape[1], n_experts, mean=mean, scale=scale, **options)

    def options(self) -> dict[str, Any]:
        """What makes an equal gate but for what is learned."""
        names = ("n_experts", "weight_scale", "suffix", "layer", "column")
        return {"n_features": len(self.mean), **{name: getattr(self, name) for name in names}}

    def inputs(self, columns: Mapping[str, Sequence[Any]], base: Base | None) -> dict[str, Tensor]:
        """The state of each row's prompt; a prompt that occurs in several rows is read once."""
        prompts = [_with(self.suffix, prompt) for prompt in column(columns, self.column)]
        if base is None:
            raise ValueError(
                "a gate that reads prompts needs a base to read them with: give experts of a base"
            )
        return {"state": encode_prompts(base, prompts, self.layer)}

    def logits(self, inputs: Mapping[str, Tensor]) -> Float[Tensor, "rows experts"]:
        """Before the softmax; gradients flow."""
        return self.outer((given(inputs, "state", len(self.mean)) - self.mean) / self.scale)

    def log_prior(self) -> Float[Tensor, ""]:
        """Log density of the weights under their prior, without its constant and without the biases; nats."""
        return log_normal([self.outer.weight], self.weight_scale)
