"""How noisy is a relaxed gradient?"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from torch import Tensor

from ..data.pairs import Pairs
from ..policy.mixture import MixturePolicy
from .config import FitConfig
from .inference import Exact, Inference, Relaxed
from .trainer import MixDPOTrainer


def gradient_error(
    policy: MixturePolicy, train: Dataset | Pairs, config: FitConfig, n_draws: int = 8
) -> dict[str, float]:
    """How far the gradient of relaxed draws is from the exact one, at these experts, on one batch of training pairs.

    With g_i the experts' gradient of draw i and g the exact one: `bias` = |mean g_i - g| / |g|, which holds noise of
    size `noise` / sqrt(n_draws) as well, and `noise` = sqrt(mean |g_i - mean g_i|^2) / |g|. Responsibilities are at
    temperature 1.

    Parameters
    ----------
    config : with inference=Relaxed(...), whose temperature, n_samples and hard are measured.
    n_draws : >= 2.

    Raises
    ------
    ValueError : another kind of inference, too few draws.
    """
    if not isinstance(config.inference, Relaxed) or n_draws < 2:
        raise ValueError(
            f"inference={config.inference}, n_draws={n_draws}: expected Relaxed(...), and at "
            "least 2 draws to see their spread"
        )
    config = config.change(start__temperature=1.0, start__kind="none", evaluate_training=True)
    data = policy.prepare(train)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = MixDPOTrainer(policy, data, config, Path(scratch))
        learner = trainer.learner
        trainer.measure()
        batch = next(iter(trainer.get_train_dataloader()))["parts"][0]
        learner.eval()

        def gradient(inference: Inference, step: int) -> Tensor:
            learner.inference = inference.part(learner.table, data, policy.base, config.seed)
            learner.steps.fill_(step)  # draws are seeded by the step
            policy.zero_grad()
            learner(**batch)["loss"].backward()
            return torch.cat(
                [p.grad.flatten() for p in policy.experts.parameters() if p.grad is not None]
            )

        exact = gradient(Exact(), 0)
        draws = torch.stack([gradient(config.inference, step) for step in range(n_draws)])
        policy.zero_grad()
    mean, size = draws.mean(0), float(exact.norm())
    noise = float((draws - mean).square().sum(1).mean().sqrt())
    return {"bias": float((mean - exact).norm()) / size, "noise": noise / size}
