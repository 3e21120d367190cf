"""What if the prompt says who asks? The study of review users with a user's metadata in a sentence before each prompt."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cached_property

import pandas as pd
from datasets import Dataset, DatasetDict

from ..data.pairs import Text, Texts
from ..elbo import correct
from ..learning.config import FitConfig
from .fits import Fitted
from .review_users import Method, ReviewUsers
from .simulated_people import AGE_BANDS, GENRES


def sentence(genre: str, age_band: str) -> str:
    """What stands before the prompt.

    >>> sentence("drama", "55+")
    'A viewer of 55+ who likes drama writes: '
    """
    return f"A viewer of {age_band} who likes {genre} writes: "


class ToldInPrompt(ReviewUsers):
    """The users, answers and labels of `ReviewUsers`; each prompt begins with a sentence of the user's genre and age.

    One DPO then reads who asks. Conditioning a policy on a description of the user is common; this sentence is ours.

    There is a text for every candidate and sentence: with three genres and three ages nine times the passes of the base,
    disk and time of a step of `ReviewUsers`. A batch holds so many more prompts, so that a pass has as many steps.
    """

    @property
    def methods(self) -> dict[str, Method]:
        """One policy."""
        return {"dpo": super().methods["dpo"]}

    @property
    def sentences(self) -> list[str]:
        """Of all that can be known of a user."""
        genres = GENRES[: max(2, len(self.groups))]
        return [sentence(*known) for known in itertools.product(genres, AGE_BANDS)]

    @cached_property
    def texts(self) -> Texts:
        """All candidates after each of the sentences."""
        table = self.candidates
        both = list(zip(table["prompt"], table["response"], strict=True))
        return Texts.of(Text(told + p, r, False) for told in self.sentences for p, r in both)

    def preferences(self, design: str, seed: int = 0) -> DatasetDict:
        """See `ReviewUsers.preferences`; the column `told` has the sentence. Test pairs stand after each of them."""
        sets = {}
        for name, rows in super().preferences(design, seed).items():
            columns = rows.to_dict()
            if name == "test":
                told = [one for one in self.sentences for _ in range(len(rows))]
                columns = {c: list(values) * len(self.sentences) for c, values in columns.items()}
            else:
                known = zip(columns["genre"], columns["age_band"], strict=True)
                told = [sentence(*one) for one in known]
            sets[name] = _after(columns, told)
        return DatasetDict(sets)

    def fit_config(self, method: str, seed: int) -> FitConfig:
        """The study's, with batches of as many pairs."""
        config = super().fit_config(method, seed)
        return config.change(batch_size=config.batch_size * len(self.sentences))

    def _accuracy(self, fitted: Fitted) -> pd.DataFrame:
        """See `accuracy_by_prompt`: each user is scored after the own sentence."""
        parts = []
        for who, name in (("seen", "train"), ("new", "context")):
            by_user = self._served(fitted, name).groupby(["group", "prompt_id"])
            table = by_user.agg({"accuracy": "mean", "n_pairs": "first"}).reset_index()
            parts.append(fitted.named(table.assign(routing="none", users=who)))
        return pd.concat(parts, ignore_index=True)

    def _by_user(self, fitted: Fitted) -> pd.DataFrame:
        return fitted.named(self._served(fitted, "train"))

    def _served(self, fitted: Fitted, name: str) -> pd.DataFrame:
        """Test accuracy of the users of a set by group, user and prompt."""
        sets = self.pairs(fitted.design, fitted.seed)
        test = sets["test"]
        hits = correct(fitted.policy.loglik(test, fitted.rewards)[:, 0].exp()).double()
        asked = pd.DataFrame({c: list(test.rows[c]) for c in ("group", "prompt_id", "told")})
        asked["accuracy"] = hits.numpy()
        columns = {c: list(sets[name].rows[c]) for c in ("user", "group", "told")}
        users = pd.DataFrame(columns).drop_duplicates("user")
        served = users.merge(asked, on=["group", "told"]).groupby(["group", "user", "prompt_id"])
        return served["accuracy"].agg(accuracy="mean", n_pairs="size").reset_index()


def _after(columns: dict[str, list], told: Sequence[str]) -> Dataset:
    prompts = [one + prompt for one, prompt in zip(told, columns["prompt"], strict=True)]
    return Dataset.from_dict({**columns, "prompt": prompts, "told": list(told)})
