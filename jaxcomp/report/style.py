"""What all pictures share: colours, matplotlib settings, the file, and labels beside lines."""

import contextlib
import math
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

INK, QUIET, GRID = "#30343b", "#7d848e", "#e3e6ea"
BEFORE, AFTER = "#a9b1bb", "#1f6fb4"
COLOURS = ("#1f6fb4", "#c8742c", "#4f8f4a", "#8a5fa8", "#b0475c", "#9c8432", "#4a9aa5", "#59616c")
# From the first block to the last.
DEPTH_BEFORE, DEPTH_AFTER = ("#f3d3ad", "#b3541e"), ("#9cc7ea", "#0f3f6b")


@contextlib.contextmanager
def picture(path: str | os.PathLike, width: float, height: float) -> Iterator[Any]:
    """A matplotlib figure of so many inches, which becomes the PNG `path` at the end."""
    import matplotlib  # slow to import, and needed only here
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(plot_style()):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        figure.savefig(path, dpi=150, format="png")


def plot_style() -> dict[str, Any]:
    """The matplotlib settings of all our pictures."""
    return {
        "font.size": 9,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": "#9aa1ab",
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "xtick.color": INK,
        "ytick.color": INK,
        "grid.color": GRID,
        "legend.frameon": False,
    }


def headline(figure: Any, title: str, explanation: str = "") -> None:
    """A title at the left, and below it in a quieter tone how to read the picture."""
    lines = explanation.count("\n") + 1 if explanation else 0
    figure.suptitle(title + "\n" * lines, x=0.01, ha="left", size=12)
    if explanation:
        top = 1 - 0.32 / figure.get_size_inches()[1]
        figure.text(0.01, top, explanation, ha="left", va="top", color=QUIET, linespacing=1.35)


def short_name(source: str) -> str:
    """A model's name for a title: the last part of a path."""
    return pathlib.PurePath(source).name or source


def plain_ticks(axis: Any, ticks: Iterable[float]) -> None:
    """Ticks of a logarithmic y axis as plain numbers; those outside its limits do not show."""
    low, high = axis.get_ylim()
    shown = [tick for tick in ticks if low <= tick <= high]
    axis.set_yticks(shown, [f"{tick:g}" for tick in shown])
    axis.minorticks_off()


def shades(ends: tuple[str, str], count: int) -> list[Any]:
    """`count` colours between two, both included."""
    return [ramp(ends)(i / max(count - 1, 1)) for i in range(count)]


def ramp(ends: tuple[str, str]) -> Any:
    """The colour map between two colours."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("ramp", ends)


def label_ends(axis: Any, ends: Iterable[tuple[float, str, Any]], size: float = 8.5) -> None:
    """Names lines at the right edge: (last y, name, colour) each; close ones are pushed apart.

    Call it when the limits of the axis are final.
    """
    ends = sorted(
        ((_height(axis, y), name, colour) for y, name, colour in ends), key=lambda e: e[0]
    )
    box = axis.get_window_extent()
    gap = 1.25 * size / 72 * axis.figure.dpi / max(box.height, 1.0)
    at = spread_apart([y for y, _, _ in ends], gap)
    for y, (_, name, colour) in zip(at, ends, strict=True):
        axis.annotate(
            name,
            (1, y),
            (5, 0),
            xycoords="axes fraction",
            textcoords="offset points",
            color=colour,
            va="center",
            fontsize=size,
        )


def spread_apart(places: list[float], gap: float) -> list[float]:
    """Ascending places, moved as little as needs be to lie `gap` apart."""
    groups: list[list[float]] = []  # of places that touch, each a run about its mean
    for place in places:
        groups.append([place])
        while len(groups) > 1 and _run(groups[-1], gap)[0] - _run(groups[-2], gap)[-1] < gap:
            last = groups.pop()
            groups[-1] += last
    return [y for group in groups for y in _run(group, gap)]


def number(value: Any) -> float:
    """A number of a report, of which those that are not finite are words."""
    return float(value) if isinstance(value, int | float | str) else math.nan


def _run(group: list[float], gap: float) -> list[float]:
    middle = sum(group) / len(group)
    return [middle + gap * (i - (len(group) - 1) / 2) for i in range(len(group))]


def _height(axis: Any, y: float) -> float:
    """Where `y` is between the bottom (0) and the top (1) of the axis."""
    pixels = axis.transData.transform((axis.get_xlim()[0], y))
    return min(max(float(axis.transAxes.inverted().transform(pixels)[1]), 0.0), 1.0)
