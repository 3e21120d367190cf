"""Weights that read the prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..elbo import check_n_experts
from .contract import given, log_normal, positive, standardise, zero_linear


class ContextGate(nn.Module):
    """Reads the prompt: ``log_w = log_softmax(f(x) / gate_temperature)``, x the pooled hidden state of the prompt.

    For ``latent="pair"``: prompts differ inside a unit.  Trained by gradient on :func:`gate_loss` with the
    responsibilities as targets.  The output layer starts at 0, where every weight is 1/K.

    Parameters
    ----------
    n_features : size of the pooled hidden state, for example ``base.hidden_size``.
    n_experts : K >= 1.
    width : hidden units of a small MLP (tanh); 0, the default, is a linear gate.
    gate_temperature : > 0; above 1 evens the weights out, below 1 sharpens them.  1 while it is trained.
    mean, scale : (n_features,) of the training prompts, see :func:`standardise`; part of the saved gate.
    pooling : which half of the state is read: "mean" (the first half of the features), "last" (the second), or "both".
        `features.prompt_states` holds the mean over the prompt's tokens and the last token's state side by side.
    suffix : text that is put after a prompt before the base reads it for the gate, "" for none. A question about the
        prompt makes the last token's state an answer to it (Jiang et al. 2023, arXiv 2307.16645).
    layer : the state after so many of the base's blocks is read; None, the default: the last hidden state. The last
        blocks turn what a prompt is about into its next token, so that a state a few blocks below may say more.
    weight_scale : > 0, nats for each standard deviation of a feature: the weights have the prior N(0, weight_scale^2).
        A pooled state has hundreds of numbers and a study hundreds of prompts: without a prior the gate learns them by
        heart.

    Raises
    ------
    ValueError : a size below its range, gate_temperature or weight_scale not above 0, a scale that is not above 0.

    >>> ContextGate(n_features=3, n_experts=2)({"context": torch.ones(1, 3)}).exp()
    tensor([[0.5000, 0.5000]], grad_fn=<ExpBackward0>)
    """

    reads: tuple[str, ...] = ("context",)
    mean: Tensor
    scale: Tensor

    @classmethod
    def from_states(cls, states: Float[Tensor, "rows features"], n_experts: int, **options: Any) -> "ContextGate":
        """A gate that standardises by these training prompts, one row each (see `features.prompt_states`).

        Raises
        ------
        ValueError : a value that is not finite; prompts that are all the same.
        """
        states = given({"context": states}, "context", states.shape[-1])
        if not bool((states.std(0, correction=0) > 1e-6).any()):
            raise ValueError(
                f"context: all {len(states)} prompts have the same pooled state: a gate can learn nothing from it; "
                "use LearnedWeights, or give prompts that differ"
            )
        mean, scale = standardise(states)
        return cls(states.shape[1], n_experts, mean=mean, scale=scale, **options)

    def __init__(
        self, n_features: int, n_experts: int, width: int = 0, gate_temperature: float | int = 1.0,
        mean: Tensor | None = None, scale: Tensor | None = None, pooling: str = "both",
        weight_scale: float | int = 0.1, suffix: str = "", layer: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        check_n_experts(n_experts)
        self.weight_scale, self.suffix, self.layer = positive("weight_scale", weight_scale), suffix, layer
        if pooling not in ("mean", "last", "both") or (pooling != "both" and n_features % 2):
            raise ValueError(
                f"pooling={pooling!r} with n_features={n_features}: possible are 'mean', 'last' (of states with two "
                "halves) and 'both'"
            )
        self.pooling = pooling
        half = n_features // 2
        self.part = {"mean": slice(0, half), "last": slice(half, None), "both": slice(None)}[pooling]
        n_read = n_features if pooling == "both" else half
        if n_features < 1 or width < 0:
            raise ValueError(f"n_features={n_features}, width={width}: expected at least 1 feature and a width >= 0")
        self.n_experts, self.gate_temperature = n_experts, positive("gate_temperature", gate_temperature)
        self.register_buffer("mean", torch.zeros(n_features) if mean is None else mean.float())
        self.register_buffer("scale", torch.ones(n_features) if scale is None else scale.float())
        if not (self.scale > 0).all():
            raise ValueError("scale: expected every entry above 0; `standardise` gives 1 where nothing varies")
        self.inner = nn.Linear(n_read, width) if width else None
        self.outer = zero_linear(width or n_read, n_experts)

    def options(self) -> dict[str, Any]:
        """What makes an equal gate but for its parameters, see :func:`make_gate`."""
        width = self.inner.out_features if self.inner is not None else 0
        return {"gate": "ContextGate", "n_features": self.mean.shape[0], "n_experts": self.n_experts, "width": width,
                "gate_temperature": self.gate_temperature, "pooling": self.pooling, "suffix": self.suffix,
                "layer": self.layer, "weight_scale": self.weight_scale}  # fmt: skip

    def log_prior(self) -> Float[Tensor, ""]:
        """Log density of the weights under their prior, without its constant and without the biases; nats."""
        layers = [self.outer] if self.inner is None else [self.inner, self.outer]
        return log_normal([layer.weight for layer in layers], self.weight_scale)

    def logits(self, batch: Mapping[str, Tensor]) -> Float[Tensor, "rows experts"]:
        """Before the softmax; gradients flow."""
        x = ((given(batch, "context", self.mean.shape[0]) - self.mean) / self.scale)[:, self.part]
        return self.outer(x if self.inner is None else torch.tanh(self.inner(x)))

    def forward(self, batch: Mapping[str, Tensor]) -> Float[Tensor, "rows experts"]:
        """log_w of every row, nats, from ``batch["context"]`` (rows, n_features); gradients flow."""
        return (self.logits(batch) / self.gate_temperature).log_softmax(-1)
