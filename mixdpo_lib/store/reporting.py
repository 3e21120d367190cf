"""How far is it? Bars where somebody looks, lines where nobody does."""

from __future__ import annotations

import atexit
import math
import os
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from tqdm import tqdm

HEARTBEAT_S = 5.0  # seconds between two lines
QUIET_S = 1.0  # a stage that is over sooner needs no line, unless the runner reads it
REFRESH_S = 0.2  # seconds between two pictures of a bar
_BAR = "{desc} {bar} {n_fmt}/{total_fmt}{postfix} [{elapsed}, {remaining} left]"
_CLOCK = "{desc} [{elapsed}]"
_stages: dict[str, tuple[float, float, int]] = {}  # when each began, its last line, how far it was
_bars: dict[tuple[int, str], tqdm] = {}  # thread and stage, in the order in which they began


def _shell() -> Any:
    """IPython's shell where there is one; that of a notebook has a kernel."""
    return getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()


def _in_notebook() -> bool:
    return getattr(_shell(), "kernel", None) is not None


def _shows_bars() -> bool:
    """Whether somebody looks: a notebook or a terminal, and not the runner, which reads lines."""
    return not os.environ.get("MIXDPO_PROGRESS") and (
        _in_notebook() or bool(sys.stderr and sys.stderr.isatty())
    )


def note(text: str) -> None:
    """One line `[mixdpo] text` on stderr, in a notebook as plain output of the cell.

    Where MIXDPO_PROGRESS names a file (the runner reads it) the line goes there, from a notebook
    only there.
    """
    line, log = f"[mixdpo] {text}", os.environ.get("MIXDPO_PROGRESS")
    if log:
        with (
            suppress(OSError),
            open(log, "a", encoding="utf-8") as file,
        ):  # a full disk stops no work
            file.write(line + "\n")
    if not (log and _in_notebook()):
        stream = sys.stdout if _in_notebook() else sys.stderr
        with suppress(OSError), tqdm.external_write_mode(file=stream):  # bars step aside
            print(line, file=stream, flush=True)  # nobody who left, and no full disk, ends a fit


def progress(stage: str, done: int, total: int, text: str = "") -> None:
    """Show how far a stage is: one bar with `text` (a loss, a unit) and the time left.

    A widget in a notebook, a bar on stderr in a terminal; it goes when the stage is done. Where
    nobody looks (stderr goes to a file, MIXDPO_PROGRESS is set) it is the line
    `[mixdpo] stage done/total text`: the first time, the last, and at most every 5 seconds between;
    of a stage that is over within a second only in the log that the runner reads. Cheap enough to be called in every step.

    Parameters
    ----------
    done, total : a smaller `done` than before: the stage began anew. A stage that ends early says
        so by `total=done`. One that is interrupted loses its bar with the cell, the process or the
        stage around it.
    """
    if os.environ.get("RANK", "0") != "0":  # one of several processes speaks
        return
    if _shows_bars():
        _show_bar(stage, done, total, text)
        return
    now = time.monotonic()
    began, said, before = _stages.pop(stage, (now, -math.inf, -1))
    if done < before:  # the stage began anew
        began, said = now, -math.inf
    quiet = now - began < QUIET_S and not os.environ.get("MIXDPO_PROGRESS")
    if not quiet and (done >= total or now - said >= HEARTBEAT_S):
        said = now
        note(f"{stage} {done}/{total}" + (f" {text}" if text else ""))
    if done < total:
        _stages[stage] = (began, said, done)


def curve(values: Sequence[float]) -> str:
    """The course of a number in signs, from its lowest to its highest, and its last value; at most 24 of the latest.

    >>> curve([-0.7, -0.6, -0.55, -0.5])
    '▁▅▆█ -0.500'
    """
    if not values:
        return ""
    shown = [value for value in values[-24:] if math.isfinite(value)]
    low, high = min(shown, default=0.0), max(shown, default=0.0)
    steps = [round(7 * (value - low) / (high - low)) if high > low else 0 for value in shown]
    return "".join("▁▂▃▄▅▆▇█"[step] for step in steps) + f" {values[-1]:.3f}"


def _show_bar(stage: str, done: int, total: int, text: str) -> None:
    key = (threading.get_ident(), stage)
    mine = [other for other in _bars if other[0] == key[0]]
    inside = mine[mine.index(key) + 1 :] if key in mine else []
    for left in inside:  # stages that began within this one, and did not end
        _bars.pop(left).close()
    bar = _bars.get(key)
    if bar is not None and (done < bar.n or (total != bar.total and done < total)):
        _bars.pop(key).close()  # the stage began anew
        bar = None
    if bar is None:
        if done < total:  # what is done at once needs no bar
            _bars[key] = _open_bar(stage, done, total, text)
        return
    bar.total = total
    bar.set_postfix_str(text, refresh=False)
    bar.update(done - bar.n)
    if done >= total:
        _bars.pop(key).close()


def _open_bar(stage: str, done: int = 0, total: int | None = None, text: str = "") -> tqdm:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says in red that ipywidgets is missing
        from tqdm.auto import tqdm as bar_of_this_place
    if shell := _shell():
        shell.events.register("post_run_cell", _close_bars)
    return bar_of_this_place(
        total=total,
        desc=stage,
        initial=done,
        postfix=text,
        bar_format=_CLOCK if total is None else _BAR,
        leave=False,
        dynamic_ncols=True,
        miniters=0,
        mininterval=REFRESH_S,
        smoothing=0.1,
        file=sys.stdout if _in_notebook() else sys.stderr,
    )


@atexit.register
def _close_bars(*_: Any) -> None:
    while _bars:
        _bars.popitem()[1].close()


@contextmanager
def heartbeat(text: str) -> Iterator[None]:
    """While the block runs, show a clock, or say every 5 seconds that it runs.

    For one long call that cannot report by itself.
    """
    done, began = threading.Event(), time.monotonic()
    clock = _open_bar(text) if _shows_bars() else None

    def beat() -> None:
        while not done.wait(HEARTBEAT_S if clock is None else 1.0):
            if clock is None:
                note(f"{text}: {time.monotonic() - began:.0f} s")
            else:
                clock.refresh()

    thread = threading.Thread(target=beat, daemon=True)
    if clock is None:
        note(text)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        if clock is not None:
            clock.close()
