"""What do the field's methods do otherwise than a mixture? How answers weigh in a step, and heads that are averaged."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from ..base.model import Base
from ..data.pairs import Pairs
from ..elbo import sum_over_units
from ..experts.heads import HeadExperts
from ..learning.inference import Inference, Moment, Responsibilities
from ..learning.table import LoglikTable


@dataclass(frozen=True)
class HardAssignment(Inference):
    """Each unit belongs to one expert: q_uk = 1 for the largest log w_k + sum_n loglik_nk, else 0.

    Classification EM (Celeux and Govaert 1992) of DPO losses; clusters of annotators with a DPO each after Chidambaram et
    al. 2024, arXiv 2405.15065, whose own E-step is soft. One-hot and in mini-batches is ours.
    """

    def part(
        self, table: LoglikTable, data: Pairs, base: Base | None, seed: int
    ) -> Responsibilities:
        """See `Inference.part`."""
        return OneHot(table)


class OneHot(Responsibilities):
    """Of the table's responsibilities the largest."""

    exact = False

    def weights(
        self,
        row: Int[Tensor, "batch"],
        log_w: Float[Tensor, "latents experts"],
        now: Moment,
        described: Tensor | None = None,
    ) -> tuple[Float[Tensor, "batch experts"], Float[Tensor, ""]]:
        """See `Responsibilities.weights`."""
        log_q = self.table.batch_log_q(row, log_w, now.temperature)
        return F.one_hot(log_q.argmax(1), log_q.shape[1]).to(log_q), log_w.new_zeros(())


@dataclass(frozen=True)
class GroupRobust(Inference):
    """One policy for the worst group: min over policies, max over alpha of sum_g alpha_g mean loss of group g.

    Group-robust DPO of Ramesh et al. 2024, arXiv 2405.20304: alpha_g <- alpha_g exp(step x loss of g), normalised, and a
    pair of g weighs alpha_g / (share of g) in the gradient. Groups are known: they are the units of the fit,
    FitConfig(unit="group"). Ours: the loss of a group is the mean over all its pairs as last seen, where theirs is of the
    step's own pairs, all of one group; momentum; the size of the step.

    step : eta > 0, a nat of loss to the power; .1, by which the weights of groups that differ by .05 nats part twofold in
        some 140 steps.
    """

    step: float | int = 0.1
    alone: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.step < float("inf"):
            raise ValueError(f"step={self.step}: expected above 0")

    def part(
        self, table: LoglikTable, data: Pairs, base: Base | None, seed: int
    ) -> Responsibilities:
        """See `Inference.part`."""
        return RobustWeights(table, self.step)


class RobustWeights(Responsibilities):
    """alpha, a weight a unit of the table; an evaluation says it: `weight_0`, `weight_1`, ... of the units in their order."""

    share: Tensor
    log_alpha: Tensor

    def __init__(self, table: LoglikTable, step: float | int) -> None:
        super().__init__(table)
        self.step, self.moved = step, -1
        self.register_buffer("share", torch.bincount(table.unit) / len(table.unit))
        self.register_buffer("log_alpha", torch.zeros(table.n_units).log_softmax(0))

    def weights(
        self,
        row: Int[Tensor, "batch"],
        log_w: Float[Tensor, "latents experts"],
        now: Moment,
        described: Tensor | None = None,
    ) -> tuple[Float[Tensor, "batch experts"], Float[Tensor, ""]]:
        """alpha_g / share_g of each row, whose mean over rows is 1 on average; a training step moves alpha first."""
        if now.training and now.step != self.moved:  # once a step, in however many parts
            self.moved = now.step
            total = sum_over_units(-self.table.read(), self.table.unit, len(self.share))
            loss = total.squeeze(1) / torch.bincount(self.table.unit)
            self.log_alpha.copy_((self.log_alpha + self.step * loss).log_softmax(0))
        weight = (self.log_alpha.exp() / self.share)[self.table.unit[row]]
        return weight[:, None], log_w.new_zeros(())

    def measure(
        self, log_w: Float[Tensor, "latents experts"], index: Int[Tensor, "pairs 2"]
    ) -> dict[str, float]:
        """alpha of every group."""
        return {f"weight_{g}": float(a) for g, a in enumerate(self.log_alpha.exp())}


@torch.no_grad()
def soup(experts: HeadExperts, weights: Float[Tensor, "soups experts"]) -> HeadExperts:
    """Averages of heads: W B A = sum_k lambda_k W B_k A_k and s = sum_k lambda_k s_k for each row lambda of `weights`.

    Rewarded soup of Rame et al. 2023, arXiv 2306.04488, who interpolate the weights of policies that were each fitted on
    one reward from one start. The sum of the products, not of the factors A and B, is what interpolates the head: a head
    of rank K r, the A_k one below the other and the lambda_k B_k side by side.
    """
    n, k = weights.shape
    options: dict[str, Any] = {**experts.options(), "n_experts": n, "rank": k * experts.rank}
    made = HeadExperts(experts.base[0], **options)
    made.fit_state(experts.state_dict())
    made.down.copy_(experts.down.flatten(0, 1).expand_as(made.down))
    made.up.copy_(torch.einsum("nk,khr->nhkr", weights, experts.up).flatten(2))
    if made.sharpness is not None and experts.sharpness is not None:
        made.sharpness.copy_(weights @ experts.sharpness)
    return made


def simplex(n: int, steps: int) -> Float[Tensor, "points n"]:
    """All weights of n things that are multiples of 1 / steps: corners, edges, inside.

    >>> simplex(2, 2)
    tensor([[0.0000, 1.0000],
            [0.5000, 0.5000],
            [1.0000, 0.0000]])
    """
    counts = [c for c in itertools.product(range(steps + 1), repeat=n) if sum(c) == steps]
    return torch.tensor(counts) / steps
