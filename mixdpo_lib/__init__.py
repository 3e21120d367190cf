"""Mix-DPO and MoE-DPO: preference optimisation with a latent expert.

Names are loaded when they are first used, so that `import mixdpo_lib` costs nothing.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "load_base": "sources", "load_reviews": "sources", "Base": "sources",
    "FixedWeights": "gating", "LearnedWeights": "gating", "ContextGate": "gating", "UserGate": "gating",
    "MixedMembershipGate": "gating", "HeadExperts": "experts", "TabularExperts": "tabular",
    "AdapterExperts": "model_experts", "IndependentExperts": "model_experts",
    "GumbelSchedule": "em", "MixturePolicy": "mixture",
    "load_preferences": "preferences", "simulate_preferences": "preferences", "CandidateConfig": "preferences",
    "DesignConfig": "preferences", "GROUPS": "preferences", "REWARDS": "rewards", "score_texts": "rewards",
    "fit": "trainer", "FitConfig": "trainer", "FitResult": "trainer", "MixDPOTrainer": "trainer",
    "fit_gate": "trainer", "DomainStudy": "domains", "DomainConfig": "domains", "domain_config": "domains",
    "SizeStudy": "sizes", "Capacity": "sizes", "run_families": "sizes",
    "Study": "study", "StudyConfig": "study", "study_config": "study", "start_run": "runs",
    "load_table": "runs", "load_values": "runs",
}  # fmt: skip
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
