"""Tables whose rewards are linear in vectors of the answers: few numbers an expert, fitted exactly within seconds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..data.pairs import Text
from .contract import Experts
from .tables import TabularExperts


class LinearTables(TabularExperts, family=False):
    """r_k(a) = beta_k . x(a), beta_k ~ N(0, prior_scale^2) in each direction; neither saved nor loaded.

    Parameters
    ----------
    read : (answers, directions) float64, x(a). answers : what they are. n_experts : K >= 1.
    beta : of the policy; rewards do not depend on it. prior_scale : > 0.

    >>> answers = [Text("q", name, True) for name in "abc"]
    >>> experts = LinearTables(torch.tensor([[1.0], [0.0], [-1.0]]).double(), answers)
    >>> pairs = torch.tensor([[0, 1], [0, 1], [1, 0]])
    >>> _ = experts.m_step(pairs, torch.ones(3, 1).double(), steps=20)
    >>> experts.expert_rewards().detach().round(decimals=2)   # what is said of a and b decides c
    tensor([[ 0.38,  0.00, -0.38]], dtype=torch.float64)
    """

    read: Tensor

    def __init__(
        self,
        read: Float[Tensor, "answers directions"],
        answers: Sequence[Text],
        n_experts: int = 1,
        beta: float = 1.0,
        prior_scale: float = 1.0,
    ) -> None:
        super().__init__(
            len(answers), n_experts, beta=beta, prior_scale=prior_scale, answers=answers
        )
        self.rewards = nn.Parameter(torch.zeros(n_experts, read.shape[1], dtype=torch.float64))
        self.register_buffer("read", read.double())

    def of_number(self, parts: Sequence[tuple[Experts, int]]) -> LinearTables:
        """See `Experts.of_number`."""
        return LinearTables(self.read, self.answers, len(parts), self.beta, self.prior_scale)

    def expert_rewards(self) -> Float[Tensor, "experts answers"]:
        """r_k(a); gradients flow to beta_k."""
        return self.rewards @ self.read.T

    def text_logps(
        self, batch: dict[str, Tensor], chosen: Bool[Tensor, "texts experts"] | None = None
    ) -> Float[Tensor, "texts experts"]:
        """See `Experts.text_logps`, up to a number that all answers of a prompt share: of many answers only some are asked."""
        answer = batch["answer"]
        logps = self.log_ref[answer][:, None] + self.read[answer] @ self.rewards.T / self.beta
        return logps if chosen is None else logps.masked_fill(~chosen, -torch.inf)

    def pulls(
        self,
        pairs: Int[Tensor, "pairs 2"],
        wrong: Float[Tensor, "pairs"],
        unit: Int[Tensor, "pairs"],
        n_units: int,
    ) -> Float[Tensor, "units directions"]:
        """See `RewardTable.pulls`: with respect to beta."""
        x = self.read[pairs[:, 0]] - self.read[pairs[:, 1]]
        return x.new_zeros(n_units, x.shape[1]).index_add_(0, unit, x * wrong[:, None])

    @torch.no_grad()
    def m_step(
        self, pairs: Int[Tensor, "pairs 2"], weight: Float[Tensor, "pairs experts"], steps: int = 2
    ) -> int:
        """See `RewardTable.m_step`: damped Newton steps, each expert's own."""
        self._check(pairs)
        x, precision = self.read[pairs[:, 0]] - self.read[pairs[:, 1]], 1 / self.prior_scale**2
        updates = 0
        for k, w in enumerate(weight.T):

            def objective(beta: Tensor, w: Tensor = w) -> float:
                fit = w @ nn.functional.logsigmoid(x @ beta)
                return float(fit - precision * beta.square().sum() / 2)

            for _ in range(steps):
                beta = self.rewards.data[k]
                p = (x @ beta).sigmoid()
                slope = (w * (1 - p)) @ x - precision * beta
                bend = x.T @ (x * (w * p * (1 - p))[:, None])
                bend += precision * torch.eye(len(beta), dtype=bend.dtype)
                direction, before, size = torch.linalg.solve(bend, slope), objective(beta), 1.0
                while size > 1e-9 and objective(beta + size * direction) < before:
                    size /= 2
                if not objective(beta + size * direction) > before:
                    break
                self.rewards.data[k] = beta + size * direction
                updates += 1
        return updates
