"""Scales of plots: where a number lies between the ends, and which ticks stand there."""

import dataclasses
import math
from collections.abc import Iterable

RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclasses.dataclass(frozen=True)
class Scale:
    """From numbers to places: `low` is at 0, `high` at 1.

    Attributes:
      ticks: (number, text) each.
      log: logarithmic.
    """

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...] = ()
    log: bool = False

    def at(self, value: float) -> float:
        """Where `value` is; NaN where it has no place."""
        if not math.isfinite(value) or (self.log and value <= 0):
            return math.nan
        f = math.log if self.log else float
        return (f(value) - f(self.low)) / (f(self.high) - f(self.low))


def log_scale(values: Iterable[float]) -> Scale:
    """A logarithmic scale with room around the values that are positive and finite."""
    found = [v for v in values if math.isfinite(v) and v > 0] or [1.0]
    low, high = min(found), max(found)
    room = max((high / low) ** 0.06, 1.15)
    return log_between(low / room, high * room)


def log_between(low: float, high: float) -> Scale:
    """A logarithmic scale with these ends."""
    ticks = _log_ticks(low, high)
    plain = all(1e-3 <= v < 1e4 for v in ticks)
    return Scale(low, high, tuple((v, f"{v:.6g}" if plain else power_text(v)) for v in ticks), True)


def linear_scale(low: float, high: float, most: int = 5) -> Scale:
    """A linear scale with these ends and about `most` round ticks."""
    high = high if high > low else low + 1.0
    return Scale(low, high, tuple((v, f"{v:.6g}") for v in _round_numbers(low, high, most)))


def count_scale(values: Iterable[float], most: int = 7) -> Scale:
    """A linear scale of whole numbers, such as blocks, with a little room at the ends."""
    values = list(values) or [0]
    low, high = min(values), max(values)
    room = max(0.02 * (high - low), 0.5)
    step = max(1, round(_round_step(max(high - low, 1) / most)))
    ticks = range(math.ceil(low / step) * step, math.floor(high) + 1, step)
    return Scale(low - room, high + room, tuple((t, str(t)) for t in ticks))


def power_text(value: float) -> str:
    """A number with one digit as a power of ten: "10⁻⁴", "3·10⁵"; "1" itself."""
    power = math.floor(math.log10(value) + 1e-9)
    digit = f"{value / 10.0**power:.3g}"
    raised = f"10{str(power).translate(RAISED)}"
    if power == 0:
        return digit
    return raised if digit == "1" else f"{digit}·{raised}"


def _round_numbers(low: float, high: float, most: int) -> list[float]:
    step = _round_step((high - low) / most)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def _round_step(least: float) -> float:
    """The least of 1, 2, 5, 10, … times a power of ten that is not below `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= least * (1 - 1e-9))


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)

    def inside(digits: Iterable[int]) -> list[float]:
        return [v for p in powers for d in digits if low <= (v := d * 10.0**p) <= high]

    if len(decades := inside((1,))) >= 3:
        step = -(-len(decades) // 6)
        return [v for v in decades if round(math.log10(v)) % step == 0]
    choices = [inside(digits) for digits in ((1, 3), (1, 2, 5), range(1, 10))]
    return next((t for t in choices if len(t) >= 3), _round_numbers(low, high, 4))
