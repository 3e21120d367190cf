"""What people who run no type checker are told: in a process of its own, where nothing checks types before we do."""

import subprocess
import sys

CALLS = """
import mixdpo_lib as mx
from mixdpo_lib.policy.generating import _prompt_ids
from mixdpo_lib.experts.tables import numbered_answers, numbered_pairs
import torch
experts = mx.TabularExperts(4, 2, answers=numbered_answers(4), beta=1.0)
policy = mx.MixturePolicy(experts, mx.LearnedWeights(2), beta=1.0)
pairs = numbered_pairs(torch.tensor([[0, 1]]), 4)
for call in (
    lambda: mx.FitConfig(start="clusters"),
    lambda: mx.FitConfig(inference="exact"),
    lambda: mx.FitConfig(routing=2),
    lambda: _prompt_ids(policy, "the film", 4),
    lambda: policy.predict(pairs, user="ann"),
    lambda: policy.predict(pairs, user={"age": 30}),
    lambda: policy.predict(pairs, user=torch.zeros(3)),
    lambda: policy.say(["the film"], user="ann"),
    lambda: policy.generate(["the film"], user="ann"),
    lambda: policy.generate(["the film"]),
):
    try:
        call()
    except ValueError as error:
        print(error)
"""


def test_a_part_of_another_kind_is_refused():
    done = subprocess.run([sys.executable, "-c", CALLS], capture_output=True, text=True, check=True)
    found = done.stdout.splitlines()
    assert found[0] == "start='clusters': expected Start(...), see mixdpo_lib.Start"
    assert found[1] == "inference='exact': expected Inference(...), see mixdpo_lib.Inference"
    assert found[2] == "routing=2: expected Routing(...), see mixdpo_lib.Routing"
    assert found[3] == "prompts: found one text, expected a list of prompts; write ['the film']"
    said = "expected log weights of 2 experts; make them by policy.user(pairs of this user) or policy.user(metadata={...})"
    given = ("'ann'", "{'age': 30}", "a tensor of shape (3,)", "'ann'", "'ann'")
    assert found[4:9] == [f"user: found {user}, {said}" for user in given]
    assert found[9] == (
        "TabularExperts of items by name write no texts: no language model was asked; experts.reward_table() says what "
        "they prefer"
    )
