"""How numbers, times and names are written: values in, short text out."""

from __future__ import annotations

import math
from datetime import UTC, datetime

MINUS = "\N{MINUS SIGN}"


def figure(value: float, *, signed: bool = False) -> str:
    """Three significant figures, thousands apart, powers of ten for what is very small or large."""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else f"{MINUS if value < 0 else ''}∞"
    size = abs(value)
    if size == 0:
        text = "0"
    elif size < 0.0009995 or size >= 999_500_000:
        text = power_of_ten(size, 2)
    elif size >= 999.5:
        text = f"{size:,.0f}"
    else:
        # at a rounding edge (0.9999) the next power of ten has one decimal less
        decimals = max(0, 2 - math.floor(math.log10(size * 1.0005)))
        text = f"{size:.{decimals}f}"
    sign = MINUS if value < 0 else "+" if signed and size > 0 else ""
    return sign + text


def decimals_for(size: float, figures: int) -> int | None:
    """Decimals that show so many figures of numbers up to `size`; None for what needs a power of ten."""
    if not 0.001 <= size < 1e9:
        return None
    return max(0, figures - 1 - math.floor(math.log10(size)))


def fixed(value: float, decimals: int | None, *, signed: bool = False) -> str:
    """A number with this many decimals; `figure` without them. What rounds to zero has no sign."""
    if decimals is None or not math.isfinite(value):
        return figure(value, signed=signed)
    if value == 0:
        return "0"
    text = f"{abs(value):,.{decimals}f}"
    is_zero = float(text.replace(",", "")) == 0
    sign = "" if is_zero else MINUS if value < 0 else "+" if signed else ""
    return sign + text


def brief(value: float) -> str:
    """As `figure`, without zeros that say nothing: 0.4, 1, 12.5."""
    text = figure(value)
    return text.rstrip("0").rstrip(".") if "." in text and "e" not in text else text


def share(value: float) -> str:
    """A share in percent; never rounded to all or nothing when it is not."""
    if not math.isfinite(value):
        return figure(value)
    sign, size = MINUS if value < 0 else "", abs(value)
    text = f"{size * 100:.1f}"
    if float(text) in (0, 100) and size not in (0, 1):
        text = f"{size * 100:.3f}"
    text = text.rstrip("0").rstrip(".") if float(text) in (0, 100) else text
    return f"{sign}{text}%"


def points(value: float) -> str:
    """A difference of shares, in percentage points, with its sign."""
    if not math.isfinite(value):
        return figure(value)
    text = f"{abs(value) * 100:.1f}"
    if float(text) == 0:
        return "0"
    return f"{MINUS if value < 0 else '+'}{text}"


def power_of_ten(size: float, decimals: int) -> str:
    """3e-4, as a learning rate is written in a configuration."""
    mantissa, exponent = f"{size:.{decimals}e}".split("e")
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    return f"{mantissa}e{int(exponent)}"


def tick(value: float, step: float) -> str:
    """An axis label: as many decimals as the distance between ticks needs."""
    size = abs(value)
    sign = MINUS if value < 0 else ""
    if size < step / 1e6:
        return "0"
    if step < 0.00099 or size >= 1e7:
        return sign + power_of_ten(size, 2)
    if step >= 1000:
        return f"{sign}{size / 1000:g}k"
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    if decimals < 6 and round(step, decimals) != round(step, 9):  # 0.25 needs one more than 0.2
        decimals += 1
    return f"{sign}{size:,.{decimals}f}"


def count(value: int) -> str:
    return f"{value:,}"


def moment(iso: str) -> str:
    """2026-11-21 13:18:42 UTC; what is no time stays as it is."""
    at = _parsed(iso)
    return iso if at is None else at.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def duration(recorded: str) -> str | None:
    """Seconds as 1 h 02 min, 3 min 20 s, 42 s; None for what is no number of them."""
    if not recorded.isdecimal() or len(recorded) > 9:
        return None
    minutes, seconds = divmod(int(recorded), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


def _parsed(iso: str) -> datetime | None:
    try:
        at = datetime.fromisoformat(iso)
    except ValueError:
        return None
    return at if at.tzinfo is not None else at.replace(tzinfo=UTC)
