"""Accuracy by group, intervals over prompts, recovery of groups, tables of texts, KL on prefixes."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import full_logps, preference_rows
from torch import nn

from mixdpo_lib.base.features import tokenise
from mixdpo_lib.data.pairs import Pairs, Text, Texts
from mixdpo_lib.evaluation import (
    accuracy_gain,
    align,
    bootstrap_means,
    group_accuracy,
    interval,
    mean_bounds,
    prompt_accuracy,
    recovery,
    summarise_accuracy,
)
from mixdpo_lib.experts.heads import HeadExperts, prefix_kl
from mixdpo_lib.gates.weights import FixedWeights
from mixdpo_lib.policy.generating import Generated
from mixdpo_lib.policy.mixture import MixturePolicy
from mixdpo_lib.study.fits import group_of
from mixdpo_lib.study.texts import distinct_2, summarise_texts, text_table


def make(base, data, active="responses", scale=0.5):
    experts = HeadExperts(base, 2, rank=4, active=active)
    experts.activate_responses(data)
    if scale:
        experts.perturb(scale, torch.Generator().manual_seed(4))
    return MixturePolicy(experts, FixedWeights([0.5, 0.5]))


@pytest.fixture(scope="module")
def held_out(tiny_base):
    rows = preference_rows(6, users=2)  # groups a and b in turn
    rows = rows.remove_columns("prompt_id").add_column("prompt_id", [0, 0, 0, 1, 1, 1])
    return Pairs.of(rows)


# ----------------------------------------------------------------------------------------------------------- accuracy

#                      a           b           a           b           a           b
P = torch.tensor([[0.9, 0.2], [0.6, 0.1], [0.4, 0.8], [0.7, 0.7], [0.3, 0.6], [0.5, 0.5]])


def test_accuracy_by_hand(tiny_base, held_out):
    first, second, even = (torch.tensor(w).log() for w in ([1.0, 0.0], [0.0, 1.0], [0.5, 0.5]))
    weights = {"a": torch.stack([first, second]), "b": even[None]}
    table = prompt_accuracy(make(tiny_base, held_out), held_out, weights, P.log()).set_index(
        ["group", "prompt_id"]
    )
    # group a, prompt 0, pairs 0 and 2: the first user is right and wrong, the second wrong and right
    assert table.loc[("a", 0), "accuracy"] == 0.5 and table.loc[("a", 0), "n_pairs"] == 2
    assert (
        table.loc[("a", 1), "accuracy"] == 0.5 and table.loc[("a", 1), "n_pairs"] == 1
    )  # pair 4: wrong and right
    # group b by the mean: pair 1 .35 is wrong; pairs 3 (.7) right and 5 (.5) a tie, which counts half
    assert table.loc[("b", 0), "accuracy"] == 0.0 and table.loc[("b", 1), "accuracy"] == 0.75


def test_an_untrained_policy_knows_nothing(tiny_base, held_out):
    policy = make(tiny_base, held_out, scale=0)
    table = prompt_accuracy(policy, held_out, {g: policy.gate.log_w()[0][None] for g in "ab"})
    assert table["accuracy"].tolist() == [0.5] * 4  # whatever its rounding


def test_predictions_are_those_of_the_policy(tiny_base, held_out):
    policy = make(tiny_base, held_out)
    table = prompt_accuracy(policy, held_out, {g: policy.gate.log_w()[0][None] for g in "ab"})
    hits = (policy.predict(held_out) > 0.5).double().numpy()
    for _, row in table.iterrows():
        key = (row["group"], row["prompt_id"])
        own = [hits[i] for i, r in enumerate(held_out.rows) if (r["group"], r["prompt_id"]) == key]
        assert row["accuracy"] == pytest.approx(np.mean(own))


def by_prompt(method, values, seeds=(0,)):
    """values[group] = accuracies by prompt, one pair each."""
    rows = [
        {"method": method, "seed": s, "group": g, "prompt_id": i, "accuracy": v, "n_pairs": 1}
        for s in seeds
        for g, part in values.items()
        for i, v in enumerate(part)
    ]
    return pd.DataFrame(rows)


def test_groups_mean_and_worst_by_hand():
    table = by_prompt("m", {"a": [1.0, 1.0, 0.5, 0.5], "b": [0.0, 1.0, 0.5, 0.5]})
    table.loc[0, "n_pairs"] = 3  # a prompt with more pairs weighs more: a = (3 + 1 + .5 + .5) / 6
    found = summarise_accuracy(table, ["method"])
    one = found[found["seed"] == "0"].set_index("group")
    assert one["accuracy"].to_dict() == pytest.approx(
        {"a": 5 / 6, "b": 0.5, "mean": 2 / 3, "worst": 0.5}
    )
    assert one["n_pairs"].to_dict() == {"a": 6, "b": 4, "mean": 10, "worst": 10}
    assert (one["low"] <= one["accuracy"]).all() and (one["accuracy"] <= one["high"]).all()
    assert one.loc["b", "low"] < 0.3 and one.loc["b", "high"] > 0.7
    assert set(found["method"]) == {"m"} and set(found["seed"]) == {"0", "mean"}


def test_seeds_are_averaged_within_a_prompt():
    parts = [
        by_prompt("m", {"a": v, "b": v}, seeds=(s,)) for s, v in ((1, [1.0, 0.0]), (2, [0.0, 1.0]))
    ]
    found = summarise_accuracy(pd.concat(parts), ["method"]).set_index(["seed", "group"])
    together = found.loc[("mean", "a")]
    assert (
        together["accuracy"] == together["low"] == together["high"] == 0.5
    )  # no prompt differs from another
    assert found.loc[("1", "a"), "low"] == 0.0 and found.loc[("1", "a"), "high"] == 1.0
    assert together["n_pairs"] == 2


def test_intervals_hold_what_they_promise():
    """95 % of the intervals cover the truth, although the pairs of a prompt go together; a binomial one would not."""
    rng, covered, width, binomial = np.random.default_rng(0), 0, [], 0
    for _ in range(100):
        p = rng.beta(0.7, 0.7, 60)  # prompts differ; mean accuracy 0.5
        hits = rng.binomial(10, p)
        table = pd.DataFrame(
            {
                "method": "m",
                "seed": 0,
                "group": "a",
                "prompt_id": range(60),
                "accuracy": hits / 10,
                "n_pairs": 10,
            }
        )
        row = summarise_accuracy(table, ["method"]).iloc[0]
        covered += row["low"] <= 0.5 <= row["high"]
        width.append(row["high"] - row["low"])
        binomial += abs(row["accuracy"] - 0.5) <= 1.96 * math.sqrt(0.25 / 600)
    assert 0.88 <= covered / 100 <= 0.99
    assert binomial / 100 < 0.8
    assert np.mean(width) == pytest.approx(
        2 * 1.96 * math.sqrt((0.25 / 2.4 + 0.25 * 1.4 / 2.4 / 10) / 60), rel=0.1
    )


def test_a_gain_is_paired():
    rng = np.random.default_rng(1)
    hard = rng.uniform(0.2, 0.8, 80)  # prompts differ a lot, the gain does not
    better = by_prompt("mix", {"a": hard + 0.1, "b": hard + 0.2})
    base = by_prompt("dpo", {"a": hard, "b": hard[::-1] - 0.1})
    gain = accuracy_gain(better, base).set_index(["seed", "group"])
    total = gain.loc["mean"]
    assert total["gain"].to_dict() == pytest.approx({"a": 0.1, "b": 0.3, "mean": 0.2, "worst": 0.2})
    assert total.loc["a", "low"] == pytest.approx(0.1) and total.loc["a", "high"] == pytest.approx(
        0.1
    )
    assert total.loc["b", "high"] - total.loc["b", "low"] > 0.05  # these two are not alike
    unpaired = summarise_accuracy(base, ["method"]).set_index("group").loc["a"].iloc[0]
    assert unpaired["high"] - unpaired["low"] > 0.05
    assert gain.loc[("0", "mean"), "gain"] == pytest.approx(0.2)
    # the worst group of one method may be another one than that of the other: min(a, b) against min(a, b)
    mine, theirs = (
        by_prompt("m", {"a": [0.5] * 4, "b": [0.9] * 4}),
        by_prompt("d", {"a": [0.7] * 4, "b": [0.4] * 4}),
    )
    turned = accuracy_gain(mine, theirs)
    assert turned.set_index(["seed", "group"]).loc[("mean", "worst"), "gain"] == pytest.approx(0.1)


def test_bootstrap_of_clusters():
    values = np.array([[1.0, np.nan], [3.0, 2.0], [5.0, np.nan]])
    draws = bootstrap_means(values, n_bootstrap=4000)
    assert draws.shape == (4000, 2)
    assert draws[:, 0].mean() == pytest.approx(3, abs=0.1)
    assert draws[:, 0].std() == pytest.approx((8 / 9) ** 0.5, abs=0.05)
    assert set(draws[~np.isnan(draws[:, 1]), 1]) == {2.0}  # a prompt that is missing is left out
    assert np.array_equal(draws, bootstrap_means(values, n_bootstrap=4000), equal_nan=True)
    assert interval(np.arange(1001.0)) == (25.0, 975.0)
    with pytest.raises(ValueError, match="found 1 unit, expected at least 2"):
        mean_bounds(np.array([1.0]))


# ----------------------------------------------------------------------------------------------------------- recovery


def test_alignment():
    q = np.array(
        [[0.1, 0.7, 0.2], [0.2, 0.7, 0.1], [0.6, 0.2, 0.2], [0.5, 0.3, 0.2], [0.2, 0.2, 0.6]]
    )
    assert align(q, ["x", "x", "y", "y", "z"], ["x", "y", "z"]) == [1, 0, 2]
    assert align(q[:, [2, 1, 0]], ["x", "x", "y", "y", "z"], ["x", "y", "z"]) == [1, 2, 0]
    # one expert is best for both groups: the better total decides (.9 + .3 < .6 + .8 is not greedy)
    greedy = np.array([[0.9, 0.6], [0.8, 0.3]])
    assert align(greedy, ["x", "y"], ["x", "y"]) == [1, 0]
    assert align(np.ones((2, 1)), ["x", "y"], ["x", "y"]) in (
        [0, -1],
        [-1, 0],
    )  # fewer experts than groups
    assert sorted(align(q[:2], ["x", "x"], ["x"])) == [1]  # more experts than groups


def test_recovery_by_hand():
    # experts 0 0 1 1 1 0, groups a a b b b b: NMI and ARI from their definitions
    q = pd.DataFrame([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.1, 0.9], [0.3, 0.7], [0.8, 0.2]])
    found = recovery(q, list("aabbbb"))
    h_group = -(1 / 3 * math.log(1 / 3) + 2 / 3 * math.log(2 / 3))
    h_expert = math.log(2)
    mutual = (
        2 / 6 * math.log((2 / 6) / (2 / 6 * 3 / 6))
        + 3 / 6 * math.log((3 / 6) / (4 / 6 * 3 / 6))
        + 1 / 6 * math.log((1 / 6) / (4 / 6 * 3 / 6))
    )
    assert found["nmi"] == pytest.approx(2 * mutual / (h_group + h_expert))
    pairs, expected = 1 + 3, (1 + 6) * (3 + 3) / 15  # pairs together in both; by chance
    assert found["ari"] == pytest.approx((pairs - expected) / ((7 + 6) / 2 - expected))
    assert found["aligned_accuracy"] == pytest.approx(5 / 6) and found["n_users"] == 6


def test_recovery_does_not_depend_on_the_names_of_experts():
    rng = np.random.default_rng(0)
    q, groups = pd.DataFrame(rng.dirichlet([0.5] * 3, 40)), rng.choice(["x", "y", "z"], 40).tolist()
    assert recovery(q[[2, 0, 1]], groups) == pytest.approx(recovery(q, groups))
    assert recovery(q, groups)["nmi"] < 0.2
    alike = pd.DataFrame(np.tile([0.2, 0.5, 0.3], (40, 1)))  # one expert for everybody
    assert (
        recovery(alike, groups)["nmi"] == pytest.approx(0)
        and recovery(alike, groups)["aligned_accuracy"] < 0.6
    )


def test_groups_of_users(held_out):
    assert group_of(held_out, "user") == {"user0": "a", "user1": "b"}


# -------------------------------------------------------------------------------------------------------------- texts


def test_distinct_2():
    assert distinct_2("a b a b") == pytest.approx(2 / 3) and distinct_2("A b a B") == distinct_2(
        "a b a b"
    )
    assert distinct_2("good good good good good") == 0.25 and distinct_2("one two three") == 1.0
    assert distinct_2("one") == distinct_2("") == 1.0


def test_table_of_texts():
    made = Generated(
        ["a b a b", "c"], [0, 1], [0.5, -0.25], [-3.0, -1.0], [5, 1], [True, False], [0.75, 0.0]
    )
    table = text_table(
        made, ["p", "q"], [7, 9], pd.DataFrame({"sentiment": [1.0, 2.0]}, index=[5, 6])
    )
    assert table.to_dict("records")[0] == {
        "prompt_id": 7,
        "prompt": "p",
        "text": "a b a b",
        "sentiment": 1.0,
        "log_ratio": 0.5,
        "kl": 0.75,
        "ref_logp": -3.0,
        "n_tokens": 5,
        "distinct_2": pytest.approx(2 / 3),
    }
    assert len(table) == 2


def test_summary_of_texts_by_hand():
    texts = pd.DataFrame(
        {
            "policy": ["dpo"] * 3 + ["mix"] * 3,
            "seed": 0,
            "prompt_id": [0, 0, 1] * 2,
            "sentiment": [1.0, 3.0, 5.0, 3.0, 5.0, 7.0],
            "kl": [0.1, 0.2, 0.3, 1.0, 2.0, 6.0],
            "ref_logp": [-10.0, -20.0, -30.0, -5.0, -5.0, -20.0],
            "n_tokens": [10, 10, 10, 10, 20, 30],
            "distinct_2": [1.0, 0.5, 0.0, 1.0, 1.0, 0.7],
        }
    )
    found = summarise_texts(texts, ["sentiment"]).set_index("policy")
    dpo, mix = found.loc["dpo"], found.loc["mix"]
    assert (
        dpo["mean"] == 3.5 and mix["mean"] == 5.5
    )  # the mean over prompts of (2, 5) and of (4, 7)
    assert (
        mix["gain_over_dpo"] == mix["gain_low"] == mix["gain_high"] == 2.0
    )  # the same on both prompts
    assert (dpo["low"], dpo["high"]) == (2.0, 5.0) and dpo["gain_over_dpo"] == 0
    assert dpo["kl"] == pytest.approx(0.2) and mix["kl"] == pytest.approx(3.0)
    assert dpo["perplexity"] == pytest.approx(math.exp(2)) and mix["perplexity"] == pytest.approx(
        math.exp(0.5)
    )
    assert dpo["length"] == 10 and mix["length"] == 20 and mix["distinct_2"] == pytest.approx(0.9)
    assert dpo["n"] == 3 and dpo["reward"] == "sentiment" and "gain_over_base" not in found
    base = texts[texts["policy"] == "dpo"].assign(policy="base", sentiment=[0.0, 0.0, 7.0])
    over = summarise_texts(pd.concat([texts, base]), ["sentiment"]).set_index("policy").loc["mix"]
    assert (over["gain_over_dpo"], over["gain_over_base"]) == (2.0, 2.0)  # 5.5 - 3.5 of (0, 7)
    assert (over["base_low"], over["base_high"]) == (0.0, 4.0)  # by prompt 4 - 0 and 7 - 7


def test_kl_of_samples_is_that_of_the_distributions_they_were_drawn_from(tiny_base, held_out):
    policy = make(tiny_base, held_out, active="all")
    prompts = [row["prompt"] for row in held_out.rows] * 20
    out = policy.generate(prompts, expert=[0, 1, -1] * 40, max_new_tokens=4, seed=3)
    kl, ratio = np.array(out.kl).reshape(-1, 3), np.array(out.log_ratio).reshape(-1, 3)
    assert (kl[:, :2] > 0).all() and (kl[:, 2] == 0).all()
    difference = (kl - ratio)[:, :2].ravel()  # of mean 0
    assert abs(difference.mean()) < 3 * difference.std() / len(difference) ** 0.5
    assert kl[:, :2].var() < ratio[:, :2].var()
    texts = [Text(*one) for one in zip(prompts, out.text, out.ended, strict=True)]
    for k in range(2):
        each = {texts[i]: out.kl[i] for i in range(k, 120, 3) if out.text[i]}
        found = prefix_kl(policy.experts, Texts.of(each), torch.arange(len(each)))[0, k]
        assert np.mean(list(each.values())) == pytest.approx(found, rel=1e-3)


# ---------------------------------------------------------------------------------------------------------- prefix KL


@pytest.mark.parametrize("active", ["responses", "all"])
def test_prefix_kl_is_the_kl_over_the_whole_vocabulary(tiny_base, held_out, active):
    policy = make(tiny_base, held_out, active)
    found = prefix_kl(policy.experts, held_out.texts, torch.tensor([0, 3, 7, 8, 2]), block=2)
    base, experts = tiny_base, policy.experts
    head = base.model.get_output_embeddings().weight
    mask = torch.zeros(len(head))
    mask[experts.active_ids] = 1
    rows = list(held_out.rows)
    texts = [Text(r["prompt"], r[s], r["ended"]) for s in ("chosen", "rejected") for r in rows]
    total = torch.zeros(2)
    for i in (0, 3, 7, 8, 2):
        prompt, response = tokenise(base, texts[i])
        with torch.no_grad():
            out = base.model(torch.tensor([prompt + response]), output_hidden_states=True)
        hidden, logits = (
            out.hidden_states[-1][0, len(prompt) - 1 : -1],
            out.logits[0, len(prompt) - 1 : -1],
        )
        for k in range(2):
            own = (
                (logits + mask * (hidden @ experts.down[k].T @ experts.up[k].T @ head.T))
                .log_softmax(-1)
                .detach()
            )
            total[k] += (own.exp() * (own - logits.log_softmax(-1))).sum()
    np.testing.assert_allclose(found, (total / 5).numpy()[None], rtol=1e-3)
    assert (found > 0.05).all()


def test_prefix_kl_at_other_scales_is_that_of_scaled_experts(tiny_base, held_out):
    policy, ids = make(tiny_base, held_out), torch.arange(4)
    found = prefix_kl(policy.experts, held_out.texts, ids, scales=[0.5, 1.0])
    np.testing.assert_allclose(found[1:], prefix_kl(policy.experts, held_out.texts, ids), rtol=1e-5)
    policy.experts.scale(0.5)
    np.testing.assert_allclose(found[:1], prefix_kl(policy.experts, held_out.texts, ids), rtol=1e-5)
    assert (found[0] < found[1]).all()


def test_prefix_kl_of_the_reference_is_zero(tiny_base, held_out):
    policy = make(tiny_base, held_out, scale=0)
    np.testing.assert_allclose(
        prefix_kl(policy.experts, held_out.texts, torch.arange(4)), 0, atol=1e-5
    )


def test_prefix_kl_with_a_bias(tiny_base, held_out):
    from dataclasses import replace

    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(tiny_base.model.config).eval()
    model.load_state_dict(tiny_base.model.state_dict())
    head = model.lm_head = nn.Linear(*model.lm_head.weight.shape[::-1])
    head.weight.data.copy_(tiny_base.model.get_output_embeddings().weight)
    head.bias.data.copy_(torch.linspace(-2, 2, len(head.bias)))
    base = replace(tiny_base, model=model.requires_grad_(False), fingerprint="biased")
    store = Texts.of([Text("the film", "was", False)])
    data = Pairs.of(held_out.rows)
    policy = make(base, data)
    found = prefix_kl(policy.experts, store, torch.tensor([0]))
    words = [
        full_logps(base, policy.experts, "the film", w, False) for w in base.tokenizer.get_vocab()
    ]
    own, ref = torch.stack([w[0] for w in words]).detach(), torch.stack([w[1] for w in words])
    np.testing.assert_allclose(found, (own.exp() * (own - ref[:, None])).sum(0)[None], rtol=1e-3)


def test_what_no_draw_knows_is_left_out_and_not_taken_for_zero():
    values = np.full((20, 2), np.nan)
    values[:2, 0], values[:, 1] = (-3.0, -3.1), -1.0
    draws = bootstrap_means(values)
    assert np.isnan(draws[:, 0]).any() and not np.isnan(draws[:, 1]).any()
    low, high = interval(draws[:, 0])
    assert (low, high) == (-3.1, -3.0)
    count = np.zeros((20, 1))
    count[:2] = 4
    means, shares = group_accuracy(np.where(count > 0, 1.0, np.nan), count)
    assert means.tolist() == [1.0] and interval(shares[:, 0]) == (1.0, 1.0)
    assert all(np.isnan(interval(np.full(3, np.nan))))


def test_gains_of_texts_are_over_the_prompts_that_both_wrote_on():
    rows = [("dpo", 0, 1.0), ("dpo", 1, 9.0), ("dpo", 2, 2.0), ("mix", 0, 2.0), ("mix", 2, 3.0)]
    texts = pd.DataFrame(rows, columns=["policy", "prompt_id", "grammar"])
    texts = texts.assign(seed=0, kl=1.0, ref_logp=-1.0, n_tokens=2, distinct_2=1.0)
    mix = summarise_texts(texts, ["grammar"]).set_index("policy").loc["mix"]
    assert mix["gain_over_dpo"] == mix["gain_low"] == mix["gain_high"] == 1.0
    assert mix["mean"] == 2.5
