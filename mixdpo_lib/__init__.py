"""Mix-DPO and MoE-DPO: preference optimisation with a latent expert.

Names are loaded when they are first used, so that `import mixdpo_lib` costs nothing. The movie-review study is asked for
by name: `from mixdpo_lib.study import ReviewUsers`.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "Base": "base.model",
    "load_base": "base.model",
    "load_preferences": "data.files",
    "example_preferences": "data.files",
    "example_mixture": "policy.example",
    "explore": "explorer.panel",
    "report": "choosing",
    "choose_k": "choosing",
    "FixedWeights": "gates.weights",
    "LearnedWeights": "gates.weights",
    "ContextGate": "gates.prompt",
    "DirectionGate": "gates.direction",
    "UserGate": "gates.user",
    "MixedMembershipGate": "gates.membership",
    "HeadExperts": "experts.heads",
    "AdapterExperts": "experts.adapters",
    "IndependentExperts": "experts.whole",
    "GroupHeads": "experts.group_heads",
    "GroupTables": "experts.group_tables",
    "item_pairs": "data.items",
    "TabularExperts": "experts.tables",
    "MixturePolicy": "policy.mixture",
    "fit": "learning.fit",
    "fit_gate": "learning.fit",
    "fit_table": "learning.exact",
    "information_criteria": "evaluation",
    "FitConfig": "learning.config",
    "FitResult": "learning.result",
    "Start": "learning.starts",
    "Stop": "learning.config",
    "Routing": "learning.routing",
    "Exact": "learning.inference",
    "Relaxed": "learning.inference",
    "Recognition": "learning.inference",
    "Annealed": "learning.inference",
    "EffectiveExperts": "learning.inference",
    "grow": "learning.growing",
    "Growth": "learning.deciding",
    "MixDPOTrainer": "learning.trainer",
    "Gate": "gates.contract",
    "Experts": "experts.contract",
    "Pairs": "data.pairs",
    "start_run": "runner.record",
    "load_table": "runner.results",
    "load_values": "runner.results",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        try:
            return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
        except ModuleNotFoundError as error:
            extra = {"runner": "runner", "explorer": "lab"}.get(_HOME[name].split(".")[0])
            if extra and not str(error.name).startswith(__name__):
                raise ModuleNotFoundError(
                    f"{name} needs {error.name}: pip install 'mixdpo[{extra}]'"
                ) from error
            raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
