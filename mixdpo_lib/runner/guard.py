"""What is done when a command is killed? `python -m mixdpo_lib.runner.guard PLAN`, started by `ending.guarded`.

A killed process can do nothing any more: this one waits beside it until its standard input ends.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from typing import Any

from .ending import end_marked
from .evidence import KILLED, put_aside


def watch(
    name: str,
    value: str,
    grace: float = 0.0,
    evidence: tuple[str, str, str] | None = None,
    scratch: str | None = None,
) -> None:
    """Wait for the end of the process that holds standard input; if it was killed, do its last duties.

    Parameters
    ----------
    name, value : processes with this in their environment end too,
    grace : after so many seconds in which they may do so themselves.
    evidence : notebook, folder of its unfinished result, and where such folders are kept.
    scratch : a folder to remove.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.chdir("/")
    if os.read(0, 1):  # a byte: it has ended as it should
        return
    end_marked(name, value, grace)
    if evidence is not None:
        put_aside(*evidence, KILLED)
    if scratch is not None:
        shutil.rmtree(scratch, ignore_errors=True)


def _plan(text: str) -> dict[str, Any]:
    plan: dict[str, Any] = json.loads(text)
    return plan


if __name__ == "__main__":
    watch(**_plan(sys.argv[1]))
