"""The book's sources: every notebook, page and name is there, links lead somewhere, nothing asks for a network."""

import doctest
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import api_pages  # noqa: E402
import book  # noqa: E402

import mixdpo_lib as mx  # noqa: E402

PAGES = api_pages.pages(ROOT / "mixdpo_lib")


def test_examples_of_the_scripts():
    for module in (api_pages, book):
        tried = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
        assert tried.attempted and not tried.failed


def test_every_public_name_has_one_place_and_a_row():
    text = "\n".join(PAGES.values())
    for name in mx.__all__:
        assert text.count(f"(api-{name})=") == 1, name
        assert f"[`mx.{name}`](api-{name})" in PAGES["index.md"]
    assert set(api_pages.FIRST) <= set(mx.__all__)
    assert (
        "### MixturePolicy" in PAGES["policy.md"]
        and "#### MixturePolicy.user" in PAGES["policy.md"]
    )


def test_every_notebook_and_every_document_is_in_the_contents():
    files = set(re.findall(r'"file": "([^"]+)"', json.dumps(book.contents())))
    there = {p.stem for p in (ROOT / "notebooks").rglob("*.ipynb") if ".ipynb_" not in str(p)}
    assert {Path(file).name for file in files if file.startswith("notebooks/")} == there
    documents = {Path(file).name for file in files if file.startswith("docs/")}
    assert documents == {path.stem for path in (ROOT / "docs").glob("*.md")}
    front = (ROOT / "docs" / "site" / "index.md").read_text()
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", front):
        assert target.rpartition(".")[0] in files, target


def test_a_page_says_what_it_shows_and_has_pictures_in_place_of_sliders():
    picture, slider = {"data": {"image/png": "x"}}, {"data": {book.WIDGET: {}}}
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "Text [m](../docs/method.md)."]},
        {"cell_type": "code", "source": "1", "outputs": [picture, slider]},
    ]
    shown = book.page(
        {"cells": cells, "metadata": {"kernelspec": {}, "widgets": {}}}, "told", {"docs/method.md"}
    )
    first, second = shown["cells"]
    assert first["source"] == "# Title\n\ntold\n\nText [m](../docs/method.md)."
    assert second["outputs"] == [picture] and set(shown["metadata"]) == {"kernelspec"}


def test_what_needs_a_network_is_found(tmp_path):
    for name, line in {
        "good": '<script src="../_static/a.js"></script><a href="https://x.org">x</a>',
        "script": '<script async src="https://x.org/a.js">',
        "style": '<link rel="stylesheet" href="//x.org/a.css">',
    }.items():
        (tmp_path / f"{name}.html").write_text(line)
    assert [one.split(":")[0] for one in book.remote(tmp_path)] == ["script.html", "style.html"]


def test_what_makes_the_book_is_pinned():
    lines = (ROOT / "docs" / "site" / "requirements.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9.]+", line) for line in pins)
    assert any(line.startswith("jupyter-book==1.") for line in pins)
