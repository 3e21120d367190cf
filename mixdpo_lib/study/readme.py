"""Which numbers stand in README, on the page of results and in the table of claims? Those of the reference results."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..store import MixDPOError


def _quoted(values: Mapping[str, Mapping[str, Any]], name: str, digits: int) -> str:
    if name not in values:
        return "–"
    value = values[name]
    difference = "gain" in name or "over_base" in name
    signed = f"{value['value']:+.{digits}f}" if difference else f"{value['value']:.{digits}f}"
    return (
        signed
        if not value["interval"]
        else signed + " [{:.{d}f}, {:.{d}f}]".format(*value["interval"], d=digits)
    )


def readme_blocks(values: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The tables of README and docs/results.md, from the values of the reference run: block name and its lines."""

    def q(name: str, digits: int = 3) -> str:
        return _quoted(values, name, digits)

    results = [
        "| Mix-DPO minus DPO, test prompts | random pairs, noisy labels | clean pairs |",
        "|---|---|---|",
    ]
    for label, name in (
        ("accuracy, mean of the groups", "accuracy_gain_mean"),
        ("accuracy, worst group", "accuracy_gain_worst"),
    ):
        results.append(f"| {label} | {q(name)} | {q(name + '_clean')} |")
    results.append(
        f"| hidden groups found (NMI, median of seeds) | {q('user_nmi_median', 2)} | "
        f"{q('user_nmi_median_clean', 2)} |"
    )
    results += [
        "",
        "| texts at matched KL, evaluation judges | gain over DPO | over the base | KL, nats (DPO) | perplexity (DPO) |",
        "|---|---|---|---|---|",
    ]
    for reward in ("sentiment", "informativeness", "grammar"):
        results.append(
            f"| {reward} of the expert that serves it | {q('reward_gain_' + reward)} | {q('reward_over_base_' + reward)} | "
            f"{q('kl_expert_' + reward, 1)} ({q('kl_dpo', 1)}) | "
            f"{q('perplexity_expert_' + reward, 0)} ({q('perplexity_dpo', 0)}) |"
        )
    results += [
        "",
        "Rewards are in units of the evaluation judge. "
        "Brackets: 95 % intervals over prompts, all seeds together; for NMI the lowest and highest seed.",
    ]
    further = [
        "| accuracy on test prompts | gain over DPO |",
        "|---|---|",
        f"| new users by metadata alone | {q('gain_metadata_0_pairs')} |",
        f"| new users by 16 comparisons of their own | {q('gain_pairs_16_pairs')} |",
        *(
            f"| {domain}s, MoE-DPO by the likelier expert | {q('moe_top_1_gain_over_dpo_last_step_' + domain)} over DPO"
            f" after its last step; {q('moe_top_1_gain_over_dpo_' + domain)} over its best validation step, the base |"
            for domain in ("book", "film")
        ),
        "",
        f"Against experts that were told the domain, MoE-DPO by the weights of its gate: {q('moe_gain_over_oracle_mean')}; "
        f"by the likelier expert: {q('moe_top_1_gain_over_oracle_mean')} "
        f"(books {q('moe_top_1_gain_over_oracle_book')}, films {q('moe_top_1_gain_over_oracle_film')}). "
        "Share of held-out prompts that the gate routes right: "
        f"{q('gate_accuracy_moe_dpo_prompt')}; about works that the base hardly knows: "
        f"{q('gate_accuracy_moe_dpo_less_known')}.",
    ]
    downloads = {"smoke": "packages, 13 + 93 MB of data", "default": "the same"}
    costs = ["| command | minutes on 2 cores | downloads |", "|---|---|---|"]
    costs += [
        f"| `make reproduce{'' if one == 'default' else ' PROFILE=' + one}` | {q('minutes_' + one, 0)} | "
        f"{downloads[one]} |"
        for one in ("smoke", "default")
    ]
    costs.append(
        "| `make reproduce-all`: ablations, further studies, theory and beyond | "
        f"{q('minutes_further', 0)} more | nothing more |"
    )
    return {"results": "\n".join(results), "further": "\n".join(further), "costs": "\n".join(costs)}


def with_results(page: str, values: Mapping[str, Mapping[str, Any]]) -> str:
    """A page with its blocks between `<!-- name ... -->` and `<!-- end of name -->` written anew.

    Raises
    ------
    MixDPOError : no block of `readme_blocks` on the page, or one twice.
    """
    known, written = readme_blocks(values), 0
    for name, text in known.items():
        pattern = re.compile(rf"(<!-- {name}\b[^\n]*-->\n).*?(<!-- end of {name} -->)", re.DOTALL)
        found = list(pattern.finditer(page))
        if len(found) > 1:
            raise MixDPOError(f"found {len(found)} blocks named {name} on one page, expected one")
        for block in found:
            page = f"{page[: block.start()]}{block[1]}{text}\n{block[2]}{page[block.end() :]}"
            written += 1
    if not written:
        raise MixDPOError(
            f"found none of the blocks {', '.join(known)} on a page, expected one or more"
        )
    return page


def with_quoted(page: str, values: Mapping[str, Mapping[str, Any]]) -> str:
    """A page with the number after each `name` of a value in backticks written anew, with its interval.

    >>> with_quoted("gain: `accuracy_gain_mean` +0.1 [0.0, 0.2]", {"accuracy_gain_mean": {"value": 0.3, "interval": None}})
    'gain: `accuracy_gain_mean` +0.300'
    """
    number = r"[+-]?\d+\.\d+(?: \[[^\]]*\])?"

    def anew(found: re.Match[str]) -> str:
        name = found[1]
        return f"`{name}` {_quoted(values, name, 3)}" if name in values else found[0]

    return re.sub(rf"`([\w.-]+)` {number}", anew, page)
