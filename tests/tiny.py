"""A tiny random Llama with a word-level tokenizer, and small preference sets for it."""

from functools import cache

import datasets
import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

WORDS = (
    "the a this that film plot story actor scene music was is seems feels looks good bad dull bright slow long short "
    "very quite not and but with of in it i you they he she"
).split()
VOCABULARY = {word: i for i, word in enumerate(["<unk>", "</s>", *WORDS])}
UNUSED = {"he", "she", "they"}  # never in a response below: tokens that the experts leave alone


def save_tiny_base(folder, seed=0, context=48, vocabulary=VOCABULARY, splits=None):
    """Write model and tokenizer so that `sources.load_base` reads them as it reads any folder."""
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = splits or pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")
    fast.save_pretrained(folder)
    return save_tiny_llama(
        folder, len(vocabulary), seed, context, eos_token_id=1, bos_token_id=None
    )


def save_tiny_llama(folder, vocab_size, seed=0, context=48, generation=None, **options):
    """Write a tiny random Llama of so many tokens, its head tied to the embeddings."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        initializer_range=0.25,
        **options,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    model.generation_config = generation or model.generation_config
    model.save_pretrained(folder)
    return folder


KINDS = {  # architecture, tied head, pad token
    "gpt2": ("gpt2", True, False),
    "llama": ("llama", False, True),
    "qwen": ("qwen2", True, True),
    "gemma": ("gemma2", True, False),
    "phi": ("phi", False, False),
}


def save_tiny_kind(folder, kind, seed=0, context=48):
    """A tiny random model of another architecture: GPT-2, Llama, Qwen, Gemma (soft-capping), Phi (bias on the head)."""
    model_type, tied, pad = KINDS[kind]
    save_tiny_base(folder)  # the tokenizer
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    if kind == "qwen":  # its class splits into bytes whatever the file says
        pieces = Tokenizer(models.BPE(unk_token="<unk>"))
        pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=400, special_tokens=["<unk>", "</s>"], initial_alphabet=alphabet
        )
        pieces.train_from_iterator([" ".join(WORDS)] * 3, trainer)
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=pieces, unk_token="<unk>", eos_token="</s>"
        )
    if pad:
        tokenizer.pad_token = "<unk>"
    tokenizer.save_pretrained(folder)
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": context,
        "tie_word_embeddings": tied,
        "initializer_range": 0.25,
        "eos_token_id": 1,
        "bos_token_id": None,
        "pad_token_id": 0 if pad else None,
        "intermediate_size": 48,
        "num_key_value_heads": 2,
    }
    if model_type == "gpt2":
        for name in ("intermediate_size", "num_key_value_heads"):
            sizes.pop(name)
    if model_type == "gemma2":
        sizes |= {
            "head_dim": 8,
            "final_logit_softcapping": 5.0,
            "query_pre_attn_scalar": 8,
            "sliding_window": 4,
        }
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**sizes)).save_pretrained(folder)
    return folder


def sentence(rng, low, high):
    return " ".join(rng.choice([w for w in WORDS if w not in UNUSED], rng.integers(low, high + 1)))


def preference_rows(n=24, users=4, seed=0):
    """Random pairs; the answers of user u are drawn with a bias to words that mark the user's group (u % 2)."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        group = (i % users) % 2
        good, bad = ("bright", "dull") if group == 0 else ("dull", "bright")
        prompt = sentence(rng, 2, 4)
        chosen, rejected = (
            f"{sentence(rng, 1, 4)} {word} {sentence(rng, 1, 3)}" for word in (good, bad)
        )
        rows.append(
            {
                "prompt": prompt,
                "chosen": chosen,
                "rejected": rejected,
                "user": f"user{i % users}",
                "group": "ab"[group],
                "prompt_id": i,
                "ended": i % 3 > 0,
                "row": i,
            }
        )
    return datasets.Dataset.from_list(rows)


@cache
@torch.no_grad()
def _states(model, ids):
    out = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
    return out.hidden_states[-1][0], out.logits[0]


def full_logps(base, experts, prompt, response, ended):
    """log pi_k(response) of every expert and of the base, by plain torch over the whole vocabulary; differentiable."""
    tokens = base.tokenizer(prompt)["input_ids"], base.tokenizer(response)["input_ids"]
    ids = [*tokens[0], *tokens[1], *([base.eos_token_id] if ended else [])]
    hidden, logits = _states(base.model, tuple(ids))
    mask = torch.zeros(len(VOCABULARY))
    mask[experts.active_ids] = 1
    head = base.model.get_output_embeddings().weight
    first, target = len(tokens[0]), torch.tensor(ids[len(tokens[0]) :])

    def score(z):
        return z.log_softmax(-1)[first - 1 : -1].gather(1, target[:, None]).sum()

    shifts = head_shifts(experts, hidden, logits, head)
    return torch.stack([score(logits + mask * shift) for shift in shifts]), score(logits)


def head_shifts(experts, hidden, logits, head):
    """W B_k A_k h + s_k (log pi_ref - m) of every expert, m the mean over the active tokens; differentiable."""
    log_ref = logits.log_softmax(-1)
    active = log_ref[:, experts.active_ids]
    mean = (active.exp() * active).sum(-1, keepdim=True) / active.exp().sum(-1, keepdim=True)
    sharpness = torch.zeros(experts.n_experts) if experts.sharpness is None else experts.sharpness
    return [
        hidden @ down.T @ up.T @ head.T + s * (log_ref - mean)
        for down, up, s in zip(experts.down, experts.up, sharpness, strict=True)
    ]


def plain_fit(**choices):
    """A short plain fit, on which the tests' numbers stand: random batches of pairs, AdamW, little tempering."""
    from mixdpo_lib.learning.config import (
        FitConfig,
    )  # here: what is imported with conftest is not checked for shapes
    from mixdpo_lib.learning.starts import Start

    config = FitConfig(
        batch_by="pair",
        batch_size=32,
        passes=3.0,
        min_steps=0,
        learning_rate=1e-3,
        evaluations_per_pass=2,
        start=Start(passes=0.25, temperature=8.0, tempering_passes=1.0),
    )
    return config.change(**choices)
