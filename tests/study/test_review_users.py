"""The arrows of the study on a tiny model with made-up judges: what comes out of each, and that it is kept."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from small_study import judge, small_study

from mixdpo_lib.elbo import log_responsibilities
from mixdpo_lib.experts.heads import prefix_kl
from mixdpo_lib.policy.generating import Generated
from mixdpo_lib.study import equal_kl
from mixdpo_lib.study import fits as fits_file
from mixdpo_lib.study import texts as texts_file
from mixdpo_lib.study.judges import REWARDS
from mixdpo_lib.study.review_users import ReviewUsers, review_users_config, study_methods
from mixdpo_lib.study.simulated_people import simulate_preferences
from mixdpo_lib.study.tables import expert_sharpness


@pytest.fixture(scope="module")
def study(tiny_base):
    with pytest.MonkeyPatch.context() as patch:
        yield small_study(ReviewUsers, tiny_base, patch)


@pytest.fixture(scope="module")
def fits(study):
    return study.fits(["dpo", "mix_dpo"], [0])


def test_flat_values_find_their_place():
    config = review_users_config(
        ["clean"], n_prompts=9, pairs_per_user=3, passes=2.0, n_experts=4, beta=0.5
    )
    assert (
        config.candidates.n_prompts == 9
        and config.fit.passes == 2
        and (config.n_experts, config.beta) == (4, 0.5)
    )
    assert config.designs == ("clean",) and config.design.pairs_per_user == 3
    assert review_users_config().designs == ("default", "clean")
    assert review_users_config(start_temperature=7.0, restarts=2).fit.start.temperature == 7
    for unknown in ("n_prompt", "seed", "latent"):
        with pytest.raises(
            ValueError, match=f"{unknown}=1 is no choice of the study; possible are .*n_prompts"
        ):
            review_users_config(**{unknown: 1})


def test_the_control_has_as_many_parameters_as_the_mixture():
    methods = study_methods(3, 8)
    assert methods["dpo_rank_3r"].rank == 24 and methods["dpo_rank_3r"].n_experts == 1
    assert methods["mix_dpo"].latent == "unit" and methods["mix_dpo_pair"].latent == "pair"
    assert {m.n_experts for m in methods.values()} == {1, 3}


def test_plain_dpo_alone_has_neither_sharpness_nor_lapses(study):
    train, other = study.pairs("default")["train"], study.variant()
    other.config = replace(study.config, lapse="learn")
    for method in study.methods:
        policy = other.new_policy(method, train)
        assert (policy.experts.sharpness is None) == (method == "dpo_plain")
        assert policy.given_lapse == (0 if method == "dpo_plain" else "learn")
    other.config = replace(study.config, sharpness=False)
    assert other.new_policy("mix_dpo", train).experts.sharpness is None


def test_pairs_share_the_candidates_features(study):
    sets = study.pairs("default")
    assert len(sets["train"]) == 72 and len(sets["context"]) == 12
    for part in sets.values():
        assert part.texts is study.texts
    assert study.pairs("default") is sets


def test_each_seed_has_users_of_its_own_and_the_same_test_pairs(study):
    first, other = study.preferences("default"), study.preferences("default", 1)
    today = simulate_preferences(study.candidates, study.scores, study.config.design)
    assert all(first[part].to_list() == today[part].to_list() for part in first)
    for part in ("train", "validation", "context"):
        assert first[part].to_list() != other[part].to_list()
        assert len(first[part]) == len(other[part])
    assert first["test"].to_list() == other["test"].to_list()
    assert study.pairs("default", 1) is study.pairs("default", 1) is not study.pairs("default")


def test_a_fit_is_kept(study, fits, monkeypatch):
    monkeypatch.setattr(fits_file, "fit", lambda *_, **__: pytest.fail("fitted again"))
    again = ReviewUsers(study.config)
    for name in ("base", "prompts", "judges"):
        setattr(again, name, getattr(study, name))
    for before in fits:
        after = again.fitted(before.method, 0, before.design)
        pd.testing.assert_frame_equal(after.result.history, before.result.history)
        assert torch.equal(after.log_q, before.log_q) and after.order == before.order
        assert torch.equal(after.policy.experts.up, before.policy.experts.up)
    assert study.fitted("dpo", 0, "default") is fits[0]


def test_the_policy_is_the_one_of_the_best_step(study, fits):
    for f in fits[:2]:
        history = f.result.history.set_index("step")
        assert f.result.best_step == history.index[-1]  # the last: fits end with a rate of 0
        sets = study.pairs("default")
        ids, users = sets["train"].units("user")
        log_q = log_responsibilities(f.policy.loglik(sets["train"]), f.policy.gate.log_w()[0], ids)
        torch.testing.assert_close(log_q, f.log_q)
        assert users == f.units
        weights = log_q[[users.index(u) for u in sets["validation"].rows["user"]]]
        found = float((f.policy.loglik(sets["validation"]) + weights).logsumexp(1).mean())
        assert found == pytest.approx(
            history.loc[f.result.best_step, "validation_loglik"], rel=1e-4
        )


def test_every_method_has_its_accuracy_under_every_routing(study):
    fits = [study.fitted(method, 0, "clean") for method in study.methods]
    by_prompt = study.accuracy_by_prompt(fits)
    assert set(by_prompt["method"]) == {
        "dpo",
        "dpo_plain",
        "dpo_rank_3r",
        "mix_dpo",
        "mix_dpo_pair",
        "moe_dpo",
        "oracle",
    }
    told = by_prompt[by_prompt["method"] == "oracle"].pivot_table(
        index=["users", "group", "prompt_id"], columns="routing", values="accuracy"
    )
    assert np.allclose(told["prior"], told["own_pairs"]) and np.allclose(
        told["prior"], told["oracle"]
    )
    seen = by_prompt.query("method == 'moe_dpo' and users == 'seen'")
    assert (
        set(seen["routing"]) == {"prior", "own_pairs", "oracle"}
        and seen["accuracy"].between(0, 1).all()
    )


def test_tables(study, fits):
    by_prompt = study.accuracy_by_prompt(fits)
    assert set(by_prompt["group"]) == set(REWARDS) and by_prompt["accuracy"].between(0, 1).all()
    routings = by_prompt.groupby("method")["routing"].unique().map(set).to_dict()
    assert routings == {"dpo": {"none"}, "mix_dpo": {"prior", "own_pairs", "oracle"}}
    assert set(by_prompt["users"]) == {"seen", "new"} and set(by_prompt["prompt_id"]) <= set(
        range(32, 40)
    )
    q = study.responsibilities(fits)
    mixture = q[(q["method"] == "mix_dpo") & (q["design"] == "default")]
    assert len(mixture) == 18 and np.allclose(
        mixture.groupby("user")["responsibility"].sum(), 1, atol=1e-5
    )
    assert set(mixture["expert_serves"]) == set(REWARDS)
    recovered = study.recovery(fits)
    assert {"design", "method", "seed", "nmi", "ari", "aligned_accuracy", "n_users"} <= set(
        recovered
    )
    assert len(study.history(fits)) == sum(len(f.result.history) for f in fits)
    assert set(study.stop_reasons(fits).values()) == {"max_iter"} and len(study.restarts(fits)) == 4


def test_oracle_routing_is_one_expert(study, fits):
    by_prompt = study.accuracy_by_prompt(fits)
    (mixture,) = [f for f in fits if (f.design, f.method) == ("default", "mix_dpo")]
    test = study.pairs("default")["test"]
    loglik = mixture.policy.loglik(test).exp()
    part = by_prompt.query("design == 'default' and routing == 'oracle' and users == 'new'")
    for group, expert in zip(REWARDS, mixture.order, strict=True):
        rows = np.flatnonzero(np.array(test.rows["group"]) == group)
        own = part[part["group"] == group]
        expected = float((loglik[rows, expert] > 0.5).float().mean())
        assert float(np.average(own["accuracy"], weights=own["n_pairs"])) == pytest.approx(
            expected, abs=1e-6
        )


POLICIES = [
    "dpo",
    "dpo_plain",
    *(f"expert_{g}" for g in REWARDS),
    "base_sharpened",
    "dpo_sharpened",
]


@pytest.fixture(scope="module")
def matched(study, fits):
    return equal_kl.matched_scales(study, "default", [0])


def test_policies_are_brought_to_the_kl_of_dpo(study, fits, monkeypatch):
    def sampled(study, fitted, name, expert, scale, sharpness, prompt_ids):
        """DPO's samples are twice as far as its prefixes say, those of the others as far."""
        assert set(prompt_ids) == set(range(28, 32))  # validation
        _, ids = texts_file.candidates_on(study, range(28, 32))
        experts = texts_file.rewritten(fitted.policy.experts, expert, [(scale, sharpness)])
        kl = float(prefix_kl(experts, study.texts, ids)[0, 0]) * (2 if name == "dpo" else 1)
        n = len(prompt_ids)
        return Generated(["a"] * n, [0] * n, [0.0] * n, [0.0] * n, [1] * n, [False] * n, [kl] * n)

    monkeypatch.setattr(equal_kl, "sampled_texts", sampled)
    table = equal_kl.matched_scales(study, "default", [0]).set_index("policy")
    assert list(table.index) == POLICIES and table.loc["dpo", "scale"] == 1
    dpo, mixture = (
        next(f for f in fits if (f.design, f.method) == ("default", m)) for m in ("dpo", "mix_dpo")
    )
    experts = table.loc[[f"expert_{g}" for g in REWARDS]]
    assert experts["expert"].tolist() == mixture.order
    np.testing.assert_allclose(
        table["prefix_kl"].iloc[1:], 2 * table.loc["dpo", "prefix_kl"], rtol=0.02
    )
    own = np.array(mixture.sharpness)[mixture.order]
    np.testing.assert_allclose(experts["sharpness"], experts["scale"] * own, rtol=1e-5)
    assert table.loc["dpo", "sharpness"] == pytest.approx(dpo.sharpness[0])
    assert table.loc["dpo_plain", "sharpness"] == 0 == table.loc["base_sharpened", "scale"]
    assert table.loc["dpo_sharpened", "scale"] == 0.5
    assert table.loc["dpo_sharpened", "sharpness"] > dpo.sharpness[0]


def test_kl_of_the_sharpness_and_of_the_head_alone(matched):
    table = matched.set_index("policy")
    both, s, head = (table[c] for c in ("prefix_kl", "prefix_kl_sharpness", "prefix_kl_head"))
    assert s["dpo_plain"] == pytest.approx(0, abs=1e-5) and head["dpo_plain"] == both["dpo_plain"]
    assert head["base_sharpened"] == pytest.approx(0, abs=1e-5)
    assert s["base_sharpened"] == both["base_sharpened"]
    assert (both > 1e-4).all() and (head.drop("base_sharpened") > 1e-4).all()


def test_a_rewritten_expert_of_the_same_numbers_is_the_expert(study, fits):
    mixture = next(f for f in fits if (f.design, f.method) == ("default", "mix_dpo"))
    _, ids = texts_file.candidates_on(study, range(28, 32))
    same = [(1.0, mixture.sharpness[1]), (0.5, 0.5 * mixture.sharpness[1])]
    found = prefix_kl(texts_file.rewritten(mixture.policy.experts, 1, same), study.texts, ids)
    whole = prefix_kl(mixture.policy.experts, study.texts, ids, [1.0, 0.5])[:, 1]
    np.testing.assert_allclose(found[0], whole, rtol=1e-5)


def test_texts_at_matched_kl(study, fits, matched):
    texts = texts_file.texts_of(study, matched, 12)
    sizes = {name: 12 if name == "dpo" or "expert" in name else 6 for name in POLICIES}
    assert texts.groupby("policy").size().to_dict() == sizes  # controls write half as many
    assert set(texts["prompt_id"]) == set(range(32, 40))
    assert texts["log_ratio"].abs().max() > 0 and (texts["n_tokens"] <= 6).all()
    assert (texts["kl"] > 0).all()
    own = judge([f"{p} {t}" for p, t in zip(texts["prompt"], texts["text"], strict=True)])
    assert np.allclose(own["sentiment"], texts["sentiment"])
    again = texts_file.texts_of(study, matched, 12)
    pd.testing.assert_frame_equal(again, texts)


def test_table_of_the_sharpness_that_was_found(study, fits):
    table = expert_sharpness(fits, study.groups).set_index(["design", "method", "served"])
    assert len(table) == 2 * (1 + 3)
    (mixture,) = [f for f in fits if (f.design, f.method) == ("clean", "mix_dpo")]
    s = mixture.policy.experts.sharpness.tolist()
    for group, k in zip(REWARDS, mixture.order, strict=True):
        row = table.loc[("clean", "mix_dpo", group)]
        assert (row["expert"], row["sharpness"]) == (k, pytest.approx(s[k]))
    assert ("default", "dpo", "all") in table.index and table["sharpness"].abs().max() > 0
    assert study.fitted("dpo_plain", 0, "clean").sharpness == [0.0]


def test_held_out_likelihood_of_a_user_by_hand(study, fits):
    table = study.held_out(fits)
    f = next(f for f in fits if (f.design, f.method) == ("default", "mix_dpo"))
    data = study.pairs("default")["validation"]
    mine = [i for i, user in enumerate(data.rows["user"]) if user == "user001"]
    total = f.policy.loglik(data)[mine].sum(0)
    log_q = f.log_q[f.units.index("user001")]
    row = table.query("design == 'default' and method == 'mix_dpo' and user == 'user001'").iloc[0]
    assert row["loglik"] == pytest.approx(float((log_q + total).logsumexp(0)), rel=1e-5)
    assert row["elbo"] == pytest.approx(float((log_q.exp() * total).sum()), rel=1e-5)
    assert (table["elbo"] <= table["loglik"] + 1e-6).all() and len(table) == 6 * len(fits)


def test_a_variant_shares_what_it_does_not_change(study):
    other = study.variant(n_experts=2, passes=1.0)
    assert other.texts is study.texts and other.methods["mix_dpo"].n_experts == 2
    assert (other.config.fit.passes, study.config.fit.passes) == (1.0, 4.0)
    assert other.config.designs == study.config.designs
    assert other.pairs("default") is study.pairs("default")
    assert other.pairs("default", 1) is study.pairs("default", 1)
    with pytest.raises(ValueError, match="n_prompts: no choice of a fit; possible are"):
        study.variant(n_prompts=3)


def test_texts_of_the_base(study):
    texts = texts_file.base_texts(study)
    assert set(texts["policy"]) == {"base"} and (texts["log_ratio"] == 0).all()
    assert set(texts["prompt_id"]) <= set(range(32, 40)) and (texts["ref_logp"] < 0).all()
