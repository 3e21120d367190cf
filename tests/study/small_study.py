"""The study of review users on a tiny model with made-up judges."""

import numpy as np
import pandas as pd
from tiny import WORDS

from mixdpo_lib.study.review_users import ReviewUsers, review_users_config

PRESENT = {
    "sentiment": "good bright quick".split(),
    "informativeness": "actor scene music plot".split(),
    "grammar": "the a this that it".split(),
}


def judge(texts, _=None):
    """A group likes the texts with many of its words."""
    return pd.DataFrame(
        {
            g: [sum(t.split().count(w) for w in words) + len(t) * 1e-3 for t in texts]
            for g, words in PRESENT.items()
        },
        dtype=float,
    )


def small_study(kind, base, patch, passes=4.0):
    """A study of this class with 6 users and 40 prompts; what needs a network is set, what judges say is patched."""
    config = review_users_config(
        n_prompts=40,
        prompt_tokens=5,
        response_tokens=6,
        n_users=6,
        n_new_users=3,
        pairs_per_user=12,
        context_pairs=4,
        validation_pairs_per_user=3,
        flip_rate=0.0,
        rank=4,
        batch_size=12,
        passes=passes,
        learning_rate=0.05,
        beta=0.3,
    )
    rng = np.random.default_rng(0)
    study = kind(config)
    study.base = base
    study.prompts = [" ".join(rng.choice(WORDS, 4)) for _ in range(40)]
    study.judges = type("Judges", (), {"training": None, "evaluation": None})()
    patch.setattr(
        ReviewUsers,
        "judged",
        lambda _, prompts, responses, role: judge(
            [f"{a} {b}" for a, b in zip(prompts, responses, strict=True)]
        ),
    )
    return study
