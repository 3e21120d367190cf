"""How is time taken, and how is it said? Turns, medians and quartiles, ratios within a turn, log-log slopes."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import random
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

Row = dict[str, Any]


def row(
    what: str,
    unit: str,
    values: Sequence[float],
    aim: tuple[str, float] | None = None,
    note: str = "",
    x: float | None = None,
    line: str | None = None,
) -> Row:
    """A line of the table.

    values : one a turn, at least one; inf where a thing was never reached. aim : (">=" or "<=", number).
    line, x : of which curve of the figure this is a point, and where.
    """
    if not values or any(math.isnan(value) for value in values):
        raise ValueError(f"{what}: values={list(values)}: expected at least one, and no NaN")
    if aim is not None and aim[0] not in (">=", "<="):
        raise ValueError(f"{what}: aim={aim!r}: expected ('>=', number) or ('<=', number)")
    found: Row = {"what": what, "unit": unit, "values": [float(value) for value in values]}
    found |= {"aim": None if aim is None else list(aim), "note": note, "x": x, "line": line}
    return found


def absent(what: str, why: str) -> Row:
    """A line for what could not be measured here, such as "not installed"."""
    return {
        "what": what,
        "unit": "",
        "values": [],
        "aim": None,
        "note": why,
        "x": None,
        "line": None,
    }


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile (linear between neighbours; infinities are numbers like others)."""
    ordered = sorted(values)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
        return low if low == high else low + (place - math.floor(place)) * (high - low)

    return at(0.25), at(0.5), at(0.75)


def ratios(one: Sequence[float], other: Sequence[float]) -> list[float]:
    """one / other, turn by turn."""
    return [a / b for a, b in zip(one, other, strict=True)]


def reached(found: Row) -> bool | None:
    """Whether the median is on the right side of the aim; None without an aim or a number."""
    if found["aim"] is None or not found["values"]:
        return None
    sign, number = found["aim"]
    median = quartiles(found["values"])[1]
    return median >= number if sign == ">=" else median <= number


def in_turns(
    calls: Mapping[str, Callable[[], Any]],
    turns: int,
    warm_up: int = 3,
    least_s: float = 0.0,
    device: str = "cpu",
) -> dict[str, list[float]]:
    """Seconds of each call, one a turn: all take part in every turn, in random order; the first turns are left out.

    least_s : a call is repeated within its turn until so many seconds have passed; its mean counts.
    """
    order, seconds = random.Random(0), {name: [] for name in calls}
    for turn in range(warm_up + turns):
        for name in order.sample(list(calls), len(calls)):
            wait_for(device)
            start, times = time.perf_counter(), 0
            while times == 0 or (turn >= warm_up and time.perf_counter() - start < least_s):
                calls[name]()
                times += 1
                wait_for(device)
            if turn >= warm_up:
                seconds[name].append((time.perf_counter() - start) / times)
    return seconds


def wait_for(device: str) -> None:
    """Until the device has done what it was asked."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize()


def in_own_process(function: Callable[..., Any], *given: Any) -> Any:
    """What a function gives in a fresh process, so that its peak memory is its own; errors come through."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *given).result()


def peak_gib(device: str = "cpu") -> float:
    """Largest memory so far, GiB: resident, of this process; on a GPU what was allocated there."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def forget_peak() -> None:
    """The largest memory counts anew from here, where the system can (Linux): loading a model takes more than a step."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def exponent(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """Slope of log y on log x by least squares, with its 95 % interval (Student's t, n - 2 degrees of freedom).

    Raises
    ------
    ValueError : fewer than three points, one that is not above 0, all x equal.
    """
    if len(x) != len(y) or len(x) < 3:
        raise ValueError(f"{len(x)} and {len(y)} points: expected the same number, at least three")
    if not all(0 < value < math.inf for value in (*x, *y)) or len(set(x)) == 1:
        raise ValueError(f"x={list(x)}, y={list(y)}: expected finite numbers above 0, of several x")
    from scipy import stats

    fit = stats.linregress(np.log(x), np.log(y))
    half = float(stats.t.ppf(0.975, len(x) - 2) * fit.stderr)
    return float(fit.slope), float(fit.slope) - half, float(fit.slope) + half


def exponent_row(what: str, points: Sequence[Row]) -> Row:
    """The exponent of the medians of these rows in their x, as a line of the table: slope, ends of its interval."""
    y = [statistics.median(point["values"]) for point in points]
    slope, low, high = exponent([point["x"] for point in points], y)
    span = f"{points[0]['x']:g} ... {points[-1]['x']:g}"
    return row(what, "exponent", [low, slope, high], note=f"{span}; in brackets its 95 % interval")
