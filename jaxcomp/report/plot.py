"""The picture of a report: error per block for each kind of linear, and where the bytes are."""

import math
import os
from typing import Any

from jaxcomp.core.metrics import Row
from jaxcomp.report.record import Report, linear_error
from jaxcomp.report.style import AFTER, BEFORE, picture, plot_style, short_name

__all__ = ["plot_report", "plot_style"]

PARTS = {"codes": "#1f6fb4", "scales": "#7fb2dd", "embedding": "#b9a25f", "other": "#c9ced6"}
COLUMNS = 4


def plot_report(report: Report, path: str | os.PathLike) -> None:
    """Draws the errors of the last step that reported any, and the sizes, as a PNG.

    One panel a kind of linear, all on one logarithmic axis: plain rounding (`error_before`) in grey
    where the method measured it, what the method ended with in blue.

    Raises:
      ValueError: the report has neither errors nor sizes.
    """
    rows = error_rows(report)
    kinds = list(dict.fromkeys(row.linear for row in rows))
    panels = len(kinds) + bool(report.sizes)
    if not panels:
        raise ValueError("this report has neither errors nor sizes; there is nothing to draw")
    columns = min(COLUMNS, panels)
    lines = math.ceil(panels / columns)

    with picture(path, max(3.1 * columns, 4.2), 2.5 * lines + 0.9) as figure:
        axes = [figure.add_subplot(lines, columns, i + 1) for i in range(panels)]
        title = short_name(report.source)
        if kinds:
            unit = error_unit(rows)
            title += f": {rows[0].step}, relative {unit} error by block"
            for axis, kind in zip(axes, kinds, strict=False):
                _draw_kind(axis, kind, [row for row in rows if row.linear == kind])
            _share_limits(axes[: len(kinds)], columns, unit)
        figure.suptitle(title, x=0.01, ha="left", size=12)
        if report.sizes:
            _draw_sizes(axes[-1], report.sizes)


def error_rows(report: Report) -> list[Row]:
    """The blocks' linears of the last step that reported their errors."""
    rows = [r for r in report.rows if r.block is not None and linear_error(r) is not None]
    return [row for row in rows if row.step == rows[-1].step]


def error_unit(rows: list[Row]) -> str:
    """What `linear_error` of them is an error of: "output" or "weight"."""
    return "output" if "error_after" in rows[0].metrics else "weight"


def size_parts(size: dict[str, Any]) -> dict[str, int]:
    """Part of the model (of `PARTS`) → its bytes."""
    scales = size["scales_bytes"] + size["zero_points_bytes"]
    embedding = size["embed_bytes"] + size["head_bytes"]
    # A quantized head is counted as codes and as head; what is left over is never negative.
    other = max(size["total_bytes"] - size["codes_bytes"] - scales - embedding, 0)
    return dict(zip(PARTS, (size["codes_bytes"], scales, embedding, other), strict=True))


def _draw_kind(axis: Any, kind: str, rows: list) -> None:
    blocks = [row.block for row in rows]
    before = [row.metrics.get("error_before") for row in rows]
    mark = dict(marker="o", markersize=2.5, linewidth=1.3)
    if all(isinstance(value, int | float) for value in before):
        axis.plot(blocks, before, color=BEFORE, label="plain rounding", **mark)
    axis.plot(blocks, [linear_error(row) for row in rows], color=AFTER, label=rows[0].step, **mark)
    axis.set_title(kind)
    axis.set_yscale("log")
    axis.grid(axis="y")
    axis.xaxis.get_major_locator().set_params(integer=True)


def _share_limits(axes: list, columns: int, unit: str) -> None:
    low = min(axis.get_ylim()[0] for axis in axes)
    high = max(axis.get_ylim()[1] for axis in axes)
    for i, axis in enumerate(axes):
        axis.set_ylim(low, high)
        if i % columns == 0:
            axis.set_ylabel(f"relative {unit} error")
        else:
            axis.tick_params(labelleft=False)
        if i + columns >= len(axes):
            axis.set_xlabel("block")
    if axes[0].get_legend_handles_labels()[0][1:]:
        axes[0].legend(loc="best", fontsize=8)


def _draw_sizes(axis: Any, size: dict[str, Any]) -> None:
    axis.bar(0, size["dense16_bytes"] / 1e6, width=0.6, color=BEFORE)
    bottom = 0.0
    for name, value in size_parts(size).items():
        if value:
            axis.bar(1, value / 1e6, bottom=bottom, width=0.6, color=PARTS[name])
            middle = bottom + value / 2e6
            if value > 0.02 * size["dense16_bytes"]:  # a thinner one has no room for its label
                axis.text(1.36, middle, f"{name} {value / 1e6:,.0f}", va="center", fontsize=8)
            bottom += value / 1e6
    for x, total in ((0, size["dense16_bytes"]), (1, size["total_bytes"])):
        top = f"{total / 1e6:,.0f}"
        axis.annotate(top, (x, total / 1e6), (0, 2), textcoords="offset points", ha="center")
    axis.set_xticks([0, 1], ["16 bit", f"now, {size['total_bits_per_weight']:.1f} bit"])
    axis.set_xlim(-0.5, 2.3)
    axis.set_ylim(0, 1.1 * max(size["dense16_bytes"], size["total_bytes"]) / 1e6)
    axis.set_title("size of all weights")
    axis.set_ylabel("MB")
    axis.grid(axis="y")
