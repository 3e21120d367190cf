"""Which fit is it? All that its result depends on: data, base, experts, gate, beta, lapse, start and configuration."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch

from ..data.pairs import Pairs, values_of
from ..experts.contract import Experts
from ..policy.mixture import MixturePolicy
from ..store import canonical_json, differences
from .config import EARLY, FitConfig

_NAMES = {
    "fit": "configuration",
    "train": "training pairs",
    "validation": "validation pairs",
    "start": "what the policy holds before the fit",
    "looked at": "steps that this version evaluates early",
}


def state_hash(policy: MixturePolicy) -> str:
    """32 digits of the sha256 of what a policy holds: a gate that was told the truth is not one that learns it."""
    digest = hashlib.sha256(str(policy.gate.learns).encode())
    for name, value in sorted(policy.state_dict().items()):
        flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(
            f"{name} {value.dtype} {tuple(value.shape)}".encode() + flat.numpy().tobytes()
        )
    return digest.hexdigest()[:32]


_left: WeakKeyDictionary[MixturePolicy, tuple[str, str]] = WeakKeyDictionary()


@contextmanager
def remembered(policy: MixturePolicy, identity: Mapping[str, Any] | None) -> Iterator[None]:
    """If the block is interrupted, a policy counts as it started, as long as nobody moves it. None: of no folder."""
    try:
        yield
    except BaseException:
        if identity is not None:
            _left[policy] = (state_hash(policy), identity["start"])
        raise


def was_left(policy: MixturePolicy, identity: Mapping[str, Any]) -> bool:
    """Whether a policy stands where an interrupted fit left it, and not where that fit started."""
    return identity["start"] != state_hash(policy)


def _start(policy: MixturePolicy) -> str:
    now = state_hash(policy)
    left, start = _left.get(policy, ("", ""))
    return start if left == now else now


def _hash(values: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(values, default=repr).encode()).hexdigest()[:32]


def _described(data: Pairs | None, columns: Sequence[str]) -> dict[str, Any] | None:
    """How many pairs, and hashes of their texts and of the columns that are read."""
    if data is None:
        return None
    texts = data.texts.texts
    sides = [[tuple(texts[i]) for i in pair] for pair in data.index.tolist()]
    read = [name for name in columns if name in data.rows.column_names]
    return {
        "number": len(data),
        "texts": _hash(sides),
        **{f"column {name!r}": _hash(values_of(data.rows, name)) for name in read},
    }


def fit_identity(
    policy: MixturePolicy, train: Pairs, validation: Pairs | None, config: FitConfig
) -> dict[str, Any]:
    """What a fit of this policy, as it is now, depends on; as JSON.

    Parameters
    ----------
    policy : before its first step, and before `experts.start`, whose numbers follow from data and base. One whose fit
        was interrupted in this process counts as it was then.

    Raises
    ------
    ValueError : experts or a gate that describe themselves by what JSON does not know.
    """
    columns = [*([config.unit] if config.latent == "unit" else []), *policy.gate.reads]
    if config.start.together:
        columns.append(config.start.together)
    reads = bool(policy.gate.reads)
    own = {
        "train": _described(train, list(dict.fromkeys(columns))),
        "validation": _described(validation, list(dict.fromkeys(columns))),
        "base": policy.base and policy.base.fingerprint,
        "experts": policy.experts.describe(),
        "gate": policy.gate.describe(),
        "start": _start(policy),
        "beta": policy.beta,
        "fit": config.identity(policy.n_experts, reads)
        | {
            "learning_rate": config.learning_rate or policy.experts.rates[config.optimizer],
            "keep": config.keep,
        },
    }
    if type(policy.experts).log_prior is not Experts.log_prior:
        own["prior"] = "counted"  # fits of tables from before it was are others
    if (
        validation is not None and config.min_steps
    ):  # a look at all training pairs moves what E-steps read
        own["looked at"] = list(EARLY)
    if policy.given_lapse:  # folders of fits from before there were lapses go on
        own["lapse"] = policy.given_lapse
    try:
        return json.loads(canonical_json(own))
    except (TypeError, ValueError) as error:
        raise ValueError(f"experts or gate cannot be described: {error}") from None


def unlike(found: Mapping[str, Any], expected: Mapping[str, Any], pass_steps: int) -> list[str]:
    """What makes `found` another fit than `expected`, a part each in words; nothing: it may go on.

    More passes go on, unless `min_steps` stretches one of the two: then the stages of their starts differ.
    """
    differ = differences(dict(found), dict(expected))
    if "fit.passes" in differ and isinstance(found.get("fit"), dict):
        passes = [found["fit"].get("passes"), expected["fit"]["passes"]]
        numbers = all(isinstance(one, (int, float)) for one in passes)
        stretched = numbers and min(passes) * pass_steps < expected["fit"]["min_steps"]
        if numbers and passes[0] < passes[1] and not stretched:
            del differ["fit.passes"]
    said = []
    for place, words in differ.items():
        part, _, inner = place.partition(".")
        name = (
            inner
            if part == "fit" and inner
            else ", ".join(filter(None, [_NAMES.get(part, part), inner]))
        )
        said.append(f"{name}: {words}")
    return said
