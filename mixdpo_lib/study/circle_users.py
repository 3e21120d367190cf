"""What if tastes are no kinds? Users at every angle between two rewards and their opposites."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import ClassVar

import numpy as np
import pandas as pd
import torch
from datasets import Dataset, DatasetDict

from ..data.pairs import Pairs
from ..elbo import correct
from ..evaluation import align_circle
from ..experts.group_heads import GroupHeads
from ..experts.heads import HeadExperts
from ..gates.contract import Gate
from ..gates.direction import DirectionGate
from ..gates.weights import LearnedWeights
from ..learning.config import FitConfig
from ..policy.mixture import MixturePolicy
from ..store import hash_seed
from .fits import Fitted
from .review_users import ReviewUsers, ReviewUsersConfig
from .simulated_people import DesignConfig, is_flipped, label_temperature, untied_pairs

AXES = ("sentiment", "informativeness")  # the rewards at 0 and at 90 degrees
TOLD = ("toward_0", "toward_90")  # cosine and sine of the user's angle
SURE = 200.0  # concentration of a gate that is told the angle: .07 radians


def simulate_circle(
    candidates: pd.DataFrame,
    scores: pd.DataFrame,
    config: DesignConfig,
    splits: Mapping[str, range],
    test_pairs: int = 100,
) -> DatasetDict:
    """Preference sets of users whose reward is cos t z_1 + sin t z_2, z the two scores standardised over all candidates.

    Angles t cover the circle evenly: user n has 2 pi (n + a random share) / n_users, in random order.

    Parameters
    ----------
    candidates, config, splits : as in `simulate_preferences`; `flip_rate` is the mean over pairs and angles.
    scores : two columns, one row a candidate.
    test_pairs : noise-free answers of each user on test prompts.

    Returns
    -------
    train, validation, test; beside the usual columns `angle` (radians), `toward_0` and `toward_90`, its cosine and sine.

    Raises
    ------
    ValueError : other than two columns of scores; fewer pairs than a user shall answer.
    """
    if scores.shape[1] != 2:
        raise ValueError(
            f"scores: found the columns {list(scores.columns)}, expected two: a circle lies between two rewards"
        )
    z = ((scores - scores.mean()) / scores.std(ddof=0)).to_numpy(float)
    by_prompt = candidates.groupby("prompt_id").indices
    rng = np.random.default_rng(hash_seed(config.seed, "circle", config.name))
    order = np.arange(
        len(candidates), dtype=float
    )  # each pair once; the reward says which is better
    pairs = {
        split: np.array(
            [
                p
                for i in prompts
                for p in untied_pairs(order, [int(j) for j in by_prompt.get(i, [])])
            ]
        ).reshape(-1, 2)
        for split, prompts in splits.items()
    }
    turns = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    both = z[pairs["train"][:, 0]] - z[pairs["train"][:, 1]]
    temperature = label_temperature(
        (both @ np.stack([np.cos(turns), np.sin(turns)])).ravel(), config.flip_rate
    )
    angles = 2 * np.pi * (rng.permutation(config.n_users) + rng.random(config.n_users))
    text, prompt = candidates["response"].to_list(), candidates["prompt"].to_list()
    number = candidates["prompt_id"].to_list()
    rows: dict[str, list[dict[str, object]]] = {"train": [], "validation": [], "test": []}
    sizes = (config.pairs_per_user, config.validation_pairs_per_user, test_pairs)
    for n, angle in enumerate(angles / config.n_users):
        value = z @ np.array([np.cos(angle), np.sin(angle)])
        user = {"user": f"user{n:03d}", "group": "", "angle": float(angle)}
        user |= {TOLD[0]: float(np.cos(angle)), TOLD[1]: float(np.sin(angle))}
        for split, size in zip(rows, sizes, strict=True):
            if size > len(pairs[split]):
                raise ValueError(
                    f"{size} {split} pairs a user wanted, but there are {len(pairs[split])}: sample more prompts"
                )
            for at in rng.choice(len(pairs[split]), size, replace=False):
                a, b = (int(i) for i in pairs[split][at])
                better, worse = (a, b) if value[a] > value[b] else (b, a)
                gap = float(value[better] - value[worse])
                flipped = is_flipped(gap, temperature, None if split == "test" else rng)
                chosen, rejected = (worse, better) if flipped else (better, worse)
                row = {"prompt": prompt[a], "chosen": text[chosen], "rejected": text[rejected]}
                row |= {"ended": False, "prompt_id": int(number[a])}
                rows[split].append(row | user | {"flipped": flipped, "gap": gap})
    out = DatasetDict({name: Dataset.from_list(part) for name, part in rows.items()})
    for part in out.values():
        part.info.description = json.dumps(
            {"design": asdict(config), "label_temperature": temperature}
        )
    return out


@dataclass(frozen=True)
class CircleUsersConfig(ReviewUsersConfig):
    """Choices of the study, each the default of a notebook; see `ReviewUsersConfig`."""

    designs: tuple[str, ...] = ("default",)
    train_prompts: int = 490  # of the training prompts, the first
    n_nodes: int = 16  # to learn with
    served_nodes: int = 64  # to be served with
    test_pairs: int = 100  # noise-free answers of each user on test prompts


class CircleUsers(ReviewUsers):
    """Users on the circle of two rewards, and the policies that are compared on them.

    Methods: "dpo"; "mix_K", a free mixture of K heads; "circle", nodes of a circle of two heads; "told", the same with the
    angle of each user given.
    """

    default: ClassVar[CircleUsersConfig] = CircleUsersConfig()
    config: CircleUsersConfig

    def __init__(self, config: CircleUsersConfig | None = None) -> None:
        super().__init__(config)
        self.groups = ("",)

    @property
    def methods(self) -> dict[str, int]:  # type: ignore[override]
        """Experts of each method; of a circle its nodes."""
        free = {f"mix_{k}": k for k in range(2, 17)}
        return {"dpo": 1, **free, "circle": self.config.n_nodes, "told": self.config.n_nodes}

    def preferences(self, design: str, seed: int = 0) -> DatasetDict:
        """See `simulate_circle`."""
        splits = self.splits | {"train": self.splits["train"][: self.config.train_prompts]}
        scores, config = self.scores[list(AXES)], self.design(design, seed)
        return simulate_circle(self.candidates, scores, config, splits, self.config.test_pairs)

    def new_policy(self, method: str, train: Pairs) -> MixturePolicy:
        """An untrained policy of a method."""
        c, k = self.config, self.methods[method]
        gate: Gate = LearnedWeights(k)
        if method not in ("circle", "told"):
            return MixturePolicy(HeadExperts(self.base, k, **self.heads), gate, c.beta, c.lapse)
        gate = DirectionGate(k)
        if method == "told":
            gate = DirectionGate(k, dict.fromkeys(TOLD, (0.0, 1.0)))
            gate.weight.data = SURE * torch.eye(2)
        gate.requires_grad_(False)
        return MixturePolicy(GroupHeads(self.base, k, **self.heads), gate, c.beta, c.lapse)

    def fit_config(self, method: str, seed: int) -> FitConfig:
        """The study's; given angles part the basis by themselves."""
        config = replace(self.config.fit, seed=seed)
        return config.change(start__kind="none") if method == "told" else config

    def served(self, fitted: Fitted) -> MixturePolicy:
        """The policy as it is served: a circle at `served_nodes`."""
        policy, gate = fitted.policy, fitted.policy.gate
        if policy.n_experts == self.config.served_nodes:
            return policy
        if not (isinstance(policy.experts, GroupHeads) and isinstance(gate, DirectionGate)):
            return policy
        policy.experts.use_nodes(self.config.served_nodes)
        gate = gate.at_nodes(self.config.served_nodes)
        return MixturePolicy(policy.experts, gate, policy.beta, policy.given_lapse)

    def scores_of(self, fitted: Fitted) -> dict[str, float]:
        """Accuracy on noise-free test pairs and likelihood of validation pairs, each user by the own training pairs."""
        policy, sets = self.served(fitted), self.pairs(fitted.design, fitted.seed)
        ids = torch.unique(torch.cat([part.index for part in sets.values()]))
        rewards = policy.text_rewards(self.texts, ids)
        log_q, names = policy.log_posterior(sets["train"], "user", rewards)
        place = {name: i for i, name in enumerate(names)}

        def by_own_pairs(split: str) -> torch.Tensor:
            of = torch.tensor([place[name] for name in sets[split].rows["user"]])
            return (policy.loglik(sets[split], rewards) + log_q[of]).logsumexp(1)

        hits = correct(by_own_pairs("test").exp()).double()
        row = {
            "accuracy": float(hits.mean()),
            "validation_loglik": float(by_own_pairs("validation").mean()),
        }
        if policy.experts.nodes is not None:
            angle = dict(zip(sets["train"].rows["user"], sets["train"].rows["angle"], strict=True))
            true, taste = np.array([angle[name] for name in names]), policy.taste(log_q)
            found = align_circle(taste.direction.numpy(), true)
            row["cosine"] = float(np.cos(found - true).mean())
        return row
