"""Where on a circle of tastes are made-up people placed, by nothing but their comparisons?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..elbo import log_responsibilities
from ..evaluation import circle_turn
from ..experts.group_tables import GroupTables
from ..experts.groups import on_circle
from ..experts.reward_table import sample_answers
from ..gates.direction import DirectionGate
from ..learning.quadrature import fit_nodes
from ..learning.tally import Tally


@dataclass(frozen=True)
class CirclePeople:
    """Comparisons of people to learn from, and of others who are held out.

    angle : (people,) float64, radians; those who are learned from come first.
    train, held : (comparisons, 2) int64, preferred answer and the other. of, of_held : who compared, from 0.
    """

    angle: Float[Tensor, "people"]
    train: Int[Tensor, "comparisons 2"]
    of: Int[Tensor, "comparisons"]
    held: Int[Tensor, "held 2"]
    of_held: Int[Tensor, "held"]


def people_on_circle(
    angle: Float[Tensor, "people"],
    rewards: Float[Tensor, "2 answers"],
    n_learned: int,
    n_pairs: int,
    draw: torch.Generator,
) -> CirclePeople:
    """People whose reward is cos(t) r_1 + sin(t) r_2 compare random answers, `n_pairs` times each (Bradley-Terry).

    n_learned : the first so many are learned from, the others are held out.

    >>> angle, rewards = torch.rand(3).double(), torch.randn(2, 5).double()
    >>> people = people_on_circle(angle, rewards, 2, 4, torch.Generator().manual_seed(0))
    >>> people.of.tolist(), people.of_held.tolist()
    ([0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0])
    """
    pairs, unit = sample_answers(on_circle(angle) @ rewards, n_pairs, draw)
    seen = unit < n_learned
    return CirclePeople(angle, pairs[seen], unit[seen], pairs[~seen], unit[~seen] - n_learned)


@dataclass(frozen=True)
class Placed:
    """A circle that was fitted to people, and where it places those whom it was fitted to.

    log_q : (people, nodes), nats. turn : the sign and the angle that bring its angles onto the true ones (`circle_turn`).
    users : radians; true, found (so turned, 0 to 2 pi), known_rewards (by the posterior that knows the true rewards), spread.
    """

    experts: GroupTables
    gate: DirectionGate
    log_q: Float[Tensor, "people nodes"]
    turn: tuple[int, float]
    users: pd.DataFrame

    def error(self, column: str = "found") -> float:
        """Median distance of a column of `users` from the true angle, degrees."""
        off = self.users[column].to_numpy() - self.users["true"].to_numpy()
        return float(np.degrees(np.median(np.abs((off + np.pi) % (2 * np.pi) - np.pi))))


def placed(
    people: CirclePeople, rewards: Float[Tensor, "2 answers"], n_nodes: int, seed: int
) -> Placed:
    """Fit a circle of two tables, with more than `n_nodes` where the data need them, and place its people.

    A turned or mirrored circle is the same model, so that angles are brought onto the true ones before they are compared.
    rewards : the true ones, which only the yardstick knows.
    """
    experts, gate, result = fit_nodes(
        GroupTables(rewards.shape[1], n_nodes),
        DirectionGate(n_nodes),
        people.train,
        people.of,
        seed=seed,
        symmetry_scale=0.5,
        tolerance=1e-7,
        max_iter=200,
    )
    truth = GroupTables(rewards.shape[1], experts.n_experts)
    truth.rewards.data = rewards
    tally = Tally(truth, people.train, people.of)
    bayes = log_responsibilities(tally.loglik(tally.units).detach(), truth.nodes.log_prior)
    taste = experts.nodes.taste(result.log_q)
    true, found = people.angle[: len(result.log_q)].numpy(), taste.direction.numpy()
    sign, turn = circle_turn(found, true)
    users = pd.DataFrame(
        {
            "true": true,
            "found": (sign * found + turn) % (2 * np.pi),
            "known_rewards": truth.nodes.taste(bayes).direction.numpy(),
            "spread": taste.spread.numpy(),
        }
    )
    return Placed(experts, gate, result.log_q, (sign, turn), users)
