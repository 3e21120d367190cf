"""What was measured, where, and does it still count? One JSON a part: machine, code, settings, rows."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

from mixdpo_lib.store import MixDPOError, write_json_atomic

ROOT = Path(__file__).resolve().parents[2]
SHAPE = {
    "part": str,
    "machine": dict,
    "code": str,
    "settings": dict,
    "seconds": (int, float),
    "load": (int, float),
    "rows": list,
}


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        return re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)[1].strip()  # type: ignore[index]
    except (OSError, TypeError):
        return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def machine(device: str = "cpu") -> dict[str, Any]:
    """What decides a time besides code and settings."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    name = ""
    if device.startswith("cuda"):
        import torch

        name = torch.cuda.get_device_name(device)
    return {
        "processor": _processor(),
        "cores": cores,
        "threads": int(os.environ.get("OMP_NUM_THREADS") or cores or 1),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "system": platform.system(),
        "device": f"{device} {name}".strip(),
        "python": platform.python_version(),
        **{p: _version(p) for p in ("torch", "transformers", "peft", "trl")},
    }


def code_version(root: Path = ROOT) -> str:
    """16 hex digits over the library and what measures it."""
    found = hashlib.sha256()
    for place in ("mixdpo_lib", "benchmarks/speed"):
        for path in sorted((root / place).rglob("*.py")):
            found.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:16]


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    return json.loads(json.dumps(value))


def read(path: Path) -> dict[str, Any]:
    """A record, checked.

    Raises
    ------
    MixDPOError : no JSON, or of another shape; what to do.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MixDPOError(f"{path}: unreadable ({error}); delete it and measure again") from None
    for name, kind in SHAPE.items():
        if not isinstance(found, dict) or not isinstance(found.get(name), kind):
            raise MixDPOError(
                f"{path}: found no {name}, expected a record of benchmarks.speed; delete it and measure again"
            )
    return found


def counts(path: Path, where: Mapping[str, Any], code: str, settings: Mapping[str, Any]) -> bool:
    """Whether a record is there that was measured on this machine, by this code, with these settings."""
    if not path.exists():
        return False
    found = read(path)
    wanted = {"machine": dict(where), "code": code, "settings": dict(settings)}
    return all(found[name] == _plain(value) for name, value in wanted.items())


def write(path: Path, **record: Any) -> None:
    """Write a record, whole or not at all."""
    write_json_atomic(path, record)


def remembered(path: Path, identity: Mapping[str, Any], make: Callable[[], Any]) -> Any:
    """What `make` gave, from the file if it was kept with this identity: a long part goes on where it was stopped."""
    if path.exists():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept.get("identity") == _plain(identity):
            return kept["value"]
    value = make()
    write_json_atomic(path, {"identity": dict(identity), "value": value})
    return value
