"""The short form of the harness: kills, full disks, damage and changed texts, all of one seed."""

import subprocess
import sys
from pathlib import Path


def test_nothing_is_lost_and_nothing_wrong_is_taken():
    command = [sys.executable, str(Path(__file__).with_name("harness.py"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    total = done.stdout.split("| **all** | ")[1].split("\n")[0].strip(" |").split(" | ")
    tries, recovered, clear, *bad = map(int, total)
    assert tries == recovered + clear == 178 and recovered > 40 and clear > 40 and not any(bad)
