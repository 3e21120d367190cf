"""What does each expert say? Experts give log-probabilities of responses and next-token functions.

`HeadExperts` share a frozen base: expert k adds a low-rank correction to the base's head,

    logits_k = W h + 1[v active] W B_k A_k h,

on the last hidden state h. Tokens outside the active set keep the base's logit, so their total mass is one constant per
position and every expert is exactly normalised over the whole vocabulary.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .features import PairFeatures, TextFeatures, gather_positions
from .gating import check_n_experts
from .sources import Base
from .store import cached, progress

VERSION = 1


class _LowRankTokenLogps(torch.autograd.Function):
    """log pi_k(token) of every position and expert, (positions, experts); gradients for A and E = W B only.

    Written by hand because the logits of all experts are the largest tensors of a step: exp(logit) is kept once per
    expert in a buffer that is used again, and the backward pass reads it in two matrix products.
    """

    @staticmethod
    def forward(ctx, hidden, down, up, head, bias, target, token_logit, lse_inactive, workspace):  # type: ignore[override]
        n_experts, n_positions = len(down), len(hidden)
        base_logits = workspace.take("base", (n_positions, len(head)), hidden)
        torch.mm(hidden, head.T, out=base_logits)
        if bias is not None:
            base_logits += bias
        known = target >= 0
        rows, columns = known.nonzero().squeeze(1), target[known]
        keep = any(ctx.needs_input_grad[1:3])
        buffer = workspace.take("experts", (n_experts if keep else 1, n_positions, len(head)), hidden)
        logps = hidden.new_empty(n_positions, n_experts)
        total = hidden.new_empty(n_positions, n_experts)
        states = torch.einsum("pd,krd->kpr", hidden, down)
        for k in range(n_experts):
            z = buffer[k if keep else 0]
            torch.addmm(base_logits, states[k], up[k].T, out=z)
            chosen = token_logit.clone()
            chosen[rows] = z[rows, columns]
            top = torch.maximum(z.amax(1), lse_inactive)
            z.sub_(top[:, None]).exp_()
            total[:, k] = z.sum(1) + (lse_inactive - top).exp()
            logps[:, k] = chosen - top - total[:, k].log()
        ctx.save_for_backward(hidden, up, states, total, rows, columns)
        ctx.buffer, ctx.ticket, ctx.workspace = buffer, workspace.ticket(), workspace
        return logps

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        hidden, up, states, total, rows, columns = ctx.saved_tensors
        if ctx.ticket != ctx.workspace.ticket():
            raise RuntimeError("the experts' logits were overwritten by a later call before backward() was reached")
        grad_down = torch.zeros(len(up), up.shape[2], hidden.shape[1], dtype=hidden.dtype, device=hidden.device)
        grad_up = torch.zeros_like(up)
        for k in range(len(up)):
            weight = (grad[:, k] / total[:, k])[:, None]
            probability = ctx.buffer[k]
            torch.mm(probability.T, states[k] * weight, out=grad_up[k])
            grad_up[k].neg_()
            grad_state = (probability @ up[k]) * -weight
            own = grad[rows, k, None]
            grad_up[k].index_add_(0, columns, states[k][rows] * own)
            grad_state.index_add_(0, rows, up[k][columns] * own)
            torch.mm(grad_state.T, hidden, out=grad_down[k])
        return None, grad_down, grad_up, None, None, None, None, None, None


class _Workspace:
    """Large buffers that are used again, step after step, instead of being mapped anew."""

    def __init__(self) -> None:
        self._flat: dict[str, Tensor] = {}
        self._uses = 0

    def take(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        size = int(np.prod(shape))
        flat = self._flat.get(name)
        if flat is None or flat.numel() < size or flat.dtype != like.dtype or flat.device != like.device:
            flat = self._flat[name] = torch.empty(size, dtype=like.dtype, device=like.device)
        self._uses += 1
        return flat[:size].view(shape)

    def ticket(self) -> int:
        return self._uses


@dataclass(frozen=True)
class HeadConstants:
    """What the frozen head says about every position, whatever the experts are: computed once, kept on disk.

    token_logit : (positions,) float32, logit of the response token under the base.
    lse : (positions,) float32, logsumexp of the base's logits over the whole vocabulary.
    lse_inactive : (positions,) float32, the same over the tokens outside the active set; -inf where all are active.
    """

    token_logit: np.ndarray
    lse: np.ndarray
    lse_inactive: np.ndarray


def _forget_head_rows(experts: HeadExperts, _: object) -> None:
    experts._head_rows = None  # the active tokens that were loaded may be others


class HeadExperts(nn.Module):
    """K low-rank heads on one frozen base.

    Parameters
    ----------
    base : the frozen language model, see `load_base`. It is also the reference of every expert.
    n_experts : K >= 1; 1 is plain DPO.
    rank : r >= 1, rank of each head; 8 by default, not tuned.
    active : "responses" (tokens of the training responses, see `activate`) or "all".
    min_count : with "responses", how often a token has to occur in them to be active. Tokens seen once are half of all,
        and the head's cost grows with their number.

    Notes
    -----
    All experts start with the same A and B_k = 0, which is the reference; equal experts cannot part by themselves (see
    `perturb` and `FitConfig.symmetry_breaking`). A is random until `activate_responses` has seen the training
    responses: then its rows read the mean and the first r - 1 principal directions of their hidden states, each with
    mean square 1/r (after Paischer et al. 2024, arXiv 2410.07170, who start LoRA so). On frozen features a head learns
    little that A does not read at the start, and a step is of the same size for every rank.
    """

    def __init__(
        self, base: Base, n_experts: int = 3, rank: int = 8, active: str = "responses", min_count: int = 1
    ) -> None:
        super().__init__()
        check_n_experts(n_experts)
        if rank < 1:
            raise ValueError(f"rank={rank}: each head needs a rank of at least 1")
        if active not in ("responses", "all"):
            raise ValueError(
                f"active={active!r}: possible are 'responses' (tokens of the training responses) and 'all'"
            )
        for option in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
            value = getattr(base.model.config, option, None)
            if value not in (None, 1, 1.0):
                raise ValueError(f"base {base.name} has {option}={value}: low-rank heads need plain linear logits")
        self.base = [base]  # in a list: the frozen base is neither a parameter nor part of a checkpoint
        self.n_experts, self.rank, self.active, self.min_count = n_experts, rank, active, min_count
        generator = torch.Generator().manual_seed(0)
        down = torch.randn(1, rank, base.hidden_size, generator=generator) / base.hidden_size**0.5
        self.down = nn.Parameter(down.repeat(n_experts, 1, 1))
        self.up = nn.Parameter(torch.zeros(n_experts, base.hidden_size, rank))
        self.register_buffer("active_ids", torch.zeros(0, dtype=torch.long))
        self._workspace = _Workspace()
        self._head_rows: Tensor | None = None
        self.register_load_state_dict_post_hook(_forget_head_rows)
        if active == "all":
            self.activate(torch.arange(self._head.shape[0]))

    @property
    def _base(self) -> Base:
        return self.base[0]

    @property
    def _head(self) -> Tensor:
        return self._base.model.get_output_embeddings().weight

    @property
    def _bias(self) -> Tensor | None:
        return getattr(self._base.model.get_output_embeddings(), "bias", None)

    def activate(self, token_ids: Int[Tensor, "tokens"]) -> None:
        """Set the tokens whose logits the experts may change (sorted, distinct; part of the saved mixture)."""
        self.active_ids = torch.unique(token_ids)
        self._head_rows = self._head[self.active_ids].float().contiguous()

    def activate_responses(self, data: PairFeatures) -> None:
        """Start from these training responses: A reads their hidden states, and with active="responses" the active
        tokens are theirs."""
        hidden, positions, _ = gather_positions(data.texts, torch.unique(data.pairs))
        if self.active == "responses":
            tokens, counts = torch.unique(torch.from_numpy(data.texts.tokens)[positions], return_counts=True)
            self.activate(tokens[counts >= self.min_count])
        self._read_hidden_states(hidden)

    @torch.no_grad()
    def _read_hidden_states(self, hidden: Float[Tensor, "positions hidden"]) -> None:
        mean = hidden.mean(0)
        values, vectors = torch.linalg.eigh(torch.cov(hidden.T, correction=0))
        rows = [mean / mean.square().sum()]
        for i in range(1, min(self.rank, len(values) + 1)):
            if values[-i] > 1e-6 * values[-1]:  # fewer directions than rows in a tiny set: the random ones stay
                direction = vectors[:, -i] * vectors[:, -i].sum().sign()  # eigenvectors have no sign of their own
                rows.append(direction / values[-i].sqrt())
        start = torch.stack(rows) / self.rank**0.5
        self.down[:, : len(start)] = start.to(self.down.device)

    def _require_active(self) -> Tensor:
        if self._head_rows is None or len(self._head_rows) != len(self.active_ids):
            if len(self.active_ids) == 0:
                raise ValueError("the experts have no active tokens yet: call fit, or activate_responses, first")
            self._head_rows = self._head[self.active_ids].float().contiguous()
        return self._head_rows

    def perturb(self, scale: float, generator: torch.Generator) -> None:
        """Symmetry breaking "random_heads": B_k ~ N(0, scale^2), drawn for each expert; A stays."""
        with torch.no_grad():
            self.up.copy_(torch.randn(self.up.shape, generator=generator) * scale)

    @torch.no_grad()
    def scale(self, factor: float) -> None:
        """Multiply every B_k, in place: pi_k proportional to pi_ref exp(factor x shift), as another beta would give."""
        self.up.mul_(factor)

    def constants(self, texts: TextFeatures, block: int = 2048) -> HeadConstants:
        """The frozen head's constants for every position of `texts` (see `HeadConstants`), from the cache if there."""
        self._require_active()
        active = self.active_ids.numpy()
        digest = hashlib.sha256(active.tobytes()).hexdigest()
        inactive = np.setdiff1d(np.arange(self._head.shape[0]), active)

        def build(folder: Path) -> None:
            n = len(texts.tokens)
            out = np.empty((3, n), dtype=np.float32)
            inactive_ids = torch.from_numpy(inactive)
            for start in range(0, n, block):
                stop = min(start + block, n)
                hidden = torch.from_numpy(np.array(texts.hidden[start:stop]))
                with torch.inference_mode():
                    logits = hidden @ self._head.T.float()
                    if self._bias is not None:
                        logits += self._bias
                    tokens = torch.from_numpy(texts.tokens[start:stop])
                    out[0, start:stop] = logits.gather(1, tokens[:, None]).squeeze(1)
                    out[1, start:stop] = logits.logsumexp(1)
                    if len(inactive):
                        out[2, start:stop] = logits.index_select(1, inactive_ids).logsumexp(1)
                    else:
                        out[2, start:stop] = -np.inf
                progress("head constants", stop, n, "positions")
            np.save(folder / "constants.npy", out, allow_pickle=False)

        folder = cached("head", VERSION, {"active": digest}, build, inputs=[texts.key])
        return HeadConstants(*np.load(folder / "constants.npy", allow_pickle=False))

    def batch(self, texts: TextFeatures, constants: HeadConstants, pairs: Int[Tensor, "pairs 2"]) -> dict[str, Tensor]:
        """Everything `logps` reads for these pairs; each distinct text is held, and later computed, once."""
        self._require_active()
        ids, place = torch.unique(pairs, return_inverse=True)
        hidden, positions, segment = gather_positions(texts, ids)
        tokens = torch.from_numpy(texts.tokens)[positions]
        slot = torch.searchsorted(self.active_ids, tokens).clamp(max=len(self.active_ids) - 1)
        target = torch.where(self.active_ids[slot] == tokens, slot, torch.full_like(slot, -1))
        token_logit = torch.from_numpy(constants.token_logit)[positions]
        ref = torch.zeros(len(ids)).index_add_(0, segment, token_logit - torch.from_numpy(constants.lse)[positions])
        return {
            "hidden": hidden,
            "target": target,
            "token_logit": token_logit,
            "lse_inactive": torch.from_numpy(constants.lse_inactive)[positions],
            "segment": segment,
            "place": place,
            "text_ref_logps": ref,
        }

    def text_logps(self, batch: dict[str, Tensor]) -> Float[Tensor, "texts experts"]:
        """log pi_k of the distinct texts of a batch, nats, summed over response tokens."""
        head = self._require_active().to(self.up.device)
        up = head @ self.up
        bias = None if self._bias is None else self._bias[self.active_ids]
        logps = _LowRankTokenLogps.apply(
            batch["hidden"], self.down, up, head, bias, batch["target"], batch["token_logit"], batch["lse_inactive"],
            self._workspace,
        )  # fmt: skip
        sums = logps.new_zeros(len(batch["text_ref_logps"]), self.n_experts)
        return sums.index_add(0, batch["segment"], logps)

    def logps(self, batch: dict[str, Tensor]) -> Float[Tensor, "pairs 2 experts"]:
        """log pi_k(y given x), nats, summed over response tokens; index 0 chosen, 1 rejected. Gradients flow."""
        return self.text_logps(batch)[batch["place"]]

    def ref_logps(self, batch: dict[str, Tensor]) -> Float[Tensor, "pairs 2 1"]:
        """log pi_ref(y given x) of the shared reference, nats."""
        return batch["text_ref_logps"][batch["place"]].unsqueeze(-1)

    @torch.no_grad()
    def all_text_logps(
        self, texts: TextFeatures, constants: HeadConstants, ids: Int[Tensor, "texts"] | None = None, block: int = 64
    ) -> tuple[Float[Tensor, "texts experts"], Float[Tensor, "texts"]]:
        """log pi_k and log pi_ref of the texts `ids` (all by default), nats, in blocks of `block` texts."""
        ids = torch.arange(len(texts)) if ids is None else ids
        logps, refs = [], []
        for part in ids.split(block):
            batch = self.batch(texts, constants, torch.stack([part, part], 1))
            logps.append(self.text_logps(batch)[batch["place"][:, 0]])
            refs.append(batch["text_ref_logps"][batch["place"][:, 0]])
        return torch.cat(logps), torch.cat(refs)

    def next_token(self, expert: Int[Tensor, "rows"] | None = None) -> NextToken:
        """A next-token function where row i speaks as expert[i]; None: every row as the reference."""
        return NextToken(self._base, None if expert is None else self, expert)


class NextToken:
    """Stateful next-token function of a base with optional expert heads, for `decoding.sample`.

    Called with (input_ids (rows, t), attention_mask (rows, total)); returns float32 logits (rows, vocabulary).
    With `observe`, called with the tokens that were drawn, it keeps log pi_k / pi_ref and log pi_ref of each of them.
    """

    def __init__(
        self, base: Base, experts: HeadExperts | None = None, expert: Int[Tensor, "rows"] | None = None
    ) -> None:
        self._base, self._cache = base, None
        self._groups: list[tuple[Tensor, Tensor, Tensor]] = []
        if experts is not None and expert is not None:
            head = experts._require_active()
            self._active = experts.active_ids
            for k in expert.unique().tolist():
                rows = (expert == k).nonzero().squeeze(1)
                self._groups.append((rows, experts.down[k].detach(), (head @ experts.up[k]).detach()))
        self._logits: Tensor | None = None
        self._ref_logits: Tensor | None = None
        self._seen: list[tuple[Tensor, Tensor]] = []

    @torch.inference_mode()
    def __call__(self, input_ids: Int[Tensor, "rows t"], attention_mask: Int[Tensor, "rows total"]) -> Tensor:
        model = self._base.model
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        out = model.base_model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=positions, use_cache=True,
            past_key_values=self._cache,
        )  # fmt: skip
        self._cache = out.past_key_values
        hidden = out.last_hidden_state[:, -1]
        logits = model.get_output_embeddings()(hidden).float()
        self._ref_logits = logits
        if self._groups:
            logits = logits.clone()
            for rows, down, up in self._groups:
                part = logits[rows]
                part[:, self._active] += (hidden[rows].float() @ down.T) @ up.T
                logits[rows] = part
        self._logits = logits
        return logits

    @torch.inference_mode()
    def observe(self, tokens: Int[Tensor, "rows"]) -> None:
        """Keep what policy and reference say of the tokens just drawn from the last logits."""
        assert self._logits is not None and self._ref_logits is not None
        ref = self._ref_logits.gather(1, tokens[:, None]).squeeze(1) - self._ref_logits.logsumexp(1)
        own = ref
        if self._groups:
            own = self._logits.gather(1, tokens[:, None]).squeeze(1) - self._logits.logsumexp(1)
        self._seen.append((own - ref, ref))

    def scores(self) -> tuple[Float[Tensor, "rows steps"], Float[Tensor, "rows steps"]]:
        """(log pi_k - log pi_ref, log pi_ref) of every token observed, nats."""
        ratio, ref = zip(*self._seen, strict=True)
        return torch.stack(ratio, 1), torch.stack(ref, 1)


def reference_next_token(base: Base) -> NextToken:
    """Next-token function of the plain base."""
    return NextToken(base)


class TabularExperts(nn.Module):
    """K exact policies over a finite set of answers, for teaching and for tests: nothing is approximated.

    Expert k has one reward r_k(a) for every answer a, and the policy pi_k(a) = pi_ref(a) exp(r_k(a) / beta) / Z_k, the
    optimum of its own objective; its margin on a pair is r_k(chosen) - r_k(rejected). Rewards have the prior
    N(0, prior_scale^2), without which an answer that always wins has no finite reward.

    Parameters
    ----------
    n_answers : at least 2.
    n_experts : K >= 1; 1 is one Bradley-Terry model.
    beta : > 0. Scales the policy, not the fit of the rewards.
    prior_scale : > 0, standard deviation of the prior, in units of reward; 2.0 by default, the spread of a reward that
        decides most pairs clearly.
    log_ref : (answers,) float64, nats; uniform by default.

    >>> experts = TabularExperts(n_answers=2, n_experts=1)
    >>> pairs = torch.tensor([[0, 1]] * 3 + [[1, 0]])                     # answer 0 wins three of four
    >>> weights = torch.ones(4, 1, dtype=torch.float64)
    >>> for _ in range(5):
    ...     _ = experts.m_step(pairs, weights)
    >>> round(experts.loglik(pairs[:1]).exp().item(), 2)                    # the prior draws 3/4 towards 1/2
    0.72
    """

    log_ref: Tensor

    def __init__(
        self, n_answers: int, n_experts: int, beta: float = 1.0, prior_scale: float = 2.0, log_ref: Tensor | None = None
    ) -> None:
        super().__init__()
        check_n_experts(n_experts)
        if n_answers < 2:
            raise ValueError(f"n_answers={n_answers}: a preference needs at least two answers")
        for name, value in (("beta", beta), ("prior_scale", prior_scale)):
            if not 0 < value < float("inf"):
                raise ValueError(f"{name}={value}: expected a positive number")
        self.n_experts, self.n_answers, self.beta, self.prior_scale = n_experts, n_answers, beta, prior_scale
        self.rewards = nn.Parameter(torch.zeros(n_experts, n_answers, dtype=torch.float64))
        self.register_buffer(
            "log_ref", torch.zeros(n_answers).double().log_softmax(0) if log_ref is None else log_ref.double()
        )

    def _check(self, pairs: Tensor) -> None:
        if pairs.dim() != 2 or pairs.shape[1] != 2 or len(pairs) == 0:
            raise ValueError(f"pairs has shape {tuple(pairs.shape)}; expected (pairs, 2): chosen and rejected answer")
        if int(pairs.min()) < 0 or int(pairs.max()) >= self.n_answers:
            row = int(((pairs < 0) | (pairs >= self.n_answers)).any(1).nonzero()[0])
            raise ValueError(
                f"pairs[{row}] = {pairs[row].tolist()}; expected answers 0 ... {self.n_answers - 1}: renumber them"
            )

    @torch.no_grad()
    def perturb(self, scale: float, generator: torch.Generator) -> None:
        """Draw the rewards from N(0, scale^2): symmetry breaking, or known experts for generated data."""
        self.rewards.copy_(torch.randn(self.rewards.shape, generator=generator, dtype=torch.float64) * scale)

    @torch.no_grad()
    def sample_pairs(
        self, expert: Int[Tensor, "units"], pairs_per_unit: int, generator: torch.Generator
    ) -> tuple[Int[Tensor, "pairs 2"], Int[Tensor, "pairs"]]:
        """Random pairs of different answers, labelled by the expert of each unit with probability sigma(D_k).

        Returns (pairs, unit): chosen and rejected answer, and 0 ... U-1.
        """
        unit = torch.arange(len(expert)).repeat_interleave(pairs_per_unit)
        first = torch.randint(self.n_answers, (len(unit),), generator=generator)
        second = (first + torch.randint(1, self.n_answers, (len(unit),), generator=generator)) % self.n_answers
        rewards, k = self.rewards, expert[unit]
        wins = torch.rand(len(unit), generator=generator, dtype=torch.float64) < torch.sigmoid(
            rewards[k, first] - rewards[k, second]
        )
        return torch.stack([torch.where(wins, first, second), torch.where(wins, second, first)], 1), unit

    def log_policy(self) -> Float[Tensor, "experts answers"]:
        """log pi_k(a), nats."""
        return (self.log_ref + self.rewards / self.beta).log_softmax(1)

    def logps(self, pairs: Int[Tensor, "pairs 2"]) -> Float[Tensor, "pairs 2 experts"]:
        """log pi_k of the chosen (0) and the rejected (1) answer, nats. Gradients flow to the rewards."""
        self._check(pairs)
        return self.log_policy().T[pairs]

    def ref_logps(self, pairs: Int[Tensor, "pairs 2"]) -> Float[Tensor, "pairs 2 1"]:
        """log pi_ref of the chosen (0) and the rejected (1) answer, nats."""
        self._check(pairs)
        return self.log_ref[pairs].unsqueeze(-1)

    def loglik(self, pairs: Int[Tensor, "pairs 2"]) -> Float[Tensor, "pairs experts"]:
        """log sigma(D_k) of every pair, nats. Gradients flow to the rewards."""
        self._check(pairs)
        return nn.functional.logsigmoid((self.rewards[:, pairs[:, 0]] - self.rewards[:, pairs[:, 1]]).T)

    def log_prior(self) -> Float[Tensor, ""]:
        """Log density of all rewards under their prior, without its constant; nats."""
        return -(self.rewards**2).sum() / (2 * self.prior_scale**2)

    @torch.no_grad()
    def m_step(self, pairs: Int[Tensor, "pairs 2"], weight: Float[Tensor, "pairs experts"], steps: int = 2) -> int:
        """Raise sum_n weight_nk log sigma(D_nk) + log prior of every expert by damped Newton steps, in place.

        A step that does not raise an expert's objective is halved until it does (generalised EM: the bound never
        falls). Weighted Bradley-Terry has no closed form; its Hessian, with the prior, is positive definite.

        Parameters
        ----------
        weight : responsibilities, >= 0, float64. steps : Newton steps at most; two leave little to the next M-step.

        Returns
        -------
        How many (expert, step) updates were made; 0 means that every expert is at its optimum up to rounding.
        """
        self._check(pairs)
        n, k = self.n_answers, self.n_experts
        cell = pairs[:, 0] * n + pairs[:, 1]  # experts see a table of counts, whatever the number of pairs
        count = weight.new_zeros(n * n, k).index_add_(0, cell, weight).T.reshape(k, n, n)

        def objective(rewards: Tensor) -> Tensor:
            margin = rewards[:, :, None] - rewards[:, None, :]
            fit = (count * nn.functional.logsigmoid(margin)).sum((1, 2))
            return fit - (rewards**2).sum(1) / (2 * self.prior_scale**2)

        updates = 0
        for _ in range(steps):
            rewards = self.rewards.data
            p = torch.sigmoid(rewards[:, :, None] - rewards[:, None, :])
            pull = count * (1 - p)
            gradient = pull.sum(2) - pull.sum(1) - rewards / self.prior_scale**2
            bend = count * p * (1 - p)
            bend = bend + bend.transpose(1, 2)
            hessian = torch.diag_embed(bend.sum(2) + 1 / self.prior_scale**2) - bend
            direction = torch.linalg.solve(hessian, gradient)
            before, size = objective(rewards), torch.ones(k, 1, dtype=torch.float64)
            for _ in range(30):
                after = objective(rewards + size * direction)
                worse = after < before
                if not bool(worse.any()):
                    break
                size[worse] /= 2
            better = (after > before)[:, None]
            self.rewards.copy_(torch.where(better, rewards + size * direction, rewards))
            updates += int(better.sum())
        return updates
