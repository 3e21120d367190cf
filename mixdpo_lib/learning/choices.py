"""What happens to a choice that there is not?"""

from __future__ import annotations

from dataclasses import fields
from typing import Any


class Choices:
    """What is chosen by name in a dataclass: a name that there is not is refused with those that there are.

    >>> from mixdpo_lib import FitConfig
    >>> FitConfig(steps=3)
    Traceback (most recent call last):
    TypeError: FitConfig: found steps=3, expected some of latent, unit, ...
    """

    def __new__(cls, *_: Any, **choices: Any) -> Any:
        """Looks at the names alone."""
        known = [f.name for f in fields(cls)]  # type: ignore[arg-type]
        for name, value in choices.items():
            if name not in known:
                raise TypeError(
                    f"{cls.__name__}: found {name}={value!r}, expected some of {', '.join(known)}"
                )
        return super().__new__(cls)
