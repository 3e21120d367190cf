"""Is it any good, and how many experts? A mixture against one policy, and Ks against each other, on held-out pairs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from jaxtyping import Float
from torch import Tensor

from .base.model import Base
from .data.pairs import Pairs, as_pairs
from .elbo import correct
from .evaluation import bootstrap_means, choose_n_experts, interval, mean_bounds
from .experts.heads import HeadExperts
from .gates.weights import LearnedWeights
from .learning.config import FitConfig
from .learning.fit import fit
from .learning.result import certainty, dead_experts, equal_experts
from .learning.routing import Routing
from .policy.mixture import MixturePolicy
from .policy.remarks import FEW_UNITS, left_out, losing, of_the_gate, seen_before
from .policy.single import single_counterpart

SURE = 0.99  # of a verdict; 100 data sets of each kind: benchmarks/verdict.py


@dataclass(frozen=True)
class Report:
    """What held-out pairs say of a mixture, beside one policy; `repr` is the text, the tables are tidy.

    totals : rows "mixture", "one policy" and "difference"; accuracy (share) and loglik (nats per pair), each with the
        ends of its 95 % bootstrap interval over units. A unit counts once, however many pairs it has.
    units : a row a unit with test pairs: n_train, n_test, served_by, accuracy, loglik, the same of one policy
        (single_), and the difference of loglik.
    experts : a row an expert: usage (mean responsibility over units), distance (nats: mean of log pi_k - log pi_ref of
        the chosen answers of test pairs, weighted by how far expert k serves them), remark (dead, or like which expert).
    certainty : 0 where units are shared equally, 1 where each has one expert. No evidence by itself.
    notes : test pairs that were trained on, units that were left out or served by the gate alone, what makes the interval
        rough, columns that name their units, a gate that gives everybody the same weights, experts under which chosen
        answers are far less likely than under the base.
    bounds : what the difference of loglik lies above, and below, at 99 % each (`evaluation.mean_bounds`), nats per pair.
    sentence : whether a mixture pays: where the lower bound lies above 0, and nowhere else.
    """

    totals: pd.DataFrame
    units: pd.DataFrame
    experts: pd.DataFrame
    certainty: float
    notes: tuple[str, ...]
    bounds: tuple[float, float]
    sentence: str

    @property
    def pays(self) -> bool:
        """Whether the mixture predicts test pairs better than one policy, at 99 %."""
        return self.bounds[0] > 0

    def __repr__(self) -> str:
        tables = [
            table.to_string(float_format="{:.3f}".format) for table in (self.totals, self.experts)
        ]
        said = [f"mean certainty {self.certainty:.2f}", *self.notes, self.sentence]
        return "\n\n".join([f"on test pairs of {len(self.units)} units", *tables, "\n".join(said)])


@dataclass(frozen=True)
class Choice:
    """Which K, and why.

    chosen : the smallest K within one standard error of the best (`evaluation.choose_n_experts`).
    table : a row a K: loglik (nats per pair, mean over units), behind (the best K's minus this one's) and error, the
        standard error of that paired difference; chosen.
    held_out : a row a unit, a column a K: mean held-out log-likelihood of the unit's pairs, nats.
    """

    chosen: int
    table: pd.DataFrame
    held_out: pd.DataFrame = field(repr=False)
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        said = f"K = {self.chosen}: the smallest within one standard error of the best, {len(self.held_out)} units"
        return "\n".join([self.table.to_string(float_format="{:.3f}".format), *self.notes, said])


@torch.no_grad()
def served_weights(
    policy: MixturePolicy, train: Dataset | Pairs, test: Dataset | Pairs, unit: str = "user"
) -> tuple[Float[Tensor, "pairs experts"], list[str]]:
    """log w of every test pair, nats, and the units without training pairs, whom the gate alone serves.

    A unit is served by its own training pairs (`Gate.served`); where the gate reads the prompt, by the gate's weights of
    each prompt. No test answer is read.

    Raises
    ------
    ValueError : units without training pairs where the gate reads nothing; training pairs of one unit that differ in
        what the gate reads.
    """
    train, test = policy.prepare(train), policy.prepare(test)
    ids, names = train.units(unit)
    place = {name: i for i, name in enumerate(names)}
    test_ids, test_names = test.units(unit)
    unknown = [name for name in test_names if name not in place]
    if unknown and not policy.gate.reads:
        raise ValueError(
            f"test: units {unknown[:3]} have no training pairs, and the gate reads nothing by which to serve them; give "
            "each some training pairs, leave them out, or take a gate that reads what is known of them"
        )
    if policy.gate.of_prompt:
        return policy.log_w(test), unknown
    loglik, inputs = policy.loglik(train), policy.gate_inputs(train)
    served = []
    for i, name in enumerate(names):
        own = (ids == i).nonzero().squeeze(1)
        for value in inputs.values():
            if not bool((value[own] == value[own[:1]]).all()):
                raise ValueError(
                    f"training pairs of {unit} {name!r} differ in what the gate reads "
                    f"({', '.join(policy.gate.reads)}); expected one value a unit; mend the rows"
                )
        first = {column: value[own[:1]] for column, value in inputs.items()}
        served.append(policy.gate.served(first, loglik[own]))
    known = torch.tensor([place.get(name, -1) for name in test_names])[test_ids]
    weights = torch.stack(served)[known]
    if unknown:
        weights = torch.where(known[:, None] < 0, policy.log_w(test), weights)
    return weights, unknown


def _by_unit(values: Float[Tensor, "pairs"], test: Pairs, unit: str) -> pd.Series:
    """Mean over the pairs of each unit."""
    ids, names = test.units(unit)
    return (
        pd.Series(values.double().numpy())
        .groupby(np.array(names)[ids.numpy()])
        .mean()
        .reindex(names)
    )


def report(
    policy: MixturePolicy,
    train: Dataset | Pairs,
    test: Dataset | Pairs,
    *,
    unit: str = "user",
    single: MixturePolicy | None = None,
    config: FitConfig | None = None,
    validation: Dataset | Pairs | None = None,
) -> Report:
    """Does a mixture pay? Test pairs, each unit served by its own training pairs, against one policy.

    Log-likelihood of a test pair: log sum_k w_uk exp(loglik_k), w_u of `served_weights`, loglik of the policy with its
    lapse rate. Nothing is fitted but the single policy, where none is given.

    Parameters
    ----------
    train : what `policy` was fitted on.
    test : pairs by which nothing was decided: no step was taken on them, and neither a best step nor K was chosen by
        them (`choose_k`). Else the verdict favours the mixture, whose choices were more.
    unit : the column that says whose pairs these are.
    single : a fitted policy to compare with; by default `single_counterpart(policy)` is fitted on `train`.
    config, validation : of that fit. Give those that `policy` was fitted with: a mixture of its best step against a
        single policy of its last one is no fair comparison.

    Raises
    ------
    ValueError : K = 1; fewer than two units with test pairs; see `served_weights` and `single_counterpart`.
    """
    if policy.n_experts == 1:
        raise ValueError(
            "policy has one expert: found K = 1, expected a mixture to compare with one policy"
        )
    train, test = policy.prepare(train), policy.prepare(test)
    if len(test.units(unit)[1]) < 2:
        raise ValueError(
            f"test has {len(test.units(unit)[1])} unit in column {unit!r}; expected at least 2: the interval is over "
            "units; give test pairs of more of them, or name another column by unit="
        )
    log_w, unknown = served_weights(policy, train, test, unit)
    if single is None:
        single = single_counterpart(policy)
        own = config or FitConfig(unit=unit)  # but for routing, of which one expert has none
        fit(single, train, own.change(routing=Routing()), validation=validation)
    single_w = (
        served_weights(single, train, test, unit)[0] if single.gate.reads else single.log_w(test)
    )
    columns = {}
    for prefix, one, weights in (("", policy, log_w), ("single_", single, single_w)):
        prediction = (one.loglik(test) + weights).logsumexp(1)
        columns[f"{prefix}accuracy"] = _by_unit(correct(prediction.exp()), test, unit)
        columns[f"{prefix}loglik"] = _by_unit(prediction, test, unit)
    units = pd.DataFrame(columns)
    units["difference"] = units["loglik"] - units["single_loglik"]
    for name, part in (("n_test", test), ("n_train", train)):
        place, names = part.units(unit)
        counts = pd.Series(torch.bincount(place).numpy(), names)
        units.insert(0, name, counts.reindex(units.index, fill_value=0))
    units.insert(2, "served_by", _by_expert(log_w, test, unit))
    log_q = policy.log_posterior(train, None if policy.gate.of_prompt else unit)[0]
    bounds = mean_bounds(units["difference"].to_numpy(float), SURE)
    experts = _experts(policy, train, test, log_q, log_w)
    notes = [
        *seen_before(train, test, unit),
        *left_out(train, test, unit, unknown),
        *of_the_gate(policy, train, unit),
        *losing(experts["distance"]),
    ]
    return Report(
        totals=_totals(units),
        units=units.rename_axis(unit),
        experts=experts,
        certainty=certainty(log_q),
        notes=tuple(notes),
        bounds=bounds,
        sentence=_verdict(policy.n_experts, units["difference"], *bounds),
    )


def _by_expert(log_w: Tensor, test: Pairs, unit: str) -> pd.Series:
    """The expert of largest weight of each unit, over its test pairs."""
    weights = [_by_unit(w, test, unit) for w in log_w.exp().unbind(1)]
    return pd.concat(weights, axis=1, keys=range(len(weights))).idxmax(axis=1)


def _totals(units: pd.DataFrame) -> pd.DataFrame:
    """Means over units with intervals; the same draws for both policies, so that the difference is paired."""
    pairs = {
        name: units[[name, f"single_{name}"]].assign(
            difference=units[name] - units[f"single_{name}"]
        )
        for name in ("accuracy", "loglik")
    }
    columns: dict[str, Any] = {}
    for name, values in pairs.items():
        draws = bootstrap_means(values.to_numpy(float))
        ends = np.array([interval(draws[:, i]) for i in range(3)])
        columns |= {
            name: values.mean().to_numpy(),
            f"{name}_low": ends[:, 0],
            f"{name}_high": ends[:, 1],
        }
    return pd.DataFrame(columns, index=pd.Index(["mixture", "one policy", "difference"]))


@torch.no_grad()
def _experts(
    policy: MixturePolicy, train: Pairs, test: Pairs, log_q: Tensor, log_w: Tensor
) -> pd.DataFrame:
    """Usage, distance from the base and remarks of each expert."""
    chosen = test.index[:, 0]
    distinct, place = torch.unique(chosen, return_inverse=True)
    nats = policy.text_rewards(test.texts, distinct)[distinct][place] / policy.beta
    distance = (nats * log_w.softmax(0)).sum(0)
    dead = dead_experts(log_q)
    if policy.experts.nodes is not None:  # neighbours are nearly equal, and many are nobody's
        dead = []
    remarks = ["dead" if k in dead else "" for k in range(policy.n_experts)]
    alike = equal_experts(policy.log_sigma(train), dead) if policy.experts.nodes is None else []
    for i, j in alike:
        remarks[i] = ", ".join(filter(None, [remarks[i], f"like expert {j}"]))
    table = {"usage": log_q.exp().mean(0).numpy(), "distance": distance.numpy(), "remark": remarks}
    return pd.DataFrame(table).rename_axis("expert")


def _verdict(n_experts: int, differences: pd.Series, low: float, high: float) -> str:
    mean, n_units = float(differences.mean()), len(differences)
    found = f"by {abs(mean):.3f} nats per pair"
    if low > 0:
        whom = f"the mixture pays for these {n_units} units, which are too few to speak for others."
        return (
            f"K = {n_experts} predicts test pairs better than one policy {found}, by more than {low:.3f} at 99 %: "
            + (whom if n_units < FEW_UNITS else "the mixture pays.")
        )
    if high < 0:
        return (
            f"K = {n_experts} predicts test pairs worse than one policy {found}, by more than {-high:.3f} at 99 %: one "
            "policy serves better."
        )
    return (
        f"K = {n_experts} minus one policy: {mean:+.3f} nats per test pair, between {low:.3f} and {high:.3f} (each end at "
        "99 %): no sign that a mixture pays."
    )


def choose_k(
    base_or_make: Base | Callable[[int], MixturePolicy],
    pairs: Mapping[str, Any] | Dataset | Pairs,
    ks: Sequence[int] | np.ndarray,
    *,
    config: FitConfig | None = None,
    unit: str = "user",
    validation: Dataset | Pairs | None = None,
) -> Choice:
    """Fit every K alike and choose by the held-out likelihood of units, by the one-standard-error rule.

    Parameters
    ----------
    base_or_make : a base (HeadExperts and LearnedWeights of defaults), or what makes an unfitted policy of K experts.
    pairs : with parts "train" and "validation"; with `validation=` the training pairs alone will do.
    ks : numbers of experts, distinct, each at least 1.
    config : of every fit. The validation pairs also choose each fit's best step, alike for every K: their likelihood
        compares Ks, and flatters each a little. How good the chosen one is, say test pairs and `report`.

    Raises
    ------
    ValueError : no ks, or ks that are no numbers of experts; an absent part; fewer than two units; a policy of another K
        than was asked for; fits by another unit.
    """
    given = np.asarray(ks)
    ks = given.tolist()
    whole = given.ndim == 1 and given.dtype.kind in "iu"
    if not whole or len(set(ks)) < len(ks) or min(ks, default=0) < 1:
        raise ValueError(
            f"ks={ks}: expected distinct numbers of experts, each at least 1, such as [1, 2, 3]"
        )
    train, held_out = _parts(pairs, validation)
    config = config or FitConfig(unit=unit)
    if config.latent == "unit" and config.unit != unit:
        raise ValueError(
            f"unit={unit!r}, and the fits' unit={config.unit!r}: expected the same, since each K is judged by whom its "
            f"latents serve; give FitConfig(unit={unit!r})"
        )
    columns: dict[int, pd.Series] = {}
    unknown: list[str] = []
    for k in sorted(ks):
        if isinstance(base_or_make, Base):
            policy = MixturePolicy(HeadExperts(base_or_make, k), LearnedWeights(k))
        else:
            policy = base_or_make(k)
        if policy.n_experts != k:
            raise ValueError(f"make({k}) gave a policy of {policy.n_experts} experts; expected {k}")
        fit(policy, train, config, validation=held_out)
        log_w, unknown = served_weights(policy, train, held_out, unit)
        columns[k] = _by_unit((policy.loglik(held_out) + log_w).logsumexp(1), held_out, unit)
    table = pd.DataFrame(columns).rename_axis(unit)
    chosen = choose_n_experts(table)
    behind = table.rsub(table[table.mean().idxmax()], axis=0)
    summary = pd.DataFrame(
        {
            "loglik": table.mean(),
            "behind": behind.mean(),
            "error": behind.std(ddof=1) / len(behind) ** 0.5,
        }
    )
    summary["chosen"] = summary.index == chosen
    notes = (
        *seen_before(train, held_out, unit, "validation"),
        *left_out(train, held_out, unit, unknown),
    )
    return Choice(chosen, summary.rename_axis("K"), table, notes)


def _parts(pairs: Any, validation: Dataset | Pairs | None) -> tuple[Pairs, Pairs]:
    """Training and held-out pairs."""
    if isinstance(pairs, (Dataset, Pairs)):
        parts: dict[str, Any] = {"train": pairs}
    else:
        parts = dict(pairs)
    if validation is not None:
        parts["validation"] = validation
    for name in ("train", "validation"):
        if name not in parts:
            raise ValueError(
                f"pairs: no part {name!r}; found {sorted(parts)}; K is chosen by pairs that no step was taken on: add "
                "the part, or give validation=..."
            )
    return as_pairs(parts["train"]), as_pairs(parts["validation"])
