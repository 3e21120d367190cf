"""DPO as a special case, invariances of the mixture, resume, restarts, and why a fit ends."""

import dataclasses
import math

import datasets
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from tiny import full_logps, plain_fit, preference_rows
from torch import nn

from mixdpo_lib.data.pairs import Pairs
from mixdpo_lib.elbo import log_responsibilities
from mixdpo_lib.experts.heads import HeadExperts
from mixdpo_lib.gates.weights import FixedWeights, LearnedWeights
from mixdpo_lib.learning import fit as fit_file
from mixdpo_lib.learning import trainer as trainer_file
from mixdpo_lib.learning.config import FitConfig, Stop
from mixdpo_lib.learning.fit import fit
from mixdpo_lib.learning.gradient import gradient_error
from mixdpo_lib.learning.inference import Annealed, EffectiveExperts, Exact, Recognition, Relaxed
from mixdpo_lib.learning.trainer import MixDPOTrainer
from mixdpo_lib.policy.mixture import MixturePolicy

BETA = 0.3
CONFIG = plain_fit(batch_size=6, passes=5.0, learning_rate=0.02, start__temperature=4.0)  # 20 steps


@pytest.fixture(scope="module")
def data(tiny_base):
    return Pairs.of(preference_rows(24))


def make(base, data, n_experts=2, scale=0.0, gate=LearnedWeights, seed=3, sharpness=True):
    experts = HeadExperts(base, n_experts, rank=4, sharpness=sharpness)
    experts.activate_responses(data)
    if scale:
        experts.perturb(scale, torch.Generator().manual_seed(seed))
    gate = LearnedWeights(n_experts) if gate is LearnedWeights else FixedWeights.uniform(n_experts)
    return MixturePolicy(experts, gate, BETA)


def state(policy):
    return {k: v.clone() for k, v in policy.state_dict().items()}


def close(a, b, rtol=1e-5, atol=1e-6):
    assert set(a) == set(b)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=rtol, atol=atol)


def numbers(result):
    """The history without what a clock says."""
    return result.history.drop(columns="seconds")


# --------------------------------------------------------------------------------------- DPO as the case of one expert


def plain_margins(base, policy, rows):
    """beta [(log pi - log ref)(chosen) - (log pi - log ref)(rejected)] with logits over the whole vocabulary."""
    out = []
    for r in rows:
        sides = (
            full_logps(base, policy.experts, r["prompt"], r[s], r["ended"])
            for s in ("chosen", "rejected")
        )
        (a, ra), (b, rb) = sides
        out.append(BETA * ((a - ra) - (b - rb)))
    return torch.stack(out)


@pytest.mark.parametrize("sharpness", [False, True])
def test_one_expert_is_dpo(tiny_base, data, tmp_path, sharpness):
    """Of a head of low rank, and of one that may be sharper, whose s has a rate of its own."""
    policy = make(tiny_base, data, 1, sharpness=sharpness)
    trainer = MixDPOTrainer(policy, data, CONFIG, tmp_path)
    order, collate = [], trainer.data_collator
    trainer.data_collator = lambda groups: (order.append(sum(groups, [])), collate(groups))[1]
    trainer.train()
    losses = trainer.losses
    assert len(order) == len(losses) == 20 and sorted(sum(order[:4], [])) == list(range(24))

    # the same by hand: the loss of Rafailov et al. (2023), AdamW, warm-up and linear decay, gradients of norm 1 at most
    own = make(tiny_base, data, 1, sharpness=sharpness)
    parameters, groups = list(own.experts.parameters()), [[own.experts.down, own.experts.up]]
    groups += [[own.experts.sharpness]] if sharpness else []
    rates = [CONFIG.learning_rate, CONFIG.learning_rate / 3][: len(groups)]
    optimiser = torch.optim.AdamW([{"params": g} for g in groups], weight_decay=0.0)
    warmup, total = 1, 20
    for step, rows in enumerate(order):
        for group, rate in zip(optimiser.param_groups, rates, strict=True):
            share = step / warmup if step < warmup else (total - step) / (total - warmup)
            group["lr"] = rate * share
        loss = -F.logsigmoid(plain_margins(tiny_base, own, data.rows.select(rows))).mean()
        assert losses[step] == pytest.approx(float(loss.detach()), rel=1e-5), step
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
    assert losses[-1] < 0.6  # it did learn
    for mine, theirs in zip(policy.experts.parameters(), parameters, strict=True):
        assert float((mine - theirs).detach().norm()) < 1e-4 * float(theirs.detach().norm())
    torch.testing.assert_close(
        policy.loglik(data),
        F.logsigmoid(plain_margins(tiny_base, own, data.rows)).detach(),
        rtol=1e-3,
        atol=1e-4,
    )


@pytest.mark.parametrize(
    "options",
    [
        {"latent": "pair"},
        {"start__temperature": 50.0},
        {"start__kind": "none"},
        {"start__restarts": 3},
    ],
)
def test_nothing_of_the_mixture_touches_one_expert(tiny_base, data, options):
    short = CONFIG.change(passes=2.0)
    plain, other = make(tiny_base, data, 1), make(tiny_base, data, 1)
    fit(plain, data, short)
    fit(other, data, short.change(**options))
    assert torch.equal(plain.experts.up, other.experts.up) and float(
        other.gate.log_w()[0].exp()
    ) == pytest.approx(1)


@pytest.mark.parametrize("latent", ["unit", "pair"])
def test_pairs_of_a_prompt_may_stay_together(tiny_base, tmp_path, latent):
    prompts = ["the film", "a story", "it", "this"] * 3
    rows = preference_rows(12).remove_columns("prompt").add_column("prompt", prompts)
    data = Pairs.of(rows)
    policy = make(tiny_base, data, scale=0.3)
    config = CONFIG.change(batch_by="prompt", batch_size=2, latent=latent, passes=3.0)
    trainer = MixDPOTrainer(policy, data, config, tmp_path)
    order, collate = [], trainer.data_collator
    trainer.data_collator = lambda groups: (
        order.append([row for g in groups for row in g]),
        collate(groups),
    )[1]
    trainer.train()
    assert len(order) == 6  # two batches of two prompts a pass
    assert sorted(order[0] + order[1]) == list(range(12))
    assert all(len({row % 4 for row in batch}) == 2 and len(batch) == 6 for batch in order)
    assert trainer.state.log_history[-2]["pairs_seen"] == 36


# ------------------------------------------------------------------------------------------------------- invariances


def test_two_equal_experts_equal_one(tiny_base, data):
    options = CONFIG.change(start__kind="none", passes=2.0)
    one, two = make(tiny_base, data, 1, scale=0.2), make(tiny_base, data, 2, scale=0.2)
    one.beta = two.beta = (
        0.03  # gradients below norm 1: Trainer clips the norm over all experts together
    )
    with torch.no_grad():
        for name in ("down", "up"):
            getattr(two.experts, name).copy_(getattr(one.experts, name).expand(2, -1, -1))
    a, b = fit(one, data, options, validation=data), fit(two, data, options, validation=data)
    for column in ("elbo", "validation_loglik", "train_accuracy", "validation_accuracy"):
        pd.testing.assert_series_equal(
            a.history[column], b.history[column], rtol=1e-4, check_exact=False
        )
    torch.testing.assert_close(two.experts.up[1], two.experts.up[0])
    torch.testing.assert_close(two.gate.log_w()[0].exp(), torch.full((2,), 0.5))
    torch.testing.assert_close(one.predict(data), two.predict(data), rtol=1e-4, atol=1e-5)


def test_experts_that_start_equal_stay_equal_without_symmetry_breaking(tiny_base, data):
    policy = make(tiny_base, data, 3)
    fit(policy, data, CONFIG.change(start__kind="none", passes=1.0))
    torch.testing.assert_close(policy.experts.up[1:], policy.experts.up[:1].expand(2, -1, -1))
    for kind in ("random_responsibilities", "random_heads"):
        policy = make(tiny_base, data, 3)
        fit(policy, data, CONFIG.change(start__kind=kind, passes=1.0))
        assert (policy.experts.up[1] - policy.experts.up[0]).abs().max() > 1e-3, kind


def test_the_order_of_experts_does_not_matter(tiny_base, data):
    options = CONFIG.change(start__kind="none", passes=2.0)
    policy, turned = make(tiny_base, data, 3, scale=0.3), make(tiny_base, data, 3, scale=0.3)
    order = [2, 0, 1]
    with torch.no_grad():
        turned.experts.down.copy_(policy.experts.down[order])
        turned.experts.up.copy_(policy.experts.up[order])
    a, b = fit(policy, data, options, validation=data), fit(turned, data, options, validation=data)
    pd.testing.assert_series_equal(a.history["elbo"], b.history["elbo"], rtol=1e-4)
    pd.testing.assert_series_equal(
        a.history["usage_2"], b.history["usage_0"], rtol=1e-3, check_names=False
    )
    torch.testing.assert_close(
        turned.gate.log_w()[0], policy.gate.log_w()[0][order], rtol=1e-3, atol=1e-4
    )
    torch.testing.assert_close(
        turned.loglik(data), policy.loglik(data)[:, order], rtol=1e-3, atol=1e-3
    )
    torch.testing.assert_close(turned.predict(data), policy.predict(data), rtol=1e-3, atol=1e-4)


def test_a_unit_that_is_a_row_is_the_pair_level(tiny_base, data):
    options = CONFIG.change(passes=2.0)
    by_pair, by_row = make(tiny_base, data), make(tiny_base, data)
    a = fit(by_pair, data, options.change(latent="pair"))
    b = fit(by_row, data, options.change(latent="unit", unit="row"))
    pd.testing.assert_frame_equal(numbers(a), numbers(b))
    close(state(by_pair), state(by_row), rtol=0, atol=0)
    by_user = make(tiny_base, data)
    fit(by_user, data, options)
    assert not torch.allclose(by_user.experts.up, by_pair.experts.up, atol=1e-3)


@pytest.mark.parametrize("latent", ["unit", "pair"])
def test_a_batch_with_all_data_is_full_batch_em(tiny_base, data, tmp_path, latent):
    policy = make(tiny_base, data, 3, scale=0.4)
    options = CONFIG.change(
        batch_size=24, latent=latent, start__kind="none", start__temperature=1.0
    )
    trainer = MixDPOTrainer(policy, data, options, tmp_path)
    learner = trainer.model.train()
    before = policy.gate.log_w()[0].clone()
    loss = learner(**trainer.data_collator([[row] for row in range(24)])["parts"][0])["loss"]
    mine = torch.autograd.grad(loss, [policy.experts.down, policy.experts.up])

    loglik = F.logsigmoid(plain_margins(tiny_base, policy, data.rows))
    unit = torch.arange(24) % 4 if latent == "unit" else torch.arange(24)
    joint = before + torch.stack([loglik[unit == u].sum(0) for u in range(int(unit.max()) + 1)])
    q = joint.softmax(1).detach()
    own = -(q[unit] * loglik).sum(1).mean()
    assert float(loss.detach()) == pytest.approx(float(own.detach()), rel=1e-5)
    for a, b in zip(
        mine, torch.autograd.grad(own, [policy.experts.down, policy.experts.up]), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))
    n = len(
        q
    )  # the first Robbins-Monro step is a whole M-step, with a tenth of a unit added to each expert
    torch.testing.assert_close(
        policy.gate.log_w()[0].exp(), (n * q.mean(0) + 0.1) / (n + 0.3), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(learner.table.loglik, loglik.detach(), rtol=1e-3, atol=1e-4)


def test_given_weights_stay_as_they_are(tiny_base, data):
    policy = make(tiny_base, data, gate=FixedWeights)
    fit(policy, data, CONFIG.change(passes=1.0))
    torch.testing.assert_close(policy.gate.log_w()[0].exp(), torch.full((2,), 0.5))


def test_groups_of_users_are_found(tiny_base):
    """Two groups that want the opposite: experts part, and a user's own pairs tell which one serves them."""
    wanted = preference_rows(6, users=1).to_list()
    rows = [w | {"user": f"user{u}"} for u in range(6) for w in wanted]
    for row in rows:
        if int(row["user"][-1]) % 2:
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    data = Pairs.of(datasets.Dataset.from_list(rows))
    options = CONFIG.change(passes=6.0, learning_rate=0.05)
    policy, alone = make(tiny_base, data), make(tiny_base, data, 1)
    result = fit(policy, data, options, validation=data)
    q = policy.posterior(data)
    assert ((q.loc["user0"] - q.loc["user1"]).abs() > 0.9).all()
    assert all((q.loc[f"user{u}"] - q.loc[f"user{u % 2}"]).abs().max() < 0.05 for u in range(2, 6))
    last = result.history.iloc[-1]
    assert (
        last["train_accuracy"] == 1
        and last["validation_accuracy"] == 1
        and last["validation_loglik"] > -0.3
    )
    assert (
        fit(alone, data, options, validation=data).history["validation_loglik"].max() < -0.69
    )  # one policy cannot


# --------------------------------------------------------------------------------------- history, seeds, random start


def test_history(tiny_base, data):
    policy = make(tiny_base, data)
    result = fit(policy, data, CONFIG, validation=data)
    history = result.history
    assert {
        "step",
        "pairs_seen",
        "elbo",
        "expected_loglik",
        "kl_q_w",
        "train_accuracy",
        "validation_accuracy",
        "validation_loglik",
        "entropy",
        "usage_0",
        "usage_1",
        "responsibility_temperature",
        "seconds",
    } <= set(history)
    assert (
        history["step"].tolist() == list(range(0, 21, 2)) and history["pairs_seen"].iloc[-1] == 120
    )
    assert history.notna().all().all()
    first = history.iloc[0]
    assert first["elbo"] == pytest.approx(-math.log(2), rel=1e-6) and first["train_accuracy"] == 0.5
    assert first["validation_accuracy"] == 0.5 and first["kl_q_w"] == pytest.approx(0, abs=1e-7)
    assert history["responsibility_temperature"].tolist()[:4] == pytest.approx([4, 2, 1, 1])
    assert history["elbo"].iloc[-1] > first["elbo"] + 0.1
    assert result.stop_reason == "max_iter"
    assert result.best_step == history["step"][history["validation_loglik"].idxmax()]
    assert set(result.snapshots) == {20, result.best_step}
    close(result.snapshots[result.best_step], state(policy), rtol=0, atol=0)
    assert result.restarts["kept"].tolist() == [True]


def test_the_same_seed_gives_the_same_numbers(tiny_base, data):
    policies = [make(tiny_base, data) for _ in range(3)]
    options = CONFIG.change(passes=1.0)
    a, b, c = (
        fit(p, data, options.change(seed=s)) for p, s in zip(policies, (5, 5, 6), strict=True)
    )
    pd.testing.assert_frame_equal(numbers(a), numbers(b))
    close(state(policies[0]), state(policies[1]), rtol=0, atol=0)
    assert not torch.equal(policies[0].experts.up, policies[2].experts.up)
    assert not numbers(a).equals(numbers(c))


def test_random_responsibilities_are_seeded_and_stand_for_a_while(tiny_base, data, tmp_path):
    def learner(seed):
        config = CONFIG.change(seed=seed, start__passes=0.5)
        return MixDPOTrainer(make(tiny_base, data), data, config, tmp_path).model

    a, b, c = learner(0), learner(0), learner(1)
    assert torch.equal(a.start_log_q, b.start_log_q) and not torch.equal(
        a.start_log_q, c.start_log_q
    )
    assert a.start_log_q.shape == (4, 2)
    torch.testing.assert_close(a.start_log_q.exp().sum(1), torch.ones(4))
    batch = a.policy.experts.batch(a.policy.constants(data.texts), data.index[:6])
    batch["row"] = torch.arange(6)
    for step in range(
        3
    ):  # all margins are 0: the gradient shows the responsibilities that were used
        a.zero_grad()
        a.train()(**batch)["loss"].backward()
        shares = a.policy.experts.up.grad.flatten(1).norm(dim=1)
        assert (float((shares[0] - shares[1]).abs()) > 1e-6) == (step < 2), step


# ---------------------------------------------------------------------------------------------- relaxed and amortised


def learner_of(base, data, config, tmp_path, scale=0.3):
    trainer = MixDPOTrainer(make(base, data, scale=scale), data, config, tmp_path)
    return trainer, trainer.accelerator.unwrap_model(trainer.model)


@pytest.mark.parametrize("latent", ["unit", "pair"])
def test_cold_relaxed_draws_are_unbiased_for_the_exact_loss(tiny_base, data, tmp_path, latent):
    """inference="relaxed" at a low temperature: the mean loss over many draws is the exact one (4 standard errors)."""
    options = CONFIG.change(latent=latent, start__kind="none", start__temperature=1.0)
    rows = list(range(12))
    losses = {}
    for inference, choice in (("exact", Exact()), ("relaxed", Relaxed(temperature=0.02))):
        config = options.change(inference=choice)
        trainer, learner = learner_of(tiny_base, data, config, tmp_path)
        trainer.measure()
        batch = trainer.data_collator([[row] for row in rows])["parts"][0]
        losses[inference] = []
        for step in range(400 if inference == "relaxed" else 1):
            learner.steps.fill_(step)  # each step has draws of its own
            learner.eval()
            losses[inference].append(float(learner(**batch)["loss"].detach()))
    drawn = torch.tensor(losses["relaxed"])
    assert abs(float(drawn.mean()) - losses["exact"][0]) < 4 * float(drawn.std()) / 400**0.5 + 1e-3
    assert float(drawn.std()) > 0


@pytest.mark.parametrize(("latent", "passes", "left"), [("unit", 160.0, 0.9), ("pair", 40.0, 0.5)])
def test_the_recognition_network_learns_the_posterior(
    tiny_base, data, tmp_path, latent, passes, left
):
    """Its bound starts at q = w, rises towards the exact one, never passes it; slower where pairs of a unit add up."""
    config = CONFIG.change(
        latent=latent,
        inference=Recognition(rate=0.02, temperature=0.3, n_samples=32),
        start__kind="none",
        learning_rate=1e-5,
        start__temperature=1.0,
        passes=passes,
    )
    policy = make(tiny_base, data, scale=0.5, seed=0)
    history = fit(policy, data, config).history
    gap = history["elbo"] - history["elbo_recognition"]
    assert (gap > -1e-6).all()
    assert gap.iloc[-1] < left * gap.iloc[0]


def test_gradients_reach_the_network_through_the_draws_alone_where_they_should(
    tiny_base, data, tmp_path
):
    config = CONFIG.change(inference=Recognition(), start__kind="none")
    trainer, learner = learner_of(tiny_base, data, config, tmp_path)
    learner.train()
    learner(**trainer.data_collator([[row] for row in range(8)])["parts"][0])["loss"].backward()
    assert float(learner.inference.network.outer.weight.grad.abs().max()) > 0
    assert float(learner.policy.experts.up.grad.abs().max()) > 0


# ------------------------------------------------------------------------------------------------------------ resume


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"start__restarts": 2, "start__restart_passes": 0.5},
        {"inference": Relaxed()},
        {"inference": Recognition()},
    ],
    ids=["plain", "restarts", "relaxed", "recognition"],
)
def test_a_resumed_fit_is_the_fit(tiny_base, data, tmp_path, monkeypatch, options):
    config = CONFIG.change(**options)
    whole = make(tiny_base, data)
    expected = fit(whole, data, config, validation=data)

    def stop(stage, done, total, *_):  # killed between two checkpoints (at 12 and 14)
        if total == 20 and done == 13:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer_file, "progress", stop)
        with pytest.raises(KeyboardInterrupt):
            fit(make(tiny_base, data), data, config, validation=data, folder=tmp_path)
    assert (tmp_path / "checkpoint-12").is_dir() and not (tmp_path / "checkpoint-14").exists()
    seen = []
    monkeypatch.setattr(trainer_file, "progress", lambda stage, done, total, *_: seen.append(done))
    policy = make(tiny_base, data)
    result = fit(policy, data, config, validation=data, folder=tmp_path)
    assert seen == list(range(13, 21))  # no step twice, no restart again
    pd.testing.assert_frame_equal(numbers(result), numbers(expected), check_exact=True)
    close(state(policy), state(whole), rtol=0, atol=0)
    assert result.best_step == expected.best_step and result.stop_reason == expected.stop_reason
    pd.testing.assert_frame_equal(result.restarts, expected.restarts)
    assert set(result.snapshots) == set(expected.snapshots)
    for step, kept in expected.snapshots.items():
        close(result.snapshots[step], kept, rtol=0, atol=0)


def test_a_finished_fit_is_not_made_again(tiny_base, data, tmp_path, monkeypatch):
    config = CONFIG.change(passes=1.0)
    policy, again = make(tiny_base, data), make(tiny_base, data)
    first = fit(policy, data, config, validation=data, folder=tmp_path)
    monkeypatch.setattr(
        MixDPOTrainer, "training_step", lambda *_, **__: pytest.fail("trained again")
    )
    second = fit(again, data, config, validation=data, folder=tmp_path)
    pd.testing.assert_frame_equal(first.history, second.history)
    close(state(policy), state(again), rtol=0, atol=0)


def test_a_checkpoint_does_not_hold_the_base(tiny_base, data, tmp_path):
    from safetensors import safe_open

    fit(make(tiny_base, data), data, CONFIG.change(passes=0.5), folder=tmp_path)
    with safe_open(tmp_path / "checkpoint-2" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert {
        "policy.experts.up",
        "policy.experts.down",
        "policy.gate.log_weights",
        "table.loglik",
        "steps",
    } <= names
    assert not [n for n in names if "embed" in n or "layers" in n]


# ------------------------------------------------------------------------------------------ stop reasons and restarts


def test_a_fit_stops_when_validation_gets_no_better(tiny_base, data):
    wrong = data.rows.map(
        lambda r: {"chosen": r["rejected"], "rejected": r["chosen"]}
    )  # whatever is learned is wrong
    result = fit(
        make(tiny_base, data, 1), data, CONFIG.change(stop__patience=2), validation=Pairs.of(wrong)
    )
    assert result.stop_reason == "no_improvement" and result.best_step == 0
    assert result.history["step"].tolist() == [0, 2, 4]


@pytest.mark.parametrize("n_experts", [1, 2])
def test_a_fit_that_diverges_says_so(tiny_base, data, monkeypatch, n_experts):
    policy, calls, log_sigma = make(tiny_base, data, n_experts), [], MixturePolicy.batch_log_sigma

    def diverge(self, batch, chosen=None):
        calls.append(1)
        return log_sigma(self, batch, chosen) * (math.nan if len(calls) == 5 else 1)

    monkeypatch.setattr(MixturePolicy, "batch_log_sigma", diverge)
    result = fit(policy, data, CONFIG.change(start__kind="none"), validation=data)
    assert result.stop_reason == "non_finite" and result.best_step == 4
    assert result.history["step"].tolist() == [0, 2, 4, 6] and math.isnan(
        result.history["elbo"].iloc[-1]
    )
    assert (
        result.snapshots[4]["experts.up"].isfinite().all()
        and result.snapshots[6]["experts.up"].isnan().any()
    )
    assert policy.gate.log_w()[0].isfinite().all()


def test_a_dead_expert_ends_a_fit_only_where_asked(tiny_base, data):
    options = CONFIG.change(passes=1.0, stop__min_usage=0.45, start__kind="none")

    def lopsided():
        policy = make(tiny_base, data)
        policy.gate.log_weights.copy_(torch.tensor([0.6, 0.4]).log())
        return policy

    assert fit(lopsided(), data, options).stop_reason == "dead_expert"
    assert fit(lopsided(), data, options.change(stop__min_usage=0.0)).stop_reason == "max_iter"


@pytest.mark.parametrize("kind", ["random_responsibilities", "random_heads"])
def test_the_best_restart_goes_on(tiny_base, data, monkeypatch, kind):
    options = CONFIG.change(start__restarts=3, start__restart_passes=1.0, start__kind=kind)
    monkeypatch.setattr(fit_file, "RANDOM_HEADS_SCALE", 0.05)
    started, measured = [], []
    train, measure = MixDPOTrainer.train, MixDPOTrainer.measure

    def watch(self, *args, **more):
        started.append((self.config.seed, int(self.model.steps), state(self.policy)))
        return train(self, *args, **more)

    def note(self):
        measured.append(
            (self.config.seed, int(self.model.steps), state(self.policy), measure(self))
        )
        return measured[-1][3]

    monkeypatch.setattr(MixDPOTrainer, "train", watch)
    monkeypatch.setattr(MixDPOTrainer, "measure", note)
    result = fit(make(tiny_base, data), data, options, validation=data)
    table = result.restarts
    assert table["restart"].tolist() == [0, 1, 2] and table["seed"].tolist() == [0, 1000, 2000]
    assert (
        table["kept"].tolist() == (table["elbo"] == table["elbo"].max()).tolist()
        and table["elbo"].nunique() == 3
    )
    assert [s[0] for s in started] == [0, 1000, 2000, 0] and [s[1] for s in started] == [0, 0, 0, 4]
    kept = int(table["seed"][table["kept"]].iloc[0])
    (end,) = [m[2] for m in measured if m[:2] == (kept, 4) and m[3]["elbo"] == table["elbo"].max()][
        -1:
    ]
    close(started[-1][2], end, rtol=0, atol=0)
    assert result.history["elbo"].iloc[0] == pytest.approx(table["elbo"].max())
    assert result.history["responsibility_temperature"].iloc[0] == 1  # tempering is not begun again
    heads = [s[2]["experts.up"] for s in started[:3]]
    assert torch.equal(heads[0], heads[1]) == (kind == "random_responsibilities")


@pytest.mark.parametrize("latent", ["unit", "pair"])
def test_gradient_error_falls_in_noise_and_rises_in_bias_with_the_temperature(
    tiny_base, data, latent
):
    """Cold draws: hardly any bias but noise; hot draws: all experts take part alike, no noise but a bias."""
    policy = make(tiny_base, data, scale=0.3)
    found = {}
    for tau in (0.05, 50.0):
        config = CONFIG.change(latent=latent, inference=Relaxed(temperature=tau), batch_size=12)
        found[tau] = gradient_error(policy, data, config, n_draws=64)
    assert found[0.05]["noise"] > 10 * found[50.0]["noise"]
    assert (
        found[0.05]["bias"] < 4 * found[0.05]["noise"] / 64**0.5
    )  # four standard errors of the mean of 64 draws
    assert found[50.0]["bias"] > 4 * found[50.0]["noise"] / 64**0.5
    assert policy.experts.up.grad is None
    with pytest.raises(ValueError, match=r"inference=Exact\(\), n_draws=64: expected Relaxed"):
        gradient_error(policy, data, CONFIG, n_draws=64)


# ----------------------------------------------------------------------------------------------------------- refusals


def test_validation_units_without_training_pairs_are_refused(tiny_base, data):
    strangers = Pairs.of(preference_rows(6, users=6))
    with pytest.raises(
        ValueError, match=r"validation: units \['user4', 'user5'\] have no training pairs"
    ):
        fit(make(tiny_base, data), data, CONFIG, validation=strangers)
    fit(
        make(tiny_base, data), data, CONFIG.change(latent="pair", passes=0.25), validation=strangers
    )


def test_validation_is_judged_by_each_units_own_training_pairs(tiny_base, data, tmp_path):
    policy = make(tiny_base, data, 2, scale=0.5)
    valid = Pairs.of(preference_rows(8, seed=9).select([6, 1, 3, 4, 2]))
    row = MixDPOTrainer(policy, data, CONFIG, tmp_path, valid).measure()
    q = log_responsibilities(policy.loglik(data), policy.gate.log_w()[0], torch.arange(24) % 4)
    p = (policy.loglik(valid) + q[[2, 1, 3, 0, 2]]).logsumexp(1)
    assert row["validation_loglik"] == pytest.approx(float(p.mean()), rel=1e-5)
    assert row["validation_accuracy"] == pytest.approx(float((p.exp() > 0.5).float().mean()))


def test_an_absent_unit_column_is_refused(tiny_base, data):
    for rows in (data.rows.remove_columns("user"), Pairs.of(data.rows.remove_columns("user"))):
        with pytest.raises(
            ValueError,
            match="latent='unit': no column 'user'; found .*FitConfig\\(latent='pair'\\)",
        ):
            fit(make(tiny_base, data), rows, CONFIG)


def test_rows_are_taken_as_they_are_and_bad_ones_refused(tiny_base, data):
    policy = MixturePolicy(HeadExperts(tiny_base, 2, 4), LearnedWeights(2), BETA)
    fit(policy, data.rows, CONFIG.change(passes=0.25))
    assert len(policy.experts.active_ids) > 10 and policy.experts.up.any()
    with pytest.raises(ValueError, match="row 3: chosen equals rejected"):
        fit(
            policy,
            data.rows.map(
                lambda r, i: {"chosen": r["rejected"]} if i == 3 else {}, with_indices=True
            ),
            CONFIG,
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latent": "group"}, "latent='group': possible are 'unit' .* and 'pair'"),
        ({"start__kind": "luck"}, "kind='luck': possible are"),
        ({"learning_rate": 0.0}, "learning_rate=0.0: expected above 0, or None"),
        ({"learning_rate": math.nan}, "learning_rate=nan: expected above 0, or None"),
        ({"passes": -1.0}, "passes=-1.0: expected more than 0"),
        ({"min_steps": -1}, "min_steps=-1: expected 0 or more"),
        ({"batch_size": 0}, "batch_size=0: expected more than 0"),
        ({"start__restarts": 0}, "restarts=0: expected more than 0"),
        ({"start__temperature": 0.5}, "temperature=0.5: expected at least 1"),
        ({"start__certainty": 1.0}, "certainty=1.0: expected above 0 and below 1"),
        ({"batch_by": "user"}, "batch_by='user': possible are 'pair' .* and 'prompt'"),
        ({"keep": "some"}, "keep='some': possible are 'best' .* and 'all'"),
        ({"stop__min_usage": 1.0}, r"min_usage=1.0: expected in \[0, 1\)"),
        ({"stop__patience": -1}, "patience=-1: expected 0"),
        ({"passses": 1.0}, "passses: no choice of a fit; possible are .*passes"),
        (
            {"start__warmth": 1.0},
            "start__warmth: no choice of a fit; possible are start__certainty, start__kind",
        ),
        ({"learning_rate__x": 1.0}, "learning_rate__x: no choice of a fit"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        plain_fit(**options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Relaxed(n_samples=0), "n_samples=0: expected at least 1 draw"),
        (lambda: Relaxed(temperature=0.0), "gumbel temperature=0.0: expected above 0"),
        (lambda: Recognition(rate=0.0), "rate=0.0: expected above 0"),
        (lambda: Annealed(1.0, 0.0), "temperature end=0.0: expected above 0"),
        (lambda: EffectiveExperts(1.0), r"EffectiveExperts\(1.0\): expected above 1"),
    ],
)
def test_bad_inference(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_fit_has_at_most_twenty_choices_and_its_key_holds_only_what_is_used():
    config = FitConfig()
    assert len(dataclasses.fields(FitConfig)) <= 20
    one, many = config.identity(1, reads=False), config.identity(3, reads=True)
    assert not {"inference", "routing", "keep"} & set(one)
    hot = config.change(start__temperature=7.0)
    assert hot.identity(1, False) != one  # a lapse rate is learned once the temperature has fallen
    assert (
        many["inference"] == {"kind of choice": "Exact"}
        and many["start"]["kind"] == "random_responsibilities"
    )
    assert "routing" not in config.identity(3, reads=False)
    assert config.change(keep="all", accumulate=2, batch_size=8).identity(3, True) == many
    assert config.change(accumulate=2).identity(3, True) != many  # a step of twice as many pairs
    assert config.change(inference=Relaxed()).identity(3, False) != config.identity(3, False)


# ------------------------------------------------------------------------------------------------ what a fit leaves


def test_the_best_step_is_put_back_and_any_kept_one_can_be(tiny_base, data):
    policy = make(tiny_base, data)
    valid = Pairs.of(preference_rows(8, seed=9))
    result = fit(policy, data, CONFIG.change(keep="all", passes=20.0), validation=valid)
    best = result.history.set_index("step")["validation_loglik"]
    assert result.best_step == best.idxmax() < best.index[-1] and set(result.snapshots) == set(
        best.index
    )
    close(state(policy), result.snapshots[result.best_step], rtol=0, atol=0)
    for step in ("last", int(best.index[1]), "best"):
        result.restore(policy, step)
        number = {"last": best.index[-1], "best": result.best_step}.get(step, step)
        close(state(policy), result.snapshots[number], rtol=0, atol=0)
    with pytest.raises(ValueError, match="step=1: kept are .* keep='all' keeps every"):
        result.restore(policy, 1)
    with pytest.raises(
        ValueError, match=r"the policy has no experts\.sharpness, which the fit's had"
    ):
        result.restore(make(tiny_base, data, sharpness=False))
    last = fit(make(tiny_base, data), data, CONFIG)  # without validation pairs the last step stays
    assert set(last.snapshots) >= {20}


def test_the_last_step_may_be_called_the_best(tiny_base, data):
    """Unless the fit went wrong: then the likeliest one is put back, as ever."""
    valid, policy = Pairs.of(preference_rows(8, seed=9)), make(tiny_base, data)
    config = CONFIG.change(passes=20.0, stop__best="last")
    result = fit(policy, data, config, validation=valid)
    last, best = (
        int(result.history["step"].iloc[at])
        for at in (-1, int(result.history["validation_loglik"].argmax()))
    )
    assert result.best_step == last != best and set(result.snapshots) == {best, last}
    close(state(policy), result.snapshots[last], rtol=0, atol=0)
    assert f"step {last} is kept, as was chosen" in result.summary
    wrong = config.change(learning_rate=1e4, optimizer="sgd", evaluations_per_pass=4)
    failed = fit(make(tiny_base, data), data, wrong, validation=valid)
    assert failed.stop_reason in ("diverged", "non_finite")
    assert failed.best_step == failed.history["step"][failed.history["validation_loglik"].argmax()]
    with pytest.raises(ValueError, match="best='first': possible are 'likelihood' and 'last'"):
        Stop(best="first")


def test_a_fit_ends_with_a_sentence_for_people(tiny_base, data, capsys):
    short = fit(make(tiny_base, data), data, CONFIG.change(passes=0.25, learning_rate=1e-4))
    assert "almost nothing was learned: raise passes, min_steps or learning_rate" in short.summary
    assert short.summary in capsys.readouterr().err and short.summary in repr(short)
    wanted = preference_rows(6, users=1).to_list()
    rows = [w | {"user": f"user{u}"} for u in range(2) for w in wanted]
    for row in rows[6:]:
        row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    opposed = Pairs.of(datasets.Dataset.from_list(rows))
    config = CONFIG.change(passes=20.0, learning_rate=0.05)
    result = fit(make(tiny_base, opposed), opposed, config, validation=opposed)
    assert (
        "experts have parted" in result.summary
        and f"step {result.best_step} is kept" in result.summary
    )
    alone = fit(make(tiny_base, opposed, 3), opposed, config.change(start__kind="none"))
    assert "almost nothing was learned" in alone.summary
    three = fit(make(tiny_base, opposed, 3), opposed, config)
    assert "almost unused" in three.summary or "nearly equal" in three.summary


def test_a_small_set_is_passed_more_often_and_its_stages_stretch(tiny_base, data):
    result = fit(make(tiny_base, data), data, CONFIG.change(min_steps=40, evaluations_per_pass=1))
    history = result.history
    assert history["step"].tolist() == [
        0,
        8,
        16,
        24,
        32,
        40,
    ]  # five passes as they were asked for, of eight steps each
    assert history["pairs_seen"].iloc[-1] == 240  # which are ten passes over the pairs
    assert history["responsibility_temperature"].tolist()[:3] == pytest.approx([4, 1, 1])


def test_defaults_part_the_users_of_a_small_set(tiny_base):
    """With FitConfig() and nothing else: 30 pairs of 3 users with different tastes, an expert for each."""
    words = ("bright", "dull", "long")
    rows = []
    for u in range(3):
        for i, row in enumerate(preference_rows(10, users=1)):
            other = words[(u + 1 + i % 2) % 3]
            rows.append(
                {
                    "prompt": row["prompt"],
                    "chosen": f"it is {words[u]}",
                    "rejected": f"it is {other}",
                    "user": f"user{u}",
                }
            )
    data = Pairs.of(datasets.Dataset.from_list(rows))
    policy = MixturePolicy(HeadExperts(tiny_base, 3), LearnedWeights(3))
    result = fit(policy, data)
    q = policy.posterior(data).to_numpy()
    assert q.max(1).min() > 0.9 and sorted(q.argmax(1)) == [0, 1, 2], (q, result.summary)
    assert "experts have parted" in result.summary
