"""What is known of a visitor, and what follows from it? Weights, the next question, texts; no widget here."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..data.pairs import Text, Texts
from ..elbo import keep_top_s
from ..policy.mixture import MixturePolicy
from .speaking import Spoken, speak

Score = Callable[[Sequence[str]], pd.DataFrame]
MOST_VOICES = 6  # of a mixture of more the heaviest speak
TEMPERATURES = (0.2, 5.0)
SURE = 20.0  # concentration of weights that a dial sets: .22 radians
PROMPTS = ("This film", "The plot", "The actors were", "I went to see it because")


class Comparison(NamedTuple):
    """Two answers to a prompt; a visitor says which is better."""

    prompt: str
    first: str
    second: str


class Session:
    """A fitted mixture and one visitor.

    Parameters
    ----------
    policy : of experts that speak. names : of the experts, by default "expert 0", ...
    prompts : to choose from. comparisons : to answer; by default two texts of the base for each prompt.
    score : rewards of whole texts, one column each, such as `score_texts(texts, judges.training)`; none by default.

    Raises
    ------
    ValueError : experts without words; a gate that reads columns of which it does not know the values; as many names as
        there are no experts.
    """

    def __init__(
        self,
        policy: MixturePolicy,
        names: Sequence[str] = (),
        prompts: Sequence[str] = PROMPTS,
        comparisons: Sequence[Sequence[str]] | None = None,
        score: Score | None = None,
    ) -> None:
        gate, n = policy.gate, policy.n_experts
        if policy.base is None:
            raise ValueError(
                f"{type(policy.experts).__name__} without words: expected experts that write; "
                "`policy.posterior` and `mx.report` say what tables have learned"
            )
        self.columns: Mapping[str, Any] = getattr(gate, "columns", {})
        if unknown := [c for c in gate.reads if c not in (*self.columns, *gate.of_prompt)]:
            raise ValueError(
                f"{type(gate).__name__} reads {', '.join(unknown)}, whose values it does not know; expected a gate of "
                "metadata (UserGate), of prompts, or one that reads nothing"
            )
        if names and len(names) != n:
            raise ValueError(f"names={list(names)}: expected {n}, one an expert")
        self.policy, self.score, self.prompts = policy, score, list(prompts)
        self.names = list(names) or [f"expert {k}" for k in range(n)]
        self.metadata = {
            name: kind[0] if isinstance(kind, list) else round(kind[0], 3)
            for name, kind in self.columns.items()
        }
        self.temperature, self.top_s = 1.0, n
        self.angle: float | None = None  # radians, of a dial that was turned
        self.prompt = self.prompts[0]
        self.answers: list[tuple[int, int]] = []  # (comparison, side that was preferred)
        drawn = self.drawn() if comparisons is None else comparisons
        self.comparisons = [Comparison(*one) for one in drawn]
        self._loglik = self._judged()

    def drawn(self, max_new_tokens: int = 20) -> list[Comparison]:
        """Two texts of the base for each prompt."""
        pairs = [
            Comparison(p, *speak(self.policy, p, [-1, -1], max_new_tokens, i).texts)
            for i, p in enumerate(self.prompts)
        ]
        return [c for c in pairs if c.first != c.second and c.first.strip() and c.second.strip()]

    def _judged(self) -> Float[Tensor, "comparisons sides experts"]:
        """log p(this side is preferred) of each comparison by each expert, nats; the lapse rate is in it."""
        if not self.comparisons:
            return torch.zeros(0, 2, self.policy.n_experts)
        sides = [Text(c.prompt, answer, False) for c in self.comparisons for answer in c[1:]]
        texts = Texts.of(sides)
        place = torch.tensor([texts.index[one] for one in sides]).reshape(-1, 2)
        reward = self.policy.text_rewards(texts)[place]
        margin = reward[:, 0] - reward[:, 1]
        loglik = [self.policy.with_lapse(F.logsigmoid(sign * margin)) for sign in (1, -1)]
        return torch.stack(loglik, 1)

    # ------------------------------------------------------------------------------------------------- the weights

    @property
    def of_prompt(self) -> bool:
        """Whether weights belong to the prompt and not to the visitor."""
        return bool(self.policy.gate.of_prompt)

    @property
    def on_circle(self) -> bool:
        """Whether the experts are directions, so that a dial makes sense."""
        nodes = self.policy.experts.nodes
        return nodes is not None and nodes.group in ("circle", "cyclic")

    @torch.no_grad()
    def user_log_w(self) -> Float[Tensor, "experts"]:
        """The visitor's weights, nats: the gate's for the metadata (or the prompt), updated by the answers; or the dial's."""
        policy = self.policy
        if self.angle is not None and policy.experts.nodes is not None:
            away = policy.experts.nodes.points - self.angle
            return (SURE * away.cos()).log_softmax(0).float()
        if self.of_prompt:
            return policy.prompt_log_w([self.prompt])[0]
        inputs = policy.gate.user_inputs({n: [v] for n, v in self.metadata.items()}, policy.base)
        said = [self._loglik[number, side] for number, side in self.answers]
        return policy.gate.served(inputs, torch.stack(said) if said else None)

    def log_w(self) -> Float[Tensor, "experts"]:
        """`user_log_w`, to the power 1/temperature, of the `top_s` experts of most weight; nats, normalised."""
        log_w = (self.user_log_w() / self.temperature).log_softmax(-1)
        return keep_top_s(log_w[None], self.top_s)[0].log_softmax(-1)

    # ----------------------------------------------------------------------------------------------- comparisons

    def question(self) -> int | None:
        """The comparison whose answer is expected to say most about who the visitor is; None: all are answered.

        I(answer; z) = H(sum_k w_k p_k) - sum_k w_k H(p_k), at the weights as they are now.
        """
        asked = {number for number, _ in self.answers}
        left = [i for i in range(len(self.comparisons)) if i not in asked]
        if not left or self.of_prompt:
            return None
        p = self._loglik[left, 0].exp()
        w = self.user_log_w().exp().to(p)
        told = _entropy(p @ w) - _entropy(p) @ w
        return left[int(told.argmax())]

    def answer(self, number: int, side: int) -> None:
        """The visitor prefers side 0 or 1 of a comparison.

        Raises
        ------
        ValueError : no such comparison or side, one that was answered, weights that belong to the prompt.
        """
        if self.of_prompt:
            raise ValueError("the gate reads the prompt: its weights are no property of a visitor")
        if not (0 <= number < len(self.comparisons) and side in (0, 1)):
            raise ValueError(
                f"answer({number}, {side}): expected one of {len(self.comparisons)} comparisons and side 0 or 1"
            )
        if any(number == one for one, _ in self.answers):
            raise ValueError(f"answer({number}, {side}): this comparison was answered before")
        self.angle = None
        self.answers.append((number, side))

    def forget(self) -> None:
        """Take all answers back."""
        self.answers.clear()

    # ------------------------------------------------------------------------------------------------------ texts

    def voices(self) -> list[int]:
        """Who speaks: the base, and the experts (of many those of most weight)."""
        log_w, n = self.log_w(), self.policy.n_experts
        most = log_w.argsort(descending=True, stable=True)[: 3 if n > MOST_VOICES else n]
        return [-1, *sorted(int(k) for k in most)]

    def write(self, max_new_tokens: int = 32, seed: int = 0) -> Spoken:
        """What each voice writes after the prompt."""
        return speak(self.policy, self.prompt, self.voices(), max_new_tokens, seed)

    def rewards(self, spoken: Spoken) -> pd.DataFrame:
        """What the judges say of prompt and text together, one row a voice; no column without judges."""
        if self.score is None:
            return pd.DataFrame(index=range(len(spoken.voices)))
        return self.score([spoken.prompt + text for text in spoken.texts])

    def table(self, spoken: Spoken, rewards: pd.DataFrame) -> pd.DataFrame:
        """One row a voice: voice, weight (of the base none), text, kl (nats from the base), rewards."""
        w = self.log_w().exp().tolist()
        rows = {
            "voice": [self.name(voice) for voice in spoken.voices],
            "weight": [float("nan") if voice < 0 else w[voice] for voice in spoken.voices],
            "text": spoken.texts,
            "kl": spoken.kl,
        }
        return pd.concat([pd.DataFrame(rows), rewards.reset_index(drop=True)], axis=1)

    def name(self, voice: int) -> str:
        """Of a voice: -1 is the base."""
        return "base" if voice < 0 else self.names[voice]


def _entropy(p: Tensor) -> Tensor:
    """Of a yes-or-no answer, nats."""
    return -(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p)).clamp(max=0.0)


def degrees(angle: float) -> int:
    """Radians as whole degrees from 0 to 359.

    >>> degrees(-math.pi / 2)
    270
    """
    return round(math.degrees(angle)) % 360
