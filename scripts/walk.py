"""Which files does a fit enter, and how often does a call climb back up?

`python scripts/walk.py` fits a small mixture on a tiny random base and prints the files in the order in which they are
entered, and every climb: a call from a file of the library into a file above it. Above is a wing of a higher layer
(house.py), or in the same wing a file that imports the caller's, directly or through others. A call that another
library makes (a callback) counts from the nearest file of this library below it on the stack. Bodies of modules, which
run once when they are imported, do not count.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

sys.path[:0] = [
    str(Path(__file__).resolve().parent),
    str(Path(__file__).resolve().parents[1] / "tests"),
]

from house import LEVEL, LIBRARY, edges, reachable, rooms, wing  # noqa: E402


@dataclass
class Walk:
    """Rooms in the order in which they were entered, and climbs: (from, to) with the places of the first call."""

    entered: list[str] = field(default_factory=list)
    climbs: dict[tuple[str, str], str] = field(default_factory=dict)


def trace(what: Callable[[], Any]) -> Walk:
    """Call `what` and watch which rooms of the library it enters."""
    place = {str(path): name for name, path in rooms().items()}
    above: dict[str, set[str]] = {}
    for who, below in reachable(edges()).items():
        for whom in below:
            above.setdefault(whom, set()).add(who)
    walk, library = Walk(), str(LIBRARY)

    def climbs(caller: str, called: str) -> bool:
        if wing(caller) != wing(called):
            return LEVEL[wing(called)] > LEVEL[wing(caller)]
        return called in above.get(caller, ())

    def nearest(frame: FrameType | None) -> FrameType | None:
        while frame is not None and not frame.f_code.co_filename.startswith(library):
            frame = frame.f_back
        return frame

    def watch(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if (
            event != "call"
            or code.co_name == "<module>"
            or not code.co_filename.startswith(library)
        ):
            return
        called = place.get(code.co_filename)
        if called is None:
            return
        if called not in walk.entered:
            walk.entered.append(called)
        below = nearest(frame.f_back)
        if below is None or below.f_code.co_name == "<module>":
            return
        caller = place.get(below.f_code.co_filename)
        if caller is not None and caller != called and climbs(caller, called):
            where = f"{below.f_code.co_qualname} (line {below.f_lineno}) -> {code.co_qualname}"
            walk.climbs.setdefault((caller, called), where)

    sys.setprofile(watch)
    try:
        what()
    finally:
        sys.setprofile(None)
    return walk


def small_fit(folder: Path) -> Walk:
    """The walk of `mx.fit` with two heads and learned weights on a tiny random base."""
    from tiny import plain_fit, preference_rows, save_tiny_base

    import mixdpo_lib as mx

    base = mx.load_base(save_tiny_base(folder))
    policy = mx.MixturePolicy(mx.HeadExperts(base, n_experts=2), mx.LearnedWeights(2))
    rows, config, fit = preference_rows(n=24), plain_fit(passes=2.0, batch_size=8), mx.fit
    return trace(lambda: fit(policy, rows, config, validation=rows))


def main() -> None:
    """Print the walk of a small fit."""
    with tempfile.TemporaryDirectory() as folder:
        walk = small_fit(Path(folder))
    print(f"{len(walk.entered)} files entered: {', '.join(walk.entered)}")
    print(f"{len(walk.climbs)} climbs")
    for (caller, called), where in walk.climbs.items():
        print(f"  {caller} -> {called}: {where}")


if __name__ == "__main__":
    main()
