"""Start, template, border and end of a text: what a model is trained on is what it means, and what TRL makes of it."""

import json

import pytest
import torch
from datasets import Dataset
from tiny import VOCABULARY, WORDS, save_tiny_base, save_tiny_llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, GenerationConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as Fast
from trl import DPOConfig, DPOTrainer

import mixdpo_lib as mx
from mixdpo_lib.base import tokens
from mixdpo_lib.base.features import tokenise
from mixdpo_lib.base.tokens import answer_text
from mixdpo_lib.data.pairs import Text
from mixdpo_lib.store import MixDPOError

SENTENCES = [" ".join(WORDS), "films filmmaker feeling", "The film was good.\nIt is slow!"] * 9
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}<|sep|>\n\n"
    "{{ m['content'] | trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant<|sep|>\n\n{% endif %}"
)
GEMMA = (  # no system message
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "<|im_start|>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)
THINKS = CHATML.replace("assistant\n{% endif %}", "assistant\n<|sep|>\n{% endif %}")
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|sep|>"]


def byte_level():
    """As GPT-2, Llama 3, Qwen, SmolLM2: bytes."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(SENTENCES, trainer)
    return made


def with_spaces():
    """As Llama 2, Mistral, Gemma: a word with the space before it, and one is put before a text."""
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Metaspace(prepend_scheme="first")]
    )
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        + [decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=200, special_tokens=SPECIAL, initial_alphabet=["\n"], show_progress=False
    )
    made.train_from_iterator(SENTENCES, trainer)
    return made


def save_base(folder, made=None, template=None, start=False, ends=None):
    """A tiny Llama with this tokenizer; `start`: it puts <s> before every text."""
    made = byte_level() if made is None else made
    if start:
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))]
        )
    fast = Fast(
        tokenizer_object=made,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>",
    )
    if template is not None:
        fast.chat_template = template
    fast.save_pretrained(folder)
    generation = None if ends is None else GenerationConfig(eos_token_id=ends)
    return save_tiny_llama(folder, len(fast), 0, 256, generation, eos_token_id=2, bos_token_id=1)


def words(base, ids):
    return base.tokenizer.convert_ids_to_tokens(ids)


# ---------------------------------------------------------------------------------------------------- against TRL


def trl_ids(folder, rows, **options):
    """What TRL trains on: prompt, chosen and rejected ids of every row."""
    arguments = DPOConfig(
        output_dir=str(folder / "trl"), report_to=[], use_cpu=True, bf16=False, max_length=None
    )
    trainer = DPOTrainer(
        LlamaForCausalLM.from_pretrained(folder),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    return [
        [list(map(int, row[f"{side}_ids"])) for side in ("prompt", "chosen", "rejected")]
        for row in trainer.train_dataset
    ]


def own_ids(base, rows):
    found = []
    for row in rows:
        prompt, chosen, rejected = row["prompt"], row["chosen"], row["rejected"]
        if isinstance(prompt, list):
            prompt = tuple((m["role"], m["content"]) for m in prompt)
            chosen, rejected = chosen[0]["content"], rejected[0]["content"]
        sides = [tokenise(base, Text(prompt, answer, True)) for answer in (chosen, rejected)]
        assert sides[0][0] == sides[1][0]
        found.append([sides[0][0], sides[0][1], sides[1][1]])
    return found


PLAIN_ROWS = [
    {"prompt": "The film", "chosen": " was good.", "rejected": " was bad."},
    {"prompt": "The film was", "chosen": " very slow\nand long", "rejected": " dull</s>"},
    {"prompt": "It is a story.\n", "chosen": "The actor", "rejected": "A scene!"},
]
SAY = [
    [("user", "Is the film good?")],
    [("system", "Be short."), ("user", "Is it?")],
    [("user", "The film?"), ("assistant", "It was bad."), ("user", "Why?")],
]


@pytest.mark.parametrize("made", [byte_level, with_spaces])
@pytest.mark.parametrize("start", [False, True])
def test_plain_rows_are_those_of_trl(tmp_path, made, start):
    base = mx.load_base(save_base(tmp_path, made(), start=start))
    assert own_ids(base, PLAIN_ROWS) == trl_ids(tmp_path, PLAIN_ROWS)


@pytest.mark.parametrize("template", [CHATML, LLAMA3, GEMMA])
@pytest.mark.parametrize("made", [byte_level, with_spaces])
def test_conversations_are_those_of_trl(tmp_path, made, template):
    base = mx.load_base(save_base(tmp_path, made(), template, start=True), chat=True)
    rows = [
        {
            "prompt": [{"role": role, "content": content} for role, content in say],
            "chosen": [{"role": "assistant", "content": "The plot."}],
            "rejected": [{"role": "assistant", "content": "It feels slow."}],
        }
        for say in SAY
        if template != GEMMA or say[0][0] != "system"
    ]
    assert own_ids(base, rows) == trl_ids(tmp_path, rows)


def test_where_tokens_merge_across_the_border_the_prompt_keeps_its_own(tmp_path):
    """TRL cuts the prompt there; a model is asked with the whole prompt, and is trained with it here."""
    base = mx.load_base(save_base(tmp_path))
    row = {"prompt": "The film", "chosen": "s are good", "rejected": "maker is"}
    prompt, chosen, rejected = own_ids(base, [row])[0]
    assert prompt == base.prompt_ids("The film")
    decode = base.tokenizer.decode
    assert decode(prompt + chosen[:-1]) == "The films are good"
    assert decode(prompt + rejected[:-1]) == "The filmmaker is"


# ------------------------------------------------------------------------------------------------- starts and borders


@pytest.mark.parametrize("made", [byte_level, with_spaces])
def test_a_prompt_starts_once_as_the_tokenizer_starts_it(tmp_path, made):
    base = mx.load_base(save_base(tmp_path, made(), start=True))
    ids = base.prompt_ids("The film")
    assert ids == base.tokenizer("The film")["input_ids"] and ids[0] == base.tokenizer.bos_token_id
    assert base.prompt_ids("<s>The film").count(base.tokenizer.bos_token_id) == 1


def test_an_end_that_a_tokenizer_puts_after_a_text_is_no_part_of_a_prompt(tmp_path):
    made = byte_level()
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    base = mx.load_base(save_base(tmp_path, made))
    prompt, answer = tokenise(base, Text("The film", " was", True))
    assert prompt[0] == 1 and 2 not in prompt and answer.count(2) == 1


@pytest.mark.parametrize("made", [byte_level, with_spaces])
@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("The film", " was good"),
        ("The film", "s were"),
        ("The film was very", "slow"),
        ("It is\n", "good\n\nvery"),
        ("The film ", "was"),
        ("A story", "  of it"),
        ("Déjà", " vu — naïve"),
    ],
)
def test_prompt_and_answer_decode_to_what_they_are(tmp_path, made, prompt, answer):
    base = mx.load_base(save_base(tmp_path, made(), start=True))
    before, own = tokenise(base, Text(prompt, answer, False))
    decode = base.tokenizer.decode
    if "<unk>" not in decode(before + own):
        assert decode(before + own) == decode(before) + answer
        assert answer_text(base.tokenizer, before, own) == answer
    assert before == base.prompt_ids(prompt)


# ---------------------------------------------------------------------------------------------------------------- ends


def test_the_end_of_an_answer_stands_once_and_is_no_text(tmp_path):
    base = mx.load_base(save_base(tmp_path, ends=[2, 4]))
    assert base.end_ids == (2, 4)
    plain = tokenise(base, Text("The film", " was good", True))
    for published in (
        " was good</s>",
        " was good<|im_end|>",
        " was good</s>\n",
        " was good</s></s>",
        " was good</s><|im_end|>",
    ):
        assert tokenise(base, Text("The film", published, True)) == plain
        assert tokenise(base, Text("The film", published, False)) == plain  # it did end
    for inside in (" was</s> good", "</s> was good", " was<|im_end|> good</s>"):
        with pytest.raises(ValueError, match=r"found the end token '(</s>|<\|im_end\|>)' in it"):
            tokenise(base, Text("The film", inside, True))
    assert tokenise(base, Text("The film", "</s>", False))[1] == [2]


@pytest.mark.parametrize("template", [CHATML, LLAMA3, GEMMA])
def test_an_answer_ends_as_its_template_ends_it(tmp_path, template):
    base = mx.load_base(save_base(tmp_path, template=template), chat=True)
    prompt = (("user", "Is it good?"),)
    written = base.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Is it good?"}, {"role": "assistant", "content": "It is."}],
        tokenize=False,
    )
    before, own = tokenise(base, Text(prompt, "It is.", True))
    assert base.tokenizer.decode(before + own) == written
    assert "<|im_end|>" in words(base, own) and "</s>" not in words(base, own)
    cut = tokenise(base, Text(prompt, "It is.", False))[1]
    assert own[: len(cut)] == cut and "<|im_end|>" not in words(base, cut)
    assert base.end_ids == (2, 4)  # though no generation configuration names the end of turn
    assert tokenise(base, Text("Is it good?", "It is.", True)) == (before, own)


def test_a_template_that_starts_answers_with_more_than_it_keeps(tmp_path):
    base = mx.load_base(save_base(tmp_path, template=THINKS), chat=True)
    before, own = tokenise(base, Text("Is it?", "It is.", True))
    assert before == base.prompt_ids("Is it?") and words(base, before).count("<|sep|>") == 1
    assert base.tokenizer.decode(own) == "It is.<|im_end|>\n"


def test_a_template_that_writes_no_answers(tmp_path):
    base = mx.load_base(save_base(tmp_path, template="The {{ messages[0]['content'] }}"), chat=True)
    before, own = tokenise(base, Text("film", " was good", True))
    assert base.tokenizer.decode(before + own) == "The film was good</s>"


def test_every_end_ends_a_text(tmp_path):
    base = mx.load_base(save_base(tmp_path, template=CHATML), chat=True)
    policy = mx.MixturePolicy(mx.HeadExperts(base, 1, rank=2, active="all"), mx.LearnedWeights(1))
    ids = base.prompt_ids("film")
    with torch.no_grad():  # a model that ends its turn at once
        state = base.model.base_model(torch.tensor([ids])).last_hidden_state[0, -1]
        base.model.get_output_embeddings().weight[4] = 50 * state / state.norm()
    said = policy.generate(["film"], greedy=True, max_new_tokens=5)
    assert said.text == [""] and said.ended == [True] and said.n_tokens == [1]
    given = torch.tensor([ids])
    made = policy.as_causal_lm().generate(given, max_new_tokens=5, do_sample=False)
    assert made[0, len(ids) :].tolist() == [4]


# ------------------------------------------------------------------------------------------- refused, and told apart


def test_a_conversation_needs_a_template(tmp_path):
    say = (("user", "Is it?"),)
    plain = mx.load_base(save_base(tmp_path / "a"))
    with pytest.raises(ValueError, match="its tokenizer has no chat template: take a model with"):
        plain.prompt_ids(say)
    unused = mx.load_base(save_base(tmp_path / "b", template=CHATML))
    with pytest.raises(ValueError, match=r"load the model by load_base\(\.\.\., chat=True\)"):
        unused.prompt_ids([{"role": "user", "content": "Is it?"}])
    gemma = mx.load_base(save_base(tmp_path / "c", template=GEMMA), chat=True)
    with pytest.raises(ValueError, match="cannot write messages of system, user .System role not"):
        gemma.prompt_ids((("system", "Be short."), *say))


def test_a_tokenizer_larger_than_its_model_is_refused_at_load(tmp_path, capsys):
    folder = save_base(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.save_pretrained(folder)  # as the text models of Gemma 3
    base = mx.load_base(folder)
    assert "<image> of the tokenizer are unknown to the model" in capsys.readouterr().err
    with pytest.raises(ValueError, match="token '<image>' has number .* remove the token"):
        tokenise(base, Text("The <image>", " film", True))
    tokenizer.add_tokens(["<|user|>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(MixDPOError, match="the tokenizer has 2 tokens more than the model"):
        mx.load_base(folder)


def rewritten(folder, name, change):

    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("name", "change", "same"),
    [
        ("config.json", lambda c: c.update(transformers_version="4.0.0"), True),
        ("config.json", lambda c: c.update(use_cache=False), True),
        ("config.json", lambda c: c.update(rms_norm_eps=0.1), False),
        ("tokenizer_config.json", lambda c: c.update(name_or_path="elsewhere"), True),
        ("tokenizer_config.json", lambda c: c.update(eos_token="<|sep|>"), False),
        ("generation_config.json", lambda c: c.update(eos_token_id=[2, 4]), False),
        ("generation_config.json", lambda c: c.update(temperature=0.5, do_sample=True), True),
    ],
)
def test_a_fingerprint_follows_what_changes_numbers_and_nothing_else(tmp_path, name, change, same):
    folder = save_base(tmp_path, start=True)
    before = mx.load_base(folder).fingerprint
    rewritten(folder, name, change)
    assert (mx.load_base(folder).fingerprint == before) is same


def test_features_follow_the_tokens_that_were_made(tmp_path, monkeypatch):
    """Another template, start or end token in the same folder: no number of before is served."""
    monkeypatch.setenv("MIXDPO_CACHE", str(tmp_path / "cache"))
    seen = []
    for template in (
        "the {{ messages[0]['content'] }}",
        "you and i {{ messages[0]['content'] }} not",
    ):
        folder = save_tiny_base(tmp_path / "base")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
        base = mx.load_base(folder, chat=True)
        policy = mx.MixturePolicy(
            mx.HeadExperts(base, 1, rank=2, active="all"), mx.LearnedWeights(1)
        )
        ids, own = base.prompt_ids("film"), [VOCABULARY["was"], VOCABULARY["good"], 1]
        with torch.no_grad():
            log_p = base.model(torch.tensor([ids + own])).logits.log_softmax(-1)
        plain = log_p[0, len(ids) - 1 : -1].gather(1, torch.tensor(own)[:, None]).sum()
        assert policy.logps("film", "was good") == pytest.approx(float(plain), abs=1e-4)
        seen.append(float(plain))
    assert seen[0] != seen[1]


def test_rows_that_a_model_cannot_read_are_counted_and_may_be_dropped(tmp_path, capsys):
    base = mx.load_base(save_base(tmp_path / "base"))
    good = {"prompt": "The film", "chosen": " was good", "rejected": " was bad"}
    long = {**good, "chosen": " very" * 300}
    inside = {**good, "rejected": " was</s> bad"}
    rows = Dataset.from_list([good, long, {**good, "prompt": "A story"}, inside])
    rows.to_json(tmp_path / "train.jsonl")
    said = (
        r"2 of 4 rows cannot be used: row 1, column 'chosen': .* exceed the context .* \| row 3, "
    )
    with pytest.raises(ValueError, match=said + "column 'rejected': answer .* found the end token"):
        mx.load_preferences(tmp_path / "train.jsonl", base=base)
    policy = mx.MixturePolicy(mx.HeadExperts(base, 1, rank=2, active="all"), mx.LearnedWeights(1))
    with pytest.raises(ValueError, match="preference set: " + said):
        policy.predict(rows)
    read = mx.load_preferences(tmp_path / "train.jsonl", base=base, on_bad_rows="drop")["train"]
    assert read["prompt"][:] == ["The film", "A story"]
    assert "dropped 2 of 4 rows" in capsys.readouterr().err
    assert len(policy.predict(read)) == 2


def test_conversations_are_fitted_served_and_continued(tmp_path, monkeypatch):
    monkeypatch.setenv("MIXDPO_CACHE", str(tmp_path / "cache"))
    base = mx.load_base(save_base(tmp_path / "base", template=CHATML), chat=True)
    rows = [
        {
            "prompt": [{"role": "user", "content": f"Is it {word}?"}],
            "chosen": "It is good." if i % 2 else "It is bad.",
            "rejected": "It is bad." if i % 2 else "It is good.",
            "user": f"user{i % 2}",
        }
        for i, word in enumerate(["slow", "slow", "long", "long", "dull", "dull"])
    ]
    data = Dataset.from_list(rows)
    for gate in (
        mx.LearnedWeights(2),
        mx.ContextGate.from_prompts(base, data["prompt"][:], n_experts=2),
    ):
        policy = mx.MixturePolicy(mx.HeadExperts(base, 2, rank=2), gate)
        latent = "unit" if not gate.reads else "pair"
        config = mx.FitConfig(latent=latent, passes=2.0, min_steps=4, batch_size=2)
        result = mx.fit(policy, data, config, folder=tmp_path / latent)
        assert result.history["elbo"].notna().all() and len(policy.predict(data)) == len(data)
        asked = [row["prompt"] for row in rows[:2]]
        said = policy.generate(asked, max_new_tokens=4, seed=0)
        assert len(said.text) == 2 and list(policy.say(asked, max_new_tokens=2).columns)
        assert policy.logps(asked[0], "It is good.") < 0


def test_a_template_that_writes_the_date_means_the_same_tomorrow(tmp_path):
    folder = save_tiny_base(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }} {{ messages[0]['content'] }}"
    tokenizer.save_pretrained(folder)
    base = mx.load_base(folder, chat=True)
    written = tokens._rendered(base.tokenizer, (("user", "film"),), None, "here")  # noqa: SLF001
    assert written == "26 Jul 2024 film"
