"""How much a share of few trials says: intervals, a test, and the words for both. Pure, and without torch.

Trials are taken to be independent. Ties, which count half, make a share of no whole number of trials.
"""

from __future__ import annotations

import math

Z = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""


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
