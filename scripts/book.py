"""How is the book made? Executed notebooks, documents, gallery and the library's names become pages that need no network.

`make book` starts it; `python scripts/book.py --help` says what can be chosen. Sources are collected in `build/book/source`,
pages lie in `build/book/html`. A warning is an error.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import api_pages

from mixdpo_lib import store
from mixdpo_lib.runner import execute, notebooks, results

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "docs" / "site"
BUILD = ROOT / "build" / "book"
DOCS = {
    "Guide": ("running", "using-your-own-model-and-data", "reading-your-result", "adding"),
    "Method": ("method", "results", "claims", "analysis-plan"),
    "The house": ("architecture", "reliability", "log"),
}
WIDTH = 1050  # pixels of a picture in the gallery
REMOTE = r"""<(?:script|img|iframe)[^>]+src="(?:https?:)?//[^"]+"|<link[^>]+stylesheet"[^>]+href="(?:https?:)?//"""
PICTURE = r"!\[[^\]]*\]\(([^)\s]+)\)"
WIDGET = "application/vnd.jupyter.widget-view+json"


def _names() -> dict[str, list[str]]:
    """Notebooks by the part of the book that they stand in."""
    theory = notebooks.theory_names()
    folder = {name: notebooks.notebook_path(name).parent.name for name in theory}
    return {
        "The study": notebooks.notebook_names(),
        "Theory": [name for name in theory if folder[name] == "theory"],
        "Beyond": [name for name in theory if folder[name] == "beyond"],
    }


def executed(name: str, profile: str) -> Path | None:
    """The notebook of a finished run, whole as its manifest says; None: there is no run."""
    folder = results.results_folder(profile, name)
    if not (folder / "manifest.json").exists() or not (folder / "notebook.ipynb").exists():
        return None
    results.verify_manifest(folder)
    return folder / "notebook.ipynb"


def page(book: dict[str, Any], told: str, pages: set[str]) -> dict[str, Any]:
    """A notebook as a page: what it is of under its title, pictures in place of sliders, links to other pages."""
    cells = []
    for cell in book["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            source = linked(source, pages)
            if not cells:
                title, _, rest = source.partition("\n")
                source = f"{title}\n\n{told}\n\n{rest}"
        elif cell["cell_type"] == "code":
            cell["outputs"] = [one for one in cell["outputs"] if WIDGET not in one.get("data", {})]
        cells.append({**cell, "source": source, "metadata": {}})
    keep = {"kernelspec": book["metadata"]["kernelspec"]}
    return {**book, "cells": cells, "metadata": keep}


def linked(text: str, pages: set[str]) -> str:
    """Links to pages of the book as they lie here; what is no page is named, not linked. Pictures stay where they are.

    >>> linked("[a](method.md#x) [b](../Makefile) [c](https://x) ![d](d.svg)", {"docs/method.md"})
    '[a](../docs/method.md#x) b (`Makefile`) [c](https://x) ![d](d.svg)'
    """

    def new(found: re.Match) -> str:
        picture, label, target = found.groups()
        path, mark, anchor = target.partition("#")
        if picture or "//" in target or not path:
            return found[0]
        name = Path(path).name
        for there in (f"docs/{name}", f"notebooks/{name}"):
            if there in pages:
                return f"[{label}](../{there}{mark}{anchor})"
        return f"{label} (`{name}`)"

    return re.sub(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", new, text)


def told_of(name: str, profile: str) -> str:
    """What a page says of the run it shows."""
    manifest = results.read_manifest(results.results_folder(profile, name) / "manifest.json")
    commit = (manifest.get("git") or {}).get("commit") or "unknown"
    note = " **Too small to mean anything.**" if manifest["profile"] == "smoke" else ""
    again = manifest.get("command") or "in JupyterLab"
    seconds = manifest["seconds"]
    took = f"{seconds / 60:.1f} minutes" if seconds > 90 else f"{seconds:.0f} seconds"
    return (
        f":::{{note}}\nExecuted with the profile `{manifest['profile']}` in {took}, "
        f"code `{commit[:10]}`, ended {manifest['ended'][:10]}. Again: `{again}`.{note}\n:::\n"
    )


NOT_RUN = ":::{warning}\nThis notebook was not executed for this book: `make reproduce-all` does, then `make book`.\n:::\n"


def gallery(profile: str, target: Path, pages: set[str]) -> str:
    """Every figure of every run, of the reference results where there is no run, with its caption and its notebook."""
    from PIL import Image

    lines = [
        "# Gallery",
        "",
        "Every picture is of a table of its notebook; the captions are those of the records.",
        "",
    ]
    pictures = target / "pictures"
    pictures.mkdir(parents=True)
    for part, names in _names().items():
        lines += [f"## {part}", ""]
        for name in names:
            folder = own = results.results_folder(profile, name)
            if not (folder / "manifest.json").exists():
                folder = results.results_folder("reference", name)
            for record in sorted((folder / "figures").glob("*.json")):
                told = store.read_json(record)
                if "/" in (told["table"] or ""):  # of another notebook's table, and shown there
                    continue
                with Image.open(record.with_suffix(".png")) as image:
                    image.thumbnail((WIDTH, 10 * WIDTH))
                    image.convert("P", palette=Image.Palette.ADAPTIVE, colors=128).save(
                        pictures / f"{name}-{record.stem}.png", optimize=True
                    )
                caption = api_pages.escaped(told["caption"])
                link = f"[{name}](notebooks/{name}.ipynb)"
                where = "" if folder == own else ", reference results"
                lines += [
                    f"```{{figure}} pictures/{name}-{record.stem}.png",
                    f":alt: {record.stem.replace('_', ' ')} of {name}",
                    "",
                    f"{caption} {link}{where}",
                    "```",
                    "",
                ]
    return "\n".join(lines)


def contents() -> dict[str, Any]:
    """The table of contents."""
    parts = [
        {"caption": part, "chapters": [{"file": f"notebooks/{name}"} for name in names]}
        for part, names in _names().items()
    ]
    parts += [
        {"caption": part, "chapters": [{"file": f"docs/{name}"} for name in names]}
        for part, names in DOCS.items()
    ]
    wings = [name for name in api_pages.pages(ROOT / "mixdpo_lib") if name != "index.md"]
    api = {"file": "api/index", "sections": [{"file": f"api/{Path(one).stem}"} for one in wings]}
    front = {"caption": "Look", "chapters": [{"file": "gallery"}, {"file": "docs/glossary"}]}
    return {
        "format": "jb-book",
        "root": "index",
        "parts": [front, *parts, {"caption": "The library", "chapters": [api]}],
    }


def collect(profile: str, mathjax: Path | None) -> list[str]:
    """Write the sources of the book; returns notebooks that were never executed."""
    source = BUILD / "source"
    shutil.rmtree(BUILD, ignore_errors=True)
    for folder in ("notebooks", "docs", "api", "_static/mathjax"):
        (source / folder).mkdir(parents=True)
    shown = [name for names in DOCS.values() for name in names] + ["glossary"]
    every = [name for names in _names().values() for name in names]
    pages = {f"docs/{name}.md" for name in shown} | {f"notebooks/{name}.ipynb" for name in every}
    for name in ("index.md", "_config.yml"):
        shutil.copy(SITE / name, source / name)
    (source / "_toc.yml").write_text(json.dumps(contents(), indent=1), encoding="utf-8")
    for name in shown:
        text = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
        (source / "docs" / f"{name}.md").write_text(linked(text, pages), encoding="utf-8")
        for picture in re.findall(PICTURE, text):
            copy = source / "docs" / picture
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / "docs" / picture, copy)
    for name, text in api_pages.pages(ROOT / "mixdpo_lib").items():
        (source / "api" / name).write_text(text, encoding="utf-8")
    bare = []
    for name in every:
        path = executed(name, profile)
        if path is None:
            bare.append(name)
        told = told_of(name, profile) if path else NOT_RUN
        book = store.read_json(path or notebooks.notebook_path(name))
        text = json.dumps(page(book, told, pages))
        (source / "notebooks" / f"{name}.ipynb").write_text(text, encoding="utf-8")
    (source / "gallery.md").write_text(gallery(profile, source, pages), encoding="utf-8")
    if mathjax:
        shutil.copy(mathjax, source / "_static" / "mathjax" / mathjax.name)
    return bare


def remote(pages: Path) -> list[str]:
    """What a page would fetch from elsewhere when it is opened."""
    return [
        f"{path.relative_to(pages)}: {found[0][:120]}"
        for path in sorted(pages.rglob("*.html"))
        for found in re.finditer(REMOTE, path.read_text(encoding="utf-8"))
    ]


def scripts_once(page: str) -> str:
    """A page without scripts that stand on it already: two extensions bring the same ones, and MathJax cannot be loaded twice.

    >>> scripts_once('<script defer src="a.js"></script><script src="a.js"></script><script>b</script>')
    '<script defer src="a.js"></script><script>b</script>'
    """
    seen: set[str] = set()

    def kept(found: re.Match[str]) -> str:
        source = re.search(r'src="([^"]+)"', found[1])
        name = source[1] if source else found[2]
        if name in seen:
            return ""
        seen.add(name)
        return found[0]

    return re.sub(r"<script([^>]*)>(.*?)</script>", kept, page, flags=re.DOTALL)


def build(environment: Path) -> Path:
    """Make the pages; every warning is an error."""
    command = [
        environment / "bin" / "jupyter-book",
        *("build", "--warningiserror", "--keep-going", "--quiet"),
        *("--path-output", BUILD, BUILD / "source"),
    ]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{done.stdout}{done.stderr}\n[book] error: warnings or errors, see above")
    html = BUILD / "html"
    shutil.rmtree(html, ignore_errors=True)
    shutil.move(BUILD / "_build" / "html", html)
    shutil.rmtree(BUILD / "_build")
    for path in html.rglob("*.map"):  # for whoever debugs the theme
        path.unlink()
    for path in html.rglob("*.html"):
        path.write_text(scripts_once(path.read_text(encoding="utf-8")), encoding="utf-8")
    if found := remote(html):
        sys.exit("\n".join(found) + "\n[book] error: these pages need a network")
    return html


def main() -> None:
    """Run what is missing of theory and beyond, collect, build, say where the pages are."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("profile", nargs="?", default="default", help="whose runs are shown")
    parser.add_argument("--environment", type=Path, default=ROOT / ".venv-book")
    parser.add_argument("--as-is", action="store_true", help="run no theory notebook")
    given, began = parser.parse_args(), time.monotonic()
    if not given.as_is:
        for name in notebooks.theory_names():
            if executed(name, given.profile) is None:
                execute.run_notebook(name, profile=given.profile)
    (mathjax,) = given.environment.glob(
        "lib/python3*/site-packages/sphinx-mathjax-offline/static/mathjax/tex-svg.js"
    )
    bare = collect(given.profile, mathjax)
    html = build(given.environment)
    size = sum(path.stat().st_size for path in html.rglob("*") if path.is_file()) / 1e6
    if bare:
        print(f"[book] not executed, shown bare: {', '.join(bare)}")
    print(f"[book] {size:.0f} MB in {time.monotonic() - began:.0f} s; open {html / 'index.html'}")


if __name__ == "__main__":
    main()
