"""Where on a group is a taste? Coordinates c(g) on the basis experts, the nodes of a group, and what weights of nodes say."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

GROUPS = ("circle", "cyclic", "translations")
FEWEST = 8  # nodes of an integral over the circle; fewer are a cyclic group
REACH = 6.0  # standard deviations of the prior that nodes of translations cover: 2e-9 lies outside
WIDTHS = 6.0  # a posterior narrower than 6/M radians is read badly by M nodes: an error of some 2 exp(-18)


def generators(group: str, n_basis: int = 2) -> Float[Tensor, "generators basis basis"]:
    """A basis of the Lie algebra: E_12 - E_21 of the circle, E_(1,i+1) of translations; none of a cyclic group.

    >>> generators("circle")
    tensor([[[ 0.,  1.],
             [-1.,  0.]]], dtype=torch.float64)
    """
    _check(group, n_basis)
    found = torch.zeros(
        {"circle": 1, "cyclic": 0}.get(group, n_basis - 1), n_basis, n_basis, dtype=torch.float64
    )
    for i, generator in enumerate(found):
        generator[0, i + 1] = 1.0
        if group == "circle":
            generator[1, 0] = -1.0
    return found


def exponential(
    coordinates: Float[Tensor, "rows generators"], of: Float[Tensor, "generators basis basis"]
) -> Float[Tensor, "rows basis"]:
    """c(g) = rho(g)^T e_1 of g = exp(sum_i a_i X_i).  Source: docs/method.md; gradients flow to the coordinates a.

    >>> exponential(torch.tensor([[math.pi / 2]]).double(), generators("circle")).round(decimals=6).abs()
    tensor([[0., 1.]], dtype=torch.float64)
    """
    return torch.linalg.matrix_exp(torch.einsum("ri,ijk->rjk", coordinates, of.to(coordinates)))[
        :, 0
    ]


def on_circle(angle: Float[Tensor, "*rows"]) -> Float[Tensor, "*rows 2"]:
    """(cos t, sin t): c(g) of rotations, and unit vectors."""
    return torch.stack([angle.cos(), angle.sin()], -1)


def translated(shift: Float[Tensor, "*rows generators"]) -> Float[Tensor, "*rows basis"]:
    """(1, a_1, ..., a_(J-1)): c(g) of translations."""
    return torch.cat([torch.ones_like(shift[..., :1]), shift], -1)


def _check(group: str, n_basis: int) -> None:
    if group not in GROUPS:
        raise ValueError(f"group={group!r}: possible are {', '.join(map(repr, GROUPS))}")
    if n_basis < 2 or (group != "translations" and n_basis != 2):
        raise ValueError(
            f"n_basis={n_basis} of group={group!r}: expected 2 basis experts"
            + (
                " or more, a common one and one a generator"
                if group == "translations"
                else ", whose rewards a rotation mixes; rotations of more are not identified by their first row"
            )
        )


class Taste(NamedTuple):
    """What weights of nodes say of users, one row each.

    direction : radians in (-pi, pi], the mean direction; of translations the mean coordinates (rows, J - 1).
    concentration : kappa >= 0 of the von Mises density with the same mean resultant length; of translations the
        inverse variances. spread : radians (or prior standard deviations), the posterior's standard deviation; on the
        circle sqrt(-2 log R), R the mean resultant length.
    density : (rows, nodes), of the posterior at each node, per radian (or per unit of every coordinate).
    """

    direction: Tensor
    concentration: Tensor
    spread: Tensor
    density: Tensor


@dataclass(frozen=True)
class Nodes:
    """The nodes of a group: experts with tied parameters, r_m = sum_j c_mj r_j.

    group : "circle" (M equal angles of the trapezoid rule, exact up to 2 exp(-M^2 sd^2 / 2) for a posterior of width sd
        radians), "cyclic" (M angles that are the group), "translations" (a grid over the Gaussian prior, M^(1/(J-1)) nodes
        a coordinate).
    n_nodes : M. n_basis : J.

    >>> Nodes("cyclic", 4).coordinates.round(decimals=3).abs()
    tensor([[1., 0.],
            [0., 1.],
            [1., 0.],
            [0., 1.]], dtype=torch.float64)
    """

    group: str
    n_nodes: int
    n_basis: int = 2

    def __post_init__(self) -> None:
        _check(self.group, self.n_basis)
        if self.group == "circle" and self.n_nodes < FEWEST:
            raise ValueError(
                f"n_experts={self.n_nodes} nodes of the circle: expected at least {FEWEST}, 16 to start with; "
                "group='cyclic' is the discrete group of so few"
            )
        if self.group == "translations" and (
            self._side < FEWEST or self._side ** (self.n_basis - 1) != self.n_nodes
        ):
            raise ValueError(
                f"n_experts={self.n_nodes} nodes of translations with n_basis={self.n_basis}: expected a grid of at "
                f"least {FEWEST} nodes a coordinate, m^{self.n_basis - 1} nodes; 64^{self.n_basis - 1} serve most"
            )

    @property
    def _side(self) -> int:
        return round(self.n_nodes ** (1 / (self.n_basis - 1)))

    @property
    def points(self) -> Float[Tensor, "nodes ..."]:
        """Coordinates on the group: angles (M,) in radians, or shifts (M, J - 1); float64."""
        if self.group == "translations":
            line = torch.linspace(-REACH, REACH, self._side, dtype=torch.float64)
            return torch.cartesian_prod(*[line] * (self.n_basis - 1)).reshape(self.n_nodes, -1)
        return torch.arange(self.n_nodes, dtype=torch.float64) * (2 * math.pi / self.n_nodes)

    @property
    def coordinates(self) -> Float[Tensor, "nodes basis"]:
        """c_m, float64."""
        return translated(self.points) if self.group == "translations" else on_circle(self.points)

    @property
    def log_prior(self) -> Float[Tensor, "nodes"]:
        """Weights of the group's own prior, nats: equal ones, or a standard Gaussian's; float64, normalised."""
        if self.group == "translations":
            return (-self.points.square().sum(1) / 2).log_softmax(0)
        return torch.full((self.n_nodes,), -math.log(self.n_nodes), dtype=torch.float64)

    @property
    def cell(self) -> float:
        """The size of a node: radians, or the product of the grid's steps."""
        if self.group == "translations":
            return (2 * REACH / (self._side - 1)) ** (self.n_basis - 1)
        return 2 * math.pi / self.n_nodes

    def check_gate(self, name: str, density: str) -> None:
        """Refuse a gate whose weights of nodes are no density on the group.

        density : what the gate's weights are: "any" (given), "circle", or "" (one free weight an expert).
        """
        if self.group == "cyclic" or density in ("any", self.group):
            return
        ways = "DirectionGate, or FixedWeights" if self.group == "circle" else "FixedWeights"
        raise ValueError(
            f"{name} with nodes of group={self.group!r}: a free weight for each node is no density on the group, and "
            f"users cannot be placed; expected {ways}(log_w=experts.nodes.log_prior)"
        )

    def random_log_q(self, n_units: int, seed: int) -> Float[Tensor, "units nodes"]:
        """Symmetry breaking of units: weights that fall with exp(-d^2), d the distance of c from that of a random node."""
        draw = torch.Generator().manual_seed(seed)
        log_p = self.log_prior.exp().expand(n_units, -1)
        centre = torch.multinomial(log_p, 1, generator=draw).squeeze(1)
        distance = torch.cdist(self.coordinates[centre], self.coordinates)
        return (-distance.square()).log_softmax(-1)

    def taste(self, log_w: Float[Tensor, "rows nodes"]) -> Taste:
        """Direction, concentration and spread of these weights of nodes; see `Taste`."""
        w = log_w.double().softmax(-1)
        if self.group == "translations":
            mean = w @ self.points
            variance = w @ self.points.square() - mean.square()
            return Taste(mean, 1 / variance, variance.clamp_min(0).sqrt(), w / self.cell)
        x, y = (w @ on_circle(self.points)).unbind(-1)
        length = torch.hypot(x, y).clamp(max=1.0)
        spread = (-2 * length.clamp_min(1e-300).log()).sqrt()
        return Taste(torch.atan2(y, x), concentration(length), spread, w / self.cell)

    def warn_narrow(self, log_q: Float[Tensor, "units nodes"], stacklevel: int = 3) -> int:
        """How many posteriors are narrower than 6/M radians (6/M of the grid's half length); warns where some are."""
        if self.group == "cyclic":
            return 0
        step = self.cell ** (1 / (self.n_basis - 1)) / (2 * math.pi) * WIDTHS
        narrow = self.taste(log_q).spread.reshape(len(log_q), -1).amin(1)
        count = int((narrow < step).sum())
        if count:
            warnings.warn(
                f"{count} of {len(log_q)} posteriors are narrower than {step:.3f} (the narrowest: "
                f"{float(narrow.min()):.3f}), which {self.n_nodes} nodes read badly: use twice as many",
                stacklevel=stacklevel,
            )
        return count


def concentration(length: Float[Tensor, "rows"]) -> Float[Tensor, "rows"]:
    """kappa of a von Mises density from its mean resultant length R: I_1(kappa) / I_0(kappa) = R, by Newton steps.

    >>> concentration(torch.tensor([0.0, 0.5]).double()).round(decimals=4)
    tensor([0.0000, 1.1593], dtype=torch.float64)
    """
    r = length.double().clamp(0.0, 1 - 1e-12)
    kappa = r * (2 - r**2) / (1 - r**2)
    for _ in range(20):
        ratio = torch.special.i1e(kappa) / torch.special.i0e(kappa)
        slope = (1 - ratio**2 - ratio / kappa.clamp_min(1e-12)).clamp_min(1e-15)
        kappa = torch.where(
            (r > 0) & (kappa < 1e6), (kappa - (ratio - r) / slope).clamp_min(1e-12), kappa
        )
    return torch.where(r > 0, kappa, torch.zeros_like(r))
