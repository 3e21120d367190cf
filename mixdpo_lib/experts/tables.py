"""What do experts say that are tables? Exact policies over a finite set of answers: for teaching, and to test the rest.

`TabularExperts` are made of numbers alone (answers 0 ... A-1), of items that have names (`TabularExperts.from_pairs`), or of
the answers of a preference set, and then keep the whole contract of `contract.Experts`: they are fitted, asked and sampled
from like every other family.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..base.features import tokenise
from ..base.head import reference_logps
from ..base.model import Base
from ..data.items import item, item_pairs
from ..data.messages import as_prompt
from ..data.pairs import Pairs, Text, Texts
from .contract import Voices
from .reward_table import RewardTable


def numbered_answers(n_answers: int) -> list[Text]:
    """Answers 0 ... n - 1 to one question, for generated data that is fitted like any preference set.

    >>> numbered_answers(2)[1].response
    'answer 1'
    """
    return [item(f"answer {i}") for i in range(n_answers)]


def numbered_pairs(
    pairs: Int[Tensor, "pairs 2"], n_answers: int, **columns: Sequence[Any]
) -> Pairs:
    """Numbers of answers (`RewardTable.sample_pairs`) as a preference set, with columns such as user=[...]."""
    answers = numbered_answers(n_answers)
    rows = {"prompt": [answers[0].prompt] * len(pairs)}
    for side, name in enumerate(("chosen", "rejected")):
        rows[name] = [answers[i].response for i in pairs[:, side].tolist()]
    named = {name: [str(value) for value in values] for name, values in columns.items()}
    return Pairs(Dataset.from_dict({**rows, **named}), Texts.of(answers), pairs)


class TableConstants(NamedTuple):
    """A set of texts and the number (texts,) of each in a table; -1 for a text that is not in it."""

    texts: Texts
    number: np.ndarray


class TabularExperts(RewardTable):
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
    answers, base : what the answers are, see `of` and `from_pairs`; without answers all belong to one prompt that has no
        words; without a base they are judged, and not spoken.

    >>> experts = TabularExperts(n_answers=2, n_experts=1)
    >>> pairs = torch.tensor([[0, 1]] * 3 + [[1, 0]])                     # answer 0 wins three of four
    >>> weights = torch.ones(4, 1, dtype=torch.float64)
    >>> for _ in range(5):
    ...     _ = experts.m_step(pairs, weights)
    >>> round(experts.loglik(pairs[:1]).exp().item(), 2)                    # the prior draws 3/4 towards 1/2
    0.72
    """

    @classmethod
    def of(
        cls, base: Base | None, data: Dataset | Pairs, n_experts: int, **options: Any
    ) -> TabularExperts:
        """A table of all answers of a preference set; the reference is the base's, restricted to a prompt's answers.

        base : None for answers that are items: a uniform reference, and every text of the set, so that one table does for
            all parts of it.
        options : beta, prior_scale.
        """
        data = data if isinstance(data, Pairs) else Pairs.of(data)
        if base is None:
            texts = data.texts.texts
            return cls(len(texts), n_experts, answers=texts, **options)
        ids = torch.unique(data.index)
        log_ref = torch.from_numpy(reference_logps(base, data.texts))[ids]
        answers = [data.texts.texts[int(i)] for i in ids]
        return cls(len(answers), n_experts, log_ref=log_ref, answers=answers, base=base, **options)

    @classmethod
    def from_pairs(
        cls,
        first: Iterable[Any],
        second: Iterable[Any],
        winner: Iterable[Any],
        n_experts: int = 1,
        *,
        user: Iterable[Any] | None = None,
        covariates: Mapping[str, Iterable[Any]] | None = None,
        **options: Any,
    ) -> tuple[TabularExperts, Pairs]:
        """A table of items that have names and no texts, and their comparisons; no language model is asked.

        For another number of experts of the same pairs: `TabularExperts.of(None, pairs, n_experts)`.

        first, second, winner, user, covariates : see `items.item_pairs`; ties are left out. options : beta, prior_scale.

        >>> experts, pairs = TabularExperts.from_pairs(["tea"] * 4, ["milk"] * 4, ["tea", "tea", "milk", "tea"])
        >>> for _ in range(5):
        ...     _ = experts.m_step(pairs.index, torch.ones(4, 1, dtype=torch.float64))
        >>> experts.reward_table().round(2)
        expert     0
        answer
        tea     0.47
        milk   -0.47
        """
        pairs = item_pairs(first, second, winner, user=user, covariates=covariates)
        return cls.of(None, pairs, n_experts, **options), pairs

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
        answers = options["answers"] and [
            Text(as_prompt(prompt), *rest) for prompt, *rest in options["answers"]
        ]
        return cls(**{**options, "answers": answers}, base=find_base() if answers else None)

    def unmoved(self, k: int) -> bool:
        """See `Experts.unmoved`: every reward is 0."""
        return not bool(self.expert_rewards()[k].any())

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
        return {
            "place": place,
            "answer": answer,
            "text_ref_logps": self.log_ref.cpu()[answer][:, None],
        }

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
        return {
            "place": batch,
            "answer": torch.arange(self.n_answers),
            "text_ref_logps": self.log_ref[:, None],
        }

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
        if not self.answers or self.base[0] is None:
            raise ValueError(
                "this table has numbers, no words: make it by TabularExperts.of(base, pairs)"
            )
        return _TabularVoices(self, chosen)


class _TabularVoices(Voices):
    """p(v given y_<t): the share of the probability of all answers that begin with y_<t whose next token is v."""

    def __init__(
        self, experts: TabularExperts, chosen: Bool[Tensor, "rows experts"] | None
    ) -> None:
        base = experts.base[0]
        self._size, self._end = (
            base.model.get_output_embeddings().weight.shape[0],
            base.eos_token_id,
        )
        self._log_p = {-1: experts.log_ref} | dict(enumerate(experts.log_policy().detach()))
        self._groups = (
            []
            if chosen is None
            else [
                (k, rows)
                for k in range(experts.n_experts)
                if len(rows := chosen[:, k].nonzero().squeeze(1))
            ]
        )
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

    def __call__(
        self, input_ids: Tensor, mask: Tensor
    ) -> tuple[Tensor, list[tuple[int, Tensor, Tensor]]]:
        if not self._prompts:
            self._prompts = [
                tuple(row[keep > 0].tolist()) for row, keep in zip(input_ids, mask, strict=True)
            ]
            self._said = [[] for _ in self._prompts]
            for row, prompt in enumerate(self._prompts):
                if prompt not in self._table:
                    raise ValueError(
                        f"row {row}: its prompt is not in the table, which can answer its own alone"
                    )
        else:
            for said, row in zip(self._said, input_ids.tolist(), strict=True):
                said.extend(row)
        every = torch.arange(len(input_ids))
        return self._next(-1, every), [(k, rows, self._next(k, rows)) for k, rows in self._groups]

    def _next(self, k: int, rows: Tensor) -> Float[Tensor, "rows tokens"]:
        log_p = torch.full((len(rows), self._size), -torch.inf)
        for place, row in enumerate(rows.tolist()):
            said = self._said[row]
            left = [
                (answer[len(said)], i)
                for answer, i in self._table[self._prompts[row]]
                if answer[: len(said)] == said and len(answer) > len(said)
            ]
            if not left:  # everything was said
                log_p[place, self._end] = 0.0
                continue
            token, answer = torch.tensor(left).T
            total = self._log_p[k][answer].logsumexp(0)
            for one in token.unique():
                log_p[place, one] = self._log_p[k][answer[token == one]].logsumexp(0) - total
        return log_p
