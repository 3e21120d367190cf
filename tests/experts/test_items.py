"""Items without texts: a survey becomes pairs and a table, and full-batch EM reaches the maxima that others reach."""

import json

import numpy as np
import pytest
import survey
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.linear_model import LogisticRegression

import mixdpo_lib as mx
from mixdpo_lib.data.items import item_pairs
from mixdpo_lib.elbo import mixture_log_likelihood
from mixdpo_lib.gates.membership import MixedMembershipGate
from mixdpo_lib.learning.full_batch import full_batch_em

ML = {"tolerance": 1e-10, "max_iter": 2000}  # with priors that say nothing: maximum likelihood
FLAT = {"prior_scale": 1e4}


def from_survey(n_experts=1, **options):
    rows = survey.columns()
    known = {name: rows[name] for name in ("age", "region")}
    return mx.TabularExperts.from_pairs(
        *(rows[name] for name in ("first", "second", "winner")),
        n_experts,
        user=rows["person"],
        covariates=known,
        **options,
    )


@pytest.fixture(scope="module")
def pairs():
    return from_survey()[1]


def flat(pairs, k, gate=None):
    experts = mx.TabularExperts.of(None, pairs, k, **FLAT)
    return mx.MixturePolicy(experts, gate or mx.LearnedWeights(k, alpha=1))


def user_gate(pairs, k, **options):
    known = {name: pairs.columns[name] for name in ("age", "region")}
    return mx.UserGate.from_metadata(known, k, **options)


def never_falls(found):
    steps = found.history.groupby("restart")["objective"].diff()
    exact = found.history["temperature"].shift() == 1
    return bool((steps[exact].dropna() >= -1e-12).all())


@pytest.fixture(scope="module")
def fits(pairs):
    """Maximum likelihood for K = 1, 2, 3: policy, result, criteria."""
    out = {}
    for k in (1, 2, 3):
        policy = flat(pairs, k)
        found = mx.fit_table(policy, pairs, restarts=1 if k == 1 else 2, **ML)
        out[k] = policy, found, mx.information_criteria(policy, pairs)
    return out


# ------------------------------------------------------------------------------------------------ a survey as pairs


def test_the_file_is_what_the_script_makes():
    rows = [line.split(",") for line in survey.FILE.read_text().splitlines()]
    assert rows[1:] == survey.made() and survey.FILE.stat().st_size < 100_000


def test_ties_are_left_out_and_counted(capsys):
    pairs = from_survey()[1]
    n_ties = survey.columns()["winner"].count("tie")
    assert n_ties > 0 and len(pairs) == 2000 - n_ties
    assert (
        f"survey: {n_ties} of 2000 comparisons are ties and are left out" in capsys.readouterr().err
    )
    assert {text.response for text in pairs.texts.texts} == set(survey.PARTIES)
    assert len(pairs.units("user")[1]) == 200


def test_names_and_covariates_are_read_as_they_are_meant():
    pairs = mx.item_pairs(
        np.array([1, 1, 2]), [2, 3, 3], [np.int64(2), float("nan"), 3],
        user=np.array(["ann", "bob", "ann"]),
        covariates={"age": np.array([30, 9, 30]), "income": [1, 2, 1.0], "land": np.array(["x", "y", "x"])},
    )  # fmt: skip
    assert pairs.rows["chosen"] == ["2", "3"] and pairs.rows["rejected"] == ["1", "2"]
    assert pairs.index.tolist() == [[1, 0], [2, 1]] and pairs.rows["user"] == ["ann", "ann"]
    assert [pairs.rows[name][0] for name in ("age", "income", "land")] == [30, 1.0, "x"]
    assert isinstance(pairs.rows["income"][0], float) and isinstance(pairs.rows["age"][0], int)
    again = mx.Pairs.of(pairs.rows)  # the rows are a preference set like any other
    assert [again.texts.texts[i] for i in again.index.flatten()] == [
        pairs.texts.texts[i] for i in pairs.index.flatten()
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"winner": ["c", "b"]}, r"survey: row 0, column 'winner': found 'c', expected 'a', 'b', None"),
        ({"second": ["b", "a"]}, r"row 1, column 'second': found 'a' in both columns"),
        ({"first": ["a", None]}, r"row 1, column 'first': found NoneType None, expected a value"),
        ({"first": ["a", 1.5]}, r"column 'first': found float 1.5, expected a text or a whole number"),
        ({"user": ["u", ""]}, r"row 1, column 'user': found '', expected a value"),
        ({"covariates": {"age": [1, None]}}, r"row 1, column 'age': found NoneType"),
        ({"covariates": {"age": [1, 2]}}, r"'age' of user 'u': found 1 in row 0 and 2 in row 1"),
        ({"covariates": {"age": ["x", 2]}}, r"'age': found \['int', 'str'\], expected numbers alone"),
        ({"covariates": {"user": ["x", "x"]}}, r"covariate 'user': expected another name"),
        ({"covariates": {"age": [1]}}, r"columns of {.*'age': 1} rows: expected as many in each"),
        ({"winner": [None, "tie"]}, r"all 2 comparisons are ties"),
    ],
)  # fmt: skip
def test_bad_surveys_are_refused_by_row_and_column(change, message):
    given = {"first": ["a", "a"], "second": ["b", "b"], "winner": ["a", "b"], "user": ["u", "u"]}
    with pytest.raises(ValueError, match=message):
        mx.item_pairs(**given | change)


# ------------------------------------------------------------------------------------------------ maximum likelihood


def test_one_expert_is_the_bradley_terry_maximum(pairs, fits):
    """Beside a logistic regression without intercept on differences of items."""
    design = np.zeros((len(pairs), 5))
    np.put_along_axis(design, pairs.index[:, :1].numpy(), 1.0, 1)
    np.put_along_axis(design, pairs.index[:, 1:].numpy(), -1.0, 1)
    sign = np.where(np.arange(len(pairs)) % 2, 1.0, -1.0)
    other = LogisticRegression(C=1e8, fit_intercept=False, tol=1e-10, max_iter=1000)
    other.fit(design * sign[:, None], sign)
    chance = other.predict_proba(design)[:, 1]
    assert fits[1][2].loglik == pytest.approx(np.log(chance).sum(), abs=1e-6)
    rewards = fits[1][0].experts.reward_table()[0]
    np.testing.assert_allclose(rewards, other.coef_[0] - other.coef_[0].mean(), atol=1e-5)
    assert rewards.sum() == pytest.approx(0, abs=1e-9)


def test_more_experts_never_fall_and_say_more(fits):
    assert all(never_falls(found) and found.converged for _, found, _ in fits.values())
    assert fits[1][2].loglik + 100 < fits[2][2].loglik < fits[3][2].loglik - 20
    assert min((1, 2, 3), key=lambda k: fits[k][2].bic) == 3  # as many groups as there are


def as_peers_say(policy, pairs, other):
    """Largest difference of a centred reward and of a posterior, experts put beside the components of flexmix."""
    posterior, rewards = policy.posterior(pairs), policy.experts.reward_table()
    theirs = np.array([other["posterior"][name] for name in posterior.index])
    order = linear_sum_assignment(-(posterior.to_numpy().T @ theirs))[1]
    wanted = np.array([other["rewards"][name] for name in rewards.index])[:, order]
    return np.abs(rewards.to_numpy() - wanted).max(), np.abs(
        posterior.to_numpy() - theirs[:, order]
    ).max()


def test_flexmix_and_choix_found_the_same_maxima(pairs, fits):
    """What both said of the same file once: `benchmarks/peers/surveys.py --keep`."""
    said = json.loads(survey.FILE.with_name("survey_peers.json").read_text())
    policy = flat(pairs, 3, user_gate(pairs, 3, weight_scale=1e4))
    mx.fit_table(policy, pairs, restarts=2, **ML)
    found = {("weights", k): fits[k][2].loglik for k in fits}
    found["covariates", 3] = mx.information_criteria(policy, pairs).loglik
    compared = [row for row in said["loglik"] if (row["gate"], row["K"]) in found]
    assert {row["program"] for row in compared} == {"glm", "flexmix", "choix"}
    for row in compared:
        assert found[row["gate"], row["K"]] == pytest.approx(row["loglik"], abs=1e-3), row
    own = fits[1][0].experts.reward_table()[0]
    assert own.to_dict() == pytest.approx(said["choix_rewards"], abs=0.01)
    for key, one in (("weights_3", fits[3][0]), ("covariates_3", policy)):
        assert max(as_peers_say(one, pairs, said[key])) < 0.01


def test_criteria_by_hand(pairs, fits):
    _, found, criteria = fits[3]
    assert criteria.n_free == 3 * 4 + 2 and criteria.n_units == 200
    assert criteria.aic == pytest.approx(2 * 14 - 2 * criteria.loglik)
    assert criteria.bic == pytest.approx(14 * np.log(200) - 2 * criteria.loglik)
    kept = found.restarts.query("kept")["restart"].item()
    last = found.history[found.history["restart"] == kept].iloc[-1]
    with pytest.raises(
        ValueError, match="GroupTables: what is free of a turned basis is not counted"
    ):
        mx.GroupTables.of(None, pairs, 8).n_free()
    with pytest.raises(ValueError, match="MixedMembershipGate: its free numbers are not counted"):
        MixedMembershipGate([], 3, ["ann"]).n_free()
    assert last["loglik"] * len(pairs) == pytest.approx(criteria.loglik, abs=1e-4)


def test_a_gate_that_reads_is_fitted_to_a_stationary_point_of_the_likelihood(pairs, fits):
    """All derivatives of the log-likelihood of the units vanish, by the rewards and by what the gate learned."""
    policy = flat(pairs, 3, user_gate(pairs, 3, weight_scale=1e3))
    found = mx.fit_table(policy, pairs, restarts=2, **ML)
    criteria = mx.information_criteria(policy, pairs)
    assert never_falls(found) and criteria.n_free == 3 * 4 + 2 * (1 + 1 + 2)
    assert criteria.loglik > fits[3][2].loglik + 20 and criteria.bic < fits[3][2].bic
    unit, names = pairs.units("user")
    loglik = policy.experts.loglik(pairs.index)
    mixture_log_likelihood(loglik, policy.log_w(pairs).double(), unit).sum().backward()
    slopes = [p.grad.abs().max() for p in policy.parameters()]
    assert len(slopes) == 3 and max(slopes) < 0.01 and len(names) == 200
    q = policy.posterior(pairs)
    assert list(q.index) == names and q.index.name == "user"
    np.testing.assert_allclose(q, found.log_q.exp(), atol=1e-4)


def test_full_batches_say_what_a_gate_reads(pairs):
    policy = flat(pairs, 2, user_gate(pairs, 2))
    unit, index = pairs.units("user")[0], pairs.index
    with pytest.raises(
        ValueError, match="UserGate reads age, region: found inputs of nothing, exp"
    ):
        full_batch_em(policy.experts, policy.gate, index, unit)
    inputs = policy.gate_inputs(pairs)
    with pytest.raises(ValueError, match="expected 200 rows, one a latent"):
        full_batch_em(policy.experts, policy.gate, index, unit, inputs=inputs)
    with pytest.raises(ValueError, match="LearnedWeights reads nothing: .*, expected nothing"):
        full_batch_em(policy.experts, mx.LearnedWeights(2), index, unit, inputs=inputs)
    result = mx.fit_table(policy, pairs, unit=None, max_iter=3)  # a latent a pair
    assert len(result.log_q) == len(pairs) and never_falls(result)
    with pytest.raises(ValueError, match=r"beta=0\.1 of the policy and 1 of its table"):
        mx.fit_table(mx.MixturePolicy(policy.experts, policy.gate, beta=0.1), pairs)


def test_lapses_are_learned_too(pairs):
    experts = mx.TabularExperts.of(None, pairs, 2)
    policy = mx.MixturePolicy(experts, mx.LearnedWeights(2), lapse="learn")
    found = mx.fit_table(policy, pairs, max_iter=5)
    assert policy.lapse == pytest.approx(found.lapse) and policy.lapse != pytest.approx(0.02)
    assert mx.information_criteria(policy, pairs).n_free == 2 * 4 + 1 + 1


# ------------------------------------------------------------------------------------ like every other preference set


def test_gradient_steps_reach_the_mode_under_the_prior(pairs):
    """Under a narrow one, which draws rewards of up to 1 to less than .3."""
    tables = [mx.TabularExperts.of(None, pairs, 1, prior_scale=0.05) for _ in range(2)]
    exact, steps = [mx.MixturePolicy(table, mx.LearnedWeights(1)) for table in tables]
    mx.fit_table(exact, pairs)
    mx.fit(steps, pairs, mx.FitConfig(min_steps=100, evaluations_per_pass=0.2))
    wanted = exact.experts.reward_table()
    np.testing.assert_allclose(steps.experts.reward_table(), wanted, atol=2e-3)
    assert 0.05 < wanted.abs().max().item() < 0.3


def test_a_survey_is_fitted_chosen_reported_saved(pairs, tmp_path):
    at = np.arange(len(pairs)) % 4
    parts = {"train": pairs.where(at < 2), "validation": pairs.where(at == 2)}
    config = mx.FitConfig(min_steps=40, evaluations_per_pass=0.5)

    def make(k):
        gate = user_gate(pairs, k) if k == 3 else mx.LearnedWeights(k)
        return mx.MixturePolicy(mx.TabularExperts.of(None, pairs, k), gate)

    assert mx.choose_k(make, parts, [1, 2], config=config).chosen == 2
    policy = make(3)
    mx.fit_table(policy, parts["train"], restarts=2)
    said = mx.report(policy, parts["train"], pairs.where(at == 3), config=config)
    assert said.sentence.endswith("the mixture pays.")
    policy.save_pretrained(tmp_path / "survey")
    again = mx.MixturePolicy.from_pretrained(tmp_path / "survey")
    assert torch.equal(again.loglik(pairs), policy.loglik(pairs)) and again.beta == 1
    assert again.posterior(pairs).equals(policy.posterior(pairs))
    assert again.experts.reward_table().equals(policy.experts.reward_table())
    young = again.user(metadata={"age": np.int64(20), "region": "west"})
    assert float(young.exp().sum()) == pytest.approx(1)


def test_who_did_not_choose_did_not_choose_an_item_named_tie():
    pairs = item_pairs(
        ["tie", "scarf", "tie"], ["bow", "hat", "bow"], [None, "hat", "tie"], user=["a", "a", "b"]
    )
    assert [pairs.texts.texts[i].response for i in pairs.index[:, 0].tolist()] == ["hat", "tie"]


def test_only_what_is_compared_is_counted_as_free():
    """Of an item of ties alone, and of two sets that no comparison connects, the pairs say nothing."""
    first, second, won = ["a", "a", "c", "e"], ["b", "b", "d", "f"], ["a", "b", None, "e"]
    experts, pairs = mx.TabularExperts.from_pairs(first, second, won, 2)
    policy = mx.MixturePolicy(experts, mx.LearnedWeights(2))
    found = mx.information_criteria(policy, pairs, unit=None)
    assert experts.n_free() == 2 * 5 and found.n_free == 2 * 2 + 1


def test_truth_values_among_numbers_are_of_mixed_kinds():
    given = {"first": ["a"] * 3, "second": ["b"] * 3, "winner": ["a", "b", "a"]}
    with pytest.raises(ValueError, match=r"'x': found \['bool', 'int'\], expected numbers alone"):
        mx.item_pairs(**given, covariates={"x": [True, 0, 3]})
    pairs = mx.item_pairs(**given, covariates={"x": [True, False, True]})
    assert pairs.columns["x"] == [True, False, True]
