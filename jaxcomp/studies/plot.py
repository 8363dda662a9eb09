"""The picture of a study: a panel a number, a row a recipe, the model itself as a line."""

import math
import os
from typing import Any

from jaxcomp.report.style import COLOURS, INK, QUIET, picture
from jaxcomp.report.table import number_text
from jaxcomp.studies.results import Line, Number, spread
from jaxcomp.studies.table import value_text

FAILED = "#b0475c"
LOG_FROM = 3.0  # ratio of the largest to the smallest value from which an axis is logarithmic
FAR = 1e3  # what is so many times the model itself is drawn at the edge


def plot_study(
    lines: list[Line], numbers: list[Number], path: str | os.PathLike, title: str
) -> None:
    """Draws the lines as a PNG; the first is the model itself, with which the others compare."""
    itself, rows = lines[0], lines[1:]
    places = _places(rows)
    width = 1.2 + 0.075 * max(len(line.name) for line in rows) + 4.6 * len(numbers)
    with picture(path, width, 1.25 + 0.34 * (places[-1] + 1)) as figure:
        axes = figure.subplots(1, len(numbers), sharey=True, squeeze=False)[0]
        for axis, number in zip(axes, numbers, strict=True):
            _draw_number(axis, number, itself, rows, places)
        axes[0].set_yticks(places, [line.name for line in rows])
        axes[0].set_ylim(places[-1] + 0.7, -0.7)
        figure.suptitle(title, x=0.01, ha="left", size=12)


def _places(rows: list[Line]) -> list[float]:
    """Heights of the rows, with a gap between groups."""
    places, at = [], 0.0
    for i, line in enumerate(rows):
        at += (0.5 if line.group != rows[i - 1].group else 0) if i else 0
        places.append(at)
        at += 1
    return places


def _draw_number(
    axis: Any, number: Number, itself: Line, rows: list[Line], places: list[float]
) -> None:
    groups = list(dict.fromkeys(line.group for line in rows))
    (base,) = itself.values.get(number, (math.nan,))
    found = [v for line in (itself, *rows) for v in line.values.get(number, ())]
    finite = [v for v in found if not is_far(v, base)] or [1.0]
    log = min(finite) > 0 and max(finite) / min(finite) > LOG_FROM
    if log:
        axis.set_xscale("log")
    low, high = _limits(finite, log)
    axis.set_xlim(low, high)
    if math.isfinite(base):
        axis.axvline(base, color=QUIET, linewidth=1.2, linestyle=(0, (4, 3)))
        text = f"{itself.name} {value_text((base,))}"
        above = dict(xycoords=("data", "axes fraction"), textcoords="offset points", va="bottom")
        left = dict(
            ha="left" if base < (math.sqrt(low * high) if log else (low + high) / 2) else "right"
        )
        axis.annotate(text, (base, 1), (0, 2), color=QUIET, fontsize=8.5, **above, **left)
    for line, y in zip(rows, places, strict=True):
        colour = COLOURS[groups.index(line.group) % len(COLOURS)]
        _draw_line(axis, number, line, y, base, high, colour)
    axis.set_title(number.heading, pad=16)
    axis.grid(axis="x")
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)
    if log:
        plain_ticks(axis.xaxis)


def _draw_line(
    axis: Any, number: Number, line: Line, y: float, base: float, edge: float, colour: str
) -> None:
    """The runs as points, the mean on a bar from the model itself, its value beside the panel."""
    values = line.values.get(number, ())
    word = value_text(values) if values else ("failed" if line.failed else line.note or "–")
    beside = dict(xycoords=("axes fraction", "data"), textcoords="offset points", va="center")
    tone = INK if values else FAILED if line.failed else QUIET
    axis.annotate(word, (1, y), (10, 0), color=tone, fontsize=9, **beside)
    if not values:
        return
    mean, deviation = spread(values)
    far = is_far(mean, base)
    x = edge if far else mean
    if math.isfinite(base):
        axis.plot([base, x], [y, y], color=colour, alpha=0.3, linewidth=2.2, solid_capstyle="butt")
    if deviation is not None:
        inside = [v for v in values if not is_far(v, base)]
        runs = dict(markersize=5, alpha=0.45, markeredgewidth=0)
        axis.plot(inside, [y] * len(inside), "o", color=colour, **runs)
    if far:
        axis.plot([x], [y], ">", color=colour, markersize=7, clip_on=False, zorder=3)
    elif deviation is None:
        axis.plot([x], [y], "o", color=colour, markersize=7, zorder=3)
    else:
        axis.plot([x], [y], "|", color=colour, markersize=12, markeredgewidth=2, zorder=3)


def is_far(value: float, base: float) -> bool:
    """Whether a value is drawn at the edge; NaN and infinity are, too."""
    return not math.isfinite(value) or (math.isfinite(base) and value > FAR * base > 0)


def _limits(values: list[float], log: bool) -> tuple[float, float]:
    """The least and greatest value with some room."""
    low, high = min(values), max(values)
    if log:
        room = (high / low) ** 0.06
        return low / room, high * room
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return low - room, high + room


def plain_ticks(axis: Any) -> None:
    """Numbers such as 20, 50, 100 on a logarithmic x or y axis, as many as fit."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    steps = (1, 2, 3, 5) if high / low < 20 else (1, 3) if high / low < 3000 else (1,)
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter(FuncFormatter(lambda x, _: number_text(float(x))))
    axis.set_minor_formatter(NullFormatter())
