"""One notebook, executed and recorded."""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .. import store
from ..store import MixDPOError
from .notebooks import notebook_path
from .parameters import COMMON, resolve_parameters
from .results import verify_manifest

_HEARTBEAT_S = 12.0


class RunFailed(MixDPOError):
    """A notebook did not finish; the message names the cause and the folder with the evidence."""

    exit_code = 1


class RunInterrupted(RunFailed):
    """Somebody ended the run: Ctrl-C, a cluster, Snakemake."""

    exit_code = 130


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
    """
    path = notebook_path(notebook)
    notebook = path.stem
    parameters = resolve_parameters(notebook, profile, overrides)
    runs = store.project_root() / "runs"
    folder = runs / profile / notebook
    if output is not None:
        folder = Path(output).expanduser().resolve()
        if folder.exists() and any(folder.iterdir()) and not (folder / "manifest.json").exists():
            raise MixDPOError(
                f"{folder}: found a folder that is not an earlier run; name an empty or new one"
            )
    elif overrides:
        folder = runs / "custom" / f"{notebook}-{store.artefact_key('custom', 1, parameters)[:10]}"
    with store.locked(folder.with_name(f".{folder.name}.lock"), notebook):
        for left_over in folder.parent.glob(f".{folder.name}.part-*"):
            shutil.rmtree(left_over, ignore_errors=True)
        partial = folder.with_name(f".{folder.name}.part-{os.getpid()}")
        partial.mkdir(parents=True)
        began = time.monotonic()
        try:
            settings = {
                "MIXDPO_PROFILE": profile,
                "MIXDPO_COMMAND": _command(notebook, profile, overrides or {}),
            }
            _execute(path, partial, parameters, settings, cell_timeout)
            manifest = verify_manifest(partial)
            if (manifest["notebook"], manifest["parameters"]) != (
                notebook,
                json.loads(json.dumps(parameters)),
            ):
                raise MixDPOError(
                    f"manifest.json is of {manifest['notebook']} with {manifest['parameters']}, "
                    f"expected {notebook} with {parameters}; see start_run(...) in the notebook"
                )
        except BaseException as error:
            raise _keep_evidence(notebook, partial, runs / "failed", error) from error
        replace_folder(partial, folder)
    print(
        f"[mixdpo] {notebook}: finished in {time.monotonic() - began:.0f} s, results in {folder}",
        file=sys.stderr,
        flush=True,
    )
    return folder


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


def _execute(
    path: Path,
    folder: Path,
    parameters: dict[str, Any],
    settings: Mapping[str, str],
    cell_timeout: int | None,
) -> None:
    import papermill

    with tempfile.TemporaryDirectory(prefix="mixdpo-") as scratch:
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
        log = Path(scratch) / "progress.log"
        log.touch()
        threads = os.environ.get(
            "OMP_NUM_THREADS", "2"
        )  # fixed: sums differ with the number of threads
        settings = {
            **settings,
            "JUPYTER_PATH": scratch,
            "IPYTHONDIR": f"{scratch}/ipython",
            "PYTHONHASHSEED": "0",
            "MIXDPO_RUN_FOLDER": str(folder),
            "MIXDPO_PROGRESS": str(log),
            "OMP_NUM_THREADS": threads,
            "MPLBACKEND": "module://matplotlib_inline.backend_inline",
            "MIXDPO_ROOT": str(store.project_root()),
            "TOKENIZERS_PARALLELISM": "false",
        }
        with _environment(settings), _shown(log, path.stem) as cell, _interruptible():
            papermill.execute_notebook(
                str(path),
                str(folder / "notebook.ipynb"),
                parameters=parameters,
                kernel_name="mixdpo-runner",
                engine_name=_engine(cell),
                language="python",
                progress_bar=False,
                cwd=str(store.project_root()),
                execution_timeout=cell_timeout,
            )


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
    """A polite end (SIGTERM, of a cluster or Snakemake) is an interruption like Ctrl-C."""
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


def replace_folder(partial: Path, folder: Path) -> None:
    """Put a finished folder in the place of an earlier one, which comes back if that fails."""
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
