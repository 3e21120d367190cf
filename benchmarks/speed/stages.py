"""How long does each stage of `make reproduce` take? Read from the manifests of its runs, which were recorded then."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from benchmarks.speed.measuring import Row, absent, row
from benchmarks.speed.records import ROOT

SETTINGS: dict[str, Any] = {"profiles": ["smoke", "default"]}
QUICK: dict[str, Any] = {}


def measure(settings: dict[str, Any], device: str, folder: Path) -> list[Row]:
    """Minutes of each notebook, and their sum; MIXDPO_BENCH_RUNS names another folder than runs/."""
    runs = Path(os.environ.get("MIXDPO_BENCH_RUNS") or ROOT / "runs")
    rows = []
    for profile in settings["profiles"]:
        found = {}
        for path in sorted((runs / profile).glob("*/manifest.json")):
            content = json.loads(path.read_text(encoding="utf-8"))
            found[content["notebook"]] = content
        if not found:
            rows.append(absent(f"make reproduce PROFILE={profile}", "no run of it is here"))
            continue
        for name, content in found.items():
            where = content["machine"]
            threads = f"{where['threads']} threads" if "threads" in where else "without torch"
            note = f"{where['device']}, {threads}, peak {content['peak_mb']:,} MB"
            rows.append(row(f"{profile}: {name}", "min", [content["seconds"] / 60], note=note))
        total = sum(content["seconds"] for content in found.values()) / 60
        rows.append(row(f"{profile}: all of these", "min", [total]))
    return rows
