"""How is a mixture kept? A folder of tensors, a configuration and a card; all of it or nothing."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from ..base.model import Base, load_base
from ..experts import Experts, make_experts
from ..gates import Gate, make_gate
from ..store import (
    MixDPOError,
    Shape,
    canonical_json,
    check_shape,
    plain,
    read_json,
    sha256_of,
    whole_folder,
)

if TYPE_CHECKING:
    from .mixture import MixturePolicy

FORMAT = 2
_NONE = type(None)
_REMEDY = "copy the folder again"
_WRONG = (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError, OverflowError)


def save(
    policy: MixturePolicy, folder: str | Path, provenance: Mapping[str, Any] | None = None
) -> None:
    """Write mixture.safetensors, config.json (base, family, sizes, gate, beta, lapse) and a model card, all or nothing.

    Parameters
    ----------
    provenance : what the card says of where the mixture comes from: data, run, seed, results; one line each.

    Raises
    ------
    MixDPOError : the folder holds other things, or cannot be written, or the policy holds numbers that are none; nothing
        half-done is left.
    """
    if not isinstance(provenance or {}, Mapping):
        raise ValueError(f"provenance: found {provenance!r}, expected such as {{'data': 'mine'}}")
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
        "lapse": policy.given_lapse,
    }
    state = {k: v.detach().cpu().contiguous().clone() for k, v in policy.state_dict().items()}
    check_numbers(f"{folder}: not written", policy.experts, policy.gate)
    with whole_folder(folder, mark="mixture.safetensors") as place:
        save_file(state, place / "mixture.safetensors")
        config["tensors_sha256"] = sha256_of(place / "mixture.safetensors")
        config["config_sha256"] = _config_hash(config)
        (place / "config.json").write_text(json.dumps(config, indent=1, default=plain) + "\n")
        (place / "README.md").write_text(model_card(config, provenance or {}))


def load(
    folder: str | Path, base: Base | None = None, bases: Sequence[Base] | None = None
) -> tuple[tuple[Experts, Gate, float, float | str], dict[str, Tensor]]:
    """Experts, gate, beta and lapse of a saved mixture, and the lapse rate where it was learned, by its name.

    The base must be the one that the mixture was trained on.

    Parameters
    ----------
    base : the base, instead of loading it by name. bases : of a family that has one for each expert.

    Raises
    ------
    MixDPOError : a file is missing or damaged (key or tensor, found and expected are named), the tensors are not those
        of config.json, or a gate or family whose module was not imported.
    ValueError : another base than the one that the mixture was trained on.
    """
    folder = Path(folder)
    for name in ("config.json", "mixture.safetensors"):
        if not (folder / name).is_file():
            raise MixDPOError(
                f"{folder / name}: not found; expected a folder written by MixturePolicy.save_pretrained"
            )
    config = read_config(folder / "config.json")
    state = _read_tensors(folder / "mixture.safetensors", config.get("tensors_sha256"))
    lapse = config.get("lapse", 0.0)
    learned = _learned_lapse(folder / "mixture.safetensors", state) if lapse == "learn" else {}
    given, refused = list(bases or []), []

    def find_base(name: str | None = None, wanted: str | None = None) -> Any:
        try:
            if name is None and base is None and config["base"] is None:
                return None
            if name is None:
                one = base if base is not None else load_base(config["base"], chat=config["chat"])
            else:
                one = given.pop(0) if given else load_base(name, chat=config["chat"])
            check_base(folder, one, wanted or config["base_fingerprint"], config["chat"])
        except Exception as error:  # of the base, and not of what config.json says of the mixture
            refused.append(error)
            raise
        return one

    place = folder / "config.json"
    try:
        if config["format"] == 1:
            config, state = _from_format_1(folder, config, state)
        experts = make_experts(config["experts"], find_base)
        gate = make_gate(config["gate"])
    except MixDPOError as error:
        if error in refused or str(folder) in str(error):
            raise
        raise MixDPOError(f"{place}: {error}") from error
    except _WRONG as error:
        if error in refused:
            raise
        raise MixDPOError(f"{place}: {_said(error)}; {_REMEDY}") from error
    for part, found in (("experts", experts.n_experts), ("gate", gate.n_experts)):
        if found != config["n_experts"]:
            raise MixDPOError(
                f"{place}: {part}: found {found} of them, expected n_experts = {config['n_experts']}; {_REMEDY}"
            )
    try:
        _load_tensors(experts, gate, state)
    except _WRONG as error:
        raise MixDPOError(
            f"{folder}/mixture.safetensors: not the tensors of config.json ({_said(error)}); {_REMEDY}"
        ) from error
    check_numbers(f"{folder}/mixture.safetensors", experts, gate)
    return (experts, gate, config["beta"], lapse), learned


def _learned_lapse(path: Path, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The learned rate, taken out of the tensors."""
    rate = state.pop("lapse_rate", None)
    if rate is None or rate.dim() or not 0 < float(rate) < 1:
        found = "no such tensor" if rate is None else rate.tolist()
        raise MixDPOError(
            f"{path}: lapse_rate: found {found}, expected a number above 0 and below 1; {_REMEDY}"
        )
    return {"lapse_rate": rate}


def _config_hash(config: Mapping[str, Any]) -> str:
    """sha256 of all that config.json says beside this hash; nothing where it holds numbers that are none."""
    rest = {name: value for name, value in config.items() if name != "config_sha256"}
    try:
        return hashlib.sha256(canonical_json(rest).encode()).hexdigest()
    except ValueError:
        return "none"


def _said(error: Exception) -> str:
    """What an error says, in a line."""
    said = (str(error).strip().splitlines() or [""])[-1].strip()
    return f"{said}: no such key" if isinstance(error, KeyError) else said or type(error).__name__


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a saved mixture, of the right shape.

    Raises
    ------
    MixDPOError : another format, a key that is absent, of another type or out of range; not what was written.
    """
    config = check_shape(path, read_json(path), {"format": (int, float, str, bool, _NONE)}, _REMEDY)
    if config["format"] not in (1, FORMAT) or isinstance(config["format"], bool):
        raise MixDPOError(
            f"{path}: format {config['format']!r}, expected {FORMAT} (or 1): it was written by another version, or is "
            "no mixture"
        )
    shape: Shape = {
        "base": (str, _NONE),
        "base_fingerprint": (str, _NONE),
        "chat": bool,
        "n_experts": int,
        "experts": dict,
        "gate": dict,
        "beta": float,
        "lapse": (float, str),
        "tensors_sha256": str,
        "config_sha256": str,
    }
    newer = ("lapse", "tensors_sha256", "config_sha256")  # older mixtures have none
    check_shape(path, config, shape, _REMEDY, optional=newer)
    check_shape(f"{path}: experts", config["experts"], {"family": str}, _REMEDY)
    check_shape(f"{path}: gate", config["gate"], {"gate": str}, _REMEDY)
    if config["n_experts"] < 1:
        raise MixDPOError(f"{path}: n_experts: found {config['n_experts']}, expected 1 or more")
    if not 0 < config["beta"] < math.inf:
        raise MixDPOError(f"{path}: beta: found {config['beta']}, expected above 0; {_REMEDY}")
    lapse = config.get("lapse", 0.0)
    if not (lapse == "learn" if isinstance(lapse, str) else 0 <= lapse < 1):
        raise MixDPOError(
            f'{path}: lapse: found {lapse!r}, expected a rate of at least 0 and below 1, or "learn"; {_REMEDY}'
        )
    if config.get("config_sha256", "") not in ("", _config_hash(config)):
        raise MixDPOError(
            f"{path}: found another content than was written (config_sha256); {_REMEDY}, or remove that key if the "
            "change is meant"
        )
    return config


def _read_tensors(path: Path, sha256: str | None) -> dict[str, Tensor]:
    try:
        state = load_file(path)
    except Exception as error:
        raise MixDPOError(f"{path}: not readable ({error}); {_REMEDY}") from error
    if sha256 is not None and (found := sha256_of(path)) != sha256:
        raise MixDPOError(
            f"{path}: found sha256 {found[:16]}, expected {sha256[:16]} (config.json); {_REMEDY}"
        )
    return state


def _load_tensors(experts: Experts, gate: Gate, state: Mapping[str, Tensor]) -> None:
    """Put the saved tensors into experts and gate, each of them and nothing else.

    Raises
    ------
    ValueError, RuntimeError, KeyError : a tensor too many, too few, of another shape or kind of number.
    """
    parts = {"experts": experts, "gate": gate}
    if strange := [name for name in state if name.split(".")[0] not in parts]:
        raise ValueError(f"{strange[0]}: belongs neither to experts nor to a gate")
    for part, module in parts.items():
        own = {n.removeprefix(f"{part}."): v for n, v in state.items() if n.startswith(f"{part}.")}
        if isinstance(module, Experts):
            module.fit_state(own)
        for name, value in module.state_dict().items():
            if name in own and own[name].is_floating_point() != value.is_floating_point():
                raise ValueError(f"{part}.{name}: found {own[name].dtype}, expected {value.dtype}")
        module.load_state_dict(own)


def check_numbers(place: str, experts: Experts, gate: Gate) -> None:
    """Refuse parameters that are not finite, and buffers with NaN or infinity; -inf may stand for log 0 in a gate.

    Raises
    ------
    MixDPOError : the tensor is named.
    """
    for part, module in (("experts", experts), ("gate", gate)):
        learned = dict(module.named_parameters())
        for name, value in module.state_dict().items():
            if not value.is_floating_point():
                continue
            wrong = ~value.isfinite()
            if part == "gate" and name not in learned:
                wrong &= value != -math.inf
            if wrong.any():
                raise MixDPOError(
                    f"{place}: {part}.{name}: found {int(wrong.sum())} numbers that are NaN or infinite, expected "
                    "none; a fit that diverged leaves them: fit again with a lower learning_rate, or copy the folder "
                    "again"
                )
    if not gate.reads and not bool((gate.log_w().detach().logsumexp(-1).abs() < 1e-3).all()):
        total = gate.log_w().detach().exp().sum(-1).tolist()
        raise MixDPOError(
            f"{place}: gate: found weights that sum to {total}, expected 1; {_REMEDY}"
        )


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


def check_base(folder: Path, base: Base, wanted: str, trained_chat: bool | None = None) -> None:
    """Refuse another base than the one that a mixture was trained on."""
    if not isinstance(base, Base):
        raise ValueError(
            f"base: found {base!r:.60}, expected what load_base gives: base=load_base(...), or none: it is loaded by name"
        )
    if base.fingerprint != wanted:
        other = (
            f"; it was trained with chat={trained_chat}, and this one has chat={base.chat}"
            if trained_chat is not None and trained_chat != base.chat
            else ""
        )
        raise ValueError(
            f"{folder}: trained on a base with fingerprint {wanted[:16]}, found {base.fingerprint[:16]} "
            f"({base.name}, {str(base.model.dtype).removeprefix('torch.')}){other}: give the base that it was trained on, "
            "base=load_base(...) with its revision, dtype and chat"
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
        "Trained by mixture preference optimisation (arXiv 2510.08256). To read this folder:",
        "",
        "```python",
        "import mixdpo_lib as mx",
        "",
        'policy = mx.MixturePolicy.from_pretrained("this folder")  # loads the base by its name; or give base=',
        "```",
        "",
        f"- family: {experts['family']}",
        f"- gate: {gate['gate']}{_read_by(gate)}",
        f"- chat: {str(config['chat']).lower()} (whether prompts stand in the model's template)",
        f"- beta: {config['beta']}",
        f"- lapse: {config['lapse']}",
        f"- fingerprint of the base: {config['base_fingerprint']}",
        "",
        "## Provenance",
        "",
        *([f"- {name}: {value}" for name, value in provenance.items()] or ["Not given."]),
        "",
    ]
    return "\n".join(lines)


def _read_by(gate: Mapping[str, Any]) -> str:
    """The columns that a gate, or one inside it, reads of a user, as a card says them: `age` (a number), ..."""
    columns: dict[str, Any] = {}
    for one in _and_inside(gate):
        own = one.get("columns")
        columns |= own if isinstance(own, Mapping) else {}  # what gates of others call so is theirs
    said = ", ".join(
        f"`{name}` ({'one of ' + ', '.join(map(str, kind)) if isinstance(kind[0], str) else 'a number'})"
        for name, kind in columns.items()
        if isinstance(kind, list | tuple) and kind
    )
    return f", which reads {said}: `policy.user(metadata={{...}})`" if said else ""


def _and_inside(gate: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """A description of a gate, and those of the gates that it is made of."""
    yield gate
    for value in gate.values():
        for one in value if isinstance(value, list | tuple) else (value,):
            if isinstance(one, Mapping) and isinstance(one.get("gate"), str):
                yield from _and_inside(one)
