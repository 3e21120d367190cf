"""Methods of the field on the tiny study: each fits, and does what it is named for."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from small_study import small_study

from mixdpo_lib.learning.config import FitConfig
from mixdpo_lib.learning.inference import Moment
from mixdpo_lib.learning.table import LoglikTable
from mixdpo_lib.policy.mixture import MixturePolicy
from mixdpo_lib.study.baseline_parts import (
    GroupRobust,
    HardAssignment,
    OneHot,
    RobustWeights,
    simplex,
    soup,
)
from mixdpo_lib.study.baselines import METHODS, Baselines, method_table
from mixdpo_lib.study.comparisons import served_by_own_pairs
from mixdpo_lib.study.fits import kept_rewards
from mixdpo_lib.study.frontiers import at_strength, base_rewards, drawn_points, served_texts
from mixdpo_lib.study.judges import REWARDS
from mixdpo_lib.study.tables import design_gains
from mixdpo_lib.study.told_in_prompt import sentence

FITTED = [
    name for name in METHODS if name not in ("moe_dpo", "translations_2")
]  # others show as much
NOW = Moment(step=5, share=0.5, temperature=1.0, training=True)


@pytest.fixture(scope="module")
def study(tiny_base):
    with pytest.MonkeyPatch.context() as patch:
        yield small_study(Baselines, tiny_base, patch, passes=2.0)


@pytest.fixture(scope="module")
def fits(study):
    return {method: study.fitted(method, 0) for method in FITTED}


def table(*losses, unit=(0, 0, 1, 1)):
    """Last-seen losses of each expert, a row a pair."""
    made = LoglikTable(torch.tensor(unit), len(losses[0]))
    made.fill(-torch.tensor(losses))
    return made


def test_every_method_is_told_what_its_table_says():
    said = method_table()
    assert list(said.index[said["knows_groups"]]) == ["robust", "soup_equal", "soup", "oracle"]
    assert list(said.index[said["reads_metadata"]]) == ["dpo_metadata", "moe_dpo"]
    assert list(said.index[said["profile"] == "full"]) == ["dpo_metadata", "translations_2"]
    assert (said["source"] != "").all()


def test_rewards_of_a_soup_are_kept_by_all_that_they_depend_on(study, fits):
    policy, texts = fits["soup"].policy, study.texts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(policy), "text_rewards", lambda *_: pytest.fail("computed again"))
        torch.testing.assert_close(kept_rewards(policy, texts), fits["soup"].rewards)
    other = MixturePolicy(policy.experts, policy.gate, 2 * policy.beta, policy.lapse)
    torch.testing.assert_close(kept_rewards(other, texts), 2 * fits["soup"].rewards)
    with at_strength(policy.experts, 0.5):
        assert not torch.equal(kept_rewards(policy, texts), fits["soup"].rewards)


def test_every_method_has_its_accuracy(study, fits):
    by_prompt = study.accuracy_by_prompt(list(fits.values()))
    assert set(by_prompt["method"]) == set(FITTED) and by_prompt["accuracy"].between(0, 1).all()
    routings = by_prompt.groupby("method")["routing"].unique().map(set)
    alone = {"dpo", "dpo_metadata", "uniform", "robust", "soup_equal"}
    assert {name for name, ways in routings.items() if ways == {"none"}} == alone
    sizes = by_prompt.groupby(["method", "users", "routing"])["n_pairs"].sum()
    assert sizes.nunique() == 1  # all are scored on the same pairs
    gains = design_gains(by_prompt)
    assert set(gains["method"]) == set(FITTED) - {"dpo"}
    found = study.validation_accuracy(list(fits.values()))
    assert set(found["group"]) == {*REWARDS, "mean", "worst"}
    assert found.groupby("method")["knows_groups"].first().to_dict() == {
        name: METHODS[name].knows_groups for name in FITTED
    }


def test_accuracy_by_user_is_that_by_prompt_with_each_user_alone(study, fits):
    every = list(fits.values())
    by_user = study.accuracy_by_user(every)
    keys = ["method", "group", "prompt_id"]
    alone = by_user.groupby(keys).agg({"accuracy": "mean", "n_pairs": "first", "user": "nunique"})
    together = served_by_own_pairs(study.accuracy_by_prompt(every)).set_index(keys).sort_index()
    assert (alone["user"] == study.config.design.n_users / len(REWARDS)).all()
    assert alone["n_pairs"].equals(together["n_pairs"])
    assert np.allclose(alone["accuracy"], together["accuracy"])
    f, test = fits["mix_dpo"], study.pairs()["test"]
    mine = by_user[(by_user["method"] == "mix_dpo") & (by_user["user"] == f.units[-1])]
    mine = mine.set_index("prompt_id")
    group = mine["group"].iloc[0]
    both = zip(test.rows["group"], test.rows["prompt_id"], strict=True)
    own = test.where([one == (group, mine.index[0]) for one in both])
    hits = (f.policy.predict(own, user=f.log_q[-1]) > 0.5).double()
    assert mine["accuracy"].iloc[0] == float(hits.mean()) and mine["n_pairs"].iloc[0] == len(own)


def test_validation_accuracy_by_hand(study, fits):
    f, data = fits["mix_dpo"], study.pairs()["validation"]
    hits = []
    for user in f.units:
        own = data.where([one == user for one in data.rows["user"]])
        likely = f.policy.predict(own, user=f.log_q[f.units.index(user)])
        hits.append((own.rows["group"][0], float((likely > 0.5).double().mean())))
    by_hand = pd.DataFrame(hits, columns=["group", "hits"]).groupby("group")["hits"].mean()
    found = study.validation_accuracy([f]).set_index("group")["accuracy"]
    for group in REWARDS:
        assert found[group] == pytest.approx(by_hand[group])
    assert found["mean"] == pytest.approx(by_hand.mean())
    assert found["worst"] == pytest.approx(by_hand.min())


def test_users_are_written_by_their_own_experts(study, fits):
    methods = ["dpo", "mix_dpo", "oracle", "translations", "dpo_metadata"]
    before = fits["dpo"].policy.experts.up.clone()
    texts = served_texts(study, [fits[m] for m in methods], [0.5, 1.0], 3)
    assert torch.equal(fits["dpo"].policy.experts.up, before)
    assert len(texts) == 5 * 2 * 3 * 3 and (texts["kl"] >= 0).all()
    assert set(texts["prompt_id"]) == set(list(study.splits["test"])[:3])
    alone = texts[texts["method"] == "dpo"]
    assert (alone.groupby(["factor", "number"])["text"].nunique() == 1).all()
    for row in alone.itertuples():  # each group by its own judge
        said = study.judged([row.prompt], [row.text], "evaluation")
        assert row.reward == pytest.approx(said[row.group][0])
    own = texts[texts["method"] == "oracle"].groupby("group")["expert"].unique()
    assert [list(own[g]) for g in REWARDS] == [[0], [1], [2]]
    kl = texts.groupby(["method", "factor"])["kl"].mean().unstack()
    assert (kl[0.5] < kl[1.0]).all()
    drawn = drawn_points(texts, base_rewards(study))
    assert drawn.methods == methods and drawn.n_texts == 3
    assert drawn.budget("worst") == min(drawn.kl[m, "worst"][0].max() for m in methods)


# --------------------------------------------------------------------------------------------------- each by itself


def test_hard_assignments_are_one_hot():
    part = OneHot(table([0.2, 0.9], [0.9, 0.8], [0.9, 0.1], [0.3, 0.2]))
    q, penalty = part.weights(torch.tensor([0, 1, 3]), torch.tensor([[0.5, 0.5]]).log(), NOW)
    assert q.tolist() == [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]] and float(penalty) == 0


def test_hard_clusters_are_fitted_with_equal_weights(study, fits):
    f = fits["hard_clusters"]
    assert study.fit_config("hard_clusters", 0).inference == HardAssignment()
    assert torch.allclose(f.policy.gate.log_w().exp(), torch.full((1, 3), 1 / 3))
    assert not torch.equal(f.policy.experts.up, fits["mix_dpo"].policy.experts.up)


def test_robust_weights_by_hand():
    part = RobustWeights(table([0.5], [0.7], [0.6], [0.9], unit=(0, 0, 0, 1)), step=2.0)
    row, log_w, index = torch.tensor([0, 1, 3]), torch.zeros(1, 1), torch.zeros(4, 2).long()
    weights, _ = part.weights(row, log_w, NOW)
    alpha = np.exp(2.0 * np.array([0.6, 0.9]))
    alpha /= alpha.sum()
    by_hand = [alpha[0] / 0.75, alpha[0] / 0.75, alpha[1] / 0.25]
    assert weights.squeeze(1).tolist() == pytest.approx(by_hand)
    said = {"weight_0": alpha[0], "weight_1": alpha[1]}
    assert part.measure(log_w, index) == pytest.approx(said)
    part.weights(row, log_w, NOW)  # a further part of the same step
    assert part.measure(log_w, index) == pytest.approx(said)
    part.weights(row, log_w, dataclasses.replace(NOW, training=False))
    assert part.measure(log_w, index) == pytest.approx(said)  # moved by training alone
    with pytest.raises(ValueError, match="step=0: expected above 0"):
        GroupRobust(step=0)


def test_robust_weights_rise_for_the_worst_group(study, fits):
    f, train = fits["robust"], study.pairs()["train"]
    weights = f.result.history[[f"weight_{g}" for g in range(3)]]
    assert np.allclose(weights.sum(1), 1, atol=1e-5) and np.allclose(weights.iloc[0], 1 / 3)
    ids, names = train.units("group")
    loss = [-float(f.policy.loglik(train, f.rewards)[ids == g].mean()) for g in range(3)]
    assert int(np.argmax(loss)) == int(np.argmax(weights.iloc[-1])) and names == list(REWARDS)
    assert weights.iloc[-1].max() > 1 / 3


def test_what_weighs_one_expert_too_is_part_of_a_fit():
    plain, robust = FitConfig(), FitConfig(inference=GroupRobust())
    assert "inference" not in plain.identity(1, False)
    assert robust.identity(1, False)["inference"] == {"kind of choice": "GroupRobust", "step": 0.1}


def test_a_corner_of_the_soup_is_that_groups_dpo(fits):
    oracle, grid = fits["oracle"], simplex(3, 3)
    for group in range(3):
        corner = int((grid[:, group] == 1).nonzero())
        torch.testing.assert_close(
            fits["soup"].rewards[:, corner], oracle.rewards[:, group], atol=1e-5, rtol=0
        )


def test_a_soup_is_the_mean_of_products_and_not_of_factors(fits):
    heads = fits["oracle"].policy.experts
    with torch.no_grad():  # A of other experts would be the same where nothing was learned
        assert not torch.allclose(heads.down[0], heads.down[1])
    made = soup(heads, torch.tensor([[0.2, 0.3, 0.5]]))
    down, up, s = made.low_rank(0)
    expected = sum(w * heads.up[k] @ heads.down[k] for k, w in enumerate((0.2, 0.3, 0.5)))
    torch.testing.assert_close(up @ down, expected.detach(), atol=1e-6, rtol=1e-4)
    assert s == pytest.approx(float(torch.tensor([0.2, 0.3, 0.5]) @ heads.sharpness.detach()))
    assert made.rank == 12 and torch.equal(made.active_ids, heads.active_ids)
    assert fits["soup_equal"].policy.n_experts == 1


def test_a_uniform_mixture_is_of_equal_weights_and_other_fits(study, fits):
    f = fits["uniform"]
    assert torch.allclose(f.policy.gate.log_w().exp(), torch.full((1, 3), 1 / 3))
    assert torch.allclose(f.log_q.exp(), torch.full((6, 3), 1 / 3))
    for k in range(3):
        assert torch.equal(f.policy.experts.up[k], study.fitted(f"dpo_{k}", 0).policy.experts.up[0])
    assert not torch.allclose(f.rewards[:, 0], f.rewards[:, 1], atol=1e-4)
    torch.testing.assert_close(f.policy.text_rewards(study.texts), f.rewards, atol=1e-5, rtol=0)
    assert study.fit_config("dpo_2", 1).seed == 2001


def test_users_of_translations_have_a_density_on_a_grid(study, fits):
    f = fits["translations"]
    assert f.log_q.shape == (6, 32) and f.policy.experts.n_sets == 2
    assert torch.allclose(f.policy.gate.log_w()[0].double(), f.policy.experts.nodes.log_prior)
    placed = f.policy.taste(f.log_q).direction
    assert placed.shape == (6, 1) and float(placed.std()) > 1e-3
    two = study.new_policy("translations_2", study.pairs()["train"])
    assert two.experts.n_sets == 3 and two.experts.nodes.points.shape == (64, 2)


def test_a_policy_that_is_told_who_asks(study, fits):
    told = study.told
    assert len(told.texts) == 9 * len(study.texts) and len(told.sentences) == 9
    mine, theirs = told.pairs()["train"].rows, study.pairs()["train"].rows
    for i in (0, 30, 71):
        row = theirs[i]
        said = sentence(row["genre"], row["age_band"])
        assert mine[i]["prompt"] == said + row["prompt"] and mine[i]["chosen"] == row["chosen"]
    assert told.fit_config("dpo", 0).batch_size == 9 * study.config.fit.batch_size
    f, test = fits["dpo_metadata"], told.pairs()["test"]
    assert len(test) == 9 * len(study.pairs()["test"])
    found = study.accuracy_by_prompt([f]).query("users == 'new' and group == 'grammar'")
    context = told.pairs()["context"]
    known = context.where([g == "grammar" for g in context.rows["group"]]).rows
    by_hand = []
    for user in sorted(set(known["user"])):
        said = known["told"][list(known["user"]).index(user)]
        both = zip(test.rows["told"], test.rows["group"], strict=True)
        own = test.where([one == (said, "grammar") for one in both])
        by_hand.append(float((f.policy.predict(own) > 0.5).double().mean()))
    mean = np.average(found["accuracy"], weights=found["n_pairs"])
    assert mean == pytest.approx(np.mean(by_hand)) and len(own) == found["n_pairs"].sum()
