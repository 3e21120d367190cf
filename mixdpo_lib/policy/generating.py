"""What does a mixture leave when it writes?"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Generated:
    """Sampled texts with the expert that spoke and what policy and reference say of them.

    text : response text. expert : index drawn from the weights; in the token form the most probable one given the text.
    log_ratio : nats, log pi_k - log pi_ref of the sampled tokens; in the token form log p - log pi_ref, p the mixture
    that was sampled from (with its truncation). ref_logp : nats. n_tokens : sampled tokens, the end token included.
    ended : the end token was sampled.
    """

    text: list[str]
    expert: list[int]
    log_ratio: list[float]
    ref_logp: list[float]
    n_tokens: list[int]
    ended: list[bool]
