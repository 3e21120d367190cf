"""What do experts say that are tables? Exact policies over a finite set of answers: for teaching, and to test the rest.

`TabularExperts` are made of numbers alone (answers 0 ... A-1), or of the answers of a preference set, and then keep the
whole contract of `contract.Experts`: they are fitted, asked and sampled from like every other family.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..base.features import tokenise
from ..base.head import reference_logps
from ..base.model import Base
from ..data.pairs import Pairs, Text, Texts
from .contract import Experts, Voices


class TableConstants(NamedTuple):
    """A set of texts and the number (texts,) of each in a table; -1 for a text that is not in it."""

    texts: Texts
    number: np.ndarray


class TabularExperts(Experts):
    """K exact policies over a finite set of answers, for teaching and for tests: nothing is approximated.

    Expert k has one reward r_k(a) for every answer a, and the policy pi_k(a) = pi_ref(a) exp(r_k(a) / beta) / Z_k, the
    optimum of its own objective, with one Z_k for each prompt; its margin on a pair is r_k(chosen) - r_k(rejected).
    Rewards have the prior N(0, prior_scale^2), without which an answer that always wins has no finite reward.

    Parameters
    ----------
    n_answers : at least 2.
    n_experts : K >= 1; 1 is one Bradley-Terry model.
    beta : > 0. Scales the policy, not the fit of the rewards; in a `MixturePolicy` the same as its own.
    prior_scale : > 0, standard deviation of the prior, in units of reward; 2.0 by default, the spread of a reward that
        decides most pairs clearly.
    log_ref : (answers,) float64, nats; uniform by default. Normalised within each prompt.
    answers, base : what the answers are, see `of`; without them all answers belong to one prompt that has no words.

    >>> experts = TabularExperts(n_answers=2, n_experts=1)
    >>> pairs = torch.tensor([[0, 1]] * 3 + [[1, 0]])                     # answer 0 wins three of four
    >>> weights = torch.ones(4, 1, dtype=torch.float64)
    >>> for _ in range(5):
    ...     _ = experts.m_step(pairs, weights)
    >>> round(experts.loglik(pairs[:1]).exp().item(), 2)                    # the prior draws 3/4 towards 1/2
    0.72
    """

    rates = {"adamw": 0.1, "sgd": 1.0}
    log_ref: Tensor
    prompt: Tensor

    def __init__(
        self, n_answers: int, n_experts: int, beta: float = 1.0, prior_scale: float = 2.0,
        log_ref: Tensor | None = None, answers: Sequence[Text] | None = None, base: Base | None = None,
    ) -> None:  # fmt: skip
        super().__init__(base, n_experts)
        if n_answers < 2:
            raise ValueError(f"n_answers={n_answers}: a preference needs at least two answers")
        for name, value in (("beta", beta), ("prior_scale", prior_scale)):
            if not 0 < value < float("inf"):
                raise ValueError(f"{name}={value}: expected a positive number")
        if (answers is None) != (base is None) or len(answers or range(n_answers)) != n_answers:
            raise ValueError(f"n_answers={n_answers}: expected as many answers and their base, or neither")
        self.n_answers, self.beta, self.prior_scale = n_answers, beta, prior_scale
        self.answers = tuple(answers or ())
        prompts = {name: i for i, name in enumerate(dict.fromkeys(answer.prompt for answer in self.answers))}
        place = [prompts[answer.prompt] for answer in self.answers] or [0] * n_answers
        self.rewards = nn.Parameter(torch.zeros(n_experts, n_answers, dtype=torch.float64))
        self.register_buffer("prompt", torch.tensor(place))
        log_ref = torch.zeros(n_answers) if log_ref is None else log_ref
        self.register_buffer("log_ref", self._by_prompt(log_ref.double()[None])[0])

    @classmethod
    def of(cls, base: Base, data: Dataset | Pairs, n_experts: int, **options: Any) -> TabularExperts:
        """A table of all answers of a preference set; the reference is the base's, restricted to a prompt's answers.

        options : beta, prior_scale.
        """
        data = data if isinstance(data, Pairs) else Pairs.of(data)
        ids = torch.unique(data.index)
        log_ref = torch.from_numpy(reference_logps(base, data.texts))[ids]
        answers = [data.texts.texts[int(i)] for i in ids]
        return cls(len(answers), n_experts, log_ref=log_ref, answers=answers, base=base, **options)

    def options(self) -> dict[str, Any]:
        """What makes equal experts but for their parameters."""
        names = ("n_answers", "n_experts", "beta", "prior_scale")
        answers = [list(answer) for answer in self.answers] or None
        return {**{name: getattr(self, name) for name in names}, "answers": answers}

    @classmethod
    def from_options(
        cls, options: Mapping[str, Any], find_base: Callable[..., Base]
    ) -> TabularExperts:
        """A table of the same answers, with rewards of 0."""
        answers = options["answers"] and [Text(*answer) for answer in options["answers"]]
        return cls(**{**options, "answers": answers}, base=find_base() if answers else None)

    def _by_prompt(self, scores: Float[Tensor, "rows answers"]) -> Float[Tensor, "rows answers"]:
        """Log-probabilities of these scores among the answers of each prompt."""
        n, place = int(self.prompt.max()) + 1, self.prompt.expand(scores.shape)
        top = scores.new_full((len(scores), n), -torch.inf).scatter_reduce(1, place, scores.detach(), "amax")
        total = torch.zeros_like(top).scatter_add(1, place, (scores - top.gather(1, place)).exp())
        return scores - (top + total.log()).gather(1, place)

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
        """log pi_k(a) among the answers of a's prompt, nats."""
        return self._by_prompt(self.log_ref + self.rewards / self.beta)

    # ------------------------------------------------------------------------------------------------- likelihoods

    def constants(self, texts: Texts) -> TableConstants:
        """The texts, and the number of each of them in the table."""
        place = {answer: i for i, answer in enumerate(self.answers)}
        return TableConstants(texts, np.array([place.get(text, -1) for text in texts.texts]))

    def batch(self, constants: TableConstants, pairs: Int[Tensor, "pairs 2"]) -> dict[str, Tensor]:
        """Everything `logps` reads for these pairs.

        Raises
        ------
        ValueError : a text that is not in the table, of which a table knows nothing; it is named.
        """
        ids, place = torch.unique(pairs, return_inverse=True)
        answer = torch.from_numpy(constants.number)[ids]
        if bool((answer < 0).any()):
            text = constants.texts.texts[int(ids[answer < 0][0])]
            raise ValueError(
                f"answer {text.response[:40]!r} to {text.prompt[:40]!r} is not among the {self.n_answers} of the "
                "table: a table knows its own answers alone; make it of all pairs that it shall judge"
            )
        return {"place": place, "answer": answer, "text_ref_logps": self.log_ref.cpu()[answer][:, None]}

    def text_logps(
        self, batch: dict[str, Tensor], chosen: Bool[Tensor, "texts experts"] | None = None
    ) -> Float[Tensor, "texts experts"]:
        """See `Experts.text_logps`; float64."""
        logps = self.log_policy().T[batch["answer"]]
        return logps if chosen is None else logps.masked_fill(~chosen, -torch.inf)

    def _numbered(self, batch: dict[str, Tensor] | Tensor) -> dict[str, Tensor]:
        if isinstance(batch, dict):
            return batch
        self._check(batch)
        return {"place": batch, "answer": torch.arange(self.n_answers), "text_ref_logps": self.log_ref[:, None]}

    def logps(
        self, batch: dict[str, Tensor] | Tensor, chosen: Bool[Tensor, "pairs experts"] | None = None
    ) -> Float[Tensor, "pairs 2 experts"]:
        """See `Experts.logps`; `batch` may also be numbers of answers, (pairs, 2). Gradients flow to the rewards."""
        return super().logps(self._numbered(batch), chosen)

    def ref_logps(self, batch: dict[str, Tensor] | Tensor) -> Float[Tensor, "pairs 2 1"]:
        """See `Experts.ref_logps`; `batch` may also be numbers of answers, (pairs, 2)."""
        return super().ref_logps(self._numbered(batch))

    def voices(self, chosen: Bool[Tensor, "rows experts"] | None) -> Voices:
        """See `Experts.voices`: exact next-token distributions of a table of texts, each of which ends after itself."""
        if not self.answers:
            raise ValueError("this table has numbers, no words: make it by TabularExperts.of(base, pairs)")
        return _TabularVoices(self, chosen)

    # ------------------------------------------------------------------------------------------------ full-batch EM

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
        rewards, updates = newton_steps(self.rewards.data, count, self.prior_scale, steps)
        self.rewards.copy_(rewards)
        return updates


def newton_steps(
    rewards: Float[Tensor, "experts answers"],
    count: Float[Tensor, "experts answers answers"],
    prior_scale: float,
    steps: int,
) -> tuple[Float[Tensor, "experts answers"], int]:
    """Rewards after damped Newton steps on sum count[a, b] log sigma(r_a - r_b) + log prior, and how many rose.

    count : how often (by responsibility) answer a was preferred to answer b. A step that does not raise an expert's
    objective is halved until it does.
    """

    def objective(rewards: Tensor) -> Tensor:
        margin = rewards[:, :, None] - rewards[:, None, :]
        fit = (count * nn.functional.logsigmoid(margin)).sum((1, 2))
        return fit - (rewards**2).sum(1) / (2 * prior_scale**2)

    updates = 0
    for _ in range(steps):
        p = torch.sigmoid(rewards[:, :, None] - rewards[:, None, :])
        pull = count * (1 - p)
        gradient = pull.sum(2) - pull.sum(1) - rewards / prior_scale**2
        bend = count * p * (1 - p)
        bend = bend + bend.transpose(1, 2)
        hessian = torch.diag_embed(bend.sum(2) + 1 / prior_scale**2) - bend
        direction = torch.linalg.solve(hessian, gradient)
        before, size = objective(rewards), torch.ones(len(rewards), 1, dtype=torch.float64)
        for _ in range(30):
            after = objective(rewards + size * direction)
            worse = after < before
            if not bool(worse.any()):
                break
            size[worse] /= 2
        better = (after > before)[:, None]
        rewards = torch.where(better, rewards + size * direction, rewards)
        updates += int(better.sum())
    return rewards, updates


class _TabularVoices(Voices):
    """p(v given y_<t): the share of the probability of all answers that begin with y_<t whose next token is v."""

    def __init__(self, experts: TabularExperts, chosen: Bool[Tensor, "rows experts"] | None) -> None:
        base = experts.base[0]
        self._size, self._end = base.model.get_output_embeddings().weight.shape[0], base.eos_token_id
        self._log_p = {-1: experts.log_ref} | dict(enumerate(experts.log_policy().detach()))
        self._groups = [] if chosen is None else [(k, rows) for k in range(experts.n_experts)
                                                  if len(rows := chosen[:, k].nonzero().squeeze(1))]  # fmt: skip
        self._table: dict[tuple[int, ...], list[tuple[list[int], int]]] = {}
        for i, answer in enumerate(experts.answers):
            prompt, response = tokenise(base, answer)
            ended = response if answer.ended else [*response, self._end]
            self._table.setdefault(tuple(prompt), []).append((ended, i))
        self._prompts: list[tuple[int, ...]] = []
        self._said: list[list[int]] = []

    def reorder(self, source: Int[Tensor, "rows"]) -> None:
        """See `Voices.reorder`."""
        self._prompts = [self._prompts[i] for i in source.tolist()]
        self._said = [list(self._said[i]) for i in source.tolist()]

    def __call__(self, input_ids: Tensor, mask: Tensor) -> tuple[Tensor, list[tuple[int, Tensor, Tensor]]]:
        if not self._prompts:
            self._prompts = [tuple(row[keep > 0].tolist()) for row, keep in zip(input_ids, mask, strict=True)]
            self._said = [[] for _ in self._prompts]
            for row, prompt in enumerate(self._prompts):
                if prompt not in self._table:
                    raise ValueError(f"row {row}: its prompt is not in the table, which can answer its own alone")
        else:
            for said, row in zip(self._said, input_ids.tolist(), strict=True):
                said.extend(row)
        every = torch.arange(len(input_ids))
        return self._next(-1, every), [(k, rows, self._next(k, rows)) for k, rows in self._groups]

    def _next(self, k: int, rows: Tensor) -> Float[Tensor, "rows tokens"]:
        log_p = torch.full((len(rows), self._size), -torch.inf)
        for place, row in enumerate(rows.tolist()):
            said = self._said[row]
            left = [(answer[len(said)], i) for answer, i in self._table[self._prompts[row]]
                    if answer[: len(said)] == said and len(answer) > len(said)]  # fmt: skip
            if not left:  # everything was said
                log_p[place, self._end] = 0.0
                continue
            token, answer = torch.tensor(left).T
            total = self._log_p[k][answer].logsumexp(0)
            for one in token.unique():
                log_p[place, one] = self._log_p[k][answer[token == one]].logsumexp(0) - total
        return log_p
