"""The smoke profile: every notebook executed by the runner, real reviews and model; assertions on its tables."""

import json
import math
import os
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from mixdpo_lib import store
from mixdpo_lib.runner import notebooks, results
from mixdpo_lib.runner import parameters as parameters_file

ROOT = store.project_root()
SEEDS, DESIGNS, GROUPS = {"0"}, {"default", "clean"}, {"sentiment", "informativeness", "grammar"}


def reproduce(**options):
    """All notebooks; on as many cores as a test has: one beside another worker, whom two threads would slow down."""
    cores = os.environ["OMP_NUM_THREADS"]
    words = ["reproduce", "--profile", "smoke", "--all", "--cores", cores]
    return subprocess.run([sys.executable, "-m", "mixdpo_lib.cli", *words], cwd=ROOT, **options)


@pytest.fixture(scope="module")
def smoke():
    done = reproduce(
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return ROOT / "runs" / "smoke"


def test_every_notebook_ran_and_its_record_holds(smoke):
    for name in notebooks.notebook_names():
        manifest = results.verify_manifest(smoke / name)
        assert manifest["notebook"] == name and manifest[
            "parameters"
        ] == parameters_file.resolve_parameters(name, "smoke")
        text = (smoke / name / "notebook.ipynb").read_text()
        assert '"output_type": "error"' not in text


def test_judges_are_reported(smoke):
    validity = results.load_table("smoke", "01_reviews_and_rewards", "validity")
    assert set(validity["reward"]) == GROUPS and validity["value"].between(0, 1).all()
    assert (validity["low"] <= validity["value"]).all() and (
        validity["value"] <= validity["high"]
    ).all()


def test_preferences_follow_the_design(smoke):
    counts = results.load_table("smoke", "02_preferences", "counts").set_index(["design", "part"])
    parameters = parameters_file.resolve_parameters("02_preferences", "smoke")["common"]
    for design in DESIGNS:
        assert (
            counts.loc[(design, "train"), "pairs"]
            == parameters["n_users"] * parameters["pairs_per_user"]
        )
        assert counts.loc[(design, "context"), "users"] == parameters["n_new_users"]
        assert counts.loc[(design, "test"), "flipped"] == 0
    assert counts.loc[("clean", "train"), "flipped"] == 0
    assert 0.02 < counts.loc[("default", "train"), "flipped"] < 0.25
    agreement = results.load_table("smoke", "02_preferences", "group_agreement")
    own = agreement[agreement["group_a"] == agreement["group_b"]]["agreement"]
    assert np.allclose(own, 1) and agreement["agreement"].between(0, 1).all()


def test_accuracy_has_every_method_group_and_seed(smoke):
    accuracy = results.load_table("smoke", "04_mix_dpo", "accuracy")
    assert set(accuracy["method"]) == {
        "dpo",
        "dpo_plain",
        "dpo_rank_3r",
        "mix_dpo",
        "mix_dpo_pair",
    }
    assert set(accuracy["group"]) == GROUPS | {"mean", "worst"} and set(
        accuracy["seed"].astype(str)
    ) == SEEDS | {"mean"}
    keys = ["design", "method", "routing", "users", "seed", "group"]
    assert not accuracy.duplicated(keys).any()
    wide = accuracy.pivot(index=keys[:-1], columns="group", values="accuracy")
    assert np.allclose(wide[sorted(GROUPS)].mean(axis=1), wide["mean"])
    assert np.allclose(wide[sorted(GROUPS)].min(axis=1), wide["worst"])
    assert set(accuracy[accuracy["method"] == "mix_dpo"]["routing"]) == {
        "prior",
        "own_pairs",
        "oracle",
    }
    single = results.load_table("smoke", "03_dpo", "accuracy")
    same = single.merge(accuracy, on=keys, suffixes=("_a", "_b"))
    assert len(same) == len(single) and np.allclose(same["accuracy_a"], same["accuracy_b"])


def test_training_lifts_the_bound_and_stops_for_a_reason(smoke):
    history = results.load_table("smoke", "04_mix_dpo", "history")
    for _, part in history.groupby(["design", "method", "seed"]):
        assert math.isclose(part["elbo"].iloc[0], -math.log(2), abs_tol=1e-5)
        assert part["elbo"].iloc[-1] > part["elbo"].iloc[0]
        assert part["bound_gap"].abs().max() < 1e-5
    reasons = set(results.verify_manifest(smoke / "04_mix_dpo")["stop_reasons"].values())
    assert reasons <= {"max_iter", "no_improvement"}


def test_responsibilities_are_probabilities(smoke):
    table = results.load_table("smoke", "04_mix_dpo", "responsibilities")
    totals = table.groupby(["design", "method", "seed", "user"])["responsibility"].sum()
    assert np.allclose(totals, 1, atol=1e-5)
    recovery = results.load_table("smoke", "04_mix_dpo", "recovery")
    assert (
        recovery[["nmi", "aligned_accuracy"]].stack().between(0, 1).all()
        and len(recovery) == len(SEEDS) * 4
    )


def test_two_domains_have_every_method_and_a_gate_between_chance_and_certainty(smoke):
    accuracy = results.load_table("smoke", "05_moe_dpo", "accuracy")
    assert set(accuracy["method"]) == {
        "dpo",
        "dpo_last_step",
        "dpo_rank_2r",
        "mix_dpo",
        "moe_dpo",
        "moe_dpo_top_1",
        "oracle",
    }
    assert (
        set(accuracy["group"]) == {"film", "book", "mean", "worst"}
        and accuracy["accuracy"].between(0, 1).all()
    )
    routing = results.load_table("smoke", "05_moe_dpo", "routing")
    assert (
        set(routing["method"]) == {"moe_dpo", "supervised"} and routing["film"].between(0, 1).all()
    )
    hits = (routing["film"] > 0.5) == (routing["domain"] == "film")
    gate = results.load_table("smoke", "05_moe_dpo", "gate_accuracy").query(
        "of == 'prompt' and seed == 'mean'"
    )
    shares = hits.groupby(routing["method"]).mean()
    assert gate.set_index("method")["accuracy"].to_dict() == pytest.approx(shares.to_dict())
    reliability = results.load_table("smoke", "05_moe_dpo", "reliability")
    assert (reliability.groupby("method")["n"].sum() == routing.groupby("method").size()).all()


def test_every_capacity_is_fitted_and_costs_what_it_trains(smoke):
    costs = results.load_table("smoke", "10_model_sizes", "costs").set_index(["capacity", "method"])
    capacities = ("head, rank 2", "adapters, 1 block, rank 8")
    assert set(costs.index) == {(c, m) for c in capacities for m in ("dpo", "mix_dpo")}
    assert (costs.loc["head, rank 2", "parameters_an_expert"] == 2 * 2 * 576 + 1).all()
    assert (costs.loc["adapters, 1 block, rank 8", "parameters_an_expert"] == 162_816 // 2).all()
    accuracy = results.load_table("smoke", "10_model_sizes", "accuracy")
    assert (
        set(accuracy["group"]) == GROUPS | {"mean", "worst"}
        and accuracy["accuracy"].between(0, 1).all()
    )


def test_every_family_learns_the_same_few_answers(smoke):
    table = results.load_table("smoke", "10_model_sizes", "families").set_index("family")
    sizes = {
        "HeadExperts": 2 * 8 * 576,
        "AdapterExperts": 162_816,
        "IndependentExperts": 134_515_008,
    }
    found = table["parameters_an_expert"].to_dict()
    assert 4 <= found.pop("TabularExperts") <= 8 and found == sizes
    assert (table["elbo"] > -np.log(2)).all() and (table["train_accuracy"] > 0.5).all()
    assert table["new_user_accuracy"].between(0, 1).all() and (table["steps"] == 1).all()


def test_real_people_get_a_verdict_and_what_is_absent_is_said(smoke):
    folder = smoke / "11_real_people"
    verdicts = results.load_table("smoke", "11_real_people", "verdicts")
    read = verdicts["people_of"].unique().tolist()
    assert read == ["arguments, read", "arguments, by name"] and set(verdicts["K"]) == {1, 2}
    mixtures = verdicts[verdicts["K"] > 1].set_index("people_of")
    assert (mixtures["low"] < mixtures["gain"]).all() and (
        mixtures["gain"] < mixtures["high"]
    ).all()
    assert (mixtures["pays"].astype(str) == (mixtures["low"] > 0).astype(str)).all()
    people = results.load_table("smoke", "11_real_people", "people")
    gains = people.groupby("people_of")["gain"].mean()
    assert gains.to_dict() == pytest.approx(mixtures["gain"].to_dict())
    text = (folder / "notebook.ipynb").read_text()
    assert "Left out: films are told only" in text and "Left out: surveys are told only" in text
    assert set(results.load_table("smoke", "11_real_people", "leanings")["people_of"]) == {read[0]}


def test_new_users_are_served_in_every_way_and_touch_no_expert(smoke):
    sizes = parameters_file.resolve_parameters("06_personalization", "smoke")["sizes"]
    served = results.load_table("smoke", "06_personalization", "served").set_index(
        ["served_by", "m"]
    )
    ways = [(way, m) for way in ("metadata", "pairs", "gate") for m in sizes]
    assert set(served.index) == {("dpo", 0), ("oracle", 0), *ways}
    gains = served["accuracy"] - served.loc[("dpo", 0), "accuracy"]
    assert np.allclose(gains, served["gain"])
    assert math.isclose(
        served.loc[("gate", 0), "accuracy"], served.loc[("metadata", 0), "accuracy"]
    )  # no offset yet
    added = results.load_table("smoke", "06_personalization", "added_users")
    n = parameters_file.resolve_parameters("06_personalization", "smoke")["n_added"]
    assert added["experts_untouched"].all() and (added["users"] == n).all()
    weights = results.load_table("smoke", "06_personalization", "group_weights")
    assert (weights.groupby(["known", "group"])["weight"].sum() < 1 + 1e-5).all()


def test_the_fields_methods_are_compared_on_the_same_pairs(smoke):
    own = parameters_file.resolve_parameters("12_baselines", "smoke")
    accuracy = results.load_table("smoke", "12_baselines", "accuracy")
    assert set(accuracy["method"]) == set(own["methods"])
    assert accuracy[accuracy["group"] == "mean"]["n_pairs"].nunique() == 1
    mix = results.load_table("smoke", "04_mix_dpo", "accuracy").query(
        "design == 'default' and routing == 'own_pairs' and users == 'seen'"
    )
    same = ["method", "group", "seed"]
    both = accuracy.astype({"seed": str}).merge(mix.astype({"seed": str}), on=same)
    assert len(both) == 2 * 5 and np.allclose(both["accuracy_x"], both["accuracy_y"])  # one fit
    differences = results.load_table("smoke", "12_baselines", "differences")
    assert (differences["p_holm"] >= differences["p"]).all() and len(differences) == 2 * 5
    volumes = results.load_table("smoke", "12_baselines", "hypervolumes").set_index("method")
    assert np.allclose(volumes.loc["dpo", "ratio"], 1) and (volumes["hypervolume"] > 0).all()
    points = results.load_table("smoke", "12_baselines", "points")
    assert len(points) == len(own["front_methods"]) * 4 * len(own["factors"])
    assert (points["kl"] >= 0).all() and set(points["n"]) == {own["n_texts"]}


def test_texts_come_with_kl_and_perplexity(smoke):
    summary = results.load_table("smoke", "04_mix_dpo", "text_summary")
    written = {"dpo", "dpo_plain", "base_sharpened", "dpo_sharpened"}
    written |= {f"expert_{g}" for g in GROUPS}
    assert set(summary["policy"]) == written | {"base"}
    assert np.allclose(summary[summary["policy"] == "dpo"]["gain_over_dpo"], 0)
    assert np.allclose(summary[summary["policy"] == "base"][["kl", "gain_over_base"]], 0)
    n = parameters_file.resolve_parameters("04_mix_dpo", "smoke")["n_texts"] * len(SEEDS)
    wanted = {p: n if p == "dpo" or "expert" in p else n // 2 for p in written}  # half of controls
    assert summary.set_index("policy")["n"].drop("base").to_dict() == wanted
    assert (summary["perplexity"] > 1).all()
    matched = results.load_table("smoke", "04_mix_dpo", "matched_scales")
    assert (matched.groupby(["policy", "seed"]).size() == 1).all() and len(matched) == len(
        written
    ) * len(SEEDS)
    sharpness = results.load_table("smoke", "04_mix_dpo", "sharpness")
    assert len(sharpness) == len(DESIGNS) * len(SEEDS) * (3 * 1 + 2 * 3)
    assert (sharpness[sharpness["method"] == "dpo_plain"]["sharpness"] == 0).all()
    learned = sharpness.query("design == 'default' and method == 'mix_dpo'")
    assert (learned["sharpness"].abs() > 0).all() and set(learned["served"]) == GROUPS


def test_values_of_the_headline_are_those_of_the_tables(smoke):
    values = results.load_values("smoke", "04_mix_dpo")
    gains = results.load_table("smoke", "04_mix_dpo", "gains").query(
        "method == 'mix_dpo' and seed == 'mean'"
    )
    row = gains.query("design == 'default' and group == 'worst'").iloc[0]
    assert math.isclose(values["accuracy_gain_worst"]["value"], row["gain"])
    assert values["accuracy_gain_worst"]["interval"] == pytest.approx([row["low"], row["high"]])
    assert {
        "accuracy_gain_mean",
        "user_nmi_median_clean",
        "reward_gain_sentiment",
        "reward_gain_grammar",
        "reward_over_base_grammar",
        "sharpness_grammar",
    } <= set(values)


def test_figures_have_a_sidecar_and_are_pictures(smoke):
    pictures = list((smoke / "04_mix_dpo" / "figures").glob("*.png"))
    assert len(pictures) >= 6
    for picture in pictures:
        record = store.read_json(picture.with_suffix(".json"))
        assert record["notebook"] == "04_mix_dpo" and re.fullmatch(
            "[0-9a-f]{64}", record["data_sha256"]
        )
        assert record["table"]
        assert (
            picture.stat().st_size > 5000
            and picture.with_suffix(".svg").exists()
            and picture.with_suffix(".pdf").exists()
        )


def test_a_second_run_does_nothing(smoke):
    before = {
        name: (smoke / name / "manifest.json").stat().st_mtime_ns
        for name in notebooks.notebook_names()
    }
    assert reproduce().returncode == 0
    assert before == {
        name: (smoke / name / "manifest.json").stat().st_mtime_ns
        for name in notebooks.notebook_names()
    }


def test_plain_papermill_runs_a_notebook_with_four_experts(smoke, tmp_path):
    """Without the runner: what the smoke profile cached is used, and the record lands where it is told to."""
    values = parameters_file.resolve_parameters("08_ablation_experts", "smoke")
    values |= {"n_experts_compared": [4], "common": {**values["common"], "passes": 0.5}}
    (tmp_path / "values.yaml").write_text(json.dumps(values))  # JSON is YAML
    book, out = ROOT / "notebooks" / "08_ablation_experts.ipynb", tmp_path / "out.ipynb"
    words = [book, out, "-f", tmp_path / "values.yaml", "-p", "n_experts_collapse", "4"]
    done = subprocess.run(
        [sys.executable, "-m", "papermill", *map(str, words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "MIXDPO_RUN_FOLDER": str(tmp_path / "run")},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    compared, collapse = (
        pd.read_csv(tmp_path / "run" / "tables" / f"{name}.csv") for name in ("experts", "collapse")
    )
    assert set(compared["K"]) == {4}
    for table in (compared, collapse):  # 4 is the cell's own value too, and the profile's is 3
        assert 3.5 < table["used experts"].max() <= 4.0001
    assert results.verify_manifest(tmp_path / "run")["parameters"]["n_experts_collapse"] == 4
