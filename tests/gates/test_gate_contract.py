"""What every gate of the library keeps: shapes, description, prior, an M-step that cannot lower the bound."""

import datetime
import json
import math
from decimal import Decimal

import pytest
import torch

from mixdpo_lib.elbo import elbo_terms
from mixdpo_lib.gates import GATES, make_gate
from mixdpo_lib.gates.direction import DirectionGate
from mixdpo_lib.gates.grown import GrownGate
from mixdpo_lib.gates.membership import MixedMembershipGate
from mixdpo_lib.gates.prompt import ContextGate
from mixdpo_lib.gates.user import UserGate
from mixdpo_lib.gates.weights import FixedWeights, LearnedWeights

K, ROWS = 3, 12
LIBRARY = sorted(n for n, gate in GATES.items() if gate.__module__.startswith("mixdpo_lib."))
STATE = torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(0))
METADATA = {"age": [20 + i for i in range(ROWS)], "country": list("xyz") * (ROWS // 3)}
MAKE = {  # how each gate is made for n experts; a new gate needs a line here
    "FixedWeights": lambda n: FixedWeights([1 / n] * n if n else []),
    "LearnedWeights": lambda n: LearnedWeights(n),
    "ContextGate": lambda n: ContextGate(4, n),
    "UserGate": lambda n: UserGate.from_metadata(METADATA, n),
    "DirectionGate": lambda n: DirectionGate.from_metadata(METADATA, n),
    "MixedMembershipGate": lambda n: MixedMembershipGate([ContextGate(4, n)], n, ["ann", "bob"]),
    "GrownGate": lambda n: GrownGate(LearnedWeights(1), LearnedWeights(n), ["ann"]),
}
BAD = {
    "FixedWeights": [{"weights": [0.5, 0.6]}, {"weights": [math.nan, 1.0]}],
    "LearnedWeights": [{"n_experts": 2, "alpha": a} for a in (0.5, math.nan, math.inf)],
    "ContextGate": [{"n_features": 4, "n_experts": 2, "weight_scale": s} for s in (0, math.nan)],
    "DirectionGate": [{"n_experts": 2}, {"n_experts": 3, "weight_scale": 0}],
    "UserGate": [{"columns": {"age": (0.0, 1.0)}, "n_experts": 2, "weight_scale": -1}],
    "MixedMembershipGate": [
        {"gates": [], "n_experts": 2, "units": ["a"], "offset_scale": s} for s in (0, math.inf)
    ],
    "GrownGate": [
        {"before": LearnedWeights(b), "after": LearnedWeights(2), "units": units}
        for b, units in ((3, ["ann"]), (1, []))
    ],
}


def read_by(gate):
    """Inputs of twelve rows; nothing for a gate that reads nothing."""
    if isinstance(gate, MixedMembershipGate):
        return {"0/state": STATE, "unit": torch.arange(ROWS) % 2}
    if isinstance(gate, GrownGate):
        return gate.inputs({"user": ["ann", "eve", "bob"] * (ROWS // 3)}, None)
    if isinstance(gate, ContextGate):
        return {"state": STATE}
    return gate.inputs(METADATA, None)


def test_every_gate_of_the_library_is_tried_here():
    assert set(LIBRARY) == set(MAKE) == set(BAD)


@pytest.mark.parametrize("name", LIBRARY)
def test_weights_are_normalised_rows(name):
    gate = MAKE[name](K)
    log_w = gate.log_w(read_by(gate))
    assert log_w.shape == (ROWS if gate.reads else 1, K)
    torch.testing.assert_close(log_w.logsumexp(1), torch.zeros(len(log_w)))
    assert gate.log_prior().shape == () and bool(gate.log_prior().isfinite())
    assert set(gate.of_prompt) <= set(gate.reads)
    one = {name: value[:1] for name, value in read_by(gate).items()}
    torch.testing.assert_close(gate.served(one), log_w[0].detach())


@pytest.mark.parametrize("name", LIBRARY)
def test_a_description_makes_an_equal_gate(name):
    gate = MAKE[name](K)
    described = json.loads(json.dumps(gate.describe(), allow_nan=False))
    again = make_gate(described)
    assert type(again) is type(gate) and again.reads == gate.reads
    assert json.loads(json.dumps(again.describe())) == described
    again.load_state_dict(gate.state_dict())
    torch.testing.assert_close(again.log_w(read_by(gate)), gate.log_w(read_by(gate)))


@pytest.mark.parametrize("name", LIBRARY)
def test_an_m_step_never_lowers_the_bound(name):
    gate = MAKE[name](K)
    inputs = read_by(gate)
    if isinstance(gate, GrownGate):  # where nobody keeps other weights: those count for `after` too
        inputs["kept"] = torch.zeros(ROWS, dtype=torch.bool)
    place = torch.arange(ROWS) if inputs else torch.zeros(ROWS, dtype=torch.long)
    generator = torch.Generator().manual_seed(1)
    log_q = (2 * torch.randn(ROWS, K, generator=generator)).log_softmax(1)
    loglik = -torch.rand(ROWS, K, generator=generator)

    def bound():
        log_w = gate.log_w(inputs)[place].detach()
        terms = elbo_terms(loglik, log_w, log_q)
        return float(terms.elbo.sum()) + float(gate.log_prior().detach())

    bounds = [bound()]
    for _ in range(4):
        gate.m_step(inputs, log_q, place, max_iter=3)
        bounds.append(bound())
    assert all(b >= a - 1e-5 for a, b in zip(bounds, bounds[1:], strict=False))
    assert (bounds[-1] > bounds[0] + 0.01) == gate.learns


@pytest.mark.parametrize("name", LIBRARY)
def test_bad_numbers_are_refused(name):
    with pytest.raises(ValueError, match="n_experts=0"):
        MAKE[name](0)
    for options in BAD[name]:
        with pytest.raises(ValueError):
            GATES[name](**options)


@pytest.mark.parametrize("name", LIBRARY)
def test_a_gate_of_another_size_reads_the_same(name):
    gate = MAKE[name](K)
    if name == "ContextGate":
        gate.mean.fill_(0.5)
    other = gate.resized(K + 1)
    assert type(other) is type(gate) and other.reads == gate.reads and other.n_experts == K + 1
    log_w = other.log_w(read_by(gate))
    torch.testing.assert_close(log_w.logsumexp(1), torch.zeros(len(log_w)))
    if name == "ContextGate":
        assert bool((other.mean == 0.5).all())


def test_users_who_keep_their_weights_give_none_to_new_experts():
    before = FixedWeights([0.25, 0.75])
    gate = GrownGate(before, LearnedWeights(3), ["ann"])
    inputs = gate.inputs({"user": ["ann", "eve", "bob"]}, None)
    log_q = torch.tensor([[0.1, 0.1, 0.8], [0.1, 0.1, 0.8], [0.3, 0.3, 0.4]]).log()
    gate.m_step(inputs, log_q, torch.arange(3))
    w = gate.log_w(inputs).exp()
    assert w[0].tolist() == [0.25, 0.75, 0.0]
    own = LearnedWeights(3)
    own.m_step({}, log_q, torch.zeros(3, dtype=torch.long))
    torch.testing.assert_close(w[1:], own.log_w().exp().expand(2, 3))
    assert gate.user_inputs({}, None)["kept"].tolist() == [False]
    with pytest.raises(ValueError, match=r"inputs\['kept'\] is absent"):
        gate.log_w({})


def test_numbers_and_text_in_one_column_are_refused_with_the_rarer_kind_named():
    with pytest.raises(ValueError, match=r"row 2, column 'age': found 'forty' among numbers"):
        UserGate.from_metadata({"age": [20, 30, "forty", 50]}, 2)
    with pytest.raises(ValueError, match=r"row 1, column 'town': found 7 among texts"):
        UserGate.from_metadata({"town": ["Ede", 7, "Oss"]}, 2)
    with pytest.raises(ValueError, match="row 1, column 'age': found None.*'unknown', or leave"):
        UserGate.from_metadata({"age": [20, None, 40]}, 2)


def test_numbers_are_names_of_users_as_everywhere():
    gate = MixedMembershipGate([], 2, [1, 2])
    with torch.no_grad():
        gate.offset[0] = torch.tensor([1.0, 0.0])
    assert gate.units == ["1", "2"] and gate.places([1, "2", 3]).tolist() == [0, 1, -1]
    named = gate.log_w(gate.user_inputs({"user": [1]}, None))
    torch.testing.assert_close(named, torch.tensor([[1.0, 0.0]]).log_softmax(1))
    nobody = gate.log_w(gate.user_inputs({}, None))
    torch.testing.assert_close(nobody, torch.tensor([[0.5, 0.5]]).log())
    grown = GrownGate(FixedWeights([1.0]), FixedWeights([0.5, 0.5]), [7])
    assert grown.log_w(grown.inputs({"user": [7]}, None)).exp().tolist() == [[1.0, 0.0]]
    with pytest.raises(ValueError, match="units: found 2, 1 of them distinct"):
        MixedMembershipGate([], 2, [1, "1"])


@pytest.mark.parametrize(
    "kind",
    [[], [1, 2, 3], [30.0, 9.0], ["x", "x"], (1.0,), (1.0, 0.0), (math.nan, 1.0), "DE", None],
)
def test_a_column_that_is_neither_kinds_nor_numbers(kind):
    for make in (lambda c: UserGate(c, 2), lambda c: DirectionGate(8, c)):
        with pytest.raises(
            ValueError, match=r"columns\['x'\]: found .*expected a list of different"
        ):
            make({"x": kind})


def test_metadata_that_is_no_columns():
    with pytest.raises(Exception, match="metadata"):
        UserGate.from_metadata(["NL", "DE"], 2)


def test_truth_values_are_named_as_they_are_read():
    assert UserGate({"vip": [True, False]}, 2).columns == {"vip": ["True", "False"]}
    read = UserGate.from_metadata({"vip": [False, True]}, 2)
    assert read.encode({"vip": [True]}).tolist() == [[0, 1]]


def test_numbers_as_text_are_kinds_with_a_word(recwarn):
    with pytest.warns(UserWarning, match="column 'age': '28' and the like are texts, .*give float"):
        UserGate.from_metadata({"age": ["31", "28", "55"]}, 2)
    years = {"year": ["1980", "1990", "older"]}
    with pytest.raises(ValueError, match=r"name all of them: UserGate\(\{'year': \['1980', "):
        UserGate.from_metadata(years, 2)
    recwarn.clear()
    UserGate({"year": ["1980", "1990", "older"]}, 2).encode(years)
    UserGate({"age": ["28", "31"]}, 2)
    UserGate.from_metadata({"zip": ["007", "12"]}, 2)
    assert not list(recwarn)


def test_decimals_are_numbers_and_other_kinds_are_refused():
    decimal, plain = ({"age": [kind(20), kind(30)]} for kind in (Decimal, float))
    assert UserGate.from_metadata(decimal, 2).columns == UserGate.from_metadata(plain, 2).columns
    for odd in (torch.tensor(3.0), datetime.date(2020, 1, 1)):
        with pytest.raises(
            ValueError, match="row 1, column 'age': found .*, expected text, a truth"
        ):
            UserGate.from_metadata({"age": [20, odd]}, 2)
