"""Figures in words: bytes, shares, accuracies and durations, the same in tables, on pages, in plots and on a terminal."""

from __future__ import annotations

_BYTE_UNITS = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))


def byte_unit(largest: float) -> tuple[float, str]:
    """What to divide bytes by where the largest of them is `largest`, and the unit's name, for an axis."""
    return next(((size, unit) for unit, size in _BYTE_UNITS if largest >= size), (1.0, "bytes"))


def show_bytes(count: float, decimals: int | None = None) -> str:
    """Bytes in powers of 1,000: three digits (12.3 MB), or so many `decimals` (12.34 MB)."""
    size, unit = byte_unit(count)
    if size == 1:
        return f"{count:.0f} B"
    if decimals is not None:
        return f"{count / size:.{decimals}f} {unit}"
    return f"{count / size:.3g} {unit}" if count < 1e3 * size else f"{count / size:.0f} {unit}"


def show_duration(seconds: float) -> str:
    """Seconds, minutes or hours, to the precision of an estimate."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def show_percent(value: float, decimals: int = 1) -> str:
    """A fraction in per cent, with so many decimals."""
    return f"{100 * value:.{decimals}f} %"


def show_share(value: float) -> str:
    """Per cent, whole from 10 % on, two digits below."""
    return show_percent(value, 0) if value >= 0.0995 else f"{100 * value:.2g} %"


def show_floor_share(value: float, low: float | None = None, high: float | None = None) -> str:
    """A share of the bandwidth floor, and p10 and p90 of the runs' shares by the bandwidth beside each."""
    return show_share(value) + ("" if low is None or high is None else f" [{100 * low:.0f}, {100 * high:.0f}]")


def show_fraction(value: float) -> str:
    """A fraction that somebody chose, in per cent with the digits it was given: 0.025 is 2.5 %."""
    return f"{100 * value:g} %"


def show_perplexity(value: float) -> str:
    """Three decimals, fewer for a broken model's large ones."""
    return f"{value:.3f}" if value < 100 else f"{value:.4g}"


def show_kl(value: float, low: float | None = None, high: float | None = None) -> str:
    """Nats a token, three digits, with the 95 % interval."""
    return f"{value:.3g}" if low is None or high is None else f"{value:.3g} [{low:.3g}, {high:.3g}]"


def show_accuracy(value: float | str, low: float | None = None, high: float | None = None) -> str:
    """Per cent with the 95 % interval; words, such as "undefined", as they are."""
    if isinstance(value, str):
        return value
    interval = "" if low is None or high is None else f" [{100 * low:.1f}, {100 * high:.1f}]"
    return f"{show_percent(value)}{interval}"


def show_difference(value: float, p_value: float | None) -> str:
    """Percentage points and the p-value of the paired test, where there was one."""
    if p_value is None:
        return f"{100 * value:+.1f}"
    chance = "p < 0.001" if p_value < 0.001 else f"p = {p_value:.3f}"
    return f"{100 * value:+.1f} ({chance})"
