"""Whole commands are ended, by any signal to any of their processes: nothing computes on, and a second start finishes."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import yaml
from work import digest

from mixdpo_lib.runner import ending, results

ROOT = Path(__file__).parents[2]
NAMES = ("01_first", "02_second")
CODE = """import time
import pandas as pd
from mixdpo_lib import store
from mixdpo_lib.runner import record
run = record.start_run("{name}", globals())
def build(folder):
    for step in range(10):
        (folder / f"{{step}}.txt").write_text(str(step * seeds[0]))
        time.sleep(0.05)
folder = store.cached("small", 1, {{"of": "{name}", "seeds": seeds}}, build)
table = pd.DataFrame({{"step": range(10), "text": [(folder / f"{{i}}.txt").read_text() for i in range(10)]}})
run.table(table, "steps")
run.value("last_{name}", float(table["text"].iloc[-1]), "steps")
run.finish()"""


def project(place):
    """Two notebooks, the second of which needs the first."""
    for name in ("notebooks/profiles", "workflow", "data"):
        (place / name).mkdir(parents=True)
    shutil.copy(ROOT / "workflow" / "Snakefile", place / "workflow" / "Snakefile")
    listed = {"main": {NAMES[0]: {}, NAMES[1]: {"needs": [NAMES[0]]}}}
    (place / "workflow" / "notebooks.yaml").write_text(yaml.safe_dump(listed))
    (place / "notebooks" / "profiles" / "default.yaml").write_text("{}\n")
    for name in NAMES:
        book = nbformat.v4.new_notebook()
        book.metadata.kernelspec = {"name": "python3", "display_name": "Python 3"}
        book.cells = [nbformat.v4.new_code_cell("seeds: list[int] = [3]  # one run each")]
        book.cells[0].metadata["tags"] = ["parameters"]
        book.cells.append(nbformat.v4.new_code_cell(CODE.format(name=name)))
        nbformat.write(book, place / "notebooks" / f"{name}.ipynb")
    return place


def start(place, words):
    """`mixdpo ...` in the project."""
    unwanted = ("MIXDPO_CACHE", "MIXDPO_WHEELS", "MIXDPO_RUN_FOLDER")
    env = {name: value for name, value in os.environ.items() if name not in unwanted}
    return subprocess.Popen(
        [sys.executable, "-m", "mixdpo_lib.cli", *words],
        cwd=place,
        env=env | {"MIXDPO_ROOT": str(place), "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def came_of(place, names):
    """Digest of the checked results."""
    os.environ["MIXDPO_ROOT"] = str(place)
    for name in names:
        results.verify_manifest(place / "runs" / "default" / name)
    return digest(*(results.load_table("default", name, "steps") for name in names))


def computing(place):
    """What was started in this project and computes on; guards only wait."""
    found = []
    for one in ending.marked("MIXDPO_ROOT", str(place)):
        try:
            if "mixdpo_lib.runner.guard" not in one.cmdline() and one.pid != os.getpid():
                found.append(one)
        except psutil.Error:
            continue
    return found


def ended(table, kind, place, rng, n, words, names):
    """n times: start, end it, look what computes on, start again, compare."""
    os.environ.pop("MIXDPO_ROOT", None)
    plain = project(place / "plain")
    began = time.monotonic()
    process = start(plain, words)
    said = process.communicate()[1]
    if process.returncode:
        raise SystemExit(f"{kind}: an undisturbed run failed: {said}")
    wanted, took = came_of(plain, names), time.monotonic() - began
    os.environ.pop("MIXDPO_ROOT", None)
    for i in range(n):
        folder = project(place / f"try-{i}")
        process = start(folder, words)
        time.sleep(1.0 + rng.random() * (took - 1.0))
        number = rng.choice(
            [signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
        )
        victims = [process, *computing(folder)] if number == signal.SIGKILL else [process]
        victim = rng.choice(victims)
        try:
            victim.send_signal(number)
        except (psutil.Error, ProcessLookupError):
            pass
        told = f"{number.name} to {'the command' if victim is process else 'one of its processes'}"
        process.communicate(timeout=120)
        until = time.monotonic() + 20
        while computing(folder) and time.monotonic() < until:
            time.sleep(0.1)
        left = [" ".join(one.cmdline())[-80:] for one in computing(folder)]
        again = start(folder, words)
        try:
            said = again.communicate(timeout=180)[1]
            how = "foreign" if again.returncode else "recovered"
            if how == "recovered" and came_of(folder, names) != wanted:
                how = "wrong"
        except subprocess.TimeoutExpired:
            again.kill()
            how, said = "hangs", ""
        os.environ.pop("MIXDPO_ROOT", None)
        table.add(kind, how, told, said, left)
        shutil.rmtree(folder, ignore_errors=True)


def notebooks(table, place, rng, n):
    """`mixdpo run` of one notebook."""
    ended(table, "a notebook ended", place, rng, n, ["run", NAMES[0]], NAMES[:1])


def reproduces(table, place, rng, n):
    """`mixdpo reproduce` of both."""
    ended(table, "reproduce ended", place, rng, n, ["reproduce", "--cores", "1"], NAMES)
