"""How often is an answer given at random? The lapse rate, given or learned, as state of a mixture."""

from __future__ import annotations

from numbers import Real

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..elbo import LAPSE_START, check_lapse, lapse_m_step, with_lapse


class Lapses(nn.Module):
    """The lapse rate e. A learned one is a buffer, `lapse_rate`, which checkpoints and saved mixtures hold.

    Parameters
    ----------
    lapse : e in [0, 1); or "learn": from .02 on, moved by `move_lapse`.

    Raises
    ------
    ValueError : no rate, and not "learn".

    >>> lapses = Lapses("learn")
    >>> lapses.move_lapse(torch.tensor([[0.1]]).log(), torch.zeros(1, 1), torch.tensor([0]))
    >>> round(lapses.lapse, 4)   # (.01 / .108 + 1) / (1 + 50)
    0.0214
    """

    lapse_rate: Tensor

    def __init__(self, lapse: float | int | str = 0.0) -> None:
        super().__init__()
        self.given_lapse: float | str
        if isinstance(lapse, Real):
            check_lapse(lapse)
            self.given_lapse = float(lapse)
        elif lapse == "learn":
            self.given_lapse = lapse
            self.register_buffer("lapse_rate", torch.tensor(LAPSE_START))
        else:
            raise ValueError(
                f'lapse={lapse!r}: expected a rate of at least 0 and below 1, or "learn"'
            )

    @property
    def lapse(self) -> float:
        """The lapse rate e as it is now; `given_lapse` says whether it was given or is learned ("learn")."""
        return float(self._rate())

    def _rate(self) -> float | Tensor:
        return self.lapse_rate if isinstance(self.given_lapse, str) else self.given_lapse

    def with_lapse(
        self, log_sigma: Float[Tensor, "pairs experts"]
    ) -> Float[Tensor, "pairs experts"]:
        """Log-likelihood of answers of which a share e are lapses, nats; see `elbo.with_lapse`. Gradients flow."""
        return with_lapse(log_sigma, self._rate())

    @torch.no_grad()
    def move_lapse(
        self,
        log_sigma: Float[Tensor, "pairs experts"],
        log_q: Float[Tensor, "units experts"],
        unit: Int[Tensor, "pairs"],
        share: float = 1.0,
    ) -> None:
        """Move a learned lapse rate `share` of the way, in (0, 1], to its M-step; see `elbo.lapse_m_step`.

        A rate that was given stays as it is. log_sigma, unit : of all training pairs. log_q : of their units, nats.
        """
        if self.given_lapse == "learn":
            mode = lapse_m_step(log_sigma, log_q, self.lapse_rate, unit)
            self.lapse_rate.lerp_(mode.to(self.lapse_rate), share)
