"""The charts of a report: what the PNG pictures show, as SVG that follows the page.

What is drawn comes from the modules of those pictures; here it only gets its marks.
"""

import math
from collections.abc import Mapping
from typing import Any

from jaxcomp.core.metrics import Row
from jaxcomp.report import depth, fit, flatness, plot
from jaxcomp.report.page.markup import Html, el
from jaxcomp.report.page.plot import (
    Axes,
    Points,
    Series,
    band,
    dashes,
    dots,
    figure,
    last_value,
    legend,
    line,
    line_chart,
    line_colour,
    rule,
    span_text,
    stems,
    tip_text,
    tips,
)
from jaxcomp.report.page.scale import Scale, count_scale, linear_scale, log_between, log_scale
from jaxcomp.report.record import linear_error
from jaxcomp.report.style import number

RECORDS = 120  # points of a loss curve; longer ones are thinned


def depth_chart(comparison: Mapping[str, Any]) -> Html:
    """Error of the hidden state behind each block."""
    curves = comparison["depth"]
    colours = {"energy": "before", "local": "local", "median": "after"}
    series = [
        Series(
            name, colours[key], dict(enumerate(depth.visible(curves[key]))), 2.2 - (key != "median")
        )
        for key, name in depth.CURVES.items()
        if key in curves
    ]
    y = log_scale(v for s in series for v in s.points.values())
    worst = y.high > 0.5  # where it can be seen what 1 means
    y = log_between(y.low, max(y.high, 1.6)) if worst else y
    xs = [x for s in series for x in s.points]
    return line_chart(
        "Error along depth",
        series,
        y=y,
        x_word="depth",
        x_name="depth: blocks passed",
        y_name="relative error of the hidden state",
        under=[rule(Axes(count_scale(xs), y), 1.0)] if worst else [],
        labels=[(1.0, "no better than zeros")] if worst else [],
        height=320,
    )


def linear_charts(rows: list[Row]) -> Html:
    """A panel for each kind of linear, all on one scale: plain rounding, and what became of it."""
    kinds = list(dict.fromkeys(row.linear for row in rows))
    values = [linear_error(row) for row in rows]
    before = [number(row.metrics["error_before"]) for row in rows if "error_before" in row.metrics]
    y = log_scale([*values, *before])
    panels = []
    for kind in kinds:
        chosen = [row for row in rows if row.linear == kind]
        series = [Series(rows[0].step, "after", {r.block: linear_error(r) for r in chosen})]
        if all("error_before" in row.metrics for row in chosen):
            rounded = {row.block: number(row.metrics["error_before"]) for row in chosen}
            series.insert(0, Series("plain rounding", "before", rounded))
        panels.append(line_chart(kind, series, y=y, ends=False, x_name="", ticks=3, height=150))
    names = [("plain rounding", "before")] if before else []
    return el(
        "div",
        legend([*names, (rows[0].step, "after")]),
        el("div", panels, class_="panels four"),
    )


def bits_chart(bits: list[float]) -> Html:
    """Bits per quantized weight, block by block."""
    points = {i: float(value) for i, value in enumerate(bits) if value}
    y = linear_scale(0, 1.1 * max(points.values()))
    title = "Bits per quantized weight along depth"
    return line_chart(title, [Series("bits", "after", points)], y=y, ends=False, height=140)


def flatness_charts(entries: list[dict[str, Any]]) -> Html:
    """Channels of each site before and after, a panel for its activation and one for weights."""
    blocks = list(dict.fromkeys(entry["block"] for entry in entries))
    shares = [100 * i / max(len(blocks) - 1, 1) for i in range(len(blocks))]
    shade = dict(zip(blocks, shares, strict=True))
    x = Scale(0, 1, tuple((s**0.5, f"{s:.0%}") for s in flatness.SHARES))
    panels = []
    for site in dict.fromkeys(entry["site"] for entry in entries):
        chosen = [entry for entry in entries if entry["site"] == site]
        for kind in flatness.KINDS:
            low, high = flatness.limits(entries, kind)
            ticks = tuple((t, f"{t:g}") for t in flatness.TICKS if low <= t <= high)
            axes = Axes(x, Scale(low, high, ticks, log=True))
            panels.append(_flatness_panel(axes, chosen, kind, shade))
    ramps = [
        el("span", f"{when}, block {blocks[0]} … {blocks[-1]}", class_=f"ramp {ramp}")
        for when, ramp in (("before", "warm"), ("after", "cool"))
    ]
    return el("div", el("p", ramps, class_="legend"), el("div", panels, class_="panels two"))


def _flatness_panel(axes: Axes, entries: list[dict[str, Any]], kind: str, shade: dict) -> Html:
    lines = []
    for when, ramp in (("before", "warm"), ("after", "cool")):
        for entry in entries:
            values = flatness.curve(entry, kind, when)
            points = {i / max(len(values) - 1, 1): value for i, value in enumerate(values)}
            f = number(entry[kind][when]["flatness"])
            told = f"block {entry['block']} {when}: flatness {f:.3g}"
            place = f"--t:{shade[entry['block']]:.0f}%"
            lines.append(line(axes, points, ramp, style=place, title=told))
    return figure(
        flatness.panel_title(entries, kind),
        axes,
        rule(axes, 1.0),
        lines,
        note=flatness.change_text(entries, kind),
        described="flatness " + flatness.change_text(entries, kind)[2:],
        x_name="share of the channels, largest first",
        height=180,
        clip=True,
    )


def fit_charts(rows: list[Row], step: str = "") -> Html:
    """Losses, errors before and after, and clip factors of the rows of a fit.

    Args:
      step: for the heading, where there are several.
    """
    panels = [_losses(rows, f"{step}: loss during the fit" if step else "Loss during the fit")]
    if errors := fit.fit_errors(rows):
        panels.append(_fit_errors(errors))
    for what, curves in (
        ("activations", fit.site_clips(rows)),
        ("weights", fit.linear_clips(rows)),
    ):
        if curves:
            panels.append(_clips(what, curves))
    return el("div", panels, class_="panels two")


def _losses(rows: list[Row], heading: str) -> Html:
    fits = [row for row in rows if row.metrics.get("loss_curve")]
    curves = {row.block: [number(loss) for loss in row.metrics["loss_curve"]] for row in fits}
    longest = max(map(len, curves.values()))
    every = math.ceil(longest / RECORDS)
    held = fit.held_out(rows)
    values = [v for c in (*curves.values(), held.values()) for v in c]
    axes = Axes(count_scale([1, longest]), log_scale(values))
    lines, whole = [], fit.whole_model(rows)
    for i, (block, losses) in enumerate(curves.items()):
        kept = {n + 1: losses[n] for n in {*range(0, len(losses), every), len(losses) - 1}}
        told = f"{'model' if whole else f'block {block}'}: loss {span_text(kept, 'record')}"
        place = f"--t:{100 * i / max(len(curves) - 1, 1):.0f}%"
        lines.append(line(axes, kept, "cool", 1.2, style=place, title=told))
    first, last = (next(iter(curves)), next(reversed(curves)))
    notes = [f"one record in {every}"] if every > 1 else []
    if stages := fit.stages(rows):
        told = (f"{count} from record {record}" for record, count in stages.items())
        notes.append(f"blocks removed at a time: {', '.join(told)}")
    return figure(
        heading,
        axes,
        lines,
        dots(axes, held, "after", 6) if held else None,
        note="; ".join(notes),
        described="the whole model" if whole else f"{len(curves)} blocks",
        x_name="record of the loss; dots: text that was not trained on"
        if whole
        else f"record of the loss; darker from block {first} to block {last}",
        height=240,
    )


def _fit_errors(errors: dict[str, Points]) -> Html:
    before, after, rounding = (errors.get(k, {}) for k in ("before", "after", "plain rounding"))
    values = [v for points in errors.values() for v in points.values()]
    axes = Axes(count_scale(before), log_scale(values))
    colours = {"plain rounding": "c1", "before": "before", "after": "after"}
    ends = [
        (value, name, colours[name])
        for name, points in errors.items()
        if (value := last_value(points)) is not None
    ]
    texts = {x: tip_text("block", x, {n: p.get(x) for n, p in errors.items()}) for x in before}
    return figure(
        "Error of the block's output, before and after the fit",
        axes,
        stems(axes, before, after, "before"),
        dashes(axes, rounding, "c1"),
        dots(axes, before, "before", 6),
        dots(axes, after, "after", 6),
        tips(axes, texts),
        ends=ends,
        described="; ".join(f"{n} {span_text(p, 'block')}" for n, p in errors.items()),
        x_name="block",
        y_name="mean squared error",
        height=240,
    )


def _clips(what: str, curves: fit.Curves) -> Html:
    """Bands from the factor of the least value to that of the greatest, and their means."""
    bands = {name: fit.clip_band(sides) for name, sides in curves.items()}
    every = [v for points in bands.values() for triple in points.values() for v in triple]
    found = [v for v in every if math.isfinite(v)] or [1.0]
    room = 0.04 * (max(found) - min(found))
    y = linear_scale(*fit.clip_limits(min(found) - room, max(found) + room))
    axes = Axes(count_scale({block for points in bands.values() for block in points}), y)
    areas, lines, ends, means = [], [], [], {}
    for i, (name, points) in enumerate(bands.items()):
        colour = line_colour(i)
        low, mean, high = ({b: triple[k] for b, triple in points.items()} for k in range(3))
        areas.append(band(axes, low, high, colour))
        lines.append(line(axes, mean, colour))
        means[name] = mean
        if (value := last_value(mean)) is not None:
            ends.append((value, name, colour))
    blocks = {block for mean in means.values() for block in mean}
    texts = {x: tip_text("block", x, {n: m.get(x) for n, m in means.items()}) for x in blocks}
    return figure(
        f"Learned clip factors of {what}",
        axes,
        areas,
        lines,
        tips(axes, texts),
        ends=ends,
        described="; ".join(f"{n} {span_text(m, 'block')}" for n, m in means.items()),
        x_name="block",
        y_name="share of the range that is kept, least to greatest value",
        height=240,
    )


def size_chart(size: dict[str, Any]) -> Html:
    """Two bars, of the model at 16 bits and as it is now, and what the second consists of."""
    parts = plot.size_parts(size)
    dense, total = size["dense16_bytes"], size["total_bytes"]
    whole = max(dense, sum(parts.values()), 1)
    colours = dict(zip(plot.PARTS, ("after", "local", "c5", "before"), strict=True))
    now = [(f"{name}  {v / 1e6:,.1f} MB", v, colours[name]) for name, v in parts.items() if v]
    rows = [
        ("16 bit", [(f"16 bit  {dense / 1e6:,.1f} MB", dense, "before")], dense),
        ("now", now, total),
    ]
    return el(
        "div",
        [
            el(
                "div",
                el("span", name),
                _stack(boxes, whole, f"{name}: {of_all / 1e6:,.1f} MB"),
                el("span", f"{of_all / 1e6:,.1f} MB", class_="n"),
                class_="size",
            )
            for name, boxes, of_all in rows
        ],
        legend((name, colour) for name, _, colour in now),
    )


def _stack(boxes: list[tuple[str, float, str]], whole: float, told: str) -> Html:
    """A level bar of boxes, as long as their share of `whole`."""
    drawn, left = [], 0.0
    for name, value, colour in boxes:
        width = 1000 * value / whole
        place = dict(x=f"{left:.1f}", width=f"{width:.1f}", height=1)
        drawn.append(el("rect", el("title", name), class_=f"area {colour}", **place))
        left += width
    stretched = dict(viewBox="0 0 1000 1", preserveAspectRatio="none")
    return el("svg", drawn, role="img", aria_label=told, class_="stack", **stretched)
