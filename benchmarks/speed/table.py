"""What does the table say? Markdown from the records: a section a part, a line a measurement, aim beside found."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.speed.measuring import Row, quartiles, reached
from mixdpo_lib.store import MixDPOError

BEGIN = "<!-- from here: python -m benchmarks.speed -->"
END = "<!-- to here -->"
TITLES = {
    "throughput": "Pairs a second and memory",
    "race": "Time to the held-out accuracy of TRL's fastest LoRA",
    "scaling": "How a step of the heads grows",
    "pairs": "How a fit grows with the number of pairs",
    "sampling": "Sampling, beside `generate` of transformers",
    "startup": "Start-up",
    "stages": "Stages of `make reproduce`",
    "roofline": "Share of what the machine can do",
}


def number(value: float) -> str:
    """Three digits that count, whole numbers with commas.

    >>> number(1234.5), number(0.01234), number(float("inf"))
    ('1,234', '0.0123', 'never')
    """
    if math.isinf(value):
        return "never"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.3g}".rstrip(".")


def found(one: Row) -> str:
    """Median and quartiles, or the one value."""
    if not one["values"]:
        return one["note"]
    low, middle, high = quartiles(one["values"])
    if one["unit"] == "exponent":
        low, middle, high = sorted(one["values"])
    whole = number(middle)
    return whole if len(one["values"]) == 1 else f"{whole} [{number(low)}, {number(high)}]"


def line(one: Row) -> str:
    """A row of the table."""
    aim = (
        ""
        if one["aim"] is None
        else f"{one['aim'][0].replace('>=', '≥').replace('<=', '≤')} {one['aim'][1]:g}"
    )
    verdict = {True: "yes", False: "**no**", None: ""}[reached(one)]
    turns = "" if one["unit"] == "exponent" else str(len(one["values"]) or "")
    cells = [one["what"], found(one), one["unit"], turns, aim, verdict]
    cells.append(one["note"] if one["values"] else "")
    return "| " + " | ".join(cells) + " |"


def section(part: str, record: Mapping[str, Any]) -> str:
    """Title, table and where the figures come from."""
    head = "| what | found | unit | turns | aim | reached | |\n|---|---|---|---|---|---|---|"
    busy = record["load"] > 0.5 * record["machine"]["cores"]
    text = [f"### {TITLES.get(part, part)}", "", head, *map(line, record["rows"]), ""]
    said = f"Measured in {record['seconds'] / 60:.1f} minutes by code {record['code']}"
    said += "; small sizes (`--quick`): no figures to quote" if record.get("quick") else ""
    said += (
        f"; load before it {record['load']:.1f}, of other work or of the part before"
        if busy
        else ""
    )
    return "\n".join([*text, f"{said}.", ""])


def aims(records: Mapping[str, Mapping[str, Any]]) -> str:
    """All lines with an aim, together."""
    rows = [one for record in records.values() for one in record["rows"] if one["aim"] is not None]
    head = "| what | found | unit | turns | aim | reached | |\n|---|---|---|---|---|---|---|"
    return "\n".join(["### What had to be reached", "", head, *map(line, rows), ""])


def machines(records: Mapping[str, Mapping[str, Any]]) -> str:
    """The machines of the records, one sentence each."""
    texts = {}
    for record in records.values():
        m = record["machine"]
        versions = ", ".join(
            f"{name} {m[name]}" for name in ("python", "torch", "transformers", "peft", "trl")
        )
        texts[
            f"{m['processor']}, {m['cores']} cores, {m['threads']} threads, {m['memory_gib']} GiB, {m['system']}; "
            f"device {m['device']}; {versions}."
        ] = None
    return "\n".join(["### Machine", "", *texts, ""])


def whole(records: Mapping[str, Mapping[str, Any]]) -> str:
    """Everything, in the order of the parts."""
    known = [part for part in TITLES if part in records]
    ordered = {part: records[part] for part in [*known, *(set(records) - set(known))]}
    parts = [machines(ordered), aims(ordered), *(section(p, r) for p, r in ordered.items())]
    return "\n".join(parts)


def into(page: Path, text: str) -> None:
    """Put the text between the markers of a page; the rest stays.

    Raises
    ------
    MixDPOError : a page without the two markers, in their order.
    """
    old = page.read_text(encoding="utf-8")
    before, begin, rest = old.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise MixDPOError(f"{page}: expected the lines {BEGIN} and {END}; put them back")
    page.write_text(f"{before}{BEGIN}\n\n{text.strip()}\n\n{END}{after}", encoding="utf-8")
