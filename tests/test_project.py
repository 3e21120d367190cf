"""The project as a whole: licence, pinned sources, profiles, bare notebooks, nothing pickled."""

import ast
import csv
import json
import os
import re
import tomllib

import pytest
import yaml

from mixdpo_lib import store
from mixdpo_lib.base import packaged
from mixdpo_lib.runner import parameters as parameters_file
from mixdpo_lib.runner import results
from mixdpo_lib.study import readme as readme_file

ROOT = store.project_root()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NOTEBOOKS = sorted((ROOT / "notebooks").rglob("*.ipynb"))
PROFILES = sorted((ROOT / "notebooks" / "profiles").glob("*.yaml"))


def test_the_command_for_continuous_integration_can_be_executed():
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert "make --no-print-directory test" in (ROOT / ".ci" / "run").read_text()


def test_licence_and_version():
    assert "Apache License" in (ROOT / "LICENSE").read_text() and "END OF TERMS" in (ROOT / "LICENSE").read_text()
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"] and PROJECT["version"] in (ROOT / "CHANGELOG.md").read_text()
    assert citation["license"] == "Apache-2.0"


def test_sources_are_pinned():
    for name, entry in packaged.packaged().items():
        assert re.fullmatch(r"[0-9a-f]{64}", entry["sha256"]), name
        assert "==" in entry["package"] and entry["licence"] and entry["about"], name


def test_nothing_is_pickled():
    for path in [*(ROOT / "mixdpo_lib").rglob("*.py"), *NOTEBOOKS]:
        text = path.read_text()
        assert not re.search(r"torch\.(load|save)\(|import (pickle|joblib)|joblib\.|pickle\.", text), path


# --------------------------------------------------------------------------------------------- notebooks and profiles
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_bare(path):
    book = json.loads(path.read_text())
    code = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code), "clear the outputs"
    ids = [cell.get("id") for cell in book["cells"]]
    assert None not in ids and len(set(ids)) == len(ids), "every cell needs its own id"
    assert book["metadata"]["kernelspec"]["name"] == "python3"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_short_and_recorded(path):
    book = json.loads(path.read_text())
    sources_of_code = ["".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "code"]
    lines = [line for source in sources_of_code for line in source.splitlines() if line.strip()]
    assert len(book["cells"]) <= 30 and len(lines) <= 130
    assert sum(line.startswith("def ") for line in lines) <= 1
    assert f'start_run("{path.stem}", globals())' in "".join(sources_of_code)
    assert "run.finish(" in sources_of_code[-1]


@pytest.mark.parametrize("path", [path for path in NOTEBOOKS if path.parent.name == "notebooks"], ids=lambda p: p.stem)
@pytest.mark.parametrize("profile", [path.stem for path in PROFILES])
def test_a_profile_holds_every_parameter(path, profile):
    parameters = parameters_file.notebook_parameters(path.stem)
    assert all(parameter.help for parameter in parameters.values()), "a comment beside each parameter"
    assert set(parameters_file.profile_values(profile, path.stem)) == set(parameters)
    parameters_file.resolve_parameters(path.stem, profile)


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_a_profile_names_notebooks_that_exist(path):
    assert set(yaml.safe_load(path.read_text()) or {}) <= {notebook.stem for notebook in NOTEBOOKS}


def test_the_workflow_knows_every_notebook():
    text = (ROOT / "workflow" / "Snakefile").read_text()
    needs = ast.literal_eval(text.split("NEEDS = ")[1].split("\nPROFILE")[0])
    assert {path.stem for path in NOTEBOOKS if path.parent.name == "notebooks"} <= set(needs)
    assert all(need in needs for wanted in needs.values() for need in wanted)


def test_readme_quotes_the_reference_results():
    values = results.load_values("reference")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme_file.with_results(readme, values) == readme, "run `mixdpo reference`: README is not that of values.json"
    for picture in re.findall(r"\]\((figures/reference/[^)]+)\)", readme):
        assert (ROOT / picture).is_file(), f"README shows {picture}, which is not there"


# --------------------------------------------------------------------------------------------------------------- data
def test_titles_are_enough_distinct_and_of_one_domain_each():
    titles = {}
    for domain in ("films", "books"):
        with (ROOT / "data" / "titles" / f"{domain}.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        assert all(set(row) == {"title", "maker"} and all(value.strip() for value in row.values()) for row in rows)
        titles[domain] = [row["title"].casefold() for row in rows]
        assert len(set(titles[domain])) == len(rows) >= 150
    assert not set(titles["films"]) & set(titles["books"])
