"""Tables of texts keep the contract of every family: fitted, asked, sampled from, saved; exact at every step."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from datasets import concatenate_datasets
from tiny import plain_fit, preference_rows

from mixdpo_lib.base.head import reference_logps
from mixdpo_lib.data.pairs import Pairs, Text, Texts
from mixdpo_lib.experts.tables import TabularExperts
from mixdpo_lib.gates.weights import FixedWeights, LearnedWeights
from mixdpo_lib.learning.fit import fit
from mixdpo_lib.policy.mixture import MixturePolicy

WEIGHTS = [0.7, 0.3]
CANDIDATES = [
    "good film",
    "good",
    "bad film slow",
    "dull scene is good",
]  # one is the beginning of another


@pytest.fixture(scope="module")
def rows():
    """Two prompts with the same answers, which end for one of them; the two groups of users want opposite ones."""
    row = preference_rows(1).to_list()[0]
    out = []
    for p, prompt in enumerate(("the film", "a story was")):
        for i, first in enumerate(CANDIDATES):
            for second in CANDIDATES[i + 1 :]:
                for u in range(4):
                    chosen, rejected = (first, second) if u % 2 else (second, first)
                    out.append(
                        row
                        | {
                            "prompt": prompt,
                            "chosen": chosen,
                            "rejected": rejected,
                            "user": f"user{u}",
                            "group": "ab"[u % 2],
                            "prompt_id": p,
                            "ended": p == 0,
                            "row": len(out),
                        }
                    )
    return type(preference_rows(1)).from_list(out)


@pytest.fixture(scope="module")
def experts(tiny_base, rows):
    table = TabularExperts.of(tiny_base, rows, 2, beta=0.5)
    table.perturb(0.4, torch.Generator().manual_seed(3))
    with torch.no_grad():
        table.rewards -= (
            0.5 * table.log_ref
        )  # the base hardly ever says the long answers: bring all of them near
    return table


def test_each_prompt_shares_a_probability_of_one_among_its_answers(tiny_base, rows, experts):
    assert experts.n_answers == 8
    prompts = torch.tensor([answer.prompt == "the film" for answer in experts.answers])
    for own in (prompts, ~prompts):
        torch.testing.assert_close(
            experts.log_policy()[:, own].exp().sum(1), torch.ones(2).double()
        )
        torch.testing.assert_close(experts.log_ref[own].exp().sum(), torch.ones(()).double())
    data = Pairs.of(rows)
    policy = MixturePolicy(experts, FixedWeights(WEIGHTS), beta=0.5)
    place = {answer: i for i, answer in enumerate(experts.answers)}
    numbers = torch.tensor(
        [
            [place[Text(r["prompt"], r[side], r["ended"])] for side in ("chosen", "rejected")]
            for r in data.rows
        ]
    )
    torch.testing.assert_close(policy.loglik(data), experts.loglik(numbers).float())
    batch = experts.batch(policy.constants(data.texts), data.index)
    torch.testing.assert_close(experts.logps(batch), experts.logps(numbers))
    torch.testing.assert_close(experts.ref_logps(batch), experts.ref_logps(numbers))
    chosen = torch.tensor([[True, False]] * len(data))
    assert bool((experts.logps(batch, chosen)[..., 1] == -torch.inf).all())


def test_the_reference_is_the_bases_among_the_answers(tiny_base, rows, experts):
    texts = Texts.of(experts.answers)
    other = MixturePolicy(TabularExperts.of(tiny_base, rows, 1), FixedWeights.uniform(1), beta=1.0)
    heads = other.experts.log_ref
    plain = torch.from_numpy(reference_logps(tiny_base, texts)).double()
    for prompt in ("the film", "a story was"):
        own = [i for i, answer in enumerate(experts.answers) if answer.prompt == prompt]
        torch.testing.assert_close(heads[own], plain[own].log_softmax(0), atol=1e-6, rtol=1e-6)


def test_one_table_is_plain_dpo(tiny_base, rows):
    data = Pairs.of(rows)
    experts = TabularExperts.of(tiny_base, data, 1, beta=0.5)
    policy = MixturePolicy(experts, FixedWeights.uniform(1), beta=0.5)
    batch = experts.batch(policy.constants(data.texts), data.index)
    logits = experts.log_ref.clone().requires_grad_(
        True
    )  # a policy over the answers, beta (log pi - log pi_ref)
    prompts = experts.prompt
    steps = [
        torch.optim.SGD(experts.parameters(), lr=0.5),
        torch.optim.SGD([logits], lr=0.5 / 0.25),
    ]
    for step in range(20):
        own = -policy.batch_loglik(batch).mean()
        log_pi = torch.cat([logits[prompts == p].log_softmax(0) for p in (0, 1)])
        assert torch.equal(prompts, prompts.sort().values)
        ratio = (log_pi - experts.log_ref)[batch["answer"]][batch["place"]]
        other = -F.logsigmoid(0.5 * (ratio[:, 0] - ratio[:, 1])).mean()
        for optimizer, loss in zip(steps, (own, other), strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert own.item() == pytest.approx(other.item(), rel=1e-9), step


def test_a_fit_finds_who_wants_what(tiny_base, rows):
    policy = MixturePolicy(
        TabularExperts.of(tiny_base, rows, 2, beta=0.5), LearnedWeights(2), beta=0.5
    )
    config = plain_fit(passes=60.0, batch_size=48, learning_rate=0.1, start__tempering_passes=10.0)
    result = fit(policy, rows, config)
    assert result.history["elbo"].iloc[-1] > -0.2 > result.history["elbo"].iloc[0]
    q = policy.responsibilities(rows)
    assert q.idxmax(axis=1).tolist() in ([0, 1, 0, 1], [1, 0, 1, 0])
    who = policy.user(rows.filter(lambda row: row["user"] == "user1"))
    assert (
        float(policy.predict(rows.filter(lambda row: row["user"] == "user3"), user=who).min()) > 0.5
    )


@pytest.mark.parametrize("form", ["sequence", "token"])
def test_texts_are_drawn_from_the_table(tiny_base, experts, form):
    policy = MixturePolicy(experts, FixedWeights(WEIGHTS), beta=0.5)
    n = 2000
    out = policy.generate(["a story was"] * n, max_new_tokens=8, seed=0, form=form)
    own = [i for i, answer in enumerate(experts.answers) if answer.prompt == "a story was"]
    mixed = torch.tensor(WEIGHTS).double() @ experts.log_policy().detach()[:, own].exp()
    texts = [text.strip() for text in out.text]  # a text keeps the space after its prompt
    counts = Counter(texts)
    assert set(counts) == set(CANDIDATES) and all(out.ended)
    for i, p in zip(own, mixed.tolist(), strict=True):
        assert counts[experts.answers[i].response] / n == pytest.approx(
            p, abs=4 * (p * (1 - p) / n) ** 0.5
        )
    place = {experts.answers[i].response: i for i in own}
    for text, k, ratio, ref in list(
        zip(texts, out.expert, out.log_ratio, out.ref_logp, strict=True)
    )[:50]:
        i = place[text]
        assert ref == pytest.approx(float(experts.log_ref[i]), abs=1e-4)
        exact = (
            experts.log_policy()[k, i].detach() if form == "sequence" else mixed[own.index(i)].log()
        )
        assert ratio == pytest.approx(float(exact - experts.log_ref[i]), abs=1e-4)


def test_beams_find_the_most_probable_answer(tiny_base, experts):
    policy = MixturePolicy(experts, FixedWeights(WEIGHTS), beta=0.5)
    ids = torch.tensor([tiny_base.tokenizer("the film")["input_ids"]])
    found = policy.as_causal_lm().generate(
        ids, num_beams=4, do_sample=False, max_new_tokens=8, length_penalty=0.0
    )
    mixed = torch.tensor(WEIGHTS).double() @ experts.log_policy().detach().exp()
    own = [i for i, answer in enumerate(experts.answers) if answer.prompt == "the film"]
    best = experts.answers[max(own, key=lambda i: float(mixed[i]))].response
    text = tiny_base.tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)
    assert text.split() == best.split()


def test_a_table_is_saved_and_read_back(tiny_base, rows, experts, tmp_path):
    policy = MixturePolicy(experts, FixedWeights(WEIGHTS), beta=0.5)
    policy.save_pretrained(tmp_path / "table")
    again = MixturePolicy.from_pretrained(tmp_path / "table", tiny_base)
    assert again.experts.answers == experts.answers
    assert torch.equal(again.loglik(rows), policy.loglik(rows))
    assert (
        again.generate(["the film"] * 9, seed=1).text
        == policy.generate(["the film"] * 9, seed=1).text
    )


def test_what_a_table_cannot_do_is_said(tiny_base, rows, experts, tmp_path):
    policy = MixturePolicy(experts, FixedWeights(WEIGHTS), beta=0.5)
    other = rows.select([0]).map(lambda _: {"rejected": "very slow"})
    with pytest.raises(
        ValueError, match="answer 'very slow' to 'the film' is not among the 8 of the table"
    ):
        policy.loglik(concatenate_datasets([rows.select([5]), other]))
    with pytest.raises(ValueError, match="row 1: its prompt is not in the table"):
        policy.generate(["the film", "it was"])
    with pytest.raises(ValueError, match="TabularExperts have no adapter to export"):
        policy.export_adapter(0, tmp_path / "adapter")
    with pytest.raises(
        ValueError, match="TabularExperts change no model: there is nothing to merge"
    ):
        policy.merge(0, tmp_path / "merged")
    with pytest.raises(ValueError, match=r"made of numbers|has numbers, no words"):
        TabularExperts(3, 2).voices(None)
    with pytest.raises(ValueError, match="n_answers=3: expected as many answers"):
        TabularExperts(3, 2, answers=[Text("a", "b", True)] * 2, base=tiny_base)
