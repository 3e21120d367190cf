"""How does a command end that is asked to, and what ends with it?

A signal becomes one exception in the main thread. Processes that a command starts carry a mark in their environment, by
which they are found whatever session they are in. A guard (`guard.py`), which outlives the command by seconds, ends them
when the command itself was killed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from ..store import MixDPOError

GRACE_S = 10.0  # seconds in which what was asked to end may still keep its evidence
COMMAND = "MIXDPO_PROCESSES"  # in the environment of all that one `mixdpo reproduce` starts
KERNEL = "MIXDPO_RUN_FOLDER"  # in that of a notebook's kernel and of what it starts
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_asked: list[int] = []
_held: list[bool] = []
_first: list[Callable[[], None]] = []


class Interrupted(KeyboardInterrupt):
    """A signal asked this process to end: Ctrl-C, a cluster, a closed terminal."""


def exit_code() -> int:
    """128 and the number of the signal that asked this process to end (none: that of Ctrl-C).

    >>> exit_code()
    130
    """
    return 128 + (_asked[-1] if _asked else signal.SIGINT)


def _ask(number: int, _: Any = None) -> None:
    _asked.append(number)
    if not _held:
        for call in _first:
            with suppress(psutil.Error, OSError):
                call()
        raise Interrupted(number)


@contextmanager
def interruptible() -> Iterator[None]:
    """While the block runs, SIGINT, SIGTERM and SIGHUP raise `Interrupted` in the main thread.

    A SIGHUP that is ignored (nohup) stays so. In another thread, and within such a block, nothing
    changes.
    """
    main = threading.current_thread() is threading.main_thread()
    before: dict[signal.Signals, Any] = {}
    if main and signal.getsignal(signal.SIGTERM) is not _ask:
        _asked.clear()
        for number in _SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, _ask)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


@contextmanager
def held(last: bool = False) -> Iterator[None]:
    """What must not be cut in two: a signal waits until the block is done.

    last : the process is ending anyway, the signal is forgotten.
    """
    count = len(_asked)
    _held.append(True)
    try:
        yield
    finally:
        _held.pop()
    if not last and not _held and len(_asked) > count:
        raise Interrupted(_asked[-1])


@contextmanager
def first(call: Callable[[], None]) -> Iterator[None]:
    """While the block runs, a signal calls `call` before it raises `Interrupted`."""
    _first.append(call)
    try:
        yield
    finally:
        _first.remove(call)


def marked(name: str, value: str) -> list[psutil.Process]:
    """Processes of this user that were started with `name=value` in their environment."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and process.environ().get(name) == value:
                if process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
    return found


def _is_kernel(process: psutil.Process) -> bool:
    with suppress(psutil.Error, OSError):
        return KERNEL in process.environ()
    return True


def _send(processes: Sequence[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with suppress(psutil.Error, OSError):
            process.send_signal(number)


def interrupt_kernel(folder: str) -> None:
    """Ctrl-C for the kernel of the run in this folder: its cell stops and tidies up."""
    mine = [one for one in marked(KERNEL, folder) if one.ppid() == os.getpid()]
    _send(mine, signal.SIGINT)


def end_marked(name: str, value: str, grace: float = 0.0) -> None:
    """End every process with this mark: politely, and after `grace` seconds for good.

    Kernels are not asked: their runner ends them, and keeps what they have left.
    """
    try:
        if grace and (left := marked(name, value)):
            _send([process for process in left if not _is_kernel(process)], signal.SIGTERM)
            until = time.monotonic() + grace
            while marked(name, value) and time.monotonic() < until:
                time.sleep(0.1)
    finally:
        for _ in range(50):
            left = marked(name, value)
            if not left:
                break
            _send(left, signal.SIGKILL)
            time.sleep(0.1)


@contextmanager
def guarded(name: str, value: str, **plan: Any) -> Iterator[None]:
    """While the block runs, a guard waits beside this process, and takes over if that is killed.

    plan : what the guard does, see `guard.watch`.

    Raises
    ------
    MixDPOError : no process can be started.
    """
    plan |= {"name": name, "value": value}
    try:
        guard = subprocess.Popen(
            [sys.executable, "-m", "mixdpo_lib.runner.guard", json.dumps(plan)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # what is sent to a terminal's processes does not reach it
            env={n: text for n, text in os.environ.items() if n not in (COMMAND, KERNEL)},
        )
    except OSError as error:
        raise MixDPOError(f"{sys.executable}: could not be started ({error})") from error
    try:
        yield
    finally:
        with held(last=True), suppress(OSError, subprocess.TimeoutExpired):
            guard.communicate(b".", timeout=GRACE_S)


def run_to_end(command: Sequence[str], cwd: Path) -> int:
    """Status of a command that has ended together with all that it started.

    What asks this process to end is passed on. So does the end of the process that MIXDPO_PARENT
    names, if that is this one's parent: of `make`, which cannot pass on that it was killed.

    Raises
    ------
    Interrupted : after everything has ended.
    """
    mark, parent = uuid.uuid4().hex, os.environ.get("MIXDPO_PARENT")
    watched = parent if parent == str(os.getppid()) else None
    process: subprocess.Popen | None = None
    with interruptible(), guarded(COMMAND, mark, grace=GRACE_S):
        try:
            with held():
                process = subprocess.Popen(
                    command,
                    cwd=cwd,
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                    env={**os.environ, COMMAND: mark},
                )
            while True:
                try:
                    return process.wait(1.0 if watched else None)
                except subprocess.TimeoutExpired:
                    if watched != str(os.getppid()):
                        _ask(signal.SIGHUP)
        except OSError as error:
            raise MixDPOError(f"{command[0]}: could not be started ({error})") from error
        finally:
            end_marked(COMMAND, mark, GRACE_S)
            if process is not None:
                with held(last=True), suppress(subprocess.TimeoutExpired):
                    process.wait(1.0)
