"""The picture of flatness: the channels of each site before and after, activations and weights."""

import math
import os
import statistics
from typing import Any

from jaxcomp.report.record import Report
from jaxcomp.report.style import (
    DEPTH_AFTER,
    DEPTH_BEFORE,
    QUIET,
    headline,
    number,
    picture,
    plain_ticks,
    shades,
    short_name,
)

KINDS = {"activation": "activation", "weight": "weights"}
SHARES = (0, 0.01, 0.1, 0.3, 0.6, 1)  # ticks; the axis is a square root, wide for the largest
TICKS = (0.1, 0.3, 1, 3, 10, 30, 100)
FLOOR = 0.1  # where a panel ends; a channel so quiet harms no grid


def plot_flatness(report: Report, path: str | os.PathLike) -> None:
    """Draws the norms of channels, largest first, a row a site, as a PNG.

    Warm is the original and blue the compressed model, darker from the first block to the last.

    Raises:
      ValueError: the report holds no flatness.
    """
    entries = report.comparison.get("flatness", [])
    if not entries:
        raise ValueError("this report has no flatness; there is nothing to draw")
    sites = list(dict.fromkeys(entry["site"] for entry in entries))
    blocks = list(dict.fromkeys(entry["block"] for entry in entries))
    colours = {
        when: dict(zip(blocks, shades(ends, len(blocks)), strict=True))
        for when, ends in (("before", DEPTH_BEFORE), ("after", DEPTH_AFTER))
    }
    with picture(path, 9.0, 2.0 * len(sites) + 1.3) as figure:
        axes = figure.subplots(len(sites), 2, sharex=True, sharey="col", squeeze=False)
        for row, site in zip(axes, sites, strict=True):
            chosen = [entry for entry in entries if entry["site"] == site]
            for axis, kind in zip(row, KINDS, strict=True):
                _draw_site(axis, chosen, kind, colours)
        for axis, kind in zip(axes[0], KINDS, strict=True):
            axis.set_ylim(limits(entries, kind))
            plain_ticks(axis, TICKS)
        for axis in axes[-1]:
            axis.set_xlabel("share of the channels, largest first")
        _legend(figure, colours)
        headline(
            figure,
            f"{short_name(report.source)}: how even the channels are",
            "norm of each channel; the dashed line is where all would be if they were alike\n"
            "flatness f: their distance from that line over their own norm, mean of the blocks",
        )


def limits(entries: list[dict[str, Any]], kind: str) -> tuple[float, float]:
    """Where the logarithmic axis of a kind begins and ends, for all its panels."""
    values = [number(v) for e in entries for w in ("before", "after") for v in curve(e, kind, w)]
    values = [v for v in values if math.isfinite(v)] or [1.0]
    low, high = min(values), max(values)
    return max(FLOOR, 0.8 * min(low, 0.8)), 1.2 * max(high, 1.5)


def curve(entry: dict[str, Any], kind: str, when: str) -> list[float]:
    """The channels of one site in one block, evenly spaced along the root of their share."""
    return [number(value) for value in entry[kind][when]["channels"]]


def panel_title(entries: list[dict[str, Any]], kind: str) -> str:
    """The site, and what is measured there."""
    behind = "" if kind == "activation" else " of " + ", ".join(entries[0]["consumers"])
    return f"{entries[0]['site']}: {KINDS[kind]}{behind}"


def change_text(entries: list[dict[str, Any]], kind: str) -> str:
    """The mean flatness before and after."""
    means = [
        statistics.fmean(number(entry[kind][when]["flatness"]) for entry in entries)
        for when in ("before", "after")
    ]
    return f"f {means[0]:.2f} → {means[1]:.2f}"


def _draw_site(axis: Any, entries: list[dict[str, Any]], kind: str, colours: dict) -> None:
    for when, shade in colours.items():
        for entry in entries:
            values = curve(entry, kind, when)
            steps = [i / (len(values) - 1) for i in range(len(values))]  # the ranks are squares
            axis.plot(steps, values, color=shade[entry["block"]], linewidth=1.3)
    axis.axhline(1.0, color=QUIET, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
    axis.set_yscale("log")
    axis.set_xlim(0, 1)
    axis.set_xticks([share**0.5 for share in SHARES], [f"{share:.0%}" for share in SHARES])
    axis.grid(axis="y")
    axis.set_title(panel_title(entries, kind))
    axis.set_title(change_text(entries, kind), loc="right", size=9, color=QUIET)


def _legend(figure: Any, colours: dict) -> None:
    """Two lines below the panels, the original's blocks and the compressed model's."""
    from matplotlib.lines import Line2D

    blocks = list(colours["before"])
    names = [Line2D([], [], linestyle="") for _ in colours]
    swatches = [Line2D([], [], color=colours[w][b], linewidth=3) for b in blocks for w in colours]
    labels = [*colours, *(f"block {b}" for b in blocks for _ in colours)]
    place = dict(loc="outside lower center", ncols=1 + len(blocks), fontsize=8.5)
    figure.legend([*names, *swatches], labels, **place)
