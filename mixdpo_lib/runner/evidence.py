"""What is left of a run that did not finish?"""

from __future__ import annotations

import os
import shutil
import time
import traceback
from contextlib import suppress
from pathlib import Path

from .. import store
from ..store import MixDPOError
from . import ending

KILLED = "the runner of this notebook was killed (SIGKILL, out of memory, power)\n"


class RunFailed(MixDPOError):
    """A notebook did not finish; the message names the cause and the folder with the evidence."""

    exit_code = 1


class RunInterrupted(RunFailed):
    """Somebody ended the run: Ctrl-C, a cluster, a closed terminal, Snakemake."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.exit_code = ending.exit_code()


def put_aside(notebook: str, partial: str | Path, failed: str | Path, said: str) -> Path | None:
    """Move the folder of an unfinished run to `failed`; None: somebody else has done it.

    said : goes into its error.txt.

    Raises
    ------
    MixDPOError : it cannot be written there.
    """
    kept = Path(failed) / f"{notebook}-{time.strftime('%Y%m%d-%H%M%S')}"
    with store.writing_to(Path(failed)):
        Path(failed).mkdir(parents=True, exist_ok=True)
        while kept.exists():
            kept = kept.with_name(kept.name + "a")
        try:
            os.replace(partial, kept)
        except FileNotFoundError:
            return None
        except OSError:  # another device
            shutil.move(partial, kept)
        with suppress(OSError):  # on a full disk the notebook is kept at least
            (kept / "error.txt").write_text(said, encoding="utf-8")
    return kept


def keep_evidence(notebook: str, partial: Path, failed: Path, error: BaseException) -> RunFailed:
    """Put a failed run aside; the error that says why it failed and where it is."""
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    interrupted = isinstance(error, KeyboardInterrupt)
    try:
        said = "".join(traceback.format_exception(error))
        kept = f"evidence in {put_aside(notebook, partial, failed, said)}"
    except (OSError, MixDPOError) as refused:
        kept = f"no evidence could be kept ({refused})"
    if isinstance(error, PapermillExecutionError):
        line = (str(error.evalue).strip().splitlines() or [""])[0]
        cause = f"cell [{error.exec_count}] failed: {error.ename}: {line}"
    elif isinstance(error, CellTimeoutError):
        cause = "a cell took longer than allowed (--cell-timeout)"
    elif isinstance(error, DeadKernelError):
        cause = "the kernel died (often: out of memory, or killed)"
    elif interrupted:
        cause = "interrupted"
    else:
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
    message = f"{notebook}: {cause}; {kept}; earlier results are untouched"
    return (RunInterrupted if interrupted else RunFailed)(message)


def _beside(folder: Path, kind: str) -> list[Path]:
    """What lies beside a folder as `.<its name><kind>...`; a name may hold anything, so nothing is matched by pattern."""
    if not folder.parent.is_dir():
        return []
    return [
        path for path in folder.parent.iterdir() if path.name.startswith(f".{folder.name}{kind}")
    ]


def tidy(notebook: str, folder: Path, failed: Path) -> None:
    """What a killed runner left beside `folder`: unfinished results go to `failed`, an earlier one comes back."""
    for left_over in _beside(folder, ".part-"):
        put_aside(notebook, left_over, failed, KILLED)
    for old in _beside(folder, ".old-"):
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:  # killed between the two steps of `replace_folder`
            os.replace(old, folder)


def replace_folder(partial: Path, folder: Path) -> None:
    """Put a finished folder in the place of an earlier one, which comes back if that fails."""
    old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
    with ending.held(), store.writing_to(folder.parent):
        if folder.exists():
            os.replace(folder, old)
        try:
            os.replace(partial, folder)
        except BaseException:
            if old.exists():
                os.replace(old, folder)
            raise
        shutil.rmtree(old, ignore_errors=True)
