"""One notebook, executed and recorded."""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .. import store
from ..store import MixDPOError
from . import ending
from .evidence import RunFailed as RunFailed
from .evidence import RunInterrupted as RunInterrupted
from .evidence import keep_evidence, replace_folder, tidy
from .notebooks import notebook_path
from .parameters import COMMON, resolve_parameters
from .results import not_of_the_run, read_manifest, verify_manifest

_HEARTBEAT_S = 12.0


def run_notebook(
    notebook: str,
    overrides: Mapping[str, Any] | None = None,
    *,
    profile: str = "default",
    output: str | Path | None = None,
    cell_timeout: int | None = None,
) -> Path:
    """Execute a notebook and put its recorded result into place; the folder is returned.

    Names and types of the parameters are checked before a kernel starts. The result counts only
    when papermill succeeded and the manifest verifies; it then replaces an earlier one in one step.
    A failed run leaves the earlier one alone and its own evidence in `runs/failed/`.

    Parameters
    ----------
    overrides : values beside the profile's, shared ones under "common"; the result then goes to
        `runs/custom/` and never replaces the profile's.
    output : another folder for the result; it must be absent, empty or an earlier run.
    cell_timeout : seconds that one cell may take; default no limit.

    Raises
    ------
    MixDPOError : parameters or a place that are refused before a kernel starts.
    RunFailed, RunInterrupted : the cause, and the folder with the evidence. However the run ends, its
        kernel and what that has started end too.
    """
    path = notebook_path(notebook)
    notebook = path.stem
    parameters = resolve_parameters(notebook, profile, overrides)
    runs = store.project_root() / "runs"
    folder = runs / profile / notebook
    if output is not None:
        folder = Path(output).expanduser().resolve()
        if folder.exists() and not folder.is_dir():
            raise MixDPOError(f"{folder}: found a file, expected a folder or nothing; name another")
        _check_alone(folder, notebook)
    elif overrides:
        folder = runs / "custom" / f"{notebook}-{store.artefact_key('custom', 1, parameters)[:10]}"
    with ending.interruptible(), store.locked(folder.with_name(f".{folder.name}.lock"), notebook):
        tidy(notebook, folder, runs / "failed")
        partial = folder.with_name(f".{folder.name}.part-{os.getpid()}")
        with store.writing_to(partial):
            partial.mkdir(parents=True)
        began = time.monotonic()
        try:
            settings = {
                "MIXDPO_PROFILE": profile,
                "MIXDPO_COMMAND": _command(notebook, profile, overrides or {}),
            }
            _execute(path, partial, parameters, settings, cell_timeout, runs / "failed")
            manifest = verify_manifest(partial)
            if (manifest["notebook"], manifest["parameters"]) != (
                notebook,
                json.loads(json.dumps(parameters)),
            ):
                raise MixDPOError(
                    f"manifest.json is of {manifest['notebook']} with {manifest['parameters']}, "
                    f"expected {notebook} with {parameters}; see start_run(...) in the notebook"
                )
            if output is not None:  # somebody may have put something there meanwhile
                _check_alone(folder, notebook)
        except BaseException as error:
            with ending.held(last=True):
                failed = keep_evidence(notebook, partial, runs / "failed", error)
            raise failed from error
        replace_folder(partial, folder)
    what = folder.relative_to(runs) if folder.is_relative_to(runs) else folder
    print(
        f"[mixdpo] {notebook}: finished in {time.monotonic() - began:.0f} s, results in {folder}; to look: "
        f"{shlex.join([_shown_program(), 'open', what.as_posix()])}",
        file=sys.stderr,
        flush=True,
    )
    return folder


def _check_alone(folder: Path, notebook: str) -> None:
    """Refuse a folder for a result that holds anything but an earlier one of the same notebook."""
    if foreign := not_of_the_run(folder):
        beside = " beside an earlier run" if (folder / "manifest.json").exists() else ""
        raise MixDPOError(
            f"{folder}: found {', '.join(foreign[:3])}{beside}, which would be lost; name an empty or new folder, or one that "
            "holds an earlier run alone"
        )
    manifest = folder / "manifest.json"
    earlier = read_manifest(manifest).get("notebook", notebook) if manifest.exists() else notebook
    if earlier != notebook:
        raise MixDPOError(
            f"{folder}: found a run of {earlier}, which would be lost; name another folder"
        )


def _shown_program() -> str:
    """What starts this program in the folder of the project: its short name where a shell finds it."""
    own = Path(sys.executable).with_name("mixdpo")
    if shutil.which("mixdpo") or not own.is_relative_to(Path.cwd()):
        return "mixdpo"
    return own.relative_to(Path.cwd()).as_posix()


def _command(notebook: str, profile: str, overrides: Mapping[str, Any]) -> str:
    """What to type for this run again.

    >>> _command("04_mix_dpo", "smoke", {"seeds": [0], "common": {"n_prompts": 300}})
    "mixdpo run 04_mix_dpo --profile smoke -p 'seeds=[0]' -p common.n_prompts=300"
    """
    flat = {name: value for name, value in overrides.items() if name != COMMON}
    flat |= {f"{COMMON}.{name}": value for name, value in overrides.get(COMMON, {}).items()}
    chosen = [
        word
        for name, value in flat.items()
        for word in ("-p", f"{name}={json.dumps(value, ensure_ascii=False)}")
    ]
    return shlex.join(["mixdpo", "run", notebook, "--profile", profile, *chosen])


def _papermill() -> Any:
    """papermill, without the grammar of internet addresses that jsonschema builds for a second, and no notebook needs."""
    grammar = "rfc3987_syntax"
    known = sys.modules.setdefault(grammar, None)  # type: ignore[arg-type]
    try:
        import papermill
    finally:
        if known is None:
            del sys.modules[grammar]
    return papermill


def _execute(
    path: Path,
    folder: Path,
    parameters: dict[str, Any],
    settings: Mapping[str, str],
    cell_timeout: int | None,
    failed: Path,
) -> None:
    papermill = _papermill()
    mark = (ending.KERNEL, str(folder))
    with (
        _scratch() as scratch,
        ending.guarded(*mark, evidence=(path.stem, str(folder), str(failed)), scratch=scratch),
    ):
        kernel = (
            Path(scratch) / "kernels" / "mixdpo-runner"
        )  # this very interpreter, whatever is registered
        kernel.mkdir(parents=True)
        store.write_json_atomic(
            kernel / "kernel.json",
            {
                "argv": [
                    sys.executable,
                    "-m",
                    "ipykernel_launcher",
                    "--log-level=50",
                    "-f",
                    "{connection_file}",
                ],
                "display_name": "mixdpo runner",
                "language": "python",
            },
        )
        logging.getLogger("papermill").setLevel(
            logging.ERROR
        )  # its guesses about parameters; ours are checked
        logging.getLogger("asyncio").addFilter(_of_interest)
        log = Path(scratch) / "progress.log"
        log.touch()
        (Path(scratch) / "tmp").mkdir()
        threads = os.environ.get(
            "OMP_NUM_THREADS", "2"
        )  # fixed: sums differ with the number of threads
        settings = {
            **settings,
            "JUPYTER_DATA_DIR": scratch,  # nothing of a notebook's run lies in the home folder
            "JUPYTER_RUNTIME_DIR": f"{scratch}/runtime",
            "IPYTHONDIR": f"{scratch}/ipython",
            "TMPDIR": f"{scratch}/tmp",  # goes with the rest, however the kernel ends
            "PYTHONHASHSEED": "0",
            ending.KERNEL: str(folder),
            "MIXDPO_PROGRESS": str(log),
            "OMP_NUM_THREADS": threads,
            "MPLBACKEND": "module://matplotlib_inline.backend_inline",
            "MIXDPO_ROOT": str(store.project_root()),
            "TOKENIZERS_PARALLELISM": "false",
        }
        with (
            store.writing_to(folder),
            _environment(settings),
            _shown(log, path.stem) as cell,
            ending.first(lambda: ending.interrupt_kernel(str(folder))),
        ):
            try:
                papermill.execute_notebook(
                    _literal(path),
                    _literal(folder / "notebook.ipynb"),
                    parameters=parameters,
                    kernel_name="mixdpo-runner",
                    engine_name=_engine(cell),
                    language="python",
                    progress_bar=False,
                    cwd=str(store.project_root()),
                    execution_timeout=cell_timeout,
                )
            finally:
                ending.end_marked(*mark)


def _literal(path: Path) -> str:
    """A path for papermill, which would fill in names in braces."""
    return str(path).replace("{", "{{").replace("}", "}}")


def _of_interest(record: logging.LogRecord) -> bool:
    """Whether a line of asyncio's is not about a cell that was left because somebody ended the run."""
    return "NotebookClient" not in record.getMessage()


@contextmanager
def _scratch() -> Iterator[str]:
    """A folder for what a run needs beside its result."""
    try:
        folder = tempfile.TemporaryDirectory(prefix="mixdpo-", ignore_cleanup_errors=True)
    except OSError as error:
        raise MixDPOError(
            f"no place for temporary files ({error.strerror}); name a folder that can be written in TMPDIR"
        ) from error
    with folder as scratch:
        yield scratch


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


def _engine(cell: list[str]) -> str:
    """Name of papermill's own engine that also says in `cell` which cell runs: "cell 7 of 18"."""
    from papermill.engines import NBClientEngine, papermill_engines

    class Engine(NBClientEngine):
        @classmethod
        def execute_managed_notebook(cls, nb_man: Any, kernel_name: str, **options: Any) -> Any:
            code = [index for index, one in enumerate(nb_man.nb.cells) if one.cell_type == "code"]
            start = nb_man.cell_start

            def say(one: Any, cell_index: int, **more: Any) -> None:
                if cell_index in code:
                    cell[:] = [f"cell {code.index(cell_index) + 1} of {len(code)}"]
                start(one, cell_index, **more)

            nb_man.cell_start = say
            return super().execute_managed_notebook(nb_man, kernel_name, **options)

    papermill_engines.register("mixdpo", Engine)
    return "mixdpo"


@contextmanager
def _shown(log: Path, notebook: str) -> Iterator[list[str]]:
    """Copy new lines of `log` to stderr, and the cell that runs, which the given list holds.

    When nothing was said for 12 seconds, say that the notebook still runs.
    """
    done, began, cell = threading.Event(), time.monotonic(), ["starting a kernel"]

    def follow() -> None:
        last, spoken, ended, shown = "", time.monotonic(), False, ""
        with open(log, encoding="utf-8", errors="replace") as file:
            while not ended:
                ended = done.wait(0.3)
                if cell[0] != shown and not ended:
                    shown, last, spoken = cell[0], "", time.monotonic()
                    print(f"[mixdpo] {notebook}: {shown}", file=sys.stderr, flush=True)
                while line := file.readline():
                    last, spoken = line.strip().removeprefix("[mixdpo] "), time.monotonic()
                    print(line.rstrip(), file=sys.stderr, flush=True)
                if time.monotonic() - spoken > _HEARTBEAT_S and not ended:
                    spoken = time.monotonic()
                    print(
                        f"[mixdpo] {notebook}: still running, {spoken - began:.0f} s, {shown}"
                        + (f", last: {last}" if last else ""),
                        file=sys.stderr,
                        flush=True,
                    )

    thread = threading.Thread(target=follow, daemon=True)
    print(f"[mixdpo] {notebook}: started", file=sys.stderr, flush=True)
    thread.start()
    try:
        yield cell
    finally:
        done.set()
        thread.join()
