"""How does it look? Weights, texts coloured by who speaks, and a dial, as HTML that stands alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

from matplotlib.colors import to_hex
from torch import Tensor

from ..figures.circle import CYCLE
from ..figures.look import COLOURS, GREY
from .session import Session, degrees
from .speaking import Spoken

_MUTED = "color:#666"
_TEXT = "text-align:left;min-width:300px;max-width:460px"


def colours(session: Session) -> list[str]:
    """Of the experts, everywhere the same; around the circle they come back to where they began."""
    nodes, n = session.policy.experts.nodes, session.policy.n_experts
    if nodes is not None and session.on_circle:
        return [to_hex(CYCLE[degrees(angle)]) for angle in nodes.points.tolist()]
    return [COLOURS[k % len(COLOURS)] for k in range(n)]


def blend(shares: Sequence[float], of: Sequence[str], alpha: float = 0.45) -> str:
    """The colours in these shares, as a background on which dark text can be read.

    >>> blend([1.0, 0.0], ["#0072B2", "#D55E00"], 0.5)
    'rgba(0,114,178,0.50)'
    """
    parts = [
        [int(one[i : i + 2], 16) * share for i in (1, 3, 5)]
        for one, share in zip(of, shares, strict=True)
    ]
    red, green, blue = (round(sum(column)) for column in zip(*parts, strict=True))
    return f"rgba({red},{green},{blue},{alpha:.2f})"


def weights(session: Session) -> str:
    """One bar an expert: its weight for this visitor."""
    rows, own = "", colours(session)
    for k, w in enumerate(session.log_w().exp().tolist()):
        bar = f"background:{own[k]};width:{180 * w:.0f}px;height:12px"
        rows += (
            f"<tr><td>{escape(session.names[k])}</td><td><div style='{bar}'></div></td>"
            f"<td class='mixdpo-weight' style='text-align:right'>{w:.3f}</td></tr>"
        )
    answered = len(session.answers)
    told = f"{answered} comparison{'' if answered == 1 else 's'} answered"
    return f"<table class='mixdpo-weights'><caption style='{_MUTED}'>weights w, {told}</caption>{rows}</table>"


def tokens(spoken: Spoken, row: int, log_w: Tensor, names: Sequence[str], of: Sequence[str]) -> str:
    """The text of a voice, each token on the colour of who is thought to speak once it has been read."""
    spans = ""
    posterior = spoken.posterior(row, log_w)[1:].tolist()
    for piece, shares in zip(spoken.pieces[row], posterior, strict=True):
        said = ", ".join(f"{name} {share:.2f}" for name, share in zip(names, shares, strict=True))
        style = f"background:{blend(shares, of)};white-space:pre-wrap"
        spans += f"<span class='mixdpo-token' title='{escape(said, quote=True)}' style='{style}'>{escape(piece)}</span>"
    return spans


def unfolding(
    spoken: Spoken, row: int, log_w: Tensor, of: Sequence[str], width: int = 200, height: int = 34
) -> str:
    """The same as a strip: a column a token, from the weights before the first on, shares of the experts stacked."""
    posterior = spoken.posterior(row, log_w).tolist()
    step, bars = width / len(posterior), ""
    for t, shares in enumerate(posterior):
        top = 0.0
        for k, share in enumerate(shares):
            place = f"x='{t * step:.1f}' y='{top * height:.1f}' width='{step + 0.3:.1f}'"
            bars += f"<rect {place} height='{share * height:.1f}' fill='{of[k]}'/>"
            top += share
    label = "posterior of the experts, token by token"
    return f"<svg width='{width}' height='{height}' role='img' aria-label='{label}'>{bars}</svg>"


def texts(session: Session, spoken: Spoken, rewards: Any) -> str:
    """Every voice side by side: weight, text by token, posterior, rewards, distance from the base."""
    log_w, own = session.log_w(), colours(session)
    names = [escape(str(name)) for name in rewards.columns]
    head = ["voice", "text, coloured by who is thought to speak", "posterior", "nats from the base"]
    cells = "".join(f"<th style='text-align:left'>{one}</th>" for one in [*head, *names])
    rows = f"<tr>{cells}</tr>"
    for row, voice in enumerate(spoken.voices):
        weight = "" if voice < 0 else f"<br><small>w = {float(log_w[voice].exp()):.2f}</small>"
        mark = f"border-left:6px solid {GREY if voice < 0 else own[voice]};padding-left:6px"
        text = tokens(spoken, row, log_w, session.names, own)
        told = "".join(f"<td>{value:.2f}</td>" for value in rewards.iloc[row])
        rows += (
            f"<tr><td style='{mark};white-space:nowrap'>{escape(session.name(voice))}{weight}</td>"
            f"<td class='mixdpo-text' style='{_TEXT}'><i>{escape(spoken.prompt)}</i>{text}</td>"
            f"<td>{unfolding(spoken, row, log_w, own)}</td><td>{spoken.kl[row]:.1f}</td>{told}</tr>"
        )
    return f"<table class='mixdpo-voices' cellpadding='4' style='line-height:1.4'>{rows}</table>"


def question(session: Session, number: int | None) -> str:
    """The two answers of a comparison, A and B."""
    if number is None:
        return "<i>All comparisons are answered.</i>"
    c = session.comparisons[number]
    rows = "".join(
        f"<tr><th>{letter}</th><td style='text-align:left'><i>{escape(c.prompt)}</i>{escape(answer)}</td></tr>"
        for letter, answer in (("A", c.first), ("B", c.second))
    )
    return f"<b>Which do you like better?</b><table style='line-height:1.4'>{rows}</table>"


def dial(session: Session, size: int = 150) -> str:
    """The circle of tastes: a dot a node, as large as its weight; a line where the visitor's taste points."""
    nodes, log_w = session.policy.experts.nodes, session.log_w()
    if nodes is None or not session.on_circle:
        return ""
    centre, radius = size / 2, size / 2 - 14
    dots, own = "", colours(session)
    for k, (angle, w) in enumerate(zip(nodes.points.tolist(), log_w.exp().tolist(), strict=True)):
        x, y = centre + radius * math.cos(angle), centre - radius * math.sin(angle)
        dots += (
            f"<circle cx='{x:.1f}' cy='{y:.1f}' r='{2 + 10 * math.sqrt(w):.1f}' fill='{own[k]}'/>"
        )
    towards = float(nodes.taste(log_w[None]).direction[0])
    x, y = centre + radius * math.cos(towards), centre - radius * math.sin(towards)
    line = f"<line x1='{centre}' y1='{centre}' x2='{x:.1f}' y2='{y:.1f}' stroke='black' stroke-width='2'/>"
    label = f"taste at {degrees(towards)} degrees"
    return f"<svg width='{size}' height='{size}' role='img' aria-label='{label}'>{dots}{line}</svg><div>{label}</div>"
