"""What is asked about in two domains? Titles or first words, cut into prompts, and what a gate reads of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor

from ..base.features import encode_prompts
from ..base.model import Base
from ..learning.config import FitConfig
from ..learning.starts import Start
from ..store import MixDPOError, hash_seed, project_root
from .candidates import first_words
from .judges.contract import JudgeConfig, split_reviews
from .reviews import load_reviews
from .titles import DOMAINS, TEMPLATES, familiarity, load_titles, split_items

SUFFIXES = {
    "titles": " was good.\n\nThis is about a famous",
    "reviews": "...\n\nQuestion: What is this a review of?\nAnswer: It is a review of a",
}
LAYER = 28  # of the packaged model's 30; chosen by cross-validation on works that are not held out, see docs/log.md
DOMAIN_FIT = FitConfig(
    latent="pair",
    batch_by="prompt",
    batch_size=16,
    optimizer="sgd",
    learning_rate=0.03,
    passes=4.0,
    min_steps=0,
    start=Start(
        "clusters",
        passes=1.0,
        certainty=0.95,
        together="item",
        temperature=1.0,
        tempering_passes=1.0,
    ),
    evaluations_per_pass=1,
    evaluate_training=False,
)


@dataclass(frozen=True)
class TwoDomainsConfig:
    """Every choice of the study of two domains."""

    prompts: str = "titles"  # "titles" in templates, or "reviews": the first words of real ones
    base: str = "smollm2-135m"
    reviews: str = "imdb-packaged"  # reviews of films; the judges are fitted on others of them
    book_reviews: str = ""  # file, folder or hub id with reviews of books; for "reviews" only
    titles: str = ""  # folder with films.csv and books.csv; the project's own by default
    n_titles: int = 150  # of each domain: those that the base knows best, see `familiarity`
    templates: tuple[str, ...] = (
        TEMPLATES  # with {title} and {maker}; the same for both domains, every title in each
    )
    n_prompts: int = 180  # of each domain, for "reviews"
    prompt_tokens: int = 32  # of a review
    gate_tokens: int = 32  # how many of them the gate reads
    n_candidates: int = 3
    response_tokens: int = 24
    labels_per_pair: int = 4  # independent noisy answers to each comparison
    flip_rate: float = 0.10
    n_experts: int = 2
    rank: int = 8
    min_count: int = 5  # occurrences of an active token in the training responses
    sharpness: bool = True  # each head has an s of its own, see `HeadExperts`
    beta: float = 0.1
    suffix: str | None = (
        None  # of what the gate reads, see ContextGate; by default that of SUFFIXES, "" for none
    )
    layer: int | None = LAYER  # whose state the gate reads, see ContextGate
    weight_scale: float = (
        0.03  # see ContextGate; each answer of a prompt counts: about 0.1 / sqrt(answers a prompt)
    )
    judges: JudgeConfig = field(default_factory=JudgeConfig)
    fit: FitConfig = DOMAIN_FIT
    seed: int = 0

    def __post_init__(self) -> None:
        if self.prompts not in ("titles", "reviews"):
            raise ValueError(f"prompts={self.prompts!r}: possible are 'titles' and 'reviews'")
        if self.prompts == "reviews" and not self.book_reviews:
            raise ValueError(
                "prompts='reviews' needs book_reviews: a file, a folder or a hub id with reviews of books"
            )
        if not 0 < self.gate_tokens <= self.prompt_tokens:
            raise ValueError(
                f"gate_tokens={self.gate_tokens}: expected 1 ... prompt_tokens={self.prompt_tokens}"
            )
        for template in self.templates or ("",):
            if "{title}" not in template or "{maker}" not in template:
                raise ValueError(
                    f"template {template!r}: expected a text with {{title}} and {{maker}}"
                )
        if not 0 <= self.flip_rate < 0.5:
            raise ValueError(
                f"flip_rate={self.flip_rate}: expected at least 0 and below 0.5 (0 is no noise)"
            )


class DomainPrompts:
    """Works or reviews of two domains, their prompts, and what a gate reads of these."""

    def __init__(self, config: TwoDomainsConfig, base: Base) -> None:
        self.config, self.base = config, base

    @cached_property
    def works(self) -> pd.DataFrame:
        """All works: title, maker, domain, `familiarity` to the base (nats) and its rank in the domain from 0."""
        config = self.config
        table = load_titles(config.titles or project_root() / "data" / "titles", config.n_titles)
        table["familiarity"] = familiarity(self.base, table)
        ranks = table.groupby("domain")["familiarity"].rank(method="first", ascending=False)
        return table.assign(rank=ranks.astype(int) - 1)

    @cached_property
    def items(self) -> pd.DataFrame:
        """The works that the base knows best, or reviews.

        Columns: domain, part (train, validation, test), and title and maker, or the text's beginning.
        """
        config = self.config
        if config.prompts == "titles":
            table = self.works[self.works["rank"] < config.n_titles].reset_index(drop=True)
        else:
            films = split_reviews(load_reviews(config.reviews), config=config.judges)["prompts"][
                "text"
            ]
            books = load_reviews(config.book_reviews)["text"]
            parts = []
            for domain, texts in zip(DOMAINS, (films, books), strict=True):
                order = np.random.default_rng(hash_seed(config.seed, domain)).permutation(
                    len(texts)
                )
                found = (first_words(self.base, texts[int(i)], config.prompt_tokens) for i in order)
                distinct = list(dict.fromkeys(text for text in found if text))[: config.n_prompts]
                if len(distinct) < config.n_prompts:
                    place = config.reviews if domain == "film" else config.book_reviews
                    raise MixDPOError(
                        f"{place}: {len(distinct)} distinct reviews of more than {config.prompt_tokens} tokens, "
                        f"n_prompts={config.n_prompts} wanted: give more reviews, or ask for fewer prompts"
                    )
                parts.append(pd.DataFrame({"text": distinct, "domain": domain}))
            table = pd.concat(parts, ignore_index=True)
        seeds = {domain: hash_seed(config.seed, "split", domain) for domain in DOMAINS}
        table["part"] = ""
        for domain in DOMAINS:
            rows = table.index[table["domain"] == domain]
            table.loc[rows, "part"] = split_items(len(rows), seeds[domain])
        return table

    @cached_property
    def prompts(self) -> pd.DataFrame:
        """One row a prompt with candidates: item, domain, part, prompt."""
        if self.config.prompts == "reviews":
            return self.items.rename(columns={"text": "prompt"}).assign(item=lambda t: t.index)
        return self._in_templates(self.items)

    def _in_templates(self, works: pd.DataFrame) -> pd.DataFrame:
        return pd.DataFrame(
            [
                {
                    "item": item,
                    "domain": work.domain,
                    "part": work.part,
                    "prompt": template.format(title=work.title, maker=work.maker),
                }
                for item, work in enumerate(works.itertuples())
                for template in self.config.templates
            ]
        )

    @cached_property
    def less_known(self) -> pd.DataFrame:
        """Prompts about works left out, at most n_titles / 5 of each domain: those that the base knows least."""
        least = (
            self.works.sort_values("rank", ascending=False)
            .groupby("domain")
            .head(self.config.n_titles // 5)
        )
        least = least[least["rank"] >= self.config.n_titles].sort_index()
        return self._in_templates(least.assign(part="less known"))

    @property
    def suffix(self) -> str:
        """What follows a prompt when the gate reads it: a question that both domains are asked alike."""
        return SUFFIXES[self.config.prompts] if self.config.suffix is None else self.config.suffix

    def gate_prompt(self, prompt: str) -> str:
        """What the gate reads of a prompt: all of it, or the first `gate_tokens` tokens of a review."""
        config = self.config
        if config.prompts == "titles" or config.gate_tokens == config.prompt_tokens:
            return prompt
        return first_words(self.base, prompt, config.gate_tokens) or prompt

    def states(self, prompts: pd.DataFrame) -> Float[Tensor, "prompts hidden"]:
        """What a gate reads of each of these prompts."""
        read = [self.gate_prompt(prompt) + self.suffix for prompt in prompts["prompt"]]
        return encode_prompts(self.base, read, self.config.layer)
