"""How fast is it here? Every part in a process of its own, then table, figure and README.

    python -m benchmarks.speed [--parts throughput race ...] [--device cuda] [--out runs/bench] [--quick] [--again]

A part that was measured on this machine, by this code and with these settings is not measured again; long parts go on
where they were stopped.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() != HERE]

from benchmarks.speed import picture, records, table  # noqa: E402
from mixdpo_lib.store import MixDPOError  # noqa: E402

PARTS = {  # in the order in which they are measured: the race reads which LoRA of TRL was fastest
    "startup": "startup",
    "stages": "stages",
    "roofline": "roofline",
    "sampling": "samples",
    "scaling": "scaling",
    "pairs": "many_pairs",
    "throughput": "throughput",
    "race": "race",
}
FIGURE = "speed.png"


def module(part: str) -> ModuleType:
    """The file that measures a part."""
    return importlib.import_module(f"benchmarks.speed.{PARTS[part]}")


def settings(part: str, quick: bool) -> dict[str, Any]:
    """What a part is measured with."""
    own = module(part)
    return {**own.SETTINGS, **(own.QUICK if quick else {})}


def measure(part: str, out: Path, device: str, quick: bool) -> None:
    """Measure a part in this process and keep its record."""
    machine, code, chosen = records.machine(device), records.code_version(), settings(part, quick)
    os.environ["MIXDPO_BENCH_OF"] = f"{code} {sorted(machine.items())}"
    load, start = os.getloadavg()[0], time.monotonic()
    rows = module(part).measure(chosen, device, out / part)
    records.write(
        out / f"{part}.json",
        part=part,
        machine=machine,
        code=code,
        settings=chosen,
        quick=quick,
        seconds=time.monotonic() - start,
        load=load,
        rows=rows,
    )


def measure_all(parts: list[str], out: Path, device: str, quick: bool, again: bool) -> list[str]:
    """Measure what does not count yet, each in a process of its own; gives the parts that failed."""
    machine, code, failed = records.machine(device), records.code_version(), []
    for part in parts:
        file = out / f"{part}.json"
        if not again and records.counts(file, machine, code, settings(part, quick)):
            print(f"[bench] {part}: measured before", flush=True)
            continue
        if again:
            shutil.rmtree(out / part, ignore_errors=True)
        print(f"[bench] {part} ...", flush=True)
        command = [sys.executable, "-m", "benchmarks.speed", "--one", part]
        command += ["--out", str(out), "--device", device, *(["--quick"] if quick else [])]
        path = os.pathsep.join(filter(None, (str(records.ROOT), os.environ.get("PYTHONPATH"))))
        start = time.monotonic()
        done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path})
        print(f"[bench] {part}: {(time.monotonic() - start) / 60:.1f} minutes", flush=True)
        if done.returncode:
            failed.append(part)
    return failed


def publish(out: Path, page: Path | None) -> None:
    """Table and figure from the records that are there; both also beside the page, if it is to be written."""
    found = {
        part: records.read(out / f"{part}.json")
        for part in PARTS
        if (out / f"{part}.json").exists()
    }
    if not found:
        raise MixDPOError(
            f"{out}: no records there; measure first: python -m benchmarks.speed --out {out}"
        )
    text, figure = table.whole(found), picture.draw(found, out / FIGURE)
    (out / "table.md").write_text(text, encoding="utf-8")
    if page is not None:
        if figure is not None:
            shutil.copy(figure, page.with_name(FIGURE))
            text += f"\n![Pairs a second, and how times grow]({FIGURE})\n"
        table.into(page, text)
    print(f"[bench] {out / 'table.md'}" + (f", {figure}" if figure else ""), flush=True)


def main(arguments: list[str] | None = None) -> None:
    """See the top."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS), metavar="PART",
                        help=f"of {', '.join(PARTS)}; all by default")  # fmt: skip
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=records.ROOT / "runs" / "bench")
    parser.add_argument(
        "--quick", action="store_true", help="small sizes: whether it runs, not how fast it is"
    )
    parser.add_argument(
        "--again", action="store_true", help="measure also what was measured before"
    )
    parser.add_argument(
        "--readme", action="store_true", help="write table and figure into benchmarks/README.md"
    )
    parser.add_argument("--one", choices=list(PARTS), help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.one:
        measure(chosen.one, chosen.out, chosen.device, chosen.quick)
        return
    page = HERE.parent / "README.md" if chosen.readme else None
    try:
        failed = measure_all(chosen.parts, chosen.out, chosen.device, chosen.quick, chosen.again)
        publish(chosen.out, page)
    except MixDPOError as error:
        sys.exit(f"[bench] error: {error}")
    except KeyboardInterrupt:
        sys.exit("[bench] stopped; the same command goes on")
    if failed:
        sys.exit(
            f"[bench] error: {', '.join(failed)} failed (see above); the same command measures them again"
        )


if __name__ == "__main__":
    main()
