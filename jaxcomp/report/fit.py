"""The picture of a fit by gradient descent: losses, and the clip factors that were learned."""

import functools
import os
from collections.abc import Callable
from typing import Any

from jaxcomp.core.metrics import Row
from jaxcomp.report.record import Report
from jaxcomp.report.style import (
    AFTER,
    BEFORE,
    COLOURS,
    DEPTH_AFTER,
    QUIET,
    headline,
    label_ends,
    number,
    picture,
    ramp,
    shades,
    short_name,
)

SPAN = 0.04  # least height of an axis of clip factors, so that nothing looks like much

Curves = dict[str, dict[str, dict[int, float]]]  # name → "clip_low", "clip_high" → block → factor


def plot_fit(report: Report, path: str | os.PathLike) -> None:
    """Draws what the steps that fitted something reported, as a PNG.

    The rows of such a step hold, for a block or the model: `loss_curve`, `mse_before`, `mse_after`,
    `mse_rounding`, and `clip_low:SITE`, `clip_high:SITE`; for a linear: `clip_low`, `clip_high`.
    All but the first are optional.

    Raises:
      ValueError: no step has a loss curve.
    """
    found = fits(report)
    if not found:
        raise ValueError("no step of this report has a loss curve; there is nothing to draw")
    panels: list[Callable[[Any], None]] = []
    for name, rows in found.items():
        title = f"{name}: loss during the fit" if len(found) > 1 else "loss during the fit"
        panels.append(functools.partial(_draw_losses, rows=rows, title=title))
        if errors := fit_errors(rows):
            panels.append(functools.partial(_draw_errors, errors=errors))
        for what, curves in (("activations", site_clips(rows)), ("weights", linear_clips(rows))):
            if curves:
                panels.append(functools.partial(_draw_clips, curves=curves, what=what))
    lines = (len(panels) + 1) // 2
    with picture(path, 10.4 if len(panels) > 1 else 5.6, 3.2 * lines + 0.9) as figure:
        for i, draw in enumerate(panels):
            draw(figure.add_subplot(lines, min(len(panels), 2), i + 1))
        bands = "bands reach from the factor of the least value to that of the greatest"
        sides = (key for rows in found.values() for row in rows for key in row.metrics)
        clips = any(key.startswith("clip_") for key in sides)
        names = ", ".join(found)
        headline(figure, f"{short_name(report.source)}: fit of {names}", bands if clips else "")


def fits(report: Report) -> dict[str, list[Row]]:
    """Step → its rows, of the steps in which a block or the model has a loss curve."""
    steps = [row.step for row in report.rows if row.metrics.get("loss_curve")]
    return {name: [row for row in report.rows if row.step == name] for name in steps}


def whole_model(rows: list[Row]) -> bool:
    """Whether it was the model that was fitted, and not its blocks one by one."""
    return any(row.block is None and row.metrics.get("loss_curve") for row in rows)


def held_out(rows: list[Row]) -> dict[float, float]:
    """Losses on text that was not trained on, placed among the records of the loss curve."""
    for row in rows:
        if curve := row.metrics.get("held_out_curve"):
            share = len(row.metrics["loss_curve"]) / max(row.metrics["steps"], 1)
            steps = row.metrics["held_out_steps"]
            pairs = zip(steps, curve, strict=True)
            return {1 + share * step: number(loss) for step, loss in pairs}
    return {}


def stages(rows: list[Row]) -> dict[int, int]:
    """Of a search that removes more and more: the record of the loss → how many from there on."""
    for row in rows:
        if curve := row.metrics.get("removed_curve"):
            pairs = enumerate(zip([0, *curve], curve, strict=False), 1)
            return {record: int(now) for record, (before, now) in pairs if now != before}
    return {}


def site_clips(rows: list[Row]) -> Curves:
    """Clip factors of the activation at each site along depth."""
    curves: Curves = {}
    for row in rows:
        for key, value in row.metrics.items():
            side, _, site = key.partition(":")
            if row.linear is None and site and side in ("clip_low", "clip_high"):
                curves.setdefault(site, {}).setdefault(side, {})[row.block] = number(value)
    return curves


def linear_clips(rows: list[Row]) -> Curves:
    """Clip factors of each kind of linear along depth, means over its channels."""
    curves: Curves = {}
    for row in rows:
        for side in ("clip_low", "clip_high"):
            if row.linear is not None and side in row.metrics:
                value = number(row.metrics[side])
                curves.setdefault(row.linear, {}).setdefault(side, {})[row.block] = value
    return curves


def fit_errors(rows: list[Row]) -> dict[str, dict[int, float]]:
    """ "before", "after" and, where all have it, "plain rounding" → block → error of its output."""
    found = [row for row in rows if {"mse_before", "mse_after"} <= row.metrics.keys()]
    keys = {"before": "mse_before", "after": "mse_after"}
    if all("mse_rounding" in row.metrics for row in found):
        keys["plain rounding"] = "mse_rounding"
    points = lambda key: {row.block: number(row.metrics[key]) for row in found}  # noqa: E731
    return {name: points(key) for name, key in keys.items()} if found else {}


def clip_band(sides: dict[str, dict[int, float]]) -> dict[int, tuple[float, float, float]]:
    """Block → the least of its clip factors, their mean, the greatest."""
    first, *_ = sides.values()
    both = {block: [p[block] for p in sides.values() if block in p] for block in first}
    return {block: (min(pair), sum(pair) / len(pair), max(pair)) for block, pair in both.items()}


def clip_limits(low: float, high: float) -> tuple[float, float]:
    """An axis from `low` to `high`, and no less than `SPAN`."""
    middle, half = (low + high) / 2, max(high - low, SPAN) / 2
    return middle - half, middle + half


def _draw_losses(axis: Any, rows: list[Row], title: str) -> None:
    fits = [row for row in rows if row.metrics.get("loss_curve")]
    for row, colour in zip(fits, shades(DEPTH_AFTER, len(fits)), strict=True):
        losses = [number(loss) for loss in row.metrics["loss_curve"]]
        axis.plot(range(1, len(losses) + 1), losses, color=colour, linewidth=1.2)
    if held := held_out(rows):
        axis.plot(list(held), list(held.values()), "o-", color=AFTER, markersize=4, linewidth=0.8)
    axis.set_yscale("log")
    for record, count in stages(rows).items():
        axis.axvline(record, color=QUIET, linewidth=0.6, alpha=0.5, zorder=0)
        place = axis.get_xaxis_transform()
        axis.text(record, 0.99, f" {count}", transform=place, va="top", fontsize=8)
    if held:
        label_ends(axis, [(list(held.values())[-1], "held out", AFTER)])
    axis.set_title(f"{title}; above, blocks removed" if stages(rows) else title)
    axis.set_xlabel("record of the loss, in order")
    axis.set_ylabel("loss of the model" if whole_model(rows) else "loss of the block")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(axis="y")
    if len(fits) > 1:
        _colour_bar(axis, fits[0].block, fits[-1].block)


def _colour_bar(axis: Any, first: int, last: int) -> None:
    """A small ramp at the upper right, where the losses have fallen away."""
    box = axis.inset_axes((0.7, 0.94, 0.28, 0.03))
    box.imshow([range(256)], aspect="auto", cmap=ramp(DEPTH_AFTER), extent=(0, 1, 0, 1))
    box.set_xticks([0, 1], [f"block {first}", str(last)], fontsize=8)
    box.tick_params(length=0)
    box.set_yticks([])
    box.spines[:].set_visible(False)


def _draw_errors(axis: Any, errors: dict[str, dict[int, float]]) -> None:
    blocks = list(errors["before"])
    before, after = ([*errors[when].values()] for when in ("before", "after"))
    axis.vlines(blocks, before, after, color=BEFORE, linewidth=1.2, alpha=0.6)
    ends = [(before[-1], "before", QUIET), (after[-1], "after", AFTER)]
    if "plain rounding" in errors:
        rounding = [*errors["plain rounding"].values()]
        axis.plot(blocks, rounding, "_", color=COLOURS[1], markersize=6)
        ends.append((rounding[-1], "plain rounding", COLOURS[1]))
    axis.plot(blocks, before, "o", color=BEFORE, markersize=4)
    axis.plot(blocks, after, "o", color=AFTER, markersize=4)
    axis.set_yscale("log")
    axis.set_title("error of the block's output, before and after the fit")
    axis.set_ylabel("mean squared error")
    _finish(axis)
    label_ends(axis, ends)


def _draw_clips(axis: Any, curves: Curves, what: str) -> None:
    """A band from the factor of the least value to that of the greatest, and their mean."""
    ends = []
    for i, (name, sides) in enumerate(curves.items()):
        colour, band = COLOURS[i % len(COLOURS)], clip_band(sides)
        low, mean, high = zip(*band.values(), strict=True)
        axis.fill_between(list(band), low, high, color=colour, alpha=0.18, linewidth=0)
        axis.plot(list(band), mean, color=colour, linewidth=1.4)
        ends.append((mean[-1], name, colour))
    axis.set_title(f"learned clip factors of {what}")
    axis.set_ylabel("share of the range that is kept")
    _finish(axis)
    axis.set_ylim(clip_limits(*axis.get_ylim()))
    label_ends(axis, ends)


def _finish(axis: Any) -> None:
    axis.set_xlabel("block")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(axis="y")
