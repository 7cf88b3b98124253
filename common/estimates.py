"""Values with their uncertainty: means of samples, shares, differences, each with a 95 % interval.

Pure: numbers in, `Estimate` out. Intervals of a share are Wilson's (E. B. Wilson, 1927, "Probable inference,
the law of succession, and statistical inference"); those of a mean are Student's, on the scale of Fisher's z
where a number has bounds. Responses to one prompt are not independent, so they are averaged first and prompts
are what is counted. Nothing here rounds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from common.evidence import Z, share_interval

_SMALL_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}


@dataclass(frozen=True)
class Estimate:
    """A value and the ends of its 95 % interval, which are NaN without samples."""

    value: float
    low: float = math.nan
    high: float = math.nan
    count: int | None = None  # prompts or pairs that it is over

    @property
    def has_interval(self) -> bool:
        return not math.isnan(self.low)

    @property
    def is_clear(self) -> bool:
        """Of a change: whether its interval leaves out zero."""
        return self.low > 0 or self.high < 0


def of_share(share: float, count: int) -> Estimate:
    """A share of `count` independent trials, with Wilson's interval."""
    if count < 1 or not 0 <= share <= 1:
        return Estimate(share)
    return Estimate(share, *share_interval(share, count), count)


def of_mean(
    groups: Mapping[str, Sequence[float]], value: float | None = None, *, may_be_share: bool = False
) -> Estimate | None:
    """The mean over groups (values by prompt), with an interval; None without finite values.

    value: the mean that was logged, over all samples that were measured; the interval is laid around it when
    only some of them were kept. may_be_share: values that are all 0 or 1, once per prompt, are trials;
    without it a KL that is 0 everywhere would be taken for a share.
    """
    usable = {name: [v for v in values if math.isfinite(v)] for name, values in groups.items()}
    means = [fmean(values) for values in usable.values() if values]
    if not means:
        return None
    centre = fmean(means) if value is None else value
    trials = all(len(values) <= 1 for values in usable.values()) and set(means) <= {0.0, 1.0}
    if may_be_share and trials and 0 <= centre <= 1:
        return of_share(centre, len(means))
    return _student(means, centre)


def of_change(
    before: Mapping[str, Sequence[float]], after: Mapping[str, Sequence[float]], value: float | None = None
) -> Estimate | None:
    """The mean change of the same prompts, with an interval; None when the prompts are not the same.

    value: the change of the means that were logged, as in `of_mean`.
    """
    if not before or before.keys() != after.keys():
        return None
    pairs = [(fmean(before[name]), fmean(after[name])) for name in before]
    changes = [later - earlier for earlier, later in pairs if math.isfinite(later - earlier)]
    return _student(changes, fmean(changes) if value is None else value) if changes else None


def on_z_scale(estimate: Estimate, least: float, most: float) -> Estimate:
    """The estimate of a number that lies between `least` and `most`, with an interval that does so, too.

    The same interval is laid on Fisher's z = artanh of the number, scaled to -1 to 1, by the delta method: of
    a correlation his transformation (R. A. Fisher, 1915), of a share half its logit. None at the ends.
    """
    middle, scale = (least + most) / 2, (most - least) / 2
    at = (estimate.value - middle) / scale
    if not estimate.has_interval or not -1 < at < 1:
        return Estimate(estimate.value, count=estimate.count)
    half = (estimate.high - estimate.value) / scale / (1 - at * at)
    low, high = (middle + scale * math.tanh(math.atanh(at) + sign * half) for sign in (-1, 1))
    return Estimate(estimate.value, low, high, estimate.count)


def within_0_and_1(estimate: Estimate) -> Estimate:
    """The estimate of a share that is none of trials: on its logit's scale where the interval, Student's or a
    normal one, would leave 0 to 1."""
    leaves = estimate.has_interval and (estimate.low < 0 or estimate.high > 1) and 0 <= estimate.value <= 1
    return on_z_scale(estimate, 0, 1) if leaves else estimate


def student_quantile(freedom: int) -> float:
    """Two-sided 95 % quantile of Student's t, good to 0.2 % (a Cornish-Fisher expansion above 4 degrees)."""
    if freedom in _SMALL_T:
        return _SMALL_T[freedom]
    z, n = Z, freedom
    first = (z**3 + z) / (4 * n)
    second = (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n * n)
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    return z + first + second + third


def _student(values: Sequence[float], centre: float) -> Estimate:
    count = len(values)
    spread = stdev(values) if count > 1 else 0.0
    if count < 2 or spread == 0 or not math.isfinite(centre):
        return Estimate(centre, count=count)
    half = student_quantile(count - 1) * spread / math.sqrt(count)
    return Estimate(centre, centre - half, centre + half, count)
