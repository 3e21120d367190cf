"""A fit that diverges has its own ending, says so, and leaves the best finite step."""

import math

import pandas as pd
import pytest
import torch
from tiny import plain_fit, preference_rows

from mixdpo_lib.elbo import correct
from mixdpo_lib.experts.group_heads import GroupHeads
from mixdpo_lib.experts.heads import HeadExperts
from mixdpo_lib.gates.direction import DirectionGate
from mixdpo_lib.gates.weights import LearnedWeights
from mixdpo_lib.learning.config import DIVERGED, STOP_REASONS, FitConfig, Monitor
from mixdpo_lib.learning.fit import fit
from mixdpo_lib.learning.result import summarise
from mixdpo_lib.policy.mixture import MixturePolicy

CONFIG = plain_fit(batch_size=6, passes=3.0, learning_rate=0.02)
ROWS = preference_rows(18)


def run(base, config, n_experts=2, **options):
    policy = MixturePolicy(HeadExperts(base, n_experts, rank=2), LearnedWeights(n_experts), 0.3)
    return policy, fit(policy, ROWS, config, **options)


def finite(policy):
    return all(bool(p.isfinite().all()) for p in policy.parameters())


def test_a_monitor_knows_a_bound_that_fell():
    watch = Monitor(patience=0)
    assert watch.step(-0.7) is None and watch.step(-0.7 - DIVERGED + 0.1) is None
    assert watch.step(-0.7 - DIVERGED - 0.1) == "diverged"
    judged = Monitor(patience=0)  # the validation pairs say nothing yet, the training pairs do
    assert judged.step(-0.7, bound=-0.7) is None and judged.step(-0.8, bound=-99.0) == "diverged"
    assert judged.step(-0.8, bound=math.nan) == "non_finite"
    assert {"diverged", "non_finite"} <= set(STOP_REASONS)


@pytest.mark.parametrize(
    "choices",
    [
        {"learning_rate": 1e30},
        {"learning_rate": 100.0, "optimizer": "sgd"},
        {"learning_rate": 1e4, "evaluate_training": False},
        {"learning_rate": 1e30, "start__restarts": 2},
    ],
)
@pytest.mark.parametrize("validation", [None, ROWS], ids=["alone", "validated"])
def test_a_diverged_fit(tiny_base, tmp_path, choices, validation):
    config = CONFIG.change(**choices)
    policy, result = run(tiny_base, config, validation=validation, folder=tmp_path)
    assert result.stop_reason == "diverged"
    assert f"WARNING: the fit diverged: step {result.best_step}, the best finite" in result.summary
    assert "lower learning_rate" in result.summary and "raise passes" not in result.summary
    assert finite(policy) and bool(policy.predict(ROWS).isfinite().all())
    best = result.history.set_index("step")["elbo"]
    assert best[result.best_step] >= best.iloc[0] - 1e-6
    kept = result.snapshots[result.best_step]["experts.up"]
    assert torch.equal(policy.experts.up, kept)
    again, read = run(tiny_base, config, validation=validation, folder=tmp_path)
    assert read.losses == [] and read.stop_reason == "diverged" and read.summary == result.summary
    assert torch.equal(again.experts.up, policy.experts.up)


def test_parameters_that_are_no_numbers_end_a_fit_that_does_not_look_at_them(
    tiny_base, monkeypatch
):
    """The table still has what was seen before the parameters broke."""
    from mixdpo_lib.learning.trainer import MixDPOTrainer

    step = MixDPOTrainer.training_step

    def spoil(self, *args, **more):
        loss = step(self, *args, **more)
        if self.state.global_step == 2:
            self.policy.experts.up.data[0, 0, 0] = math.nan
            self.policy.experts.up.grad = None
        return loss

    monkeypatch.setattr(MixDPOTrainer, "training_step", spoil)
    config = CONFIG.change(evaluate_training=False, evaluations_per_pass=3)
    policy, result = run(tiny_base, config)
    assert result.stop_reason == "non_finite" and result.history["step"].tolist() == [0, 1, 2, 3]
    assert finite(policy) and "WARNING: numbers that are none came up: step" in result.summary


def test_a_bound_that_fell_a_little_is_no_reason_to_raise_the_rate(tiny_base, monkeypatch):
    from mixdpo_lib.learning.trainer import MixDPOTrainer

    measure = MixDPOTrainer.measure

    def worse(self):
        row = measure(self)
        return row | {"elbo": row["elbo"] - 0.1 * self.state.global_step}

    monkeypatch.setattr(MixDPOTrainer, "measure", worse)
    _, result = run(tiny_base, CONFIG.change(passes=1.0))
    assert result.stop_reason == "max_iter"
    assert "WARNING: the bound fell: lower learning_rate" in result.summary
    _, result = run(tiny_base, CONFIG.change(passes=5.0))
    assert result.stop_reason == "diverged"  # by more than a nat in the end


def test_a_rate_beyond_float32_is_refused():
    with pytest.raises(ValueError, match="learning_rate=1e\\+31: expected above 0.*at most 1e30"):
        FitConfig(learning_rate=1e31)


def test_a_summary_says_which_step_it_speaks_of_and_what_did_not_carry_over():
    history = pd.DataFrame(
        {
            "step": [0, 10, 20],
            "elbo": [-0.693, -0.4, -0.05],
            "validation_loglik": [-0.6931, -0.6925, -0.9],
        }
    )
    log_q = torch.tensor([[0.99, 0.01], [0.01, 0.99]]).log()
    loglik = torch.tensor([[0.9, 0.1], [0.1, 0.9]]).log()
    early = summarise(history, "max_iter", 10, log_q, loglik)
    assert "step 10 is kept" in early and "at the last step experts have parted" in early
    assert "hardly better than by a coin" in early
    assert "too sure" not in early
    surer = history.assign(validation_accuracy=[0.5] * (len(history) - 1) + [0.9])
    said = summarise(surer, "max_iter", 10, log_q, loglik)
    assert (
        "step 20 predicts more validation pairs right (0.90, where the kept one has 0.50)" in said
    )
    late = summarise(history.assign(validation_loglik=-0.4), "max_iter", 20, log_q, loglik)
    assert "at the last step" not in late and "coin" not in late


def test_a_summary_of_more_experts_than_units_says_so_in_short():
    history = pd.DataFrame({"step": [0, 9], "elbo": [-0.69, -0.1]})
    log_q = torch.zeros(4, 20).index_fill(1, torch.arange(3, 20), -50.0).log_softmax(-1)
    said = summarise(history, "max_iter", None, log_q, torch.full((6, 20), math.log(0.5)))
    assert "20 experts are more than the 4 that they could serve" in said
    assert "17 experts almost unused" in said and len(said) < 400


def test_a_small_set_that_is_learned_by_heart_keeps_an_early_step(tiny_base):
    """Its first steps are looked at, and not only every fifth of a fit that passes it often."""
    data = preference_rows(12)
    policy = MixturePolicy(HeadExperts(tiny_base, 1, rank=2), LearnedWeights(1))
    result = fit(policy, data, FitConfig(latent="pair", min_steps=60), validation=data)
    assert {2, 5, 10, 20} <= set(result.history["step"])
    policy = MixturePolicy(HeadExperts(tiny_base, 1, rank=2), LearnedWeights(1))
    result = fit(
        policy,
        data,
        FitConfig(latent="pair", min_steps=0, passes=3.0, batch_size=4),
        validation=data,
    )
    assert result.history["step"].tolist() == [0, 3, 6, 9]  # nothing is stretched: once a pass


def test_patience_counts_what_was_planned_alone(tiny_base):
    """Without a gain since step 0, two evaluations of the plan end the fit: not steps 2 and 5, in its warm-up."""
    data = preference_rows(12)
    turned = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in data]
    policy = MixturePolicy(HeadExperts(tiny_base, 1, rank=2), LearnedWeights(1))
    config = CONFIG.change(latent="pair", min_steps=60, evaluations_per_pass=1, stop__patience=2)
    result = fit(policy, data, config, validation=type(data).from_list(turned))
    assert result.stop_reason == "no_improvement" and result.best_step == 0
    assert result.history["step"].tolist() == [0, 2, 5, 10, 20, 40]


def test_who_knows_nothing_predicts_half_of_the_pairs_whatever_beta(tiny_base):
    """Heads that have learned nothing are the base to the bit: their rounding is no prediction."""
    data = preference_rows(24)
    for experts in (HeadExperts(tiny_base, 2, rank=2), GroupHeads(tiny_base, 8, rank=2)):
        gate = LearnedWeights(2) if experts.nodes is None else DirectionGate(8)
        policy = MixturePolicy(experts, gate, 50.0)
        experts.start(policy.prepare(data))
        assert bool((correct(policy.predict(data)) == 0.5).all())
        assert float(policy.text_rewards(policy.prepare(data).texts).abs().max()) == 0
        with torch.no_grad():
            experts.up[0] += 0.1
        moved = policy.text_rewards(policy.prepare(data).texts).abs().amax(0)
        assert float(moved[0]) > 0
        if experts.nodes is None:
            assert float(moved[1]) == 0  # the other one has still learned nothing


def test_training_pairs_among_the_validation_pairs_are_told(tiny_base, capsys):
    run(tiny_base, CONFIG.change(passes=1.0), validation=ROWS)
    assert f"WARNING: {len(ROWS)} of {len(ROWS)} validation pairs stand" in capsys.readouterr().err
    run(tiny_base, CONFIG.change(passes=1.0))
    assert "stand among" not in capsys.readouterr().err
