"""Gates: the M-step by hand, the stochastic form, what reading gates learn, and what is refused."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixdpo_lib import elbo
from mixdpo_lib import gates as gates_file
from mixdpo_lib.elbo import keep_top_s
from mixdpo_lib.gates import weights
from mixdpo_lib.gates.inputs import standardise
from mixdpo_lib.gates.m_step import gate_loss
from mixdpo_lib.gates.membership import MixedMembershipGate
from mixdpo_lib.gates.prompt import ContextGate
from mixdpo_lib.gates.user import UserGate
from mixdpo_lib.store import MixDPOError


def test_fixed_weights_say_what_they_were_given():
    for gate in (
        weights.FixedWeights([0.25, 0.75, 0.0]),
        weights.FixedWeights(log_w=torch.tensor([0.25, 0.75, 0.0]).log()),
    ):
        assert gate.n_experts == 3
        assert gate.log_w()[0].exp().tolist() == pytest.approx([0.25, 0.75, 0.0])
        assert (gate({"prompt": torch.ones(1, 3)}) == gate.log_weights).all()
        assert list(gate.parameters()) == []
    assert weights.FixedWeights([1.0]).log_w().tolist() == [[0.0]]
    assert weights.FixedWeights.uniform(3).log_w()[0].tolist() == pytest.approx([-math.log(3)] * 3)


def test_m_step_by_hand():
    gate = weights.LearnedWeights(3, alpha=1.5)
    gate.update(torch.tensor([0.5, 0.5, 0.0]), n_units=10)
    assert gate.log_w()[0].exp().tolist() == pytest.approx([5.5 / 11.5, 5.5 / 11.5, 0.5 / 11.5])
    plain = weights.LearnedWeights(3, alpha=1)
    plain.update(torch.tensor([0.5, 0.5, 0.0]), n_units=10)
    assert plain.log_w()[0].exp().tolist() == pytest.approx([0.5, 0.5, 0.0])


def test_m_step_is_the_mode_of_the_posterior():
    """No other weights reach a higher U sum_k q_k log w_k + log prior."""
    q, units = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64), 7
    gate = weights.LearnedWeights(3, alpha=1.7).double()
    gate.update(q, n_units=units)
    best = units * (q * gate.log_w()[0]).sum() + gate.log_prior()
    draw = torch.Generator().manual_seed(0)
    for _ in range(200):
        other = (
            gate.log_w()[0] + 0.3 * torch.randn(3, generator=draw, dtype=torch.float64)
        ).log_softmax(-1)
        assert units * (q * other).sum() + 0.7 * other.sum() <= best


def test_stochastic_form_by_hand():
    gate = weights.LearnedWeights(2, alpha=1)
    gate.update(torch.tensor([1.0, 0.0]), rho=0.25, n_units=5)
    assert gate.log_w()[0].exp().tolist() == pytest.approx([0.75 * 0.5 + 0.25, 0.75 * 0.5])


def test_robbins_monro_steps_reach_the_mean():
    draw = torch.Generator().manual_seed(0)
    shares = torch.tensor([0.5, 0.3, 0.2])
    gate = weights.LearnedWeights(3, alpha=1)
    for t in range(2000):
        z = torch.multinomial(shares, 8, replacement=True, generator=draw)
        gate.update(torch.bincount(z, minlength=3) / 8, rho=1 / (t + 2), n_units=1000)
    assert gate.log_w()[0].exp().tolist() == pytest.approx(shares.tolist(), abs=0.02)


def test_prior_keeps_every_expert_alive_and_yields_to_data():
    gate = weights.LearnedWeights(2)
    gate.update(torch.tensor([1.0, 0.0]), n_units=60)
    assert 0 < gate.log_w()[0].exp()[1] < 0.01
    elbo.check_log_w(gate.log_w())


def test_em_with_learned_weights_never_falls():
    """Full-batch EM of the weights alone, on given likelihoods: likelihood plus prior rises at every step."""
    draw = torch.Generator().manual_seed(0)
    loglik = torch.nn.functional.logsigmoid(
        2 * torch.randn(40, 3, generator=draw, dtype=torch.float64)
    )
    unit = torch.arange(40) // 4
    gate = weights.LearnedWeights(3, alpha=1.2).double()
    before = -math.inf
    for _ in range(50):
        value = (
            elbo.mixture_log_likelihood(loglik, gate.log_w(), unit).sum() + gate.log_prior()
        ).item()
        assert value >= before - 1e-10
        before = value
        gate.update(elbo.log_responsibilities(loglik, gate.log_w(), unit).exp().mean(0), n_units=10)


def test_one_expert_stays_certain():
    gate = weights.LearnedWeights(1)
    gate.update(torch.tensor([1.0]), rho=0.3, n_units=12)
    assert gate.log_w().tolist() == [[0.0]]


def test_state_is_saved_with_the_module():
    gate = weights.LearnedWeights(2)
    gate.update(torch.tensor([0.9, 0.1]), n_units=12)
    again = weights.LearnedWeights(2)
    again.load_state_dict(gate.state_dict())
    assert (again() == gate()).all()


def test_top_s_keeps_the_largest_without_renormalising():
    log_w = torch.tensor([[0.2, 0.5, 0.3], [0.4, 0.2, 0.4]]).log()
    assert torch.allclose(
        keep_top_s(log_w, 2).exp(), torch.tensor([[0.0, 0.5, 0.3], [0.4, 0.0, 0.4]])
    )
    assert torch.allclose(
        keep_top_s(log_w, 1).exp(), torch.tensor([[0.0, 0.5, 0.0], [0.4, 0.0, 0.0]])
    )
    assert (keep_top_s(log_w, 3) == log_w).all()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from([-3.0, -1.0, -0.5, -math.inf]), min_size=4, max_size=4))
def test_top_s_is_nested_and_keeps_s(values):
    log_w = torch.tensor(values)
    before = torch.zeros(4, dtype=torch.bool)
    for s in range(1, 5):
        kept = keep_top_s(log_w, s)
        alive = kept > -math.inf
        assert alive.sum() == min(s, int((log_w > -math.inf).sum()))
        assert (alive | ~before).all()
        assert (kept[alive] == log_w[alive]).all()
        before = alive


@pytest.mark.parametrize(
    "build",
    [
        lambda: weights.LearnedWeights(0),
        lambda: weights.FixedWeights([]),
        lambda: weights.FixedWeights.uniform(0),
    ],
)
def test_no_expert_is_refused(build):
    with pytest.raises(
        ValueError, match="n_experts=0: a mixture needs at least one expert; use 1 for plain DPO"
    ):
        build()


def test_bad_weights_are_refused():
    with pytest.raises(ValueError, match="weights sum to 1.5, expected 1"):
        weights.FixedWeights([0.75, 0.75])
    with pytest.raises(ValueError, match="weights sum to nan"):
        weights.FixedWeights(log_w=torch.tensor([math.nan, 0.0]))
    with pytest.raises(ValueError, match="every weight to be 0 or above"):
        weights.FixedWeights([1.5, -0.5])
    with pytest.raises(ValueError, match="exactly one of the two"):
        weights.FixedWeights()
    with pytest.raises(ValueError, match=r"weights has shape \(1, 2\)"):
        weights.FixedWeights(torch.tensor([[0.5, 0.5]]))


def test_bad_updates_are_refused():
    gate = weights.LearnedWeights(2)
    even = torch.tensor([0.5, 0.5])
    with pytest.raises(ValueError, match=r"mean_responsibility has shape \(3,\); expected \(2,\)"):
        gate.update(torch.ones(3) / 3, n_units=1)
    with pytest.raises(ValueError, match="expected probabilities that sum to 1"):
        gate.update(even * 2, n_units=1)
    with pytest.raises(ValueError, match="expected probabilities that sum to 1"):
        gate.update(even * math.nan, n_units=1)
    for rho in (0.0, 1.5):
        with pytest.raises(ValueError, match=f"rho={rho}"):
            gate.update(even, rho, n_units=1)
    with pytest.raises(ValueError, match="n_units=0: expected the number of units"):
        gate.update(even, n_units=0)
    with pytest.raises(ValueError, match="alpha=0.5: the Dirichlet concentration is at least 1"):
        weights.LearnedWeights(2, alpha=0.5)
    assert gate.log_w()[0].exp().tolist() == pytest.approx([0.5, 0.5])


# ------------------------------------------------------------------------------------------------- gates that read
METADATA = {"country": ["x", "y", "z", "y"], "age": [20, 30, 40, 50]}


def learn(gate, batch, log_q, steps=300, **options):
    optimizer = torch.optim.Adam(gate.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = gate_loss(gate(batch), log_q, **options)
        if isinstance(gate, MixedMembershipGate):
            loss = loss - gate.log_prior() / len(log_q)
        loss.backward()
        optimizer.step()
    return gate(batch).detach()


def test_gates_start_at_equal_weights():
    context, user = ContextGate(5, 3), UserGate.from_metadata(METADATA, 3)
    both = MixedMembershipGate([context, user], n_experts=3, units=list("abcd"))
    own = {"state": torch.randn(4, 5), "metadata": user.encode(METADATA)}
    batch = {**own, "0/state": own["state"], "1/metadata": own["metadata"], "unit": torch.arange(4)}
    for gate in (context, user, both):
        torch.testing.assert_close(gate.log_w(batch).exp(), torch.full((4, 3), 1 / 3))
    assert both.reads == ("prompt", "country", "age", "user") and both.of_prompt == ("prompt",)
    assert both.log_prior().item() == 0


def test_a_context_gate_learns_which_prompts_are_whose():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 8, generator=generator) * 3 + 10
    group = (x[:, 0] > x[:, 1]).long()
    log_q = torch.tensor([[0.95, 0.05], [0.05, 0.95]])[group].log()
    mean, scale = standardise(x[:200])
    gate = ContextGate(8, 2, mean=mean, scale=scale)
    learn(gate, {"state": x[:200]}, log_q[:200])
    held_out = gate({"state": x[200:]}).argmax(1)
    assert (held_out == group[200:]).double().mean() > 0.95


def test_a_linear_gate_stays_undecided_where_no_line_parts_them():
    x = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    log_q = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.0]]).clamp(0.001, 0.999).log()
    assert (
        gate_loss(learn(ContextGate(2, 2), {"state": x}, log_q), log_q) > 0.69
    )  # ln 2: exclusive or


def test_the_loss_is_least_where_the_weights_are_the_responsibilities():
    log_q = torch.randn(6, 3, generator=torch.Generator().manual_seed(1)).log_softmax(1)
    own = float(gate_loss(log_q, log_q))
    assert own == pytest.approx(float(-(log_q.exp() * log_q).sum(1).mean()))
    for seed in range(20):
        other = torch.randn(6, 3, generator=torch.Generator().manual_seed(seed + 2)).log_softmax(1)
        assert float(gate_loss(other, log_q)) > own


def test_entropy_and_balance_terms_by_hand():
    log_w = torch.tensor([[0.9, 0.1], [0.7, 0.3]]).log()
    plain = float(gate_loss(log_w, log_w))
    h = [-(0.9 * math.log(0.9) + 0.1 * math.log(0.1)), -(0.7 * math.log(0.7) + 0.3 * math.log(0.3))]
    assert float(gate_loss(log_w, log_w, entropy_weight=2.0)) == pytest.approx(
        plain - 2 * sum(h) / 2, rel=1e-5
    )
    kl = math.log(2) + 0.8 * math.log(0.8) + 0.2 * math.log(0.2)
    assert float(gate_loss(log_w, log_w, balance_weight=3.0)) == pytest.approx(
        plain + 3 * kl, rel=1e-5
    )


def test_weights_are_the_softmax_of_the_standardised_state():
    gate = ContextGate(2, 2, mean=torch.tensor([1.0, 2.0]), scale=torch.tensor([2.0, 0.5]))
    with torch.no_grad():
        gate.outer.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    margin = (3.0 - 1.0) / 2.0 - (2.5 - 2.0) / 0.5  # 1 - 1: undecided; then 1 - 0
    states = torch.tensor([[3.0, 2.5], [3.0, 2.0]])
    expected = [1 / (1 + math.exp(-m)) for m in (margin, 1.0)]
    assert gate.log_w({"state": states}).exp()[:, 0].tolist() == pytest.approx(expected)


def test_metadata_is_encoded_by_column():
    gate = UserGate.from_metadata(METADATA, 2)
    x = gate.encode(METADATA)
    assert x.shape == (4, 4) and gate.columns["country"] == ["x", "y", "z"]
    assert x[:, :3].tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 1, 0]]
    torch.testing.assert_close(x[:, 3], torch.tensor([-15.0, -5.0, 5.0, 15.0]) / math.sqrt(125))
    truth = UserGate.from_metadata({"member": [True, False]}, 2)
    assert truth.columns == {"member": ["False", "True"]}


def test_numbers_of_numpy_are_numbers():
    ages = list(np.array(METADATA["age"]))
    gate = UserGate.from_metadata({"age": ages, "score": list(np.float32([1, 2, 3, 4]))}, 2)
    assert gate.columns["age"] == UserGate.from_metadata({"age": METADATA["age"]}, 2).columns["age"]
    assert gate.columns["score"][0] == 2.5 and json.dumps(gate.options())
    assert gate.encode({"age": [np.int64(35)], "score": [np.float32(2.5)]}).tolist() == [[0, 0]]
    with pytest.raises(ValueError, match="row 1, column 'score': found .*nan.*expected text or a"):
        gate.encode({"age": [1, 2], "score": [1, np.float32("nan")]})


def test_an_unseen_category_is_served_by_the_rest_with_a_warning():
    gate = UserGate.from_metadata(METADATA, 2)
    with pytest.warns(UserWarning, match=r"column 'country': \['mars'\] were not among"):
        x = gate.encode({"country": ["mars", "x"], "age": [35, 35]})
    assert x[0].tolist() == [0, 0, 0, 0] and x[1].tolist() == [1, 0, 0, 0]


def test_a_list_where_one_value_is_meant_is_refused():
    gate = UserGate.from_metadata(METADATA, 2)
    for wrong in ({"country": ["x"], "age": [[30]]}, {"country": [["x"]], "age": [30]}):
        with pytest.raises(ValueError, match="row 0, column .*expected one value, not several"):
            gate.encode(wrong)
    with pytest.raises(ValueError, match="column 'age': found 30, expected a list with a value"):
        UserGate.from_metadata({"age": 30}, 2)


def test_users_are_told_apart_by_metadata_that_tells_something():
    """The gate reaches the mean responsibility of each category, which is all that metadata can say."""
    gate = UserGate.from_metadata({"country": ["x", "y"] * 50}, 2)
    q = torch.tensor([[0.8, 0.2], [0.3, 0.7]]).repeat(50, 1)
    found = learn(gate, {"metadata": gate.encode({"country": ["x", "y"] * 50})}, q.log())
    torch.testing.assert_close(found.exp(), q, atol=0.01, rtol=0)


def test_offsets_shrink_towards_the_prior():
    log_q = torch.tensor([[0.9, 0.1]] * 8 + [[0.1, 0.9]]).log()
    unit = torch.tensor([0] * 8 + [1])
    wide = MixedMembershipGate([], 2, ["a", "b", "c"], offset_scale=10.0)
    narrow = MixedMembershipGate([], 2, ["a", "b", "c"], offset_scale=0.3)
    free, held = (learn(gate, {"unit": unit}, log_q).exp() for gate in (wide, narrow))
    assert abs(float(free[0, 0]) - 0.9) < 0.02 and abs(float(free[-1, 1]) - 0.9) < 0.02
    assert (
        0.5 < float(held[-1, 1]) < float(held[0, 0]) < 0.9
    )  # one pair moves an offset less than eight
    torch.testing.assert_close(wide({"unit": torch.tensor([2, -1])}).exp(), torch.full((2, 2), 0.5))


def test_a_gate_is_made_anew_from_its_options():
    user = UserGate.from_metadata(METADATA, 2, weight_scale=2.0)
    gates = [
        weights.FixedWeights([0.5, 0.5]),
        weights.LearnedWeights(2, 1.5),
        ContextGate(4, 2, suffix="?", layer=1),
        user,
        MixedMembershipGate([ContextGate(4, 2), user], 2, ["a", "b"], offset_scale=0.5),
    ]
    for gate in gates:
        options = json.loads(json.dumps(gate.describe()))
        again = gates_file.make_gate(options)
        assert (
            type(again) is type(gate)
            and again.options() == gate.options()
            and again.reads == gate.reads
        )
        again.load_state_dict(gate.state_dict())
    with pytest.raises(
        MixDPOError,
        match="gate='Oracle': no gate of this name is known; found .*'UserGate'.*import the",
    ):
        gates_file.make_gate({"gate": "Oracle"})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ContextGate(0, 2), "n_features=0"),
        (lambda: ContextGate(2, 0), "n_experts=0"),
        (lambda: ContextGate(2, 2, weight_scale=0), "weight_scale=0: expected above 0"),
        (
            lambda: ContextGate(2, 2, scale=torch.tensor([1.0, 0.0])),
            "scale: expected every entry above 0",
        ),
        (lambda: ContextGate(2, 2)({}), r"inputs\['state'\] is absent; found \[\]"),
        (
            lambda: ContextGate(2, 2)({"state": torch.ones(1, 3)}),
            r"shape \(1, 3\); expected \(rows, 2\)",
        ),
        (
            lambda: ContextGate(2, 2)({"state": torch.tensor([[0.0, 1.0], [math.nan, 0.0]])}),
            "row 1: found a value that",
        ),
        (lambda: UserGate({}, 2), "columns: found none"),
        (
            lambda: UserGate.from_metadata({"a": ["x", "x"]}, 2),
            "'a' is 'x' in every row: a gate can learn nothing",
        ),
        (lambda: UserGate.from_metadata({"a": [1.0, math.nan]}, 2), "row 1, column 'a': found nan"),
        (lambda: UserGate.from_metadata({"a": ["x", None]}, 2), "row 1, column 'a': found None"),
        (
            lambda: UserGate.from_metadata(METADATA, 2).encode({"age": [1]}),
            "column 'country' is absent; found \\['age'\\]",
        ),
        (
            lambda: UserGate.from_metadata(METADATA, 2).encode({"country": ["x"], "age": ["old"]}),
            "row 0, column 'age'",
        ),
        (
            lambda: UserGate.from_metadata(METADATA, 2).encode({"country": ["x"], "age": [1, 2]}),
            "'age' has 2 rows",
        ),
        (
            lambda: UserGate.from_metadata(METADATA, 2).encode(
                {"country": ["x"], "age": [math.nan]}
            ),
            "row 0, column 'age'",
        ),
        (
            lambda: MixedMembershipGate([ContextGate(2, 3)], 2, ["a"]),
            r"gates have \[3\] experts; expected 2",
        ),
        (lambda: MixedMembershipGate([], 2, []), "units: found 0"),
        (lambda: MixedMembershipGate([], 2, ["a", "a"]), "units: found 2, 1 of them distinct"),
        (lambda: MixedMembershipGate([], 2, ["a"], offset_scale=-1), "offset_scale=-1"),
        (lambda: MixedMembershipGate([], 2, ["a"])({}), r"inputs\['unit'\] is absent"),
        (
            lambda: MixedMembershipGate([], 2, ["a"])({"unit": torch.tensor([0, 1])}),
            r"\[1\] = 1; expected -1 ... 0",
        ),
        (lambda: gate_loss(torch.zeros(1, 2), torch.zeros(2, 2)), "log_w has shape"),
        (
            lambda: gate_loss(torch.zeros(1, 2), torch.zeros(1, 2), balance_weight=-1),
            "balance_weight=-1: expected 0",
        ),
    ],
)
def test_gates_refuse_what_they_cannot_use(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_large_numbers_of_users_stay_apart():
    """Seconds since 1970 that differ by ten: float32 holds them to 128."""
    joined = [1_700_000_000, 1_700_000_010, 1_700_000_020]
    gate = UserGate.from_metadata({"joined": joined}, 2)
    (read,) = gate.inputs({"joined": joined}, None).values()
    assert read[:, 0].tolist() == pytest.approx([-(1.5**0.5), 0.0, 1.5**0.5])


@pytest.mark.parametrize(
    "values, message",
    [
        (pd.Series([20, pd.NA, 40], dtype="Int64"), "row 1, column 'age': found <NA>"),
        (pd.Series([pd.NaT, pd.Timestamp(0)]), "row 0, column 'age': found NaT"),
        (["x", " ", "y"], "row 1, column 'age': found ' '"),
        (pd.Series([7, 7], index=[5, 6]), "'age' is 7 in every row"),
    ],
)
def test_what_pandas_calls_missing_is_missing(values, message):
    with pytest.raises(ValueError, match=message):
        UserGate.from_metadata({"age": values}, 2)
