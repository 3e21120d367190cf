"""How is a mixture kept? A folder of tensors, a configuration and a card; all of it or nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from ..base.model import Base, load_base
from ..experts import Experts, make_experts
from ..gates import Gate, make_gate
from ..store import MixDPOError, read_json, whole_folder

if TYPE_CHECKING:
    from .mixture import MixturePolicy

FORMAT = 2


def save(
    policy: MixturePolicy, folder: str | Path, provenance: Mapping[str, Any] | None = None
) -> None:
    """Write mixture.safetensors, config.json (base, family, sizes, gate, beta) and a model card, all or nothing.

    Parameters
    ----------
    provenance : what the card says of where the mixture comes from: data, run, seed, results; one line each.

    Raises
    ------
    MixDPOError : the folder cannot be written; nothing half-done is left.
    """
    base = policy.base
    config = {
        "format": FORMAT,
        "base": base and base.name,  # tables without words have none
        "base_fingerprint": base and base.fingerprint,
        "chat": bool(base and base.chat),
        "n_experts": policy.n_experts,
        "experts": policy.experts.describe(),
        "gate": policy.gate.describe(),
        "beta": policy.beta,
    }
    with whole_folder(folder) as place:
        state = {k: v.detach().cpu().contiguous().clone() for k, v in policy.state_dict().items()}
        save_file(state, place / "mixture.safetensors")
        (place / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        (place / "README.md").write_text(model_card(config, provenance or {}))


def load(
    folder: str | Path, base: Base | None = None, bases: Sequence[Base] | None = None
) -> tuple[Experts, Gate, float]:
    """Experts, gate and beta of a saved mixture; its base must be the one that it was trained on.

    Parameters
    ----------
    base : the base, instead of loading it by name. bases : of a family that has one for each expert.

    Raises
    ------
    MixDPOError : a file is missing or damaged, its tensors are not those of config.json, or a gate or family whose
        module was not imported.
    ValueError : another base than the one that the mixture was trained on.
    """
    folder = Path(folder)
    for name in ("config.json", "mixture.safetensors"):
        if not (folder / name).is_file():
            raise MixDPOError(
                f"{folder / name}: not found; expected a folder written by MixturePolicy.save_pretrained"
            )
    config: dict[str, Any] = read_json(folder / "config.json")
    if config.get("format") not in (1, FORMAT):
        raise MixDPOError(
            f"{folder}/config.json: format {config.get('format')!r}, expected {FORMAT} (or 1): it was written by "
            "another version, or is no mixture"
        )
    try:
        state = load_file(folder / "mixture.safetensors")
    except Exception as error:
        raise MixDPOError(
            f"{folder}/mixture.safetensors: not readable ({error}); copy the folder again"
        ) from error
    if config["format"] == 1:
        config, state = _from_format_1(folder, config, state)
    given = list(bases or [])

    def find_base(name: str | None = None, wanted: str | None = None) -> Base:
        if name is None:
            one = base if base is not None else load_base(config["base"], chat=config["chat"])
        else:
            one = given.pop(0) if given else load_base(name)
        check_base(folder, one, wanted or config["base_fingerprint"])
        return one

    experts = make_experts(config["experts"], find_base)
    gate = make_gate(config["gate"])
    own = {
        part: {n.removeprefix(f"{part}."): v for n, v in state.items() if n.startswith(f"{part}.")}
        for part in ("experts", "gate")
    }
    try:
        experts.fit_state(own["experts"])
        experts.load_state_dict(own["experts"])
        gate.load_state_dict(own["gate"])
    except (RuntimeError, KeyError) as error:
        said = str(error).splitlines()[-1].strip()
        raise MixDPOError(
            f"{folder}/mixture.safetensors: not the tensors of config.json ({said}); copy the folder again"
        ) from error
    return experts, gate, config["beta"]


def _from_format_1(
    folder: Path, config: Mapping[str, Any], state: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A mixture of the first format in the words of the second.

    Raises
    ------
    MixDPOError : an option that is gone and was not at its default; it is named.
    """

    def without(options: Mapping[str, Any], gone: Mapping[str, Any]) -> dict[str, Any]:
        for name, default in gone.items():
            if options.get(name, default) != default:
                raise MixDPOError(
                    f"{folder}/config.json: {name}={options[name]!r} of the first format is no longer there; fit the "
                    "mixture again, or read it with version 0.1"
                )
        return {name: value for name, value in options.items() if name not in gone}

    def gate(options: Mapping[str, Any]) -> dict[str, Any]:
        own = without(options, {"gate_temperature": 1.0, "width": 0})
        if "gates" in own:
            own["gates"] = [gate(one) for one in own["gates"]]
        pooling = own.pop("pooling", "last")
        if pooling != "last":
            raise MixDPOError(
                f"{folder}/config.json: pooling={pooling!r} of the first format is no longer there; fit the mixture "
                "again, or read it with version 0.1"
            )
        if own["gate"] == "ContextGate":  # it kept both halves of the state and read the second
            own["n_features"] //= 2
        return own

    renamed = {
        name.replace("gate.log_w", "gate.log_weights"): value for name, value in state.items()
    }
    for name, value in renamed.items():
        if name.startswith("gate.") and name.endswith((".mean", ".scale")):
            renamed[name] = value[len(value) // 2 :].contiguous()
    experts = without(config["experts"], {"encoder": 0})
    if experts["family"] == "IndependentExperts":
        experts.pop("n_experts", None)  # the number of its bases
    return {**config, "experts": experts, "gate": gate(config["gate"])}, renamed


def check_base(folder: Path, base: Base, wanted: str) -> None:
    """Refuse another base than the one that a mixture was trained on."""
    if base.fingerprint != wanted:
        raise ValueError(
            f"{folder}: trained on a base with fingerprint {wanted}, found {base.fingerprint} "
            f"({base.name}): give the base that it was trained on"
        )


def model_card(config: Mapping[str, Any], provenance: Mapping[str, Any]) -> str:
    """README.md of a saved mixture, with the head that model hubs read."""
    experts, gate = config["experts"], config["gate"]
    lines = [
        "---",
        f"base_model: {config['base']}",
        "library_name: mixdpo",
        "tags: [mix-dpo, moe-dpo, preference, mixture]",
        "---",
        "",
        f"# A mixture of {config['n_experts']} experts on {config['base']}",
        "",
        "Trained by mixture preference optimisation (arXiv 2510.08256). `mixdpo_lib.MixturePolicy.from_pretrained` "
        "reads this folder.",
        "",
        f"- family: {experts['family']}",
        f"- gate: {gate['gate']}",
        f"- beta: {config['beta']}",
        f"- fingerprint of the base: {config['base_fingerprint']}",
        "",
        "## Provenance",
        "",
        *([f"- {name}: {value}" for name, value in provenance.items()] or ["Not given."]),
        "",
    ]
    return "\n".join(lines)
