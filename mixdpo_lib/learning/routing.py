"""Which experts are computed, and what keeps a gate from collapsing? Choices of sparse fits."""

from __future__ import annotations

from dataclasses import dataclass

from ..gates.contract import Gate


@dataclass(frozen=True)
class Routing:
    """Of gates that read; the defaults leave everything as it is.

    top_s : experts computed for a pair once tempering is over, those of largest weight; None: all of them.
    entropy : >= 0, weight of the entropy of single rows in the gate's loss: keeps routing undecided.
    balance : >= 0, weight of KL(mean weight || uniform) in it: keeps any expert from starving (Shazeer et al. 2017,
        arXiv 1701.06538, balance the load of sparse experts).

    >>> Routing(top_s=0)
    Traceback (most recent call last):
    ...
    ValueError: top_s=0: expected at least 1 expert, or None for all of them
    """

    top_s: int | None = None
    entropy: float | int = 0.0
    balance: float | int = 0.0

    def __post_init__(self) -> None:
        if self.top_s is not None and self.top_s < 1:
            raise ValueError(
                f"top_s={self.top_s}: expected at least 1 expert, or None for all of them"
            )
        for name in ("entropy", "balance"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(
                    f"{name}={getattr(self, name)}: expected 0 or above; 0 leaves the term out"
                )

    def check(self, gate: Gate) -> None:
        """Refuse what this gate cannot do: all of it acts on gates that read.

        Raises
        ------
        ValueError : an input-free gate; top_s out of range.
        """
        if self != Routing() and not gate.reads:
            raise ValueError(
                f"{self} with {type(gate).__name__}, which reads nothing: the same experts would be left out of every "
                "pair, and never learn; use a gate that reads, or no routing"
            )
        if self.top_s is not None and self.top_s > gate.n_experts:
            raise ValueError(
                f"top_s={self.top_s} with {gate.n_experts} experts: expected 1 ... {gate.n_experts}"
            )
