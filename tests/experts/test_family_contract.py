"""What every family of the library keeps: shapes, description, choice of experts, voices that say what texts score."""

import json
import math

import pytest
import torch
from tiny import preference_rows

from mixdpo_lib.data.pairs import Pairs
from mixdpo_lib.experts import FAMILIES, make_experts
from mixdpo_lib.experts.adapters import AdapterExperts
from mixdpo_lib.experts.contract import Experts
from mixdpo_lib.experts.copies import gathered
from mixdpo_lib.experts.group_heads import GroupHeads
from mixdpo_lib.experts.group_tables import GroupTables
from mixdpo_lib.experts.heads import HeadExperts
from mixdpo_lib.experts.tables import TabularExperts
from mixdpo_lib.experts.whole import IndependentExperts

LIBRARY = sorted(n for n, one in FAMILIES.items() if one.__module__.startswith("mixdpo_lib."))
MAKE = {  # how each family is made for k experts; a new family needs a line here
    "HeadExperts": lambda base, data, k: HeadExperts(base, k, rank=2),
    "AdapterExperts": lambda base, data, k: AdapterExperts(base, k, rank=2, blocks=1),
    "IndependentExperts": lambda base, data, k: IndependentExperts([base] * k),
    "TabularExperts": lambda base, data, k: TabularExperts.of(base, data, k),
    "GroupHeads": lambda base, data, k: GroupHeads(base, k, group="cyclic", rank=2),
    "GroupTables": lambda base, data, k: GroupTables.of(base, data, k, group="cyclic"),
}
BAD = {
    "HeadExperts": [{"rank": 0}, {"active": "some"}],
    "AdapterExperts": [{"rank": 0}, {"blocks": 99}],
    "IndependentExperts": [],
    "GroupHeads": [{"rank": 0}, {"group": "circle"}, {"n_basis": 3}],
    "GroupTables": [{"group": "sphere"}, {"n_basis": 3}, {"group": "circle"}, {"beta": 0.0}],
    "TabularExperts": [{"beta": 0.0}, {"prior_scale": math.inf}],
}


@pytest.fixture(scope="module")
def data():
    return Pairs.of(preference_rows(n=6))


@pytest.fixture(scope="module", params=LIBRARY)
def experts(request, tiny_base, data):
    made = MAKE[request.param](tiny_base, data, 2)
    made.start(data)
    made.perturb(0.3, torch.Generator().manual_seed(0))
    return made


def test_every_family_of_the_library_is_tried_here():
    assert set(LIBRARY) == set(MAKE) == set(BAD)


def test_experts_start_as_the_reference(tiny_base, data):
    for make in MAKE.values():
        made = make(tiny_base, data, 2)
        made.start(data)
        logps, refs = made.all_text_logps(made.constants(data.texts), torch.arange(len(data.texts)))
        assert torch.equal(logps, refs.expand_as(logps))  # to the bit: rounding is no prediction
        assert (
            all(map(made.unmoved, range(made.n_experts))) or type(made).unmoved is Experts.unmoved
        )
        made.perturb(0.3, torch.Generator().manual_seed(0))
        assert not any(map(made.unmoved, range(made.n_experts)))


def test_texts_have_a_log_probability_under_each_expert(experts, data):
    constants = experts.constants(data.texts)
    logps, refs = experts.all_text_logps(constants, torch.arange(len(data.texts)))
    assert logps.shape == (len(data.texts), 2) and refs.shape in ((len(logps), 1), (len(logps), 2))
    assert bool((logps <= 1e-5).all()) and not torch.allclose(logps[:, 0], logps[:, 1])
    batch = experts.batch(constants, data.index)
    found = experts.logps(batch).detach().float()
    torch.testing.assert_close(found, logps[data.index], atol=1e-4, rtol=1e-4)
    assert experts.ref_logps(batch).shape == (len(data), 2, refs.shape[1])


def test_what_was_not_chosen_is_left_out(experts, data):
    batch = experts.batch(experts.constants(data.texts), data.index)
    chosen = torch.arange(len(data))[:, None] % 2 == torch.arange(2)
    some, whole = experts.logps(batch, chosen), experts.logps(batch)
    kept = chosen[:, None].expand_as(some)
    torch.testing.assert_close(some[kept], whole[kept], atol=1e-5, rtol=1e-5)
    assert bool((some[~kept] == -torch.inf).all())
    with pytest.raises(ValueError, match="chosen has shape"):
        experts.logps(batch, chosen[:, :1])


def test_parameters_are_learned_in_groups(experts):
    groups = experts.parameter_groups(0.5)
    learned = {id(p) for p in experts.parameters() if p.requires_grad}
    assert {id(p) for group in groups for p in group["params"]} >= learned
    assert all(group["lr"] > 0 for group in groups) and set(experts.rates) >= {"adamw", "sgd"}


def test_a_description_makes_equal_experts(experts, tiny_base, data):
    described = json.loads(json.dumps(experts.describe(), allow_nan=False))
    again = make_experts(described, lambda *_: tiny_base)
    assert type(again) is type(experts)
    assert json.loads(json.dumps(again.describe())) == described
    again.fit_state(experts.state_dict())
    again.load_state_dict(experts.state_dict())
    ids = torch.arange(len(data.texts))
    wanted, _ = experts.all_text_logps(experts.constants(data.texts), ids)
    found, _ = again.all_text_logps(again.constants(data.texts), ids)
    torch.testing.assert_close(found, wanted)


def test_voices_say_what_texts_score(experts, data, tiny_base):
    """The first token of a response: its logit under each expert against the text's own first step."""
    prompt = data.rows[0]["prompt"]
    ids = torch.tensor([tiny_base.prompt_ids(prompt)] * 3)
    chosen = torch.tensor([[True, False], [True, True], [False, True]])
    with torch.no_grad():
        plain, said = experts.voices(chosen)(ids, torch.ones_like(ids))
        alone, none = experts.voices(None)(ids, torch.ones_like(ids))
    assert none == [] and torch.allclose(plain, alone, atol=1e-5)
    assert {k: rows.tolist() for k, rows, _ in said} == {0: [0, 1], 1: [1, 2]}
    assert all(logits.shape == (2, plain.shape[1]) for _, _, logits in said)


@pytest.mark.parametrize("name", LIBRARY)
def test_bad_numbers_are_refused(name, tiny_base, data):
    with pytest.raises(ValueError, match="n_experts=0|bases: found none"):
        MAKE[name](tiny_base, data, 0)
    for options in BAD[name]:
        with pytest.raises(ValueError):
            if name in ("TabularExperts", "GroupTables"):
                FAMILIES[name].of(tiny_base, data, 2, **options)
            else:
                FAMILIES[name](tiny_base, 2, **options)


@pytest.mark.parametrize("k", [-1, 2])
def test_a_number_that_is_no_experts_is_refused(experts, k, tmp_path):
    for leave in (experts.export_adapter, experts.merge):
        with pytest.raises(ValueError, match=f"k={k}: expected an expert from 0 to 1"):
            leave(k, tmp_path / "out")


def test_experts_are_copied_added_and_dropped(experts, data):
    """Gathered experts score as those they are copies of, to the bit, and hold tensors of their own."""
    order = [1, 0, 1]
    if experts.nodes is not None:
        with pytest.raises(ValueError, match="nodes of a group that share their basis experts"):
            gathered(experts, [(experts, 0)])
        return
    made = gathered(experts, [(experts, k) for k in order])
    assert type(made) is type(experts) and made.n_experts == 3
    ids = torch.arange(len(data.texts))
    wanted, refs = experts.all_text_logps(experts.constants(data.texts), ids)
    found, own_refs = made.all_text_logps(made.constants(data.texts), ids)
    torch.testing.assert_close(found, wanted[:, order], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(own_refs[:, 0], refs[:, 0])
    for place, k in enumerate(order):
        one, copy = experts.own(k), made.own(place)
        assert set(one) == set(copy) and all(bool((one[n] == copy[n]).all()) for n in one)
    for value in made.own(0).values():
        value.add_(1.0)
    assert all(bool((experts.own(1)[n] == made.own(2)[n]).all()) for n in experts.own(1))
    with pytest.raises(ValueError, match="k=2: expected an expert from 0 to 1"):
        gathered(experts, [(experts, 2)])
    with pytest.raises(ValueError, match="expected at least one expert to copy"):
        gathered(experts, [])


def test_experts_of_other_options_are_not_gathered(tiny_base):
    one, other = HeadExperts(tiny_base, 1, rank=2), HeadExperts(tiny_base, 1, rank=3)
    with pytest.raises(ValueError, match="expert 0 of HeadExperts .* expected one of the options"):
        gathered(one, [(other, 0)])
