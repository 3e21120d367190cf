"""Growth: how many experts, which decisions, what stays to the bit, what is refused."""

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import plain_fit, preference_rows

import mixdpo_lib as mx
from mixdpo_lib.data.pairs import Pairs
from mixdpo_lib.elbo import log_responsibilities
from mixdpo_lib.evaluation import recovery
from mixdpo_lib.experts.tables import numbered_answers, numbered_pairs
from mixdpo_lib.learning import deciding, growing
from mixdpo_lib.learning.deciding import Growth
from mixdpo_lib.learning.growing import grow
from mixdpo_lib.learning.sketching import sketch
from mixdpo_lib.learning.teaching import BySteps, ByTable, Sets

N_ANSWERS = 8


def rows(pairs, unit):
    return numbered_pairs(pairs, N_ANSWERS, user=[f"u{u}" for u in unit.tolist()])


def table(n_experts=1):
    experts = mx.TabularExperts(N_ANSWERS, n_experts, answers=numbered_answers(N_ANSWERS))
    return mx.MixturePolicy(experts, mx.LearnedWeights(n_experts), beta=1.0)


def generated(n_groups, seed, users=240, per_user=12):
    truth = mx.TabularExperts(N_ANSWERS, n_groups)
    truth.perturb(3.0, torch.Generator().manual_seed(seed))
    belongs = torch.arange(users) % n_groups
    pairs, unit = truth.sample_pairs(belongs, per_user, torch.Generator().manual_seed(seed + 1))
    seen = unit < users * 2 // 3
    return belongs, rows(pairs[seen], unit[seen]), rows(pairs[~seen], unit[~seen])


@pytest.mark.parametrize("n_groups", [1, 3])
def test_one_expert_grows_to_as_many_as_there_are_groups(n_groups):
    belongs, train, held = generated(n_groups, seed=4)
    policy = table()
    grown = grow(policy, train, validation=held)
    assert grown.n_experts == policy.n_experts == policy.gate.n_experts == n_groups
    assert list(grown.table) == (
        ["proposal", "experts", "n_experts", "units", "gain", "error", "kept", "seconds"]
    )
    decided = grown.table[grown.table["proposal"].isin(["split", "birth"])]
    assert bool((decided["kept"] == (decided["gain"] > decided["error"].clip(0.01))).all())
    assert decided["kept"].sum() == n_groups - 1 and len(grown.loglik) == 80
    if n_groups > 1:
        found = recovery(policy.posterior(train), [str(int(z)) for z in belongs[:160]])
        assert found["nmi"] > 0.9


def test_too_many_experts_are_merged_or_retired():
    _, train, held = generated(2, seed=6)
    policy = table(4)
    policy.experts.perturb(1.0, torch.Generator().manual_seed(0))
    grown = grow(policy, train, validation=held)
    assert grown.n_experts == 2
    fewer = grown.table[grown.table["kept"] & grown.table["proposal"].isin(["merge", "retire"])]
    assert len(fewer) >= 2


def test_what_grew_is_taught_whole_before_any_of_it_may_go(monkeypatch):
    _, train, held = generated(3, seed=4)
    course, settle, decide = [], ByTable.settle, deciding.Growing.decide

    def settled(teacher, short):
        course.append("short" if short else "whole")
        settle(teacher, short)

    def decided(one, proposal):
        course.append(proposal.kind)
        return decide(one, proposal)

    monkeypatch.setattr(ByTable, "settle", settled)
    monkeypatch.setattr(deciding.Growing, "decide", decided)
    grow(table(), train, validation=held)
    fewer = course.index("retire")
    assert "split" in course[:fewer] and course[fewer - 1] == "whole"
    assert "short" in course[:fewer] and course[0] == "whole"


def test_a_taste_that_arrives_later_leaves_the_others_to_the_bit():
    belongs, train, held = generated(3, seed=4)
    early, early_held = (
        data.where([int(belongs[int(u[1:])]) < 2 for u in data.rows["user"]])
        for data in (train, held)
    )
    policy = table()
    assert grow(policy, early, validation=early_held).n_experts == 2
    old = [{n: v.clone() for n, v in policy.experts.own(k).items()} for k in range(2)]
    before, names = policy.log_posterior(early)
    grown = grow(policy, train, validation=held, freeze_others=True, freeze_users=names)
    assert grown.n_experts == 3
    for k in range(2):
        assert all(bool((policy.experts.own(k)[n] == v).all()) for n, v in old[k].items())
    after, again = policy.log_posterior(early)
    assert again == names and bool((after[:, 2] == -torch.inf).all())
    torch.testing.assert_close(after[:, :2], before.to(after), atol=1e-6, rtol=1e-6)
    q = policy.posterior(train)
    third = [f"u{u}" for u in range(160) if int(belongs[u]) == 2]
    assert float((q.loc[third, 2] > 0.5).mean()) > 0.9


def heads_of_two_kinds(base, n_pairs=96, lapse=0.0):
    """A policy of one head, and training and validation pairs of eight users of two kinds."""
    data = Pairs.of(preference_rows(n_pairs, users=8))
    policy = mx.MixturePolicy(mx.HeadExperts(base, 1, rank=2), mx.LearnedWeights(1), 0.3, lapse)
    held = np.array([(i // 8) % 4 == 3 for i in range(n_pairs)])
    return policy, data.where(~held), data.where(held)


HEADS = plain_fit(batch_size=8, passes=3.0, learning_rate=0.03)


def nmi_of_kinds(policy, train):
    q = policy.posterior(train)
    return recovery(q, ["ab"[int(name[4:]) % 2] for name in q.index])["nmi"]


@pytest.mark.parametrize("sketch", [False, True])
def test_heads_grow_by_gradient_steps(tiny_base, sketch):
    policy, train, held = heads_of_two_kinds(tiny_base, 480 if sketch else 96)
    growth = Growth(max_experts=2, sketch=sketch)
    grown = grow(policy, train, HEADS, validation=held, growth=growth)
    assert grown.n_experts == 2 and nmi_of_kinds(policy, train) == 1.0
    asked = grown.table["proposal"] == "linear rewards"
    first = grown.table[~asked].iloc[0]
    assert bool(asked.any()) == sketch and (first["proposal"] == "linear") == sketch
    assert (
        first["kept"] and first["n_experts"] == 1
    )  # what linear rewards find is the first that experts decide


def test_what_experts_refuse_of_linear_rewards_leaves_growth_as_it_was_without(
    tiny_base, monkeypatch
):
    """Experts that learn nothing but lapses are no gain. What follows is as in a growth that knows nothing of it."""
    policy, train, held = heads_of_two_kinds(tiny_base, lapse="learn")
    monkeypatch.setattr(growing, "sketch", lambda *_: (2, []))
    monkeypatch.setattr(BySteps, "fit_anew", lambda one: one.policy.lapse_rate.fill_(0.4))
    found = grow(policy, train, HEADS, validation=held, growth=Growth(max_experts=2))
    assert found.table["proposal"][0] == "linear" and not found.table["kept"][0]
    plain, train, held = heads_of_two_kinds(tiny_base, lapse="learn")
    alone = grow(plain, train, HEADS, validation=held, growth=Growth(max_experts=2, sketch=False))
    told = found.table.drop(columns="seconds")[1:].reset_index(drop=True)
    pd.testing.assert_frame_equal(told, alone.table.drop(columns="seconds"))
    assert policy.lapse == plain.lapse


def test_one_kind_by_linear_rewards_leaves_a_single_fit_to_experts(tiny_base, monkeypatch):
    policy, train, held = heads_of_two_kinds(tiny_base)
    monkeypatch.setattr(growing, "sketch", lambda *_: (1, []))
    found = grow(policy, train, HEADS, validation=held, growth=Growth(errors=1e9))
    assert found.table["proposal"].tolist() == ["linear"] and found.n_experts == 1


def test_one_expert_more_than_linear_rewards_find_is_fitted_while_it_holds(tiny_base, monkeypatch):
    policy, train, held = heads_of_two_kinds(tiny_base, 480)
    monkeypatch.setattr(growing, "sketch", lambda *_: (1, []))
    found = grow(policy, train, HEADS, validation=held, growth=Growth(max_experts=3))
    assert found.table["kept"][0] and found.table["n_experts"].tolist()[:2] == [1, 2]
    assert nmi_of_kinds(policy, train) == 1.0


@pytest.mark.parametrize("n_pairs", [96, 480])
def test_a_single_expert_that_is_its_reference_learns_whole_before_it_is_compared(
    tiny_base, n_pairs
):
    """Of many texts some have rewards of 1e-7 by rounding: that is nothing learned."""
    policy, train, held = heads_of_two_kinds(tiny_base, n_pairs)
    growth = Growth(errors=1e9, max_experts=2, sketch=False)
    grown = grow(policy, train, HEADS, validation=held, growth=growth)
    plain, _, _ = heads_of_two_kinds(tiny_base, n_pairs)
    mx.fit(plain, train, HEADS, validation=held)
    assert grown.n_experts == 1
    torch.testing.assert_close(policy.loglik(held), plain.loglik(held))


def test_what_an_expert_has_learned_is_not_thrown_away_by_linear_rewards(tiny_base):
    """Nor are they asked where each unit has one pair: no start of a fit reads so little."""
    policy, train, held = heads_of_two_kinds(tiny_base)
    policy.experts.start(train)
    policy.experts.perturb(1e-3, torch.Generator().manual_seed(0))
    growth = Growth(max_experts=2)
    grown = grow(policy, train, HEADS, validation=held, growth=growth)
    assert not grown.table["proposal"].str.startswith("linear").any()
    policy, train, held = heads_of_two_kinds(tiny_base)
    alone = Pairs.of(
        train.rows.remove_columns("user").add_column("user", [f"u{i}" for i in range(len(train))])
    )
    grown = grow(policy, alone, HEADS, validation=held, growth=growth)
    assert not grown.table["proposal"].str.startswith("linear").any()


@pytest.mark.parametrize("kinds", [1, 2])
def test_linear_rewards_find_as_many_kinds_as_there_are(tiny_base, kinds):
    _, train, held = heads_of_two_kinds(tiny_base, 480)
    if kinds == 1:
        train, held = (
            data.where([int(name[4:]) % 2 == 0 for name in data.rows["user"]])
            for data in (train, held)
        )
    found, rows = sketch(tiny_base, Sets.of(train, held, "user"), Growth(), seed=0)
    assert found == kinds and sum(row[6] for row in rows) == kinds - 1
    assert [row[6] for row in rows[-2:]] == [False, False]  # two refusals end it
    most, _ = sketch(tiny_base, Sets.of(train, held, "user"), Growth(max_experts=2), seed=0)
    assert most == kinds


def test_gradients_of_units_equal_those_of_plain_autograd(tiny_base):
    """Both ways: of tables in closed form, of heads by a backward pass a unit."""
    belongs, train, held = generated(2, seed=2, users=12)
    policy = table()
    policy.experts.perturb(0.5, torch.Generator().manual_seed(0))
    sets = Sets.of(train, held, "user")
    found = ByTable(policy, sets, mx.FitConfig()).gradients(policy.experts, torch.tensor([3, 5]))
    slow = BySteps(policy, sets, mx.FitConfig()).gradients(policy.experts, torch.tensor([3, 5]))
    torch.testing.assert_close(found.float(), slow, atol=1e-5, rtol=1e-4)


def test_of_many_pairs_some_evenly_spaced_say_where_a_unit_points_and_whose_it_is():
    """Each of twelve pairs stands eight times: every second of them points where all point, half as likely in nats."""
    _, train, held = generated(2, seed=2, users=12)
    many = Pairs.of(train.rows.select([i for i in range(len(train)) for _ in range(8)]))
    policy = table()
    policy.experts.perturb(0.5, torch.Generator().manual_seed(0))
    sets = Sets.of(many, held, "user")
    teachers = [one(policy, sets, mx.FitConfig()) for one in (ByTable, BySteps)]
    exact, some = (one.gradients(policy.experts, torch.tensor([0, 4])) for one in teachers)
    assert len(many) > 2 * 48 and bool(exact.any())
    torch.testing.assert_close(exact.float(), some, atol=1e-4, rtol=1e-4)
    assert teachers[1].asked_unit.bincount().tolist() == [48] * 8
    (of_all, held_all), (of_some, held_some) = (one.logliks(policy.experts) for one in teachers)
    torch.testing.assert_close(of_all, 2 * of_some)
    assert torch.equal(held_all, held_some)  # what decides is asked whole


def test_held_out_likelihood_of_units_by_hand():
    """Known units by their own training pairs, others by the weights alone."""
    _, train, held = generated(2, seed=3, users=30)
    policy = table(2)
    policy.experts.perturb(1.0, torch.Generator().manual_seed(0))
    both = train.where([u in ("u0", "u1") for u in train.rows["user"]])
    grown = grow(policy, train, validation=both, growth=Growth(errors=1e9, refusals=1))
    log_q, names = policy.log_posterior(train)
    loglik, (unit, own) = policy.loglik(both).double(), both.units("user")
    for place, name in enumerate(own):
        total = loglik[unit == place].sum(0)
        wanted = (log_q[names.index(name)].double() + total).logsumexp(0)
        assert grown.loglik[name] == pytest.approx(float(wanted), abs=1e-4)
    assert log_responsibilities(loglik[:1], policy.log_w(both)[:1]).shape == (1, policy.n_experts)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"validation": None}, "validation: found none; every proposal is decided by pairs"),
        ({"config": mx.FitConfig(latent="pair")}, "latent='pair': expected 'unit'"),
        (
            {"freeze_users": ["nobody"], "freeze_others": True},
            r"freeze_users=\['nobody'\]: no training pairs of them",
        ),
        ({"freeze_users": ["u0"]}, r"found freeze_others=False, expected True: users can keep"),
        ({"gate": mx.FixedWeights([1.0])}, "FixedWeights does not learn: expected weights"),
        ({"gate": mx.ContextGate(4, 1)}, "ContextGate reads the prompt: expected weights"),
        ({"one": True}, "validation has 1 unit in column 'user'; expected at least 2"),
    ],
)
def test_growth_that_cannot_be_decided_is_refused(changed, said):
    _, train, held = generated(2, seed=3, users=12)
    policy = table()
    policy.gate = changed.pop("gate", policy.gate)
    if changed.pop("one", False):
        held = held.where([u == held.rows["user"][0] for u in held.rows["user"]])
    with pytest.raises(ValueError, match=said):
        grow(policy, train, changed.pop("config", None), **{"validation": held, **changed})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"errors": 0}, "errors=0: expected above 0"),
        ({"refusals": 0}, "refusals=0: expected at"),
        ({"max_experts": 1}, "max_experts=1: expected at least 2"),
    ],
)
def test_bad_choices_of_growth_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        Growth(**options)


def test_users_who_keep_nothing_are_not_set_back_to_equal_weights():
    """Every proposal is refused: who was served at .9 and .1 still is, named or not."""
    _, train, held = generated(1, seed=4)
    policy = table(2)
    policy.experts.perturb(2.0, torch.Generator().manual_seed(0))
    policy.gate = mx.LearnedWeights(2)
    policy.gate.update(torch.tensor([0.9, 0.1]), n_units=10_000)
    growth = Growth(max_experts=2)
    grow(
        policy, train, validation=held, growth=growth, freeze_others=True, freeze_users=["u0", "u1"]
    )
    assert policy.n_experts == 2
    weights = policy.gate.log_w({"kept": torch.tensor([True, False])}).exp()
    assert weights[0, 0] == pytest.approx(0.9, abs=0.01)
    q = policy.posterior(train).mean()
    assert weights[1].tolist() == pytest.approx(q.tolist(), abs=0.02)  # where EM ends


def test_a_gate_that_reads_what_differs_inside_a_unit_is_refused():
    _, train, held = generated(2, seed=2, users=12)
    towns = ["x" if i % 5 else "y" for i in range(len(train))]
    mixed = train.rows.add_column("town", towns)
    held = held.rows.add_column("town", ["x"] * len(held))
    policy = table()
    policy.gate = mx.UserGate.from_metadata({"town": ["x", "y"]}, 1)
    with pytest.raises(ValueError, match="row 1: metadata differs from the first row of its user"):
        grow(policy, mixed, validation=held)


def test_growth_may_be_told_of_routing(tiny_base):
    """Of one expert that is taught alone there is none; what the gate reads is routed as asked for."""
    _, train, held = heads_of_two_kinds(tiny_base)
    ages = [20.0 + 10 * (int(name[4:]) % 2) for name in train.rows["user"]]
    train = Pairs.of(train.rows.add_column("age", ages))
    held_ages = [20.0 + 10 * (int(name[4:]) % 2) for name in held.rows["user"]]
    held = Pairs.of(held.rows.add_column("age", held_ages))
    gate = mx.UserGate.from_metadata({"age": ages}, 1)
    policy = mx.MixturePolicy(mx.HeadExperts(tiny_base, 1, rank=2), gate, 0.3)
    config = HEADS.change(routing=mx.Routing(balance=0.5))
    growth = Growth(max_experts=2, sketch=False)
    assert len(grow(policy, train, config, validation=held, growth=growth).table) > 0


def test_a_growth_that_is_interrupted_leaves_what_it_had(tiny_base, monkeypatch):
    policy, train, held = heads_of_two_kinds(tiny_base, 480, lapse="learn")
    seen, before = [], []
    fresh = growing.sketch

    def sketched(*given):
        before.extend([policy.lapse, policy.experts])
        return fresh(*given)

    def stopped(self):
        seen.append(self.policy.n_experts)
        self.policy.lapse_rate.fill_(0.4)
        raise KeyboardInterrupt

    monkeypatch.setattr(BySteps, "fit_anew", stopped)
    monkeypatch.setattr(growing, "sketch", sketched)
    with pytest.raises(KeyboardInterrupt):
        grow(policy, train, HEADS, validation=held, growth=Growth(max_experts=2))
    assert seen == [2] and policy.n_experts == policy.gate.n_experts == 1
    assert policy.lapse == pytest.approx(before[0]) and policy.experts is before[1]
