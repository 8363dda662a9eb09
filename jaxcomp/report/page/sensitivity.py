"""Where more bits would help: as a step measured it, or, short of that, an indication.

A step that measures reports `kl:<what>:<bits>` in the row of a block: what the next token loses
when that part alone has so many bits; one that also chooses reports `bits:<what>`. Where there is
neither, the error that each block adds on its own (`comparison["depth"]["local"]`) is shown under
that name.
"""

import math
from collections.abc import Iterable
from typing import Any

from jaxcomp.core.metrics import Row
from jaxcomp.core.site import SITES
from jaxcomp.report import depth
from jaxcomp.report.page.markup import Html, el, join
from jaxcomp.report.page.plot import (
    Axes,
    Points,
    Series,
    bars,
    figure,
    line_chart,
    line_colour,
    three_digits,
    tip_text,
    tips,
)
from jaxcomp.report.page.scale import count_scale, linear_scale, log_scale
from jaxcomp.report.record import Report
from jaxcomp.report.style import number

NAMED = 3  # that the text points out

Prices = dict[int, dict[str, dict[int, float]]]  # bits → what → block → KL


def sensitivity_section(report: Report) -> list[Any]:
    """Plots along depth and what stands out; [] where the report has nothing to say."""
    steps = dict.fromkeys(row.step for row in report.rows)
    rows = {step: [row for row in report.rows if row.step == step] for step in steps}
    measured = [part for step in steps for part in _measured(step, rows[step])]
    return measured or _indicated(report)


def prices(rows: Iterable[Row]) -> Prices:
    """What the rows of a step say that each part loses at each width."""
    found: Prices = {}
    for row in rows:
        for key, value in row.metrics.items():
            kind, *place = key.split(":")
            if kind == "kl" and len(place) == 2 and row.block is not None:
                what, bits = place
                found.setdefault(int(bits), {}).setdefault(what, {})[row.block] = number(value)
    return found


def chosen_bits(rows: Iterable[Row]) -> dict[str, dict[int, int]]:
    """What → block → the width that was chosen for it."""
    found: dict[str, dict[int, int]] = {}
    for row in rows:
        for key, value in row.metrics.items():
            kind, _, what = key.partition(":")
            if kind == "bits" and what and row.block is not None:
                found.setdefault(what, {})[row.block] = value
    return found


def _measured(step: str, rows: list[Row]) -> list[Any]:
    found = prices(rows)
    if not found:
        return []
    bits = sorted(found)[len(found) // 2]  # of several widths, one in the middle ranks the parts
    parts = found[bits]
    every = [(v, block, what) for what, kl in parts.items() for block, v in kl.items()]
    every = [part for part in every if math.isfinite(part[0])]
    ranked = sorted(every, key=lambda part: (-part[0], part[1:]))[:NAMED]
    named = ", ".join(
        f"block {block}{'' if what == 'block' else f' {what}'} ({three_digits(kl)})"
        for kl, block, what in ranked
    )
    words = (
        f"{step} quantized each part alone and compared the next-token distributions: KL from the "
        f"model as it came, in nats a token of the calibration text. Most sensitive at {bits} "
        "bits: ",
        el("b", named),
        ".",
    )
    sums: dict[int, float] = {}
    for value, block, _ in every:
        sums[block] = sums.get(block, 0.0) + value
    y = log_scale(v for at in found.values() for kl in at.values() for v in kl.values())
    plots = [
        line_chart(
            f"Each part at {width} bits",
            [
                Series(what, line_colour(i), kl, 1.3)
                for i, (what, kl) in enumerate(found[width].items())
            ],
            y=y,
            y_name="KL, nats a token",
        )
        for width in sorted(found)
    ]
    several, chosen = len(parts) > 1, chosen_bits(rows)
    title = f"Sum over the parts of a block at {bits} bits" if several else f"KL at {bits} bits"
    return [
        el("p", words, class_="prose"),
        _bars(title, sums) if sums else None,
        el("div", plots, class_="panels two") if several or len(found) > 1 else None,
        _chosen_table(chosen) if chosen else _hint([_override(b, what) for _, b, what in ranked]),
    ]


def _indicated(report: Report) -> list[Any]:
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
        "that costs in perplexity; the step Sensitivity measures that.",
    )
    takes = any("overrides" in step for step in report.recipe.get("steps") or ())
    rule = f"Override(blocks={tuple(worst)}, weight_bits=8)"
    return [
        el("p", words, class_="prose"),
        _bars("Error of this block alone", local),
        _hint([rule]) if takes else None,
    ]


def _bars(title: str, points: Points) -> Html:
    worst = sorted(points, key=lambda block: -points[block])[:NAMED]
    top = max(points.values())
    axes = Axes(count_scale(points), linear_scale(0.0, 1.08 * top if top > 0 else 1.0))
    groups = [[block for block in points if (block in worst) == among] for among in (False, True)]
    texts = {block: tip_text("block", block, {title: value}) for block, value in points.items()}
    return figure(
        title,
        axes,
        [
            bars(axes, {block: points[block] for block in group}, colour)
            for group, colour in zip(groups, ("before", "after"), strict=True)
        ],
        tips(axes, texts),
        described="largest in blocks " + ", ".join(map(str, worst)),
        x_name="block",
        height=180,
    )


def _chosen_table(chosen: dict[str, dict[int, int]]) -> Html:
    """A line for each part, a cell for each block with the bits that it got."""
    blocks = sorted({block for widths in chosen.values() for block in widths})
    head = el("tr", el("th", "bits", scope="col"), (el("th", b, scope="col") for b in blocks))
    widest = max(bits for widths in chosen.values() for bits in widths.values())
    lines = [
        el(
            "tr",
            el("th", what, scope="row"),
            (_width_cell(widths.get(block), widest) for block in blocks),
        )
        for what, widths in chosen.items()
    ]
    table = el("table", el("thead", head), el("tbody", lines), class_="map")
    name = "Bits that were chosen for each block"
    box = el("div", table, class_="scroll", role="region", aria_label=name, tabindex=0)
    return join(el("h3", name), box)


def _width_cell(bits: int | None, widest: int) -> Html:
    share = 0 if bits is None else round(100 * bits / widest)
    return el("td", "–" if bits is None else bits, style=f"--t:{share}%")


def _override(block: int, what: str) -> str:
    """The exception that gives one part 8 bits, as Python writes it."""
    kind = "" if what == "block" else "sites" if what in SITES else "linears"
    part = f"{kind}=({what!r},), " if kind else ""
    return f"Override({part}blocks=({block},), weight_bits=8)"


def _hint(rules: list[str]) -> Html:
    text = "overrides=(\n" + "".join(f"    {rule},\n" for rule in rules) + ")"
    told = "To give them more bits, in the step that rounds:"
    return join(el("p", told), el("pre", el("code", text), tabindex=0))
