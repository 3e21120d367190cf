"""The notebook of docs/adding.md, written into a project and run by the page's command."""

import re
import shlex
import shutil
from pathlib import Path

import nbformat
import pytest
import yaml

from mixdpo_lib import cli
from mixdpo_lib.runner import parameters, results

ROOT = Path(__file__).parents[2]


@pytest.fixture
def blocks():
    text = (ROOT / "docs" / "adding.md").read_text(encoding="utf-8")
    section = text.split("\n## A notebook\n")[1].split("\n## ")[0]
    assert len(section.splitlines()) <= 80, "a page at most"
    found = re.findall(r"^```(\w*)\n(.*?)^```$", section, flags=re.DOTALL | re.MULTILINE)
    return {kind: [block for one, block in found if one == kind] for kind in ("python", "yaml", "")}


def test_a_notebook_as_the_page_says(blocks, project):
    head, *code = map(nbformat.v4.new_code_cell, blocks["python"])
    head.metadata["tags"] = ["parameters"]
    book = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_markdown_cell("# How many answers?"), head, *code]
    )
    nbformat.write(book, project / "notebooks" / "13_how_many_answers.ipynb")
    profiles, (line, values), (command,) = (
        project / "notebooks" / "profiles",
        blocks["yaml"],
        blocks[""],
    )
    shutil.copy(ROOT / "notebooks" / "profiles" / "common.yaml", profiles)
    (project / "workflow" / "notebooks.yaml").write_text(line)
    (profiles / "smoke.yaml").write_text("common: {n_users: 12, pairs_per_user: 9}\n" + values)

    default = parameters.resolve_parameters("13_how_many_answers")
    assert default == {
        "parts": [0.5, 1.0],
        "profile": "default",
        "common": {"n_users": 60, "pairs_per_user": 200},
    }
    with pytest.raises(SystemExit) as ended:
        cli.main(shlex.split(command)[1:])
    assert ended.value.code == 0
    (folder,) = (project / "runs" / "custom").glob("13_*")
    manifest = results.verify_manifest(folder)
    assert manifest["parameters"] == {
        "parts": [1.0],
        "profile": "smoke",
        "common": {"n_users": 20, "pairs_per_user": 6},
    }
    table = results.load_table(str(folder.parent), folder.name, "answers")
    assert table["answers"].tolist() == [120.0]
    assert yaml.safe_load(line)["further"].keys() == {"13_how_many_answers"}
