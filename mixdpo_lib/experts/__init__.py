"""What does each expert say? Families of experts behind one contract; importing this makes all of them known."""

from .adapters import AdapterExperts
from .contract import FAMILIES, Experts, make_experts
from .group_heads import GroupHeads
from .group_tables import GroupTables
from .heads import HeadExperts
from .tables import TabularExperts
from .whole import IndependentExperts

__all__ = [
    "FAMILIES",
    "AdapterExperts",
    "Experts",
    "GroupHeads",
    "GroupTables",
    "HeadExperts",
    "IndependentExperts",
    "TabularExperts",
    "make_experts",
]
