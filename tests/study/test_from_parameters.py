"""A study made of a notebook's parameters: what it takes, leaves to the notebook, refuses."""

import json

import pytest

from mixdpo_lib.runner import notebooks, parameters
from mixdpo_lib.study.baselines import Baselines
from mixdpo_lib.study.review_users import ReviewUsers, review_users_config
from mixdpo_lib.study.two_domains import TwoDomains, two_domains_config

STUDIES = {"ReviewUsers": ReviewUsers, "TwoDomains": TwoDomains, "Baselines": Baselines}
SHARED = {"rank": 4, "passes": 1.0, "training_reviews": 800}


def test_own_shared_and_further_choices_in_that_order():
    own = {
        "designs": ["clean"],
        "n_experts": 2,
        "n_texts": 12,
        "seeds": [0],
        "profile": "smoke",
        "common": SHARED,
    }
    config = ReviewUsers.from_parameters(own).config
    assert config == review_users_config(["clean"], n_experts=2, **SHARED)
    assert ReviewUsers.from_parameters(own, n_experts=5, rank=1).config == review_users_config(
        ["clean"], n_experts=5, **(SHARED | {"rank": 1})
    )
    assert ReviewUsers.from_parameters({"design": "clean"}).config.designs == ("clean",)
    assert ReviewUsers.from_parameters({}).config == review_users_config()
    domains = {"n_titles": 16, "n_shown": 2, "first_tokens": [4, 8], "common": SHARED}
    assert TwoDomains.from_parameters(domains, gate_tokens=4).config == two_domains_config(
        n_titles=16, gate_tokens=4, **SHARED
    )


@pytest.mark.parametrize("study", STUDIES.values())
def test_only_what_is_the_notebooks_own_may_be_left_out(study):
    with pytest.raises(ValueError, match="n_shown=3 is no choice"):
        study.from_parameters({"common": {"n_shown": 3}})
    with pytest.raises(ValueError, match="n_shown=3 is no choice"):
        study.from_parameters({}, n_shown=3)


@pytest.mark.parametrize("profile", parameters.profile_names())
@pytest.mark.parametrize("name", notebooks.listed_notebooks())
def test_all_that_a_notebook_shares_is_a_choice_of_its_study(name, profile):
    code = "".join(
        "".join(cell["source"])
        for cell in json.loads(notebooks.notebook_path(name).read_text())["cells"]
    )
    values = parameters.resolve_parameters(name, profile)
    made = [
        study
        for kind, study in STUDIES.items()
        if f" {kind}.from_parameters(" in code or f".{kind}.from_" in code
    ]
    assert bool(made) == (
        "common" in values and name != "01_reviews_and_rewards"
    )  # which makes judges alone
    for study in made:
        config = study.from_parameters(values).config
        assert config.fit.passes == values["common"].get("passes", config.fit.passes)
        assert config.judges.training_reviews == values["common"]["training_reviews"]
