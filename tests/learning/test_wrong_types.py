"""What people who run no type checker are told: in a process of its own, where nothing checks types before we do."""

import subprocess
import sys

CALLS = """
import mixdpo_lib as mx
from mixdpo_lib.policy.generating import _prompt_ids
for call in (
    lambda: mx.FitConfig(start="clusters"),
    lambda: mx.FitConfig(inference="exact"),
    lambda: mx.FitConfig(routing=2),
    lambda: _prompt_ids(None, "the film", 4),
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
