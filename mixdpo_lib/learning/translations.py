"""What is a user's personal part? Translations by a Gaussian posterior of each user, on tables."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..elbo import check_log_w
from ..experts.group_tables import GroupTables
from ..experts.groups import Nodes, translated

HIDDEN = 64  # width of the network that reads a user's pairs


class UserPosteriors(nn.Module):
    """q(a) = N(mean, L L^T) of each user, free numbers: mean (users, J - 1) and L, lower triangular."""

    def __init__(self, n_users: int, n_shifts: int) -> None:
        super().__init__()
        self.shape = (n_users, n_shifts)
        size = n_shifts * (n_shifts + 3) // 2
        self.numbers = nn.Parameter(torch.zeros(n_users, size, dtype=torch.float64))

    def forward(self, wins: Float[Tensor, "users answers"]) -> tuple[Tensor, Tensor]:
        """Mean (users, J - 1) and L (users, J - 1, J - 1); `wins` is not read."""
        return as_gaussian(self.numbers, self.shape[1])


class ReadPosteriors(nn.Module):
    """q(a) amortised: a small network reads how often a user's pairs preferred each answer, and how often it lost."""

    def __init__(self, n_answers: int, n_shifts: int, seed: int = 0) -> None:
        super().__init__()
        self.n_shifts = n_shifts
        draw = torch.Generator().manual_seed(seed)
        size = n_shifts * (n_shifts + 3) // 2
        self.inner = nn.Linear(2 * n_answers, HIDDEN, dtype=torch.float64)
        self.outer = nn.Linear(HIDDEN, size, dtype=torch.float64)
        with torch.no_grad():
            for layer in (self.inner, self.outer):
                layer.bias.zero_()
                noise = torch.randn(layer.weight.shape, generator=draw, dtype=torch.float64)
                layer.weight.copy_(noise / (10 * layer.in_features) ** 0.5)

    def forward(self, wins: Float[Tensor, "users counts"]) -> tuple[Tensor, Tensor]:
        """Mean and L of users whose wins and losses (users, 2 answers) these are; they need not be known."""
        return as_gaussian(self.outer(self.inner(wins).tanh()), self.n_shifts)


def as_gaussian(numbers: Float[Tensor, "users numbers"], n_shifts: int) -> tuple[Tensor, Tensor]:
    """Mean, and L with the exponentials of the next numbers on its diagonal and the rest below."""
    mean, log_diagonal, rest = numbers.split(
        [n_shifts, n_shifts, numbers.shape[1] - 2 * n_shifts], 1
    )
    lower = torch.diag_embed(log_diagonal.exp())
    i, j = torch.tril_indices(n_shifts, n_shifts, -1)
    return mean, lower.index_put((torch.arange(len(mean))[:, None], i, j), rest)


def kl_to_prior(
    mean: Float[Tensor, "users shifts"], lower: Float[Tensor, "users shifts shifts"]
) -> Float[Tensor, "users"]:
    """KL(N(mean, L L^T) || N(0, I)), nats.

    >>> kl_to_prior(torch.tensor([[1.0]]), torch.tensor([[[1.0]]]))
    tensor([0.5000])
    """
    log_det = lower.diagonal(dim1=1, dim2=2).log().sum(1)
    square = lower.square().sum((1, 2)) + mean.square().sum(1) - mean.shape[1]
    return square / 2 - log_det


@dataclass(frozen=True)
class GaussianFit:
    """What a fit of translations leaves.

    mean : (users, J - 1), lower : (users, J - 1, J - 1), the Gaussian posteriors, in standard deviations of the prior.
    bound : (users,), nats, the evidence lower bound; importance : (users,), nats, the importance-weighted estimate of the
        log-likelihood, in expectation between the two.
    posteriors : what gives them. history : bound and objective by round, nats per pair.
    """

    mean: Tensor
    lower: Tensor
    bound: Tensor
    importance: Tensor
    posteriors: nn.Module
    history: pd.DataFrame

    def log_w(self, nodes: Nodes) -> Float[Tensor, "users nodes"]:
        """The posteriors as weights of the nodes of translations, nats: users of a `MixturePolicy`."""
        away = nodes.points[None] - self.mean[:, None]
        scaled = torch.linalg.solve_triangular(self.lower, away.mT, upper=False)
        return check_log_w((-scaled.square().sum(1) / 2).log_softmax(1))


def wins_and_losses(
    pairs: Int[Tensor, "pairs 2"], unit: Int[Tensor, "pairs"], n_users: int, n_answers: int
) -> Float[Tensor, "users counts"]:
    """How often each answer was preferred and how often it lost: (users, 2 answers), over the square root of the pairs."""
    counts = torch.zeros(n_users, 2 * n_answers, dtype=torch.float64)
    one = torch.ones(len(unit), dtype=torch.float64)
    for side in (0, 1):
        counts.index_put_((unit, pairs[:, side] + side * n_answers), one, accumulate=True)
    return counts / counts.sum(1, keepdim=True).clamp_min(1.0).sqrt()


def fit_translations(
    experts: GroupTables,
    pairs: Int[Tensor, "pairs 2"],
    unit: Int[Tensor, "pairs"],
    *,
    posteriors: nn.Module | None = None,
    amortised: bool = False,
    freeze_experts: bool = False,
    n_draws: int = 8,
    rounds: int = 10,
    iterations: int = 25,
    importance_draws: int = 256,
    seed: int = 0,
) -> GaussianFit:
    """Rewards of the basis and a Gaussian posterior of each user, in place: L-BFGS on the reparameterised bound.

    Maximises sum_u ( E_q sum_n log sigma(D_an) - KL(q_u || N(0, I)) ) + log prior of the rewards, a = mean + L e with
    draws e that stand for a round and come in opposite pairs.  Source: derived in docs/method.md, tested in
    tests/learning/test_translations.py.

    Parameters
    ----------
    experts : translations of J >= 2 basis experts; where all rewards are 0, small ones are drawn, for a bound that no
        gradient leaves. They stay as they are with `freeze_experts`: new users are placed, nothing is retrained.
    posteriors : that of an earlier fit, to go on from; a network that reads serves new users as it is.
    amortised : a network reads each user's pairs (`ReadPosteriors`) instead of free numbers a user.
    n_draws : an even number of draws a user and round. rounds, iterations : of L-BFGS, with new draws each round.
    importance_draws : of the importance-weighted estimate.

    Raises
    ------
    ValueError : experts of another group; an odd number of draws.
    """
    if experts.nodes.group != "translations":
        raise ValueError(
            f"group={experts.nodes.group!r}: expected translations; a circle is fitted by fit_nodes"
        )
    if n_draws < 2 or n_draws % 2:
        raise ValueError(f"n_draws={n_draws}: expected an even number, 2 or more")
    n_users, n_shifts = int(unit.max()) + 1, experts.nodes.n_basis - 1
    draw = torch.Generator().manual_seed(seed)
    if not bool(experts.rewards.any()):
        experts.perturb(0.3, draw)
    if posteriors is None:
        posteriors = (
            ReadPosteriors(experts.n_answers, n_shifts, seed)
            if amortised
            else UserPosteriors(n_users, n_shifts)
        )
    wins = wins_and_losses(pairs, unit, n_users, experts.n_answers)
    learned = [*posteriors.parameters(), *([] if freeze_experts else [experts.rewards])]

    def noise(n: int) -> Tensor:
        half = torch.randn(n // 2, n_users, n_shifts, generator=draw, dtype=torch.float64)
        return torch.cat([half, -half])

    def bounds(e: Tensor) -> Tensor:
        mean, lower = posteriors(wins)
        shifts = mean + torch.einsum("uij,suj->sui", lower, e)
        loglik = shifted_log_likelihood(experts.rewards, shifts, pairs, unit)
        return loglik.mean(0) - kl_to_prior(mean, lower)

    rows = []
    for number in range(rounds):
        e = noise(n_draws)
        optimizer = torch.optim.LBFGS(
            learned, max_iter=iterations, history_size=20, line_search_fn="strong_wolfe"
        )

        def loss(e: Tensor = e, optimizer: torch.optim.Optimizer = optimizer) -> Tensor:
            optimizer.zero_grad()
            value = -(bounds(e).sum() + experts.log_prior()) / len(pairs)
            value.backward()
            return value

        optimizer.step(loss)  # type: ignore[arg-type]
        with torch.no_grad():
            bound = float(bounds(e).sum())
        prior = float(experts.log_prior().detach())
        row = {"round": number, "elbo": bound, "objective": bound + prior}
        rows.append({k: v if k == "round" else v / len(pairs) for k, v in row.items()})
    for one in learned:
        one.grad = None
    with torch.no_grad():
        mean, lower = (one.detach() for one in posteriors(wins))
        e = noise(max(2, importance_draws // 2 * 2))
        shifts = mean + torch.einsum("uij,suj->sui", lower, e)
        loglik = shifted_log_likelihood(experts.rewards, shifts, pairs, unit)
        log_det = lower.diagonal(dim1=1, dim2=2).log().sum(1)
        ratio = loglik - shifts.square().sum(2) / 2 + e.square().sum(2) / 2 + log_det
        return GaussianFit(
            mean,
            lower,
            loglik.mean(0) - kl_to_prior(mean, lower),
            ratio.logsumexp(0) - math.log(len(e)),
            posteriors,
            pd.DataFrame(rows),
        )


def shifted_log_likelihood(
    rewards: Float[Tensor, "basis answers"],
    shifts: Float[Tensor, "draws users shifts"],
    pairs: Int[Tensor, "pairs 2"],
    unit: Int[Tensor, "pairs"],
) -> Float[Tensor, "draws users"]:
    """sum_{n in u} log sigma(D_an) of every draw and user, nats; gradients flow."""
    difference = (rewards[:, pairs[:, 0]] - rewards[:, pairs[:, 1]]).T
    margin = (translated(shifts)[:, unit] * difference).sum(2)
    loglik = F.logsigmoid(margin)
    return loglik.new_zeros(shifts.shape[:2]).index_add(1, unit, loglik)
