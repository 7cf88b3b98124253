"""How much a share of few trials says: intervals, a test, and the words for both. Pure, and without torch.

Trials are taken to be independent. Ties, which count half, make a share of no whole number of trials.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from common.stage import Step

Z = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""

SURPRISE = 0.01
"""How improbable it must be that so many pairs are in the wrong order by chance, before their columns are
suspected: that takes seven of them."""


def share_interval(share: float, count: int) -> tuple[float, float]:
    """Between what a share of `count` trials (1 or more) lies with 95 % confidence (E. B. Wilson, 1927)."""
    shrink = 1 + Z * Z / count
    middle = (share + Z * Z / (2 * count)) / shrink
    half = Z * math.sqrt(share * (1 - share) / count + Z * Z / (4 * count * count)) / shrink
    # at 0 and 1 the exact bound is the share itself; rounding would put it a hair inside
    return min(middle - half, share), max(middle + half, share)


def chance_of_so_few(share: float, count: int) -> float:
    """The probability that a fair coin shows heads in this share of `count` throws, or in fewer."""
    heads = math.floor(share * count + 1e-6)
    if count > 1_000:  # normal, with the usual correction of half a throw
        return 0.5 * math.erfc((count / 2 - heads - 0.5) / math.sqrt(count / 2))
    return sum(math.comb(count, number) for number in range(heads + 1)) / 2**count


def share_in_words(share: float, count: int, what: str) -> str:
    """`91.7% of 12 pairs (95% interval 64.6% to 98.5%)`; what: the trials, in the plural."""
    if count < 1:
        return f"{share:.1%} of {what}"
    low, high = share_interval(share, count)
    return f"{share:.1%} of {count:,} {what} (95% interval {low:.1%} to {high:.1%})"


def swapped_warning(
    metrics: Mapping[str, float], accuracy: str, margin: str, *, step: Step, pairs: int
) -> str | None:
    """What to say when answers that people rejected ended above those they chose, and hardly by chance.

    Held-out pairs show it when their columns, or the others', are swapped. Where all rows are swapped alike,
    the model learns that order and nothing can show it. accuracy, margin: names of the metrics that hold the
    share of the pairs in the right order and the mean difference of rewards; pairs: how many those are of.
    """
    share, mean = metrics.get(accuracy, 1.0), metrics.get(margin, 0.0)
    if mean >= 0 or chance_of_so_few(share, pairs) >= SURPRISE:
        return None
    key = f"{step.value}.data"
    return (
        f"warning: at the end the rejected answers have higher rewards than the chosen ones ({margin} "
        f"{mean:.3g}; {share:.1%} of {pairs:,} pairs are in the right order): are the columns chosen and "
        f"rejected swapped, in {key}.eval_path or in one of {key}.sources?"
    )
