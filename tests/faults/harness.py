"""Kills, full disks, damaged files and changed texts, by the hundred: what was recovered, what said so, what was wrong.

`python tests/faults/harness.py` is the short form that `make test` runs; `--long` the one of `make test-faults`. The
seed is printed, and `--seed` gives the same tries again (those by time but for the clock).
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "data")]

import torch  # noqa: E402

torch.set_num_threads(1)

import children  # noqa: E402
import damage  # noqa: E402
import readers  # noqa: E402
import whole  # noqa: E402
import work  # noqa: E402

import mixdpo_lib as mx  # noqa: E402

COLUMNS = ("tries", "recovered", "clear", "foreign", "wrong", "hangs", "left over")
SHORT = {"kills": 12, "full": 7, "damaged": 33, "mutations": 126, "notebooks": 0, "reproduces": 0}
LONG = {
    "kills": 184,
    "full": 60,
    "damaged": 480,
    "mutations": 2400,
    "notebooks": 8,
    "reproduces": 12,
}


class Table:
    """Counts by kind of fault and stage; `evidence` has what must not be."""

    def __init__(self):
        self.rows, self.evidence = {}, []

    def add(self, kind, ended, what, said="", left=()):
        row = self.rows.setdefault(kind, Counter({name: 0 for name in COLUMNS}))
        row["tries"] += 1
        row[ended] += 1
        row["left over"] += len(left)
        if ended in ("foreign", "wrong", "hangs") or left:
            self.evidence.append(f"{kind}: {what}: {ended}: {str(said).strip()[-600:]}")

    def text(self):
        """A table in Markdown."""
        lines = ["| fault | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
        total = Counter()
        for kind, row in self.rows.items():
            total.update(row)
            lines.append(f"| {kind} | " + " | ".join(str(row[name]) for name in COLUMNS) + " |")
        lines.append("| **all** | " + " | ".join(str(total[name]) for name in COLUMNS) + " |")
        return "\n".join(lines)


def judged(found, wanted, may_say=False):
    """How a try ended: recovered is the result of an undisturbed run, to the last bit."""
    if found["ended"] == "done":
        return "recovered" if found["said"] == wanted else "wrong"
    if found["ended"] == "clear":
        return "clear" if may_say else "wrong"
    return {"hang": "hangs", "killed": "hangs"}.get(found["ended"], "foreign")


def begin(folder):
    """A prepared folder, and the model in it."""
    work.prepare(folder)
    work.enter(folder)
    return mx.load_base(folder / "base")


def kills(table, place, rng, n):
    """SIGKILL at the change to a file, or the moment, that the seed chooses; at times twice. Then the job is done again."""
    pristine = place / "pristine"
    base = begin(pristine)
    plans = {}
    for name, job in work.KILLED.items():
        folder = damage.copy_of(pristine, place / "plan")
        work.enter(folder)
        plain = children.run(job, base, folder, events=True)
        if plain["ended"] != "done":
            raise SystemExit(f"{name}: an undisturbed run failed: {plain['said']}")
        plans[name] = plain
    killed = inside = 0
    names = list(work.KILLED)
    for i in range(n):
        name = names[i % len(names)] if i % 3 else rng.choice(["fitting", "a kept fit"])
        job, plan = work.KILLED[name], plans[name]
        folder = damage.copy_of(pristine, place / "try")
        work.enter(folder)
        said = []
        for _ in range(rng.choice([1, 1, 2])):
            found = {"ended": "", "left": []}
            if rng.random() < 0.4:
                after = rng.random() * plan["seconds"]
                found = children.run(job, base, folder, after=after)
                said.append(f"after {after:.2f} s")
            if found["ended"] != "killed":
                writing = [j for j, one in enumerate(plan["events"]) if ".writing" in one]
                chosen = writing if writing and rng.random() < 0.7 else range(len(plan["events"]))
                stop = rng.choice(chosen)
                found = children.run(job, base, folder, stop=stop)
                inside += found["ended"] == "killed" and ".writing" in plan["events"][stop]
                said.append(plan["events"][stop])
            killed += found["ended"] == "killed"
            if found["left"]:
                table.evidence.append(f"{name}: lives on: {found['left']}")
        again = children.run(job, base, folder)
        table.add(
            f"killed: {name}", judged(again, plan["said"]), said, again["said"], again["left"]
        )
    return killed, inside


def full_disks(table, place, rng, n):
    """Files may not grow beyond a size that the seed chooses: one clear error; with room the job is done."""
    pristine = place / "pristine-2"
    base = begin(pristine)
    names = [name for name in work.KILLED if name != "recording"]
    for i in range(n):
        name = names[i % len(names)]
        folder = damage.copy_of(pristine, place / "try")
        work.enter(place / "plain")
        wanted = children.run(work.KILLED[name], base, damage.copy_of(pristine, place / "plain"))
        work.enter(folder)
        size = int(10 ** rng.uniform(1, 4.5))
        found = children.run(work.KILLED[name], base, folder, largest=size)
        ended = (
            judged(found, wanted["said"], may_say=True) if wanted["ended"] == "done" else "wrong"
        )
        if ended == "clear":
            again = children.run(work.KILLED[name], base, folder)
            ended = "clear" if judged(again, wanted["said"]) == "recovered" else "wrong"
            found = again if ended == "wrong" else found
        table.add(f"no space: {name}", ended, f"{size} bytes", found["said"], found["left"])


READ = {  # what is damaged, and who reads it; of a model's own files the fingerprint may change
    "cache/reviews": "fetching",
    "cache/features": "features",
    "cache/head": "features",
    "cache/lower": "lower blocks",
    "cache/candidates": "sampling",
    "cache/fit": "a kept fit",
    "data/raw": "fetching anew",
    "fit": "fitting",
    "mixture": "serving",
    "runs": "reading",
    "base": "loading",
}
JOBS = {
    **work.KILLED,
    "fetching anew": work.fetching_anew,
    "serving": work.serving,
    "reading": work.reading,
    "loading": work.loading,
}


def damages(table, place, rng, n):
    """One file of what was made is damaged: it is noticed, or makes no difference."""
    made = place / "made"
    base = begin(made)
    for job in work.KILLED.values():
        children.run(job, base, made)
    wanted = {name: children.run(JOBS[name], base, made)["said"] for name in set(READ.values())}
    for i in range(n):
        part, name = list(READ.items())[i % len(READ)]
        folder = damage.copy_of(made, place / "try")
        work.enter(folder)
        files = sorted(p for p in (folder / part).rglob("*") if p.is_file() and p.suffix != ".lock")
        file = rng.choice(files)
        way = damage.damage(file, rng)
        found = children.run(JOBS[name], base, folder, seconds=20.0)
        expected = wanted[name]
        if found["ended"] == "done" and part == "base" and found["said"][:64] != expected[:64]:
            expected = found["said"]  # another model, which says so by its fingerprint
        told = f"{file.relative_to(folder)} {way}"
        table.add(
            f"damaged: {part}", judged(found, expected, True), told, found["said"], found["left"]
        )


def mutations(table, place, rng, n):
    """Texts that the library reads, changed: read, or refused clearly, within 10 seconds.

    What a record stands for must be what it was (readers that give a digest); other texts may say something else.
    """
    made = place / "read"
    base = begin(made)
    for name in ("features", "saving", "recording"):
        children.run(work.KILLED[name], base, made)
    kept = readers.originals(made)
    names = sorted(kept)
    results = {name: kept[name][1](base) for name in names}  # as it is, it is read
    results = {name: found for name, found in results.items() if isinstance(found, str)}  # a digest

    def late(*_):
        raise TimeoutError("10 seconds")

    signal.signal(signal.SIGALRM, late)
    stdout, sys.stderr = sys.stderr, open(os.devnull, "w")  # notes of what is read
    for i in range(n):
        name = names[i % len(names)]
        file, read = kept[name]
        content = file.read_bytes()
        file.write_bytes(damage.change(content, rng, file.name))
        work.enter(made)
        signal.alarm(10)
        try:
            found = read(base)
            same = name not in results or found == results[name]
            ended, said = ("recovered" if same else "wrong"), ""
        except TimeoutError as error:
            ended, said = "hangs", error
        except Exception as error:
            ended, said = ("clear" if children.clear(error) else "foreign"), repr(error)
        finally:
            signal.alarm(0)
        if ended in ("hangs", "foreign"):
            said = f"{said} {file.read_bytes()[:300]!r}"
        file.write_bytes(content)
        table.add(f"changed: {name}", ended, f"try {i}", said)
    sys.stderr = stdout


def main():
    """Run all kinds and print the table; 1 where something was foreign, wrong, hanging or left over."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--long", action="store_true")
    asked.add_argument("--seed", type=int, default=0)
    asked.add_argument("--only", nargs="*", default=None)
    asked = asked.parse_args()
    counts, table, began = (LONG if asked.long else SHORT), Table(), time.monotonic()
    place, told = Path(tempfile.mkdtemp(prefix="mixdpo-faults-")), (0, 0)
    try:
        for kind, make in (
            ("kills", kills),
            ("full", full_disks),
            ("damaged", damages),
            ("mutations", mutations),
            ("notebooks", whole.notebooks),
            ("reproduces", whole.reproduces),
        ):
            if counts[kind] and (not asked.only or kind in asked.only):
                (place / kind).mkdir()
                draws = random.Random(f"{asked.seed} {kind}")
                told = make(table, place / kind, draws, counts[kind]) or told
                print(f"{kind}: {time.monotonic() - began:.0f} s", file=sys.stderr)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    print(table.text())
    print(
        f"\nseed {asked.seed}; {told[0]} jobs killed, {told[1]} of them inside the writing of a checkpoint"
    )
    print(json.dumps(table.evidence, indent=1))
    return int(bool(table.evidence))


if __name__ == "__main__":
    sys.exit(main())
