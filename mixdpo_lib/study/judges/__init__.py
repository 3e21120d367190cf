"""How good is a text? Rewards, each by two judges. Names are loaded when they are first used."""

from importlib import import_module
from typing import Any

_HOME = {
    "REWARDS": "contract",
    "ROLES": "contract",
    "Judge": "contract",
    "JudgeConfig": "contract",
    "split_reviews": "contract",
    "Exam": "exam",
    "Mark": "exam",
    "Judges": "panel",
    "fit_judges": "panel",
    "judges": "panel",
    "score_texts": "panel",
    "report_card": "report",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
