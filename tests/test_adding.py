"""docs/adding.md: the code of its sections is executed as it stands there, and a section is a page at most."""

import re
from pathlib import Path

import datasets
import pytest
from tiny import preference_rows

from mixdpo_lib.experts.contract import FAMILIES, Experts
from mixdpo_lib.gates.contract import GATES, Gate

PAGE = (Path(__file__).parent.parent / "docs" / "adding.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S))


def execute(section, tiny_base):
    """Run the Python blocks of a section one after the other; `base` and `rows` are what the page says."""
    rows = preference_rows(n=24)
    rows = datasets.Dataset.from_list([{**row, "hour": i % 24} for i, row in enumerate(rows)])
    names = {"base": tiny_base, "rows": rows, "__name__": "own"}
    for block in re.findall(r"^```python\n(.*?)^```", SECTIONS[section], re.M | re.S):
        exec(compile(block, f"docs/adding.md, {section}", "exec"), names)
    return names


@pytest.mark.parametrize(
    ("section", "known", "part"), [("A gate", GATES, Gate), ("A family", FAMILIES, Experts)]
)
def test_a_section_does_what_it_says(section, known, part, tiny_base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = dict(known)
    try:
        names = execute(section, tiny_base)
    finally:
        new = {name: known[name] for name in known if known[name] is not before.get(name)}
        known.clear()
        known.update(before)
    (own,) = new.values()
    again = names["again"]
    assert issubclass(own, part) and own.__module__ == "own"
    assert own in (type(again.gate), type(again.experts))
    assert (tmp_path / "my-mixture" / "config.json").is_file()


@pytest.mark.parametrize("section", SECTIONS)
def test_a_section_is_a_page_at_most(section):
    text = re.sub(r"^```.*?^```", "", SECTIONS[section], flags=re.M | re.S)
    assert len(text.splitlines()) <= 40 and len(SECTIONS[section].splitlines()) <= 110
