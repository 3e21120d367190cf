"""Gate, experts, beta and lapse rate as one policy: probabilities, users, speech, and its life on disk."""

import math
from collections import Counter

import datasets
import pytest
import torch
from tiny import VOCABULARY, full_logps, preference_rows, save_tiny_base

from mixdpo_lib import elbo
from mixdpo_lib.base.features import encode_prompts, text_features, tokenise
from mixdpo_lib.data.pairs import Pairs, Text, Texts, as_pairs
from mixdpo_lib.elbo import keep_top_s
from mixdpo_lib.experts.heads import HeadExperts
from mixdpo_lib.experts.tables import TabularExperts
from mixdpo_lib.gates.membership import MixedMembershipGate
from mixdpo_lib.gates.prompt import ContextGate
from mixdpo_lib.gates.user import UserGate
from mixdpo_lib.gates.weights import FixedWeights, LearnedWeights
from mixdpo_lib.policy.mixture import MixturePolicy

WEIGHTS = [0.2, 0.5, 0.3]
PROMPTS = ["the film", "a long story with the actor", "it", "this music was"]


@pytest.fixture(scope="module")
def data(tiny_base):
    return Pairs.of(preference_rows(8))


@pytest.fixture(scope="module")
def policy(tiny_base, data):
    experts = HeadExperts(tiny_base, 3, rank=4)
    experts.activate_responses(data)
    experts.perturb(0.5, torch.Generator().manual_seed(2))
    return MixturePolicy(experts, FixedWeights(WEIGHTS), beta=0.1)


def probabilities(policy, row):
    """sigma(D_k) of one pair from logits over the whole vocabulary."""
    base, experts = policy.base, policy.experts
    (a, ra), (b, rb) = (
        full_logps(base, experts, row["prompt"], row[s], row["ended"])
        for s in ("chosen", "rejected")
    )
    return torch.sigmoid(policy.beta * ((a - ra) - (b - rb))).detach()


def test_prediction_by_hand(policy, data):
    p = torch.stack([probabilities(policy, row) for row in data.rows])
    assert float((p - 0.5).abs().max()) > 0.05
    torch.testing.assert_close(
        policy.predict(data), p @ torch.tensor(WEIGHTS), atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(policy.predict(data.rows), policy.predict(data))  # rows as they are
    sure = torch.tensor([0.0, 0.0, 1.0]).log()
    torch.testing.assert_close(policy.predict(data, sure), p[:, 2], atol=1e-4, rtol=1e-4)
    each = torch.eye(3)[[0, 1, 2, 0, 1, 2, 0, 1]].log()  # one row of weights a pair
    torch.testing.assert_close(
        policy.predict(data, each), p[range(8), [0, 1, 2, 0, 1, 2, 0, 1]], atol=1e-4, rtol=1e-4
    )


def test_an_answer_and_a_preference_by_hand(policy, data):
    lapsing = MixturePolicy(policy.experts, policy.gate, policy.beta, lapse=0.2)
    plain, chosen = policy.predict(data), policy.predict(data, top_s=2)
    assert torch.equal(policy.preference(data), plain)  # no lapses: the same to the last bit
    assert torch.equal(lapsing.preference(data), plain)
    assert torch.equal(lapsing.preference(data, top_s=2), chosen)
    torch.testing.assert_close(lapsing.predict(data), 0.8 * plain + 0.1)
    torch.testing.assert_close(lapsing.predict(data, top_s=2), 0.8 * chosen + 0.1)
    one = torch.tensor([0.0, 1.0, 0.0]).log()
    torch.testing.assert_close(lapsing.predict(data, one), 0.8 * policy.preference(data, one) + 0.1)
    assert torch.equal(lapsing.log_sigma(data), policy.loglik(data))
    torch.testing.assert_close(
        lapsing.loglik(data), elbo.with_lapse(policy.loglik(data), 0.2), rtol=0, atol=0
    )
    own = data.where([True] * 3 + [False] * 5)  # one user's pairs: the posterior knows lapses too
    q = elbo.log_responsibilities(
        lapsing.loglik(own), torch.tensor(WEIGHTS).log(), torch.zeros(3).long()
    )
    torch.testing.assert_close(lapsing.user(own), q[0])
    assert "lapse" not in repr(policy) and "lapse 0.2" in repr(lapsing)


def test_some_experts_with_lapses_give_a_bound_and_its_gap(policy, data):
    lapsing, log_w = MixturePolicy(policy.experts, policy.gate, lapse=0.2), weights_by_pair(policy)
    whole = elbo.mixture_log_likelihood(lapsing.loglik(data), log_w)
    chosen = keep_top_s(log_w, 1) > -math.inf
    loglik = lapsing.loglik(data, chosen=chosen)
    assert torch.equal(loglik == -math.inf, ~chosen)  # not computed stays so
    bound = elbo.restricted_log_likelihood(loglik, log_w, 1)
    gap = elbo.certified_gap(loglik, log_w, 1, lapse=0.2)
    assert (bound < whole).all() and (whole <= bound + gap + 1e-6).all()


def test_a_user_by_hand(policy, data):
    own = data.rows.select([1, 5])
    joint = torch.tensor(WEIGHTS) * probabilities(policy, own[0]) * probabilities(policy, own[1])
    user = policy.user(own)
    torch.testing.assert_close(user.exp(), joint / joint.sum(), atol=1e-4, rtol=1e-4)
    assert float((user.exp() - torch.tensor(WEIGHTS)).abs().max()) > 0.005
    torch.testing.assert_close(policy.user().exp(), torch.tensor(WEIGHTS))
    # the same posterior, however it is asked for
    with pytest.warns(DeprecationWarning, match="is called `posterior` now"):
        assert policy.responsibilities(data).equals(policy.posterior(data))
    table = policy.posterior(data)
    assert (
        table.index.tolist() == ["user0", "user1", "user2", "user3"] and table.index.name == "user"
    )
    torch.testing.assert_close(
        torch.tensor(table.loc["user1"].to_numpy()), user.exp(), atol=1e-5, rtol=1e-4
    )
    single = policy.posterior(data, unit=None)
    joint = torch.tensor(WEIGHTS) * probabilities(policy, data.rows[5])
    torch.testing.assert_close(
        torch.tensor(single.loc[5].to_numpy()), joint / joint.sum(), atol=1e-4, rtol=1e-4
    )
    assert len(single) == 8
    with pytest.raises(ValueError, match="unit column 'club' is missing"):
        policy.posterior(data, unit="club")


def test_log_probability_of_the_mixture(policy):
    own, _ = full_logps(policy.base, policy.experts, "the film", "was very good", True)
    expected = (own + torch.tensor(WEIGHTS).log()).logsumexp(0)
    assert policy.logps("the film", "was very good") == pytest.approx(
        float(expected.detach()), rel=1e-5
    )
    own, _ = full_logps(policy.base, policy.experts, "the film", "was very good", False)
    only = torch.tensor([0.0, 1.0, 0.0]).log()
    found = policy.logps("the film", "was very good", user=only, ended=False)
    assert found == pytest.approx(float(own[1].detach()), rel=1e-5)


@pytest.fixture(scope="module")
def by_metadata(policy):
    """The same experts behind a gate that knows the country of a user."""
    gate = UserGate.from_metadata({"country": ["x", "y"]}, 3)
    with torch.no_grad():
        gate.outer.weight.copy_(torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))
    return MixturePolicy(policy.experts, gate, beta=0.1)


def test_a_user_by_metadata_and_by_pairs(by_metadata, data):
    e = math.e
    x = torch.tensor([e**2, 1.0, 1.0]) / (e**2 + 2)
    torch.testing.assert_close(by_metadata.user(metadata={"country": "x"}).exp(), x)
    own = data.rows.select([1, 5]).add_column("country", ["x", "x"])
    joint = x * probabilities(by_metadata, own[0]) * probabilities(by_metadata, own[1])
    for user in (by_metadata.user(own), by_metadata.user(own, {"country": "x"})):
        torch.testing.assert_close(user.exp(), joint / joint.sum(), atol=1e-4, rtol=1e-4)
    rows = data.rows.add_column("country", ["x", "y"] * 4)
    y = torch.tensor([1.0, e, 1.0]) / (e + 2)
    p = torch.stack([probabilities(by_metadata, row) for row in rows])
    expected = (p * torch.stack([x, y] * 4)).sum(1)
    torch.testing.assert_close(by_metadata.predict(rows), expected, atol=1e-4, rtol=1e-4)
    table = by_metadata.posterior(rows)
    joint = y * p[1] * p[5]
    torch.testing.assert_close(
        torch.tensor(table.loc["user1"].to_numpy()), joint / joint.sum(), atol=1e-4, rtol=1e-4
    )


def test_a_gate_of_users_refuses_what_it_cannot_use(policy, by_metadata, data):
    with pytest.raises(ValueError, match="column 'country' is absent"):
        by_metadata.predict(data)
    with pytest.raises(
        ValueError, match=r"metadata column 'country' is absent; found \[\]: the gate was"
    ):
        by_metadata.user()
    with pytest.raises(
        ValueError, match=r"metadata \['age'\]: the gate reads nothing; leave them out"
    ):
        policy.user(metadata={"age": 3})
    with pytest.raises(
        ValueError, match=r"metadata \['sex'\]: the gate reads country; leave them out"
    ):
        by_metadata.user(metadata={"country": "x", "sex": "f"})
    with pytest.raises(ValueError, match=r"\(country\): give user=policy.user"):
        by_metadata.generate(PROMPTS)
    for wrong in ({"country": "x"}, "ann"):
        with pytest.raises(
            ValueError, match="found (dict|str), expected a datasets.Dataset .* metadata="
        ):
            as_pairs(wrong)
    moved = data.rows.add_column("country", ["x"] * 4 + ["y"] * 4)  # a user whose country changes
    with pytest.raises(
        ValueError, match=r"pairs, column 'country': found \['x', 'y'\], expected one user"
    ):
        by_metadata.user(moved)
    with pytest.raises(ValueError, match="unit"):
        by_metadata.posterior(moved)


def test_a_gate_of_prompts_routes_each_prompt(policy, data):
    states = encode_prompts(policy.base, PROMPTS)
    stored = text_features(policy.base, Texts.of(Text(p, "was good", True) for p in PROMPTS))
    first = torch.from_numpy(
        stored.hidden[stored.offsets[:-1]]
    )  # what predicts the first token of a response
    torch.testing.assert_close(states, first, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        encode_prompts(policy.base, PROMPTS[::-1] * 2), states.flip(0).repeat(2, 1)
    )
    gate = ContextGate(states.shape[1], 3, mean=states.mean(0), scale=states.std(0) + 0.1)
    with torch.no_grad():
        gate.outer.weight.copy_(
            torch.randn(gate.outer.weight.shape, generator=torch.Generator().manual_seed(1))
        )
    routed = MixturePolicy(policy.experts, gate, beta=0.1)
    log_w = routed.log_w(data)
    assert log_w.shape == (8, 3) and float(log_w.detach().exp().std(0).max()) > 0.1
    p = torch.stack([probabilities(routed, row) for row in data.rows])
    torch.testing.assert_close(
        routed.predict(data), (p * log_w.detach().exp()).sum(1), atol=1e-4, rtol=1e-4
    )
    chosen = routed.generate(PROMPTS, top_s=1, max_new_tokens=2).expert
    assert chosen == gate({"state": states}).argmax(1).tolist() and len(set(chosen)) > 1
    own, _ = full_logps(policy.base, policy.experts, PROMPTS[0], "was very good", True)
    expected = (own.detach() + gate({"state": states})[0].detach()).logsumexp(0)
    assert routed.logps(PROMPTS[0], "was very good") == pytest.approx(float(expected), rel=1e-5)
    with pytest.raises(ValueError, match="its weights belong to a prompt, not to a user"):
        routed.user()


def test_a_gate_may_ask_a_question_and_read_an_inner_layer(policy, data):
    prompts = list(data.rows["prompt"])
    ids = policy.base.prompt_ids(prompts[0] + " was the")
    hidden = (
        policy.base.model(input_ids=torch.tensor([ids]), output_hidden_states=True)
        .hidden_states[1][0]
        .detach()
    )
    states = encode_prompts(policy.base, [prompt + " was the" for prompt in prompts], layer=1)
    torch.testing.assert_close(states[0], hidden[-1], atol=1e-5, rtol=1e-4)
    gate = ContextGate.from_states(states, 3, suffix=" was the", layer=1)
    with torch.no_grad():
        gate.outer.weight.copy_(
            torch.randn(gate.outer.weight.shape, generator=torch.Generator().manual_seed(1))
        )
    routed = MixturePolicy(policy.experts, gate, beta=0.1)
    torch.testing.assert_close(routed.log_w(data), gate({"state": states}), atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match=r"layer=3: .* has 2 blocks; expected 1 ... 2, or None"):
        encode_prompts(policy.base, PROMPTS, layer=3)


@pytest.mark.parametrize("kind", ["context", "metadata", "both"])
def test_a_mixture_is_saved_with_its_gate(policy, tmp_path, kind):
    context, user = (
        ContextGate(32, 3),
        UserGate.from_metadata({"country": ["x", "y"], "age": [1, 2]}, 3),
    )
    gate = {
        "context": context,
        "metadata": user,
        "both": MixedMembershipGate([context, user], 3, ["ann"]),
    }[kind]
    with torch.no_grad():
        for i, parameter in enumerate(gate.parameters()):
            parameter.copy_(
                torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
            )
    MixturePolicy(policy.experts, gate, beta=0.1).save_pretrained(tmp_path)
    again = MixturePolicy.from_pretrained(tmp_path, policy.base).gate
    columns = {"prompt": ["the film"], "country": ["y"], "age": [3], "user": ["ann"]}
    assert torch.equal(
        again(again.inputs(columns, policy.base)), gate(gate.inputs(columns, policy.base))
    )
    assert again.reads == gate.reads


def test_rewards_are_beta_log_ratios(policy, data):
    rewards = policy.text_rewards(data.texts)
    first = data.rows[0]
    a, ra = full_logps(
        policy.base, policy.experts, first["prompt"], first["chosen"], first["ended"]
    )
    torch.testing.assert_close(
        rewards[data.index[0, 0]], (0.1 * (a - ra)).detach(), atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(policy.loglik(data, rewards), policy.loglik(data))
    some = policy.text_rewards(data.texts, torch.tensor([3, 0]))  # only these texts are computed
    torch.testing.assert_close(some[[0, 3]], rewards[[0, 3]])
    assert some[[1, 2]].isnan().all()


# ------------------------------------------------------------------------------------------------ some of the experts


def weights_by_pair(policy):
    """Random weights, another order of the experts in each pair."""
    return torch.randn(8, 3, generator=torch.Generator().manual_seed(4)).log_softmax(-1)


def test_the_likelihood_of_the_chosen_experts(policy, data):
    chosen = keep_top_s(weights_by_pair(policy), 1) > -math.inf
    assert chosen.any(0).all()
    expected = policy.loglik(data).masked_fill(~chosen, -math.inf)
    torch.testing.assert_close(policy.loglik(data, chosen=chosen), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        policy.loglik(data, policy.text_rewards(data.texts), chosen), expected
    )
    some = data.where(
        [True, False] * 4
    )  # its texts are all there; only those of its pairs are computed
    torch.testing.assert_close(
        policy.loglik(some, chosen=chosen[::2]), expected[::2], atol=1e-5, rtol=1e-5
    )
    everyone = torch.ones(8, 3, dtype=torch.bool)
    assert torch.equal(policy.loglik(data, chosen=everyone), policy.loglik(data))
    ids = torch.tensor([3, 0])
    rewards = policy.text_rewards(
        data.texts, ids, torch.tensor([[True, False, False], [False, True, True]])
    )
    assert (~rewards.isnan()).nonzero().tolist() == [[0, 1], [0, 2], [3, 0]]
    torch.testing.assert_close(
        rewards[3, 0], policy.text_rewards(data.texts)[3, 0], atol=1e-5, rtol=1e-5
    )


def test_a_batch_of_chosen_experts_and_its_gradients(policy, data):
    batch = policy.experts.batch(policy.constants(data.texts), data.index)
    log_w = weights_by_pair(policy)
    chosen = keep_top_s(log_w, 2) > -math.inf
    parameters = [policy.experts.down, policy.experts.up]

    def found(loglik):
        return loglik.detach(), *torch.autograd.grad(
            elbo.restricted_log_likelihood(loglik, log_w, 2).sum(), parameters
        )

    dense, sparse = found(policy.batch_loglik(batch)), found(policy.batch_loglik(batch, chosen))
    assert torch.equal(sparse[0] == -math.inf, ~chosen)
    torch.testing.assert_close(sparse[0][chosen], dense[0][chosen], atol=1e-5, rtol=1e-5)
    for mine, full in zip(sparse[1:], dense[1:], strict=True):
        torch.testing.assert_close(mine, full, atol=1e-4 * float(full.abs().max()), rtol=1e-4)
    # read as it is, a loglik of -inf is the restricted likelihood
    plain = elbo.mixture_log_likelihood(policy.batch_loglik(batch, chosen), log_w)
    torch.testing.assert_close(
        plain, elbo.restricted_log_likelihood(dense[0], log_w, 2), atol=1e-5, rtol=1e-5
    )
    with torch.autograd.set_detect_anomaly(True):  # no NaN on the way either
        gradients = torch.autograd.grad(plain.sum(), parameters)
    for mine, full in zip(gradients, dense[1:], strict=True):
        torch.testing.assert_close(mine, full, atol=1e-4 * float(full.abs().max()), rtol=1e-4)


@pytest.mark.parametrize("by_user", [False, True])
def test_fewer_experts_give_a_lower_bound_with_a_certified_gap(policy, data, by_user):
    if by_user:
        unit, log_w = data.units("user")[0], policy.log_w(data)
    else:
        unit, log_w = None, weights_by_pair(policy)
    whole = elbo.mixture_log_likelihood(policy.loglik(data), log_w, unit)
    below = torch.full_like(whole, -math.inf)
    for s in (1, 2, 3):
        chosen = (keep_top_s(log_w, s) > -math.inf).expand(8, 3)
        loglik = policy.loglik(data, chosen=chosen)  # nothing is known of the others
        bound = elbo.restricted_log_likelihood(loglik, log_w, s, unit)
        gap = elbo.certified_gap(loglik, log_w, s, unit)
        assert (
            (bound > below).all() and (bound <= whole).all() and (whole <= bound + gap + 1e-6).all()
        )
        below = bound
    assert torch.equal(below, whole) and not gap.any()
    own = [policy.logps("the film", "was very good", top_s=s) for s in (1, 2, 3)]
    assert own[0] < own[1] < own[2] == policy.logps("the film", "was very good")


def test_a_prediction_by_some_experts_is_renormalised(policy, data):
    p = torch.stack([probabilities(policy, row) for row in data.rows])
    torch.testing.assert_close(
        policy.predict(data, top_s=2), p[:, 1:] @ torch.tensor([0.625, 0.375]), atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(policy.predict(data, top_s=1), p[:, 1], atol=1e-4, rtol=1e-4)
    log_w = weights_by_pair(policy)
    torch.testing.assert_close(
        policy.predict(data, log_w, top_s=1), p[range(8), log_w.argmax(1)], atol=1e-4, rtol=1e-4
    )
    assert torch.equal(policy.predict(data, top_s=3), policy.predict(data))
    assert torch.equal(policy.predict(data, log_w, top_s=3), policy.predict(data, log_w))


@pytest.mark.parametrize("s", [0, 4])
def test_a_number_of_experts_that_is_not_there_is_refused(policy, data, s):
    for call in (
        lambda: policy.predict(data, top_s=s),
        lambda: policy.logps("the film", "was good", top_s=s),
        lambda: policy.generate(PROMPTS, top_s=s),
        lambda: policy.generate(PROMPTS, top_s=s, form="token"),
    ):
        with pytest.raises(ValueError, match=rf"top_s={s} with 3 experts; expected 1 ... 3"):
            call()


# ------------------------------------------------------------------------------------------------------------- speech


def test_a_batch_may_mix_experts(policy):
    experts = [0, 2, 1, 2]
    mixed = policy.generate(PROMPTS, expert=experts, max_new_tokens=8, seed=5)
    assert mixed.expert == experts
    for k in range(3):  # every row has its own random numbers: the rows beside it do not matter
        alone = policy.generate(PROMPTS, expert=[k] * 4, max_new_tokens=8, seed=5)
        for row in (i for i in range(4) if experts[i] == k):
            assert mixed.text[row] == alone.text[row] and mixed.n_tokens[row] == alone.n_tokens[row]
            assert mixed.log_ratio[row] == pytest.approx(alone.log_ratio[row], abs=1e-4)
    assert (
        len(
            {
                policy.generate(PROMPTS * 3, expert=[k] * 12, max_new_tokens=8, seed=5).text[0]
                for k in range(3)
            }
        )
        > 1
    )
    split = policy.generate(PROMPTS, expert=experts, max_new_tokens=8, seed=5, batch_size=3)
    assert split.text == mixed.text and split.ended == mixed.ended
    assert policy.generate(PROMPTS, expert=experts, max_new_tokens=8, seed=6).text != mixed.text


def test_the_log_ratio_is_that_of_the_sampled_text(policy):
    out = policy.generate(PROMPTS * 6, max_new_tokens=6, seed=1)
    assert set(out.ended) == {True, False} and set(out.expert) == {0, 1, 2}
    whole = [
        i for i, text in enumerate(out.text) if text
    ]  # a response of the end token alone is no text
    texts = [Text((PROMPTS * 6)[i], out.text[i], out.ended[i]) for i in whole]
    store = Texts.of(texts)
    logps, refs = policy.experts.all_text_logps(policy.constants(store), torch.arange(len(store)))
    for i, text in zip(whole, texts, strict=True):
        place = store.index[text]
        assert out.n_tokens[i] == len(tokenise(policy.base, text)[1])
        assert out.ref_logp[i] == pytest.approx(float(refs[place]), abs=2e-4)
        assert out.log_ratio[i] == pytest.approx(
            float(logps[place, out.expert[i]] - refs[place]), abs=3e-4
        )


def test_experts_speak_as_often_as_their_weights_say(policy):
    n = 3000
    out = policy.generate(["the film"] * n, max_new_tokens=1, seed=0)
    share = torch.bincount(torch.tensor(out.expert), minlength=3) / n
    for k, w in enumerate(WEIGHTS):
        assert abs(float(share[k]) - w) < 4 * (w * (1 - w) / n) ** 0.5, k
    # and the tokens follow sum_k w_k pi_k
    texts = Texts.of([Text("the film", word, False) for word in VOCABULARY])
    logps, _ = policy.experts.all_text_logps(policy.constants(texts), torch.arange(len(texts)))
    p = (logps + torch.tensor(WEIGHTS).log()).logsumexp(1).exp()
    seen = torch.zeros(len(VOCABULARY))
    for text, ended in zip(out.text, out.ended, strict=True):
        seen[VOCABULARY["</s>" if ended else text.strip()]] += 1
    assert (
        float(((seen - n * p) ** 2 / (n * p)).sum()) < 75
    )  # chi-square, 35 degrees of freedom: 99.99 % below 75


@pytest.mark.parametrize(
    "options", [{"top_k": 3}, {"temperature": 0.6, "top_k": 4}, {"top_k": 5, "top_p": 0.8}]
)
def test_both_forms_speak_alike(policy, options):
    """Sequences of two tokens: their frequencies differ by chance alone."""
    n, seen = 4000, []
    for form in ("sequence", "token"):
        out = policy.generate(
            ["the film"] * n, max_new_tokens=2, seed=3, batch_size=n, form=form, **options
        )
        seen.append(Counter(zip(out.text, out.ended, strict=True)))
    assert 5 < len(seen[0] | seen[1]) < 60
    for text in seen[0] | seen[1]:
        p = (seen[0][text] + seen[1][text] + 1) / (2 * n)
        assert abs(seen[0][text] - seen[1][text]) / n < 4 * (2 * p * (1 - p) / n) ** 0.5, text


def test_the_token_form_says_what_mixture_and_posterior_say_of_its_texts(policy):
    prompts = PROMPTS * 6
    log_w = torch.tensor(WEIGHTS).log()
    for kept, s in ((log_w, None), (keep_top_s(log_w, 2).log_softmax(0), 2)):
        out = policy.generate(prompts, max_new_tokens=6, seed=1, form="token", top_s=s)
        whole = [i for i, text in enumerate(out.text) if text]
        texts = [Text(prompts[i], out.text[i], out.ended[i]) for i in whole]
        store = Texts.of(texts)
        logps, refs = policy.experts.all_text_logps(
            policy.constants(store), torch.arange(len(store))
        )
        for i, text in zip(whole, texts, strict=True):
            place = store.index[text]
            assert out.ref_logp[i] == pytest.approx(float(refs[place]), abs=2e-4)
            mixture = (kept + logps[place]).logsumexp(0)
            assert out.log_ratio[i] == pytest.approx(float(mixture - refs[place]), abs=3e-4)
            assert out.expert[i] == int((kept + logps[place]).argmax())
    assert set(out.ended) == {True, False}
    split = policy.generate(prompts, max_new_tokens=6, seed=1, form="token", top_s=2, batch_size=5)
    assert split.text == out.text and split.expert == out.expert
    # a single expert is the same in both forms, by the likelihoods and, greedily, by the text
    only = torch.tensor([0.0, 0.0, 1.0]).log()
    a, b = (
        policy.generate(prompts, only, max_new_tokens=6, greedy=True, form=f)
        for f in ("sequence", "token")
    )
    assert a.text == b.text and a.expert == b.expert == [2] * 24
    assert a.log_ratio == pytest.approx(b.log_ratio, abs=2e-4)


def test_greedy_texts_of_the_mixture_take_its_most_probable_token(policy):
    texts = Texts.of([Text(p, word, False) for p in PROMPTS for word in VOCABULARY])
    logps, _ = policy.experts.all_text_logps(policy.constants(texts), torch.arange(len(texts)))
    best = (logps + torch.tensor(WEIGHTS).log()).logsumexp(1).reshape(len(PROMPTS), -1).argmax(1)
    out = policy.generate(PROMPTS, max_new_tokens=1, greedy=True, form="token")
    assert [
        VOCABULARY["</s>" if e else t.strip()] for t, e in zip(out.text, out.ended, strict=True)
    ] == best.tolist()
    assert out == policy.generate(PROMPTS, max_new_tokens=1, greedy=True, form="token", seed=8)


def test_forms_that_do_not_fit_are_refused(policy):
    with pytest.raises(ValueError, match="form='word': possible are 'sequence' .* and 'token'"):
        policy.generate(PROMPTS, form="word")
    with pytest.raises(ValueError, match="expert is given and form='token'"):
        policy.generate(PROMPTS, form="token", expert=[0] * 4)
    with pytest.raises(ValueError, match="temperature=0.0: expected above 0; use greedy=True"):
        policy.generate(PROMPTS, form="token", temperature=0.0)


def test_a_user_chooses_the_experts(policy):
    only = torch.tensor([0.0, 1.0, 0.0]).log()
    assert set(policy.generate(PROMPTS * 5, only, max_new_tokens=1).expert) == {1}
    each = torch.eye(3)[[2, 0, 1, 0]].log()
    assert policy.generate(PROMPTS, each, max_new_tokens=1).expert == [2, 0, 1, 0]
    assert set(policy.generate(PROMPTS * 20, max_new_tokens=1, top_s=1).expert) == {1}
    assert set(policy.generate(PROMPTS * 20, max_new_tokens=1, top_s=2).expert) == {1, 2}


def test_the_same_seed_gives_the_same_texts(policy):
    assert policy.generate(PROMPTS, max_new_tokens=5, seed=3) == policy.generate(
        PROMPTS, max_new_tokens=5, seed=3
    )
    assert policy.generate(PROMPTS, max_new_tokens=5, seed=3) != policy.generate(
        PROMPTS, max_new_tokens=5, seed=4
    )


def test_prompts_that_cannot_be_continued_are_refused(policy):
    with pytest.raises(
        ValueError, match=r"prompt 'the the .* has 45 tokens; with max_new_tokens=4 expected .*44"
    ):
        policy.generate(["the " * 45], max_new_tokens=4)
    policy.generate(["the " * 44], max_new_tokens=4)
    with pytest.raises(ValueError, match="prompt '' has 0 tokens"):
        policy.generate(["the", ""], max_new_tokens=4)
    with pytest.raises(ValueError, match="no prompts: give at least one"):
        policy.generate([])


# --------------------------------------------------------------------------------------------------------------- life


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("active", ["responses", "all"])
def test_saved_and_read_back(tiny_base, tiny_folder, data, tmp_path, learned, active):
    experts = HeadExperts(tiny_base, 3, rank=4, active=active)
    experts.activate_responses(data)
    experts.perturb(0.5, torch.Generator().manual_seed(2))
    gate = LearnedWeights(3, alpha=1.5) if learned else FixedWeights(WEIGHTS)
    if learned:
        gate.update(torch.tensor(WEIGHTS), n_units=10)
    policy = MixturePolicy(experts, gate, beta=0.25)
    policy.save_pretrained(tmp_path / "mixture")
    assert {p.name for p in (tmp_path / "mixture").iterdir()} == {
        "mixture.safetensors",
        "config.json",
        "README.md",
    }
    for back in (
        MixturePolicy.from_pretrained(tmp_path / "mixture"),  # the base is found by its name
        MixturePolicy.from_pretrained(str(tmp_path / "mixture"), tiny_base),
    ):
        assert back.beta == 0.25 and type(back.gate) is type(gate) and back.experts.active == active
        assert getattr(back.gate, "alpha", None) == getattr(gate, "alpha", None)
        assert torch.equal(back.gate.log_w()[0], policy.gate.log_w()[0]) and torch.equal(
            back.loglik(data), policy.loglik(data)
        )
        assert back.logps("the film", "was good") == policy.logps("the film", "was good")
        assert back.generate(PROMPTS, max_new_tokens=6, seed=9) == policy.generate(
            PROMPTS, max_new_tokens=6, seed=9
        )


def test_another_base_is_refused(policy, tmp_path):
    from mixdpo_lib.base.model import load_base

    policy.save_pretrained(tmp_path / "mixture")
    other = load_base(save_tiny_base(tmp_path / "other", seed=4))
    with pytest.raises(
        ValueError,
        match="trained on a base with fingerprint .*, found .*: give the base that it was",
    ):
        MixturePolicy.from_pretrained(tmp_path / "mixture", other)


def test_a_folder_without_a_mixture_is_refused(tmp_path):
    from mixdpo_lib.store import MixDPOError

    with pytest.raises(MixDPOError, match="config.json: not found"):
        MixturePolicy.from_pretrained(tmp_path)


@pytest.mark.parametrize("beta", [0.0, -0.1, float("nan"), float("inf")])
def test_beta_is_positive(policy, beta):
    with pytest.raises(
        ValueError, match=f"beta={beta}: the strength of the KL term is a positive number"
    ):
        MixturePolicy(policy.experts, FixedWeights(WEIGHTS), beta)


@pytest.mark.parametrize("lapse", [-0.1, 1.0, float("nan"), "auto"])
def test_a_lapse_is_a_rate_or_learned(policy, lapse):
    with pytest.raises(ValueError, match=f"lapse='?{lapse}'?: expected a rate of at least 0"):
        MixturePolicy(policy.experts, FixedWeights(WEIGHTS), lapse=lapse)


def test_gate_and_experts_must_agree(policy):
    with pytest.raises(ValueError, match="the gate has 2 weights for 3 experts: make them equal"):
        MixturePolicy(policy.experts, FixedWeights([0.5, 0.5]))


def test_bad_rows_are_refused_here_too(policy):
    rows = datasets.Dataset.from_list([{"prompt": "the", "chosen": "film", "rejected": 3}])
    with pytest.raises(ValueError, match="preference set: row 0, column 'rejected': found int 3"):
        policy.predict(rows)


def test_a_gate_that_a_fit_has_put_elsewhere_is_asked_from_the_processor(tiny_base, monkeypatch):
    """Numbers of "meta" stand for those of a GPU: they are of no processor, and refuse to be mixed with its numbers."""

    class Elsewhere(UserGate):
        def log_w(self, inputs=None):
            assert inputs["metadata"].is_meta
            return (
                super()
                .logits({"metadata": torch.zeros(len(inputs["metadata"]), 1)})
                .log_softmax(-1)
            )

    monkeypatch.setattr(
        "mixdpo_lib.gates.user.given", lambda inputs, name, n: inputs[name].to("meta")
    )
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: torch.full(self.shape, -math.log(2)))
    gate = Elsewhere({"age": (30.0, 10.0)}, 2).to("meta")
    policy = MixturePolicy(HeadExperts(tiny_base, 2, rank=2), gate, 0.3)
    data = preference_rows(6).add_column("age", [20, 40] * 3)
    assert policy.log_w(data).flatten().tolist() == pytest.approx([-math.log(2)] * 12)


def test_weights_of_users_have_as_many_rows_as_there_are_prompts(policy, data):
    user = torch.tensor([[0.7, 0.2, 0.1]] * 2).log()
    assert len(policy.generate(PROMPTS[:2], user=user, max_new_tokens=2).text) == 2
    assert len(policy.predict(data.rows.select([0, 1]), user=user)) == 2
    for call in (
        lambda: policy.generate(PROMPTS[:3], user=user),
        lambda: policy.predict(data.rows, user=user),
        lambda: policy.logps("the film", "was good", user=user),
        lambda: policy.say(PROMPTS[:2], user=user),
        lambda: policy.as_causal_lm(user=user, prompts=PROMPTS[:3]),
    ):
        with pytest.raises(
            ValueError, match=r"user: found \(2, 3\), expected log weights \(3,\) of"
        ):
            call()


def test_weights_may_be_float64_in_every_form(policy):
    user = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64).log()
    for form in ("sequence", "token"):
        double = policy.generate(PROMPTS, user=user, form=form, max_new_tokens=4, seed=1)
        single = policy.generate(PROMPTS, user=user.float(), form=form, max_new_tokens=4, seed=1)
        assert double.text == single.text
    ids = torch.tensor([[VOCABULARY["the"], VOCABULARY["film"]]])
    assert policy.as_causal_lm(user=user)(ids).logits.dtype == torch.float32


def test_tables_without_words_are_no_language_model():
    tables = MixturePolicy(TabularExperts(3, 2), LearnedWeights(2))
    with pytest.raises(ValueError, match="this table has numbers, no words"):
        tables.as_causal_lm()


def test_probabilities_are_no_log_weights(tiny_base):
    data = preference_rows(4)
    policy = MixturePolicy(HeadExperts(tiny_base, 2, rank=2, active="all"), LearnedWeights(2))
    right = torch.tensor([0.9, 0.1]).log()
    for wrong in (right.exp(), torch.zeros(2), torch.tensor([[0.0, -math.inf], [0.3, -1.0]])):
        for ask in (policy.predict, policy.preference):
            with pytest.raises(ValueError, match=r"user: found .*whose exp sums to 1.*p.log\(\)"):
                ask(data.select(range(2)), user=wrong)
    with pytest.raises(ValueError, match="whose exp sums to 1"):
        policy.generate(["the film"], user=right.exp())
    assert bool((policy.predict(data, user=right) <= 1).all())
    policy.predict(data, user=torch.tensor([0.0, -math.inf]))  # one expert alone
