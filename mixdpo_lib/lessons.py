"""What happens if one turns this? Pictures of the theory notebooks whose numbers can be pulled, on generated data."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from . import elbo, figures
from .evaluation import recovery
from .experts.tables import TabularExperts
from .gates.weights import LearnedWeights
from .learning.full_batch import full_batch_em
from .learning.starts import random_log_q

N_ANSWERS = 12  # of the generated users' pairs
N_GROUPS = 3
REWARD_SCALE = 2.0  # standard deviation of the true rewards
Range = tuple[float, float, float, float] | tuple[int, int, int, int]


def sliders(draw: Callable[..., None], **ranges: Range) -> Any:
    """A picture with a slider for each of its numbers; without anybody to pull them, the picture of the first values.

    Nobody is there in a recorded run (`mixdpo run`), and where ipywidgets is not installed.

    Parameters
    ----------
    draw : makes one figure with matplotlib from numbers given by name.
    ranges : name = (lowest, highest, step, first); whole numbers give a slider of whole numbers.

    Raises
    ------
    ValueError : a first value outside its range.
    """
    for name, (low, high, step, first) in ranges.items():
        if not low <= first <= high or step <= 0:
            raise ValueError(
                f"sliders: {name}=({low}, {high}, {step}, {first}): expected (lowest, highest, step above 0, "
                "first) with first between the two"
            )
    firsts = {name: one[3] for name, one in ranges.items()}
    try:
        if os.environ.get("MIXDPO_PROFILE"):
            raise ModuleNotFoundError
        import ipywidgets
    except ModuleNotFoundError:
        _drawn(draw, **firsts)
        return None
    controls = {}
    for name, (low, high, step, first) in ranges.items():
        whole = all(isinstance(one, int) for one in (low, high, step, first))
        kind = ipywidgets.IntSlider if whole else ipywidgets.FloatSlider
        controls[name] = kind(
            first, min=low, max=high, step=step, description=name, continuous_update=False
        )
    picture = ipywidgets.interactive_output(lambda **values: _drawn(draw, **values), controls)
    return ipywidgets.VBox([*controls.values(), picture])


def _drawn(draw: Callable[..., None], **values: Any) -> None:
    from matplotlib import pyplot as plt

    draw(**values)
    plt.show()
    plt.close()


# ------------------------------------------------------------------- 1: from Bradley-Terry to mixtures
def two_quantities(w: float, first: float, second: float) -> None:
    """p(a preferred to b) by two experts, against the weight of the first: mixture of models, and model of the mixture.

    Parameters
    ----------
    w : weight of the first expert, in (0, 1), a line. first, second : how much more the first expert gives to a, and
        the second to b, logits.
    """
    weights = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    log_w = torch.stack([weights, 1 - weights], 1).log()
    a, b = torch.tensor([[first, -second], [0.0, 0.0]]).double()
    mixture = elbo.mixture_log_likelihood(logsigmoid(a - b).expand(99, 2), log_w).exp()
    one = torch.sigmoid((log_w + a).logsumexp(1) - (log_w + b).logsumexp(1))
    named = {"mixture of Bradley-Terry models": mixture, "Bradley-Terry on the mixture reward": one}
    rows = [
        pd.DataFrame({"w": weights, "p(a > b)": p, "quantity": name}) for name, p in named.items()
    ]
    _, ax = figures.subplots("column")
    at = int((weights - w).abs().argmin())
    x = "weight of the first expert\n"
    x += f"(at the line: {float(mixture[at]):.2f} and {float(one[at]):.2f})"
    figures.curves(pd.concat(rows), ax, "w", "p(a > b)", "quantity", x, "p(a is preferred to b)")
    ax.axvline(w, color="black", linestyle=":")
    ax.set(ylim=(-0.03, 1.03), xticks=np.linspace(0, 1, 6))


@lru_cache(maxsize=32)
def _cycle(n_experts: int) -> tuple[list[float], Tensor, Tensor]:
    majority = torch.tensor([[0, 1], [1, 2], [2, 0]])
    comparisons = torch.cat([majority.repeat(200, 1), majority.flip(1).repeat(100, 1)])
    experts, gate = TabularExperts(3, n_experts, prior_scale=10.0), LearnedWeights(n_experts)
    full_batch_em(
        experts, gate, comparisons, symmetry_breaking="random_heads", restarts=4, max_iter=200
    )
    said = elbo.mixture_log_likelihood(experts.loglik(majority).detach(), gate()).exp()
    return said.tolist(), experts.rewards.detach().clone(), gate().exp()[0]


def cycle(K: int) -> None:
    """What K experts say of a two-thirds majority cycle, and the rewards by which each of them says it.

    K : experts, at least 1.
    """
    said, rewards, weights = _cycle(K)
    _, (left, right) = figures.subplots("page", columns=2, height=2.4)
    pairs = ["a > b", "b > c", "c > a"]
    table = pd.DataFrame({"pair": pairs, "probability": said})
    figures.points(table, left, "pair", "probability")
    left.axhline(2 / 3, color="black", linestyle=":")
    left.set(ylim=(0.45, 0.72), xlabel="", ylabel="probability of\nthe majority's choice")
    rewards = rewards.reshape(K, -1)
    rewards = rewards - rewards.mean(1, keepdim=True)
    long = pd.DataFrame(
        [
            {
                "answer": "abc"[i],
                "reward": float(r),
                "expert": f"expert {k}, w = {weights[k]:.2f}",
            }
            for k, row in enumerate(rewards)
            for i, r in enumerate(row)
        ]
    )
    figures.points(long, right, "answer", "reward", "expert")
    right.set(ylabel="reward (centred)", xlabel="answer")


# ----------------------------------------------------------------------------- 2: EM and the bound
def generated_users(
    pairs_per_user: int, reward_scale: float, seed: int, n_users: int = 60
) -> tuple[TabularExperts, list[str], Tensor, Tensor, Tensor]:
    """Users of three hidden groups: the true experts, the group of each user, pairs, their units, the groups' log shares."""

    def draw(i: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed + 1000 * i)

    truth = TabularExperts(N_ANSWERS, N_GROUPS, prior_scale=reward_scale)
    truth.perturb(reward_scale, draw(0))
    belongs = torch.randint(N_GROUPS, (n_users,), generator=draw(1))
    pairs, unit = truth.sample_pairs(belongs, pairs_per_user, draw(2))
    share = (torch.bincount(belongs, minlength=N_GROUPS) / n_users).double().log()
    return truth, [f"group {k + 1}" for k in belongs.tolist()], pairs, unit, share


@lru_cache(maxsize=32)
def em_path(T: float, seed: int, n_steps: int = 12) -> tuple[pd.DataFrame, list[Tensor]]:
    """Bound and likelihood after every M- and E-step, nats per pair, and the responsibilities then.

    Parameters
    ----------
    T : temperature of the first responsibilities, at least 1; it falls to 1 in the first half of the steps.
    seed : of the random responsibilities at the start.
    """
    _, groups, pairs, unit, _ = generated_users(12, REWARD_SCALE, 0)
    experts, gate = TabularExperts(N_ANSWERS, N_GROUPS), LearnedWeights(N_GROUPS).double()
    log_q, rows, path = random_log_q(len(groups), N_GROUPS, seed), [], []
    for half in range(2 * n_steps):
        temperature = max(1.0, T ** (1 - half / n_steps))
        if half % 2 == 0:
            experts.m_step(pairs, log_q.exp()[unit])
            gate.update(log_q.exp().mean(0), n_units=len(groups))
        else:
            loglik = experts.loglik(pairs).detach()
            log_q = elbo.log_responsibilities(loglik / temperature, gate(), unit)
        loglik = experts.loglik(pairs).detach()
        total = float(elbo.mixture_log_likelihood(loglik, gate(), unit).sum()) / len(pairs)
        bound = float(elbo.elbo_terms(loglik, gate(), log_q, unit).elbo.sum()) / len(pairs)
        rows += [
            {"step": half, "quantity": "log-likelihood", "nats per pair": total},
            {"step": half, "quantity": "bound", "nats per pair": bound},
        ]
        path.append(log_q)
    return pd.DataFrame(rows), path


def em_steps(step: int, T: float, seed: int) -> None:
    """EM up to a step: bound and likelihood so far, and who is thought to belong to which expert.

    Parameters
    ----------
    step : even: an M-step, odd: an E-step. T, seed : see `em_path`.
    """
    table, path = em_path(T, seed)
    groups = generated_users(12, REWARD_SCALE, 0)[1]
    _, (left, right) = figures.subplots("page", columns=2, height=2.4)
    whole = table["nats per pair"]
    figures.curves(
        table[table["step"] <= step],
        *(left, "step", "nats per pair", "quantity", "step (even: M, odd: E)"),
    )
    left.set(xlim=(-0.5, table["step"].max() + 0.5))
    left.set_ylim(max(whole.min(), -1.0) - 0.02, whole.max() + 0.03)
    ticks = range(0, int(table["step"].max()) + 1, 4)
    left.set_xticks(ticks, [str(tick) for tick in ticks])
    q = pd.DataFrame(path[step].exp().numpy())
    nmi = recovery(q, groups)["nmi"]
    q.index.name = "user"
    figures.responsibility_map(q, right, pd.Series(groups))
    right.set_title(f"{'M' if step % 2 == 0 else 'E'}-step; NMI with the groups {nmi:.2f}")


# ------------------------------------------------------------------------------ 3: Gumbel-Softmax
def relaxation(log_tau: float, log_q: float, K: int) -> None:
    """The relaxed objective against the temperature, beside bound and likelihood, and what a relaxed draw looks like.

    Parameters
    ----------
    log_tau : log10 of the temperature that is looked at, a line.
    log_q : log of the responsibility of the first expert, nats, below 0; the others share the rest. It is the weight w
        of each as well.
    K : experts, at least 2. The first has log sigma(D) = -1, the others 0.
    """
    q = float(np.exp(log_q))
    log_w = torch.tensor([q, *[(1 - q) / (K - 1)] * (K - 1)]).double().log()
    loglik = torch.tensor([[-1.0, *[0.0] * (K - 1)]]).double()
    known = {
        "log-likelihood": float(elbo.mixture_log_likelihood(loglik, log_w)),
        "bound at this q": float(elbo.elbo_terms(loglik, log_w, log_w[None]).elbo),
    }
    rows = []
    for tau in np.geomspace(0.05, 5.0, 13):
        draw = torch.Generator().manual_seed(0)
        soft = elbo.relaxed_objective(
            loglik, log_w, log_w[None], float(tau), n_samples=4000, generator=draw
        )
        values = {"relaxed objective": float(soft), **known}
        rows += [{"tau": tau, "quantity": name, "nats": v} for name, v in values.items()]
    _, (left, right) = figures.subplots("page", columns=2, height=2.4)
    figures.curves(pd.DataFrame(rows), left, "tau", "nats", "quantity", "temperature τ")
    left.set_xscale("log")
    ticks = [0.05, 0.2, 1.0, 5.0]
    left.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    left.axvline(10**log_tau, color="black", linestyle=":")
    draw = torch.Generator().manual_seed(1)
    z = elbo.gumbel_softmax_samples(log_w[None], 10**log_tau, n_samples=4000, generator=draw)
    share = z.reshape(-1, K)[:, 0].numpy()
    right.hist(share, bins=np.linspace(0, 1, 31), color=figures.look.COLOURS[0])
    right.axvline(q, color="black", linestyle=":")
    right.set(xlabel="first expert's share of a draw", ylabel="draws of 4,000")
    right.set_title(f"τ = {10**log_tau:.2f}: mean {share.mean():.2f}, q = {q:.2f}")


# ------------------------------------------------------------------------------ 4: who answered?
@lru_cache(maxsize=32)
def _found(pairs_per_user: int, noise: float, seed: int) -> tuple[pd.DataFrame, list[str], float]:
    scale = REWARD_SCALE / noise
    truth, groups, pairs, unit, share = generated_users(pairs_per_user, scale, seed, 120)
    experts = TabularExperts(N_ANSWERS, N_GROUPS, prior_scale=scale)
    gate = LearnedWeights(N_GROUPS)
    full_batch_em(
        experts,
        gate,
        pairs,
        unit,
        restarts=2,
        start_temperature=max(1.0, pairs_per_user / 4),
        max_iter=60,
        tolerance=1e-6,
    )
    q = elbo.log_responsibilities(experts.loglik(pairs).detach(), gate(), unit).exp()
    best = elbo.log_responsibilities(truth.loglik(pairs).detach(), share, unit).exp()
    frame = pd.DataFrame(q.detach().numpy())
    frame.index.name = "user"
    return frame, groups, recovery(pd.DataFrame(best.numpy()), groups)["nmi"]


def who_answered(pairs_per_user: int, noise: float, seed: int) -> None:
    """Whom EM takes for whom, with so many pairs a user and so noisy answers, beside the best possible.

    Parameters
    ----------
    noise : 1 is as in the notebook; twice as much halves the differences of the true rewards.
    """
    q, groups, best = _found(pairs_per_user, noise, seed)
    _, ax = figures.subplots("page", height=2.0)
    figures.responsibility_map(q, ax, pd.Series(groups))
    nmi = recovery(q, groups)["nmi"]
    ax.set_title(
        f"NMI with the groups {nmi:.2f}; of the Bayes rule, which knows the rewards, {best:.2f}"
    )
