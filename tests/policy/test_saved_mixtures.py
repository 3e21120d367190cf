"""A saved mixture is checked before it is believed: shape of config.json, hash, kinds and finiteness of its tensors."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import preference_rows, save_tiny_base
from transformers import AutoTokenizer

from mixdpo_lib.base.model import load_base
from mixdpo_lib.data.pairs import Pairs
from mixdpo_lib.experts.heads import HeadExperts
from mixdpo_lib.experts.whole import IndependentExperts
from mixdpo_lib.gates import GATES
from mixdpo_lib.gates.user import UserGate
from mixdpo_lib.gates.weights import FixedWeights, LearnedWeights
from mixdpo_lib.policy.mixture import MixturePolicy
from mixdpo_lib.policy.remarks import of_the_gate
from mixdpo_lib.store import MixDPOError, sha256_of


def policy(base, gate=None, lapse=0.0):
    experts = HeadExperts(base, 2, rank=2)
    experts.start(Pairs.of(preference_rows(8)))
    return MixturePolicy(experts, gate or LearnedWeights(2), 0.3, lapse)


@pytest.fixture
def folder(tiny_base, tmp_path):
    policy(tiny_base).save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def change(folder, *keys, value=None, gone=False, hashed=False):
    """Change a key; without the configuration's own hash, as in older mixtures, unless `hashed`."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    if not hashed:
        config.pop("config_sha256", None)
    place = config
    for key in keys[:-1]:
        place = place[key]
    if gone:
        del place[keys[-1]]
    else:
        place[keys[-1]] = value
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("content", ["[]", "null", "3", '"text"', "{}", '{"format": 2', ""])
def test_a_config_of_another_shape(tiny_base, folder, content):
    (folder / "config.json").write_text(content)
    with pytest.raises(MixDPOError, match=r"config\.json: .*(found|format)"):
        MixturePolicy.from_pretrained(folder, tiny_base)


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("beta",), None, "beta: found null, expected a number"),
        (("beta",), -1, "beta: found -1, expected above 0"),
        (("beta",), math.nan, "beta: found nan, expected above 0"),
        (("lapse",), "auto", "lapse: found 'auto', expected a rate of at least 0 and below 1"),
        (("lapse",), 1.0, "lapse: found 1.0, expected a rate"),
        (("lapse",), math.nan, "lapse: found nan, expected a rate"),
        (("lapse",), None, "lapse: found null, expected a number or text"),
        (("lapse",), "learn", r"safetensors: lapse_rate: found no such tensor, expected a number"),
        (("n_experts",), "2", 'n_experts: found "2", expected a whole number'),
        (("n_experts",), 3, "found 2 of them, expected n_experts = 3"),
        (("chat",), "no", 'chat: found "no", expected true or false'),
        (("experts",), [], r"experts: found \[\], expected an object"),
        (("gate",), "LearnedWeights", 'gate: found "LearnedWeights", expected an object'),
        (("experts", "family"), 3, "experts: family: found 3, expected text"),
        (("experts", "family"), "Nobody", "config.json: family='Nobody': no family"),
        (("experts", "family"), "IndependentExperts", "'bases': no such key"),
        (("experts", "rank"), "4", 'HeadExperts: rank: found "4", expected int'),
        (("experts", "rank"), True, "HeadExperts: rank: found true, expected int"),
        (("experts", "rank"), 0, "rank=0"),
        (("experts", "min_count"), "a", "min_count: found .a., expected int"),
        (("experts", "strange"), 1, "unexpected keyword argument 'strange'"),
        (("gate", "gate"), "Nobody", "config.json: gate='Nobody': no gate"),
        (("gate", "gate"), "UserGate", "'columns': no such key"),
        (("gate", "alpha"), "x", 'alpha: found "x", expected float or int'),
        (("gate", "alpha"), 0.5, "alpha=0.5"),
        (("format",), 3, "format 3, expected 2"),
        (("format",), True, "format True, expected 2"),
        (("tensors_sha256",), "00", r"mixture\.safetensors: found sha256"),
    ],
)
def test_a_key_of_another_type_or_range(tiny_base, folder, keys, value, message):
    change(folder, *keys, value=value)
    with pytest.raises(MixDPOError, match=message):
        MixturePolicy.from_pretrained(folder, tiny_base)


@pytest.mark.parametrize("keys", [("beta",), ("experts", "family"), ("gate", "n_experts")])
def test_a_key_that_is_gone(tiny_base, folder, keys):
    change(folder, *keys, gone=True)
    with pytest.raises(MixDPOError, match=rf"config\.json: .*{keys[-1]}"):
        MixturePolicy.from_pretrained(folder, tiny_base)


@pytest.mark.parametrize(
    ("keys", "value"),
    [(("beta",), 0.5), (("chat",), True), (("experts", "min_count"), 2), (("gate", "alpha"), 3.0)],
)
def test_a_value_that_could_be_right_and_was_not_written(tiny_base, folder, keys, value):
    change(folder, *keys, value=value, hashed=True)
    with pytest.raises(MixDPOError, match="found another content than was written .config_sha256"):
        MixturePolicy.from_pretrained(folder, tiny_base)


def test_tensors_have_a_hash_which_older_mixtures_lack(tiny_base, folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["tensors_sha256"] == sha256_of(folder / "mixture.safetensors")
    change(folder, "tensors_sha256", gone=True)
    MixturePolicy.from_pretrained(folder, tiny_base)
    content = bytearray((folder / "mixture.safetensors").read_bytes())
    content[-1] ^= 1
    change(folder, "tensors_sha256", value=config["tensors_sha256"])
    (folder / "mixture.safetensors").write_bytes(bytes(content))
    with pytest.raises(MixDPOError, match=r"found sha256 .*, expected .*copy the folder again"):
        MixturePolicy.from_pretrained(folder, tiny_base)


def put(name, index, value):
    def spoil(state):
        state[name].view(-1)[index] = value

    return spoil


SPOILT = {
    "experts.down: found 1 numbers that are NaN": put("experts.down", 0, math.nan),
    "experts.up: found 1 numbers": put("experts.up", 3, -math.inf),
    "gate.log_weights: found 1 numbers": put("gate.log_weights", 0, math.inf),
    "gate: found weights that sum to": put("gate.log_weights", 0, 3.0),
    "experts.active_ids: expected rising tokens": put("experts.active_ids", -1, 10**6),
    "'active_ids': no such key": lambda s: s.pop("experts.active_ids"),
    "experts.up: found torch.int64": lambda s: s.update({"experts.up": s["experts.up"].long()}),
    "size mismatch for up": lambda s: s.update({"experts.up": s["experts.up"][:, :3].clone()}),
    "other.x: belongs neither": lambda s: s.update({"other.x": torch.ones(1)}),
}


@pytest.mark.parametrize("message", SPOILT)
def test_tensors_that_cannot_be_right(tiny_base, folder, message):
    state = load_file(folder / "mixture.safetensors")
    SPOILT[message](state)
    save_file(state, folder / "mixture.safetensors")
    change(folder, "tensors_sha256", gone=True)
    with pytest.raises(MixDPOError, match=message):
        MixturePolicy.from_pretrained(folder, tiny_base)


def test_heads_from_before_there_was_sharpness(tiny_base, folder, tmp_path):
    """They have none, in config.json and among the tensors, and say what they said."""
    data = Pairs.of(preference_rows(8))
    experts = HeadExperts(tiny_base, 2, rank=2, sharpness=False)
    experts.start(data)
    experts.perturb(0.5, torch.Generator().manual_seed(0))
    old = MixturePolicy(experts, LearnedWeights(2), 0.3)
    old.save_pretrained(tmp_path / "old")
    for name in ("sharpness", "sharpness_rate"):
        change(tmp_path / "old", "experts", name, gone=True)
    again = MixturePolicy.from_pretrained(tmp_path / "old", tiny_base)
    assert again.experts.sharpness is None
    assert torch.equal(again.loglik(data), old.loglik(data))


def test_an_expert_that_is_left_out_may_be_saved(tiny_base, tmp_path):
    policy(tiny_base, FixedWeights([0.0, 1.0])).save_pretrained(tmp_path / "m")
    again = MixturePolicy.from_pretrained(tmp_path / "m", tiny_base)
    assert again.gate.log_w()[0].tolist() == [-math.inf, 0.0]


def test_numbers_that_are_none_are_not_saved(tiny_base, tmp_path):
    broken = policy(tiny_base)
    with torch.no_grad():
        broken.experts.up[0, 0, 0] = math.nan
    with pytest.raises(MixDPOError, match=r"m: not written: experts\.up: found 1 numbers"):
        broken.save_pretrained(tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------- lapses


@pytest.mark.parametrize("lapse", [0.0, 0.05, "learn"])
def test_a_lapse_rate_is_saved_with_the_mixture(tiny_base, tmp_path, lapse):
    own, rows = policy(tiny_base, lapse=lapse), preference_rows(8)
    if lapse == "learn":
        data = own.prepare(rows)
        own.move_lapse(own.log_sigma(data) - 3.0, torch.zeros(8, 2).log_softmax(1), torch.arange(8))
        assert own.lapse > 0.05
    own.save_pretrained(tmp_path / "m")
    again = MixturePolicy.from_pretrained(tmp_path / "m", tiny_base)
    assert again.given_lapse == lapse and again.lapse == own.lapse
    assert torch.equal(again.loglik(rows), own.loglik(rows))
    assert json.loads((tmp_path / "m" / "config.json").read_text())["lapse"] == lapse
    assert f"- lapse: {lapse}" in (tmp_path / "m" / "README.md").read_text()
    held = set(load_file(tmp_path / "m" / "mixture.safetensors"))
    assert ("lapse_rate" in held) == (lapse == "learn")  # what is given is no tensor


def test_a_mixture_from_before_there_were_lapses_has_none(tiny_base, folder):
    change(folder, "lapse", gone=True)
    assert MixturePolicy.from_pretrained(folder, tiny_base).given_lapse == 0.0


@pytest.mark.parametrize("rate", [math.nan, 0.0, 1.0, -0.1, [0.02]])
def test_a_learned_rate_that_cannot_be_right(tiny_base, tmp_path, rate):
    policy(tiny_base, lapse="learn").save_pretrained(tmp_path / "m")
    state = load_file(tmp_path / "m" / "mixture.safetensors")
    save_file(state | {"lapse_rate": torch.tensor(rate)}, tmp_path / "m" / "mixture.safetensors")
    change(tmp_path / "m", "tensors_sha256", gone=True)
    with pytest.raises(MixDPOError, match="lapse_rate: found .*, expected a number above 0"):
        MixturePolicy.from_pretrained(tmp_path / "m", tiny_base)


def test_numbers_of_numpy_are_kept_as_numbers(tiny_base, tmp_path):
    experts = HeadExperts(tiny_base, 2, rank=2, active="all")
    experts.rank = np.int64(2)  # as where nobody checks types
    MixturePolicy(experts, LearnedWeights(2), float(np.float64(0.3))).save_pretrained(
        tmp_path / "m"
    )
    again = MixturePolicy.from_pretrained(tmp_path / "m", tiny_base)
    assert again.n_experts == 2 and again.experts.rank == 2 and again.beta == 0.3


def test_whole_models_with_a_template_are_found_by_name(tmp_path):
    folder = save_tiny_base(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "the {{ messages[0]['content'] }}"
    tokenizer.save_pretrained(folder)
    base = load_base(str(folder), chat=True)
    models = MixturePolicy(IndependentExperts([base, base]), LearnedWeights(2))
    models.save_pretrained(tmp_path / "m")
    assert MixturePolicy.from_pretrained(tmp_path / "m").base.chat


def test_another_base_is_named_with_its_kind_of_numbers(tmp_path, folder):
    other = load_base(str(save_tiny_base(tmp_path / "base")), dtype="bfloat16")
    with pytest.raises(ValueError, match=r"\(.*, bfloat16\): give the base that it was trained on"):
        MixturePolicy.from_pretrained(folder, other)


def test_what_others_call_columns_is_theirs(tiny_base, tmp_path, monkeypatch):
    """A gate of somebody's own is saved, and its card is silent where it does not know."""

    class Remembering(LearnedWeights):
        def __init__(self, n_experts, columns=("age", "country"), before=3, gates=2, after="no"):
            super().__init__(n_experts)
            self.columns, self.before, self.gates, self.after = list(columns), before, gates, after

        def options(self):
            names = ("n_experts", "columns", "before", "gates", "after")
            return {name: getattr(self, name) for name in names}

        @classmethod
        def from_options(cls, options):
            return cls(**options)

    monkeypatch.setitem(GATES, "Remembering", Remembering)
    own = policy(tiny_base, Remembering(2))
    own.save_pretrained(tmp_path / "m")
    assert "- gate: Remembering\n" in (tmp_path / "m" / "README.md").read_text()
    assert MixturePolicy.from_pretrained(tmp_path / "m", tiny_base).gate.before == 3
    data = own.prepare(preference_rows(4))
    assert of_the_gate(own, data, "user") == []


def test_the_card_says_how_to_read_it_and_what_the_gate_reads(tiny_base, tmp_path, capsys):
    gate = UserGate({"age": (30.0, 9.0), "country": ["DE", "NL"]}, 2)
    policy(tiny_base, gate).save_pretrained(tmp_path / "m")
    assert "replaced" not in capsys.readouterr().err
    card = (tmp_path / "m" / "README.md").read_text()
    assert "mx.MixturePolicy.from_pretrained(" in card
    assert "- gate: UserGate, which reads `age` (a number), `country` (one of DE, NL): `" in card
    policy(tiny_base).save_pretrained(tmp_path / "m")  # said, and not done in silence
    assert f"{tmp_path / 'm'}: what was saved there before is replaced" in capsys.readouterr().err
    assert "- gate: LearnedWeights\n" in (tmp_path / "m" / "README.md").read_text()


def test_what_a_card_shall_say_has_names(tiny_base, tmp_path):
    with pytest.raises((ValueError, TypeError)):
        policy(tiny_base).save_pretrained(tmp_path / "m", "hello")
    assert not (tmp_path / "m").exists()
