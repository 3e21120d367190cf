"""Any causal model with an ordinary head: log-probabilities and greedy texts are those of plain transformers."""

import pytest
import torch
from tiny import VOCABULARY, save_tiny_base
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

import mixdpo_lib as mx
from mixdpo_lib.base import architecture
from mixdpo_lib.store import MixDPOError

PLAIN = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
GROUPED = PLAIN | {"num_key_value_heads": 2}
GPT = {"n_embd": 32, "n_head": 4, "n_layer": 3, "n_positions": 48}
KINDS = {
    "bloom": {"hidden_size": 32, "n_layer": 3, "n_head": 4},  # positions by ALiBi
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 3},
    "falcon": PLAIN | {"alibi": True},
    "gptj": GPT | {"rotary_dim": 4},  # blocks give tuples
    "codegen": GPT | {"rotary_dim": 4},
    "gpt_neo": {
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "max_position_embeddings": 48,
    },
    "gpt_neox": PLAIN,
    "gpt_bigcode": GPT,
    "opt": PLAIN | {"ffn_dim": 48, "word_embed_proj_dim": 16},  # a head narrower than the blocks
    "mamba": {"hidden_size": 32, "num_hidden_layers": 3, "state_size": 4},  # a state, no cache
    "rwkv": {"hidden_size": 32, "num_hidden_layers": 3, "attention_hidden_size": 32},
    "mixtral": GROUPED | {"num_local_experts": 4},
    "cohere": GROUPED,  # a factor after the head
    "granite": GROUPED | {"logits_scaling": 3.0},
    "gemma3_text": GROUPED | {"head_dim": 8, "query_pre_attn_scalar": 8},
    "recurrent_gemma": PLAIN | {"lru_width": 32, "num_key_value_heads": 1, "head_dim": 8},
    "olmo2": PLAIN,
    "phi3": PLAIN,
}
TEXTS = [("film", "good"), ("the film was very", "dull and slow but bright")]


def save(folder, kind, sizes):
    save_tiny_base(folder)
    torch.manual_seed(0)
    special = {"vocab_size": len(VOCABULARY), "eos_token_id": 1, "bos_token_id": None}
    config = CONFIG_MAPPING[kind](**sizes, **special, pad_token_id=0)
    model = AutoModelForCausalLM.from_config(config)
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.2)
    model.save_pretrained(folder)
    return folder


def plain_logps(model, base, prompt, answer):
    before = base.prompt_ids(prompt)  # compared with the tokenizer's and TRL's in test_tokens.py
    own = [*base.tokenizer(answer)["input_ids"], base.eos_token_id]
    with torch.no_grad():
        log_p = model(torch.tensor([before + own])).logits.float().log_softmax(-1)
    return float(log_p[0, len(before) - 1 : -1].gather(1, torch.tensor(own)[:, None]).sum())


def plain_greedy(model, base, prompt, n):
    ids = base.tokenizer(prompt)["input_ids"]
    for _ in range(n):
        with torch.no_grad():
            token = int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token in base.end_ids:
            break
        ids = [*ids, token]
    return base.tokenizer.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_log_probabilities_and_texts_are_those_of_transformers(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("MIXDPO_CACHE", str(tmp_path / "cache"))
    base = mx.load_base(save(tmp_path / "base", kind, KINDS[kind]))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    families = [mx.HeadExperts(base, 1, rank=2, active="all")]
    if kind != "mamba":
        families += [
            mx.AdapterExperts(base, 1, rank=2, blocks=1, keep_lower=k) for k in (True, False)
        ]
    prompts = ["the film", "a very slow story is"]
    texts = [plain_greedy(model, base, prompt, 5) for prompt in prompts]
    for experts in families:
        policy = mx.MixturePolicy(experts, mx.LearnedWeights(1))
        for prompt, answer in TEXTS:
            wanted = plain_logps(model, base, prompt, answer)
            assert policy.logps(prompt, answer) == pytest.approx(wanted, abs=1e-4)
        said = policy.generate(prompts, greedy=True, max_new_tokens=5).text
        assert [prompt + text for prompt, text in zip(prompts, said, strict=True)] == texts


@pytest.mark.parametrize("kind", KINDS)
def test_log_probabilities_with_a_template_are_those_of_transformers(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("MIXDPO_CACHE", str(tmp_path / "cache"))
    folder = save(tmp_path / "base", kind, KINDS[kind])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        "{% for m in messages %}you {{ m['content'] }} {% if m['role'] == 'assistant' %}</s>"
        "{% else %}and {% endif %}{% endfor %}{% if add_generation_prompt %}i {% endif %}"
    )
    tokenizer.save_pretrained(folder)
    base = mx.load_base(folder, chat=True)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    policy = mx.MixturePolicy(mx.HeadExperts(base, 1, rank=2, active="all"), mx.LearnedWeights(1))
    for prompt, answer in TEXTS:
        words = base.tokenizer.convert_ids_to_tokens(base.prompt_ids(prompt))
        assert words == ["you", *prompt.split(), "and", "i"]
        wanted = plain_logps(model, base, prompt, answer)
        assert policy.logps(prompt, answer) == pytest.approx(wanted, abs=1e-4)


def test_a_state_without_adapters_says_so(tmp_path):
    base = mx.load_base(save(tmp_path, "mamba", KINDS["mamba"]))
    with pytest.raises(MixDPOError, match="MambaForCausalLM: no adapters on .*target_modules"):
        mx.AdapterExperts(base, 1, rank=2, blocks=1)


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        ("bert", "its logits are not its head on the last hidden state"),
        ("xlnet", "positions see what comes after them"),
    ],
)
def test_what_is_no_causal_model_is_refused_at_load(tmp_path, kind, found):
    sizes = {"xlnet": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}}.get(kind, PLAIN)
    with pytest.raises(MixDPOError, match=f"cannot be read here: {found}.*; expected a causal"):
        mx.load_base(save(tmp_path, kind, sizes))


def test_weights_that_are_not_numbers_are_refused_at_load(tmp_path):
    folder = save(tmp_path, "llama", GROUPED)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    model.save_pretrained(folder)
    with pytest.raises(MixDPOError, match="its logits are not finite: damaged weights"):
        mx.load_base(folder)


def test_logits_that_are_not_the_heads_are_refused(tiny_folder):
    other = mx.load_base(tiny_folder)
    other.model.config.final_logit_softcapping = 0.5  # which a Llama does not read
    with pytest.raises(MixDPOError, match="its logits are not its head on the last hidden state"):
        architecture.check_model(other.model, tiny_folder)


def test_reading_anew_is_reading_on(tiny_base):
    """A model whose cache cannot be used gives the same states, also where beams change places."""
    model, padded = tiny_base.model, torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    found = []
    for again in (False, True):
        cache = architecture.Reread() if again else None
        _, cache = architecture.read_on(model, padded, mask, cache)
        cache.reorder_cache(torch.tensor([0, 0]))
        longer = torch.cat([mask[[0, 0]], torch.ones(2, 1, dtype=torch.long)], 1)
        state, _ = architecture.read_on(model, torch.tensor([[11], [12]]), longer, cache)
        found.append(state)
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)
