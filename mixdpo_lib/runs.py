"""Parameters, run identity, manifest, execution: from a notebook and a profile to a recorded result. Knows no model."""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib.metadata
import json
import logging
import math
import os
import platform
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from . import store
from .store import MixDPOError

_HEARTBEAT_S = 12.0
_PACKAGES = ("torch", "transformers", "datasets", "safetensors", "scikit-learn", "harper-py", "numpy", "pandas",
             "matplotlib", "seaborn", "papermill")
MAIN = ("00_", "01_", "02_", "03_", "04_", "09_")       # the notebooks of the main study, which `make reproduce` runs
_LARGE = 1_000_000      # bytes; a larger table stays out of figures/reference


# ----------------------------------------------------------------------------------------------------- parameters
@dataclass(frozen=True)
class Parameter:
    """One line of a notebook's `parameters` cell: `name: type = literal  # help`."""

    name: str
    type: str
    default: Any
    help: str


def notebook_path(name: str) -> Path:
    """Path of `notebooks/<name>.ipynb`; accepts the bare name, the file name or the path.

    Raises
    ------
    MixDPOError : no such notebook; the message lists those that there are.
    """
    folder = store.project_root() / "notebooks"
    short = name.removeprefix("notebooks/").removesuffix(".ipynb")
    path = folder / f"{short}.ipynb"
    if not path.exists():
        path = folder / "theory" / f"{short.removeprefix('theory/')}.ipynb"
    if not path.exists():
        known = notebook_names() + theory_names()
        raise MixDPOError(f"notebook {name!r}: not found in {folder}; expected one of {', '.join(known) or 'none yet'}"
                          + _nearest(short, known))
    return path


def notebook_names() -> list[str]:
    """Names of the notebooks that exist, in order."""
    return sorted(path.stem for path in (store.project_root() / "notebooks").glob("*.ipynb"))


def theory_names() -> list[str]:
    """Names of the theory notebooks: they need no reviews and no model, and no other result needs them."""
    return sorted(path.stem for path in (store.project_root() / "notebooks" / "theory").glob("*.ipynb"))


def notebook_parameters(name: str) -> dict[str, Parameter]:
    """The parameters of a notebook, read from its source without a kernel."""
    path = notebook_path(name)
    cells = [cell for cell in store.read_json(path).get("cells", [])
             if "parameters" in cell.get("metadata", {}).get("tags", [])]
    if len(cells) != 1:
        raise MixDPOError(f"{path}: found {len(cells)} cells tagged `parameters`, expected 1")
    source = "".join(cells[0]["source"])
    lines, parameters = source.splitlines(), {}
    for node in ast.parse(source).body:
        line = lines[node.lineno - 1]
        try:
            if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None):
                raise ValueError
            help_text = lines[(node.end_lineno or node.lineno) - 1][node.end_col_offset:].strip().lstrip("# ")
            parameters[node.target.id] = Parameter(node.target.id, ast.unparse(node.annotation),
                                                   ast.literal_eval(node.value), help_text)
        except ValueError:
            raise MixDPOError(f"{path}: parameters cell: found {line.strip()!r}, expected lines of the form "
                              "`name: type = literal  # help`") from None
    for parameter in parameters.values():
        _check(name, parameter, parameter.default)
    return parameters


def _fits(value: Any, kind: ast.expr) -> bool:
    if isinstance(kind, ast.BinOp):
        return _fits(value, kind.left) or _fits(value, kind.right)
    if isinstance(kind, ast.Constant):
        return value is None
    if isinstance(kind, ast.Subscript):
        outer = ast.unparse(kind.value)
        inner = kind.slice.elts if isinstance(kind.slice, ast.Tuple) else [kind.slice]
        if outer in ("list", "tuple"):
            return isinstance(value, (list, tuple)) and all(_fits(one, inner[0]) for one in value)
        return isinstance(value, dict) and all(_fits(k, inner[0]) and _fits(v, inner[-1]) for k, v in value.items())
    name = ast.unparse(kind)
    if name == "float":
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if name == "int":
        return isinstance(value, int) and not isinstance(value, bool)
    types = {"str": str, "bool": bool, "list": list, "dict": dict, "None": type(None)}
    if name not in types:
        raise MixDPOError(f"found the parameter type {name!r}; expected {', '.join(['int', 'float', *types])}, "
                          "list[...], dict[..., ...] or a union by |")
    return isinstance(value, types[name])


def _check(notebook: str, parameter: Parameter, value: Any) -> None:
    if not _fits(value, ast.parse(parameter.type, mode="eval").body):
        number = isinstance(value, str) and "float" in parameter.type
        remedy = "write the exponent as in 1.0e-3" if number else f"the default is {parameter.default!r}"
        raise MixDPOError(f"{notebook}: parameter {parameter.name}: found {value!r} ({type(value).__name__}), "
                          f"expected {parameter.type}; {remedy}")


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, 1, 0.5)
    return f"; did you mean {near[0]}?" if near else ""


def parse_overrides(pairs: Sequence[str]) -> dict[str, Any]:
    """`["n_experts=4", "seeds=[0, 1]"]` as values (JSON or YAML literals).

    >>> parse_overrides(["n_experts=4", "rate=1e-3", "designs=[clean]", "unit=user"])
    {'n_experts': 4, 'rate': 0.001, 'designs': ['clean'], 'unit': 'user'}
    """
    values = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name.strip():
            raise MixDPOError(f"-p {pair}: found no name=value; write for example -p n_experts=4")
        try:
            values[name.strip()] = json.loads(text)
        except ValueError:
            try:
                values[name.strip()] = yaml.safe_load(text)
            except yaml.YAMLError:
                raise MixDPOError(f"-p {pair}: found {text!r}, expected a number, text, true/false, null or "
                                  "[a, list]") from None
    return values


def profile_values(profile: str, notebook: str) -> dict[str, Any]:
    """What `notebooks/profiles/<profile>.yaml` says for one notebook (nothing: the notebook's own defaults)."""
    folder = store.project_root() / "notebooks" / "profiles"
    path = folder / f"{profile}.yaml"
    if not path.exists():
        known = sorted(p.stem for p in folder.glob("*.yaml"))
        raise MixDPOError(f"profile {profile!r}: {path} not found; expected one of {', '.join(known) or 'none yet'}"
                          + _nearest(profile, known))
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        return dict(content.get(notebook) or {})
    except (yaml.YAMLError, AttributeError, TypeError, ValueError) as error:
        raise MixDPOError(f"{path}: found no mapping of notebooks to parameters ({error})") from None


def resolve_parameters(notebook: str, profile: str = "default",
                       overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Every parameter of a notebook: its default, unless the profile says otherwise, unless `overrides` does.

    Raises
    ------
    MixDPOError : an unknown name (valid ones and the nearest are listed) or a wrong type (name, found, expected).
    """
    known = notebook_parameters(notebook)
    values = {name: parameter.default for name, parameter in known.items()}
    for place, given in ((f"profile {profile}", profile_values(profile, notebook)), ("-p", overrides or {})):
        for name, value in given.items():
            if name not in known:
                raise MixDPOError(f"{notebook}: {place}: unknown parameter {name!r}; expected one of "
                                  f"{', '.join(known)}" + _nearest(name, list(known)))
            _check(notebook, known[name], value)
            values[name] = value
    return values


# ------------------------------------------------------------------------------------------- inside of a notebook
def library_hash() -> str:
    """sha256 over the source of the library, 64 hex digits."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(f"{path.name} {store.sha256_of(path)}\n".encode())
    return digest.hexdigest()


def notebook_hash(name: str) -> str:
    """sha256 over the cells' source of a notebook, 64 hex digits."""
    cells = store.read_json(notebook_path(name)).get("cells", [])
    text = store.canonical_json([[cell["cell_type"], "".join(cell["source"])] for cell in cells])
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass
class Run:
    """What a notebook leaves behind: `tables/`, `figures/`, `values.json` and at last `manifest.json` in `folder`."""

    notebook: str
    parameters: dict[str, Any]
    folder: Path
    id: str
    began: float = field(default_factory=time.time)
    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    _tables: dict[str, str] = field(default_factory=dict)

    def table(self, data: pd.DataFrame, name: str) -> pd.DataFrame:
        """Write `tables/<name>.csv` and hand the table back."""
        text = _csv(data)
        self._write(f"tables/{name}.csv", text)
        self._tables[_hash(text)] = name
        return data

    def figure(self, figure: Any, name: str, caption: str, data: pd.DataFrame | None = None,
               by: str | Callable[..., Any] | None = None) -> None:
        """Write `figures/<name>.png`, `.svg` and `.json` (run, function, hash of the data, caption).

        Equal figures give equal files: no dates, fixed SVG identifiers.

        Parameters
        ----------
        figure : a figure, axes, or a seaborn grid.
        data : the table that it shows; its hash, and its name when `table` wrote it, go into the sidecar.
        by : the function that drew it; default the figure's name.
        """
        import matplotlib

        figure = getattr(figure, "figure", figure)
        (self.folder / "figures").mkdir(parents=True, exist_ok=True)
        with matplotlib.rc_context({"svg.hashsalt": "mixdpo"}):
            figure.savefig(self.folder / f"figures/{name}.png", dpi=150, bbox_inches="tight",
                           metadata={"Software": None})
            figure.savefig(self.folder / f"figures/{name}.svg", bbox_inches="tight", metadata={"Date": None})
        data_hash = None if data is None else _hash(_csv(data))
        store.write_json_atomic(self.folder / f"figures/{name}.json", {
            "run": self.id, "notebook": self.notebook, "function": getattr(by, "__name__", by) or name,
            "caption": caption, "data_sha256": data_hash, "table": self._tables.get(data_hash or "")})

    def value(self, name: str, value: float, unit: str, interval: Sequence[float] | None = None,
              n: int | None = None, seeds: int | Sequence[int] | None = None) -> float:
        """Note a number that README or a text quotes, with its unit; it goes into `values.json`."""
        numbers = [float(value), *map(float, interval or ())]
        if not all(map(math.isfinite, numbers)) or (interval is not None and len(numbers) != 3):
            raise MixDPOError(f"{self.notebook}: value {name}: found {value}, interval {interval}; expected a finite "
                              "number and [low, high]")
        self.values[name] = {"value": numbers[0], "unit": unit, "interval": numbers[1:] or None, "n": n,
                             "seeds": seeds, "runs": [self.id]}
        return numbers[0]

    def finish(self, stop_reasons: Any = None) -> Path:
        """Write `values.json` and `manifest.json`; the last cell of every notebook. Returns the manifest's path."""
        if self.values:
            store.write_json_atomic(self.folder / "values.json", self.values)
        outputs = {path.relative_to(self.folder).as_posix(): {"sha256": store.sha256_of(path),
                                                              "bytes": path.stat().st_size}
                   for path in sorted(self.folder.rglob("*"))
                   if path.is_file() and path.name != "manifest.json" and not path.name.startswith(".")
                   and path.suffix not in (".ipynb", ".lock", ".log")}
        return store.write_json_atomic(self.folder / "manifest.json", {
            "run": self.id, "notebook": self.notebook, "parameters": self.parameters,
            "seeds": {name: value for name, value in self.parameters.items() if name in ("seed", "seeds")},
            "inputs": store.touched_artefacts(), "library_sha256": library_hash(),
            "notebook_sha256": notebook_hash(self.notebook), "versions": _versions(), "machine": _machine(),
            "stop_reasons": stop_reasons, "seconds": round(time.time() - self.began, 1),
            "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024), "outputs": outputs,
            "ended": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())})

    def _write(self, name: str, text: str) -> None:
        path = self.folder / name
        with store.clear_when_full(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")


def start_run(notebook: str, namespace: Mapping[str, Any]) -> Run:
    """Begin the record of a notebook: `run = start_run("04_mix_dpo", globals())` in the cell after the parameters.

    Reads the parameters' names from the notebook's `parameters` cell and their values from `namespace`, and checks
    their types. The folder is the runner's, or `runs/interactive/<notebook>/<time>` in JupyterLab and plain papermill.
    """
    known, values = notebook_parameters(notebook), {}
    for name, parameter in known.items():
        if name not in namespace:
            raise MixDPOError(f"{notebook}: parameter {name} has no value; run the parameters cell first")
        values[name] = namespace[name]
        _check(notebook, parameter, values[name])
    key = store.artefact_key("run", 1, values, [notebook, library_hash(), notebook_hash(notebook)])
    folder = os.environ.get("MIXDPO_RUN_FOLDER") or (
        store.project_root() / "runs" / "interactive" / notebook / time.strftime("%Y%m%d-%H%M%S"))
    Path(folder).mkdir(parents=True, exist_ok=True)
    return Run(notebook, values, Path(folder), f"{notebook}-{key[:10]}")


def _csv(data: pd.DataFrame) -> str:
    return data.to_csv(index=False, lineterminator="\n")


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _machine() -> dict[str, Any]:
    machine: dict[str, Any] = {"system": platform.system(), "processor": platform.machine(), "cores": os.cpu_count()}
    if torch := sys.modules.get("torch"):       # only where the notebook used it
        cuda = torch.cuda.is_available()
        machine |= {"device": torch.cuda.get_device_name() if cuda else "cpu", "threads": torch.get_num_threads()}
    return machine


# -------------------------------------------------------------------------------------------------- reading results
def verify_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a run, after the sha256 of every output was computed again and compared."""
    folder = Path(folder)
    path = folder / "manifest.json"
    if not path.exists():
        raise MixDPOError(f"{folder}: no manifest.json: the notebook did not reach its last cell, `run.finish()`")
    manifest = store.read_json(path)
    for name, expected in manifest["outputs"].items():
        if name not in manifest.get("left_out", ()):
            _verify_output(folder, name, expected)
    return manifest


def _verify_output(folder: Path, name: str, expected: Mapping[str, Any]) -> None:
    found = store.sha256_of(folder / name) if (folder / name).exists() else "no such file"
    if found != expected["sha256"]:
        raise MixDPOError(f"{folder}: {name}: found {found[:16]}, expected sha256 {expected['sha256'][:16]} "
                          "(manifest.json); the file was changed after the run: run the notebook again")


def results_folder(where: str | Path, notebook: str) -> Path:
    """Folder of one notebook's results: `where` is a profile, "reference", or a folder that holds such folders."""
    root = store.project_root()
    if str(where) == "reference":
        return root / "figures" / "reference" / notebook
    return (Path(where) if os.sep in str(where) else root / "runs" / str(where)) / notebook


def load_table(where: str | Path, notebook: str, name: str) -> pd.DataFrame:
    """A table of a finished run, checked against its manifest: `load_table("default", "04_mix_dpo", "accuracy")`."""
    folder, file = results_folder(where, notebook), f"tables/{name}.csv"
    outputs = _outputs(folder, where, notebook)
    if file not in outputs:
        known = [Path(n).stem for n in outputs if n.startswith("tables/")]
        raise MixDPOError(f"{folder}: no table {name!r}; expected one of {', '.join(known)}" + _nearest(name, known))
    _verify_output(folder, file, outputs[file])
    return pd.read_csv(folder / file)


def load_values(where: str | Path, notebook: str | None = None) -> dict[str, dict[str, Any]]:
    """Quoted numbers of one finished run, or with `notebook=None` those of `figures/reference` together."""
    if notebook is None:
        path = results_folder(where, "values.json")
        return store.read_json(path) if path.exists() else {}
    folder = results_folder(where, notebook)
    return store.read_json(folder / "values.json") if "values.json" in _outputs(folder, where, notebook) else {}


def values_table(values: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """Quoted numbers as a table: name, value, low, high, unit, n, seeds (how many)."""
    rows = []
    for name, v in sorted(values.items()):
        low, high = v["interval"] or (None, None)
        count = len(v["seeds"]) if isinstance(v["seeds"], list) else v["seeds"]
        rows.append({"name": name, "value": v["value"], "low": low, "high": high, "unit": v["unit"], "n": v["n"],
                     "seeds": count})
    return pd.DataFrame(rows, columns=["name", "value", "low", "high", "unit", "n", "seeds"])


def _outputs(folder: Path, where: str | Path, notebook: str) -> dict[str, Any]:
    if not (folder / "manifest.json").exists():
        raise MixDPOError(f"{folder}: no finished run of {notebook}; make it by `mixdpo run {notebook} --profile "
                          f"{where}` or `make reproduce`")
    manifest = store.read_json(folder / "manifest.json")
    return {n: entry for n, entry in manifest["outputs"].items() if n not in manifest.get("left_out", ())}


# ------------------------------------------------------------------------------------------------------- execution
class RunFailed(MixDPOError):
    """A notebook did not finish; the message names the cause and the folder with the evidence."""

    exit_code = 1


class RunInterrupted(RunFailed):
    """Somebody ended the run: Ctrl-C, a cluster, Snakemake."""

    exit_code = 130


def run_notebook(notebook: str, overrides: Mapping[str, Any] | None = None, *, profile: str = "default",
                 output: str | Path | None = None, cell_timeout: int | None = None) -> Path:
    """Execute a notebook and put its recorded result into place; the folder is returned.

    Names and types of the parameters are checked before a kernel starts. The result counts only when papermill
    succeeded and the manifest verifies; it then replaces an earlier one in one step. A failed run leaves the earlier
    one alone and its own evidence in `runs/failed/`.

    Parameters
    ----------
    overrides : values beside the profile's; the result then goes to `runs/custom/` and never replaces the profile's.
    output : another folder for the result; it must be absent, empty or an earlier run.
    cell_timeout : seconds that one cell may take; default no limit.
    """
    path = notebook_path(notebook)
    notebook = path.stem
    parameters = resolve_parameters(notebook, profile, overrides)
    runs = store.project_root() / "runs"
    folder = runs / profile / notebook
    if output is not None:
        folder = Path(output).expanduser().resolve()
        if folder.exists() and any(folder.iterdir()) and not (folder / "manifest.json").exists():
            raise MixDPOError(f"{folder}: found a folder that is not an earlier run; name an empty or new one")
    elif overrides:
        folder = runs / "custom" / f"{notebook}-{store.artefact_key('custom', 1, parameters)[:10]}"
    with store.locked(folder.with_name(f".{folder.name}.lock"), notebook):
        for left_over in folder.parent.glob(f".{folder.name}.part-*"):
            shutil.rmtree(left_over, ignore_errors=True)
        partial = folder.with_name(f".{folder.name}.part-{os.getpid()}")
        partial.mkdir(parents=True)
        began = time.monotonic()
        try:
            _execute(path, partial, parameters, cell_timeout)
            manifest = verify_manifest(partial)
            if (manifest["notebook"], manifest["parameters"]) != (notebook, json.loads(json.dumps(parameters))):
                raise MixDPOError(f"manifest.json is of {manifest['notebook']} with {manifest['parameters']}, expected "
                                  f"{notebook} with {parameters}; see start_run(...) in the notebook")
        except BaseException as error:
            raise _keep_evidence(notebook, partial, runs / "failed", error) from error
        _replace(partial, folder)
    print(f"[mixdpo] {notebook}: finished in {time.monotonic() - began:.0f} s, results in {folder}", file=sys.stderr,
          flush=True)
    return folder


def _execute(path: Path, folder: Path, parameters: dict[str, Any], cell_timeout: int | None) -> None:
    import papermill

    with tempfile.TemporaryDirectory(prefix="mixdpo-") as scratch:
        kernel = Path(scratch) / "kernels" / "mixdpo-runner"        # this very interpreter, whatever is registered
        kernel.mkdir(parents=True)
        store.write_json_atomic(kernel / "kernel.json", {
            "argv": [sys.executable, "-m", "ipykernel_launcher", "--log-level=50", "-f", "{connection_file}"],
            "display_name": "mixdpo runner", "language": "python"})
        logging.getLogger("papermill").setLevel(logging.ERROR)      # its guesses about parameters; ours are checked
        log = Path(scratch) / "progress.log"
        log.touch()
        threads = os.environ.get("OMP_NUM_THREADS", "2")            # fixed: sums differ with the number of threads
        settings = {"JUPYTER_PATH": scratch, "IPYTHONDIR": f"{scratch}/ipython", "PYTHONHASHSEED": "0",
                    "MIXDPO_RUN_FOLDER": str(folder), "MIXDPO_PROGRESS": str(log), "OMP_NUM_THREADS": threads,
                    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
                    "MIXDPO_ROOT": str(store.project_root()), "TOKENIZERS_PARALLELISM": "false"}
        with _environment(settings), _shown(log, path.stem), _interruptible():
            papermill.execute_notebook(
                str(path), str(folder / "notebook.ipynb"), parameters=parameters, kernel_name="mixdpo-runner",
                language="python", progress_bar=False, cwd=str(store.project_root()), execution_timeout=cell_timeout)


@contextmanager
def _environment(settings: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _interruptible() -> Iterator[None]:
    """A polite end (SIGTERM, a cluster's or Snakemake's) is an interruption like Ctrl-C: evidence is kept."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _shown(log: Path, notebook: str) -> Iterator[None]:
    """Copy new lines of `log` to stderr; when none came for 12 seconds, say that the notebook still runs."""
    done, began = threading.Event(), time.monotonic()

    def follow() -> None:
        last, spoken, ended = "starting a kernel", time.monotonic(), False
        with open(log, encoding="utf-8", errors="replace") as file:
            while not ended:
                ended = done.wait(0.3)
                while line := file.readline():
                    last, spoken = line.strip().removeprefix("[mixdpo] "), time.monotonic()
                    print(line.rstrip(), file=sys.stderr, flush=True)
                if time.monotonic() - spoken > _HEARTBEAT_S and not ended:
                    spoken = time.monotonic()
                    print(f"[mixdpo] {notebook}: still running, {spoken - began:.0f} s, last: {last}", file=sys.stderr,
                          flush=True)

    thread = threading.Thread(target=follow, daemon=True)
    print(f"[mixdpo] {notebook}: started", file=sys.stderr, flush=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _keep_evidence(notebook: str, partial: Path, failed: Path, error: BaseException) -> RunFailed:
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    (partial / "error.txt").write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    failed.mkdir(parents=True, exist_ok=True)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    kept = failed / f"{notebook}-{stamp}"
    while kept.exists():
        kept = kept.with_name(kept.name + "a")
    shutil.move(partial, kept)
    if isinstance(error, PapermillExecutionError):
        first = (str(error.evalue).strip().splitlines() or [""])[0]
        cause = f"cell [{error.exec_count}] failed: {error.ename}: {first}"
    elif isinstance(error, CellTimeoutError):
        cause = "a cell took longer than allowed (--cell-timeout)"
    elif isinstance(error, DeadKernelError):
        cause = "the kernel died (often: out of memory, or killed)"
    elif isinstance(error, KeyboardInterrupt):
        cause = "interrupted"
    else:
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
    message = f"{notebook}: {cause}; evidence in {kept}; earlier results are untouched"
    return (RunInterrupted if isinstance(error, KeyboardInterrupt) else RunFailed)(message)


def _replace(partial: Path, folder: Path) -> None:
    old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
    if folder.exists():
        os.replace(folder, old)
    try:
        os.replace(partial, folder)
    except OSError:
        if old.exists():
            os.replace(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def reproduce(profile: str = "default", cores: int = 2, extra: Sequence[str] = (), everything: bool = False) -> None:
    """The main study of a profile, in the order of its needs, by Snakemake; what is up to date does not run again.

    The main study is the notebooks of MAIN; with `everything` the ablations and further studies run too.
    When notebooks ran, `runs/<profile>/timing.json` says how long it took (from MIXDPO_STARTED, seconds since 1970, if
    that is set: `make` counts the environment in) and the peak memory of the largest process.
    """
    root = store.project_root()
    names = [name for name in notebook_names() if everything or name.startswith(MAIN)]
    profile_values(profile, "")
    if not names:
        raise MixDPOError(f"{root / 'notebooks'}: found no notebooks")
    for name in names:
        resolve_parameters(name, profile)       # every error in the profile before anything starts
    began = float(os.environ.get("MIXDPO_STARTED") or time.time())
    manifests = {name: root / "runs" / profile / name / "manifest.json" for name in names}

    def times() -> dict[str, int]:
        return {name: path.stat().st_mtime_ns for name, path in manifests.items() if path.exists()}

    before = times()
    targets = [str(path.relative_to(root)) for path in manifests.values()]
    command = [sys.executable, "-m", "snakemake", *targets, "-s", str(root / "workflow" / "Snakefile"),
               "--directory", str(root), "--config", f"profile={profile}", "--cores", str(cores),
               "--rerun-incomplete", "--nolock", "--quiet", "all", *extra]
    with store.locked(root / "runs" / ".reproduce.lock", "make reproduce"):
        code = subprocess.run(command, cwd=root).returncode
    if code:
        raise MixDPOError(f"profile {profile}: not finished (see the line above; what Snakemake says: mixdpo reproduce "
                          f"--profile {profile} -- --quiet host); what is done is kept, start again to go on from it")
    after = times()
    ran = [name for name in names if after.get(name) != before.get(name)]
    if not ran:
        store.note(f"profile {profile}: everything is up to date in {root / 'runs' / profile}")
        return
    path = root / "runs" / profile / ("timing_everything.json" if everything else "timing.json")
    timing = {"minutes": round((time.time() - began) / 60, 2), "complete": ran == names,
              "peak_mb": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024),
              "notebooks": {name: store.read_json(manifests[name])["seconds"] for name in ran}}
    if timing["complete"] or not path.exists() or not store.read_json(path)["complete"]:
        store.write_json_atomic(path, timing)
    store.note(f"profile {profile}: {len(ran)} notebooks in {timing['minutes']:.1f} minutes, results in {path.parent}")


def update_reference(profile: str = "default") -> Path:
    """Copy figures, tables, values and manifests of a finished profile to `figures/reference`, values merged.

    A notebook without a finished run keeps its earlier record, whose manifest names the library it was made with; so do
    times that were not measured anew. Files over 1 MB stay out and are named in the copied manifest as `left_out`.
    Minutes come from `timing.json` of the default and the smoke profile.
    """
    root = store.project_root()
    target = root / "figures" / "reference"
    fresh = target.with_name(f".reference.part-{os.getpid()}")
    shutil.rmtree(fresh, ignore_errors=True)
    known = store.read_json(target / "values.json") if (target / "values.json").exists() else {}
    values: dict[str, Any] = {name: value for name, value in known.items()
                              if name.startswith(("minutes_", "peak_gb_"))}
    for name in notebook_names():
        source, copy = root / "runs" / profile / name, fresh / name
        again = (source / "manifest.json").exists()
        if again:
            manifest = verify_manifest(source)
            kept = ("tables", "figures", "values.json")
            manifest["left_out"] = [n for n, e in manifest["outputs"].items()
                                    if e["bytes"] > _LARGE or n.split("/")[0] not in kept]
            for file in set(manifest["outputs"]) - set(manifest["left_out"]):
                (copy / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source / file, copy / file)
            store.write_json_atomic(copy / "manifest.json", manifest)
        elif (target / name / "manifest.json").exists():
            verify_manifest(target / name)
            shutil.copytree(target / name, copy)
        else:
            raise MixDPOError(f"profile {profile}: no finished run of {name}; run `make reproduce-all "
                              f"PROFILE={profile}` first")
        for key, value in load_values(profile if again else "reference", name).items():
            if key in values:
                raise MixDPOError(f"{name}: value {key} is there twice: also in {values[key]['runs'][0]}; rename one")
            values[key] = value
    for one in ("default", "smoke"):
        timing = root / "runs" / one / "timing.json"
        if timing.exists():
            found = store.read_json(timing)
            if not found["complete"]:
                raise MixDPOError(f"{timing}: the run was not in one piece; remove runs/{one} and make it again")
            values[f"minutes_{one}"] = {"value": found["minutes"], "unit": "min", "interval": None, "n": 1,
                                        "seeds": None, "runs": [f"make reproduce PROFILE={one}"]}
            values[f"peak_gb_{one}"] = {"value": round(found["peak_mb"] / 1024, 2), "unit": "GiB", "interval": None,
                                        "n": 1, "seeds": None, "runs": [f"make reproduce PROFILE={one}"]}
    everything = root / "runs" / "default" / "timing_everything.json"
    if everything.exists():
        found = store.read_json(everything)
        values["minutes_further"] = {"value": found["minutes"], "unit": "min", "interval": None, "n": 1, "seeds": None,
                                     "runs": [f"make reproduce-all, for {', '.join(found['notebooks'])}"]}
    store.write_json_atomic(fresh / "values.json", values)
    _replace(fresh, target)
    readme = root / "README.md"
    if readme.exists():
        readme.write_text(with_results(readme.read_text(encoding="utf-8"), values), encoding="utf-8")
    return target


# ------------------------------------------------------------------------------------------------------------- README
def _quoted(values: Mapping[str, Mapping[str, Any]], name: str, digits: int) -> str:
    if name not in values:
        return "–"
    value = values[name]
    signed = f"{value['value']:+.{digits}f}" if "gain" in name else f"{value['value']:.{digits}f}"
    return signed if not value["interval"] else signed + " [{:.{d}f}, {:.{d}f}]".format(*value["interval"], d=digits)


def readme_blocks(values: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The tables of README, from the values of the reference run: block name and its lines."""
    def q(name: str, digits: int = 3) -> str:
        return _quoted(values, name, digits)

    results = ["| Mix-DPO minus DPO, test prompts | random pairs, noisy labels | clean pairs |", "|---|---|---|"]
    for label, name in (("accuracy, mean of the groups", "accuracy_gain_mean"),
                        ("accuracy, worst group", "accuracy_gain_worst")):
        results.append(f"| {label} | {q(name)} | {q(name + '_clean')} |")
    results.append(f"| hidden groups found (NMI, median of seeds) | {q('user_nmi_median', 2)} | "
                   f"{q('user_nmi_median_clean', 2)} |")
    results += ["", "| texts at matched KL, evaluation judges | gain over DPO | KL, nats (DPO) | perplexity (DPO) |",
                "|---|---|---|---|"]
    for reward in ("sentiment", "informativeness", "grammar"):
        results.append(f"| {reward} of the expert that serves it | {q('reward_gain_' + reward)} | "
                       f"{q('kl_expert_' + reward, 1)} ({q('kl_dpo', 1)}) | "
                       f"{q('perplexity_expert_' + reward, 0)} ({q('perplexity_dpo', 0)}) |")
    results += ["", "Brackets: 95 % intervals over prompts, all seeds together; for NMI the lowest and highest seed."]
    further = ["| accuracy on test prompts | gain over DPO |", "|---|---|",
               f"| new users by metadata alone | {q('gain_metadata_0_pairs')} |",
               f"| new users by 16 comparisons of their own | {q('gain_pairs_16_pairs')} |",
               *(f"| {domain}s, MoE-DPO by the likelier expert | {q('moe_top_1_gain_over_dpo_' + domain)}; over DPO"
                 f" after its last step {q('moe_top_1_gain_over_dpo_last_step_' + domain)} |"
                 for domain in ("book", "film")),
               "",
               f"Against experts that were told the domain, MoE-DPO by the likelier expert: "
               f"{q('moe_top_1_gain_over_oracle_mean')}. Share of held-out prompts that the gate routes right: "
               f"{q('gate_accuracy_moe_dpo_prompt')}; about works that the base hardly knows: "
               f"{q('gate_accuracy_moe_dpo_less_known')}."]
    downloads = {"smoke": "packages, 13 + 93 MB of data", "default": "the same"}
    costs = ["| command | minutes on 2 cores | downloads |", "|---|---|---|"]
    costs += [f"| `make reproduce{'' if one == 'default' else ' PROFILE=' + one}` | {q('minutes_' + one, 0)} | "
             f"{downloads[one]} |" for one in ("smoke", "default")]
    costs.append(f"| `make reproduce-all`: ablations and further studies as well | {q('minutes_further', 0)} more | "
                 "nothing more |")
    return {"results": "\n".join(results), "further": "\n".join(further), "costs": "\n".join(costs)}


def with_results(readme: str, values: Mapping[str, Mapping[str, Any]]) -> str:
    """README with the blocks between `<!-- name ... -->` and `<!-- end of name -->` written anew."""
    for name, text in readme_blocks(values).items():
        pattern = re.compile(rf"(<!-- {name}\b[^\n]*-->\n).*?(<!-- end of {name} -->)", re.DOTALL)
        found = list(pattern.finditer(readme))
        if len(found) != 1:
            raise MixDPOError(f"README.md: found {len(found)} blocks named {name}, expected one")
        (block,) = found
        readme = f"{readme[:block.start()]}{block[1]}{text}\n{block[2]}{readme[block.end():]}"
    return readme


def clean(everything: bool = False) -> list[Path]:
    """Remove results and computed files (`runs/`, `data/cache`); with `everything` also what was downloaded."""
    root = store.project_root()
    gone = [path for path in (root / "runs", root / ".snakemake", store.cache_folder(),
                              *([store.raw_folder()] if everything else [])) if path.exists()]
    for path in gone:
        shutil.rmtree(path)
    return gone
