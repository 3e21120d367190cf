"""Rewards of a finite set of answers: Bradley-Terry models that are fitted exactly, and the policies they make."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn

from ..base.model import Base
from ..data.pairs import Text
from .contract import Experts


class RewardTable(Experts, family=False):
    """What `TabularExperts` know of numbers alone, answers 0 ... A-1: rewards, policies, and their exact M-step."""

    rates = {"adamw": 0.1, "sgd": 1.0}
    log_ref: Tensor
    prompt: Tensor

    def __init__(
        self,
        n_answers: int,
        n_experts: int,
        beta: float = 1.0,
        prior_scale: float = 2.0,
        log_ref: Tensor | None = None,
        answers: Sequence[Text] | None = None,
        base: Base | None = None,
    ) -> None:
        super().__init__(base, n_experts)
        if n_answers < 2:
            raise ValueError(f"n_answers={n_answers}: a preference needs at least two answers")
        for name, value in (("beta", beta), ("prior_scale", prior_scale)):
            if not 0 < value < float("inf"):
                raise ValueError(f"{name}={value}: expected a positive number")
        if (base and not answers) or len(answers or range(n_answers)) != n_answers:
            raise ValueError(
                f"n_answers={n_answers}: expected as many answers, and with a base at least two; or neither"
            )
        self.n_answers, self.beta, self.prior_scale = n_answers, beta, prior_scale
        self.answers = tuple(answers or ())
        prompts = {
            name: i
            for i, name in enumerate(dict.fromkeys(answer.prompt for answer in self.answers))
        }
        place = [prompts[answer.prompt] for answer in self.answers] or [0] * n_answers
        self.rewards = nn.Parameter(torch.zeros(n_experts, n_answers, dtype=torch.float64))
        self.register_buffer("prompt", torch.tensor(place))
        log_ref = torch.zeros(n_answers) if log_ref is None else log_ref
        self.register_buffer("log_ref", self._by_prompt(log_ref.double()[None])[0])

    def _by_prompt(self, scores: Float[Tensor, "rows answers"]) -> Float[Tensor, "rows answers"]:
        """Log-probabilities of these scores among the answers of each prompt."""
        n, place = int(self.prompt.max()) + 1, self.prompt.expand(scores.shape)
        top = scores.new_full((len(scores), n), -torch.inf).scatter_reduce(
            1, place, scores.detach(), "amax"
        )
        total = torch.zeros_like(top).scatter_add(1, place, (scores - top.gather(1, place)).exp())
        return scores - (top + total.log()).gather(1, place)

    def _check(self, pairs: Tensor) -> None:
        if pairs.dim() != 2 or pairs.shape[1] != 2 or len(pairs) == 0:
            raise ValueError(
                f"pairs has shape {tuple(pairs.shape)}; expected (pairs, 2): chosen and rejected answer"
            )
        if int(pairs.min()) < 0 or int(pairs.max()) >= self.n_answers:
            row = int(((pairs < 0) | (pairs >= self.n_answers)).any(1).nonzero()[0])
            raise ValueError(
                f"pairs[{row}] = {pairs[row].tolist()}; expected answers 0 ... {self.n_answers - 1}: renumber them"
            )

    @torch.no_grad()
    def perturb(self, scale: float, generator: torch.Generator) -> None:
        """Draw the rewards from N(0, scale^2): symmetry breaking, or known experts for generated data."""
        self.rewards.copy_(
            torch.randn(self.rewards.shape, generator=generator, dtype=torch.float64) * scale
        )

    @torch.no_grad()
    def sample_pairs(
        self, expert: Int[Tensor, "units"], pairs_per_unit: int, generator: torch.Generator
    ) -> tuple[Int[Tensor, "pairs 2"], Int[Tensor, "pairs"]]:
        """Random pairs of different answers, labelled by the expert of each unit with probability sigma(D_k).

        Returns (pairs, unit): chosen and rejected answer, and 0 ... U-1.
        """
        return sample_answers(self.expert_rewards()[expert], pairs_per_unit, generator)

    def expert_rewards(self) -> Float[Tensor, "experts answers"]:
        """r_k(a) of every expert; gradients flow to what is learned."""
        return self.rewards

    def log_policy(self) -> Float[Tensor, "experts answers"]:
        """log pi_k(a) among the answers of a's prompt, nats."""
        return self._by_prompt(self.log_ref + self.expert_rewards() / self.beta)

    def reward_table(self) -> pd.DataFrame:
        """Rewards by the names of the answers, a column an expert; those of a prompt's answers sum to 0.

        The index is the answer, its number where it has no name, or prompt and answer where there are several prompts.
        """
        rewards = self.expert_rewards().detach()
        size = torch.bincount(self.prompt).to(rewards)
        total = rewards.new_zeros(len(rewards), len(size)).index_add(1, self.prompt, rewards)
        centred = rewards - (total / size)[:, self.prompt]
        names = [answer.response for answer in self.answers] or range(self.n_answers)
        index = pd.Index(names, name="answer")
        if len(size) > 1:
            prompts = [answer.prompt for answer in self.answers]
            index = pd.MultiIndex.from_arrays([prompts, names], names=["prompt", "answer"])
        return pd.DataFrame(centred.T.numpy(), index=index).rename_axis(columns="expert")

    def n_free(self, pairs: Int[Tensor, "pairs 2"] | None = None) -> int:
        """K (A - P), A answers of P prompts: adding a number to all rewards of a prompt changes no probability.

        pairs : comparisons; then A is of the answers that they compare, and P the number of sets that they connect: of an
            answer that is never compared, or of two sets that are never compared with each other, they say nothing.
        """
        if pairs is None:
            return self.n_sets * (self.n_answers - len(torch.unique(self.prompt)))
        compared, place = np.unique(pairs.cpu().numpy(), return_inverse=True)
        edges, n = place.reshape(-1, 2), len(compared)
        graph = coo_array((np.ones(len(edges)), edges.T), shape=(n, n))
        return self.n_sets * (n - connected_components(graph, directed=False)[0])

    # ------------------------------------------------------------------------------------------------ full-batch EM

    def loglik(self, pairs: Int[Tensor, "pairs 2"]) -> Float[Tensor, "pairs experts"]:
        """log sigma(D_k) of every pair, nats. Gradients flow to the rewards."""
        self._check(pairs)
        rewards = self.expert_rewards()
        return nn.functional.logsigmoid((rewards[:, pairs[:, 0]] - rewards[:, pairs[:, 1]]).T)

    def log_prior(self) -> Float[Tensor, ""]:
        """Log density of all rewards under their prior, without its constant; nats."""
        return -(self.rewards**2).sum() / (2 * self.prior_scale**2)

    @torch.no_grad()
    def m_step(
        self, pairs: Int[Tensor, "pairs 2"], weight: Float[Tensor, "pairs experts"], steps: int = 2
    ) -> int:
        """Raise sum_n weight_nk log sigma(D_nk) + log prior of every expert by damped Newton steps, in place.

        A step that does not raise an expert's objective is halved until it does (generalised EM: the bound never
        falls). Weighted Bradley-Terry has no closed form; its Hessian, with the prior, is positive definite.

        Parameters
        ----------
        weight : responsibilities, >= 0, float64; where answers may be lapses, times the probability of no lapse.
        steps : Newton steps at most; two leave little to the next M-step.

        Returns
        -------
        How many (expert, step) updates were made; 0 means that every expert is at its optimum up to rounding.
        """
        count = self._count(pairs, weight)
        rewards, updates = newton_steps(self.rewards.data, count, self.prior_scale, steps)
        self.rewards.copy_(rewards)
        return updates

    def _count(
        self, pairs: Int[Tensor, "pairs 2"], weight: Float[Tensor, "pairs experts"]
    ) -> Float[Tensor, "experts answers answers"]:
        """How often (by weight) each answer was preferred to each: all that an M-step sees, whatever the number of pairs."""
        self._check(pairs)
        n, k = self.n_answers, self.n_experts
        cell = pairs[:, 0] * n + pairs[:, 1]
        return weight.new_zeros(n * n, k).index_add_(0, cell, weight).T.reshape(k, n, n)


@torch.no_grad()
def sample_answers(
    rewards: Float[Tensor, "units answers"], pairs_per_unit: int, generator: torch.Generator
) -> tuple[Int[Tensor, "pairs 2"], Int[Tensor, "pairs"]]:
    """Random pairs of different answers, labelled by the rewards of each unit with probability sigma(difference).

    Returns (pairs, unit): chosen and rejected answer, and 0 ... U-1.
    """
    n = rewards.shape[1]
    unit = torch.arange(len(rewards)).repeat_interleave(pairs_per_unit)
    first = torch.randint(n, (len(unit),), generator=generator)
    second = (first + torch.randint(1, n, (len(unit),), generator=generator)) % n
    wins = torch.rand(len(unit), generator=generator, dtype=torch.float64) < torch.sigmoid(
        rewards[unit, first] - rewards[unit, second]
    )
    return torch.stack(
        [torch.where(wins, first, second), torch.where(wins, second, first)], 1
    ), unit


def newton_steps(
    rewards: Float[Tensor, "experts answers"],
    count: Float[Tensor, "experts answers answers"],
    prior_scale: float,
    steps: int,
) -> tuple[Float[Tensor, "experts answers"], int]:
    """Rewards after damped Newton steps on sum count[a, b] log sigma(r_a - r_b) + log prior, and how many rose.

    count : how often (by responsibility) answer a was preferred to answer b. A step that does not raise an expert's
    objective is halved until it does.
    """

    def objective(rewards: Tensor) -> Tensor:
        margin = rewards[:, :, None] - rewards[:, None, :]
        fit = (count * nn.functional.logsigmoid(margin)).sum((1, 2))
        return fit - (rewards**2).sum(1) / (2 * prior_scale**2)

    updates = 0
    for _ in range(steps):
        p = torch.sigmoid(rewards[:, :, None] - rewards[:, None, :])
        pull = count * (1 - p)
        gradient = pull.sum(2) - pull.sum(1) - rewards / prior_scale**2
        bend = count * p * (1 - p)
        bend = bend + bend.transpose(1, 2)
        hessian = torch.diag_embed(bend.sum(2) + 1 / prior_scale**2) - bend
        direction = torch.linalg.solve(hessian, gradient)
        before, size = objective(rewards), torch.ones(len(rewards), 1, dtype=torch.float64)
        for _ in range(30):
            after = objective(rewards + size * direction)
            worse = after < before
            if not bool(worse.any()):
                break
            size[worse] /= 2
        better = (after > before)[:, None]
        rewards = torch.where(better, rewards + size * direction, rewards)
        updates += int(better.sum())
    return rewards, updates
