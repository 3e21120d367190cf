"""What was found, in ten rows?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

ROWS = {  # what a value says, and in which units; the comparison that flatters least first
    "mix_minus_hard_clusters_mean": (
        "Mix-DPO minus users in clusters with a DPO each: test pairs predicted right",
        "share",
    ),
    "people_gain_arguments_by_name_3": (
        "Real people's judgments of arguments: three experts minus one policy (99 %)",
        "nats",
    ),
    "reward_over_base_grammar": ("The grammar expert's texts, better than the base's", "judge"),
    "moe_gain_over_oracle_mean": (
        "A gate that reads prompts of films and books, minus being told which it is",
        "share",
    ),
    "accuracy_gain_mean": ("Mix-DPO, users served from their own pairs: more than DPO", "share"),
    "accuracy_gain_worst": ("... in the group that is served worst", "share"),
    "user_nmi_median": ("Hidden groups found without a label (1: all, 0: chance)", "NMI"),
    "reward_gain_sentiment": (
        "The sentiment expert's texts, better than DPO's at equal KL",
        "judge",
    ),
    "gain_metadata_0_pairs": (
        "New users served by their metadata alone, clean pairs: more than DPO",
        "share",
    ),
    "gain_pairs_16_pairs": (
        "New users served by 16 comparisons of their own, clean pairs: more than DPO",
        "share",
    ),
}
UNITS = {
    "share": "share of pairs",
    "NMI": "NMI",
    "judge": "unit of the evaluation judge",
    "nats": "nats a pair",
}


def headline(values: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """Ten rows of the reference results: what, value, interval, unit, notebook.

    Intervals are of 95 %, or of 99 % where a row says so; of NMI the lowest and highest seed. A value that is not there says so.

    >>> row = {"value": -0.0013, "interval": [-0.003, 0.001], "runs": ["12_baselines-4d00"]}
    >>> headline({"mix_minus_hard_clusters_mean": row})["value"].tolist()[:2]
    ['-0.001', 'not measured yet']
    """
    import pandas as pd

    rows = []
    for name, (what, unit) in ROWS.items():
        known = name in values
        value, interval = (values[name][key] if known else None for key in ("value", "interval"))
        sign = "" if name == "user_nmi_median" else "+"
        rows.append(
            {
                "what": what,
                "value": format(value, f"{sign}.3f") if known else "not measured yet",
                "interval": f"[{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "",
                "unit": UNITS[unit],
                "notebook": ", ".join(run.rsplit("-", 1)[0] for run in values[name]["runs"])
                if known
                else "",
            }
        )
    return pd.DataFrame(rows)
