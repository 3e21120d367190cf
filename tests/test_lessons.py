"""The pictures of the theory notebooks that can be pulled: what they say is right, with and without sliders."""

import matplotlib
import pytest
import torch
from matplotlib import pyplot as plt

from mixdpo_lib import lessons

PICTURES = {
    "two_quantities": {"w": 0.5, "first": 3.0, "second": 3.0},
    "cycle": {"K": 3},
    "em_steps": {"step": 23, "T": 1.0, "seed": 0},
    "relaxation": {"log_tau": 0.0, "log_q": -0.1, "K": 3},
    "who_answered": {"pairs_per_user": 8, "noise": 1.0, "seed": 0},
}


@pytest.fixture(autouse=True)
def closed():
    with matplotlib.rc_context():
        yield
        plt.close("all")


@pytest.mark.parametrize("name", PICTURES)
def test_text_is_large_enough(name):
    getattr(lessons, name)(**PICTURES[name])
    fig = plt.gcf()
    fig.canvas.draw()
    texts = [text for text in fig.findobj(matplotlib.text.Text) if text.get_text().strip()]
    assert len(texts) > 4 and min(text.get_fontsize() for text in texts) >= 7


def test_two_quantities_say_a_half_and_something_else():
    lessons.two_quantities(0.5, 3.0, 3.0)
    assert plt.gca().get_xlabel().endswith("(at the line: 0.50 and 0.91)")


def test_three_experts_say_the_cycle_and_one_does_not():
    lessons.cycle(1)
    lessons.cycle(3)
    one, three = (lessons._cycle(k)[0] for k in (1, 3))
    assert one == pytest.approx([0.5] * 3, abs=0.01)
    assert three == pytest.approx([2 / 3] * 3, abs=0.02)


def test_the_pulled_bound_never_passes_the_likelihood_and_touches_it():
    table, path = lessons.em_path(1.0, 0)
    wide = table.pivot(index="step", columns="quantity", values="nats per pair")
    gap = wide["log-likelihood"] - wide["bound"]
    assert (gap > -1e-9).all() and gap[1::2].max() < 1e-9 and gap[0] > 1e-3
    assert len(path) == 24 and torch.allclose(path[-1].exp().sum(1), torch.ones(60).double())
    warm = lessons.em_path(8.0, 0)[1]
    assert warm[1].exp().amax(1).mean() < path[1].exp().amax(1).mean()  # held soft at first


def test_more_pairs_and_less_noise_reveal_the_groups():
    def nmi(pairs, noise):
        lessons.who_answered(pairs, noise, 0)
        return float(plt.gca().get_title(loc="left").split("groups ")[1].split(";")[0])

    assert nmi(1, 1.0) < 0.2 < 0.7 < nmi(8, 1.0) and nmi(8, 4.0) < 0.3


def test_without_anybody_to_pull_the_first_picture_is_drawn(monkeypatch):
    monkeypatch.setenv("MIXDPO_PROFILE", "smoke")
    drawn = []
    assert lessons.sliders(lambda **values: drawn.append(values), K=(1, 5, 1, 3)) is None
    assert drawn == [{"K": 3}]
    with pytest.raises(ValueError, match=r"K=\(1, 5, 1, 9\): expected .* first between"):
        lessons.sliders(print, K=(1, 5, 1, 9))


def test_a_pulled_slider_draws_anew(monkeypatch):
    monkeypatch.delenv("MIXDPO_PROFILE", raising=False)
    drawn = []
    box = lessons.sliders(
        lambda **values: drawn.append(values), K=(1, 5, 1, 3), w=(0.0, 1.0, 0.1, 0.5)
    )
    number, weight, _ = box.children
    assert (type(number).__name__, type(weight).__name__) == ("IntSlider", "FloatSlider")
    number.value = 4
    assert drawn == [{"K": 3, "w": 0.5}, {"K": 4, "w": 0.5}]
