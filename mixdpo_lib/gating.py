"""Who answers this prompt, for this user?  Gates: all of them give ``log_w``, and none knows an expert.

Gates of Mix-DPO do not depend on the input: :class:`FixedWeights` are given, :class:`LearnedWeights` learned from the
responsibilities.  Gates of MoE-DPO read the prompt (:class:`ContextGate`), what is known of the user
(:class:`UserGate`), or both (:class:`MixedMembershipGate`).  A gate is a module whose ``forward(batch)`` returns
log-weights in nats that broadcast to the batch; for an input-free gate they are (K,), the same as its attribute
``log_w``.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mixdpo_lib.elbo import _keep_largest, check_log_w, entropy

__all__ = [
    "ContextGate", "FixedWeights", "LearnedWeights", "MixedMembershipGate", "UserGate", "distinct_rows", "gate_loss",
    "given_gate", "make_gate", "standardise", "top_s",
]  # fmt: skip

NORMALISED_TOLERANCE = 1e-5  # how far given weights may be from a total of 1


def top_s(log_w: Float[Tensor, "*rows experts"], s: int) -> Float[Tensor, "*rows experts"]:
    """Keep the S largest weights of each row and set the others to ``-inf``, **without** renormalising.

    Not renormalised, the likelihood of the kept experts is a lower bound of the whole one in every row; renormalised
    it is none.  Among equal weights the lower index is kept, so the kept sets are nested in S.

    Parameters
    ----------
    log_w : (..., K), nats.
    s : 1 ... K.

    Returns
    -------
    The shape of log_w, nats.  Gradients flow to the kept weights.

    Raises
    ------
    ValueError : s below 1 or above the number of experts.

    >>> top_s(torch.tensor([.2, .5, .3]).log(), 2).exp()
    tensor([0.0000, 0.5000, 0.3000])
    """
    return _keep_largest(log_w, s)


def check_n_experts(n_experts: int) -> None:
    """Refuse a mixture without an expert."""
    if n_experts < 1:
        raise ValueError(f"n_experts={n_experts}: a mixture needs at least one expert; use 1 for plain DPO")


class FixedWeights(nn.Module):
    """Weights that are given and stay as they are: ``w_k`` does not depend on the input and is not learned.

    Parameters
    ----------
    weights : (K,), >= 0, total 1; a weight of 0 leaves an expert out.  Sequence or tensor.
    log_w : (K,), nats: the same in the log domain.  Give one of the two.

    Raises
    ------
    ValueError : neither or both given; no weights; a negative weight; a total that is not 1.

    >>> FixedWeights([0.25, 0.75])().exp()
    tensor([0.2500, 0.7500])
    >>> FixedWeights.uniform(2).n_experts
    2
    """

    log_w: Tensor

    def __init__(self, weights: Sequence[float | int] | Tensor | None = None, *, log_w: Tensor | None = None) -> None:
        super().__init__()
        if (weights is None) == (log_w is None):
            raise ValueError("FixedWeights: give weights or log_w, exactly one of the two")
        if log_w is None:
            given = torch.as_tensor(weights)
            given = given if given.dtype == torch.float64 else given.float()
            if given.dim() != 1:
                raise ValueError(f"weights has shape {tuple(given.shape)}; expected (experts,)")
            check_n_experts(len(given))
            if not (given >= 0).all():
                raise ValueError(f"weights={given.tolist()}: expected every weight to be 0 or above")
            log_w = given.log()
        if log_w.dim() != 1:
            raise ValueError(f"log_w has shape {tuple(log_w.shape)}; expected (experts,)")
        check_n_experts(len(log_w))
        log_w = log_w.detach().clone()
        total = float(log_w.exp().sum())
        if not abs(total - 1) <= NORMALISED_TOLERANCE:
            raise ValueError(f"weights sum to {total:.6g}, expected 1; divide them by their total")
        self.register_buffer("log_w", check_log_w(log_w))

    reads: tuple[str, ...] = ()

    def options(self) -> dict[str, Any]:
        """What makes an equal gate but for its weights, see :func:`make_gate`."""
        return {"gate": "FixedWeights", "n_experts": self.n_experts}

    @classmethod
    def uniform(cls, n_experts: int) -> "FixedWeights":
        """Equal weights for ``n_experts`` experts."""
        check_n_experts(n_experts)
        return cls(torch.full((n_experts,), 1.0 / n_experts, dtype=torch.float64).float())

    @property
    def n_experts(self) -> int:
        return self.log_w.shape[0]

    def forward(self, batch: Any = None) -> Float[Tensor, "experts"]:
        """(K,), nats; the batch is not read."""
        return self.log_w


class LearnedWeights(nn.Module):
    """One set of weights for all inputs, learned as the mean responsibility over units, with a Dirichlet prior.

    M-step: ``m_k = (U mean_u q_uk + alpha - 1) / (U + K (alpha - 1))``, the mode of the posterior under a symmetric
    Dirichlet of concentration alpha; stochastic form ``w <- (1 - rho) w + rho m``.  Source: derived in docs/method.md,
    tested in tests/test_gating.py.  Starts uniform.  Not trained by gradient: ``log_w`` is a buffer.

    Parameters
    ----------
    n_experts : K >= 1; 1 is plain DPO.
    alpha : >= 1, default 1.1: a tenth of a unit is added to each expert, enough to keep a weight from reaching 0 and
        too little to move weights that many units speak for.  1 is maximum likelihood.

    Raises
    ------
    ValueError : n_experts below 1, alpha below 1.

    >>> gate = LearnedWeights(n_experts=2, alpha=2.0)
    >>> gate.update(torch.tensor([0.75, 0.25]), rho=1.0, n_units=8)   # (6 + 1) / 10, (2 + 1) / 10
    >>> gate().exp()
    tensor([0.7000, 0.3000])
    """

    log_w: Tensor

    def __init__(self, n_experts: int, alpha: float | int = 1.1) -> None:
        super().__init__()
        check_n_experts(n_experts)
        if not 1 <= alpha < math.inf:
            raise ValueError(f"alpha={alpha}: the Dirichlet concentration is at least 1; 1 is maximum likelihood")
        self.alpha = float(alpha)
        self.register_buffer("log_w", torch.full((n_experts,), -math.log(n_experts)))

    reads: tuple[str, ...] = ()

    def options(self) -> dict[str, Any]:
        """What makes an equal gate but for its weights, see :func:`make_gate`."""
        return {"gate": "LearnedWeights", "n_experts": self.n_experts, "alpha": self.alpha}

    @property
    def n_experts(self) -> int:
        return self.log_w.shape[0]

    def forward(self, batch: Any = None) -> Float[Tensor, "experts"]:
        """(K,), nats; the batch is not read, and no gradient flows."""
        return self.log_w

    @torch.no_grad()
    def update(
        self, mean_responsibility: Float[Tensor, "..."], rho: float | int = 1.0, *, n_units: float | int
    ) -> None:
        """Move the weights towards the mean responsibility.

        Parameters
        ----------
        mean_responsibility : (K,), probabilities: the mean of q over **units** (over pairs only where each pair has a
            latent of its own).
        rho : step in (0, 1]; 1 is the full M-step.  Stochastic EM wants ``sum rho = inf`` and ``sum rho^2 < inf``.
        n_units : how many units the training data holds: they are weighed against the prior.  For a mini-batch this
            is still the number in the whole data.

        Raises
        ------
        ValueError : another shape, no probabilities, rho outside (0, 1], n_units not above 0.
        """
        if mean_responsibility.shape != self.log_w.shape:
            raise ValueError(
                f"mean_responsibility has shape {tuple(mean_responsibility.shape)}; expected ({self.n_experts},)"
            )
        if not 0 < rho <= 1:
            raise ValueError(f"rho={rho}: expected above 0 and at most 1; 1 is the full M-step")
        if not 0 < n_units < math.inf:
            raise ValueError(f"n_units={n_units}: expected the number of units of the training data, above 0")
        q = mean_responsibility.to(self.log_w.device, torch.float64)
        if not (q >= 0).all() or not abs(float(q.sum()) - 1) <= 1e-3:
            raise ValueError(f"mean_responsibility={q.tolist()}: expected probabilities that sum to 1")
        prior = self.alpha - 1
        m = (n_units * q / q.sum() + prior) / (n_units + self.n_experts * prior)
        w = (1 - rho) * self.log_w.double().exp() + rho * m
        self.log_w.copy_((w / w.sum()).log())

    def log_prior(self) -> Float[Tensor, ""]:
        """Log density of the weights under the Dirichlet prior, without its constant: ``(alpha - 1) sum_k log w_k``.

        Nats.  The objective that full-batch EM with this gate never lowers is the log-likelihood plus this.
        """
        if self.alpha == 1:
            return self.log_w.new_zeros(())
        return (self.alpha - 1) * self.log_w.sum()


# ------------------------------------------------------------------------------------------------- gates that read


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
        states = _given({"context": states}, "context", states.shape[-1])
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
        self.weight_scale, self.suffix, self.layer = _positive("weight_scale", weight_scale), suffix, layer
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
        self.n_experts, self.gate_temperature = n_experts, _positive("gate_temperature", gate_temperature)
        self.register_buffer("mean", torch.zeros(n_features) if mean is None else mean.float())
        self.register_buffer("scale", torch.ones(n_features) if scale is None else scale.float())
        if not (self.scale > 0).all():
            raise ValueError("scale: expected every entry above 0; `standardise` gives 1 where nothing varies")
        self.inner = nn.Linear(n_read, width) if width else None
        self.outer = _zero_linear(width or n_read, n_experts)

    def options(self) -> dict[str, Any]:
        """What makes an equal gate but for its parameters, see :func:`make_gate`."""
        width = self.inner.out_features if self.inner is not None else 0
        return {"gate": "ContextGate", "n_features": self.mean.shape[0], "n_experts": self.n_experts, "width": width,
                "gate_temperature": self.gate_temperature, "pooling": self.pooling, "suffix": self.suffix,
                "layer": self.layer, "weight_scale": self.weight_scale}  # fmt: skip

    def log_prior(self) -> Float[Tensor, ""]:
        """Log density of the weights under their prior, without its constant and without the biases; nats."""
        layers = [self.outer] if self.inner is None else [self.inner, self.outer]
        return _log_normal([layer.weight for layer in layers], self.weight_scale)

    def logits(self, batch: Mapping[str, Tensor]) -> Float[Tensor, "rows experts"]:
        """Before the softmax; gradients flow."""
        x = ((_given(batch, "context", self.mean.shape[0]) - self.mean) / self.scale)[:, self.part]
        return self.outer(x if self.inner is None else torch.tanh(self.inner(x)))

    def forward(self, batch: Mapping[str, Tensor]) -> Float[Tensor, "rows experts"]:
        """log_w of every row, nats, from ``batch["context"]`` (rows, n_features); gradients flow."""
        return (self.logits(batch) / self.gate_temperature).log_softmax(-1)


class UserGate(nn.Module):
    """Reads what is known of the user: ``log_w = log_softmax(W m + b)``, m the encoded metadata of a row.

    Categories are one-hot, numbers are standardised.  A category that was not there when the gate was made is encoded
    as all zeros, so that only the other columns and the bias speak, with a warning that names it.

    Parameters
    ----------
    columns : by name, the categories of a categorical column (a list of text), or mean and standard deviation of a
        numeric one (a tuple).  :meth:`from_metadata` reads them off the training users.
    n_experts : K >= 1.
    gate_temperature : > 0, see :class:`ContextGate`.
    weight_scale : > 0, nats for a category, or for one standard deviation of a number: the prior N(0, weight_scale^2).

    Raises
    ------
    ValueError : no columns, n_experts below 1, gate_temperature or weight_scale not above 0.

    >>> gate = UserGate.from_metadata({"country": ["x", "y", "x"], "age": [20, 30, 40]}, n_experts=2)
    >>> gate.encode({"country": ["y"], "age": [30]})
    tensor([[0., 1., 0.]])
    """

    reads: tuple[str, ...] = ("metadata",)

    def __init__(
        self, columns: Mapping[str, list[str] | tuple[float, float]], n_experts: int,
        gate_temperature: float | int = 1.0, weight_scale: float | int = 1.0,
    ) -> None:  # fmt: skip
        super().__init__()
        check_n_experts(n_experts)
        self.weight_scale = _positive("weight_scale", weight_scale)
        if not columns:
            raise ValueError("columns: found none; a gate of users needs at least one column of metadata")
        self.columns, self.n_experts = dict(columns), n_experts
        self.gate_temperature = _positive("gate_temperature", gate_temperature)
        n_features = sum(len(kind) if isinstance(kind, list) else 1 for kind in self.columns.values())
        self.outer = _zero_linear(n_features, n_experts)

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Sequence[Any]], n_experts: int, **options: Any) -> "UserGate":
        """A gate for these columns: text and truth values are categorical, other numbers numeric.

        Raises
        ------
        ValueError : a missing or NaN value (row and column named); a column that is the same in every row, of which
            a gate can learn nothing.
        """
        columns: dict[str, list[str] | tuple[float, float]] = {}
        for name, values in metadata.items():
            _check_metadata(name, values)
            if len(set(values)) < 2:
                raise ValueError(
                    f"metadata column {name!r} is {values[0]!r} in every row: a gate can learn nothing from it; "
                    "leave it out"
                )
            if all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
                numbers = torch.tensor([float(v) for v in values], dtype=torch.float64)
                columns[name] = (float(numbers.mean()), float(numbers.std(correction=0)))
            else:
                columns[name] = sorted({str(v) for v in values})
        return cls(columns, n_experts, **options)

    def encode(self, metadata: Mapping[str, Sequence[Any]]) -> Float[Tensor, "rows features"]:
        """(rows, features) float32 of these users: what ``batch["metadata"]`` holds.

        Raises
        ------
        ValueError : a column that is absent; a missing or NaN value; text in a numeric column.
        """
        parts, n_rows = [], None
        for name, kind in self.columns.items():
            if name not in metadata:
                raise ValueError(
                    f"metadata column {name!r} is absent; found {list(metadata)}: the gate was trained with it, give it"
                )
            values = metadata[name]
            _check_metadata(name, values)
            if n_rows is not None and len(values) != n_rows:
                raise ValueError(f"metadata column {name!r} has {len(values)} rows, the ones before it {n_rows}")
            n_rows = len(values)
            if isinstance(kind, tuple):
                wrong = [i for i, v in enumerate(values) if not isinstance(v, (int, float))]
                if wrong:
                    raise ValueError(
                        f"metadata row {wrong[0]}, column {name!r}: found {values[wrong[0]]!r}, expected a number"
                    )
                parts.append(((torch.tensor([float(v) for v in values]) - kind[0]) / kind[1])[:, None])
            else:
                place = {category: i for i, category in enumerate(kind)}
                unseen = sorted({str(v) for v in values} - set(place))
                if unseen:
                    warnings.warn(
                        f"metadata column {name!r}: {unseen[:3]} were not among the training users' categories; "
                        "users with them are served by their other columns and the bias", stacklevel=2,
                    )  # fmt: skip
                one_hot = torch.zeros(len(values), len(kind))
                for row, value in enumerate(values):
                    if str(value) in place:
                        one_hot[row, place[str(value)]] = 1.0
                parts.append(one_hot)
        return torch.cat(parts, 1)

    def options(self) -> dict[str, Any]:
        """What makes an equal gate but for its parameters, see :func:`make_gate`."""
        return {"gate": "UserGate", "columns": self.columns, "n_experts": self.n_experts,
                "gate_temperature": self.gate_temperature, "weight_scale": self.weight_scale}  # fmt: skip

    def log_prior(self) -> Float[Tensor, ""]:
        """Log density of the weights under their prior, without its constant and without the bias; nats."""
        return _log_normal([self.outer.weight], self.weight_scale)

    def logits(self, batch: Mapping[str, Tensor]) -> Float[Tensor, "rows experts"]:
        """Before the softmax; gradients flow."""
        return self.outer(_given(batch, "metadata", self.outer.in_features))

    def forward(self, batch: Mapping[str, Tensor]) -> Float[Tensor, "rows experts"]:
        """log_w of every row, nats, from ``batch["metadata"]`` (see :meth:`encode`); gradients flow."""
        return (self.logits(batch) / self.gate_temperature).log_softmax(-1)


class MixedMembershipGate(nn.Module):
    """Prompt and user together: ``log_w = log_softmax((f(x) + W m_u + theta_u) / gate_temperature)``.

    For ``latent="pair"``: a user is a blend, each comparison draws its own expert.  theta_u is the user's own offset
    with the prior N(0, offset_scale^2); a user without pairs has the offset 0, the prior's mode.

    Parameters
    ----------
    gates : one or two of :class:`ContextGate` and :class:`UserGate`; empty: offsets alone.
    units : names of the users with an offset; their places are ``batch["unit"]``, where -1 is a user without one.
    offset_scale : > 0, nats; 1 by default: an offset of two standard deviations multiplies a weight by seven.
    column : the column of the data that names the user.

    Raises
    ------
    ValueError : gates of different K, no users or one named twice, offset_scale not above 0.

    >>> gate = MixedMembershipGate([], n_experts=2, units=["ann", "bob"])
    >>> gate.places(["bob", "eve"])
    tensor([ 1, -1])
    >>> gate({"unit": torch.tensor([0, -1])}).exp()
    tensor([[0.5000, 0.5000],
            [0.5000, 0.5000]], grad_fn=<ExpBackward0>)
    """

    def __init__(
        self, gates: Sequence[ContextGate | UserGate], n_experts: int, units: Sequence[str],
        offset_scale: float | int = 1.0, gate_temperature: float | int = 1.0, column: str = "user",
    ) -> None:  # fmt: skip
        super().__init__()
        check_n_experts(n_experts)
        if any(gate.n_experts != n_experts for gate in gates):
            raise ValueError(f"gates have {[gate.n_experts for gate in gates]} experts; expected {n_experts} in each")
        if len(units) == 0 or len(set(units)) < len(units):
            raise ValueError(
                f"units: found {len(units)}, {len(set(units))} of them distinct; expected one name for each user, and "
                "at least one; without users a ContextGate is enough"
            )
        self.n_experts, self.units, self.column = n_experts, list(units), column
        self.offset_scale = _positive("offset_scale", offset_scale)
        self.gate_temperature = _positive("gate_temperature", gate_temperature)
        self.gates = nn.ModuleList(gates)
        self.offset = nn.Parameter(torch.zeros(len(units), n_experts))
        self.reads = (*(name for gate in gates for name in gate.reads), "unit")

    @property
    def suffix(self) -> str:
        """That of the gate of prompts among ``gates``."""
        return next((gate.suffix for gate in self.gates if isinstance(gate, ContextGate)), "")

    @property
    def layer(self) -> int | None:
        """That of the gate of prompts among ``gates``."""
        return next((gate.layer for gate in self.gates if isinstance(gate, ContextGate)), None)

    def options(self) -> dict[str, Any]:
        """What makes an equal gate but for its parameters, see :func:`make_gate`."""
        return {"gate": "MixedMembershipGate", "gates": [gate.options() for gate in self.gates],  # type: ignore[operator]
                "n_experts": self.n_experts, "units": self.units, "offset_scale": self.offset_scale,
                "gate_temperature": self.gate_temperature, "column": self.column}  # fmt: skip

    def with_units(self, units: Sequence[str]) -> "MixedMembershipGate":
        """The same gates for other users, whose offsets start at 0; a user who had an offset keeps it.

        The gates are shared with this one, not copied.

        >>> MixedMembershipGate([], n_experts=2, units=["ann"]).with_units(["ann", "eve"]).offset.shape
        torch.Size([2, 2])
        """
        other = MixedMembershipGate(
            list(self.gates), self.n_experts, units, self.offset_scale, self.gate_temperature, self.column  # type: ignore[arg-type]
        )
        places = self.places(units)
        known = places >= 0
        with torch.no_grad():
            other.offset[known] = self.offset[places[known]]
        return other

    def places(self, names: Sequence[str]) -> Int[Tensor, "rows"]:
        """Place of each user's offset; -1 for users without one."""
        place = {name: i for i, name in enumerate(self.units)}
        return torch.tensor([place.get(name, -1) for name in names])

    def encode(self, metadata: Mapping[str, Sequence[Any]]) -> Float[Tensor, "rows features"]:
        """As :meth:`UserGate.encode`, by the gate of users among ``gates``."""
        return next(gate for gate in self.gates if isinstance(gate, UserGate)).encode(metadata)

    def forward(self, batch: Mapping[str, Tensor]) -> Float[Tensor, "rows experts"]:
        """log_w of every row, nats; gradients flow to the gates and the offsets."""
        if "unit" not in batch:
            raise ValueError(f"batch['unit'] is absent; found {sorted(batch)}: give -1 for users without an offset")
        unit = batch["unit"]
        n_units = len(self.units)
        if len(unit) and not -1 <= int(unit.min()) <= int(unit.max()) < n_units:
            row = int(((unit < -1) | (unit >= n_units)).nonzero()[0])
            raise ValueError(f"batch['unit'][{row}] = {int(unit[row])}; expected -1 ... {n_units - 1}")
        known = (unit >= 0).to(self.offset.dtype)[:, None]
        total = self.offset[unit.clamp(min=0)] * known
        for gate in self.gates:
            total = total + gate.logits(batch)  # type: ignore[operator]
        return (total / self.gate_temperature).log_softmax(-1)

    def log_prior(self) -> Float[Tensor, ""]:
        """Log density of the offsets and of the gates' weights under their priors, without constants; nats."""
        return sum((gate.log_prior() for gate in self.gates), _log_normal([self.offset], self.offset_scale))  # type: ignore[operator]


def given_gate(column: str, categories: Sequence[str], n_experts: int) -> UserGate:
    """A gate that is told who answers: the expert of each category of a column, for sure; frozen. For oracles.

    >>> given_gate("group", ["a", "b"], 2)({"metadata": torch.tensor([[0.0, 1.0]])}).exp()
    tensor([[0., 1.]])
    """
    gate = UserGate({column: list(categories)}, n_experts)
    with torch.no_grad():
        for i in range(len(categories)):
            gate.outer.weight[i % n_experts, i] = 200.0  # nats: e^-200 is 0 in float32
    return gate.requires_grad_(False)


Gate = FixedWeights | LearnedWeights | ContextGate | UserGate | MixedMembershipGate


def make_gate(options: Mapping[str, Any]) -> Gate:
    """The gate that ``gate.options()`` describes, with parameters as at the start.

    Raises
    ------
    ValueError : an unknown kind of gate.

    >>> make_gate(ContextGate(3, 2, width=4).options()).inner
    Linear(in_features=3, out_features=4, bias=True)
    """
    own = dict(options)
    kind = own.pop("gate", None)
    if kind == "UserGate":
        own["columns"] = {n: tuple(c) if isinstance(c[0], float) else list(c) for n, c in own["columns"].items()}
        return UserGate(**own)
    if kind == "MixedMembershipGate":
        own["gates"] = [make_gate(one) for one in own["gates"]]
        return MixedMembershipGate(**own)
    if kind == "FixedWeights":
        return FixedWeights.uniform(own["n_experts"])
    kinds: dict[Any, Any] = {"ContextGate": ContextGate, "LearnedWeights": LearnedWeights}
    if kind not in kinds:
        raise ValueError(f"gate={kind!r}: found no gate of this kind; it was saved by a newer version, or damaged")
    return kinds[kind](**own)


def distinct_rows(inputs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Int[Tensor, "rows"]]:
    """The distinct rows of what a gate reads, and which of them each row is: twelve answers to a prompt are read once.

    >>> inputs, place = distinct_rows({"context": torch.tensor([[2.0], [1.0], [2.0]])})
    >>> inputs["context"].T, place
    (tensor([[1., 2.]]), tensor([1, 0, 1]))
    """
    n = len(next(iter(inputs.values())))
    whole = torch.cat([inputs[name].reshape(n, -1).double() for name in sorted(inputs)], 1)
    distinct, place = torch.unique(whole, dim=0, return_inverse=True)
    first = torch.full((len(distinct),), n, device=place.device).scatter_reduce(
        0, place, torch.arange(n, device=place.device), "amin"
    )
    return {name: value[first] for name, value in inputs.items()}, place


def gate_loss(
    log_w: Float[Tensor, "..."], log_q: Float[Tensor, "..."], entropy_weight: float | int = 0.0,
    balance_weight: float | int = 0.0, count: Int[Tensor, "..."] | None = None,
) -> Float[Tensor, ""]:  # fmt: skip
    """What a gate minimises: ``mean_n [- sum_k q_nk log w_nk - a H(w_n)] + b KL(mean_n w_n || uniform)``, nats a row.

    The first term is the gate's part of the bound (method: M-step of the gate); its minimum over w is at w = q.  a > 0
    keeps single rows undecided, b > 0 keeps any expert from starving over the whole batch.  Rows are pairs with
    ``latent="pair"`` and units with ``latent="unit"``.

    Parameters
    ----------
    log_w : (rows, K), of the gate.
    log_q : (rows, K), responsibilities, normalised; detached here, for the experts are trained by another loss.
    entropy_weight, balance_weight : a, b >= 0.
    count : (rows,), how many equal rows each stands for, whose mean q is then given; once each by default.

    Raises
    ------
    ValueError : shapes that differ; a weight below 0.

    >>> q = torch.tensor([[0.5, 0.5]])
    >>> gate_loss(q.log(), q.log())
    tensor(0.6931)
    """
    if log_w.shape != log_q.shape:
        raise ValueError(f"log_w has shape {tuple(log_w.shape)}, log_q {tuple(log_q.shape)}; expected the same")
    for name, value in (("entropy_weight", entropy_weight), ("balance_weight", balance_weight)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}={value}: expected 0 or above; 0 leaves the term out")
    q = log_q.detach().exp()
    share = torch.full_like(log_w[:, 0], 1 / len(log_w)) if count is None else (count / count.sum()).to(log_w)
    loss = -share @ (q * log_w.masked_fill(q == 0, 0)).sum(1)
    if entropy_weight:
        loss = loss - entropy_weight * share @ entropy(log_w)
    if balance_weight:
        log_mean = (log_w + share.log()[:, None]).logsumexp(0)
        loss = loss + balance_weight * (math.log(log_w.shape[1]) - entropy(log_mean[None])[0])
    return loss


def standardise(features: Float[Tensor, "rows features"]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every column, with 1 where a column does not vary: ``mean, scale`` of a gate.

    >>> standardise(torch.tensor([[0.0, 5.0], [2.0, 5.0]]))
    (tensor([1., 5.]), tensor([1., 1.]))
    """
    scale = features.std(0, correction=0)
    return features.mean(0), torch.where(scale > 1e-6, scale, torch.ones_like(scale))


def _positive(name: str, value: float | int) -> float:
    if not 0 < value < math.inf:
        raise ValueError(f"{name}={value}: expected above 0")
    return float(value)


def _log_normal(parameters: Sequence[Tensor], scale: float) -> Float[Tensor, ""]:
    return -sum((p.square().sum() for p in parameters), torch.zeros(())) / (2 * scale**2)


def _zero_linear(n_in: int, n_out: int) -> nn.Linear:
    layer = nn.Linear(n_in, n_out)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _given(batch: Mapping[str, Tensor], name: str, size: int) -> Tensor:
    if name not in batch:
        raise ValueError(f"batch[{name!r}] is absent; found {sorted(batch)}: this gate reads {name}")
    value = batch[name]
    if value.dim() != 2 or value.shape[1] != size:
        raise ValueError(f"batch[{name!r}] has shape {tuple(value.shape)}; expected (rows, {size})")
    if not bool(value.isfinite().all()):
        row = int((~value.isfinite()).any(1).nonzero()[0])
        raise ValueError(f"batch[{name!r}], row {row}: found a value that is not finite")
    return value


def _check_metadata(name: str, values: Sequence[Any]) -> None:
    if len(values) == 0:
        raise ValueError(f"metadata column {name!r} has no rows: give at least one user")
    for row, value in enumerate(values):
        if value is None or (isinstance(value, float) and not math.isfinite(value)):
            raise ValueError(f"metadata row {row}, column {name!r}: found {value!r}, expected text or a finite number")
