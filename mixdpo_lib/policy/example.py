"""Which fitted mixture is shipped, and whom does each of its experts serve?"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..base.model import Base
from ..store import MixDPOError, check_shape, project_root, read_json
from .mixture import MixturePolicy

_AGAIN = "make it again: python scripts/package_mixture.py"


def example_folder() -> Path:
    """`data/mixtures/review_users/` of the checkout; its README says what the mixture was trained on."""
    return project_root() / "data" / "mixtures" / "review_users"


def example_mixture(base: Base | None = None) -> MixturePolicy:
    """A mixture of the study that was fitted before: three experts for three hidden groups of users of film reviews.

    The heads are shipped (a few hundred kB), the frozen base is the packaged one, which is fetched when it is first used.

    Parameters
    ----------
    base : the packaged base, where it has been loaded already.

    Raises
    ------
    MixDPOError : no checkout, or a file that is missing or damaged. ValueError : another base.
    """
    return MixturePolicy.from_pretrained(example_folder(), base)


def example_about() -> Mapping[str, Any]:
    """What belongs to `example_mixture`: `serves`, the reward of the group that each expert serves; `comparisons`, pairs of
    texts of the base on prompts that no expert was trained on (prompt, first, second); `design` and `seed` of its fit.

    Raises
    ------
    MixDPOError : no checkout, or a file that is missing or of another shape.

    >>> example_about()["serves"]
    ['informativeness', 'sentiment', 'grammar']
    """
    path = example_folder() / "about.json"
    shape = {"serves": list, "comparisons": list, "design": str, "seed": int}
    about = check_shape(path, read_json(path), shape, _AGAIN)
    if not all(isinstance(one, list) and len(one) == 3 for one in about["comparisons"]):
        raise MixDPOError(f"{path}: comparisons: expected [prompt, first, second] each; {_AGAIN}")
    return about
