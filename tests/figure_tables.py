"""Made-up tables for every figure, with names as long as the study's."""

import numpy as np
import pandas as pd

GROUPS = ["sentiment", "informativeness", "grammar"]
SEEDS = [0, 1, 2, "mean"]


def accuracy(methods: list[tuple[str, str]], groups: list[str], **more) -> pd.DataFrame:
    rows = []
    for m, (method, routing) in enumerate(methods):
        for g, group in enumerate(groups):
            for seed in SEEDS:
                value = 0.56 + 0.03 * m + 0.01 * g + 0.004 * (0 if seed == "mean" else seed)
                rows.append(
                    {
                        "method": method,
                        "routing": routing,
                        "group": group,
                        "seed": seed,
                        "n_pairs": 2519,
                    }
                )
                rows[-1] |= {"accuracy": value, "low": value - 0.02, "high": value + 0.03, **more}
    return pd.DataFrame(rows)


SINGLE = [("dpo", "none"), ("dpo_plain", "none"), ("dpo_rank_3r", "none")]
MIXTURES = [(m, r) for m in ("mix_dpo", "mix_dpo_pair") for r in ("prior", "own_pairs", "oracle")]
BY_GROUP = accuracy(SINGLE + MIXTURES, [*GROUPS, "mean", "worst"], design="default", users="seen")
METHODS = ("dpo", "dpo_rank_2r", "mix_dpo", "moe_dpo", "dpo_last_step", "moe_dpo_top_1", "oracle")
BY_DOMAIN = accuracy([(m, "none") for m in METHODS], ["book", "film", "mean", "worst"])
CAPACITIES = (
    "head, rank 1",
    "head, rank 32",
    "adapters, 1 block, rank 8",
    "adapters, 4 blocks, rank 8",
)
BY_CAPACITY = pd.concat(
    accuracy([("dpo", "none"), ("mix_dpo", "none")], ["mean"], base="smollm2-135m", capacity=name)
    for name in CAPACITIES
)
HISTORY = pd.DataFrame(
    {
        "method": m,
        "seed": s,
        "pairs_seen": 12_000 * t,
        "validation_loglik": -0.69 + 0.02 * t + 0.003 * s,
    }
    for m in ("mix_dpo", "mix_dpo_pair")
    for s in range(3)
    for t in range(6)
)
SETTINGS = pd.DataFrame(
    {"setting": name, "seed": seed, "NMI": 0.3 + 0.05 * k, "low": 0.2, "high": 0.6}
    for k, name in enumerate(("exact", "relaxed, τ = 0.2", "recognition, effective_experts"))
    for seed in SEEDS
)
CURVES = pd.DataFrame(
    {"K": k, "nats": -26 + k / 10 + s / 20, "inference": name}
    for k in range(1, 9)
    for s in range(3)
    for name in ("Bayes rule", "latent per unit", "latent per pair")
)
CALIBRATION = pd.DataFrame(
    {
        "method": m,
        "probability": p,
        "frequency": p**2,
        "low": 0.8 * p**2,
        "high": 0.3 + 0.7 * p**2,
        "n": 9,
    }
    for m in ("moe_dpo", "supervised")
    for p in np.linspace(0.05, 0.95, 10)
)
PAIRS = pd.DataFrame(
    {"design": ["default", "clean"] * 500, "score_difference": np.tan(np.linspace(-1, 1.4, 1000))}
)
MATRIX = pd.DataFrame(
    {"group_a": a, "group_b": b, "agreement": 1.0 if a == b else 0.53, "n_pairs": 4191}
    for a in GROUPS
    for b in GROUPS
)
Q = pd.DataFrame(
    np.eye(3).repeat(8, 0), index=pd.Index([f"user{i:03d}" for i in range(24)], name="user")
)
LONG_Q = pd.DataFrame(
    {
        "user": user,
        "group": GROUPS[i // 8],
        "expert": k,
        "expert_serves": GROUPS[k],
        "responsibility": Q.iloc[i, k],
    }
    for i, user in enumerate(Q.index)
    for k in range(3)
)
RECOVERY = pd.DataFrame(
    {
        "design": d,
        "method": m,
        "seed": s,
        "n_users": 60,
        "nmi": 0.3 + s / 9,
        "ari": 0.4,
        "aligned_accuracy": 0.6,
    }
    for d in ("default", "clean")
    for m in ("mix_dpo", "mix_dpo_pair")
    for s in range(3)
)
GAINS = pd.DataFrame(
    {
        "policy": p,
        "reward": r,
        "n": 1620,
        "kl": 5.9,
        "gain_over_dpo": i - 2,
        "gain_low": i - 2.4,
        "gain_high": i - 1.7,
    }
    for i, p in enumerate(
        (
            "base",
            "dpo",
            "dpo_plain",
            *(f"expert_{g}" for g in GROUPS),
            "base_sharpened",
            "dpo_sharpened",
        )
    )
    for r in GROUPS
)
SHARPNESS = pd.DataFrame(
    {"design": "default", "method": m, "seed": s, "served": g, "sharpness": 0.1 * i - 0.05 + s / 50}
    for m, served in (
        ("dpo", ["all"]),
        ("dpo_plain", ["all"]),
        ("dpo_rank_3r", ["all"]),
        ("mix_dpo", GROUPS),
        ("mix_dpo_pair", [*GROUPS[:2], "nobody"]),
    )
    for i, g in enumerate(served)
    for s in range(3)
)
SERVED = pd.DataFrame(
    {
        "served_by": way,
        "m": m,
        "accuracy": 0.66 + i / 50,
        "accuracy_low": 0.62,
        "accuracy_high": 0.79,
    }
    for i, way in enumerate(("dpo", "oracle", "pairs", "metadata", "gate"))
    for m in ((0,) if way in ("dpo", "oracle") else (0, 1, 2, 4, 8, 16, 32, 64))
)
JUDGES = [f"{reward}/{role}" for role in ("training", "evaluation") for reward in GROUPS]
AGREEMENT = pd.DataFrame(
    {
        "first": a,
        "second": b,
        "kind": "one reward" if a[:4] == b[:4] != a else "two rewards",
        "spearman": -0.19,
    }
    for a in JUDGES
    for b in JUDGES
)
VALIDITY = pd.DataFrame(
    {
        "reward": "grammar",
        "judge": j,
        "measure": "paired rank",
        "task": t,
        "value": 0.9,
        "low": 0.8,
        "high": 0.95,
    }
    | {"bar": 0.85 if t == "spelling" else None}
    for j in ("training", "evaluation")
    for t in ("spelling", "swapped_neighbours", "dropped_article", "all kinds")
)
PROBES = pd.DataFrame(
    {"reward": r, "judge": j, "probe": p, "effect": e, "size": abs(e)}
    for r in GROUPS
    for j in ("training", "evaluation")
    for p, e in (("negation", 0.1), ("one_word_repeated", -109.0), ("lower_case", -2.1))
)
ANGLES = np.linspace(0, 2 * np.pi, 33)[:-1]
USERS_ON_CIRCLE = pd.DataFrame({"true": ANGLES, "found": ANGLES + 0.1 * np.sin(range(32))})
SAID_BY_ANGLE = pd.DataFrame(
    {"angle": np.degrees(ANGLES)}
    | {f"Sentence {i}, of some length for a row.": np.cos(ANGLES + i) ** 2 / 6 for i in range(12)}
)
SCORES = pd.DataFrame(
    {
        "reward": "informativeness",
        "judge": "evaluation",
        "unit": "mean rating, -1 to 1",
        "score": np.sin(range(90)),
    }
)
FIELD = (
    "dpo",
    "dpo_metadata",
    "uniform",
    "hard_clusters",
    "translations",
    "mix_dpo",
    "robust",
    "soup",
    "oracle",
)
BY_METHOD = accuracy([(m, "none") for m in FIELD], ["mean", "worst"])
FRONTS = pd.DataFrame(
    {
        "method": m,
        "front": f,
        "factor": c,
        "kl": 4.4 * c**1.7,
        "gain": (i - 2) * c / 4,
        "low": (i - 2) * c / 4 - 0.1,
        "high": (i - 2) * c / 4 + 0.1,
        "n": 100,
    }
    for i, m in enumerate(("dpo", "hard_clusters", "soup", "mix_dpo"))
    for f in (*GROUPS, "worst")
    for c in (0.25, 0.5, 1.0, 1.5)
)
