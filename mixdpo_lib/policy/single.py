"""Which single policy is a mixture compared with?"""

from __future__ import annotations

from typing import Any

from ..experts.contract import make_experts
from ..gates.weights import LearnedWeights
from .mixture import MixturePolicy


def single_counterpart(policy: MixturePolicy) -> MixturePolicy:
    """One expert of the same family and options, base, beta and lapse, as at the start.

    Raises
    ------
    ValueError : a family whose options do not say how many experts there are; the way out is `single=`.
    """
    description = policy.experts.describe()
    if "n_experts" not in description:
        raise ValueError(
            f"{type(policy.experts).__name__}: no single policy can be made from a description without n_experts; fit "
            "one expert of this family yourself (whole models: IndependentExperts(bases[:1])) and give single=..."
        )
    one: dict[str, Any] = {"n_experts": 1}
    if policy.experts.nodes is not None:  # the trivial group: a basis expert alone
        one |= {"group": "cyclic", "n_basis": 2}
    experts = make_experts({**description, **one}, lambda *_: policy.base)
    own = dict(experts.named_buffers())
    for (
        name,
        buffer,
    ) in policy.experts.named_buffers():  # such as a table's reference: no part of what is learned
        if name in own and own[name].shape == buffer.shape:
            own[name].copy_(buffer)
    return MixturePolicy(experts, LearnedWeights(1), policy.beta, policy.given_lapse)
