"""Counts of units instead of pairs: the same fits."""

import pandas as pd
import pytest
import torch

from mixdpo_lib.experts.group_tables import GroupTables
from mixdpo_lib.experts.tables import TabularExperts
from mixdpo_lib.gates.direction import DirectionGate
from mixdpo_lib.gates.weights import LearnedWeights
from mixdpo_lib.learning.full_batch import full_batch_em
from mixdpo_lib.learning.tally import tally_em


@pytest.mark.parametrize("circle", [False, True])
def test_counts_of_units_are_the_pairs(circle):
    truth = TabularExperts(6, 3)
    truth.perturb(2.0, torch.Generator().manual_seed(0))
    z = torch.arange(40) % 3
    pairs, unit = truth.sample_pairs(z, 12, torch.Generator().manual_seed(1))
    fits = []
    for em in (full_batch_em, tally_em):
        experts = GroupTables(6, 16) if circle else TabularExperts(6, 3)
        gate = DirectionGate(16) if circle else LearnedWeights(3)
        found = em(
            experts,
            gate,
            pairs,
            unit,
            symmetry_breaking="random_heads",
            restarts=2,
            max_iter=40,
            tolerance=1e-5,
        )
        fits.append((experts, found))
    (a, plain), (b, fast) = fits
    torch.testing.assert_close(a.rewards, b.rewards, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(plain.log_q, fast.log_q, atol=1e-5, rtol=1e-5)
    pd.testing.assert_frame_equal(plain.restarts, fast.restarts, atol=1e-8)
    pd.testing.assert_frame_equal(plain.history, fast.history, atol=1e-6, check_exact=False)
    with pytest.raises(ValueError, match="a row of counts knows no single answers"):
        tally_em(a, LearnedWeights(3), pairs, unit, lapse=0.1)
