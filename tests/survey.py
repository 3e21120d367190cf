"""A survey as surveys are: who prefers which of five parties, in all ten pairs; two covariates, some ties.

`python tests/survey.py` writes data/survey.csv: 200 people of three groups, whose shares follow age and region.
"""

import csv
from itertools import combinations
from pathlib import Path

import numpy as np

FILE = Path(__file__).with_name("data") / "survey.csv"
PARTIES = ("Amber", "Birch", "Coral", "Delta", "Ember")
REWARDS = np.array(  # of each group
    [[1.5, 0.8, 0.0, -0.8, -1.5], [-1.5, -0.4, 1.0, 1.4, -0.5], [0.0, -1.6, -0.9, 0.7, 1.8]]
)
REGIONS = ("north", "south", "west")
TIES = 0.03


def made():
    """Rows of texts, as the file has them."""
    rng, rows = np.random.default_rng(0), []
    for person in range(200):
        age, region = int(rng.integers(18, 80)), int(rng.integers(3))
        taste = np.array([0.0, (age - 49) / 12, 1.2 * (region == 2) - 0.3])
        group = rng.choice(3, p=np.exp(taste) / np.exp(taste).sum())
        for a, b in combinations(range(5), 2):
            a, b = (a, b) if rng.random() < 0.5 else (b, a)
            wins = rng.random() < 1 / (1 + np.exp(REWARDS[group, b] - REWARDS[group, a]))
            winner = "tie" if rng.random() < TIES else PARTIES[a if wins else b]
            names = (f"p{person:03}", PARTIES[a], PARTIES[b], winner)
            rows.append([*names, str(age), REGIONS[region]])
    return rows


def columns():
    """The file by column; ages are numbers of numpy, as a data frame has them."""
    with FILE.open(newline="") as file:
        rows = list(csv.DictReader(file))
    read = {name: [row[name] for row in rows] for name in rows[0]}
    return {**read, "age": list(np.array([int(age) for age in read["age"]]))}


if __name__ == "__main__":
    with FILE.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(
            [["person", "first", "second", "winner", "age", "region"], *made()]
        )
