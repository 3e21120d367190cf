"""Settings of every test: no network, two cores, repeatable hypothesis; a project folder where one is wanted."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "agg")
# two workers: a core for each; more threads than cores slow each other down many times
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
THREADS = min(int(os.environ.get("OMP_NUM_THREADS") or 2), 2 // WORKERS or 1)
os.environ["OMP_NUM_THREADS"] = str(THREADS)  # of the kernels that notebooks run in
for name in ("ROOT", "RUN_FOLDER", "PROGRESS", "STARTED", "PROFILE", "COMMAND"):
    os.environ.pop(f"MIXDPO_{name}", None)
for name in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS"):  # of the make that runs the tests
    os.environ.pop(name, None)

import gc  # noqa: E402
import signal  # noqa: E402
from contextlib import suppress  # noqa: E402
from pathlib import Path  # noqa: E402

with suppress(
    ValueError
):  # a shell that starts tests behind itself makes them deaf to Ctrl-C, and what they start
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

import hypothesis  # noqa: E402
import nbformat  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402
from tiny import save_tiny_base  # noqa: E402

torch.set_num_threads(THREADS)
hypothesis.settings.register_profile("mixdpo", deadline=None, derandomize=True)
hypothesis.settings.load_profile("mixdpo")
ROOT = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items):
    """The notebooks, which take longest, come first: the other worker does the rest meanwhile."""
    first = ["test_notebooks.py", "test_theory_notebooks.py", "test_faults.py"]
    items.sort(key=lambda item: (*first, item.path.name).index(item.path.name))


def pytest_collection_finish():
    """What is imported stays: each fit collects garbage, and would look through all of it for half a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded():
    """A test that draws without a generator of its own draws the same numbers in any order of tests."""
    torch.manual_seed(0)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """An empty project in a temporary folder; library functions see it as the root."""
    for folder in ("data", "notebooks/profiles", "workflow"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "notebooks" / "profiles" / "default.yaml").write_text("{}\n")
    monkeypatch.setenv("MIXDPO_ROOT", str(tmp_path))
    monkeypatch.delenv("MIXDPO_CACHE", raising=False)
    monkeypatch.delenv("MIXDPO_WHEELS", raising=False)
    return tmp_path


PARAMETERS = """n_experts: int = 3  # K
seeds: list[int] = [0, 1]  # one run each
rate: float = 0.1  # step
latent: str = "unit"
"""


@pytest.fixture
def write_notebook(project):
    """Write `notebooks/<name>.ipynb` of the project: parameters, start_run, the given cells, run.finish().

    And its line of `workflow/notebooks.yaml`, unless it has one.
    """

    def write(name, *cells, parameters=PARAMETERS, start=True, finish=True, shares=()):
        book = nbformat.v4.new_notebook()
        book.metadata.kernelspec = {
            "name": "python3",
            "display_name": "Python 3",
            "language": "python",
        }
        head = nbformat.v4.new_code_cell(parameters)
        head.metadata["tags"] = ["parameters"]
        begin = f'from mixdpo_lib.runner import record, results\nrun = record.start_run("{name}", globals())'
        sources = [*([begin] if start else []), *cells, *(["run.finish()"] if finish else [])]
        book.cells = [
            nbformat.v4.new_markdown_cell("# A test"),
            head,
            *map(nbformat.v4.new_code_cell, sources),
        ]
        nbformat.write(book, project / "notebooks" / f"{name}.ipynb")
        path = project / "workflow" / "notebooks.yaml"
        listed = yaml.safe_load(path.read_text()) if path.exists() else {"main": {}}
        if not any(name in study for study in listed.values()):
            listed["main"][name] = {"shares": list(shares)}
        path.write_text(yaml.safe_dump(listed))
        return project / "notebooks" / f"{name}.ipynb"

    return write


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """Folder of a tiny random language model, see tiny.py."""
    return save_tiny_base(tmp_path_factory.mktemp("tiny-base"))


@pytest.fixture(scope="module")
def tiny_base(tiny_folder, tmp_path_factory):
    """The tiny model, loaded as any other; MIXDPO_CACHE is a temporary folder while this module's tests run."""
    from mixdpo_lib.base import (
        model,
    )  # here: what is imported before pytest is set up is not checked for shapes

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIXDPO_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield model.load_base(tiny_folder)
