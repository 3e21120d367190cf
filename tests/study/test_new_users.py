"""Serving new users: what is closed of the way from DPO to the oracle, and gains of mixed membership, by hand."""

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from mixdpo_lib.study import figures as study_figures
from mixdpo_lib.study.new_users import share_closed, summarise_blends


def by_prompt(values):
    """One prompt an entry and group, one pair each, equal accuracy on every prompt."""
    rows = [
        {
            "served_by": name,
            "m": m,
            "seed": 0,
            "group": group,
            "prompt_id": prompt,
            "accuracy": value,
            "n_pairs": 4,
        }
        for (name, m), value in values.items()
        for group in ("sentiment", "grammar")
        for prompt in range(5)
    ]
    return pd.DataFrame(rows)


VALUES = {
    ("dpo", 0): 0.5,
    ("oracle", 0): 0.75,
    ("pairs", 0): 0.5,
    ("pairs", 16): 0.7,
    ("metadata", 0): 0.6,
}


def test_the_share_of_the_way_that_is_closed():
    table = share_closed(by_prompt(VALUES)).set_index(["served_by", "m"])
    assert table.loc[("pairs", 16), "share"] == pytest.approx(0.8)
    assert table.loc[("metadata", 0), "share"] == pytest.approx(0.4)
    assert table.loc[("metadata", 0), "gain"] == pytest.approx(0.1)
    assert table.loc[("oracle", 0), ["share", "share_low", "share_high"]].tolist() == pytest.approx(
        [1, 1, 1]
    )
    assert table.loc[("dpo", 0), ["gain", "gain_low", "gain_high"]].tolist() == pytest.approx(
        [0, 0, 0]
    )


def test_the_figure_of_own_pairs_has_a_curve_a_way_and_two_lines():
    fig, ax = plt.subplots()
    study_figures.accuracy_by_own_pairs(share_closed(by_prompt(VALUES)), ax)
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert (
        "DPO, one policy" in labels
        and "oracle: one DPO a hidden group" in labels
        and len(labels) == 4
    )
    (curve,) = [line for line in ax.lines if list(line.get_ydata()) == pytest.approx([0.5, 0.7])]
    assert list(curve.get_xdata()) == pytest.approx([0, 1], abs=0.1)  # beside the other way's bars
    plt.close(fig)


def test_gains_of_mixed_membership_are_paired_over_prompts():
    rows = [
        {
            "served_by": name,
            "seed": seed,
            "prompt_id": prompt,
            "loglik": base + prompt / 10,
            "accuracy": 0.5,
        }
        for name, base in (("dpo", -0.7), ("one latent a user", -0.69), ("mixed membership", -0.66))
        for seed in (0, 1)
        for prompt in range(6)
    ]
    table = summarise_blends(pd.DataFrame(rows)).query("value == 'loglik'").set_index("served_by")
    for name, gain in (("dpo", 0.04), ("one latent a user", 0.03), ("mixed membership", 0.0)):
        row = table.loc[name]
        assert [row["gain_of_mixed"], row["gain_low"], row["gain_high"]] == pytest.approx(
            [gain] * 3
        ), name
        assert row["low"] < row["mean"] < row["high"] and row["n_prompts"] == 6
