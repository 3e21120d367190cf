"""The project as a whole: licence, pinned sources, profiles, bare notebooks."""

import ast
import csv
import json
import os
import re
import tomllib
from string import Formatter

import pytest
import yaml

from mixdpo_lib import store
from mixdpo_lib.base import packaged
from mixdpo_lib.runner import notebooks, results
from mixdpo_lib.runner import parameters as parameters_file
from mixdpo_lib.study import readme as readme_file

ROOT = store.project_root()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NOTEBOOKS = sorted((ROOT / "notebooks").rglob("*.ipynb"))


def test_the_command_for_continuous_integration_can_be_executed():
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert "make --no-print-directory test" in (ROOT / ".ci" / "run").read_text()


def test_licence_and_version():
    assert (
        "Apache License" in (ROOT / "LICENSE").read_text()
        and "END OF TERMS" in (ROOT / "LICENSE").read_text()
    )
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (
        citation["version"] == PROJECT["version"]
        and PROJECT["version"] in (ROOT / "CHANGELOG.md").read_text()
    )
    assert citation["license"] == "Apache-2.0"


def test_sources_are_pinned():
    for name, entry in packaged.packaged().items():
        assert re.fullmatch(r"[0-9a-f]{64}", entry["sha256"]), name
        assert "==" in entry["package"] and entry["licence"] and entry["about"], name


# --------------------------------------------------------------------------------------------- notebooks and profiles
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_bare(path):
    book = json.loads(path.read_text())
    code = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code), (
        "clear the outputs"
    )
    ids = [cell.get("id") for cell in book["cells"]]
    assert None not in ids and len(set(ids)) == len(ids), "every cell needs its own id"
    assert book["metadata"]["kernelspec"]["name"] == "python3"


def cell_sources(path, kind):
    return [
        "".join(cell["source"])
        for cell in json.loads(path.read_text())["cells"]
        if cell["cell_type"] == kind
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_short_and_recorded(path):
    code = cell_sources(path, "code")
    lines = [line for source in code for line in source.splitlines() if line.strip()]
    assert len(code) + len(cell_sources(path, "markdown")) <= 25 and len(lines) <= 100
    assert sum(line.startswith("def ") for line in lines) <= 1
    assert f'start_run("{path.stem}", globals())' in code[1] and "run.head(" in code[1]
    assert "run.finish(" in code[-1]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_prose_quotes_no_result(path):
    """They come from tables of the run, or from the reference results; formulae and code may have any number."""
    free = r"\$\$.*?\$\$|\$.*?\$|`.*?`|arXiv[: ][\d.]+|95 % interval"
    for source in cell_sources(path, "markdown"):
        text = re.sub(free, "", source, flags=re.DOTALL)
        assert not re.search(r"\.\d|\d\s*%|\b(minutes?|seconds|hours?)\b", text), text


@pytest.mark.parametrize(
    "path", [p for p in NOTEBOOKS if p.parent.name in notebooks.GENERATED], ids=lambda p: p.stem
)
def test_a_notebook_on_generated_data_has_two_exercises_with_hidden_solutions(path):
    (text,) = [one for one in cell_sources(path, "markdown") if one.startswith("## Exercises")]
    for number, part in enumerate(text.split("\n\n**")[1:], 1):
        assert part.startswith(f"{number}.**")
        question, hidden = part.split("\n\n<details><summary>Solution</summary>\n\n")
        assert (
            len(question) > 40 and len(hidden) > 100 and hidden.rstrip().endswith("\n\n</details>")
        )
    assert number == 2
    if path.parent.name == "theory":
        assert any("lessons.sliders(" in one for one in cell_sources(path, "code"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_was_found_can_be_told(path):
    """Names in braces of `run.head(...)` are values of the reference results, or of the notebook's next run."""
    code = "\n".join(cell_sources(path, "code"))
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    (head,) = [call for call in calls if ast.unparse(call.func) == "run.head"]
    known, quoted = (
        results.load_values("reference"),
        tuple(re.findall(r'run\.value\(f?"(\w+)', code)),
    )
    for found in map(ast.literal_eval, head.args):
        names = [name for _, name, _, _ in Formatter().parse(found) if name]
        assert names and all(name in known or name.startswith(quoted) for name in names)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_shows_few_parameters(path):
    parameters = parameters_file.notebook_parameters(path.stem)
    assert all(parameter.help for parameter in parameters.values()), (
        "a comment beside each parameter"
    )
    assert len(set(parameters) - {"profile", "common"}) <= 8
    assert "common" not in parameters or list(parameters)[-2:] == ["profile", "common"]


@pytest.mark.parametrize(
    "path", [path for path in NOTEBOOKS if path.parent.name == "notebooks"], ids=lambda p: p.stem
)
@pytest.mark.parametrize("profile", parameters_file.profile_names())
def test_a_profile_holds_every_parameter(path, profile):
    """The default profile is the notebook's own cell: each value stands once. Every other one names them all."""
    own = set(parameters_file.notebook_parameters(path.stem)) - {"profile", "common"}
    said = set(parameters_file.profile_values(profile, path.stem)) - {"common"}
    assert said == (set() if profile == "default" else own)
    parameters_file.resolve_parameters(path.stem, profile)


@pytest.mark.parametrize("profile", parameters_file.profile_names())
def test_a_profile_holds_every_shared_value(profile):
    names = [name for group in parameters_file.common_parameters().values() for name in group]
    assert list(parameters_file.profile_values(profile, "common")) == (
        [] if profile == "default" else names
    )


@pytest.mark.parametrize("profile", parameters_file.profile_names())
def test_a_profile_names_notebooks_that_exist(profile):
    content = yaml.safe_load((ROOT / "notebooks" / "profiles" / f"{profile}.yaml").read_text())
    assert set(content) <= {"common", *(notebook.stem for notebook in NOTEBOOKS)}


def test_the_workflow_knows_every_notebook():
    listed = notebooks.listed_notebooks()
    assert {path.stem for path in NOTEBOOKS if path.parent.name == "notebooks"} == set(listed)
    assert all(need in listed for line in listed.values() for need in line.needs)
    for name, line in listed.items():
        assert bool(line.shares) == ("common" in parameters_file.notebook_parameters(name)), name
    studies = yaml.safe_load((ROOT / "workflow" / "notebooks.yaml").read_text())
    assert set(listed) == {name for study in studies.values() for name in study}, (
        "a line without a notebook"
    )


@pytest.mark.parametrize("name, n_pictures", [("README.md", 7), ("docs/results.md", 2)])
def test_pages_quote_the_reference_results(name, n_pictures):
    values, path = results.load_values("reference"), ROOT / name
    page = path.read_text(encoding="utf-8")
    assert readme_file.with_results(page, values) == page, (
        f"run `mixdpo reference`: {name} is not that of values.json"
    )
    pictures = re.findall(r"(?:\]\(|src=\")([^)\"]*figures/reference/[^)\"]+)", page)
    assert len(pictures) == n_pictures
    for picture in pictures:
        assert (path.parent / picture).is_file(), f"{name} shows {picture}, which is not there"


@pytest.mark.parametrize("name", ["README.md", "docs/running.md"])
def test_commands_can_be_pasted_into_any_shell(name):
    """Interactive zsh takes `#` for a word and `<` for a redirection, and brackets for patterns."""
    page = (ROOT / name).read_text(encoding="utf-8")
    lines = [
        line
        for language, block in re.findall(r"^```(\w*)\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
        if not language
        for line in block.splitlines()
    ]
    assert lines
    for line in lines:
        bare = re.sub(r"'[^']*'|\"[^\"]*\"", "", line)
        assert not re.search(r"[#<>\[\]?*]", bare), line


def test_every_claim_has_a_verdict_a_place_and_numbers_of_the_reference_results():
    path = ROOT / "docs" / "claims.md"
    page = path.read_text(encoding="utf-8")
    table = [row.split(" | ") for row in page.split("\n\n## ")[0].splitlines() if row[:2] == "| "]
    assert len(table) > 15 and all(len(row) == 6 for row in table)
    assert {row[4] for row in table[1:]} <= {"seen", "partly", "not seen", "not tried"}
    for link in re.findall(r"\]\(([^)]+)\)", page):
        assert (path.parent / link).is_file(), link
    assert all("](" in row[3] or "`" in row[3] for row in table[1:])
    values = results.load_values("reference")
    assert sum(f"`{name}` " in page for name in values) > 15
    assert readme_file.with_quoted(page, values) == page, "run `mixdpo reference`"


METHODS = {
    "Mix-DPO": "mix_dpo",
    "DPO": "dpo",
    "uniform mixture of DPO policies": "uniform",
    "a continuous latent a user (one number)": "translations",
    "hard clusters, a DPO each": "hard_clusters",
    "hard clusters": "hard_clusters",
    "MoE-DPO (reads genre and age)": "moe_dpo",
    "group-robust DPO": "robust",
    "equal soup of a DPO a group": "soup_equal",
    "soup chosen by the own pairs": "soup",
    "a DPO a group": "oracle",
    "DPO, genre and age in the prompt": "dpo_metadata",
    "the same, two numbers": "translations_2",
    "MoE-DPO": "moe_dpo",
    "continuous latent, one number": "translations",
    "continuous latent, two numbers": "translations_2",
    "DPO, metadata in the prompt": "dpo_metadata",
    "uniform mixture": "uniform",
    "group-robust DPO (knows the groups)": "robust",
    "equal soup (knows the groups)": "soup_equal",
    "soup by own pairs (knows the groups)": "soup",
    "a DPO a group (knows the groups)": "oracle",
}


def _rows(page, first):
    """Cells of the table of a page whose head begins so."""
    lines = page.split(f"\n{first}")[1].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_tables_of_baselines_are_those_of_the_reference_results():
    page = (ROOT / "docs" / "claims.md").read_text(encoding="utf-8").split("## Baselines")[1]
    accuracy, differences, volumes = (
        results.load_table("reference", "12_baselines", name)
        for name in ("accuracy", "differences", "hypervolumes")
    )
    of = accuracy[accuracy["seed"] == "mean"].set_index(["method", "group"])["accuracy"]
    apart = differences.set_index(["method", "group"])
    rows = _rows(page, "| | mean | worst group |")
    assert {METHODS[name] for name, *_ in rows} == set(accuracy["method"])
    for name, mean, worst, *other in rows:
        method = METHODS[name]
        assert [mean, worst] == [f"{of[method, group]:.3f}"[1:] for group in ("mean", "worst")], (
            name
        )
        if method == "mix_dpo":
            continue
        found = [apart.loc[(method, group)] for group in ("mean", "worst")]
        for cell, one in zip(other[:2], found, strict=True):
            numbers = [float(n) for n in re.findall(r"[+-]?\d*\.\d+", cell)]
            assert numbers == pytest.approx([one["difference"], one["low"], one["high"]], abs=6e-4)
        holm = [float(n) for n in other[2].split(", ")]
        assert holm == pytest.approx([one["p_holm"] for one in found], abs=6e-4)
    fronts = volumes.set_index(["method", "front"])
    rows = _rows(page, "| | sentiment | informativeness |")
    assert {METHODS[name] for name, *_ in rows} == set(volumes["method"]) - {"dpo"}
    for name, *cells in rows:
        for cell, front in zip(
            cells, ("sentiment", "informativeness", "grammar", "worst"), strict=True
        ):
            one = fronts.loc[(METHODS[name], front)]
            numbers = [float(n) for n in re.findall(r"\d*\.\d+", cell)]
            assert numbers == pytest.approx([one["ratio"], one["low"], one["high"]], abs=6e-3)
            assert cell.startswith("**") == (one["p_holm"] < 0.05), (name, front)


# --------------------------------------------------------------------------------------------------------------- data
def test_titles_are_enough_distinct_and_of_one_domain_each():
    titles = {}
    for domain in ("films", "books"):
        with (ROOT / "data" / "titles" / f"{domain}.csv").open(
            encoding="utf-8", newline=""
        ) as file:
            rows = list(csv.DictReader(file))
        assert all(
            set(row) == {"title", "maker"} and all(value.strip() for value in row.values())
            for row in rows
        )
        titles[domain] = [row["title"].casefold() for row in rows]
        assert len(set(titles[domain])) == len(rows) >= 150
    assert not set(titles["films"]) & set(titles["books"])


def test_the_page_on_reliability_names_tests_that_there_are():
    """A promise whose test was renamed or removed would stand there alone."""
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    rows = page.split("## Kinds of faults")[1].split("\n## ")[0].splitlines()
    named = [row.split("|")[3] for row in rows if row.startswith("| ")][1:]
    assert len(named) >= 18
    for cell in named:
        words = re.findall(r"`([^`]+)`", cell)
        assert words and all(w.endswith(".py") for w in words[:1])
        for word in words:
            if word.endswith(".py"):
                source = (ROOT / "tests" / word).read_text(encoding="utf-8")
            else:
                assert re.search(rf"def test_\w*{word}\w*\(", source), (word, cell)
