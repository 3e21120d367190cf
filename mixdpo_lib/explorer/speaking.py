"""What does every voice say, and what would each expert have given each token?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..base.tokens import answer_text
from ..policy.mixture import MixturePolicy
from ..policy.next_token import NextToken, divergence
from ..policy.sampling import sample


@dataclass(frozen=True)
class Spoken:
    """One continuation a voice, with what each expert gave its tokens.

    voices : expert of each text, -1 the base. pieces : the text of each token, by voice.
    logps : by voice (tokens, K), nats: log pi_k of each token after the tokens before it.
    kl : nats, by voice: the sum over its tokens of KL(pi_k || pi_ref) of the distributions they were drawn from.
    """

    prompt: str
    voices: list[int]
    pieces: list[list[str]]
    logps: list[Tensor]
    kl: list[float]

    @property
    def texts(self) -> list[str]:
        """The continuation of each voice."""
        return ["".join(pieces) for pieces in self.pieces]

    def posterior(
        self, voice: int, log_w: Float[Tensor, "experts"]
    ) -> Float[Tensor, "steps experts"]:
        """Who speaks, as the text of a voice (by its place in `voices`) unfolds: probabilities after 0, 1, ... tokens.

        q_k(y_<t) proportional to w_k prod_{s<t} pi_k(y_s given y_<s).  Source: docs/method.md.
        """
        start = log_w.reshape(1, -1).double()
        return torch.cat([start, start + self.logps[voice].double().cumsum(0)]).softmax(-1)


class EveryVoice(NextToken):
    """Next-token function in which each row speaks as one voice and all experts say what they think of its tokens.

    speaker : (rows,) expert of each row, -1 the base. After sampling, `logps` (rows, steps, K) are those of the tokens
    that were observed and `kls` (rows, steps) the divergence of each row's voice from the base; nats.
    """

    def __init__(self, policy: MixturePolicy, speaker: Int[Tensor, "rows"]) -> None:
        super().__init__(policy.base)
        everyone = torch.ones(len(speaker), policy.n_experts, dtype=torch.bool)
        self._voices, self._speaker = policy.experts.voices(everyone), speaker
        self._log_p: list[Tensor] = []
        self._steps: list[tuple[Tensor, Tensor]] = []

    @torch.inference_mode()
    def __call__(
        self, input_ids: Int[Tensor, "rows t"], attention_mask: Int[Tensor, "rows total"]
    ) -> Tensor:
        """Logits (rows, vocabulary), float32, of each row's voice."""
        ref, said = self.heard(input_ids, attention_mask)
        logits = ref.clone()
        for k, rows, own in said:
            speaks = self._speaker[rows] == k
            logits[rows[speaks]] = own[speaks]
        self._log_p = [own.log_softmax(-1) for _, _, own in sorted(said, key=lambda one: one[0])]
        self._logits, self._ref_logits = logits, ref
        return logits

    @torch.inference_mode()
    def observe(self, tokens: Int[Tensor, "rows"]) -> None:
        """Keep what each expert gave the tokens just drawn."""
        own = [log_p.gather(1, tokens[:, None]).squeeze(1) for log_p in self._log_p]
        self._steps.append((torch.stack(own, 1), divergence(*self.last_logits())[2]))

    def logps(self) -> Float[Tensor, "rows steps experts"]:
        """log pi_k of every token observed, nats."""
        return torch.stack([logps for logps, _ in self._steps], 1)

    def kls(self) -> Float[Tensor, "rows steps"]:
        """KL(voice || base) at every step, nats."""
        return torch.stack([kl for _, kl in self._steps], 1)


def token_pieces(tokenizer: Any, before: Sequence[int], tokens: Sequence[int]) -> list[str]:
    """What each sampled token adds to the text after a prompt's; a character of several tokens comes with its last one."""
    pieces, shown = [], ""
    for n in range(1, len(tokens) + 1):
        text = answer_text(tokenizer, before, tokens[:n])
        if n < len(tokens) and text.endswith("\ufffd"):  # a character that is not yet whole
            text = shown
        pieces.append(text[len(shown) :])
        shown = text
    return pieces


def speak(
    policy: MixturePolicy,
    prompt: str,
    voices: Sequence[int],
    max_new_tokens: int = 32,
    seed: int = 0,
) -> Spoken:
    """One exact sample of each voice (-1 is the base), in one pass of the base over all of them.

    Raises
    ------
    ValueError : a prompt that is empty or leaves no room for so many tokens.
    """
    base, room = policy.base, policy.base.context - max_new_tokens
    ids = base.prompt_ids(prompt) if prompt.strip() else []
    if not 1 <= len(ids) <= room:
        raise ValueError(
            f"prompt {prompt[:40]!r}: found {len(ids)} tokens, expected between 1 and {room}; write another"
        )
    step = EveryVoice(policy, torch.tensor(list(voices)))
    decoded = sample(
        step,
        [ids] * len(voices),
        max_new_tokens,
        eos_token_id=base.end_ids,
        generator=torch.Generator().manual_seed(seed),
        observe=step.observe,
    )
    logps, kls = step.logps(), step.kls()
    pieces, kept, kl = [], [], []
    for row, (tokens, ended) in enumerate(zip(decoded.tokens, decoded.ended, strict=True)):
        pieces.append(token_pieces(base.tokenizer, ids, tokens))
        kept.append(logps[row, : len(tokens)].cpu())
        kl.append(max(0.0, float(kls[row, : len(tokens) + int(ended)].sum())))  # rounding
    return Spoken(prompt, list(voices), pieces, kept, kl)
