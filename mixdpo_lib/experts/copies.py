"""How are experts copied, added and dropped?"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .contract import Experts


@torch.no_grad()
def gathered(like: Experts, parts: Sequence[tuple[Experts, int]]) -> Experts:
    """New experts of the family of `like`: copies of these, each named by where it stands and its number there.

    What experts share (active tokens, a reference) is that of `like`. An expert may be named more than once, or not at
    all: so experts are copied, added and dropped.

    Raises
    ------
    ValueError : no parts; experts of other options than `like`; nodes of a group, which have no parameters of their own.

    >>> from mixdpo_lib.experts.tables import TabularExperts
    >>> two = TabularExperts(3, 2)
    >>> gathered(two, [(two, 1), (two, 0), (two, 1)]).n_experts
    3
    """
    if not parts:
        raise ValueError("parts: found none, expected at least one expert to copy")
    if like.nodes is not None:
        raise ValueError(
            f"{type(like).__name__}: its {like.n_experts} experts are nodes of a group that share their basis experts; "
            "expected experts with parameters of their own"
        )
    for experts, k in parts:
        experts.check_number(k)
        names = {name: value.shape for name, value in experts.own(k).items()}
        if names != {name: value.shape for name, value in like.own(0).items()}:
            raise ValueError(
                f"expert {k} of {type(experts).__name__} {experts.options()}: expected one of the options "
                f"{like.options()}; gather experts that differ in nothing but what they learned"
            )
    made, buffers = like.of_number(parts), dict(like.named_buffers())
    made.fit_state(like.state_dict())
    for name, buffer in made.named_buffers():
        buffer.copy_(buffers[name])
    for place, (experts, k) in enumerate(parts):
        found = experts.own(k)
        for name, value in made.own(place).items():
            value.copy_(found[name])
    return made
