"""Hidden states on disk: which positions are kept, the cache, units, and bad rows."""

import datasets
import numpy as np
import pytest
import torch
from tiny import preference_rows, save_tiny_base

from mixdpo_lib import store
from mixdpo_lib.base import features
from mixdpo_lib.base.features import text_features, tokenise
from mixdpo_lib.data.pairs import Pairs, Text, Texts
from mixdpo_lib.store import MixDPOError

TEXTS = [
    Text("the film", "was good", True),
    Text("a long story with it", "is bad", False),
    Text("it", "the", True),
]
ALL = Texts.of(TEXTS)


def rows(**changes):
    row = {
        "prompt": "the film",
        "chosen": "was good",
        "rejected": "was bad",
        "user": "ann",
    } | changes
    return datasets.Dataset.from_list(
        [{"prompt": "a", "chosen": "b", "rejected": "c", "user": "bob"}, row]
    )


def test_tokens_of_prompt_and_response(tiny_base):
    prompt, response = tokenise(tiny_base, TEXTS[0])
    assert (
        tiny_base.tokenizer.decode(prompt) == "the film"
        and tiny_base.tokenizer.decode(response[:2]) == "was good"
    )
    assert response[2:] == [tiny_base.eos_token_id]
    assert tokenise(tiny_base, TEXTS[0]._replace(ended=False)) == (prompt, response[:2])


@pytest.mark.parametrize("text", [Text("", "a", True), Text("a", " ", True)])
def test_a_text_without_tokens_is_refused(tiny_base, text):
    with pytest.raises(ValueError, match="(prompt|response) '.?' has no tokens: every pair needs"):
        tokenise(tiny_base, text)


def test_a_text_longer_than_the_context_is_refused(tiny_base):
    tokenise(tiny_base, Text("the " * 40, "a " * 8, False))
    with pytest.raises(
        ValueError, match="prompt of 40 and response of 9 tokens exceed the context .*48 tokens"
    ):
        tokenise(tiny_base, Text("the " * 40, "a " * 8, True))


def test_hidden_states_are_those_that_predict_each_response_token(tiny_base):
    found = text_features(tiny_base, ALL, batch_size=2)  # padded, in another order than the texts
    assert len(found) == 3 and found.offsets.tolist() == [0, 3, 5, 7]
    for i, text in enumerate(TEXTS):
        prompt, response = tokenise(tiny_base, text)
        with torch.no_grad():
            out = tiny_base.model(
                torch.tensor([prompt + response]), output_hidden_states=True
            ).hidden_states[-1][0]
        mine = slice(found.offsets[i], found.offsets[i + 1])
        assert found.tokens[mine].tolist() == response
        np.testing.assert_allclose(found.hidden[mine], out[len(prompt) - 1 : -1], atol=1e-5)
        np.testing.assert_allclose(found.prompt_hidden[i], out[: len(prompt)].mean(0), atol=1e-5)


def test_features_come_from_the_cache(tiny_base, monkeypatch):
    first = text_features(tiny_base, ALL)
    monkeypatch.setattr(features, "tokenise", lambda *_: pytest.fail("computed again"))
    again = text_features(tiny_base, ALL)
    assert again.key == first.key and np.array_equal(again.hidden, first.hidden)
    assert isinstance(again.hidden, np.memmap)
    with pytest.raises(pytest.fail.Exception):
        text_features(tiny_base, Texts.of(TEXTS[:2]))
    assert list(store.cache_folder().glob("features/*.part-*")) == []  # what failed left nothing


def test_another_base_has_other_features(tiny_base, tmp_path, tiny_folder):
    from mixdpo_lib.base.model import load_base

    other = load_base(save_tiny_base(tmp_path / "other", seed=1))
    assert other.fingerprint != tiny_base.fingerprint == load_base(tiny_folder).fingerprint
    assert text_features(other, ALL).key != text_features(tiny_base, ALL).key


def test_a_base_with_broken_weights_is_refused(tmp_path, tiny_base):
    from mixdpo_lib.base.model import load_base

    broken = load_base(save_tiny_base(tmp_path / "broken", seed=2))
    broken.model.model.norm.weight.data[:] = float("nan")
    with pytest.raises(MixDPOError, match="non-finite hidden states"):
        text_features(broken, ALL)


def test_a_text_is_stored_once(tiny_base):
    kept = Texts.of([*TEXTS, TEXTS[0], TEXTS[0]._replace(ended=False)])
    assert len(kept) == len(text_features(tiny_base, kept)) == 4 and kept.index[TEXTS[2]] == 2


def test_pairs_point_at_chosen_and_rejected(tiny_base):
    data = preference_rows(8)
    found = Pairs.of(data)
    assert len(found) == 8
    kept = text_features(tiny_base, found.texts)
    for row, (chosen, rejected) in zip(data, found.index.tolist(), strict=True):
        for side, i in (("chosen", chosen), ("rejected", rejected)):
            tokens = kept.tokens[kept.offsets[i] : kept.offsets[i + 1]].tolist()
            assert tokens == tokenise(tiny_base, Text(row["prompt"], row[side], row["ended"]))[1]
    part = found.where([n % 2 == 1 for n in range(8)])
    assert part.rows["row"][:] == [1, 3, 5, 7] and torch.equal(part.index, found.index[1::2])
    assert part.texts is found.texts


def test_a_response_is_ended_where_nothing_is_said(tiny_base):
    data = preference_rows(4)
    without = Pairs.of(data.remove_columns("ended"))
    kept = text_features(tiny_base, without.texts)
    assert all(kept.tokens[kept.offsets[1:] - 1] == tiny_base.eos_token_id)


def test_units_are_numbered_by_first_appearance(tiny_base):
    found = Pairs.of(preference_rows(6, users=4))
    ids, names = found.units("user")
    assert ids.tolist() == [0, 1, 2, 3, 0, 1] and names == ["user0", "user1", "user2", "user3"]
    with pytest.raises(
        ValueError, match="unit column 'person' is missing; found .*'user'.*: name one of them"
    ):
        found.units("person")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (rows().remove_columns("rejected"), "preference set: column 'rejected' is missing; found"),
        (
            rows(chosen="  "),
            "preference set: row 1, column 'chosen': found '  ', expected a text with words",
        ),
        (rows(chosen="was bad"), "preference set: row 1: chosen equals rejected"),
        (rows(prompt=None), "preference set: row 1, column 'prompt': found NoneType"),
        (rows(prompt="the " * 47), "exceed the context"),
        (rows().select([]), "the preference set is empty"),
    ],
)
def test_bad_rows(tiny_base, data, message):
    with pytest.raises(ValueError, match=message) as error:
        text_features(tiny_base, Pairs.of(data).texts)
    assert "\n" not in str(error.value)
