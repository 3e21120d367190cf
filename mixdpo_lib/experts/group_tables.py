"""What do the nodes of a group say, where the basis experts are tables? Tied rewards r_m = sum_j c_mj r_j, and their M-step."""

from __future__ import annotations

import copy
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..elbo import check_n_experts
from .groups import Nodes
from .tables import TabularExperts


class GroupTables(TabularExperts):
    """M nodes of a group that acts on J basis experts, all of them exact policies over a finite set of answers.

    Node m has the rewards r_m = sum_j c_mj r_j; what is learned are those of the basis, `rewards` (J, answers), with the
    prior N(0, prior_scale^2).  Source: docs/method.md.

    Parameters
    ----------
    n_answers : at least 2. n_experts : M, the nodes. group, n_basis : see `groups.Nodes`.
    options : beta, prior_scale, log_ref, answers, base; see `TabularExperts`.

    Raises
    ------
    ValueError : too few nodes, or a number of basis experts that the group does not act on.

    >>> experts = GroupTables(n_answers=3, n_experts=4, group="cyclic")
    >>> experts.rewards.data[:] = torch.tensor([[1.0, 2.0, 3.0], [0.0, 5.0, 0.0]])
    >>> experts.expert_rewards()[2].detach().round()                  # node 2: the opposite of the first
    tensor([-1., -2., -3.], dtype=torch.float64)
    """

    nodes: Nodes

    def __init__(
        self,
        n_answers: int,
        n_experts: int = 16,
        group: str = "circle",
        n_basis: int = 2,
        **options: Any,
    ) -> None:
        check_n_experts(n_experts)
        super().__init__(n_answers, n_experts, **options)
        self.nodes = Nodes(group, n_experts, n_basis)
        self.rewards = nn.Parameter(torch.zeros(n_basis, n_answers, dtype=torch.float64))

    @property
    def n_sets(self) -> int:
        """J."""
        return self.nodes.n_basis

    def options(self) -> dict[str, Any]:
        """What makes equal experts but for their parameters."""
        return super().options() | {"group": self.nodes.group, "n_basis": self.nodes.n_basis}

    def n_free(self, pairs: Int[Tensor, "pairs 2"] | None = None) -> int:
        """Refused: bases that are turned into each other are one model."""
        raise ValueError(
            f"{type(self).__name__}: what is free of a turned basis is not counted; compare by held-out pairs "
            "(report, choose_k)"
        )

    def at_nodes(self, n_experts: int) -> GroupTables:
        """The same basis, read at another number of nodes."""
        again = copy.deepcopy(self)
        again.n_experts = n_experts
        again.nodes = Nodes(self.nodes.group, n_experts, self.nodes.n_basis)
        return again

    def expert_rewards(self) -> Float[Tensor, "nodes answers"]:
        """r_m(a) of every node; gradients flow to the basis."""
        return self.nodes.coordinates.to(self.rewards) @ self.rewards

    @torch.no_grad()
    def m_step(
        self, pairs: Int[Tensor, "pairs 2"], weight: Float[Tensor, "pairs nodes"], steps: int = 2
    ) -> int:
        """See `RewardTable.m_step`: damped Newton steps on the basis, all rewards at once."""
        count, c = self._count(pairs, weight), self.nodes.coordinates
        for step in range(steps):
            size, direction = 1.0, self._newton(count, c)
            before, rewards = self._objective(count, c, self.rewards), self.rewards.clone()
            for _ in range(30):
                self.rewards.copy_(rewards + size * direction)
                if self._objective(count, c, self.rewards) > before:
                    break
                size /= 2
            else:
                self.rewards.copy_(rewards)
                return step
        return steps

    def _objective(self, count: Tensor, c: Tensor, rewards: Tensor) -> float:
        said = c @ rewards
        margin = said[:, :, None] - said[:, None, :]
        return float((count * nn.functional.logsigmoid(margin)).sum() + self.log_prior())

    def _newton(self, count: Tensor, c: Tensor) -> Float[Tensor, "basis answers"]:
        said, precision = c @ self.rewards, 1 / self.prior_scale**2
        p = torch.sigmoid(said[:, :, None] - said[:, None, :])
        pull, bend = count * (1 - p), count * p * (1 - p)
        gradient = c.T @ (pull.sum(2) - pull.sum(1)) - self.rewards * precision
        bend = bend + bend.transpose(1, 2)
        laplacian = torch.diag_embed(bend.sum(2)) - bend
        size = self.rewards.numel()
        hessian = torch.einsum("mj,mk,mab->jakb", c, c, laplacian).reshape(size, size)
        hessian = hessian + precision * torch.eye(size, dtype=hessian.dtype)
        return torch.linalg.solve(hessian, gradient.flatten()).reshape(gradient.shape)
