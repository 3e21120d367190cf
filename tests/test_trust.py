"""What comes from outside is data: never executed, never followed out of its folder, bounded in size."""

import ast
import json
import shutil
from pathlib import Path

import pytest

from mixdpo_lib import store
from mixdpo_lib.base import model as model_file
from mixdpo_lib.runner import notebooks, parameters, plain_yaml
from mixdpo_lib.store import MixDPOError

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {
    str(path.relative_to(ROOT)): path.read_text()
    for place in ("mixdpo_lib", "benchmarks", "scripts")
    for path in sorted((ROOT / place).rglob("*.py"))
}
SOURCES |= {
    f"notebooks/{path.name}": "\n".join(
        "".join(cell["source"])
        for cell in json.loads(path.read_text())["cells"]
        if cell["cell_type"] == "code"
    )
    for path in sorted((ROOT / "notebooks").rglob("*.ipynb"))
}
PICKLES = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
EXECUTES = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "read_pickle"}


def risks(source):
    """What in a source would execute or unpickle something that it reads."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names]
            found += [name for name in names if name.split(".")[0] in PICKLES]
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {word.arg: ast.unparse(word.value) for word in node.keywords}
        last = name.split(".")[-1]
        if name in EXECUTES or last in ("read_pickle", "unsafe_load", "full_load"):
            found.append(name)
        if name in ("torch.load", "torch.save", "np.loadtxt", "numpy.load"):
            found.append(name)
        if name in ("np.load", "np.save") and given.get("allow_pickle") != "False":
            found.append(f"{name} without allow_pickle=False")
        if given.get("allow_pickle", "False") != "False" or given.get("shell", "False") != "False":
            found.append(ast.unparse(node))
        if given.get("trust_remote_code", "False") != "False":
            found.append(ast.unparse(node))
        if last == "from_pretrained" and name.startswith("Auto") and "gguf_file" not in given:
            if given.get("trust_remote_code") != "False":
                found.append(f"{name} without trust_remote_code=False")
        if name in ("yaml.load", "yaml.load_all") and ast.unparse(node.args[-1]) != "_Loader":
            found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("place", SOURCES)
def test_nothing_that_is_read_is_executed_or_unpickled(place):
    assert risks(SOURCES[place]) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(path)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "pandas.read_pickle(path)",
        "AutoTokenizer.from_pretrained(folder)",
        "loader.from_pretrained(folder, trust_remote_code=True)",
        "yaml.load(text, yaml.Loader)",
        "yaml.full_load(text)",
        "eval(text)",
        "exec(text)",
        "subprocess.run(text, shell=True)",
    ],
)
def test_what_would_be_found(source):
    assert risks(source)


# ---------------------------------------------------------------------------------------------------- folders of models
@pytest.fixture
def folder(tiny_folder, tmp_path):
    return shutil.copytree(tiny_folder, tmp_path / "model")


@pytest.mark.parametrize(
    "content",
    [
        [1],
        5,
        None,
        {},
        {"weight_map": ["model.safetensors"]},
        {"weight_map": {"a": 5}},
        {"weight_map": {"a": ["model.safetensors"]}},
        {"weight_map": {"a": "../other/model.safetensors"}},
        {"weight_map": {"a": "/elsewhere/model.safetensors"}},
        {"weight_map": {"a": "sub/model.safetensors"}},
        {"weight_map": {"a": "..\\model.safetensors"}},
        {"weight_map": {"a": "~/model.safetensors"}},
        {"weight_map": {"a": ".."}},
        {"weight_map": {"a": ""}},
        {"weight_map": {"a": "model\0.safetensors"}},
        {"weight_map": {"a": "\ud800.safetensors"}},
        {"weight_map": {"a": "m" * 9999 + ".safetensors"}},
        {"weight_map": {"a": "config.json"}},
        {"weight_map": {"a": "pytorch_model.bin"}},
    ],
    ids=lambda content: json.dumps(content)[:50],
)
def test_an_index_names_files_of_its_own_folder(folder, content):
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps(content))
    (folder.parent / "other").mkdir()
    shutil.copy(folder / "model.safetensors", folder.parent / "other")
    with pytest.raises(MixDPOError, match="index.json: found .* expected"):
        model_file.load_base(folder)


def test_an_index_of_endless_depth(folder):
    (folder / "model.safetensors.index.json").write_text("[" * 100_000)
    with pytest.raises(MixDPOError, match="index.json: found no readable JSON"):
        model_file.load_base(folder)


def test_entries_of_a_folder_may_be_links_as_in_the_cache_of_a_hub(folder, tmp_path):
    whole = model_file.load_base(folder)
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    for file in folder.iterdir():
        shutil.copy(file, blobs)
        (snapshot / file.name).symlink_to(blobs / file.name)
    assert model_file.load_base(snapshot).fingerprint == whole.fingerprint


def test_an_adapter_is_not_followed_to_its_base(folder):
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "/elsewhere"}')
    with pytest.raises(MixDPOError, match="found adapter_config.json: .* merge it"):
        model_file.load_base(folder)


# ----------------------------------------------------------------------------------------------------------------- YAML
BOMB = "a0: &a0 [1, 1]\n" + "".join(
    f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}, *a{n - 1}]\n" for n in range(1, 40)
)


@pytest.mark.parametrize(
    "text, expected",
    [
        (BOMB, "line 9: found more than 20,000 values"),
        ("a: &a [1, *a]", "line 1: found the alias .a within what it stands for"),
        ("a: 1\n" * 3, "line 2: found 'a' twice"),
        ("04_mix:\n  rate: 1\n  n: 2\n  rate: 3\n", "line 4: found 'rate' twice"),
        ("a: " + "[" * 1000, "line 1: found more than 20 levels"),
        ("a: " + "{b: " * 1000, "line 1: found more than 20 levels"),
        ("a: !!python/object/apply:os.getcwd []", "line 1: found the tag"),
        ("\na: !!binary aGVsbG8=", "line 2: found the tag"),
        ("a: " + "9" * 5000, "line 1: found a value that cannot be read"),
        ("? [1]\n: 2", "line 1: found a name that is no text"),
        ("a: 1\n---\nb: 1\n", "another document"),
        ("a: [1\nb: 2\n", "line "),
        ("a: \0", "unacceptable character"),
        ("#" * 300_000, "expected at most 200,000"),
    ],
    ids=range(14),
)
def test_yaml_is_plain_and_bounded(project, text, expected):
    for path, read in (
        (project / "notebooks/profiles/smoke.yaml", lambda: parameters.profile_values("smoke", "")),
        (project / "workflow/notebooks.yaml", notebooks.listed_notebooks),
    ):
        path.write_text(text)
        with pytest.raises(MixDPOError, match=expected) as caught:
            read()
        assert str(path) in str(caught.value) and len(str(caught.value)) < 600
    with pytest.raises(MixDPOError, match="-p a=.*expected a number") as caught:
        parameters.parse_overrides([f"a={text}"])
    assert len(str(caught.value)) < 600


def test_json_of_a_parameter_is_bounded_too():
    for text in ('{"a": 1, "a": 2}', "[" * 100_000, '[{"b": {"c": 1, "c": 1}}]'):
        with pytest.raises(MixDPOError, match="-p x="):
            parameters.parse_overrides([f"x={text}"])
    assert parameters.parse_overrides(['x={"a": [1e-3]}']) == {"x": {"a": [0.001]}}


def test_dates_are_text_and_names_stand_once():
    assert plain_yaml.read_text("2024-01-31") == "2024-01-31"
    assert plain_yaml.read_text("a: &here [1]\nb: *here") == {"a": [1], "b": [1]}


@pytest.mark.parametrize(
    "line", [{"needs": 5}, {"needs": "01"}, {"shares": [1]}, {"shares": {"a": 1}}, [1], {"new": []}]
)
def test_a_line_of_another_shape(project, line):
    (project / "workflow/notebooks.yaml").write_text(json.dumps({"main": {"04_mix": line}}))
    with pytest.raises(MixDPOError, match="notebooks.yaml: 04_mix: found .* expected a notebook"):
        notebooks.listed_notebooks()


@pytest.mark.parametrize("kind", ["__import__('os')", "().__class__", "str.mro()", "(" * 300, ""])
def test_a_type_is_read_and_not_executed(project, kind):
    schema = {"texts": {"n": {"type": kind, "default": 1, "help": "n"}}}
    (project / "notebooks/profiles/common.yaml").write_text(json.dumps(schema))
    with pytest.raises(MixDPOError, match="found the parameter type"):
        parameters.common_parameters()


def test_json_of_endless_depth(tmp_path):
    (tmp_path / "a.json").write_text("[" * 100_000)
    with pytest.raises(MixDPOError, match="a.json: found no readable JSON"):
        store.read_json(tmp_path / "a.json")
