"""How many pairs a second, and in how much memory? Our families beside TRL's trainer of DPO.

Every contender is a process of its own; within a batch size they take turns, and ratios are formed turn by turn.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.speed.contenders import OURS, TRL
from benchmarks.speed.measuring import Row, absent, ratios, row
from benchmarks.speed.records import ROOT, remembered

SETTINGS: dict[str, Any] = {"pairs": 64, "batches": [8, 32], "turns": 5, "warm_up": 3, "heads": 20}
QUICK = {"pairs": 16, "batches": [8], "turns": 2, "warm_up": 1, "heads": 3}
AIMS = {  # ours, theirs, at least so many times
    ("heads, K = 1", "TRL, full"): 250,
    ("heads, K = 1", "TRL's fastest LoRA"): 100,
    ("heads, K = 3", "TRL, full"): None,
    ("heads, K = 3", "TRL's fastest LoRA"): None,
    ("adapter, kept lower blocks", "TRL, LoRA in the last two"): 4,
    ("adapter", "TRL, LoRA in the last two"): 1.5,
}


class Contender:
    """A process that steps when it is asked to."""

    def __init__(self, name: str, batch: int, file: Path, device: str) -> None:
        command = [sys.executable, "-m", "benchmarks.speed.contenders", name, str(file)]
        command += ["--batch", str(batch), "--device", device]
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        self.log = open(file.with_name(f"{name.replace(' ', '_')}-{batch}.log"), "w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=os.environ | {"PYTHONPATH": path},
        )
        self.first = self.answer()

    def answer(self) -> dict[str, Any]:
        """Its next line; what it said last, where it ended."""
        for line in self.process.stdout:  # type: ignore[union-attr]
            if line.startswith("@"):
                return json.loads(line[1:])
        self.log.seek(0)
        said = (self.log.read().strip().splitlines() or ["it said nothing"])[-1]
        return {"absent": f"failed: {said[:120]}"}

    def steps(self, n: int) -> dict[str, Any]:
        """Ask for n steps."""
        self.process.stdin.write(f"{n}\n")  # type: ignore[union-attr]
        self.process.stdin.flush()  # type: ignore[union-attr]
        return self.answer()

    def end(self) -> None:
        """No further steps."""
        self.process.stdin.close()  # type: ignore[union-attr]
        self.process.wait()
        self.log.close()


def group(batch: int, file: Path, settings: dict[str, Any], device: str) -> dict[str, Any]:
    """Of every contender seconds a step (one a turn), peak memory, seconds before the first step; or why not."""
    found: dict[str, Any] = {}
    running = {}
    try:
        for name in (*OURS, *TRL):
            running[name] = Contender(name, batch, file, device)
            found[name] = dict(running[name].first)
            if "absent" in found[name]:
                running.pop(name).end()
        for name, one in list(running.items()):
            answer = one.steps(settings["warm_up"])
            found[name] |= {"seconds": [], **({} if "seconds" in answer else answer)}
            if "absent" in answer:
                running.pop(name).end()
        order = random.Random(0)
        for turn in range(settings["turns"]):
            print(f"[bench] throughput: batches of {batch}, turn {turn + 1}", flush=True)
            for name in order.sample(list(running), len(running)):
                answer = running[name].steps(settings["heads"] if name.startswith("heads") else 1)
                if "absent" in answer:
                    found[name] |= answer
                    running.pop(name).end()
                    continue
                found[name]["seconds"].append(answer["seconds"])
                found[name]["peak_gib"] = answer["peak_gib"]
    finally:
        for one in running.values():
            one.end()
    return found


def measure(settings: dict[str, Any], device: str, folder: Path) -> list[Row]:
    """Rows of pairs a second, memory, time before the first step, and of ratios with their aims."""
    import mixdpo_lib as mx
    from benchmarks.speed.material import length_rows, usual_tokens

    base = mx.load_base()
    given = {"rows": length_rows(base, settings["pairs"]), "active": usual_tokens(base)}
    given |= {"base": base.name, "folder": base.folder}
    del base
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "material.json"
    file.write_text(json.dumps(given), encoding="utf-8")
    groups = {}
    for batch in settings["batches"]:
        identity = {"settings": settings, "batch": batch, "device": device}
        groups[batch] = remembered(
            folder / f"batch-{batch}.json",
            identity | {"of": os.environ.get("MIXDPO_BENCH_OF", "")},
            lambda b=batch: group(b, file, settings, device),
        )
        print(f"[bench] throughput: batches of {batch} are done", flush=True)
    return rows_of(groups, settings["pairs"], len(given["active"]))


def rows_of(groups: dict[int, dict[str, Any]], pairs: int, active: int) -> list[Row]:
    """The table's lines, from what the groups gave."""
    rows, rate, best = [], {}, {}
    for name in (*OURS, *TRL):
        there = {b: g[name] for b, g in groups.items() if g.get(name, {}).get("seconds")}
        if not there:
            whys = [g[name].get("absent", "not measured") for g in groups.values() if name in g]
            rows.append(absent(name, (whys or ["not measured"])[0]))
            continue
        rate[name] = {b: [b / s for s in one["seconds"]] for b, one in there.items()}
        best[name] = max(rate[name], key=lambda b: statistics.median(rate[name][b]))
        b = best[name]
        note = f"batches of {b}" + (f", {active:,} active tokens" if "heads" in name else "")
        rows.append(row(name, "pairs/s", rate[name][b], note=note, x=b, line="throughput"))
        rows.append(row(name, "GiB", [max(o["peak_gib"] for o in there.values())], note="peak"))
        note = f"before the first step: model, then features or reference of {pairs} pairs"
        rows.append(row(name, "s", [one["ready"] for one in there.values()], note=note))
    loras = [n for n in best if n.startswith("TRL, LoRA")]
    fastest = max(loras, key=lambda n: statistics.median(rate[n][best[n]]), default=None)
    for (ours, theirs), aim in AIMS.items():
        other = fastest if theirs == "TRL's fastest LoRA" else theirs
        what = f"{ours} / {theirs}"
        if ours not in best or other not in best:
            rows.append(absent(what, "one of them was not measured"))
            continue
        a, b = best[ours], best[other]
        note = f"batches of {a}, {b}" + ("" if a == b else ", one after the other")
        note += f"; it is {other}" if other != theirs else ""
        n = min(len(rate[ours][a]), len(rate[other][b]))
        values = ratios(rate[ours][a][:n], rate[other][b][:n])
        rows.append(row(what, "times", values, None if aim is None else (">=", aim), note))
    return rows
