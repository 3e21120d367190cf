"""What can be turned and clicked? Widgets around a session; they compute nothing themselves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from html import escape
from typing import Any

import ipywidgets as widgets
from IPython.display import HTML

from ..policy.mixture import MixturePolicy
from ..store import MixDPOError
from . import page
from .session import TEMPERATURES, Session
from .speaking import Spoken


class Panel:
    """Controls and what they change. Weights follow every control at once, texts are written anew by prompt, length and
    "write again" alone: the same texts are shown under other weights, with another posterior.

    Parameters
    ----------
    session : the visitor. max_new_tokens : length of a text at the start.
    """

    def __init__(self, session: Session, max_new_tokens: int = 32) -> None:
        self.session, self.seed = session, 0
        self.spoken: Spoken | None = None
        self.rewards: Any = None
        self.number: int | None = None
        wide = widgets.Layout(width="95%")
        slider: dict[str, Any] = {
            "continuous_update": False,
            "style": {"description_width": "110px"},
        }
        self.prompt = widgets.Combobox(
            value=session.prompt,
            options=session.prompts,
            description="prompt",
            ensure_option=False,
            continuous_update=False,
            layout=wide,
        )
        self.length = widgets.IntSlider(max_new_tokens, 4, 64, 4, description="tokens", **slider)
        self.again = widgets.Button(description="write again", icon="refresh")
        low, high = TEMPERATURES
        self.temperature = widgets.FloatSlider(
            1.0, min=low, max=high, step=0.1, description="temperature", **slider
        )
        self.top_s = widgets.IntSlider(
            session.top_s, 1, session.policy.n_experts, description="top S experts", **slider
        )
        self.angle = widgets.IntSlider(0, 0, 350, 10, description="direction, °", **slider)
        self.metadata = {
            name: _control(name, kind, session.metadata[name], slider)
            for name, kind in session.columns.items()
        }
        self.choices = [widgets.Button(description=f"{letter} is better") for letter in "AB"]
        self.forget = widgets.Button(description="forget my answers", icon="undo")
        self.weights, self.asked, self.texts, self.dial, self.status = (
            widgets.HTML(layout=wide if i in (1, 2, 4) else widgets.Layout()) for i in range(5)
        )
        self._wire()
        self._guarded(self._begin)

    def _wire(self) -> None:
        self._on_value(self.prompt, self._new_prompt)
        self._on_value(self.length, lambda _: self._write())
        self._on_value(self.temperature, lambda new: self._set(temperature=new))
        self._on_value(self.top_s, lambda new: self._set(top_s=new))
        self._on_value(self.angle, lambda new: self._turn(math.radians(new)))
        for name, control in self.metadata.items():
            self._on_value(control, partial(self._know, name))
        for side, button in enumerate(self.choices):
            button.on_click(lambda _, side=side: self._guarded(partial(self._answer, side)))
        self.again.on_click(lambda _: self._guarded(self._write_again))
        self.forget.on_click(lambda _: self._guarded(self._forget))

    def _on_value(self, control: Any, do: Callable[[Any], None]) -> None:
        control.observe(lambda change: self._guarded(partial(do, change["new"])), "value")

    def _guarded(self, do: Callable[[], None]) -> None:
        """An error of a callback would be seen by nobody: it is shown where people look."""
        try:
            do()
            self.status.value = ""
        except (ValueError, MixDPOError) as error:
            self.status.value = f"<b style='color:#A50026'>{escape(str(error))}</b>"

    # ------------------------------------------------------------------------------------------------- what changes

    def _begin(self) -> None:
        self._write()
        self._ask()

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            setattr(self.session, name, value)
        self._show()

    def _know(self, name: str, value: Any) -> None:
        self.session.metadata[name] = value
        self._ask()

    def _turn(self, angle: float) -> None:
        self.session.angle = angle
        self._write()  # other nodes speak

    def _new_prompt(self, prompt: str) -> None:
        before, self.session.prompt = self.session.prompt, prompt
        try:
            self._write()
        except ValueError:
            self.session.prompt = before  # what is on the page stays true
            raise

    def _answer(self, side: int) -> None:
        if self.number is not None:
            self.session.answer(self.number, side)
        self._ask()

    def _forget(self) -> None:
        self.session.forget()
        self._ask()

    def _write_again(self) -> None:
        self.seed += 1
        self._write()

    def _write(self) -> None:
        self.spoken = self.session.write(self.length.value, self.seed)
        self.rewards = self.session.rewards(self.spoken)
        self._show()

    def _ask(self) -> None:
        self.number = self.session.question()
        self.asked.value = page.question(self.session, self.number)
        for button in self.choices:
            button.disabled = self.number is None
        self._show()

    def _show(self) -> None:
        self.weights.value = page.weights(self.session)
        self.dial.value = page.dial(self.session)
        if self.spoken is not None:
            self.texts.value = page.texts(self.session, self.spoken, self.rewards)

    # ------------------------------------------------------------------------------------------------- on the page

    @property
    def widget(self) -> widgets.VBox:
        """All of it."""
        s = self.session
        turned = [*self.metadata.values(), self.temperature, self.top_s]
        turned += [self.angle] if s.on_circle else []
        known: list[Any] = [widgets.VBox(turned), self.weights]
        known += [self.dial] if s.on_circle else []
        asks = [self.asked, widgets.HBox([*self.choices, self.forget])]
        return widgets.VBox(
            [
                self.prompt,
                widgets.HBox([self.length, self.again]),
                self.status,
                self.texts,
                widgets.HBox(known),
                *([] if s.of_prompt else asks),
            ]
        )

    def _repr_mimebundle_(self, **options: Any) -> Any:
        return self.widget._repr_mimebundle_(**options)

    def summary(self) -> Any:
        """What the page shows now as a table, see `Session.table`."""
        if self.spoken is None:
            raise ValueError("nothing was written: see the message of the panel")
        return self.session.table(self.spoken, self.rewards)

    def still(self) -> HTML:
        """What the page shows now, as a picture that needs no kernel."""
        parts = (self.texts, self.weights, self.dial)
        return HTML("".join(f"<div>{part.value}</div>" for part in parts if part.value))


def _control(name: str, kind: Any, value: Any, slider: Mapping[str, Any]) -> Any:
    """A list of categories, or three standard deviations around the mean of numbers."""
    if isinstance(kind, list):
        return widgets.Dropdown(options=kind, value=value, description=name, style=slider["style"])
    mean, spread = kind
    return widgets.FloatSlider(
        value, min=mean - 3 * spread, max=mean + 3 * spread, description=name, **slider
    )


def explore(policy: MixturePolicy, max_new_tokens: int = 32, **options: Any) -> Panel:
    """Widgets on a fitted mixture: type, turn and click, and see who speaks. In JupyterLab, as the last line of a cell.

    Parameters
    ----------
    max_new_tokens : length of a text at the start.
    options : of `Session`: names, prompts, comparisons, score.
    """
    return Panel(Session(policy, **options), max_new_tokens)
