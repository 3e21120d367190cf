"""What follows from what a visitor says, on a tiny base; what the widgets show, without a browser."""

import math
import sys

import pandas as pd
import pytest
import torch
from datasets import Dataset
from tiny import full_logps

import mixdpo_lib as mx
from mixdpo_lib.explorer import Session, page, speaking

PROMPTS = ["the film is", "a plot"]
ASKED = [
    ("the film is", "very good", "very bad"),
    ("a plot", "not slow", "long and dull"),
    ("the actor", "seems bright", "looks dull"),
]


@pytest.fixture(scope="module")
def experts(tiny_base):
    made = mx.HeadExperts(tiny_base, n_experts=2, rank=2, active="all", sharpness=False)
    made.perturb(1.0, torch.Generator().manual_seed(0))
    return made


@pytest.fixture
def session(experts, tmp_path, monkeypatch):
    monkeypatch.setenv("MIXDPO_CACHE", str(tmp_path))
    policy = mx.MixturePolicy(experts, mx.FixedWeights([0.3, 0.7]), beta=1.0, lapse=0.1)
    return Session(policy, ["praise", "fact"], PROMPTS, ASKED, lengths)


def lengths(texts):
    return pd.DataFrame({"length": [float(len(text.split())) for text in texts]})


def test_every_expert_says_what_it_thinks_of_every_token(session):
    spoken = session.write(max_new_tokens=6, seed=3)
    assert spoken.voices == [-1, 0, 1] and len(set(spoken.texts)) == 3
    base, experts = session.policy.base, session.policy.experts
    for text, logps in zip(spoken.texts, spoken.logps, strict=True):
        own, _ = full_logps(base, experts, spoken.prompt, text, False)
        torch.testing.assert_close(logps.sum(0), own.detach(), atol=1e-4, rtol=0)
    assert abs(spoken.kl[0]) < 1e-6 and min(spoken.kl[1:]) > 0.1
    again = session.write(max_new_tokens=6, seed=3)
    assert again.texts == spoken.texts and session.write(6, seed=4).texts != spoken.texts


def test_the_posterior_starts_at_the_weights_and_ends_at_bayes(session):
    spoken, log_w = session.write(max_new_tokens=6), session.log_w()
    q = spoken.posterior(2, log_w)
    assert q.shape == (len(spoken.pieces[2]) + 1, 2)
    torch.testing.assert_close(q[0], torch.tensor([0.3, 0.7]).double())
    torch.testing.assert_close(q[-1], (log_w + spoken.logps[2].sum(0)).double().softmax(0))


def test_the_distance_from_the_base_is_that_of_the_texts(session):
    """Over an expert's own texts log pi_k / pi_ref has the mean of their divergence, and more variance."""
    n, base, experts = 60, session.policy.base, session.policy.experts
    spoken = speaking.speak(session.policy, "the film is", [0] * n, 4)
    ratios = []
    for text, pieces in zip(spoken.texts, spoken.pieces, strict=True):
        own, ref = full_logps(base, experts, "the film is", text, len(pieces) < 4)
        ratios.append(float((own[0] - ref).detach()))
    ratios, kl = torch.tensor(ratios), torch.tensor(spoken.kl)
    assert abs(float((ratios - kl).mean())) < 3 * float((ratios - kl).std()) / n**0.5
    assert float(kl.mean()) > 0.3 and float(kl.std()) < float(ratios.std())


def test_answers_move_the_weights_by_bayes_rule_and_can_be_forgotten(session):
    policy = session.policy
    rows = [{"prompt": p, "chosen": b, "rejected": a, "ended": False} for p, a, b in ASKED[:2]]
    session.answer(0, 1)
    session.answer(1, 1)
    wanted = policy.user(pairs=Dataset.from_list(rows))
    torch.testing.assert_close(session.user_log_w(), wanted, atol=1e-5, rtol=0)
    assert abs(float(wanted.exp()[0]) - 0.3) > 0.02
    with pytest.raises(ValueError, match="was answered before"):
        session.answer(0, 0)
    session.forget()
    torch.testing.assert_close(session.log_w().exp(), torch.tensor([0.3, 0.7]))


def test_the_next_question_tells_most(session):
    p, w = session._loglik[:, 0].exp().double(), torch.tensor([0.3, 0.7]).double()

    def entropy(x):
        return -(x * x.log() + (1 - x) * (1 - x).log())

    told = entropy(p @ w) - (entropy(p) @ w)
    assert session.question() == int(told.argmax()) and told.min() >= 0
    for _ in ASKED:
        session.answer(session.question(), 0)
    assert session.question() is None


def test_temperature_and_top_s(session):
    session.temperature = 2.0
    flat = torch.tensor([0.3, 0.7]).sqrt()
    torch.testing.assert_close(session.log_w().exp(), flat / flat.sum())
    session.top_s = 1
    assert session.log_w().exp().tolist() == [0, 1]
    assert session.write(3).posterior(1, session.log_w())[:, 1].min() == 1  # whoever wrote it


def test_metadata_is_what_the_gate_says(experts, tmp_path, monkeypatch):
    monkeypatch.setenv("MIXDPO_CACHE", str(tmp_path))
    gate = mx.UserGate.from_metadata({"age": [20, 40], "country": ["x", "y"]}, 2)
    gate.outer.weight.data[0, 1] = 2.0  # expert 0 for country x
    policy = mx.MixturePolicy(experts, gate)
    session = Session(policy, prompts=PROMPTS, comparisons=ASKED)
    assert session.metadata == {"age": 30.0, "country": "x"} and session.names[1] == "expert 1"
    torch.testing.assert_close(session.log_w(), policy.user(metadata={"age": 30, "country": "x"}))
    panel = mx.explore(policy, 4, prompts=PROMPTS, comparisons=ASKED)
    assert panel.metadata["age"].min < 20 and panel.metadata["country"].options == ("x", "y")
    panel.metadata["country"].value = "y"
    assert float(panel.session.log_w().exp()[0]) == pytest.approx(0.5)
    assert ">0.500<" in panel.weights.value and panel.status.value == ""


def test_a_gate_of_prompts_asks_nobody(experts, tmp_path, monkeypatch):
    monkeypatch.setenv("MIXDPO_CACHE", str(tmp_path))
    policy = mx.MixturePolicy(experts, mx.ContextGate(n_features=32, n_experts=2))
    session = Session(policy, prompts=PROMPTS, comparisons=[])
    assert session.question() is None and session.log_w().shape == (2,)
    with pytest.raises(ValueError, match="no property of a visitor"):
        session.answer(0, 0)


def test_on_the_circle_a_dial_sets_the_weights(tiny_base, tmp_path, monkeypatch):
    monkeypatch.setenv("MIXDPO_CACHE", str(tmp_path))
    experts = mx.GroupHeads(tiny_base, n_experts=8, rank=2, active="all")
    experts.perturb(1.0, torch.Generator().manual_seed(0))
    session = Session(
        mx.MixturePolicy(experts, mx.DirectionGate(8)), prompts=PROMPTS, comparisons=ASKED
    )
    assert session.on_circle and "taste at" in page.dial(session)
    session.angle = math.pi / 2
    assert (
        int(session.log_w().argmax()) == 2 and 2 in session.voices() and len(session.voices()) == 4
    )
    assert "taste at 90 degrees" in page.dial(session)
    session.answer(0, 0)  # from here on the answers say it
    assert session.angle is None


def test_comparisons_are_drawn_from_the_base_where_none_are_given(session):
    drawn = Session(session.policy, prompts=PROMPTS).comparisons
    assert 1 <= len(drawn) <= 2 and all(c.first != c.second and c.prompt in PROMPTS for c in drawn)


@pytest.mark.parametrize("prompt", ["", "the film " * 40])
def test_a_prompt_without_room_is_refused(session, prompt):
    session.prompt = prompt
    with pytest.raises(ValueError, match="expected between 1 and"):
        session.write(8)


def test_what_cannot_be_explored_is_refused(experts):
    table = mx.MixturePolicy(mx.TabularExperts(4, 2), mx.LearnedWeights(2))
    with pytest.raises(ValueError, match="without words"):
        Session(table)
    with pytest.raises(ValueError, match="expected 2, one an expert"):
        Session(mx.MixturePolicy(experts, mx.LearnedWeights(2)), names=["one"])


def test_without_widgets_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    monkeypatch.delitem(sys.modules, "mixdpo_lib.explorer.panel", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'mixdpo\[lab\]'"):
        mx.explore  # noqa: B018


# ------------------------------------------------------------------------------------------------ what is shown
def test_widgets_follow_the_session(session):
    panel = mx.explore(
        session.policy,
        4,
        names=["praise", "<fact>"],
        prompts=PROMPTS,
        comparisons=ASKED,
        score=lengths,
    )
    assert panel.status.value == "" and ">0.700<" in panel.weights.value
    assert "&lt;fact&gt;" in panel.weights.value and "<fact>" not in panel.texts.value
    assert panel.texts.value.count("<svg") == 3 and "length" in panel.texts.value
    before, asked = panel.texts.value, panel.asked.value
    panel.choices[1].click()
    assert panel.session.answers and "1 comparison answered" in panel.weights.value
    assert panel.asked.value != asked and panel.texts.value != before
    texts = panel.spoken.texts
    panel.forget.click()
    panel.temperature.value = 5.0
    assert ">0.542<" in panel.weights.value  # 7/3 to the power 1/5
    panel.top_s.value = 1
    assert ">1.000<" in panel.weights.value and panel.spoken.texts == texts
    panel.again.click()
    assert panel.spoken.texts != texts
    table = panel.summary()
    assert table["voice"].tolist() == ["base", "praise", "<fact>"]
    assert table["weight"].tolist()[1:] == [0, 1] and table["text"].tolist() == panel.spoken.texts
    assert list(table.columns) == ["voice", "weight", "text", "kl", "length"]
    assert panel.widget.children and "<svg" in panel.still().data


def test_an_error_is_said_on_the_page_and_what_is_shown_stays_true(session):
    panel = mx.explore(session.policy, 4, prompts=PROMPTS, comparisons=ASKED)
    before = panel.texts.value
    panel.prompt.value = "   "
    assert "expected between 1 and" in panel.status.value and panel.texts.value == before
    panel.prompt.value = "a plot"
    assert panel.status.value == "" and "a plot" in panel.texts.value


def test_a_character_of_several_tokens_comes_with_its_last_one():
    class Bytes:
        """A tokenizer whose tokens are the bytes of UTF-8."""

        def decode(self, ids, **_):
            return bytes(ids).decode("utf-8", errors="replace")

    text = "it\u2019s \U0001f3ac"
    for said in (text, text + "!"):
        tokens = list(said.encode())
        pieces = speaking.token_pieces(Bytes(), list(b"So "), tokens)
        assert len(pieces) == len(tokens) and "".join(pieces) == said
        assert not any("\ufffd" in one for one in pieces)
