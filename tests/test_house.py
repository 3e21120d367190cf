"""The house: its picture is that of the imports, its rooms are few and short, its imports point one way."""

import ast
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import house  # noqa: E402
import walk  # noqa: E402

ROOMS = house.rooms()


def test_the_picture_is_that_of_the_imports():
    kept = json.loads((ROOT / "docs" / "house.json").read_text(encoding="utf-8"))
    assert kept == house.house(), (
        "run `python scripts/house.py`: docs/house.svg is not that of the imports"
    )


def test_the_numbers_of_the_page_are_those_of_the_files():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert page == house.with_table(page), (
        "run `python scripts/house.py`: docs/architecture.md is old"
    )


def test_the_picture_names_every_wing_and_room():
    picture = (ROOT / "docs" / "house.svg").read_text(encoding="utf-8")
    assert len(picture) < 200_000
    for top, inner in house.house()["rooms"].items():
        assert f">{top}</text>" in picture
        assert all(room in picture for room in inner)


def test_imports_point_one_way():
    found = house.edges()
    assert len(found) > 150  # fewer would mean that imports are no longer seen
    assert house.circles(found) == [] and house.upwards(found) == []


def test_what_is_counted_is_seen(tmp_path):
    """Circles and imports upwards in a small house, by each way of importing."""
    for name, text in {
        "store": "from .policy.mixture import x\nimport mixdpo_lib.elbo",
        "elbo": "def f():\n    from mixdpo_lib import store",
        "policy/__init__": "",
        "policy/mixture": "from . import saving\nfrom ..data.pairs import Pairs",
        "policy/saving": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .mixture import M",
        "data/__init__": "from .pairs import Pairs",
        "data/pairs": "import torch",
    }.items():
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    found = house.edges(tmp_path)
    assert found == {
        ("store", "policy.mixture"),
        ("store", "elbo"),
        ("elbo", "store"),
        ("policy.mixture", "policy.saving"),
        ("policy.mixture", "data.pairs"),
        ("data", "data.pairs"),
    }
    assert house.circles(found) == [["elbo", "store"]]
    assert house.upwards(found) == [
        ("elbo", "store"),
        ("store", "elbo"),
        ("store", "policy.mixture"),
    ]


def test_the_house_has_few_rooms_at_the_top():
    assert len({house.wing(room) for room in ROOMS}) <= 16


@pytest.mark.parametrize("room", [room for room in ROOMS if room != "elbo"])
def test_a_room_is_short(room):
    path = ROOMS[room]
    assert house.lines(path) <= 400
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef):
            assert node.end_lineno - node.lineno < 200, node.name


def test_a_fit_climbs_at_most_three_times(tmp_path, monkeypatch):
    monkeypatch.setenv(
        "MIXDPO_CACHE", str(tmp_path / "cache")
    )  # empty: what is kept is computed too
    found = walk.small_fit(tmp_path)
    assert {"learning.fit", "learning.trainer", "policy.model", "experts.heads", "elbo"} <= set(
        found.entered
    )
    assert 0 < len(found.climbs) <= 3, found.climbs


def test_a_climb_is_seen(tiny_base):
    """A contract that asks its subclass climbs; a policy that asks its gate does not."""
    from mixdpo_lib.experts.heads import HeadExperts
    from mixdpo_lib.gates.user import UserGate
    from mixdpo_lib.policy.mixture import MixturePolicy

    policy = MixturePolicy(HeadExperts(tiny_base, 2), UserGate({"age": (30.0, 10.0)}, 2))
    down = walk.trace(lambda: policy.user(metadata={"age": 20}))
    assert set(down.climbs) == {("gates.contract", "gates.user")}
    assert {"policy.mixture", "gates.user", "gates.contract"} <= set(down.entered)
