"""Which rooms has the house, and who asks whom? Picture, edges and line counts, read from the imports.

`python scripts/house.py` writes docs/house.json (wings, rooms, edges), docs/house.svg (the picture) and the table of
docs/architecture.md, and prints line counts, circles and imports that point upwards. `--check` writes nothing.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "mixdpo_lib"
LAYERS = (  # from the ground up; a wing may import what stands below it
    ("elbo", "store", "figures"),
    ("data",),
    ("base",),
    ("gates", "experts"),
    ("policy",),
    ("learning", "evaluation"),
    ("choosing",),
    ("explorer", "lessons", "study", "runner"),
    ("cli",),
)
LEVEL = {wing: level for level, wings in enumerate(LAYERS) for wing in wings}
ROAD = ("elbo", "gates.contract", "gates.weights", "experts.contract", "policy.model")
ROAD += ("policy.mixture", "learning.config", "learning.fit")
BEGIN, END = "<!-- from here: python scripts/house.py -->", "<!-- to here -->"

Edge = tuple[str, str]


def rooms(library: Path = LIBRARY) -> dict[str, Path]:
    """Files by dotted name; a wing's own `__init__.py` has the wing's name. The library's is its front door."""
    found = {}
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            found[name] = path
    return found


def wing(room: str) -> str:
    """The wing, or the room at the top, that a room belongs to.

    >>> wing("study.judges.panel"), wing("elbo")
    ('study', 'elbo')
    """
    return room.split(".")[0]


def _for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def _statements(node: ast.AST) -> Iterable[ast.Import | ast.ImportFrom]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif not _for_types_only(child):
            yield from _statements(child)


def edges(library: Path = LIBRARY) -> set[Edge]:
    """(who, whom) of every import between rooms, those inside functions too; not those for types only."""
    house, found = rooms(library), set()
    for name, path in house.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        for node in _statements(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules = [
                    alias.name for alias in node.names if alias.name.startswith("mixdpo_lib.")
                ]
                wanted = [(module.removeprefix("mixdpo_lib."), []) for module in modules]
            elif node.level:
                up = (
                    package.split(".")[: len(package.split(".")) - node.level + 1]
                    if package
                    else []
                )
                start = ".".join([*filter(None, up), *filter(None, [node.module])])
                wanted = [(start, [alias.name for alias in node.names])]
            elif (node.module or "").split(".")[0] == "mixdpo_lib":
                start = str(node.module).removeprefix("mixdpo_lib").lstrip(".")
                wanted = [(start, [alias.name for alias in node.names])]
            else:
                continue
            for start, names in wanted:
                inner = [".".join(filter(None, [start, one])) for one in names]
                targets = [one for one in inner if one in house]
                if start in house and len(targets) < max(len(names), 1):
                    targets.append(start)
                found |= {(name, target) for target in targets if target != name}
    return found


def circles(arrows: Iterable[Edge]) -> list[list[str]]:
    """Groups of rooms that import each other, directly or through others."""
    below = reachable(arrows)
    groups = {
        frozenset(b for b in below if a in below[b] and b in below[a])
        for a in below
        if a in below[a]
    }
    return sorted(sorted(group) for group in groups)


def reachable(arrows: Iterable[Edge]) -> dict[str, set[str]]:
    """Of each room, the rooms that it imports, directly or through others."""
    direct: dict[str, set[str]] = {}
    for who, whom in arrows:
        direct.setdefault(who, set()).add(whom)
        direct.setdefault(whom, set())
    below = {}
    for room in direct:
        seen, todo = set(), list(direct[room])
        while todo:
            if (one := todo.pop()) not in seen:
                seen.add(one)
                todo += direct[one]
        below[room] = seen
    return below


def upwards(arrows: Iterable[Edge]) -> list[Edge]:
    """Imports of a wing that does not stand below: higher, or beside in the same layer."""
    return sorted(
        (a, b) for a, b in arrows if wing(a) != wing(b) and LEVEL[wing(a)] <= LEVEL[wing(b)]
    )


def lines(path: Path) -> int:
    """Lines of a file, blank ones included."""
    return len(path.read_text(encoding="utf-8").splitlines())


def question(path: Path) -> str:
    """The first sentence of a file's head, without what it quotes from code."""
    head = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n\n")[0]
    return re.split(r"(?<=[?.])\s", " ".join(head.split()))[0].replace("|", "\\|")


def house() -> dict[str, object]:
    """What the picture shows: wings by layer with their rooms, and arrows between wings."""
    names = list(rooms())
    wings = [[one for one in level if one in names] for level in LAYERS]
    files = [name for name, path in rooms().items() if path.name != "__init__.py" and "." in name]
    inside = {
        one: [name.partition(".")[2] for name in files if wing(name) == one]
        for level in wings
        for one in level
    }
    arrows = sorted({(wing(a), wing(b)) for a, b in edges() if wing(a) != wing(b)})
    return {
        "layers": [level for level in wings if level],
        "rooms": inside,
        "arrows": [list(a) for a in arrows],
    }


def table() -> str:
    """Lines of code by wing and room, with each room's question, as Markdown."""
    all_rooms = rooms()
    total = sum(map(lines, all_rooms.values())) + lines(LIBRARY / "__init__.py")
    tops = {wing(name) for name in all_rooms}
    road = sum(lines(all_rooms[name]) for name in ROAD)
    out = [
        f"{len(tops)} rooms at the top, {len(all_rooms)} files, {total:,} lines. The newcomer's road: {road:,} lines."
    ]
    for level in reversed(LAYERS):
        for top in (one for one in level if one in tops):
            own = {name: path for name, path in all_rooms.items() if wing(name) == top}
            out += [
                "",
                f"**{top}** ({sum(map(lines, own.values())):,} lines). {question(own[top])}",
            ]
            inner = {n: p for n, p in own.items() if n != top and p.name != "__init__.py"}
            if inner:
                out += ["", "| room | lines | |", "|---|---|---|"]
            for name, path in inner.items():
                out.append(
                    f"| {name.partition('.')[2].replace('.', '/')} | {lines(path)} | {question(path)} |"
                )
    return "\n".join(out)


def with_table(page: str) -> str:
    """The page of architecture with the table of today."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.split(END)[1]}"


def draw(shown: dict, path: Path) -> None:
    """Layers from the ground up, a box a wing with its rooms, an arrow from who imports to what is imported."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

    plt.rcParams |= {"svg.hashsalt": "house", "svg.fonttype": "none", "font.size": 7.0}
    layers, inside = shown["layers"], shown["rooms"]
    width, gap, step = 7.0, 0.45, 0.13

    def wrapped(one: str, columns: int) -> list[str]:
        rows, line = [], ""
        for name in inside[one]:
            if line and len(line) + len(name) + 2 > columns:
                rows, line = [*rows, line + ","], ""
            line = f"{line}, {name}" if line else name
        return rows + ([line] if line else [])

    boxes, y = {}, 0.1
    for level in layers:
        share = [max(2.0, min(len(", ".join(inside[one])), 90) ** 0.5) for one in level]
        free, x, heights = width - 0.2 - 0.3 * (len(level) - 1), 0.1, []
        for one, part in zip(level, share, strict=True):
            wide = min(free * part / sum(share), 4.4)
            text = wrapped(one, int(wide / 0.062))
            boxes[one] = [x, y, wide, 0.24 + step * len(text), text]
            heights.append(boxes[one][3])
            x += wide + 0.3
        spare = (width - 0.1 - (x - 0.3)) / 2
        for one in level:
            boxes[one][0] += max(spare, 0)
            boxes[one][3] = max(heights)
        y += max(heights) + gap
    figure = plt.figure(figsize=(width, y - gap + 0.1))
    ax = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, y - gap + 0.1))
    ax.axis("off")
    arrows = [tuple(a) for a in shown["arrows"]]
    below = reachable(arrows)
    for who, whom in arrows:
        x, bottom, wide, _, _ = boxes[who]
        other, base, other_wide, tall, _ = boxes[whom]
        direct = not any(whom in below[mid] for a, mid in arrows if a == who and mid != whom)
        start, end = (x + wide / 2, bottom), (other + other_wide / 2, base + tall)
        shift = 0.25 * (end[0] - start[0])
        start = (min(max(start[0] + shift, x + 0.1), x + wide - 0.1), start[1])
        end = (min(max(end[0] - shift, other + 0.1), other + other_wide - 0.1), end[1])
        style = (
            {"color": "0.25", "linewidth": 1.0} if direct else {"color": "0.78", "linewidth": 0.6}
        )
        ax.add_patch(
            FancyArrowPatch(
                start,
                end,
                arrowstyle="-|>",
                mutation_scale=6,
                shrinkA=0,
                shrinkB=0,
                zorder=2 if direct else 0,
                **style,
            )
        )
    for one, (x, bottom, wide, tall, text) in boxes.items():
        ax.add_patch(
            FancyBboxPatch(
                (x, bottom),
                wide,
                tall,
                boxstyle="round,pad=0,rounding_size=0.05",
                facecolor="#eef3f8",
                edgecolor="0.3",
                linewidth=0.8,
                zorder=3,
            )
        )
        middle = x + wide / 2
        ax.text(
            middle,
            bottom + tall - 0.12,
            one,
            ha="center",
            va="center",
            weight="bold",
            fontsize=8,
            zorder=4,
        )
        for i, row in enumerate(text):
            ax.text(
                middle,
                bottom + tall - 0.27 - step * i,
                row,
                ha="center",
                va="center",
                fontsize=7,
                zorder=4,
            )
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    """Write, or with --check only print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="print, write nothing")
    arguments = parser.parse_args()
    found, shown = edges(), house()
    print(table())
    print(f"\ncircles: {circles(found) or 'none'}")
    print(f"imports upwards or beside: {upwards(found) or 'none'}")
    if not arguments.check:
        docs = ROOT / "docs"
        (docs / "house.json").write_text(json.dumps(shown, indent=1) + "\n", encoding="utf-8")
        draw(shown, docs / "house.svg")
        page = docs / "architecture.md"
        page.write_text(with_table(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
