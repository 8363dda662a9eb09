"""The second picture of a study: what was found along a label that is a number."""

import math
import os
from typing import Any

from jaxcomp.report.style import COLOURS, QUIET, label_ends, picture
from jaxcomp.studies.plot import LOG_FROM, is_far, plain_ticks
from jaxcomp.studies.results import Line, Number, spread
from jaxcomp.studies.table import value_text

MARKS = {"o": "●", "s": "■", "^": "▲", "D": "◆"}  # change when colours come round
NAME = 0.2  # inches of height that the name of a curve takes


def plot_curves(
    lines: list[Line], numbers: list[Number], along: str, path: str | os.PathLike, title: str
) -> None:
    """Draws a panel a number as a PNG; a curve is the lines of one group, in order of the label.

    Args:
      lines: the first is the model itself, a dashed line; those without the label are left out.
      along: the label.
    """
    itself, rows = lines[0], [line for line in lines[1:] if along in line.labels]
    groups = list(dict.fromkeys(line.group for line in rows))
    with picture(path, 4.9 * len(numbers), max(4.2, 1.2 + NAME * len(groups))) as figure:
        axes = figure.subplots(1, len(numbers), squeeze=False)[0]
        for axis, number in zip(axes, numbers, strict=True):
            curves = {group: curve(rows, group, number, along) for group in groups}
            _draw(axis, number, itself, curves)
            axis.set_xlabel(along)
        figure.suptitle(title, x=0.01, ha="left", size=12)


def curve(rows: list[Line], group: str, number: Number, along: str) -> list[tuple[float, float]]:
    """The points of a group; of several lines at one place each is a point."""
    found = [line for line in rows if line.group == group and line.values.get(number)]
    return sorted((float(line.labels[along]), spread(line.values[number])[0]) for line in found)


def near_and_far(
    points: list[tuple[float, float]], base: float
) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """Those that are drawn where they are, and those that an arrow at the upper edge stands for."""
    far = [p for p in points if is_far(p[1], base)]
    return [p for p in points if not is_far(p[1], base)], far


def _draw(
    axis: Any, number: Number, itself: Line, curves: dict[str, list[tuple[float, float]]]
) -> None:
    (base,) = itself.values.get(number, (math.nan,))
    split = {group: near_and_far(points, base) for group, points in curves.items()}
    shown, beyond = ({group: parts[i] for group, parts in split.items()} for i in (0, 1))
    heights = [y for points in shown.values() for _, y in points]
    heights += [base] if math.isfinite(base) else []
    if heights and min(heights) > 0 and max(heights) / min(heights) > LOG_FROM:
        axis.set_yscale("log")
    shown, beyond = ({g: p for g, p in part.items() if p} for part in (shown, beyond))
    colours = {group: COLOURS[i % len(COLOURS)] for i, group in enumerate(curves)}
    rounds = {group: i // len(COLOURS) for i, group in enumerate(curves)}
    marks = {group: [*MARKS][n % len(MARKS)] for group, n in rounds.items()}
    for group, points in shown.items():
        style = dict(color=colours[group], marker=marks[group], markersize=5)
        axis.plot(*zip(*points, strict=True), "-", **style)
    if math.isfinite(base):
        axis.axhline(base, color=QUIET, linewidth=1.2, linestyle=(0, (4, 3)))
    if axis.get_yscale() == "log":
        plain_ticks(axis.yaxis)
    every = (*shown.values(), *beyond.values())
    places = sorted({x for points in every for x, _ in points})
    if 0 < len(places) <= 12:
        axis.set_xticks(places, [f"{x:g}" for x in places])
    (left, right), (bottom, top) = axis.get_xlim(), axis.get_ylim()
    for group, points in beyond.items():
        for x, _ in points:
            arrow = dict(marker="$↑$", markersize=8, linestyle="", clip_on=False)
            axis.plot([x], [top], color=colours[group], **arrow)
    axis.set_ylim(bottom, top)
    for group, points in shown.items():
        x, y = points[-1]
        if x < places[-1]:  # leads to the name at the edge
            dots = dict(color=colours[group], linewidth=0.7, linestyle=(0, (1, 3)))
            axis.plot([x, right], [y, y], **dots)
    axis.set_xlim(left, right)
    axis.grid(axis="y")
    axis.set_title(number.heading, pad=18 if beyond else 6)
    axis.figure.canvas.draw()  # limits and sizes are final
    again = max(rounds.values(), default=0) > 0
    called = {g: f"{MARKS[m]} {g}" if again else g for g, m in marks.items()}
    ends = [(points[-1][1], called[g], colours[g]) for g, points in shown.items()]
    for group, points in beyond.items():
        told = ", ".join(value_text((y,)) for _, y in points)
        ends.append((top, f"{called[group]} ↑ {told}", colours[group]))
    label_ends(axis, [*ends, *([(base, itself.name, QUIET)] if math.isfinite(base) else [])])
