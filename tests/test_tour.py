"""What a newcomer sees first: the picture that moves, ten results in words, the map."""

import json
import re

import numpy as np
import pandas as pd
import pytest

from mixdpo_lib import figures, store
from mixdpo_lib.runner import notebooks, results
from mixdpo_lib.study import headline

ROOT = store.project_root()
TOUR = ROOT / "notebooks" / "00_start_here.ipynb"


def test_the_map_has_every_notebook_with_a_link_that_leads_somewhere():
    text = "\n".join(
        "".join(cell["source"])
        for cell in json.loads(TOUR.read_text())["cells"]
        if cell["cell_type"] == "markdown"
    )
    links = re.findall(r"\| \[(\w+)\]\(([^)]+)\) \|", text)
    assert all((TOUR.parent / target).is_file() for _, target in links)
    assert all(target.endswith(f"{name}.ipynb") for name, target in links)
    others = {*notebooks.notebook_names(), *notebooks.theory_names()} - {"00_start_here"}
    assert {name for name, _ in links} == others and len(links) == len(others)


def test_ten_results_in_words_are_those_of_the_reference():
    values = results.load_values("reference")
    table = headline.headline(values)
    assert len(table) == 10 and not set(table["value"]) & {"not measured yet"}
    row = table.set_index("what").loc["Mix-DPO, users served from their own pairs: more than DPO"]
    assert row["value"] == f"{values['accuracy_gain_mean']['value']:+.3f}"
    low, high = values["accuracy_gain_mean"]["interval"]
    assert row["interval"] == f"[{low:.3f}, {high:.3f}]" and row["notebook"] == "04_mix_dpo"
    least = values["mix_minus_hard_clusters_mean"]["value"]
    assert table["value"][0] == f"{least:+.3f}" and "clusters" in table["what"][0]
    assert set(headline.headline({})["value"]) == {"not measured yet"}


def test_users_part_in_a_small_picture_that_moves():
    q = np.array([[[0.4, 0.3, 0.3], [0.3, 0.4, 0.3]], [[0.9, 0.1, 0.0], [0.0, 1.0, 0.0]]])
    rows = [
        {
            "step": step,
            "user": user,
            "group": "ab"[user],
            "bound": -0.7 + step / 10,
            **{f"expert_{k}": q[step, user, k] for k in range(3)},
        }
        for step in range(2)
        for user in range(2)
    ]
    moving = figures.users_part(pd.DataFrame(rows), last=1)
    assert moving.data[:6] == b"GIF89a" and b"NETSCAPE2.0" in moving.data  # it repeats
    assert np.frombuffer(moving.data[6:10], "<u2").tolist() == [630, 270]
    assert moving.data.count(b"\x21\xf9\x04") == 2  # equal pictures are one: nothing else moves
    assert len(moving.data) < 100_000 and moving._repr_html_().count("alt=") == 1
    with pytest.raises(ValueError, match="bound"):
        figures.users_part(pd.DataFrame(rows).drop(columns="bound"))
