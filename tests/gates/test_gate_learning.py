"""Gates inside EM: M-steps that cannot fall, fits that route, top-S in training, experts that stay as they are."""

import math

import datasets
import numpy as np
import pytest
import torch
from tiny import plain_fit, sentence

from mixdpo_lib.data.pairs import Pairs
from mixdpo_lib.elbo import certified_gap, mixture_log_likelihood, restricted_log_likelihood
from mixdpo_lib.experts.heads import HeadExperts
from mixdpo_lib.gates.inputs import distinct_rows
from mixdpo_lib.gates.m_step import gate_em, gate_loss, gate_m_step
from mixdpo_lib.gates.membership import MixedMembershipGate
from mixdpo_lib.gates.prompt import ContextGate
from mixdpo_lib.gates.user import UserGate, given_gate
from mixdpo_lib.gates.weights import FixedWeights, LearnedWeights
from mixdpo_lib.learning import full_batch, trainer
from mixdpo_lib.learning.fit import fit, fit_gate
from mixdpo_lib.learning.inference import Relaxed
from mixdpo_lib.learning.starts import cluster_log_q
from mixdpo_lib.policy.mixture import MixturePolicy
from mixdpo_lib.study.new_users import first_pairs, serve_by_gate, serve_by_pairs

CONFIG = plain_fit(
    latent="pair",
    batch_size=8,
    passes=6.0,
    learning_rate=0.02,
    start__temperature=1.0,
    start__kind="clusters",
    start__passes=1.0,
)


def routed_rows(n=48, seed=0):
    """Prompts that begin with `film` want `bright`, those that begin with `story` want `dull`; four users."""
    rng, rows = np.random.default_rng(seed), []
    for i in range(n):
        first, good, bad = [
            ("film film film", "bright", "dull"),
            ("story story story", "dull", "bright"),
        ][i % 2]
        shared = f"{sentence(rng, 1, 2)} {{}} {sentence(rng, 1, 2)}"
        rows.append(
            {
                "prompt": f"{first} {sentence(rng, 1, 2)}",
                "chosen": shared.format(good),
                "rejected": shared.format(bad),
                "ended": False,
                "user": f"user{(i // 2) % 4}",
                "domain": ["film", "story"][i % 2],
                "country": "xy"[(i // 2) % 2],
            }
        )
    return datasets.Dataset.from_list(rows)


@pytest.fixture(scope="module")
def data(tiny_base):
    return Pairs.of(routed_rows())


def make(base, data, gate, n_experts=2, scale=0.0):
    experts = HeadExperts(base, n_experts, rank=4)
    experts.activate_responses(data)
    if scale:
        experts.perturb(scale, torch.Generator().manual_seed(3))
    return MixturePolicy(experts, gate, 0.3)


def context_gate(base, data, n_experts=2, **options):
    return ContextGate.from_prompts(
        base, data.rows["prompt"], n_experts, **({"weight_scale": 1.0} | options)
    )


# -------------------------------------------------------------------------------------------------------- the M-step


def random_problem(rows=60, features=5, k=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, features, generator=generator)
    log_q = (2 * torch.randn(rows, k, generator=generator)).log_softmax(1)
    return {"state": x}, log_q


@pytest.mark.parametrize("options", [{}, {"entropy_weight": 0.1}, {"balance_weight": 0.5}])
def test_an_m_step_reaches_the_minimum_and_never_rises(options):
    inputs, log_q = random_problem()
    gate = ContextGate(5, 3, weight_scale=0.7)

    def value():
        return (gate_loss(gate(inputs), log_q, **options) - gate.log_prior() / len(log_q)).item()

    losses = [value()]
    for _ in range(12):
        said = gate_m_step(gate, inputs, log_q, max_iter=3, **options)
        assert said == pytest.approx(value(), abs=1e-6)
        losses.append(said)
    assert (
        all(b <= a + 1e-6 for a, b in zip(losses, losses[1:], strict=False))
        and losses[-1] < losses[0] - 0.02
    )
    (gate_loss(gate(inputs), log_q, **options) - gate.log_prior() / len(log_q)).backward()
    assert float(gate.outer.weight.grad.norm()) < 1e-3
    gate_m_step(gate, inputs, log_q, max_iter=1)
    assert (
        gate.outer.weight.grad is None
    )  # the experts' optimiser clips by all gradients: none is left behind


@pytest.mark.parametrize("options", [{}, {"entropy_weight": 0.1}, {"balance_weight": 0.5}])
def test_equal_rows_are_computed_once(options):
    inputs, log_q = random_problem(rows=9)
    repeated = {"state": inputs["state"][torch.tensor([0, 3, 0, 1, 3, 3, 2, 0, 1])]}
    distinct, place = distinct_rows(repeated, 9)
    assert len(distinct["state"]) == 4 and torch.equal(distinct["state"][place], repeated["state"])
    gates = [ContextGate(5, 3, weight_scale=0.7) for _ in range(2)]
    whole = gate_m_step(gates[0], repeated, log_q, max_iter=80, **options)
    once = gate_m_step(gates[1], distinct, log_q, max_iter=80, place=place, **options)
    assert once == pytest.approx(whole, abs=1e-5)
    torch.testing.assert_close(gates[1](repeated), gates[0](repeated), atol=2e-3, rtol=2e-3)


def test_a_prior_keeps_weights_small():
    inputs, log_q = random_problem(rows=6, features=20)
    sizes = []
    for scale in (0.1, 10.0):
        gate = ContextGate(20, 3, weight_scale=scale)
        gate_m_step(gate, inputs, log_q, max_iter=50)
        sizes.append(float(gate.outer.weight.norm()))
    assert sizes[0] < 0.5 * sizes[1]
    both = MixedMembershipGate([gate], 3, ["ann"], offset_scale=0.5)
    with torch.no_grad():
        both.offset += 1.0
    assert float(both.log_prior()) == pytest.approx(float(gate.log_prior()) - 3 / (2 * 0.25))


def test_em_of_the_gate_alone_finds_who_answers_what():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 2, generator=generator)
    expert = (x[:, 0] > 0).long()
    loglik = torch.full((400, 2), math.log(0.3))
    loglik[torch.arange(400), expert] = math.log(0.8)  # what each expert says of each pair, noisy
    gate = ContextGate(2, 2, weight_scale=3.0)
    with torch.no_grad():
        gate.outer.weight[0, 0] = -0.1
    found = gate_em(gate, {"state": x}, loglik)
    rise = found.history["objective"].diff().dropna()
    assert found.converged and (rise > -1e-7).all() and len(found.history) > 3
    assert (gate({"state": x}).argmax(1) == expert).double().mean() > 0.97
    best = loglik.max(1).values.mean()
    assert found.history["loglik"].iloc[-1] == pytest.approx(float(best), abs=0.05)


def test_em_of_input_free_weights_is_the_fixed_point():
    loglik = torch.rand(50, 3, generator=torch.Generator().manual_seed(1)).log()
    gate = LearnedWeights(3, alpha=1.0)
    found = gate_em(gate, {}, loglik, tolerance=1e-9, max_iter=2000)
    assert found.converged
    torch.testing.assert_close(
        found.log_q.exp().mean(0), gate.log_w()[0].exp(), atol=1e-3, rtol=1e-3
    )
    fixed = gate_em(FixedWeights([0.5, 0.5]), {}, loglik[:, :2])
    expected = mixture_log_likelihood(loglik[:, :2], torch.tensor([0.5, 0.5]).log()).mean()
    assert fixed.history["loglik"].tolist() == [pytest.approx(float(expected))]


def test_clusters_are_seeded_and_need_something_to_read():
    inputs = {"state": torch.cat([torch.randn(20, 3), torch.randn(20, 3) + 8])}
    log_q = cluster_log_q(inputs, 2, seed=0)
    assert torch.equal(log_q, cluster_log_q(inputs, 2, seed=0))
    label = log_q.argmax(1)
    assert len(set(label[:20].tolist())) == 1 and label[0] != label[20]
    torch.testing.assert_close(log_q.exp().sum(1), torch.ones(40))
    crossed = torch.tensor(
        [[0.0, 0.0], [9.0, 0.0], [0.0, 1.0], [9.0, 1.0]]
    )  # two works, two templates far apart
    label = (
        cluster_log_q({"state": crossed}, 2, seed=0, together=["a", "a", "b", "b"])
        .argmax(1)
        .tolist()
    )
    assert label[0] == label[1] != label[2] == label[3]
    with pytest.raises(
        ValueError, match="needs a gate that reads prompts or metadata; this one reads nothing"
    ):
        cluster_log_q({}, 2, seed=0)
    with pytest.raises(ValueError, match="1 distinct inputs of the gate for 2 experts"):
        cluster_log_q({"metadata": torch.ones(4, 2)}, 2, seed=0)
    with pytest.raises(ValueError, match="symmetry_breaking='clusters': possible are"):
        full_batch.full_batch_em(
            None, LearnedWeights(2), torch.zeros(1, 2).long(), symmetry_breaking="clusters"
        )


# -------------------------------------------------------------------------------------------------------------- fits


def test_a_fit_routes_prompts(tiny_base, data):
    routed = make(tiny_base, data, context_gate(tiny_base, data))
    result = fit(routed, data, CONFIG, validation=data)
    weights = routed.log_w(data).detach().exp()
    films = torch.tensor([d == "film" for d in data.rows["domain"]])
    gap = (weights[films].mean(0) - weights[~films].mean(0)).abs()
    assert float(gap.min()) > 0.5
    free = make(
        tiny_base, data, LearnedWeights(2)
    )  # the same experts' worth of parameters, and nothing to read
    plain = fit(free, data, CONFIG.change(start__kind="random_responsibilities"), validation=data)
    last = [r.history["validation_loglik"].iloc[-1] for r in (result, plain)]
    assert last[0] > last[1] + 0.005
    expected = (routed.loglik(data) + routed.log_w(data).detach()).logsumexp(1).exp()
    torch.testing.assert_close(routed.predict(data), expected)


def test_a_latent_of_a_prompt_may_read_the_prompt_and_one_of_a_user_may_not(tiny_base, data):
    config = CONFIG.change(latent="unit", passes=1.0)
    with pytest.raises(
        ValueError,
        match=r"state differs from the first row of its user \(column 'prompt': .*: with latent='unit'",
    ):
        fit(make(tiny_base, data, context_gate(tiny_base, data)), data, config)
    policy = make(tiny_base, data, context_gate(tiny_base, data))
    half = data.where([i < 24 for i in range(48)])
    other = data.where([i >= 24 for i in range(48)])  # new prompts: the gate alone predicts them
    result = fit(policy, half, config.change(unit="prompt"), validation=other)
    assert math.isfinite(result.history["validation_loglik"].iloc[-1])
    with pytest.raises(
        ValueError, match="have no training pairs; expected units with some, or a gate that reads"
    ):
        fit(
            make(tiny_base, data, LearnedWeights(2)),
            half,
            config.change(unit="prompt", start__kind="none"),
            validation=other,
        )


def test_a_gate_of_users_is_fitted_by_unit(tiny_base, data):
    metadata = {"country": ["x", "y"]}
    policy = make(tiny_base, data, UserGate.from_metadata(metadata, 2), scale=0.3)
    config = CONFIG.change(latent="unit", start__kind="none")
    result = fit(policy, data, config)
    assert bool(policy.gate.outer.weight.any()) and result.stop_reason == "max_iter"
    frozen = make(tiny_base, data, given_gate("country", ["x", "y"], 2))
    before = frozen.gate.outer.weight.clone()
    fit(frozen, data, config)
    assert torch.equal(frozen.gate.outer.weight, before)
    table = frozen.posterior(data)
    assert sorted(table.iloc[:, 0].round(6).tolist()) == [0.0, 0.0, 1.0, 1.0]


def test_a_fit_with_a_gate_resumes_exactly(tiny_base, data, tmp_path, monkeypatch):
    whole = make(tiny_base, data, context_gate(tiny_base, data))
    expected = fit(whole, data, CONFIG)

    def stop(stage, done, total, *_):
        if total == 36 and done == 22:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "progress", stop)
        with pytest.raises(KeyboardInterrupt):
            fit(make(tiny_base, data, context_gate(tiny_base, data)), data, CONFIG, folder=tmp_path)
    again = make(tiny_base, data, context_gate(tiny_base, data))
    result = fit(again, data, CONFIG, folder=tmp_path)
    for name, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert result.history["elbo"].tolist() == expected.history["elbo"].tolist()


# ------------------------------------------------------------------------------------------------------------- top-S


def test_training_with_all_experts_kept_is_training_with_all(tiny_base, data):
    states = []
    for top_s in (None, 2):
        policy = make(tiny_base, data, context_gate(tiny_base, data))
        fit(policy, data, CONFIG.change(routing__top_s=top_s))
        states.append(policy.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lapse", [0.0, 0.2])
def test_only_the_kept_experts_are_computed_in_training(tiny_base, data, monkeypatch, lapse):
    asked = []
    policy = make(tiny_base, data, context_gate(tiny_base, data, 3), n_experts=3, scale=0.1)
    policy = MixturePolicy(policy.experts, policy.gate, policy.beta, lapse)
    inner = policy.experts.logps

    def logps(batch, chosen=None):
        asked.append(chosen)
        return inner(batch, chosen)

    monkeypatch.setattr(policy.experts, "logps", logps)
    config = CONFIG.change(routing__top_s=1, start__kind="none", evaluate_training=True)
    result = fit(policy, data, config)
    kept = [chosen for chosen in asked if chosen is not None]  # evaluations compute all
    assert len(kept) == 36 and all((chosen.sum(1) == 2).all() for chosen in kept)  # one at random
    assert (result.history["certified_gap"] > 0).all() and result.history["elbo"].iloc[
        -1
    ] > -math.log(2)
    loglik, log_w = policy.loglik(data), policy.log_w(data).detach()
    true = mixture_log_likelihood(loglik, log_w) - restricted_log_likelihood(loglik, log_w, 1)
    certified = certified_gap(loglik, log_w, 1, lapse=lapse)
    assert (certified >= true - 1e-6).all()
    assert result.history["certified_gap"].iloc[-1] == pytest.approx(
        float(certified.mean()), abs=1e-4
    )


def test_degenerate_routing_trains(tiny_base, data):
    gate = context_gate(tiny_base, data, 3)
    with torch.no_grad():
        gate.outer.bias.copy_(
            torch.tensor([50.0, 0.0, 0.0])
        )  # one expert takes all, the others are never chosen
    policy = make(tiny_base, data, gate.requires_grad_(False), n_experts=3, scale=0.1)
    start = policy.experts.up.detach().clone()
    result = fit(policy, data, CONFIG.change(routing__top_s=1, start__kind="none"))
    assert not torch.equal(policy.experts.up[0], start[0])
    assert torch.equal(policy.experts.up[1:], start[1:])
    assert torch.isfinite(policy.experts.up).all() and math.isfinite(
        result.history["elbo"].iloc[-1]
    )
    assert policy.predict(data, top_s=1).isfinite().all()


# -------------------------------------------------------------------------------------------- new users, same experts


def parameters_of(policy):
    return {name: value.clone() for name, value in policy.experts.state_dict().items()}


@pytest.fixture
def fitted(tiny_base, data):
    return make(tiny_base, data, UserGate.from_metadata({"country": ["x", "y"]}, 2), scale=0.5)


def test_serving_new_users_leaves_the_experts_bit_for_bit(fitted, data):
    before = parameters_of(fitted)
    served = [serve_by_pairs(fitted, data, 8), serve_by_gate(fitted, data, 8)]
    fit_gate(fitted, data)
    fitted.user(data.where([u == "user1" for u in data.rows["user"]]))
    for name, value in fitted.experts.state_dict().items():
        assert torch.equal(value, before[name]), name
    for log_w in served:
        assert log_w.shape == (4, 2)
        torch.testing.assert_close(log_w.exp().sum(1), torch.ones(4))
    assert bool(fitted.gate.outer.weight.any())  # the gate moved


def test_serving_by_pairs_is_the_posterior_of_each_user(fitted, data):
    table = serve_by_pairs(fitted, data, 5)
    for i, user in enumerate(("user0", "user1", "user2", "user3")):
        own = data.where([u == user for u in data.rows["user"]])
        torch.testing.assert_close(
            table[i], fitted.user(own.where([n < 5 for n in range(len(own))]))
        )
    assert len(first_pairs(data, 5)) == 20
    torch.testing.assert_close(serve_by_pairs(fitted, data, 0).exp(), torch.full((4, 2), 0.5))


def test_an_offset_of_one_user_is_that_of_all_users_at_once(fitted, data):
    both = serve_by_gate(fitted, data, 12)
    gate = MixedMembershipGate([fitted.gate], 2, ["somebody"])
    own = MixturePolicy(fitted.experts, gate, 0.3)
    for i, user in enumerate(("user0", "user1")):
        pairs = data.where([u == user for u in data.rows["user"]])
        torch.testing.assert_close(own.user(pairs).exp(), both[i].exp(), atol=5e-3, rtol=5e-3)
    torch.testing.assert_close(own.user(metadata={"country": "x"}).exp(), torch.tensor([0.5, 0.5]))
    with pytest.raises(
        ValueError,
        match=r"metadata column 'country' is absent; found \[\]: the gate was trained with it",
    ):
        own.user()


def test_what_a_fit_with_a_gate_refuses(tiny_base, data):
    reading, free = context_gate(tiny_base, data), LearnedWeights(2)
    for gate, options, message in (
        (
            free,
            {"routing__top_s": 1, "start__kind": "none"},
            "top_s=1.* with LearnedWeights, .* the same experts",
        ),
        (
            free,
            {"routing__balance": 0.1, "start__kind": "none"},
            "balance=0.1.* with LearnedWeights",
        ),
        (reading, {"routing__top_s": 3}, r"top_s=3 with 2 experts: expected 1 ... 2"),
        (
            reading,
            {"inference": Relaxed()},
            r"inference=Relaxed.* with ContextGate: expected Exact\(\)",
        ),
        (free, {}, "start kind='clusters' needs a gate that reads"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(make(tiny_base, data, gate), data, CONFIG.change(**options))
    with pytest.raises(ValueError, match="top_s=1 with Relaxed"):
        plain_fit(routing__top_s=1, inference=Relaxed())
    with pytest.raises(ValueError, match="top_s=0: expected at least 1 expert"):
        plain_fit(routing__top_s=0)
    with pytest.raises(ValueError, match="all 3 prompts have the same state"):
        ContextGate.from_states(torch.ones(3, 4), 2)
    offsets = make(tiny_base, data, MixedMembershipGate([], 2, ["user0"], column="person"))
    with pytest.raises(ValueError, match="column 'person' is missing"):
        offsets.predict(data)
