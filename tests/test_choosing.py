"""A mixture against one policy on held-out pairs, and the number of experts, by hand and on a tiny base."""

import math

import datasets
import numpy as np
import pytest
import torch
from tiny import plain_fit, preference_rows

import mixdpo_lib as mx
from mixdpo_lib import choosing
from mixdpo_lib.data.pairs import Text
from mixdpo_lib.policy.remarks import SAME, of_the_gate

ANSWERS = [Text("p", "a", True), Text("p", "b", True)]


def rows(*choices):
    """One pair a choice: user and the answer that was chosen, "a" or "b"."""
    return datasets.Dataset.from_list(
        [
            {"prompt": "p", "chosen": one, "rejected": "b" if one == "a" else "a", "user": user}
            for user, one in choices
        ]
    )


@pytest.fixture
def table(tiny_base):
    """Experts whose reward of answer "a" over answer "b" is given, nats; beta 1, a uniform reference."""

    def make(*rewards):
        experts = mx.TabularExperts(2, len(rewards), beta=1.0, answers=ANSWERS, base=tiny_base)
        with torch.no_grad():
            experts.rewards[:, 0] = torch.tensor(rewards, dtype=experts.rewards.dtype)
        return mx.MixturePolicy(experts, mx.LearnedWeights(len(rewards)), beta=1.0)

    return make


LOG3 = math.log(3)  # sigma(log 3) = 3/4
TRAIN = rows(("ann", "a"), ("ann", "a"), ("bob", "b"), ("bob", "b"))


def test_a_report_by_hand(table):
    test = rows(("ann", "a"), ("bob", "b"), ("bob", "b"))
    found = mx.report(table(LOG3, -LOG3), TRAIN, test, single=table(0.0))
    # q of each user's own expert: (3/4)^2 / ((3/4)^2 + (1/4)^2) = .9; prediction .9 x .75 + .1 x .25 = .7
    assert found.units["loglik"].tolist() == pytest.approx([math.log(0.7)] * 2)
    assert found.units["single_loglik"].tolist() == pytest.approx([math.log(0.5)] * 2)
    assert found.units[["n_train", "n_test", "served_by"]].to_numpy().tolist() == [
        [2, 1, 0],
        [2, 2, 1],
    ]
    gain = math.log(0.7 / 0.5)  # the same for both users: the interval is a point
    assert found.totals.loc[
        "difference", ["loglik", "loglik_low", "loglik_high"]
    ].tolist() == pytest.approx([gain] * 3)
    assert found.totals["accuracy"].tolist() == pytest.approx([1.0, 0.5, 0.5])
    assert found.certainty == pytest.approx(0.8)  # (.9 - .5) / .5
    # chosen answers, weighted by .9 and .1 as the expert serves them: ann's log(3/4) - log(1/2), bob's log(1/4) - log(1/2)
    serves = np.array([[0.9, 0.1, 0.1], [0.1, 0.9, 0.9]])
    nats = np.log([[0.75, 0.25, 0.25], [0.25, 0.75, 0.75]]) - math.log(0.5)
    assert found.experts["distance"].tolist() == pytest.approx(
        list((serves * nats).sum(1) / serves.sum(1))
    )
    assert found.experts["remark"].tolist() == ["", ""]
    assert found.sentence == (
        "K = 2 predicts test pairs better than one policy by 0.336 nats per pair, by more than 0.336 at 99 %: the mixture "
        "pays for these 2 units, which are too few to speak for others."
    )
    assert found.sentence in repr(found) and "2 units are few" in repr(found)


def test_a_report_says_when_one_policy_serves_as_well_or_better(table):
    test = rows(("ann", "a"), ("bob", "a"))  # bob is served by the wrong expert
    found = mx.report(table(LOG3, -LOG3), TRAIN, test, single=table(0.0))
    assert found.units["loglik"].tolist() == pytest.approx([math.log(0.7), math.log(0.3)])
    assert found.sentence.endswith("no sign that a mixture pays.")
    test = rows(("ann", "b"), ("bob", "a"))
    found = mx.report(table(LOG3, -LOG3), TRAIN, test, single=table(0.0))
    assert found.sentence.startswith("K = 2 predicts test pairs worse than one policy by")
    assert found.sentence.endswith("one policy serves better.")


def test_a_verdict_is_sure_at_99_percent(table):
    """Twenty users of whom some are served by the wrong expert: three are few enough, four are not."""
    train = rows(*[(f"u{i}", "a") for i in range(20) for _ in range(2)])
    for wrong, pays in ((4, False), (3, True)):
        test = rows(*[(f"u{i}", "b" if i < wrong else "a") for i in range(20)])
        found = mx.report(table(LOG3, -LOG3), train, test, single=table(0.0))
        gains = np.log([0.3] * wrong + [0.7] * (20 - wrong)) - math.log(0.5)
        reach = 2.539 * gains.std(ddof=1) / 20**0.5  # Student's t of 19 degrees of freedom at 99 %
        assert found.bounds == pytest.approx((gains.mean() - reach, gains.mean() + reach), abs=1e-4)
        assert found.pays == pays == found.sentence.endswith("the mixture pays.")


def test_sure_experts_are_no_evidence(table):
    found = mx.report(
        table(20.0, -20.0), TRAIN, rows(("ann", "a"), ("bob", "a")), single=table(0.0)
    )
    assert found.certainty > 0.999
    assert found.sentence.endswith("no sign that a mixture pays.")


def test_dead_and_equal_experts_are_named(table):
    found = mx.report(
        table(LOG3, LOG3 + 1e-3, -9.0),
        rows(("ann", "a"), ("ann", "a"), ("bob", "a")),
        rows(("ann", "a"), ("bob", "a")),
        single=table(0.0),
    )
    assert found.experts["remark"].tolist() == ["", "like expert 0", "dead"]


def test_pairs_that_were_trained_on_are_no_test(table):
    test = rows(("ann", "a"), ("bob", "a"))
    found = mx.report(table(LOG3, -LOG3), TRAIN, test, single=table(0.0))
    seen = {(row["user"], row["chosen"]) for row in TRAIN}
    again = sum((row["user"], row["chosen"]) in seen for row in test)
    assert again == 1
    assert found.notes[0].startswith(
        "WARNING: 1 of 2 test pairs stand among the training pairs too"
    )


def test_items_of_a_survey_are_asked_again_and_nothing_is_said(capsys):
    data = mx.item_pairs(*[["red"] * 3, ["blue"] * 3, ["red", "red", "blue"]], user=[1, 2, 2])
    policy = mx.MixturePolicy(mx.TabularExperts.of(None, data, 2), mx.LearnedWeights(2))
    mx.fit(policy, data, plain_fit(passes=1.0), validation=data)
    found = mx.report(policy, data, data, single=policy_of_one(data))
    assert "stand among" not in capsys.readouterr().err + "".join(found.notes)


def policy_of_one(data):
    return mx.MixturePolicy(mx.TabularExperts.of(None, data, 1), mx.LearnedWeights(1))


@pytest.mark.parametrize("strength, silent", [(0.5, True), (0.01, False)])
def test_many_experts_may_differ_by_little_each(strength, silent):
    """At .5, half of the users' weight lies elsewhere than the others', and less than .02 of it at any of 64 nodes."""
    gate = mx.DirectionGate(64, {"age": (40.0, 10.0)})
    with torch.no_grad():
        gate.weight[0, 0] = strength
    columns = {"covariates": {"age": [30, 50]}, "user": ["ann", "bob"]}
    data = mx.item_pairs(["red"] * 2, ["blue"] * 2, ["red", "blue"], **columns)
    weights = gate.log_w(gate.inputs(data.columns, None))
    assert float((weights.exp()[0] - weights.exp()[1]).abs().max()) < SAME
    policy = mx.MixturePolicy(mx.GroupTables.of(None, data, 64), gate)
    assert (of_the_gate(policy, data, "user") == []) == silent


def test_units_that_are_not_measured_are_named(table):
    train = rows(("ann", "a"), ("bob", "b"), ("cleo", "a"))
    test = rows(("ann", "a"), ("bob", "b"))
    found = mx.report(table(LOG3, -LOG3), train, test, single=table(0.0))
    assert "without test pairs, not measured: cleo" in repr(found) and list(found.units.index) == [
        "ann",
        "bob",
    ]
    with pytest.raises(
        ValueError, match=r"units \['eve'\] have no training pairs, and the gate reads nothing"
    ):
        mx.report(table(LOG3, -LOG3), train, rows(("ann", "a"), ("eve", "b")), single=table(0.0))


def with_country(data):
    home = {"ann": "x", "bob": "y", "eve": "y"}
    return data.add_column("country", [home[user] for user in data["user"]])


def test_an_unknown_unit_is_served_by_a_gate_that_reads(table):
    policy = table(LOG3, -LOG3)
    gate = mx.UserGate({"country": ["x", "y"]}, 2)
    with torch.no_grad():
        gate.outer.weight.copy_(torch.tensor([[LOG3, 0.0], [0.0, LOG3]]))  # 3/4 for the own expert
    policy.gate = gate
    train, test = with_country(TRAIN), with_country(rows(("ann", "a"), ("eve", "b")))
    found = mx.report(policy, train, test, single=table(0.0))
    # ann: 3 x 9 against 1 x 1; eve by the gate alone: 3/4 x 3/4 + 1/4 x 1/4
    assert found.units["loglik"].tolist() == pytest.approx(
        [math.log(27 / 28 * 0.75 + 1 / 28 * 0.25), math.log(0.625)]
    )
    assert found.units.loc["eve", "n_train"] == 0
    assert "without training pairs, served by the gate alone: eve" in found.notes
    assert not any("learned nothing" in note for note in found.notes)
    with torch.no_grad():
        gate.outer.weight.mul_(0.01)
    found = mx.report(policy, train, test, single=table(0.0))
    assert any(note.startswith("the gate learned nothing of country") for note in found.notes)
    mixed = train.remove_columns("country").add_column("country", ["x", "y", "y", "y"])
    with pytest.raises(
        ValueError, match="training pairs of user 'ann' differ in what the gate reads"
    ):
        mx.report(policy, mixed, test, single=table(0.0))


@pytest.mark.parametrize(
    ("rewards", "test", "options", "message"),
    [
        ([1.0], TRAIN, {}, "found K = 1, expected a mixture"),
        (
            [1.0, 0.0],
            rows(("ann", "a")),
            {},
            "test has 1 unit in column 'user'; expected at least 2",
        ),
        ([1.0, 0.0], TRAIN, {"unit": "group"}, "unit column 'group' is missing"),
    ],
)
def test_a_report_refuses(table, rewards, test, options, message):
    with pytest.raises(ValueError, match=message):
        mx.report(table(*rewards), TRAIN, test, **options)


def test_whole_models_need_a_single_policy_of_their_own(tiny_base):
    policy = mx.MixturePolicy(mx.IndependentExperts([tiny_base, tiny_base]), mx.LearnedWeights(2))
    with pytest.raises(ValueError, match=r"IndependentExperts.*bases\[:1\].*give single="):
        choosing.single_counterpart(policy)


def test_the_single_counterpart_is_equal_but_for_k(tiny_base):
    policy = mx.MixturePolicy(
        mx.HeadExperts(tiny_base, 3, rank=2), mx.LearnedWeights(3), beta=0.2, lapse="learn"
    )
    single = choosing.single_counterpart(policy)
    assert (
        single.experts.describe() == {**policy.experts.describe(), "n_experts": 1}
        and single.beta == 0.2
        and single.given_lapse == "learn"
    )
    tables = mx.MixturePolicy(mx.TabularExperts.of(tiny_base, TRAIN, 2), mx.LearnedWeights(2))
    alone = choosing.single_counterpart(tables).experts
    assert (
        alone.n_experts == 1
        and alone.log_ref.equal(tables.experts.log_ref)
        and alone.log_ref[0] != alone.log_ref[1]
    )


# ------------------------------------------------------------------------------------------------- on a tiny base
CONFIG = mx.FitConfig().change(passes=1.0, min_steps=40, evaluations_per_pass=4)
NOUNS = {
    "train": ["film", "plot", "story", "actor"],
    "validation": ["scene", "music"],
    "test": ["look", "cast"],
}


def people(equal):
    """Twelve users who compare "bright" and "dull" of the same nouns; two opposed groups, or one taste."""
    parts = {}
    for name, nouns in NOUNS.items():
        parts[name] = []
        for noun in nouns:
            for i in range(12):
                good, bad = ("bright", "dull") if equal or i % 2 == 0 else ("dull", "bright")
                row = {
                    "prompt": f"the {noun} is",
                    "chosen": f"very {good}",
                    "rejected": f"very {bad}",
                }
                parts[name].append({**row, "user": f"user{i}"})
    return datasets.DatasetDict(
        {name: datasets.Dataset.from_list(rows) for name, rows in parts.items()}
    )


@pytest.fixture(scope="module")
def opposed():
    return people(equal=False)


@pytest.fixture(scope="module")
def alike():
    return people(equal=True)


def fitted(base, pairs):
    policy = mx.MixturePolicy(mx.HeadExperts(base, 2), mx.LearnedWeights(2))
    mx.fit(policy, pairs["train"], CONFIG, validation=pairs["validation"])
    return policy


def test_a_mixture_pays_for_opposed_users(tiny_base, opposed):
    policy = fitted(tiny_base, opposed)
    found = mx.report(
        policy, opposed["train"], opposed["test"], config=CONFIG, validation=opposed["validation"]
    )
    assert found.sentence.endswith("the mixture pays.")
    assert found.totals.loc["difference", "accuracy"] > 0.2
    assert len({found.units.loc[f"user{i}", "served_by"] for i in range(0, 12, 2)}) == 1


def test_a_mixture_does_not_pay_for_equal_users(tiny_base, alike):
    policy = fitted(tiny_base, alike)
    found = mx.report(
        policy, alike["train"], alike["test"], config=CONFIG, validation=alike["validation"]
    )
    assert not found.sentence.endswith("the mixture pays.")


def test_k_is_two_for_two_opposed_groups(tiny_base, opposed):
    found = mx.choose_k(tiny_base, opposed, [1, 2, 3], config=CONFIG)
    assert found.chosen == 2 and found.table.index[found.table["chosen"]].tolist() == [2]
    assert found.held_out.shape == (12, 3)
    behind = found.held_out[found.table["loglik"].idxmax()] - found.held_out[1]
    assert found.table.loc[1, "behind"] == pytest.approx(behind.mean())
    assert found.table.loc[1, "error"] == pytest.approx(behind.std(ddof=1) / 12**0.5)
    assert repr(found).endswith(
        "K = 2: the smallest within one standard error of the best, 12 units"
    )


def test_k_is_one_for_equal_users(tiny_base, alike):
    def make(k):
        return mx.MixturePolicy(mx.HeadExperts(tiny_base, k, rank=4), mx.LearnedWeights(k))

    found = mx.choose_k(
        make, alike["train"], np.array([2, 1]), config=CONFIG, validation=alike["validation"]
    )
    assert found.chosen == 1 and list(found.table.index) == [1, 2]


def test_choose_k_refuses(table, opposed):
    for ks in ([], [0, 1], [2, 2]):
        with pytest.raises(
            ValueError, match="expected distinct numbers of experts, each at least 1"
        ):
            mx.choose_k(lambda k: table(*[0.0] * k), opposed, ks)
    with pytest.raises(ValueError, match=r"no part 'validation'; found \['train'\]"):
        mx.choose_k(lambda k: table(*[0.0] * k), TRAIN, [1, 2])
    with pytest.raises(ValueError, match=r"make\(2\) gave a policy of 1 experts; expected 2"):
        mx.choose_k(lambda k: table(0.0), opposed, [2])


def test_a_report_of_a_gate_that_reads_the_prompt(tiny_base):
    """Its users answer several prompts, each with weights of its own."""
    data = preference_rows(48, users=4)
    gate = mx.ContextGate.from_prompts(tiny_base, data["prompt"], 2)
    policy = mx.MixturePolicy(mx.HeadExperts(tiny_base, 2, rank=2), gate, 0.3)
    config = plain_fit(latent="pair", passes=1.0, batch_size=8)
    mx.fit(policy, data, config)
    found = mx.report(policy, data, data, config=config)
    assert found.units["n_test"].sum() == len(data) and found.experts["usage"].sum() == (
        pytest.approx(1.0)
    )


@pytest.mark.parametrize("own", [{"start__kind": "clusters"}, {"routing__balance": 1.0}])
def test_a_report_takes_the_configuration_that_the_mixture_was_fitted_with(tiny_base, own):
    data = preference_rows(48, users=4)
    data = data.add_column("town", ["x" if u in ("user0", "user1") else "y" for u in data["user"]])
    gate = mx.UserGate.from_metadata({"town": ["x", "y"]}, 2)
    policy = mx.MixturePolicy(mx.HeadExperts(tiny_base, 2, rank=2), gate, 0.3)
    config = plain_fit(passes=1.0, batch_size=8).change(**own)
    mx.fit(policy, data, config)
    assert len(mx.report(policy, data, data, config=config).units) == 4


def test_units_may_be_truth_values(table):
    yes = datasets.Dataset.from_list([{**row, "user": row["user"] == "ann"} for row in TRAIN])
    found = mx.report(table(LOG3, -LOG3), yes, yes, single=table(0.0))
    assert found.units[["n_train", "n_test"]].to_dict("index") == {
        name: {"n_train": 2, "n_test": 2} for name in ("true", "false")
    }


def test_a_report_says_where_a_column_names_its_users_and_chosen_answers_are_lost(table):
    far = 30.0  # log sigma(-30): the chosen answer is 29 nats less likely than under the base
    test = rows(("ann", "a"), ("bob", "b"))
    found = mx.report(table(far, -far), TRAIN, rows(("ann", "b"), ("bob", "a")), single=table(0.0))
    assert any(
        "expert 0 (-29 nats), 1 (-29 nats) gives the chosen answers" in n for n in found.notes
    )
    town = {"ann": "Ede", "bob": "Oss"}
    train, test = (
        part.add_column("town", [town[user] for user in part["user"]]) for part in (TRAIN, test)
    )
    policy = table(LOG3, -LOG3)
    policy.gate = mx.UserGate.from_metadata({"town": train["town"]}, 2)
    found = mx.report(policy, train, test, single=table(0.0))
    assert any("column 'town' names each user" in note for note in found.notes)
    assert not any("gives the chosen answers" in note for note in found.notes)
    more = datasets.concatenate_datasets([train, rows(("cy", "a")).add_column("town", ["Ede"])])
    found = mx.report(policy, more, test, single=table(0.0))
    assert not any("column 'town'" in note for note in found.notes)
