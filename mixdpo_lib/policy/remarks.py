"""What must be said of a mixture beside its numbers? Whom it did not measure, and what it does not know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
import torch

from ..data.items import QUESTION
from ..data.pairs import Pairs, Text
from ..gates.metadata import naming_columns
from .mixture import MixturePolicy

FEW_UNITS = 10  # fewer drawn with replacement give an interval that is too narrow
LOST = 10.0  # nats a text that chosen answers may lie below the base: e^10 times less likely
SAME = 0.02  # total variation of weights from their mean: one text in fifty comes of another expert


def left_out(train: Pairs, test: Pairs, unit: str, unknown: Sequence[str]) -> list[str]:
    """Units that are not measured, or not by their own pairs, by name; and whether there are few."""
    trained, tested = train.units(unit)[1], test.units(unit)[1]
    measured = set(tested)
    untested = [name for name in trained if name not in measured]
    notes = []
    if untested:
        notes.append(f"without test pairs, not measured: {', '.join(untested)}")
    if unknown:
        notes.append(f"without training pairs, served by the gate alone: {', '.join(unknown)}")
    if len(tested) < FEW_UNITS:
        notes.append(f"{len(tested)} units are few: the interval is rough and too narrow")
    return notes


def seen_before(train: Pairs, held_out: Pairs, unit: str | None, what: str = "test") -> list[str]:
    """How many held-out pairs stand among the training pairs, of the same unit (None: of anybody) and the same answers.

    Items of a survey are left out: the same two put to several people, or again, is what it is made of.
    """

    def rows(pairs: Pairs) -> list[tuple[str, Text, Text]]:
        ids, names = pairs.units(unit) if unit else (torch.zeros(len(pairs)).long(), [""])
        texts = pairs.texts.texts
        return [
            (names[u], texts[chosen], texts[rejected])
            for u, (chosen, rejected) in zip(ids.tolist(), pairs.index.tolist(), strict=True)
            if texts[chosen].prompt != QUESTION
        ]

    known = set(rows(train))
    again = sum(row in known for row in rows(held_out))
    if not again:
        return []
    return [
        f"WARNING: {again} of {len(held_out)} {what} pairs stand among the training pairs too: what is learned by heart "
        "counts as predicted; leave them out"
    ]


def losing(distance: pd.Series) -> list[str]:
    """Experts under which the chosen answers have become far less likely than under the base, nats by expert."""
    lost = [f"{k} ({nats:.0f} nats)" for k, nats in distance.items() if nats < -LOST]
    if not lost:
        return []
    return [
        f"expert {', '.join(lost)} gives the chosen answers far less than the base does: what it writes may be broken; "
        "read some (policy.say), raise beta, or lower learning_rate or passes"
    ]


@torch.no_grad()
def of_the_gate(policy: MixturePolicy, train: Pairs, unit: str) -> list[str]:
    """Columns that name their units, and a gate that gives everybody nearly the same weights."""
    gate = policy.gate
    columns = getattr(gate, "columns", None)  # what gates of others call so is theirs
    known = columns if isinstance(columns, Mapping) else {}
    names = naming_columns(known, train.columns, train.units(unit)[0].tolist())
    notes = [
        f"column {name!r} names each {unit}: no two share a category, so that it says nothing of a new one"
        for name in names
    ]
    weights = policy.log_w(train).exp()
    apart = float((weights - weights.mean(0)).abs().sum(1).max()) / 2  # total variation
    if gate.reads and gate.learns and apart < SAME:
        read = ", ".join(gate.reads)
        notes.append(
            f"the gate learned nothing of {read}: in no row does more than {SAME} of the weight lie elsewhere than on average, "
            "and whom it alone serves gets the average; if a later step than the kept one knows more: stop__best='last', or "
            "result.restore(policy, 'last')"
        )
    return notes
