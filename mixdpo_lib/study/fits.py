"""What do the studies keep of a fit?"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pandas as pd
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..base.features import PairFeatures, TextFeatures
from ..learning.config import FitConfig, FitResult
from ..learning.fit import fit
from ..policy.mixture import MixturePolicy
from ..store import artefact_key, cache_folder, cached, read_json, write_json_atomic

VERSION = 4


def kept_fit(
    policy: MixturePolicy, train: PairFeatures, validation: PairFeatures, config: FitConfig, texts: TextFeatures,
    parameters: dict[str, Any],
) -> tuple[FitResult, Tensor]:  # fmt: skip
    """Fit `policy` in place, or read the fit from the cache: the result, and the rewards (texts, experts).

    The policy is left at its best validation step. `parameters` and the texts are the identity of the fit.
    """
    inputs = [texts.key]
    policy.heads.activate_responses(train)

    def build(folder: Path) -> None:
        checkpoints = cache_folder() / "checkpoints" / artefact_key("fit", VERSION, parameters, inputs)
        result = fit(policy, train, config, validation, folder=checkpoints)
        result.history.to_csv(folder / "history.csv", index=False)
        result.restarts.to_csv(folder / "restarts.csv", index=False)
        facts = {"stop_reason": result.stop_reason, "best_step": result.best_step}
        write_json_atomic(folder / "result.json", facts)
        states = {f"{s}/{k}": v.clone() for s, state in result.snapshots.items() for k, v in state.items()}
        save_file({k: v for k, v in states.items() if "active_ids" not in k}, folder / "snapshots.safetensors")
        policy.load_state_dict(result.snapshots[result.best_step])
        save_file({"rewards": policy.text_rewards(texts)}, folder / "rewards.safetensors")
        shutil.rmtree(checkpoints, ignore_errors=True)

    folder = cached("fit", VERSION, parameters, build, inputs=inputs)
    facts = read_json(folder / "result.json")
    snapshots: dict[int, dict[str, Tensor]] = {}
    for name, value in load_file(folder / "snapshots.safetensors").items():
        step, key = name.split("/", 1)
        snapshots.setdefault(int(step), {})[key] = value
    result = FitResult(
        pd.read_csv(folder / "history.csv"), facts["stop_reason"], facts["best_step"],
        pd.read_csv(folder / "restarts.csv"), snapshots,
    )  # fmt: skip
    policy.load_state_dict(snapshots[result.best_step], strict=False)
    return result, load_file(folder / "rewards.safetensors")["rewards"]
