"""Which block would gain most from more bits: as measured, or, short of that, an indication.

A step that measures sensitivity is called `Sensitivity…` and reports rows for blocks, or for the
linears of blocks, with numbers of which the larger means the more sensitive. Where there is none,
the error that each block adds on its own (`comparison["depth"]["local"]`) is shown, by its name.
"""

import math
from typing import Any

from jaxcomp.report import depth
from jaxcomp.report.page.markup import Html, el
from jaxcomp.report.page.plot import Axes, bars, figure, tip_text, tips
from jaxcomp.report.page.scale import count_scale, linear_scale
from jaxcomp.report.record import Report

NAMED = 3  # blocks that the text points out


def sensitivity_section(report: Report) -> list[Html]:
    """Bars along depth and the blocks that stand out; [] where the report has nothing to say."""
    return _measured(report) or _indicated(report)


def _measured(report: Report) -> list[Html]:
    rows = [row for row in report.rows if row.step.lower().startswith("sensitivity")]
    curves: dict[str, dict[int, float]] = {}
    for row in rows:
        for key, value in row.metrics.items():
            if isinstance(value, int | float) and row.block is not None:
                points = curves.setdefault(key.replace("_", " "), {})
                points[row.block] = points.get(row.block, 0.0) + value  # linears of a block add up
    return [_bars(name, points) for name, points in curves.items()]


def _indicated(report: Report) -> list[Html]:
    found = report.comparison.get("depth", {})
    if not depth.has_depth(found) or "local" not in found:
        return []
    # The first is of the embedding; a block's own error stands behind it.
    local = dict(enumerate(depth.visible(found["local"])[1:]))
    local = {block: value for block, value in local.items() if math.isfinite(value)}
    if not local:
        return []
    worst = sorted(local, key=lambda block: -local[block])[:NAMED]
    share = sum(local[block] for block in worst) / sum(local.values())
    words = (
        "No sensitivity was measured in this run. What is known is the error that each block adds "
        "to the hidden state when it is fed what the original model has there: blocks ",
        el("b", ", ".join(map(str, worst))),
        f" add most, {share:.0%} of the sum. It says where the compressed model departs, not what "
        "that costs in perplexity.",
    )
    hint = None
    if any("overrides" in step for step in report.recipe.get("steps") or ()):
        rule = f"overrides=(Override(blocks={tuple(worst)}, weight_bits=8),)"
        hint = el("p", "To give them more bits, in the step that rounds: ", el("code", rule))
    return [el("p", words, class_="prose"), _bars("Error of this block alone", local), hint]


def _bars(title: str, points: dict[int, float], **more: Any) -> Html:
    worst = sorted(points, key=lambda block: -points[block])[:NAMED]
    top = max(points.values())
    axes = Axes(count_scale(points), linear_scale(min(0.0, *points.values()), 1.08 * top))
    first = {block: value for block, value in points.items() if block in worst}
    rest = {block: value for block, value in points.items() if block not in worst}
    texts = {block: tip_text("block", block, {title: value}) for block, value in points.items()}
    return figure(
        title,
        axes,
        bars(axes, rest, "before"),
        bars(axes, first, "after"),
        tips(axes, texts),
        described="largest in blocks " + ", ".join(map(str, worst)),
        x_name="block",
        height=180,
        **more,
    )
