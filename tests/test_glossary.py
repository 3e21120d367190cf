"""The glossary: everything that is logged or quoted stands there, and nothing that is not."""

import re

import pytest
from tiny import preference_rows

import mixdpo_lib as mx
from mixdpo_lib import store
from mixdpo_lib.runner import results

PAGE = (store.project_root() / "docs" / "glossary.md").read_text(encoding="utf-8")


def names(section):
    """Patterns of the names in a section's first column: `kl_{policy}` is any kl_...."""
    rows = re.findall(r"^\| (`[^|]+) \|", PAGE.split(f"\n## {section}")[1].split("\n## ")[0], re.M)
    found = [name for row in rows for name in re.findall(r"`([^`]+)`", row)]
    assert len(set(found)) == len(found) > 4
    return {name: re.sub(r"\\{[^}]*\\}", ".+", re.escape(name)) for name in found}


def unknown(logged, patterns):
    return [n for n in logged if not any(re.fullmatch(p, n) for p in patterns.values())]


def unused(logged, patterns):
    return [name for name, p in patterns.items() if not any(re.fullmatch(p, n) for n in logged)]


@pytest.fixture
def histories(tiny_base):
    """Columns of fits that together log everything."""
    pairs = preference_rows(24)
    logged = set()
    users = mx.UserGate.from_metadata({"user": [f"user{u}" for u in range(4)]}, 2)
    for gate, options in (
        (mx.LearnedWeights(2), {"inference": mx.Recognition()}),
        (users, {"routing": mx.Routing(top_s=1)}),
    ):
        policy = mx.MixturePolicy(mx.HeadExperts(tiny_base, 2, rank=2), gate)
        config = mx.FitConfig(latent="pair", passes=0.5, min_steps=0, batch_size=8, **options)
        logged |= set(mx.fit(policy, pairs, config, validation=pairs).history)
    return logged


def test_every_logged_quantity_is_explained(histories):
    patterns = names("What a fit logs")
    assert unknown(histories, patterns) == []
    assert unused(histories, patterns) == []


def test_every_quantity_of_full_batch_em_is_explained():
    first, second = ["tea", "tea", "milk"] * 4, ["milk", "juice", "juice"] * 4
    experts, votes = mx.TabularExperts.from_pairs(
        first, second, first, n_experts=2, user=[row // 3 for row in range(12)]
    )
    logged = set(mx.fit_table(mx.MixturePolicy(experts, mx.LearnedWeights(2)), votes).history)
    own = names("What EM over tables logs")
    assert unknown(logged, own | names("What a fit logs")) == [] and unused(logged, own) == []


def test_every_quoted_value_is_explained():
    quoted, patterns = results.load_values("reference"), names("What the study quotes")
    assert len(quoted) > 90
    assert unknown(quoted, patterns) == []
    of_beyond = {"circle_error_ratio", "circle_ahead"}  # its notebooks' values, once they are there
    assert set(unused(quoted, patterns)) <= of_beyond


@pytest.mark.parametrize("notebook", ["11_real_people", "12_baselines"])
def test_columns_of_other_peoples_tables_are_explained(notebook):
    folder = store.project_root() / "figures" / "reference" / notebook / "tables"
    columns = {
        name
        for path in folder.glob("*.csv")
        for name in path.read_text().splitlines()[0].split(",")
        if not re.fullmatch(r"(expert )?\d+", name)
    }
    assert len(columns) > 15
    known = names("Columns of notebooks 11 and 12") | names("Columns that many tables share")
    assert unknown(columns, known) == []
