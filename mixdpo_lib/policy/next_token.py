"""What comes next, and by whom? Next-token functions of the base, of experts, of the mixture."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..base.head import place_of
from ..base.model import Base
from ..elbo import check_log_w
from ..experts.contract import Experts, Voices
from ..experts.head_voices import HeadVoices
from .sampling import truncated_log_probs


def divergence(
    logits: Float[Tensor, "rows tokens"], ref_logits: Float[Tensor, "rows tokens"]
) -> tuple[Float[Tensor, "rows"], Float[Tensor, "rows"], Float[Tensor, "rows"]]:
    """logsumexp of both, and KL(softmax(logits) || softmax(ref_logits)), nats; a logit of -inf has no share in it."""
    lse, lse_ref = logits.logsumexp(1), ref_logits.logsumexp(1)
    log_p = logits - lse[:, None]
    p = log_p.exp()
    kl = torch.where(p > 0, p * (log_p - ref_logits + lse_ref[:, None]), 0.0).sum(1)
    return lse, lse_ref, kl


def divergence_of_some(
    logits: Float[Tensor, "rows tokens"],
    ref_logits: Float[Tensor, "rows tokens"],
    moved: Int[Tensor, "moved"],
) -> tuple[Float[Tensor, "rows"], Float[Tensor, "rows"], Float[Tensor, "rows"]]:
    """The same where only the logits of `moved` differ: all other tokens share one log ratio, lse_ref - lse.

    >>> ref = torch.tensor([[0.1, 0.2, 0.7]]).log()
    >>> one = divergence_of_some(ref + torch.tensor([0.0, 1.0, 0.0]), ref, torch.tensor([1]))
    >>> other = divergence(ref + torch.tensor([0.0, 1.0, 0.0]), ref)
    >>> all(torch.allclose(a, b, atol=1e-6) for a, b in zip(one, other))
    True
    """
    rest = ref_logits.index_fill(1, moved, -torch.inf).logsumexp(1)
    own, ref = logits[:, moved], ref_logits[:, moved]
    lse = torch.logaddexp(rest, own.logsumexp(1))
    lse_ref = torch.logaddexp(rest, ref.logsumexp(1))
    ratio = lse_ref - lse
    p = (own - lse[:, None]).exp()
    kl = torch.where(p > 0, p * (own - ref + ratio[:, None]), 0.0).sum(1)
    return lse, lse_ref, kl + (rest - lse).exp() * ratio


class NextToken:
    """Stateful next-token function of a base with optional expert heads, for `sampling.sample`.

    Called with (input_ids (rows, t), attention_mask (rows, total)); returns float32 logits (rows, vocabulary).
    With `observe`, called with the tokens that were drawn, it keeps log pi_k / pi_ref and log pi_ref of each of them, and
    the KL of the distributions that they were drawn from.
    Only experts that a row speaks as are computed, each for its rows.
    """

    def __init__(
        self, base: Base, experts: Experts | None = None, expert: Int[Tensor, "rows"] | None = None
    ) -> None:
        self._expert, self._device = expert, base.device
        self._voices: Voices = HeadVoices(base)
        if experts is not None:
            chosen = None
            if expert is not None:  # -1 speaks as the reference
                chosen = nn.functional.one_hot(expert.clamp(min=0), experts.n_experts) > 0
                chosen &= (expert >= 0)[:, None]
            self._voices = experts.voices(chosen)
        self._moved, self._spoken = self._voices.moved, False
        self._logits: Tensor | None = None
        self._ref_logits: Tensor | None = None
        self._seen: list[tuple[Tensor, Tensor, Tensor]] = []

    @torch.inference_mode()
    def __call__(
        self, input_ids: Int[Tensor, "rows t"], attention_mask: Int[Tensor, "rows total"]
    ) -> Tensor:
        """Logits (rows, vocabulary), float32, of each row's expert or the reference."""
        logits, said = self.heard(input_ids, attention_mask)
        self._ref_logits, self._spoken = logits, bool(said)
        if len(said) == 1 and len(said[0][1]) == len(logits):
            logits = said[0][2]  # one expert speaks in every row
        elif said:
            logits = logits.clone()
            for _, rows, own in said:
                logits[rows] = own
        self._logits = logits
        return logits

    def heard(
        self, input_ids: Int[Tensor, "rows t"], attention_mask: Int[Tensor, "rows total"]
    ) -> tuple[Tensor, list[tuple[int, Tensor, Tensor]]]:
        """What `Voices` say of these tokens, read where the base lies."""
        return self._voices(input_ids.to(self._device), attention_mask.to(self._device))

    @torch.inference_mode()
    def observe(self, tokens: Int[Tensor, "rows"]) -> None:
        """Keep what policy and reference say of the tokens just drawn from the last logits."""
        logits, ref_logits = self.last_logits()
        ref = ref_logits.gather(1, tokens[:, None]).squeeze(1)
        own = logits.gather(1, tokens[:, None]).squeeze(1)
        if not self._spoken:
            lse = lse_ref = ref_logits.logsumexp(1)
            kl = torch.zeros_like(ref)
        elif self._moved is None:
            lse, lse_ref, kl = divergence(logits, ref_logits)
        else:
            moved = self._moved.to(logits.device)
            lse, lse_ref, kl = divergence_of_some(logits, ref_logits, moved)
        self._seen.append((own - lse - ref + lse_ref, ref - lse_ref, kl))

    def last_logits(self) -> tuple[Tensor, Tensor]:
        """Logits of the last call: of what speaks, and of the reference.

        Raises
        ------
        ValueError : nothing was called yet.
        """
        if self._logits is None or self._ref_logits is None:
            raise ValueError(
                "no logits yet: call the next-token function before it observes a token"
            )
        return self._logits, self._ref_logits

    def scores(self) -> tuple[Float[Tensor, "rows steps"], Float[Tensor, "rows steps"]]:
        """(log pi_k - log pi_ref, log pi_ref) of every token observed, nats."""
        ratio, ref, _ = zip(*self._seen, strict=True)
        return torch.stack(ratio, 1), torch.stack(ref, 1)

    def divergences(self) -> Float[Tensor, "rows steps"]:
        """KL(pi_k || pi_ref) of the next-token distributions from which the observed tokens were drawn, nats."""
        return torch.stack([kl for _, _, kl in self._seen], 1)

    def speaker(self, row: int, steps: int) -> int:
        """The expert that speaks in a row; -1 is the reference."""
        return -1 if self._expert is None else int(self._expert[row])


class MixtureNextToken(NextToken):
    """Next-token function of the whole mixture: experts weighted by their posterior given the text so far.

        p(v given y_<t) = sum_k q_k(y_<t) p_k(v given y_<t)
        q_k(y_<t) proportional to w_k prod_{s<t} p_k(y_s given y_<s)

    Sampled from, it is the same distribution of texts as an expert drawn once (docs/method.md); unlike that, it gives
    the next-token distribution of the mixture itself, which streaming, greedy decoding and beams ask for. Called as
    `NextToken`; after each call tell it the tokens that were taken (`observe`), from which the posterior follows.

    Parameters
    ----------
    log_w : (rows, K), nats, weights of each row, normalised here; an expert of weight 0 (-inf) is not computed.
    temperature, top_k, top_p : as in `sampling.sample`, but applied to each expert: p_k is then the truncated, tempered
        distribution, in the mixture and in the posterior. Sample from the result at temperature 1 without truncation.

    Notes
    -----
    Returns log-probabilities (rows, vocabulary), nats. Holds one such table for each (row, expert) of finite weight.
    `scores` gives log p - log pi_ref, with the mixture's p as it was sampled from.
    """

    def __init__(
        self,
        experts: Experts,
        log_w: Float[Tensor, "rows experts"],
        temperature: float | int = 1.0,
        top_k: int | None = None,
        top_p: float | int | None = None,
    ) -> None:
        super().__init__(experts.base[0])
        log_w = log_w.detach().float()
        check_log_w(log_w)
        self._voices = experts.voices(log_w > -torch.inf)
        self._moved = None  # weighted and truncated, any log-probability may differ
        self._spoken = True
        self._log_q = [log_w.to(self._device).log_softmax(-1)]
        self._options = (temperature, top_k, top_p)
        self._log_p: list[tuple[int, Tensor, Tensor]] = []

    @torch.inference_mode()
    def __call__(
        self, input_ids: Int[Tensor, "rows t"], attention_mask: Int[Tensor, "rows total"]
    ) -> Tensor:
        """log p(v given y_<t), nats, (rows, vocabulary)."""
        ref, said = self.heard(input_ids, attention_mask)
        self._log_p = [(k, rows, truncated_log_probs(own, *self._options)) for k, rows, own in said]
        mixed = torch.full_like(ref, -torch.inf)
        for k, rows, log_p in self._log_p:
            mixed[rows] = torch.logaddexp(mixed[rows], self._log_q[-1][rows, k, None] + log_p)
        self._logits, self._ref_logits = mixed, ref
        return mixed

    @torch.inference_mode()
    def observe(self, tokens: Int[Tensor, "rows"]) -> None:
        """Keep what mixture and reference say of the tokens just taken, and update the posterior by them.

        Raises
        ------
        ValueError : a token that no expert of its row can say (the row is named).
        """
        log_q = self._log_q[-1].clone()
        for k, rows, log_p in self._log_p:
            log_q[rows, k] += log_p.gather(1, tokens[rows, None]).squeeze(1)
        impossible = (log_q == -torch.inf).all(1)
        if bool(impossible.any()):
            row = int(impossible.nonzero()[0])
            raise ValueError(
                f"row {row}: token {int(tokens[row])} has probability 0 under every expert; take another"
            )
        super().observe(tokens)
        self._log_q.append(log_q.log_softmax(-1))

    def reorder(self, source: Int[Tensor, "rows"]) -> None:
        """Row i goes on from row source[i], whose weights are the same (beams)."""
        logits, ref_logits = self.last_logits()
        self._voices.reorder(source)
        self._log_q = [log_q[source] for log_q in self._log_q]
        self._logits, self._ref_logits = logits[source], ref_logits[source]
        self._seen = [(a[source], b[source], c[source]) for a, b, c in self._seen]
        for i, (k, rows, log_p) in enumerate(self._log_p):
            self._log_p[i] = (k, rows, log_p[place_of(rows, len(source))[source[rows]]])

    def log_q(self) -> Float[Tensor, "rows steps experts"]:
        """Posterior of the experts, nats: at step t given the first t tokens observed; step 0 is the prior."""
        return torch.stack(self._log_q, 1)

    def speaker(self, row: int, steps: int) -> int:
        """The most probable expert of a row given its first `steps` tokens."""
        return int(self._log_q[steps][row].argmax())


def reference_next_token(base: Base) -> NextToken:
    """Next-token function of the plain base."""
    return NextToken(base)
