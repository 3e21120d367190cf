"""A lapse rate in fits: what the table holds, when a learned rate moves, resumption, full batches, degenerate answers."""

import math

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import plain_fit, preference_rows

from mixdpo_lib import elbo
from mixdpo_lib.data.pairs import Pairs
from mixdpo_lib.experts.heads import HeadExperts
from mixdpo_lib.experts.tables import TabularExperts
from mixdpo_lib.gates.weights import FixedWeights, LearnedWeights
from mixdpo_lib.learning import trainer as trainer_file
from mixdpo_lib.learning.fit import fit
from mixdpo_lib.learning.full_batch import full_batch_em
from mixdpo_lib.learning.inference import Recognition, Relaxed
from mixdpo_lib.learning.table import LoglikTable
from mixdpo_lib.learning.trainer import MixDPOTrainer
from mixdpo_lib.policy.mixture import MixturePolicy
from mixdpo_lib.store import MixDPOError

CONFIG = plain_fit(batch_size=6, passes=4.0, learning_rate=0.02, start__temperature=4.0)  # 16 steps


@pytest.fixture(scope="module")
def data(tiny_base):
    return Pairs.of(preference_rows(24))


def make(base, data, n_experts=2, lapse="learn", scale=0.0):
    experts = HeadExperts(base, n_experts, rank=4)
    experts.activate_responses(data)
    if scale:
        experts.perturb(scale, torch.Generator().manual_seed(3))
    return MixturePolicy(experts, LearnedWeights(n_experts), 0.3, lapse)


def learner_of(policy, data, config, tmp_path):
    trainer = MixDPOTrainer(policy, data, config, tmp_path)
    return trainer, trainer.accelerator.unwrap_model(trainer.model)


def generator(seed):
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------------------------------------ in a fit


def test_a_rate_that_moves_leaves_no_old_value_in_the_table():
    rate = torch.tensor(0.5)
    table = LoglikTable(torch.tensor([0, 1]), 2, lambda seen: elbo.with_lapse(seen, rate))
    log_sigma, even = torch.tensor([[0.9, 0.1], [0.2, 0.8]]).log(), torch.tensor([0.5, 0.5]).log()
    table.fill(log_sigma)
    for value in (0.5, 0.2):
        rate.fill_(value)
        loglik = elbo.with_lapse(log_sigma, value)
        torch.testing.assert_close(table.read(), loglik)
        torch.testing.assert_close(
            table.log_q(even), elbo.log_responsibilities(loglik, even, table.unit)
        )
        bound = float(elbo.mixture_log_likelihood(loglik, even).mean())
        assert table.terms(even)["elbo"] == pytest.approx(bound, rel=1e-6)
    assert torch.equal(table.loglik, log_sigma)


@pytest.mark.parametrize("lapse", [0.0, 0.3, "learn"])
def test_a_step_on_all_pairs_is_a_step_on_the_likelihood_with_lapses(
    tiny_base, data, tmp_path, lapse
):
    config = CONFIG.change(start__kind="none", start__temperature=1.0)
    policy = make(tiny_base, data, lapse=lapse, scale=0.5)
    trainer, learner = learner_of(policy, data, config, tmp_path)
    trainer.measure()
    batch = trainer.data_collator([[row] for row in range(24)])["parts"][0]
    parameters = [policy.experts.down, policy.experts.up]
    learner.eval()
    found = torch.autograd.grad(learner(**batch)["loss"], parameters)
    plain = policy.batch_loglik(batch).detach()
    loglik = elbo.with_lapse(policy.batch_log_sigma(batch), policy.lapse)
    assert torch.equal(loglik, plain)
    total = elbo.mixture_log_likelihood(loglik, learner.log_w(), learner.table.unit[batch["row"]])
    for mine, expected in zip(
        found, torch.autograd.grad(-total.sum() / 24, parameters), strict=True
    ):
        torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-6)


def test_a_step_moves_a_learned_rate_its_share_of_the_way(tiny_base, data, tmp_path):
    config = CONFIG.change(start__kind="none", start__temperature=1.0)
    policy = make(tiny_base, data, scale=0.5)
    trainer, learner = learner_of(policy, data, config, tmp_path)
    trainer.measure()
    learner.steps.fill_(9)
    log_sigma, log_w = learner.table.loglik.clone(), learner.log_w()
    loglik = elbo.with_lapse(log_sigma, elbo.LAPSE_START)
    log_q = elbo.log_responsibilities(loglik, log_w, learner.table.unit)
    mode = elbo.lapse_m_step(log_sigma, log_q, elbo.LAPSE_START, learner.table.unit)
    learner.train()
    learner(**trainer.data_collator([[row] for row in range(24)])["parts"][0])
    share = 10**-0.6
    assert policy.lapse == pytest.approx(
        (1 - share) * elbo.LAPSE_START + share * float(mode), rel=1e-4
    )


@pytest.mark.parametrize("n_experts", [1, 2])
def test_a_learned_rate_waits_for_the_start_and_is_in_the_history(tiny_base, data, n_experts):
    policy = make(tiny_base, data, n_experts)
    history = fit(policy, data, CONFIG.change(start__tempering_passes=2.0)).history
    waits = history["responsibility_temperature"].shift(fill_value=4.0) > 1
    assert 2 < waits.sum() < len(history)
    first = history.loc[waits, "lapse"]
    assert (first == policy.lapse_rate.new_tensor(elbo.LAPSE_START).item()).all()
    assert (history.loc[~waits, "lapse"].diff().iloc[1:] != 0).all()
    assert history["lapse"].iloc[-1] == policy.lapse and 0 < policy.lapse < 1


def test_a_given_rate_stays(tiny_base, data):
    policy = make(tiny_base, data, lapse=0.05)
    history = fit(policy, data, CONFIG.change(passes=1.0)).history
    assert (history["lapse"] == 0.05).all() and policy.lapse == 0.05
    # knowing nothing: (1 - e) / 2 + e / 2 is one half again
    assert history["elbo"].iloc[0] == pytest.approx(-math.log(2), rel=1e-5)


@pytest.mark.parametrize(
    "inference", [Relaxed(temperature=0.05, n_samples=4), Recognition(rate=0.05)], ids=repr
)
def test_other_inferences_know_lapses(tiny_base, data, inference):
    policy = make(tiny_base, data, scale=0.5)
    undecided = float(policy.loglik(data).mean())  # of q = w, where the network starts
    history = fit(policy, data, CONFIG.change(inference=inference)).history
    assert policy.lapse != pytest.approx(elbo.LAPSE_START, rel=1e-3)
    loglik = elbo.with_lapse(policy.log_sigma(data), policy.lapse)
    total = elbo.mixture_log_likelihood(loglik, policy.gate.log_w()[0], data.units("user")[0])
    assert history["elbo"].iloc[-1] == pytest.approx(float(total.sum()) / 24, rel=1e-4)
    if isinstance(inference, Recognition):
        assert history["elbo_recognition"].iloc[0] == pytest.approx(undecided, rel=1e-5)
        assert (history["elbo_recognition"] <= history["elbo"] + 1e-6).all()


def test_a_resumed_fit_with_a_learned_rate_is_the_fit(tiny_base, data, tmp_path, monkeypatch):
    whole = make(tiny_base, data)
    expected = fit(whole, data, CONFIG, validation=data)

    def stop(stage, done, total, *_):
        if done == 11:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer_file, "progress", stop)
        with pytest.raises(KeyboardInterrupt):
            fit(make(tiny_base, data), data, CONFIG, validation=data, folder=tmp_path)
    policy = make(tiny_base, data)
    result = fit(policy, data, CONFIG, validation=data, folder=tmp_path)
    assert len(result.losses) < 16
    pd.testing.assert_frame_equal(
        result.history.drop(columns="seconds"),
        expected.history.drop(columns="seconds"),
        check_exact=True,
    )
    assert policy.lapse == whole.lapse != pytest.approx(elbo.LAPSE_START, rel=1e-3)
    assert torch.equal(policy.experts.up, whole.experts.up)
    for step, kept in ("best", result.best_step), ("last", 16):  # snapshots carry the rate
        result.restore(policy, step)
        row = expected.history.set_index("step").loc[kept]
        assert policy.lapse == row["lapse"]


def test_another_lapse_rate_is_another_fit(tiny_base, data, tmp_path):
    short = CONFIG.change(passes=1.0)
    for lapse, others in ((0.0, (0.1, "learn")), (0.1, (0.0, 0.2, "learn"))):
        folder = tmp_path / str(lapse)
        fit(make(tiny_base, data, lapse=lapse), data, short, folder=folder)
        for other in others:
            with pytest.raises(MixDPOError, match="another fit there: .*lapse: found"):
                fit(make(tiny_base, data, lapse=other), data, short, folder=folder)
        assert fit(make(tiny_base, data, lapse=lapse), data, short, folder=folder).losses == []


def test_one_degenerate_answer_does_not_spoil_validation(tiny_base, data, tmp_path):
    """23 answers as the expert says, one of 76 nats: -3.2 nats a pair without lapses, above -.3 with."""
    train, found = data.where([row < 20 for row in range(24)]), {}
    for lapse in (0.0, 0.02):
        experts = TabularExperts.of(tiny_base, data, 1, beta=0.3)
        place = torch.from_numpy(experts.constants(data.texts).number)[data.index]
        with torch.no_grad():
            experts.rewards[0, place[:, 0]], experts.rewards[0, place[:, 1]] = 4.0, -4.0
            experts.rewards[0, place[23]] = torch.tensor([-38.0, 38.0], dtype=torch.float64)
        policy = MixturePolicy(experts, LearnedWeights(1), 0.3, lapse)
        trainer = MixDPOTrainer(policy, train, CONFIG, tmp_path, validation=data)
        found[lapse] = trainer.measure()
    assert found[0.0]["validation_loglik"] == pytest.approx(-76 / 24, rel=1e-3)
    assert found[0.02]["validation_loglik"] > -0.3
    assert found[0.0]["validation_accuracy"] == found[0.02]["validation_accuracy"]


# -------------------------------------------------------------------------------------------------- full batches


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    st.integers(0, 10**6),
    st.integers(1, 3),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0.2, "learn"]),
)
def test_full_batch_em_with_lapses_never_falls(seed, n_experts, by_unit, learned, lapse):
    truth = TabularExperts(5, 3)
    truth.perturb(3.0, generator(seed))
    pairs, unit = truth.sample_pairs(
        torch.randint(3, (12,), generator=generator(seed)), 5, generator(seed + 1)
    )
    experts = TabularExperts(5, n_experts)
    gate = LearnedWeights(n_experts) if learned else FixedWeights.uniform(n_experts)
    result = full_batch_em(
        experts,
        gate,
        pairs,
        unit if by_unit else None,
        lapse=lapse,
        max_iter=20,
        tolerance=1e-14,
        seed=seed,
    )
    history = result.history
    assert (history["objective"].diff().iloc[1:] >= -1e-12).all()
    assert (history["elbo"] - history["loglik"]).abs().max() < 1e-10
    prior = float(experts.log_prior().detach()) + float(gate.log_prior())
    prior += elbo.lapse_log_prior(result.lapse) if lapse == "learn" else 0.0
    whole = (history["loglik"] + prior / 60).iloc[-1]
    assert history["objective"].iloc[-1] == pytest.approx(whole, abs=1e-10)
    assert result.lapse == history["lapse"].iloc[-1]
    assert history["lapse"].nunique() > 1 if lapse == "learn" else result.lapse == 0.2


def simulated(flips, n_units=300):
    """Pairs of two known experts whose rewards decide most pairs clearly, of which a share is flipped."""
    truth = TabularExperts(8, 2)
    truth.perturb(3.0, generator(0))
    z = torch.randint(2, (n_units,), generator=generator(1))
    pairs, unit = truth.sample_pairs(z, 40, generator(2))
    flipped = torch.rand(len(pairs), generator=generator(3)) < flips
    return torch.where(flipped[:, None], pairs.flip(1), pairs), unit


@pytest.mark.parametrize(("flips", "error"), [(0.0, 0.01), (0.1, 0.02)])
def test_a_constant_flip_rate_is_half_the_lapse_rate(flips, error):
    experts, gate = TabularExperts(8, 2, prior_scale=3.0), LearnedWeights(2)
    result = full_batch_em(experts, gate, *simulated(flips), lapse="learn", tolerance=1e-6)
    assert result.converged and result.lapse == pytest.approx(2 * flips, abs=error)


def test_going_on_with_the_rate_reached_equals_one_longer_run():
    pairs, unit = simulated(0.1, n_units=60)
    same = {"lapse": "learn", "tolerance": 1e-15}
    long, short = [(TabularExperts(8, 2), LearnedWeights(2)) for _ in range(2)]
    whole = full_batch_em(*long, pairs, unit, max_iter=20, **same)
    part = full_batch_em(*short, pairs, unit, max_iter=10, **same)
    rest = full_batch_em(
        *short,
        pairs,
        unit,
        max_iter=10,
        symmetry_breaking="none",
        lapse_start=part.lapse,
        **same,
    )
    assert rest.lapse == whole.lapse and torch.equal(short[0].rewards, long[0].rewards)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"lapse": "auto"},
            "lapse='auto': expected a rate of at least 0 and below 1, or \"learn\"",
        ),
        ({"lapse": 1.0}, "lapse=1.0: expected a rate"),
        ({"lapse": "learn", "lapse_start": 0.0}, "lapse_start=0: expected above 0"),
    ],
)
def test_bad_rates_of_full_batches(options, message):
    with pytest.raises(ValueError, match=message):
        full_batch_em(TabularExperts(3, 1), LearnedWeights(1), torch.tensor([[0, 1]]), **options)
