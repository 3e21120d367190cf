"""What do the nodes of a group say, where the basis experts are heads? Logits of a node are a sum of the basis's."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..base.model import Base
from ..elbo import check_n_experts
from .contract import check_chosen
from .group_logps import group_text_logps
from .groups import Nodes
from .heads import HeadExperts


class GroupHeads(HeadExperts):
    """M nodes of a group that acts on J basis experts, low-rank heads on one frozen base.

    logits_m(v) = z_v + 1[v active] ( sum_j c_mj (W B_j A_j h)_v + (sum_j c_mj s_j)(z_v - mean_active(h)) ),   z = W h,

    each node normalised for itself: margins are exact at every node.  Source: docs/method.md.  What is learned are the J
    heads, `down` (J, rank, hidden), `up` (J, hidden, rank) and `sharpness` (J,).

    Parameters
    ----------
    base : see `HeadExperts`. n_experts : M, the nodes: 16 or 32 to learn with, 64 or more to be served with (`use_nodes`).
    group, n_basis : see `groups.Nodes`. options : rank, active and the other options of `HeadExperts`.

    Raises
    ------
    ValueError : too few nodes, or a number of basis experts that the group does not act on.
    """

    nodes: Nodes

    def __init__(
        self,
        base: Base,
        n_experts: int = 16,
        group: str = "circle",
        n_basis: int = 2,
        rank: int = 8,
        active: str = "responses",
        min_count: int = 1,
        sharpness: bool = True,
        sharpness_rate: float | int = 1 / 3,
        weight_decay: float | int = 0.0,
    ) -> None:
        check_n_experts(n_experts)
        nodes = Nodes(group, n_experts, n_basis)
        super().__init__(
            base, n_basis, rank, active, min_count, sharpness, sharpness_rate, weight_decay
        )
        self.n_experts, self.nodes = n_experts, nodes

    @property
    def n_sets(self) -> int:
        """J."""
        return self.nodes.n_basis

    def options(self) -> dict[str, Any]:
        """What makes equal experts but for their parameters."""
        return super().options() | {"group": self.nodes.group, "n_basis": self.nodes.n_basis}

    def use_nodes(self, n_experts: int) -> None:
        """Read the same basis at another number of nodes, from now on; a gate of as many belongs to it."""
        self.nodes = Nodes(self.nodes.group, n_experts, self.nodes.n_basis)
        self.n_experts = n_experts

    def _coordinates(self) -> Float[Tensor, "nodes basis"]:
        return self.nodes.coordinates.to(self.up)

    def text_logps(
        self, batch: dict[str, Tensor], chosen: Bool[Tensor, "texts nodes"] | None = None
    ) -> Float[Tensor, "texts nodes"]:
        """See `Experts.text_logps`; the products of the basis with the head are shared by all nodes."""
        device = self.up.device
        if chosen is not None:
            check_chosen(chosen, len(batch["text_ref_logps"]), self.n_experts)
        head, bias = self.active_head()
        head, bias = head.to(device), None if bias is None else bias.to(device)
        with torch.autocast(device.type, enabled=False):
            return group_text_logps(
                batch,
                self.down,
                self.up,
                self.sharpness,
                self._coordinates(),
                head,
                bias,
                chosen,
                self._map,
            )

    def low_rank(
        self, k: int
    ) -> tuple[Float[Tensor, "rank hidden"], Float[Tensor, "hidden rank"], float]:
        """A, B and s of node k: the basis side by side, of rank J r, each B_j and s_j times c_kj; no gradient flows."""
        c = self._coordinates()[k]
        up = torch.cat(list(self.up.detach() * c[:, None, None]), 1)
        sharper = 0.0 if self.sharpness is None else float(c @ self.sharpness.detach())
        return self.down.detach().flatten(0, 1), up, sharper
