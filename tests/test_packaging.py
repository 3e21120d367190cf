"""Is everything declared that is used, does it point one way, does it work anywhere?"""

import ast
import importlib.metadata
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
NOTEBOOKS = sorted((ROOT / "notebooks").rglob("*.ipynb"))
BENCHMARKS = sorted((ROOT / "benchmarks").glob("*.py"))
SPEED = sorted((ROOT / "benchmarks" / "speed").glob("*.py"))
WINGS = sorted(
    path
    for path in (ROOT / "mixdpo_lib").iterdir()
    if path.suffix == ".py" or (path / "__init__.py").exists()
)
NEEDS = {
    "study": ["study"],
    "runner": ["runner"],
    "cli": ["study", "runner"],
    "explorer": ["lab"],
    "lessons": ["lab"],
}  # others: the core alone


def plain(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(lines):
    found = [
        line.strip().lstrip("- ").split("==")
        for line in lines
        if re.match(r"[\s-]*[A-Za-z0-9_.-]+==", line)
    ]
    return {plain(name): version for name, version in found}


CONSTRAINTS = pins((ROOT / "constraints.txt").read_text().splitlines())
EVERYTHING = [extra for extra in EXTRAS if extra != "all"]
DIRECT = [*PROJECT["dependencies"], *(name for extra in EVERYTHING for name in EXTRAS[extra])]


def packages(*extras):
    """What is installed by `pip install mixdpo[...]` and may be imported."""
    return {
        plain(name)
        for name in [*PROJECT["dependencies"], *(one for extra in extras for one in EXTRAS[extra])]
    }


# --------------------------------------------------------------------------------- what is declared
def test_every_direct_dependency_is_pinned_once_and_has_a_reason():
    assert all(plain(name) in CONSTRAINTS for name in [*DIRECT, "setuptools"])
    assert len(set(DIRECT)) == len(DIRECT), "a dependency belongs to one place"
    text = (ROOT / "pyproject.toml").read_text()
    block = (
        text.split("[project.optional-dependencies]")[0]
        .split("dependencies = [")[1]
        .split("]\n")[0]
    )
    block += text.split("[project.optional-dependencies]")[1].split("\n[")[0]
    lines = [line for line in block.splitlines() if line.strip().startswith('"')]
    assert len(lines) == len(DIRECT) + 1 and all(
        re.fullmatch(r' +"[^"]+", +# .+', line) for line in lines
    )


def test_all_is_every_extra():
    (everything,) = EXTRAS["all"]
    assert everything == f"mixdpo[{','.join(EVERYTHING)}]"
    assert set(EVERYTHING) == {"study", "runner", "lab", "test", "bench"}


def test_conda_has_the_same_pins():
    content = yaml.safe_load((ROOT / "environment.yml").read_text())
    (inside,) = [entry["pip"] for entry in content["dependencies"] if isinstance(entry, dict)]
    conda = pins(inside)
    assert set(conda) == {*map(plain, DIRECT), "setuptools"}
    assert {name: CONSTRAINTS[name] for name in conda} == conda
    assert "python=3.11" in content["dependencies"] and ">=3.11,<3.12" in PROJECT["requires-python"]


# --------------------------------------------------------------------------------- what is imported
def foreign(source):
    """Third-party packages that a source imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split(".")[0])
    own = {"mixdpo_lib", "benchmarks"} | {
        p.stem for at in ("tests", "scripts") for p in (ROOT / at).rglob("*.py")
    }
    return found - sys.stdlib_module_names - own


def code(notebook):
    """The code cells of a notebook as one source, without IPython's own lines."""
    cells = [
        cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"
    ]
    lines = [line for cell in cells for line in "".join(cell["source"]).splitlines()]
    return "\n".join(line for line in lines if not line.startswith(("%", "!")))


def files(place):
    return [place] if place.suffix == ".py" else sorted(place.rglob("*.py"))


PLACES = {
    **{
        wing.stem: (
            "\n".join(file.read_text() for file in files(wing)).replace(
                "from __future__ import annotations", ""
            ),
            NEEDS.get(wing.stem, []),
        )
        for wing in WINGS
    },
    **{f"benchmarks/{file.stem}": (file.read_text(), []) for file in BENCHMARKS},
    **{f"benchmarks/speed/{file.stem}": (file.read_text(), EVERYTHING) for file in SPEED},
    **{f"notebooks/{file.stem}": (code(file), ["study", "runner", "lab"]) for file in NOTEBOOKS},
    **{
        f"tests/{file.relative_to(ROOT / 'tests')}": (file.read_text(), EVERYTHING)
        for file in files(ROOT / "tests")
    },
}


@pytest.mark.parametrize("place", PLACES)
def test_what_a_wing_imports_is_among_its_own_dependencies(place):
    source, extras = PLACES[place]
    given = importlib.metadata.packages_distributions()
    missing = {
        name
        for name in foreign(source)
        if not packages(*extras) & {plain(one) for one in given.get(name, [])}
    }
    assert not missing, (
        f"{place} imports {missing}: add them to {extras or 'dependencies'} in pyproject.toml"
    )


def absent_names(source, names):
    """Names that a source takes out of a module (figures.curves, mx.fit) and that are not there."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)]
    taken = {(node.value.id, node.attr) for node in nodes if isinstance(node.value, ast.Name)}
    modules = {
        owner: names[owner] for owner, _ in taken if isinstance(names.get(owner), ModuleType)
    }
    return sorted(
        f"{owner}.{name}"
        for owner, name in taken
        if owner in modules and not hasattr(modules[owner], name)
    )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_name_that_a_notebook_imports_exists(path):
    names = {}
    for node in ast.walk(ast.parse(code(path))):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            exec(compile(ast.Module([node], []), str(path), "exec"), names)
    assert absent_names(code(path), names) == []


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_a_benchmark_can_be_started(path):
    names = runpy.run_path(str(path))  # not as __main__: nothing is measured
    assert names["__doc__"] and callable(names["main"])
    assert absent_names(path.read_text(), names) == []


# ----------------------------------------------------------------------------- direction of imports
def lint_imports(folder):
    command = "from importlinter.cli import lint_imports_command as main; main()"
    return subprocess.run(
        [sys.executable, "-c", command, "--no-logo", "--no-cache"],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(folder)},
    )


def test_imports_point_one_way():
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_an_import_upwards_and_a_room_without_a_place_are_noticed(tmp_path):
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(
        ROOT / "mixdpo_lib", tmp_path / "mixdpo_lib", ignore=shutil.ignore_patterns("__pycache__")
    )
    assert lint_imports(tmp_path).returncode == 0
    with (tmp_path / "mixdpo_lib" / "data" / "pairs.py").open("a") as file:
        file.write("\nfrom ..policy import mixture\n")
    (tmp_path / "mixdpo_lib" / "attic.py").touch()
    done = lint_imports(tmp_path)
    assert done.returncode == 1
    said = " ".join(done.stdout.split())
    assert (
        "mixdpo_lib.data is not allowed to import mixdpo_lib.policy" in said
        and "mixdpo_lib.attic" in said
    )


# ------------------------------------------------------------------------------- outside a checkout
USE = """
import sys

for name in sys.argv[1:]:
    sys.modules[name] = None  # as if it were not installed

import mixdpo_lib as mx
from mixdpo_lib import store
from mixdpo_lib.base.packaged import packaged
from tiny import preference_rows

print(mx.__file__)
print(store.cache_folder())
assert "smollm2-135m" in packaged("base")
preference_rows(24).to_json("my pairs.jsonl")
pairs = mx.load_preferences("my pairs.jsonl", columns=["user"])["train"]
base = mx.load_base("my model")
policy = mx.MixturePolicy(mx.HeadExperts(base, n_experts=2, rank=4), mx.LearnedWeights(2), beta=0.1)
mx.fit(policy, pairs, mx.FitConfig(latent="unit", unit="user", passes=1.0, min_steps=0, batch_size=8))
policy.save_pretrained("my mixture")
again = mx.MixturePolicy.from_pretrained("my mixture", base)
assert again.loglik(pairs).equal(policy.loglik(pairs))
try:
    store.project_root()
except store.MixDPOError as error:
    print(error)
sys.modules["yaml"] = None  # which transformers brings
try:
    mx.start_run
except ModuleNotFoundError as error:
    print(error)
import mixdpo_lib.cli
"""


def awkward(name):
    """A name of a folder that a person may choose and a shell or a make file stumbles over."""
    return f'it\'s a "{name}" ü$'


def test_a_wheel_works_outside_a_checkout(tmp_path, tiny_folder):
    source, site, work, home = (
        tmp_path / awkward(name) for name in ("source", "site", "work", "home")
    )
    shutil.copytree(
        ROOT / "mixdpo_lib", source / "mixdpo_lib", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(tiny_folder, work / "my model")
    shutil.copy(ROOT / "tests" / "tiny.py", site.parent)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, source], check=True
    )
    (wheel,) = tmp_path.glob("mixdpo-*.whl")
    subprocess.run(
        [*pip, "install", "--no-deps", "--no-compile", "--target", site, wheel], check=True
    )
    shutil.rmtree(source)

    env = {name: value for name, value in os.environ.items() if not name.startswith("MIXDPO")}
    env |= {
        "HOME": str(home),
        "XDG_CACHE_HOME": str(home / "cache"),
        "PYTHONPATH": f"{site}{os.pathsep}{tmp_path}",
    }
    extras = (
        packages(*EVERYTHING) - packages() - {"pyyaml", "tokenizers"}
    )  # these two come with transformers
    absent = [
        name
        for name, given in importlib.metadata.packages_distributions().items()
        if extras & set(map(plain, given))
    ]
    done = subprocess.run(
        [sys.executable, "-c", USE, *absent], cwd=work, env=env, capture_output=True, text=True
    )
    file, cache, refused, needs = done.stdout.splitlines() or [done.stderr] * 4
    assert needs == "start_run needs yaml: pip install 'mixdpo[runner]'", done.stderr
    assert (
        done.stderr.splitlines()[-1].startswith("mixdpo: error: the command line needs")
        and done.returncode == 1
    )
    assert Path(file).is_relative_to(site) and Path(cache).is_relative_to(home)
    assert refused.startswith(f"{work}: found no checkout of mixdpo")
    assert "[mixdpo] fit K=2: 3 steps; bound" in done.stderr
    assert {path.name for path in work.iterdir()} == {"my model", "my pairs.jsonl", "my mixture"}
    assert sorted(path.name for path in Path(cache).iterdir()) == ["features", "head"]
    assert not list(site.rglob("cache"))


# ----------------------------------------------------------------------------- a folder of any name
def test_the_workflow_calls_an_interpreter_in_any_folder(tmp_path):
    project, python = tmp_path / awkward("project"), tmp_path / awkward("environment") / "python"
    for name in ("workflow", "notebooks"):
        shutil.copytree(ROOT / name, project / name)
    shutil.copy(ROOT / "pyproject.toml", project)
    python.parent.mkdir()
    python.symlink_to(Path(sys.executable).resolve())
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
        "MIXDPO_ROOT": str(project),
    }
    command = [
        python,
        "-m",
        "snakemake",
        "runs/smoke/00_start_here/manifest.json",
        "-s",
        project / "workflow" / "Snakefile",
        "--config",
        "profile=smoke",
        "--cores",
        "1",
        "--dry-run",
        "--printshellcmds",
    ]
    done = subprocess.run(command, cwd=project, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (line,) = re.findall(r"Shell command: (.*)", done.stdout + done.stderr)
    assert shlex.split(line)[:4] == [str(python), "-m", "mixdpo_lib.cli", "run"]


def test_make_shows_what_there_is_and_refuses_another_python_in_any_folder(tmp_path):
    project, python = tmp_path / awkward("project"), tmp_path / awkward("old") / "python"
    python.parent.mkdir()
    python.write_text(
        f"#!/bin/sh\nexec '{sys.executable}' -c "
        "'import sys; sys.version_info = (3, 9, 0)\n'\"$2\"\n"
    )
    python.chmod(0o755)
    project.mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, project)
    said = subprocess.run(["make"], cwd=project, capture_output=True, text=True)
    assert said.returncode == 0 and "make reproduce" in said.stdout
    command = [
        "make",
        "test",
        f"PYTHON={str(python).replace('$', '$$')}",
    ]  # make itself reads a dollar
    done = subprocess.run(command, cwd=project, capture_output=True, text=True)
    assert (
        done.returncode == 2
        and "found Python 3.9" in done.stderr
        and "expected 3.11" in done.stderr
    )
    assert not (project / ".venv").exists()


TOOLS = """#!/bin/sh
# python -m venv PLACE: makes a python that knows pip and pip_audit by the name of this test
mkdir -p "$3/bin"
cat > "$3/bin/python" <<'END'
#!/bin/sh
case "$2" in
pip) exit INSTALLS ;;
pip_audit) for last; do :; done; if test -n 'REPORT'; then echo 'REPORT' > "$last"; fi; exit AUDITS ;;
esac
END
chmod +x "$3/bin/python"
"""
FOUND = json.dumps(
    {
        "dependencies": [
            {"name": "a", "version": "1", "vulns": [{"id": "X-1", "fix_versions": ["2"]}]},
            {"name": "b", "version": "1", "vulns": []},
        ]
    }
)


@pytest.mark.parametrize(
    "installs, audits, report, status, said",
    [
        (0, 0, "{}", 0, "no known weakness"),
        (1, 0, "", 2, "could not be installed .* needs the network"),
        (0, 1, "", 2, "got no answer .* needs the network"),
        (0, 1, FOUND, 2, "a 1 X-1 mended in 2\n.*known weaknesses, see above"),
    ],
)
def test_make_audit_says_what_it_found_and_whether_it_could_ask(
    tmp_path, installs, audits, report, status, said
):
    project, python = tmp_path / awkward("project"), tmp_path / awkward("python") / "python"
    project.mkdir()
    python.parent.mkdir()
    shutil.copy(ROOT / "Makefile", project)
    stub = TOOLS.replace("INSTALLS", str(installs)).replace("AUDITS", str(audits))
    stub = stub.replace("REPORT", report)
    python.write_text(
        stub.replace(
            "#!/bin/sh\n#", f'#!/bin/sh\n[ "$1" = -c ] && exec {sys.executable} "$@"\n#', 1
        )
    )
    python.chmod(0o755)
    (project / "tmp").mkdir()
    command = ["make", "audit", f"PYTHON={str(python).replace('$', '$$')}"]
    env = os.environ | {"TMPDIR": str(project / "tmp")}
    done = subprocess.run(command, cwd=project, env=env, capture_output=True, text=True)
    assert done.returncode == status and re.search(said, done.stdout + done.stderr), done
    assert list((project / "tmp").iterdir()) == []
