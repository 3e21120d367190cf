"""Files are damaged, and texts changed: by bytes, and where they are JSON also by their structure."""

import copy
import json
import shutil

from mutations import mutate

VALUES = [None, True, 0, -1, 1e308, "", "x", "../../etc", [], {}, [[1]], {"a": 1}, 3, "0.5", -0.0]


def _places(value, path=()):
    yield path
    inner = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, one in list(inner)[:200]:
        yield from _places(one, (*path, key))


def structure_of(content, rng):
    """JSON with one value changed, removed or renamed."""
    whole = json.loads(content)
    path = rng.choice(list(_places(whole)))
    if not path:
        return json.dumps(rng.choice(VALUES)).encode()
    *above, last = path
    place = whole
    for key in above:
        place = place[key]
    way = rng.randrange(4)
    if way == 0:
        del place[last]
    elif way == 1 and isinstance(place, dict):
        place[f"{last}x"] = place.pop(last)
    elif way == 2 and isinstance(place, list):
        place.append(copy.deepcopy(place[last]))
    else:
        place[last] = rng.choice(VALUES)
    return json.dumps(whole).encode()


def change(content, rng, name=""):
    """One mutation of a file's content."""
    if name.endswith((".json", ".ipynb")) and rng.random() < 0.7:
        try:
            return structure_of(content, rng)
        except (ValueError, RecursionError):
            pass
    return mutate(content, rng)


def damage(file, rng):
    """Do something to a file as a bad disk, a full one or a careless copy does; returns what."""
    way = rng.choice(
        ["cut", "emptied", "one bit", "overwritten", "removed", "a folder", "longer", "zeros"]
    )
    content = file.read_bytes()
    if way == "cut":
        file.write_bytes(content[: rng.randrange(len(content) or 1)])
    elif way == "emptied":
        file.write_bytes(b"")
    elif way == "one bit" and content:
        at = rng.randrange(len(content))
        file.write_bytes(
            content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
        )
    elif way == "overwritten":
        file.write_bytes(rng.randbytes(len(content)))
    elif way == "removed":
        file.unlink()
    elif way == "a folder":
        file.unlink()
        file.mkdir()
    elif way == "longer":
        file.write_bytes(content + rng.randbytes(rng.randrange(1, 99)))
    else:
        file.write_bytes(bytes(len(content)))
    return way


def copy_of(folder, place):
    """A fresh copy of a folder."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(folder, place, symlinks=True)
    return place
