"""What finished runs left is compared with its records before it is quoted."""

import pytest

from mixdpo_lib import store
from mixdpo_lib.runner import results
from mixdpo_lib.store import MixDPOError


def value(number):
    return {"value": number, "unit": "nats", "interval": None, "n": 3, "seeds": [0], "runs": ["r"]}


@pytest.fixture
def reference(project):
    """Two notebooks' records, and the values of the whole."""
    folder = project / "figures" / "reference"
    numbers = {"04_mix": {"gain": value(0.5)}, "05_moe": {"loss": value(0.25)}}
    for name, own in numbers.items():
        path = store.write_json_atomic(folder / name / "values.json", own)
        entry = {"sha256": store.sha256_of(path), "bytes": path.stat().st_size}
        manifest = {"outputs": {"values.json": entry}, "seconds": 2.5, "profile": "default"}
        store.write_json_atomic(folder / name / "manifest.json", manifest)
    both = {"minutes_default": value(3.0)} | numbers["04_mix"] | numbers["05_moe"]
    store.write_json_atomic(folder / "values.json", both)
    return folder


def test_values_that_are_whole(reference):
    assert results.load_values("reference", "04_mix")["gain"]["value"] == 0.5
    assert set(results.load_values("reference")) == {"gain", "loss", "minutes_default"}


def test_a_changed_number_is_not_quoted(reference):
    path = reference / "04_mix" / "values.json"
    path.write_text(path.read_text().replace("0.5", "7.5"))
    for notebook in ("04_mix", None):
        with pytest.raises(MixDPOError, match=r"04_mix: values.json: found .*manifest.json"):
            results.load_values("reference", notebook)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v["gain"].update(value=7.5), r"gain: found 7\.5, expected 0\.5 .*04_mix/values"),
        (lambda v: v["gain"].update(interval=[0, 1]), r"gain: found 0\.5, expected 0\.5 with all"),
        (lambda v: v.pop("loss"), "loss: found no such value, expected 0.25"),
        (lambda v: v.update(more=3), "more: found 3, expected an object with value, unit"),
        (lambda v: v["minutes_default"].update(value="3"), "value: found .3., expected a number"),
    ],
)
def test_values_of_the_whole_agree_with_those_of_the_notebooks(reference, change, message):
    values = store.read_json(reference / "values.json")
    change(values)
    store.write_json_atomic(reference / "values.json", values)
    with pytest.raises(MixDPOError, match=message):
        results.load_values("reference")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], r"found \[\], expected an object"),
        ({}, "outputs: found no such key"),
        ({"outputs": [], "seconds": 1}, r"outputs: found \[\], expected an object"),
        ({"outputs": {"values.json": 3}, "seconds": 1}, "values.json: found 3"),
        (
            {"outputs": {"/etc/passwd": {"sha256": "0" * 64, "bytes": 1}}, "seconds": 1},
            "inside the",
        ),
        ({"outputs": {}, "seconds": "1"}, "seconds: found .1., expected a number"),
        ({"outputs": {}, "seconds": 1, "seconds_by_profile": {"a": None}}, "a: found null"),
    ],
)
def test_a_manifest_of_another_shape(reference, content, message):
    store.write_json_atomic(reference / "04_mix" / "manifest.json", content)
    for call in (
        lambda: results.verify_manifest(reference / "04_mix"),
        lambda: results.load_values("reference", "04_mix"),
        lambda: results.durations("04_mix"),
    ):
        with pytest.raises(MixDPOError, match=f"04_mix/manifest.json.*{message}"):
            call()


@pytest.mark.parametrize(
    "change", [lambda m: m["outputs"].clear(), lambda m: m.update(left_out=["values.json"])]
)
def test_values_that_their_manifest_does_not_list(reference, change):
    path = reference / "04_mix" / "manifest.json"
    manifest = store.read_json(path)
    change(manifest)
    store.write_json_atomic(path, manifest)
    with pytest.raises(
        MixDPOError, match=r"values\.json: found a file that manifest\.json does not"
    ):
        results.load_values("reference", "04_mix")
