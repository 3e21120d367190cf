"""How long until something happens? A process that imports the library, and `mixdpo --help`."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.speed.measuring import Row, in_turns, row
from benchmarks.speed.records import ROOT

SETTINGS: dict[str, Any] = {"turns": 9}
QUICK = {"turns": 2}
COMMANDS = {
    "python -c pass": (["-c", "pass"], None),
    "import mixdpo_lib": (["-c", "import mixdpo_lib"], 0.3),
    "mixdpo --help": (["-m", "mixdpo_lib.cli", "--help"], 0.7),
}


def measure(settings: dict[str, Any], device: str, folder: Path) -> list[Row]:
    """Seconds of whole processes, Python's own start included."""
    calls = {
        name: partial(
            subprocess.run, [sys.executable, *rest], cwd=ROOT, check=True, capture_output=True
        )
        for name, (rest, _) in COMMANDS.items()
    }
    seconds = in_turns(calls, settings["turns"], warm_up=1)
    return [
        row(name, "s", seconds[name], None if aim is None else ("<=", aim))
        for name, (_, aim) in COMMANDS.items()
    ]
