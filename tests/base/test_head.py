"""Constants of the frozen head against plain operations over the whole vocabulary."""

import numpy as np
import pytest
import torch
from tiny import KINDS, preference_rows, save_tiny_base, save_tiny_kind

from mixdpo_lib.base import head
from mixdpo_lib.base.architecture import logit_map
from mixdpo_lib.base.features import text_features
from mixdpo_lib.base.model import load_base
from mixdpo_lib.data.pairs import Pairs


def direct(base, features, active):
    """token_logit, lse, lse_inactive, mean_active from all logits, float64 after the product."""
    own = base.model.get_output_embeddings()
    weight, bias = own.weight.double(), getattr(own, "bias", None)
    logits = torch.from_numpy(np.array(features.hidden)).double() @ weight.T
    logits = logits if bias is None else logits + bias.double()
    mapped = logit_map(base.model.config.get_text_config())
    logits = logits if mapped is None else mapped(logits)
    inactive = np.delete(np.arange(len(weight)), active)
    mean = head.mean_logit(logits[:, active]) if len(active) else logits.new_zeros(len(logits))
    token = logits.gather(1, torch.from_numpy(features.tokens)[:, None]).squeeze(1)
    return token, logits.logsumexp(1), logits[:, inactive].logsumexp(1), mean


def check(base, features, active):
    found = head.reference_constants(base, features, active)
    for name, wanted in zip(
        ("token_logit", "lse", "lse_inactive", "mean_active"),
        direct(base, features, active),
        strict=True,
    ):
        values = torch.from_numpy(getattr(found, name))
        assert values.dtype == torch.float32, name
        torch.testing.assert_close(values.double(), wanted, rtol=1e-6, atol=1e-5, msg=name)


def frequent(features, least):
    tokens, counts = np.unique(features.tokens, return_counts=True)
    return tokens[counts >= least]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at_once", [(2048, 1024), (7, 5)])
def test_constants_equal_the_whole_vocabulary(tmp_path, monkeypatch, kind, at_once):
    monkeypatch.setenv("MIXDPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(head, "POSITIONS_AT_ONCE", at_once[0])
    monkeypatch.setattr(head, "TOKENS_AT_ONCE", at_once[1])
    base = load_base(str(save_tiny_kind(tmp_path / kind, kind)))
    features = text_features(base, Pairs.of(preference_rows(10)).texts)
    rows = len(base.model.get_output_embeddings().weight)
    for least in (1, 2, 3, 5):
        check(base, features, frequent(features, least))
    check(base, features, np.arange(rows))  # all: no inactive token
    check(base, features, np.arange(0))
    check(base, features, np.arange(1, rows, 2))  # with tokens that no text has


@pytest.mark.parametrize("kind", KINDS)
def test_texts_whose_states_are_known_need_no_further_pass(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("MIXDPO_CACHE", str(tmp_path / "cache"))
    base = load_base(str(save_tiny_kind(tmp_path / kind, kind)))
    texts = Pairs.of(preference_rows(10)).texts
    found = head.base_logps(base, text_features(base, texts))
    assert found.dtype == np.float32 and len(found) == len(texts)
    np.testing.assert_allclose(found, head.reference_logps(base, texts), rtol=1e-5, atol=1e-4)


def test_a_vanishing_inactive_mass_is_exact(tiny_base, tmp_path, monkeypatch):
    monkeypatch.setenv("MIXDPO_CACHE", str(tmp_path))
    features = text_features(tiny_base, Pairs.of(preference_rows(10)).texts)
    strong = type(features)(
        features.tokens,
        features.offsets,
        20 * np.array(features.hidden),
        features.prompt_hidden,
        "x",
    )
    active = frequent(features, 1)
    token, lse, inactive, _ = direct(tiny_base, strong, active)
    assert float((inactive - lse).min()) < -30  # below what a difference of float64 could keep
    found = torch.from_numpy(head.reference_constants(tiny_base, strong, active).lse_inactive)
    torch.testing.assert_close(found.double(), inactive, rtol=2e-6, atol=1e-5)


def test_a_base_in_bfloat16_is_read_in_float32(tmp_path, monkeypatch):
    monkeypatch.setenv("MIXDPO_CACHE", str(tmp_path / "cache"))
    base = load_base(str(save_tiny_base(tmp_path / "tiny")), dtype="bfloat16")
    features = text_features(base, Pairs.of(preference_rows(10)).texts)
    check(base, features, frequent(features, 2))


def test_another_active_set_passes_over_frequent_tokens_alone(tiny_base, tmp_path, monkeypatch):
    monkeypatch.setenv("MIXDPO_CACHE", str(tmp_path))
    features = text_features(tiny_base, Pairs.of(preference_rows(10)).texts)
    read, some_logits = [], head._some_logits  # noqa: SLF001

    def counted(base, hidden, tokens):
        read.append(len(tokens))
        return some_logits(base, hidden, tokens)

    monkeypatch.setattr(head, "_some_logits", counted)
    head.reference_constants(tiny_base, features, frequent(features, 5))
    assert sum(read) == len(tiny_base.model.get_output_embeddings().weight) + len(
        frequent(features, 5)
    )
    read.clear()
    head.reference_constants(tiny_base, features, frequent(features, 5)[1:])
    assert sum(read) == len(frequent(features, 5))
