"""The picture of error along depth: of one run, and of several in one plot."""

import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

from jaxcomp.report.record import Report
from jaxcomp.report.style import (
    AFTER,
    BEFORE,
    COLOURS,
    QUIET,
    headline,
    label_ends,
    number,
    picture,
    short_name,
)

LOCAL = "#7fb2dd"
EXACT = 1e-9  # an error below it is the arithmetic's, not the compression's
CURVES = {  # of `comparison["depth"]`, in the order they are drawn
    "energy": "energy of all tokens",
    "local": "this block alone",
    "median": "all blocks so far",
}


def plot_depth(report: Report, path: str | os.PathLike) -> None:
    """Draws how the error of the hidden state grows from block to block, as a PNG.

    Raises:
      ValueError: the report holds no errors along depth.
    """
    depth = report.comparison.get("depth", {})
    if not has_depth(depth):
        why = depth.get("skipped", "it holds no comparison")
        raise ValueError(f"this report has no errors along depth: {why}")
    with picture(path, 7.2, 4.2) as figure:
        draw_depth(figure.subplots(), depth)
        text = depth_text(report.comparison)
        headline(figure, f"{short_name(report.source)}: error along depth", text)


def plot_depths(curves: Mapping[str, Mapping[str, Any]], path: str | os.PathLike) -> None:
    """Draws several methods in one plot, each labelled at its end, as a PNG.

    Args:
      curves: name → `comparison["depth"]` of a report; those that were skipped are left out.

    Raises:
      ValueError: none of them holds errors along depth.
    """
    found = {name: depth["median"] for name, depth in curves.items() if has_depth(depth)}
    if not found:
        raise ValueError("none of these runs has errors along depth; there is nothing to draw")
    with picture(path, 7.2, 4.6) as figure:
        axis, ends = figure.subplots(), []
        for i, (name, errors) in enumerate(found.items()):
            colour = COLOURS[i % len(COLOURS)]
            style = ("-", (0, (4, 2)), (0, (1, 1.5)))[i // len(COLOURS) % 3]
            ends.append((_draw(axis, errors, colour, 1.7, style), name, colour))
        _finish(axis, max(map(len, found.values())) - 1)
        label_ends(axis, ends)
        headline(
            figure,
            "error along depth",
            "‖h′ − h‖² / ‖h‖² of the hidden state behind each block, median of the tokens",
        )


def draw_depth(axis: Any, depth: Mapping[str, Any]) -> None:
    """Draws the curves of `comparison["depth"]` on an axis of matplotlib, named at their ends."""
    colours = zip(CURVES.items(), (BEFORE, LOCAL, AFTER), strict=True)
    ends = [
        (_draw(axis, depth[key], colour, 2.0 if key == "median" else 1.3), name, colour)
        for (key, name), colour in colours
    ]
    _finish(axis, len(depth["median"]) - 1)
    label_ends(axis, ends)


def has_depth(depth: Mapping[str, Any]) -> bool:
    """Whether there is an error above nothing to draw on a logarithmic axis."""
    return any(number(error) > EXACT for error in depth.get("median", ()))


def visible(errors: Iterable[Any]) -> list[float]:
    """The errors to draw; NaN where there is none, as before the first block."""
    values = [number(error) for error in errors]
    return [value if EXACT < value < math.inf else math.nan for value in values]


def depth_text(comparison: Mapping[str, Any]) -> str:
    """What the curves are, and on a second line what has become of the next token."""
    tokens, output = comparison["tokens"], comparison.get("output", {})
    text = f"‖h′ − h‖² / ‖h‖² of the hidden state behind each block, median of {tokens:,} tokens"
    if output:
        text += (
            f"\nnext token: KL divergence {number(output['kl']):.3g} nats, "
            f"the same first choice {number(output['top1']):.0%} of the time"
        )
    return text


def _draw(axis: Any, errors: list, colour: str, width: float, style: Any = "-") -> float:
    """Draws one curve; returns where it ends."""
    values = visible(errors)
    axis.plot(
        range(len(values)),
        values,
        color=colour,
        linewidth=width,
        linestyle=style,
        marker="o",
        markersize=1.6 * width,
    )
    return next((value for value in reversed(values) if value == value), EXACT)


def _finish(axis: Any, blocks: int) -> None:
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    if high > 0.5:  # where it can be seen what 1 means
        axis.axhline(1.0, color=QUIET, linewidth=0.9, linestyle=(0, (4, 3)))
        axis.annotate(
            "no better than zeros",
            (0.01, 1.0),
            (0, 2),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            color=QUIET,
            fontsize=8,
            va="bottom",
        )
        high = max(high, 1.6)
    axis.set_ylim(low, high)
    axis.set_xlim(-0.4, blocks + 0.4)
    axis.set_xlabel("blocks passed")
    axis.set_ylabel("relative error")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(axis="y")
