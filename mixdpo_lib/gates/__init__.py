"""Which expert is asked? Gates give log w, the weights of the experts; importing this makes all of them known."""

from .contract import GATES, Gate, make_gate
from .direction import DirectionGate
from .grown import GrownGate
from .membership import MixedMembershipGate
from .prompt import ContextGate
from .user import UserGate
from .weights import FixedWeights, LearnedWeights

__all__ = [
    "GATES",
    "ContextGate",
    "DirectionGate",
    "FixedWeights",
    "Gate",
    "GrownGate",
    "LearnedWeights",
    "MixedMembershipGate",
    "UserGate",
    "make_gate",
]
