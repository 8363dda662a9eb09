"""Plots as inline SVG, sharp and legible at any width.

    relative error                      name of the y axis
    10⁻¹ ┤                   ╱  ● all blocks so far
         │  svg, stretched  ╱           ends: beside the lines, on a phone a legend below
    10⁻² ┤  to its box     ╱ ── ● this block alone
         └─────────────────
          0     10    20    30   blocks passed

The drawing is 1000 × 1000 units, stretched to whatever box the page gives it; strokes keep their
width (`vector-effect`), dots are strokes of no length with round caps, and every word is HTML: so
nothing is distorted and text keeps its size. A colour is a class, and the style sheet says what it
is in light and in dark.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxcomp.report.page.markup import Html, el
from jaxcomp.report.page.scale import Scale, count_scale, log_scale
from jaxcomp.report.style import spread_apart

UNITS = 1000
COLOURS = 8  # of lines without a meaning of their own, classes c0 to c7
LABEL = 17  # pixels between two names at the right edge

Points = Mapping[float, float]  # x → y; a y that is not finite is a gap


class Axes(NamedTuple):
    """The two scales of a plot."""

    x: Scale
    y: Scale


class Series(NamedTuple):
    """A line of `line_chart`: its name, the class of its colour, its points."""

    name: str
    colour: str
    points: Points
    width: float = 1.5


def line(axes: Axes, points: Points, colour: str, width: float = 1.5, **more: Any) -> Html:
    """A line through the points in order of x; `title` and further attributes in `more`."""
    title = more.pop("title", None)
    inner = el("title", title) if title else None
    d = _way(_places(axes, points))
    return el("path", inner, class_=f"line {colour}", stroke_width=f"{width:g}", d=d, **more)


def dots(axes: Axes, points: Points, colour: str, size: float = 4) -> Html:
    """A dot at each point."""
    d = "".join(f"M{x} {y}h0" for x, y in filter(None, _places(axes, points)))
    return el("path", class_=f"dots {colour}", stroke_width=f"{size:g}", d=d)


def dashes(axes: Axes, points: Points, colour: str) -> Html:
    """A short level stroke at each point."""
    half = _width(axes, 0.3)
    d = "".join(f"M{x - half} {y}h{2 * half}" for x, y in filter(None, _places(axes, points)))
    return el("path", class_=f"line {colour}", stroke_width="2", d=d)


def bars(axes: Axes, points: Points, colour: str) -> Html:
    """A bar from the bottom to each point."""
    half = _width(axes, 0.36)
    d = "".join(
        f"M{x - half} {UNITS}V{y}h{2 * half}V{UNITS}z"
        for x, y in filter(None, _places(axes, points))
    )
    return el("path", class_=f"area {colour}", d=d)


def stems(axes: Axes, low: Points, high: Points, colour: str) -> Html:
    """An upright stroke between two points at each x."""
    ends = zip(_places(axes, low), _places(axes, high), strict=True)
    d = "".join(f"M{a[0]} {a[1]}V{b[1]}" for a, b in ends if a and b)
    return el("path", class_=f"line faint {colour}", stroke_width="1.2", d=d)


def band(axes: Axes, low: Points, high: Points, colour: str) -> Html:
    """The area between two lines."""
    edge = [*_places(axes, low), *reversed(_places(axes, high))]
    return el("path", class_=f"band {colour}", d=_way(filter(None, edge)))


def rule(axes: Axes, y: float) -> Html:
    """A dashed line across the plot."""
    return el("path", class_="rule", d=f"M0 {_units(1 - axes.y.at(y))}H{UNITS}")


def tips(axes: Axes, texts: Mapping[float, str]) -> Html:
    """An unseen column about each x that tells its text when it is pointed at."""
    xs = sorted(texts)
    at = [UNITS * axes.x.at(x) for x in xs]
    edges = [0, *(round((a + b) / 2) for a, b in itertools.pairwise(at)), UNITS]
    columns = [
        el(
            "rect",
            el("title", texts[x]),
            x=left,
            width=max(right - left, 1),
            height=UNITS,
            data_x=round(middle),
        )
        for x, middle, left, right in zip(xs, at, edges, edges[1:], strict=False)
    ]
    return el("g", columns, class_="tips")


def tip_text(word: str, x: float, values: Mapping[str, float | None]) -> str:
    """Where, and a line for each value there."""
    found = {name: v for name, v in values.items() if v is not None and math.isfinite(v)}
    return "\n".join(
        [f"{word} {x:g}", *(f"{name}  {three_digits(v)}" for name, v in found.items())]
    )


def figure(
    title: str,
    axes: Axes,
    *marks: Any,
    note: str = "",
    x_name: str = "",
    y_name: str = "",
    ends: Iterable[tuple[float, str, str]] = (),
    labels: Iterable[tuple[float, str]] = (),
    described: str = "",
    height: int = 220,
    clip: bool = False,
) -> Html:
    """A plot in its frame.

    Args:
      title, note: above it, the note at the right.
      marks: what `line` and the others made for `axes`.
      ends: (y, name, class of the colour) of lines that are named at the right edge.
      labels: (y, text) inside the plot, just above that y.
      described: what somebody should know who cannot see it, beyond the title.
      height: of the drawing, in pixels.
      clip: cut off what leaves the plot.
    """
    grid = "".join(f"M0 {_units(1 - axes.y.at(value))}H{UNITS}" for value, _ in axes.y.ticks)
    drawing = el(
        "svg",
        el("path", class_="grid", d=grid),
        el("path", class_="base", d=f"M0 {UNITS}H{UNITS}"),
        marks,
        viewBox=f"0 0 {UNITS} {UNITS}",
        preserveAspectRatio="none",
        role="img",
        aria_label=". ".join(filter(None, (title, described))),
        class_="clip" if clip else None,
    )
    words = [
        *(_word("y", f"top:{100 - 100 * axes.y.at(v):.2f}%", text) for v, text in axes.y.ticks),
        *(_word("x", f"left:{100 * axes.x.at(v):.2f}%", text) for v, text in axes.x.ticks),
        *(_word("in", f"top:{100 - 100 * axes.y.at(v):.2f}%", text) for v, text in labels),
    ]
    return el(
        "figure",
        el("figcaption", el("b", title), el("span", note) if note else None),
        el("div", y_name, class_="y-name", aria_hidden="true") if y_name else None,
        el(
            "div",
            el("div", drawing, el("div", words, aria_hidden="true"), class_="plot"),
            _ends(axes, list(ends), height),
            el("div", x_name, class_="x-name", aria_hidden="true") if x_name else None,
            class_="frame",
            style=f"--height:{height}px",
        ),
        class_="chart",
    )


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    y: Scale | None = None,
    x_word: str = "block",
    ends: bool = True,
    ticks: int = 7,
    under: Sequence[Html] = (),
    **more: Any,
) -> Html:
    """Lines with dots over whole numbers and a tip at each, on a logarithmic scale unless `y`.

    `under` lies beneath the lines; `more` goes to `figure`.
    """
    xs = sorted({x for s in series for x in s.points})
    axes = Axes(
        count_scale(xs, ticks), y or log_scale(v for s in series for v in s.points.values())
    )
    marks = [line(axes, s.points, s.colour, s.width) for s in series]
    marks += [dots(axes, s.points, s.colour, 2.7 * s.width) for s in series]
    texts = {x: tip_text(x_word, x, {s.name: s.points.get(x) for s in series}) for x in xs}
    last = [(v, s.name, s.colour) for s in series if (v := last_value(s.points)) is not None]
    return figure(
        title,
        axes,
        under,
        marks,
        tips(axes, texts),
        ends=last if ends else (),
        described="; ".join(f"{s.name} {span_text(s.points, x_word)}" for s in series),
        **{"x_name": x_word, **more},
    )


def line_colour(i: int) -> str:
    """The class of the colour of the i-th line."""
    return f"c{i % COLOURS}"


def legend(entries: Iterable[tuple[str, str]]) -> Html:
    """Names in a row, each with its colour: (name, class of the colour)."""
    return el("p", [el("span", name, class_=f"key {c}") for name, c in entries], class_="legend")


def last_value(points: Points) -> float | None:
    """The y furthest to the right that is a number."""
    return next((points[x] for x in sorted(points)[::-1] if math.isfinite(points[x])), None)


def span_text(points: Points, word: str) -> str:
    """The first and the last point in words."""
    found = [x for x in sorted(points) if math.isfinite(points[x])]
    if not found:
        return "nowhere a number"
    parts = [
        f"{three_digits(points[x])} at {word} {x:g}" for x in dict.fromkeys((found[0], found[-1]))
    ]
    return "from " + " to ".join(parts) if len(parts) > 1 else parts[0]


def three_digits(value: float) -> str:
    """A number for a tip: "0.0123", "1.65e-6"."""
    return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e+")


def _word(kind: str, place: str, text: str) -> Html:
    return el("span", text, class_=kind, style=place)


def _ends(axes: Axes, ends: list[tuple[float, str, str]], height: int) -> Html | None:
    """Names at the height where their lines end, the topmost first."""
    if not ends:
        return None
    ends = sorted(ends, key=lambda end: axes.y.at(end[0]))
    places = [min(max(axes.y.at(y), 0.0), 1.0) for y, _, _ in ends]
    names = [
        el("span", name, class_=f"key {colour}", style=f"top:{100 - 100 * place:.2f}%")
        for place, (_, name, colour) in zip(spread_apart(places, LABEL / height), ends, strict=True)
    ]
    widest = max(len(name) for _, name, _ in ends)
    return el("div", names[::-1], class_="ends", style=f"--wide:{0.56 * widest + 2.2:.1f}em")


def _places(axes: Axes, points: Points) -> list[tuple[int, int] | None]:
    """Units from the upper left, in order of x; None where a point has no place."""
    places = ((axes.x.at(x), axes.y.at(points[x])) for x in sorted(points))
    return [None if math.isnan(x + y) else (_units(x), _units(1 - y)) for x, y in places]


def _way(places: Iterable[tuple[int, int] | None]) -> str:
    """A path through places, interrupted at None."""
    parts, start = [], True
    for place in places:
        if place is not None:
            parts.append(f"{'M' if start else ' '}{place[0]} {place[1]}")
        start = place is None
    return "".join(parts)


def _width(axes: Axes, share: float) -> int:
    """Units of this share of 1 on the x axis."""
    return max(round(UNITS * share / (axes.x.high - axes.x.low)), 1)


def _units(share: float) -> int:
    return round(UNITS * min(max(share, -20.0), 20.0))
