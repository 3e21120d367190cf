"""How does a mixture write?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from ..base.tokens import answer_text
from ..data.messages import as_prompt
from ..elbo import keep_top_s
from ..store import progress
from .model import as_user
from .next_token import MixtureNextToken, NextToken
from .sampling import sample

if TYPE_CHECKING:
    from .mixture import MixturePolicy


@dataclass(frozen=True)
class Generated:
    """Sampled texts with the expert that spoke and what policy and reference say of them.

    text : response text. expert : index drawn from the weights; in the token form the most probable one given the text.
    log_ratio : nats, log pi_k - log pi_ref of the sampled tokens; in the token form log p - log pi_ref, p the mixture
    that was sampled from (with its truncation). ref_logp : nats. n_tokens : sampled tokens, the end token included.
    ended : the end token was sampled. kl : nats, sum over the sampled tokens of KL(pi_k || pi_ref) of the distributions
    they were drawn from: its mean over texts is that of log_ratio, with less variance (Amini et al. 2025, arXiv 2504.10637).
    """

    text: list[str]
    expert: list[int]
    log_ratio: list[float]
    ref_logp: list[float]
    n_tokens: list[int]
    ended: list[bool]
    kl: list[float]


def _prompt_ids(
    policy: MixturePolicy, prompts: Sequence[Any], max_new_tokens: int
) -> list[list[int]]:
    """Token ids of prompts that leave room for a response; a single text, or one too long, is refused."""
    if isinstance(prompts, str):
        raise ValueError(
            f"prompts: found one text, expected a list of prompts; write [{prompts[:40]!r}]"
        )
    if len(prompts) == 0:
        raise ValueError("no prompts: give at least one")
    if policy.base is None:
        raise ValueError(
            f"{type(policy.experts).__name__} of items by name write no texts: no language model was asked; "
            "experts.reward_table() says what they prefer"
        )
    ids = [policy.base.prompt_ids(p) for p in prompts]
    for p, tokens in zip(prompts, ids, strict=True):
        if not tokens or len(tokens) + max_new_tokens > policy.base.context:
            raise ValueError(
                f"prompt {str(p)[:40]!r} has {len(tokens)} tokens; with max_new_tokens={max_new_tokens} expected "
                f"between 1 and {policy.base.context - max_new_tokens}"
            )
    return ids


def _experts_of(
    policy: MixturePolicy,
    prompts: Sequence[Any],
    user: Tensor | None,
    top_s: int | None,
    generator: torch.Generator | None,
) -> tuple[Tensor, list[int] | None]:
    """Weights of each prompt, and the expert drawn from them (none without a generator)."""
    log_w = policy.prompt_log_w(prompts).detach() if user is None else user
    log_w = log_w.expand(len(prompts), policy.n_experts)
    if top_s is not None:
        log_w = keep_top_s(log_w, top_s)
    if generator is None:
        return log_w, None
    return log_w, torch.multinomial(log_w.softmax(-1), 1, generator=generator).squeeze(1).tolist()


def generate(
    policy: MixturePolicy,
    prompts: Sequence[Any],
    user: Float[Tensor, ...] | None = None,
    *,
    max_new_tokens: int = 32,
    seed: int = 0,
    top_s: int | None = None,
    expert: Sequence[int] | None = None,
    batch_size: int = 192,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    greedy: bool = False,
    form: str = "sequence",
) -> Generated:
    """Sample one response a prompt, exactly from the mixture: z ~ w once a sequence, then expert z decodes.

    Parameters
    ----------
    prompts : texts, or conversations for a base with a chat template.
    user : log_w (K,) of one user or (prompts, K) of one user a prompt (`MixturePolicy.user`); the gate's by default.
    top_s : keep the S most likely experts of each row, renormalised. expert : the expert of each prompt, instead of
        drawing it; -1 is the base. Only experts that a row needs are computed.
    temperature, top_k, top_p : of the text, applied to each expert; at the defaults the sample is exact and
        `log_ratio` unbiased for KL.
    greedy : take the most likely token instead of drawing it: of expert z, which excludes the three above, or of
        the mixture in the token form.
    form : "sequence", or "token": each token from the experts weighted by their posterior given the text so far
        (`next_token.MixtureNextToken`). The same distribution of texts; greedy texts differ. Its cost is that of
        every expert kept, for all rows.

    Raises
    ------
    ValueError : no prompt, a prompt that is empty or too long, experts or options out of range, an unknown form,
        `expert` in the token form (it draws none).
    """
    if form not in ("sequence", "token"):
        raise ValueError(
            f"form={form!r}: possible are 'sequence' (an expert a text) and 'token' (their posterior)"
        )
    user = user if user is None else as_user(user, policy.n_experts, len(prompts))
    ids = _prompt_ids(policy, prompts, max_new_tokens)
    generator = torch.Generator().manual_seed(seed)
    log_w = torch.empty(0)
    if expert is None:
        log_w, expert = _experts_of(
            policy, prompts, user, top_s, generator if form == "sequence" else None
        )
    elif form == "token":
        raise ValueError(
            "expert is given and form='token': that form draws no expert; give user=, or drop one"
        )
    elif len(expert) != len(prompts) or not all(-1 <= k < policy.n_experts for k in expert):
        raise ValueError(
            f"expert={list(expert)[:5]}...: expected {len(prompts)} numbers, one a prompt, "
            f"from 0 to {policy.n_experts - 1}, or -1 for the base"
        )
    truncation: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    base, out = policy.base, Generated([], [], [], [], [], [], [])
    for start in range(0, len(ids), batch_size):
        part = slice(start, start + batch_size)
        speak: NextToken
        if (
            expert is None
        ):  # experts are truncated, then mixed, and the mixture is drawn from as it is
            speak, drawn = MixtureNextToken(policy.experts, log_w[part], **truncation), {}
        else:
            speak, drawn = NextToken(base, policy.experts, torch.tensor(expert[part])), truncation
        decoded = sample(
            speak,
            ids[part],
            max_new_tokens,
            greedy=greedy,
            eos_token_id=base.end_ids,
            generator=generator,
            observe=speak.observe,
            progress=partial(_report, start, len(ids[part]), len(ids)),
            **drawn,
        )
        (ratios, refs), divergences = speak.scores(), speak.divergences()
        rows = zip(ids[part], decoded.tokens, decoded.ended, strict=True)
        for i, (before, tokens, ended) in enumerate(rows):
            n = len(tokens) + int(ended)  # the end token counts, though it is no text
            out.text.append(answer_text(base.tokenizer, before, tokens))
            out.expert.append(speak.speaker(i, n))
            out.log_ratio.append(float(ratios[i, :n].sum()))
            out.ref_logp.append(float(refs[i, :n].sum()))
            out.n_tokens.append(n)
            out.ended.append(bool(ended))
            out.kl.append(float(divergences[i, :n].sum()))
    return out


def say(
    policy: MixturePolicy,
    prompts: Sequence[Any],
    user: Float[Tensor, ...] | None = None,
    **options: Any,
) -> pd.DataFrame:
    """What the base and every expert write for the same prompts: one row a prompt, one column a voice.

    Parameters
    ----------
    user : log_w (K,) of one user; the columns then say how much of each expert the user is served.
    options : of `generate`, such as max_new_tokens, seed, temperature, greedy.
    """
    voices = range(-1, policy.n_experts)
    weight = [""] * policy.n_experts
    if user is not None:
        user = as_user(user, policy.n_experts)
        weight = [f" ({w:.0%})" for w in user.detach().reshape(-1).softmax(0).tolist()]
    columns = {}
    for k in voices:
        name = "base" if k < 0 else f"expert {k}{weight[k]}"
        columns[name] = generate(policy, prompts, expert=[k] * len(prompts), **options).text
    return pd.DataFrame(
        columns, index=pd.Index([as_prompt(p) for p in prompts], name="prompt", tupleize_cols=False)
    )


def _report(start: int, rows: int, total: int, done: int, of: int) -> None:
    progress("texts", start + rows * done // of, total, "sampled")
