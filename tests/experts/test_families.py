"""Adapters and whole models as experts: plain DPO on the same tokens, other architectures, life outside the mixture."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from tiny import KINDS, plain_fit, preference_rows, save_tiny_base, save_tiny_kind
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

from mixdpo_lib.base import model as model_file
from mixdpo_lib.base.model import load_base
from mixdpo_lib.data.pairs import Pairs
from mixdpo_lib.experts.adapters import AdapterExperts
from mixdpo_lib.experts.heads import HeadExperts
from mixdpo_lib.experts.whole import IndependentExperts
from mixdpo_lib.gates.weights import FixedWeights, LearnedWeights
from mixdpo_lib.learning.fit import fit
from mixdpo_lib.policy.mixture import MixturePolicy
from mixdpo_lib.policy.next_token import MixtureNextToken, NextToken
from mixdpo_lib.store import MixDPOError

FAMILIES = ("head", "adapter", "adapter, nothing kept", "sharp adapter", "independent")
WEIGHTS = [0.5, 0.2, 0.3]


def make(family, base, k, data=None, sharpness=True):
    if family == "head":
        experts = HeadExperts(base, k, rank=4, sharpness=sharpness)
        if data is not None:
            experts.start(data)
        return experts
    if family == "independent":
        return IndependentExperts([base] * k)
    keep, sharp = "nothing kept" not in family, family == "sharp adapter" and sharpness
    return AdapterExperts(base, k, rank=4, blocks=1, keep_lower=keep, sharpness=sharp)


def moved(experts, scale=0.3):
    experts.perturb(scale, torch.Generator().manual_seed(1))
    if isinstance(experts, AdapterExperts) and experts.sharpness is not None:
        with torch.no_grad():
            experts.sharpness.copy_(torch.tensor([0.3, -0.2, 0.5])[: experts.n_experts])
    return experts


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIXDPO_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield {
            kind: model_file.load_base(save_tiny_kind(tmp_path_factory.mktemp(kind), kind))
            for kind in KINDS
        }


@pytest.fixture(scope="module")
def data(tiny_base):
    return Pairs.of(preference_rows())


def whole_logps(model, base, row, side, power=1.0):
    """log pi(response) by a model's own logits, times `power`, over the whole sequence, one text at a time."""
    prompt, response = (base.tokenizer(row[name])["input_ids"] for name in ("prompt", side))
    ids = [*prompt, *response, *([base.eos_token_id] if row["ended"] else [])]
    logits = power * model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()
    target = torch.tensor(ids[len(prompt) :])
    return logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, target[:, None]).sum()


@pytest.mark.parametrize("family", FAMILIES)
def test_one_expert_is_plain_dpo(tiny_base, data, family):
    """20 steps of AdamW; the other side is the loss of Rafailov et al. written out on the model's own logits."""
    experts = make(family, tiny_base, 1, data, sharpness=False)
    policy = MixturePolicy(experts, FixedWeights.uniform(1), beta=0.5)
    constants = policy.constants(data.texts)
    model = copy.deepcopy(tiny_base.model)
    if family == "independent":
        plain = list(model.requires_grad_(True).parameters())
    elif family == "head":
        plain = [p.detach().clone().requires_grad_(True) for p in (experts.down[0], experts.up[0])]
        mask = torch.zeros(tiny_base.vocab_size).index_fill(0, experts.active_ids, 1.0)
        head = model.get_output_embeddings()
        forward = head.forward
        head.forward = lambda h: forward(h) + mask * (h @ plain[0].T @ plain[1].T @ head.weight.T)
    else:
        from peft import LoraConfig, get_peft_model

        names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model = get_peft_model(
            model, LoraConfig(r=4, lora_alpha=4, target_modules=names, layers_to_transform=[1])
        )
        start, plain = experts.tensors(0), []
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_" in name:
                    p.copy_(start[name.replace(".default.", ".")])
                    plain.append(p)
    reference = copy.deepcopy(tiny_base.model)
    rate = 1e-3 if family == "independent" else 5e-3
    steps = [torch.optim.AdamW(p, lr=rate, eps=1e-3) for p in (list(experts.parameters()), plain)]
    losses = []
    for step in range(20):
        rows = torch.arange(step % 3 * 8, step % 3 * 8 + 8)
        own = -policy.batch_loglik(experts.batch(constants, data.index[rows])).mean()
        other = 0.0
        for row in (data.rows[int(i)] for i in rows):
            with torch.no_grad():
                ref = [
                    whole_logps(reference, tiny_base, row, side) for side in ("chosen", "rejected")
                ]
            pi = [whole_logps(model, tiny_base, row, side) for side in ("chosen", "rejected")]
            other = other - F.logsigmoid(0.5 * ((pi[0] - ref[0]) - (pi[1] - ref[1]))) / len(rows)
        for optimizer, loss in zip(steps, (own, other), strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append([own.item(), other.item()])
    own, other = torch.tensor(losses, dtype=torch.float64).T
    assert float(own[0]) == pytest.approx(0.6931, abs=1e-3) and float(own[-1]) < 0.6
    assert float(((own - other) / other).abs().max()) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_other_architectures(kinds, kind, family):
    base = kinds[kind]
    data = Pairs.of(preference_rows(8))
    experts = moved(make(family, base, 3, data))
    policy = MixturePolicy(experts, FixedWeights(WEIGHTS), beta=0.5)
    batch = experts.batch(policy.constants(data.texts), data.index)
    logps, refs = experts.logps(batch), experts.ref_logps(batch)
    powers = [1.0] * 3
    if (
        family == "sharp adapter" and kind == "gemma"
    ):  # its head's output is capped: no plain head is sharper
        with pytest.raises(ValueError, match="scales or caps its head's output"):
            policy.export_model(0)
        powers = [experts.power(k) for k in range(3)]
        experts.sharpness.data.zero_()
    models = [policy.export_model(k) for k in range(3)]
    if powers != [1.0] * 3:
        experts.sharpness.data.copy_(torch.tensor(powers) - 1)
    for n, row in enumerate(data.rows):
        for side, name in enumerate(("chosen", "rejected")):
            own = torch.stack(
                [whole_logps(m, base, row, name, p) for m, p in zip(models, powers, strict=True)]
            )
            torch.testing.assert_close(logps[n, side], own, atol=3e-4, rtol=2e-5)
            torch.testing.assert_close(
                refs[n, side, 0], whole_logps(base.model, base, row, name), atol=3e-4, rtol=2e-5
            )
    assert float((logps - refs).abs().max()) > 0.05
    chosen = torch.tensor([[True, False, True], [False, True, False]] * 4)
    sparse = experts.logps(batch, chosen)
    torch.testing.assert_close(
        sparse[chosen[:, None].expand_as(sparse)],
        logps[chosen[:, None].expand_as(logps)],
        atol=1e-4,
        rtol=1e-4,
    )
    assert bool((sparse.isinf() == ~chosen[:, None].expand_as(sparse)).all())
    texts = policy.generate(
        ["the film", "a very long story"], max_new_tokens=5, form="token", seed=3
    )
    assert texts.n_tokens and policy.generate(
        ["the film"], max_new_tokens=5, expert=[2], seed=1
    ).expert == [2]


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_every_expert_arrive(tiny_base, data, family):
    experts = moved(make(family, tiny_base, 3, data))
    policy = MixturePolicy(experts, FixedWeights(WEIGHTS))
    batch = experts.batch(policy.constants(data.texts), data.index[:6])
    loglik = policy.batch_loglik(batch)
    every = [name for name, _ in experts.named_parameters()]
    names = {
        k: [name for name in every if name.split(".")[-1].startswith(f"{k}/")] for k in range(3)
    }
    loglik[:, 1].sum().backward()
    for k, own in names.items():
        for name, p in experts.named_parameters():
            if name in own:
                assert (p.grad is not None and bool(p.grad.any())) == (k == 1), (name, k)
    assert family == "head" or all(names.values())
    if family == "sharp adapter":
        assert (experts.sharpness.grad != 0).tolist() == [False, True, False]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fit_learns(tiny_base, data, family):
    policy = MixturePolicy(make(family, tiny_base, 2, data), LearnedWeights(2), beta=0.5)
    result = fit(
        policy,
        data,
        plain_fit(passes=6.0, batch_size=8, learning_rate=5e-3, evaluations_per_pass=1),
    )
    assert result.history["elbo"].iloc[-1] > result.history["elbo"].iloc[0] + 0.05


def test_independent_experts_may_differ(tiny_base, kinds, tmp_path):
    data = Pairs.of(preference_rows(8))
    experts = IndependentExperts([tiny_base, kinds["gpt2"]])
    policy = MixturePolicy(experts, FixedWeights.uniform(2), beta=0.5)
    batch = experts.batch(policy.constants(data.texts), data.index)
    refs = experts.ref_logps(batch)
    assert refs.shape == (8, 2, 2) and float((refs[..., 0] - refs[..., 1]).abs().min()) > 1e-3
    torch.testing.assert_close(experts.logps(batch), refs, atol=1e-4, rtol=1e-4)
    own = whole_logps(kinds["gpt2"].model, kinds["gpt2"], data.rows[0], "chosen")
    torch.testing.assert_close(refs[0, 0, 1], own, atol=1e-4, rtol=1e-4)
    assert torch.allclose(policy.predict(data), torch.full((8,), 0.5), atol=1e-4)
    moved(experts)
    policy.save_pretrained(tmp_path / "two")
    back = MixturePolicy.from_pretrained(tmp_path / "two")
    assert torch.equal(back.loglik(data), policy.loglik(data))


# --------------------------------------------------------------------------------------------------------------- life


@pytest.mark.parametrize("family", ["head", "adapter", "independent"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma", "phi"])
def test_an_expert_leaves_the_mixture(kinds, kind, family, tmp_path):
    base = kinds[kind]
    data = Pairs.of(preference_rows(8))
    policy = MixturePolicy(moved(make(family, base, 3, data)), FixedWeights(WEIGHTS), beta=0.5)
    ids = torch.tensor([[2, 5, 9, 4, 7]])
    step = NextToken(policy.base, policy.experts, torch.tensor([2]))
    wanted = step(ids, torch.ones_like(ids))[0]
    policy.merge(2, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    told = json.loads((tmp_path / "merged" / "mixdpo.json").read_text())
    assert told["expert"] == 2 and told["base_fingerprint"] == base.fingerprint
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").eos_token_id == 1
    torch.testing.assert_close(merged(ids).logits[0, -1], wanted, atol=1e-4, rtol=1e-4)
    if family == "independent":
        with pytest.raises(ValueError, match=r"whole models, no adapters: use merge\(k, folder\)"):
            policy.export_adapter(2, tmp_path / "adapter")
        return
    policy.export_adapter(2, tmp_path / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(base.folder)
    before = plain(ids).logits[0, -1]
    loaded = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    torch.testing.assert_close(loaded(ids).logits[0, -1], wanted, atol=1e-4, rtol=1e-4)
    assert float((before - wanted).abs().max()) > 0.01
    tied = AutoModelForCausalLM.from_pretrained(base.folder).config.tie_word_embeddings
    if family == "head" and tied:  # merged, the adapter would change the embeddings as well
        with pytest.raises(RuntimeError, match="Impossible to merge LoRA"):
            loaded.merge_and_unload()
        return
    alone = loaded.merge_and_unload()
    torch.testing.assert_close(alone(ids).logits[0, -1], wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "phi"])
def test_a_sharp_adapter_is_a_power(kinds, kind, tmp_path):
    """Merged it is a plain model; where B = 0 it is the reference to the power 1 + s; no LoRA holds it."""
    base = kinds[kind]
    experts = make("sharp adapter", base, 3)
    assert experts.parameter_groups(0.1)[1] == {"params": [experts.sharpness], "lr": 0.1}
    with torch.no_grad():
        experts.sharpness.copy_(torch.tensor([0.0, -0.4, 0.7]))
    policy = MixturePolicy(experts, FixedWeights(WEIGHTS))
    ids = torch.tensor([[2, 5, 9, 4, 7]])
    plain = base.model(ids).logits[0, -1]
    for k, s in enumerate([0.0, -0.4, 0.7]):
        merged = policy.export_model(k)(ids).logits[0, -1]
        torch.testing.assert_close(merged, (1 + s) * plain, atol=1e-4, rtol=1e-4)
        said = NextToken(base, experts, torch.tensor([k]))(ids, torch.ones_like(ids))[0]
        torch.testing.assert_close(said, (1 + s) * plain, atol=1e-4, rtol=1e-4)
    policy.export_adapter(0, tmp_path / "adapter")
    with pytest.raises(ValueError, match="expert 2 has the sharpness 0.7, which is of full rank"):
        policy.export_adapter(2, tmp_path / "refused")
    with pytest.raises(ValueError, match="sharpness_rate=0: expected above 0"):
        AdapterExperts(base, 1, sharpness=True, sharpness_rate=0)


@pytest.mark.parametrize("family", ["head", "adapter", "sharp adapter"])
def test_a_mixture_is_saved_and_read_back(tiny_base, data, family, tmp_path):
    policy = MixturePolicy(moved(make(family, tiny_base, 3, data)), FixedWeights(WEIGHTS), beta=0.5)
    policy.save_pretrained(tmp_path / "m", {"data": "24 random pairs", "seed": 0})
    card = (tmp_path / "m" / "README.md").read_text()
    assert "- data: 24 random pairs" in card and f"base_model: {tiny_base.name}" in card
    back = MixturePolicy.from_pretrained(tmp_path / "m")
    assert torch.equal(back.loglik(data), policy.loglik(data))
    options = {"max_new_tokens": 6, "seed": 5}
    assert back.generate(["the film", "a plot"], **options) == policy.generate(
        ["the film", "a plot"], **options
    )
    policy.save_pretrained(tmp_path / "m")  # over the old one
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


def test_a_base_is_not_lost_to_what_is_made_of_it(tiny_base, tmp_path, capsys):
    """Its files have the names that a merge writes."""
    base = load_base(str(save_tiny_base(tmp_path / "base")))
    policy = MixturePolicy(HeadExperts(base, 2, rank=2, active="all"), LearnedWeights(2))
    before = {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()}
    (tmp_path / "link").symlink_to(tmp_path / "base")
    for place in ("base", "link"):
        with pytest.raises(MixDPOError, match="found the base of these experts"):
            policy.merge(0, tmp_path / place)
    with pytest.raises(MixDPOError, match="which would be lost"):
        policy.save_pretrained(tmp_path / "base")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    with pytest.raises(MixDPOError, match="other: found config.json there, which would be lost"):
        policy.merge(0, tmp_path / "other")
    assert {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()} == before
    policy.merge(0, tmp_path / "merged")
    assert "replaced" not in capsys.readouterr().err
    policy.merge(1, tmp_path / "merged")
    assert "merged: what was saved there before is replaced" in capsys.readouterr().err
    both = IndependentExperts([base, load_base(str(tmp_path / "merged"))])
    with pytest.raises(MixDPOError, match="found the base of these experts"):
        both.merge(0, tmp_path / "merged")


def test_folders_that_are_no_mixture(tiny_base, data, tmp_path):
    policy = MixturePolicy(moved(make("adapter", tiny_base, 2, data)), FixedWeights.uniform(2))
    policy.save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "mixture.safetensors").write_bytes(b"cut")
    with pytest.raises(MixDPOError, match="mixture.safetensors: not readable"):
        MixturePolicy.from_pretrained(tmp_path / "m", tiny_base)
    policy.save_pretrained(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config["experts"]["rank"] = 2
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(MixDPOError, match=r"another content than was written \(config_sha256\)"):
        MixturePolicy.from_pretrained(tmp_path / "m", tiny_base)
    del config["config_sha256"]  # as the error offers where a change is meant
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(MixDPOError, match="not the tensors of config.json"):
        MixturePolicy.from_pretrained(tmp_path / "m", tiny_base)
    (tmp_path / "file").write_text("taken")
    with pytest.raises(MixDPOError, match="found a file, expected a folder or nothing"):
        policy.save_pretrained(tmp_path / "file")


def test_what_a_base_has_not_is_refused(tiny_base, data, tmp_path, monkeypatch):
    with pytest.raises(
        ValueError, match=r"\['c_attn'\] not in the blocks of .*; possible are \['q_proj'"
    ):
        AdapterExperts(tiny_base, 2, target_modules=["c_attn"])
    with pytest.raises(ValueError, match="blocks=3: .* has 2 blocks, 0 ... 1"):
        AdapterExperts(tiny_base, 2, blocks=3)
    with pytest.raises(MixDPOError, match="no chat template; leave chat out"):
        model_file.load_base(tiny_base.folder, chat=True)
    monkeypatch.setattr(
        model_file.psutil, "virtual_memory", lambda: type("M", (), {"available": 1000})()
    )
    with pytest.raises(
        MixDPOError, match="4 models of .* need about .* GiB on cpu, 0.0 GiB are free"
    ):
        IndependentExperts([tiny_base] * 4)
    policy = MixturePolicy(AdapterExperts(tiny_base, 2, rank=4, blocks=1), LearnedWeights(2))
    with pytest.raises(
        MixDPOError, match="gradients, moments and snapshots of 0.0 M trained parameters need about"
    ):
        fit(policy, data)


def test_a_chat_template_is_used_where_asked_for(tmp_path):
    folder = save_tiny_base(tmp_path / "chat")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        "{% for m in messages %}you {{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}i{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    plain, chat = model_file.load_base(folder), model_file.load_base(folder, chat=True)
    words = chat.tokenizer.convert_ids_to_tokens(chat.prompt_ids("the film"))
    assert words == ["you", "the", "film", "i"] and len(plain.prompt_ids("the film")) == 2
    assert plain.fingerprint != chat.fingerprint


def test_half_precision_blocks(tiny_folder, data):
    half = model_file.load_base(tiny_folder, dtype="bfloat16")
    assert half.model.dtype == torch.bfloat16
    own = Pairs.of(data.rows)
    policy = MixturePolicy(
        moved(AdapterExperts(half, 2, rank=4, blocks=1)), FixedWeights.uniform(2)
    )
    exact = MixturePolicy(
        moved(AdapterExperts(model_file.load_base(tiny_folder), 2, rank=4, blocks=1)),
        FixedWeights.uniform(2),
    )
    assert policy.loglik(own).dtype == torch.float32
    torch.testing.assert_close(policy.loglik(own), exact.loglik(data), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("family", ["head", "adapter", "independent"])
def test_transformers_generate(tiny_base, data, family):
    """Sampling, greedy, beams and streaming; greedy and beams by brute force over the mixture's own probabilities."""
    policy = MixturePolicy(moved(make(family, tiny_base, 3, data), 0.8), FixedWeights(WEIGHTS))
    model = policy.as_causal_lm()
    ids = torch.tensor([[2, 5], [4, 7]])
    own = policy.generate(
        [tiny_base.tokenizer.decode(row) for row in ids],
        form="token",
        greedy=True,
        max_new_tokens=5,
    )
    greedy = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert [
        tiny_base.tokenizer.decode([t for t in row[2:] if t != 1]) for row in greedy.tolist()
    ] == [text.strip() for text in own.text]  # a text keeps the space after its prompt

    def score(row, start):
        step = MixtureNextToken(policy.experts, torch.tensor([WEIGHTS]).log())
        total, log_p = 0.0, step(row[None, :start], torch.ones(1, start, dtype=torch.long))
        for n, token in enumerate(row[start:]):
            total += float(log_p[0, token])
            step.observe(token[None])
            log_p = step(token[None, None], torch.ones(1, start + n + 1, dtype=torch.long))
        return total

    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "output_scores": True}
    beams = model.generate(
        ids, num_beams=4, return_dict_in_generate=True, length_penalty=0.0, **options
    )
    for row, found in zip(beams.sequences, beams.sequences_scores, strict=True):
        assert float(found) == pytest.approx(score(row, 2), abs=2e-3)
    plain = model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert (
        sum(map(lambda r: score(r, 2), beams.sequences))
        >= sum(map(lambda r: score(r, 2), plain)) - 1e-4
    )
    torch.manual_seed(0)
    first = model.generate(ids, max_new_tokens=5, do_sample=True, top_k=10, temperature=0.7)
    torch.manual_seed(0)
    assert torch.equal(
        first, model.generate(ids, max_new_tokens=5, do_sample=True, top_k=10, temperature=0.7)
    )
    model.generate(
        ids[:1], max_new_tokens=3, do_sample=False, streamer=TextStreamer(tiny_base.tokenizer)
    )
