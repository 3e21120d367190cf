"""How is a mixture kept?"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..base.model import Base


def check_base(folder: Path, base: Base, wanted: str) -> None:
    if base.fingerprint != wanted:
        raise ValueError(
            f"{folder}: trained on a base with fingerprint {wanted}, found {base.fingerprint} "
            f"({base.name}): give the base that it was trained on"
        )


def model_card(config: Mapping[str, Any], provenance: Mapping[str, Any]) -> str:
    experts, gate = config["experts"], config["gate"]
    lines = [
        "---", f"base_model: {config['base']}", "library_name: mixdpo", "tags: [mix-dpo, moe-dpo, preference, mixture]",
        "---", "", f"# A mixture of {experts['n_experts']} experts on {config['base']}", "",
        "Trained by mixture preference optimisation (arXiv 2510.08256). `mixdpo_lib.MixturePolicy.from_pretrained` "
        "reads this folder.", "",
        f"- family: {experts['family']}", f"- gate: {gate['gate']}", f"- beta: {config['beta']}",
        f"- fingerprint of the base: {config['base_fingerprint']}", "", "## Provenance", "",
        *([f"- {name}: {value}" for name, value in provenance.items()] or ["Not given."]), "",
    ]  # fmt: skip
    return "\n".join(lines)
