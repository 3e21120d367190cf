"""Which names has the library, and what do they say of themselves? Pages of the book from docstrings; nothing is imported."""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

Definition = ast.FunctionDef | ast.ClassDef

FIRST = ("load_base", "load_preferences", "HeadExperts", "LearnedWeights", "MixturePolicy")
FIRST += ("FitConfig", "fit", "report", "choose_k")


def pages(library: Path) -> dict[str, str]:
    """Markdown by file name: `index.md`, and a page a wing."""
    home = _home(library)
    wings = sorted(
        p for p in library.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()
    )
    found = {}
    for wing in wings:
        if wing.stem != "__init__":
            files = [wing] if wing.suffix == ".py" else sorted(wing.rglob("*.py"))
            found[f"{wing.stem}.md"] = _wing(wing.stem, files, library, home)
    lines = [
        "# The library",
        "",
        "The names of `import mixdpo_lib as mx`, and where they live. All other public names stand on the pages of their wings.",
        "",
        f"**Learn first:** {', '.join(f'[`{name}`](api-{name})' for name in FIRST)}.",
        "",
        "| name | lives in |",
        "|---|---|",
        *(f"| [`mx.{name}`](api-{name}) | `{module}` |" for name, module in sorted(home.items())),
    ]
    return {"index.md": "\n".join(lines) + "\n", **found}


def _home(library: Path) -> dict[str, str]:
    """The public names of the method and their modules."""
    tree = ast.parse((library / "__init__.py").read_text(encoding="utf-8"))
    (homes,) = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_HOME"
    ]
    return ast.literal_eval(homes)


def _wing(name: str, files: list[Path], library: Path, home: dict[str, str]) -> str:
    parts = [f"# {name}"]
    for file in files:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        module = ".".join(file.relative_to(library).with_suffix("").parts).removesuffix(".__init__")
        public = [node for node in tree.body if _public(node)]
        head = ast.get_docstring(tree) or ""
        if public or file.name != "__init__.py":
            parts.append(f"## {module}")
        parts.append(markdown(head))
        for node in public:
            if home.get(node.name) == module:
                parts.append(f"(api-{node.name})=")
            parts += _entry(node, "###")
            if isinstance(node, ast.ClassDef):
                for method in filter(_public, node.body):
                    parts += _entry(method, "####", f"{node.name}.")
    return "\n\n".join(part for part in parts if part) + "\n"


def _public(node: ast.AST) -> bool:
    return (
        isinstance(node, (ast.FunctionDef, ast.ClassDef))
        and not node.name.startswith("_")
        and bool(ast.get_docstring(node))
    )


def _entry(node: Definition, level: str, owner: str = "") -> Iterator[str]:
    yield f"{level} {owner}{node.name}"
    yield f"```python\n{signature(node, owner)}\n```"
    yield markdown(ast.get_docstring(node) or "")


def signature(node: Definition, owner: str = "") -> str:
    """How it is called: a class by its own `__init__`, or the fields of a dataclass.

    >>> signature(ast.parse("def f(self, a: int = 1) -> int: pass").body[0], "C.")
    'C.f(a: int = 1) -> int'
    """
    if isinstance(node, ast.ClassDef):
        inits = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
        if inits:
            return signature(inits[0]).replace("__init__", node.name, 1).removesuffix(" -> None")
        fields = [
            ast.unparse(n)
            for n in node.body
            if isinstance(n, ast.AnnAssign) and not ast.unparse(n.target).startswith("_")
        ]
        return _wrapped(f"class {node.name}", fields, "") if fields else f"class {node.name}"
    a = node.args
    plain, defaults = [*a.posonlyargs, *a.args], [None] * len(a.defaults)
    defaults = [None] * (len(plain) - len(a.defaults)) + list(a.defaults)
    words = [_argument(arg, default) for arg, default in zip(plain, defaults, strict=True)]
    if plain and plain[0].arg in ("self", "cls"):
        words = words[1:]
    if a.vararg:
        words.append("*" + _argument(a.vararg, None))
    elif a.kwonlyargs:
        words.append("*")
    words += [_argument(*one) for one in zip(a.kwonlyargs, a.kw_defaults, strict=True)]
    if a.kwarg:
        words.append("**" + _argument(a.kwarg, None))
    back = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return _wrapped(f"{owner}{node.name}", words, back)


def _argument(arg: ast.arg, default: ast.expr | None) -> str:
    kind = f": {ast.unparse(arg.annotation)}" if arg.annotation else ""
    equals = " = " if kind else "="
    return arg.arg + kind + (f"{equals}{ast.unparse(default)}" if default is not None else "")


def _wrapped(name: str, words: list[str], back: str) -> str:
    line = f"{name}({', '.join(words)}){back}"
    if len(line) <= 90:
        return line
    return f"{name}(\n" + "".join(f"    {word},\n" for word in words) + f"){back}"


def markdown(docstring: str) -> str:
    """A docstring of this library in Markdown: sections in bold, names as items, examples as code.

    >>> print(markdown("Two *stars*.\\n\\nRaises\\n------\\nValueError : `x` is 0."))
    Two \\*stars\\*.
    <BLANKLINE>
    **Raises**
    <BLANKLINE>
    - `ValueError`: `x` is 0.
    """
    text = re.sub(r":\w+:`([^`]+)`", r"`\1`", docstring)
    out, section = [], ""
    for block in _blocks(text):
        lines = block.splitlines()
        if len(lines) > 1 and re.fullmatch(r"-{3,}", lines[1]):
            section, lines = lines[0], lines[2:]
            out.append(f"**{section}**")
        if not lines:
            continue
        if lines[0].lstrip().startswith(">>>"):
            section = ""
            out.append(f"```pycon\n{textwrap.dedent(chr(10).join(lines))}\n```")
        elif any(re.match(r"\w[\w, *.]* : ", line) for line in lines):
            out.append("\n".join(_items(lines)))
        elif all(line.startswith("    ") for line in lines):
            out.append(f"```text\n{textwrap.dedent(chr(10).join(lines))}\n```")
        else:
            out.append("\n".join(escaped(line.strip()) for line in lines))
    return "\n\n".join(out)


def _blocks(text: str) -> list[str]:
    """Paragraphs; an example goes on over blank lines until text without one begins."""
    blocks: list[str] = []
    for block in re.split(r"\n\s*\n", text):
        again = (
            blocks and blocks[-1].lstrip().startswith(">>>") and block.lstrip().startswith(">>>")
        )
        blocks[-1:] = [f"{blocks[-1]}\n\n{block}"] if again else [*blocks[-1:], block]
    return blocks


def _items(lines: list[str]) -> Iterator[str]:
    for line in lines:
        found = re.match(r"(\w[\w, *.]*) : (.*)", line)
        if found:
            yield f"- `{found[1]}`: {escaped(found[2])}"
        else:
            yield f"  {escaped(line.strip())}"


def escaped(text: str) -> str:
    """Text whose signs mean nothing in Markdown; what stands in backticks stays code."""
    parts = re.split(r"(``[^`]+``|`[^`]+`)", text)
    parts[::2] = [re.sub(r"([\\*_$\[\]{}|<>#~^])", r"\\\1", part) for part in parts[::2]]
    return "".join(parts)
