"""Prompts of two domains: title files and every fault in them, the split, measures of the gate on known routings."""

import numpy as np
import pandas as pd
import pytest
import torch

from mixdpo_lib import store
from mixdpo_lib.evaluation import reliability
from mixdpo_lib.store import MixDPOError
from mixdpo_lib.study import domain_prompts, titles
from mixdpo_lib.study.routing import gate_accuracy, worst_routed
from mixdpo_lib.study.titles import load_titles, split_items
from mixdpo_lib.study.two_domains import TwoDomains, two_domains_config


@pytest.fixture
def folder(tmp_path):
    for domain, name in titles.TITLE_FILES.items():
        rows = "".join(f"{domain} {i},maker {i}\n" for i in range(4))
        (tmp_path / name).write_text("title,maker\n" + rows, encoding="utf-8")
    return tmp_path


def test_the_projects_own_titles():
    table = load_titles(store.project_root() / "data" / "titles", 180)
    assert table["domain"].value_counts().min() >= 180
    for _, part in table.groupby("domain"):
        assert not part.duplicated(["title", "maker"]).any()


def test_no_template_names_a_domain():
    for template in titles.TEMPLATES:
        words = template.lower()
        assert not any(
            word in words
            for word in ("film", "movie", "book", "novel", "read", "watch", "author", "direct")
        )


def test_titles_are_read_in_order(folder):
    table = load_titles(folder, 3)
    assert list(table.columns) == ["title", "maker", "domain"]
    assert table["title"].tolist() == [
        f"{domain} {i}" for domain in ("film", "book") for i in range(4)
    ]


def test_works_are_those_that_the_base_knows_best(tiny_base, folder):
    """log p(maker given the title) by the model's own logits; the domain has no part in it."""
    for domain, name in titles.TITLE_FILES.items():
        makers = ["good bad", "dull", "bright slow long", "quite"]
        rows = "".join(
            f"the {domain} {word},{maker}\n" for word, maker in zip("abcd", makers, strict=True)
        )
        (folder / name).write_text("title,maker\n" + rows, encoding="utf-8")
    study = TwoDomains(
        two_domains_config(titles=str(folder), n_titles=3, templates=("{title} by {maker} was",))
    )
    study.base = tiny_base
    for work in study.asked.works.itertuples():
        begin, end = (
            tiny_base.tokenizer(text)["input_ids"]
            for text in (f"{work.title}, one of the best-known works of", f" {work.maker}")
        )
        logits = tiny_base.model(input_ids=torch.tensor([begin + end])).logits[0].log_softmax(-1)
        own = logits[len(begin) - 1 : -1].gather(1, torch.tensor(end)[:, None]).sum()
        assert work.familiarity == pytest.approx(float(own.detach()), abs=1e-3)
    items = study.asked.items
    assert items["domain"].value_counts().to_dict() == {"film": 3, "book": 3}
    for domain, all_works in study.asked.works.groupby("domain"):
        least = all_works.loc[all_works["familiarity"].idxmin(), "title"]
        assert least not in items.loc[items["domain"] == domain, "title"].tolist()
    assert study.asked.less_known.empty  # n_titles / 5 is 0


def test_less_known_works_are_none_that_are_fitted(tiny_base):
    study = TwoDomains(two_domains_config(n_titles=10, templates=("{title} by {maker}",)))
    study.base = tiny_base
    study.asked.works = pd.DataFrame(
        [
            {"title": f"{domain} {i}", "maker": "m", "domain": domain, "rank": i}
            for domain in titles.DOMAINS
            for i in range(11)
        ]
    )
    assert study.asked.less_known["prompt"].tolist() == ["film 10 by m", "book 10 by m"]
    assert len(study.asked.items) == 20 and not set(study.asked.less_known["prompt"]) & set(
        study.prompts["prompt"]
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"title,maker\n",
            r"books.csv: 0 rows, n_titles=2 wanted: give more books, or ask for fewer",
        ),
        (b"", r"books.csv: not readable as a table"),
        (
            b"title,author\na,b\nc,d\n",
            r"books.csv: column 'maker' is missing; found \['title', 'author'\]",
        ),
        (b"title,maker\na,b\n ,d\n", r"books.csv: row 2, column 'title' is empty; expected text"),
        (
            "title,maker\nLes Misérables,b\nc,d\n".encode("latin-1"),
            r"books.csv: not UTF-8 \(byte 19\); save the file",
        ),
    ],
    ids=["empty domain", "empty file", "column", "field", "encoding"],
)
def test_a_bad_title_file_is_named(folder, content, message):
    (folder / "books.csv").write_bytes(content)
    with pytest.raises(MixDPOError, match=message):
        load_titles(folder, 2)


def test_an_absent_title_file_is_named(folder):
    (folder / "films.csv").unlink()
    with pytest.raises(
        MixDPOError, match=r"films.csv: not found; expected a file with columns title and maker"
    ):
        load_titles(folder, 2)


def test_a_domain_with_too_few_reviews_is_named(tiny_base, tmp_path, monkeypatch):
    """First words of real reviews: films from one file, books from another in which all texts but one are too short."""
    for name, texts in (
        ("films", ["one two three four five six"] * 2),
        ("books", ["a b c d e f g h", "short"]),
    ):
        rows = "".join(f"{text} {i},1\n" for i, text in enumerate(texts))
        (tmp_path / f"{name}.csv").write_text("text,label\n" + rows, encoding="utf-8")
    monkeypatch.setattr(
        domain_prompts, "split_reviews", lambda reviews, config: {"prompts": reviews}
    )
    places = {"reviews": str(tmp_path / "films.csv"), "book_reviews": str(tmp_path / "books.csv")}
    study = TwoDomains(
        two_domains_config(prompts="reviews", n_prompts=2, prompt_tokens=6, gate_tokens=6, **places)
    )
    study.base = tiny_base
    with pytest.raises(
        MixDPOError, match=r"\.csv: [01] distinct reviews of more than 6 tokens, n_prompts=2 wanted"
    ):
        _ = study.asked.items
    (tmp_path / "books.csv").write_bytes("text,label\nLes Mis\u00e9rables,1\n".encode("latin-1"))
    with pytest.raises(MixDPOError, match=r"books\.csv: .*UTF-8"):
        _ = study.asked.items


def test_the_split_has_its_shares_and_depends_on_the_seed():
    parts = split_items(180, 0)
    assert [parts.count(name) for name in ("train", "validation", "test")] == [126, 18, 36]
    assert parts == split_items(180, 0) != split_items(180, 1)


def test_choices_find_their_home():
    config = two_domains_config(n_titles=5, passes=1.5, training_reviews=700)
    assert (config.n_titles, config.fit.passes, config.judges.training_reviews) == (5, 1.5, 700)
    assert config.fit.start.kind == "clusters"
    for values, message in (
        ({"n_title": 5}, "n_title=5 is no choice of the study; possible are"),
        ({"prompts": "poems"}, "prompts='poems': possible are 'titles' and 'reviews'"),
        ({"prompts": "reviews"}, "prompts='reviews' needs book_reviews"),
        ({"gate_tokens": 40}, r"gate_tokens=40: expected 1 ... prompt_tokens=32"),
        (
            {"templates": ("about {title}",)},
            r"template 'about \{title\}': expected a text with \{title\} and \{maker\}",
        ),
        ({"flip_rate": 0.5}, "flip_rate=0.5: expected at least 0 and below 0.5"),
    ):
        with pytest.raises(ValueError, match=message):
            two_domains_config(**values)


def routing(films, books, method="moe_dpo"):
    """Two prompts an item; weights of the films' expert."""
    rows = [
        {
            "item": item,
            "domain": domain,
            "prompt": f"{domain} {item} {i}",
            "method": method,
            "seed": 0,
            "film": weight,
        }
        for domain, items, first in (("film", films, 0), ("book", books, 100))
        for item, weights in enumerate(items, first)
        for i, weight in enumerate(weights)
    ]
    return pd.DataFrame(rows)


def test_gate_accuracy_of_prompts_and_of_works():
    table = gate_accuracy(routing([(0.9, 0.4), (0.8, 0.7)], [(0.1, 0.2), (0.9, 0.8)]))
    mean = table[table["seed"] == "mean"].set_index("of")
    assert mean.loc["prompt", "accuracy"] == pytest.approx(5 / 8)
    assert mean.loc["item", "accuracy"] == pytest.approx(
        3 / 4
    )  # .9 outweighs .4: log odds are averaged
    assert (mean["low"] <= mean["accuracy"]).all() and (mean["accuracy"] <= mean["high"]).all()
    assert (mean["n"] == 4).all()


def test_a_gate_that_says_nothing_is_half_right():
    table = gate_accuracy(routing([(0.5, 0.5)], [(0.5, 0.5)]))
    assert (table["accuracy"] == 0.5).all()


def test_the_worst_routed_prompts_come_first():
    both = pd.concat(
        [routing([(0.9, 0.2)], [(0.3, 0.95)]), routing([(0.0, 0.0)], [(1.0, 1.0)], "supervised")]
    )
    worst = worst_routed(both, 2)
    assert worst["prompt"].tolist() == ["book 100 1", "film 0 1"]
    assert worst["weight_of_its_expert"].tolist() == pytest.approx([0.05, 0.2])


def test_a_calibrated_gate_lies_on_the_diagonal():
    rng = np.random.default_rng(0)
    p = rng.uniform(size=20_000)
    honest = reliability(p, rng.uniform(size=len(p)) < p)
    assert honest["calibration_error"].iloc[0] < 0.02
    assert (honest["low"] - 0.02 <= honest["probability"]).all()
    assert (honest["probability"] <= honest["high"] + 0.02).all()
    sure = reliability(np.full(1000, 0.99), np.arange(1000) % 2 == 0)
    assert sure["calibration_error"].iloc[0] == pytest.approx(0.49)
