"""The movie-review study: never imported by the method. Names are loaded when they are first used."""

from importlib import import_module
from typing import Any

_HOME = {
    "load_reviews": "reviews",
    "CandidateConfig": "candidates",
    "DesignConfig": "simulated_people",
    "simulate_preferences": "simulated_people",
    "REWARDS": "judges.contract",
    "score_texts": "judges.panel",
    "Study": "fits",
    "ReviewUsers": "review_users",
    "ReviewUsersConfig": "review_users",
    "review_users_config": "review_users",
    "Baselines": "baselines",
    "CircleUsers": "circle_users",
    "TwoDomains": "two_domains",
    "TwoDomainsConfig": "domain_prompts",
    "two_domains_config": "two_domains",
    "SizeStudy": "capacity",
    "Capacity": "capacity",
    "run_families": "capacity",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
