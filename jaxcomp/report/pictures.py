"""Which pictures a report has, and all of them at once."""

import os
import pathlib

from jaxcomp.report.depth import has_depth, plot_depth
from jaxcomp.report.fit import fits, plot_fit
from jaxcomp.report.flatness import plot_flatness
from jaxcomp.report.plot import plot_report
from jaxcomp.report.record import Report, linear_error

# File → whether a report holds what it shows, and what draws it.
PICTURES = {
    "report.png": (
        lambda r: bool(r.sizes) or any(linear_error(row) is not None for row in r.rows),
        plot_report,
    ),
    "depth.png": (lambda r: has_depth(r.comparison.get("depth", {})), plot_depth),
    "flatness.png": (lambda r: bool(r.comparison.get("flatness")), plot_flatness),
    "fit.png": (lambda r: bool(fits(r)), plot_fit),
}


def picture_names(report: Report) -> list[str]:
    """The files that `draw_pictures` makes of `report`."""
    return [name for name, (shows, _) in PICTURES.items() if shows(report)]


def draw_pictures(report: Report, directory: str | os.PathLike) -> list[pathlib.Path]:
    """Draws every picture that the report has something for; returns the PNG files."""
    paths = [pathlib.Path(directory) / name for name in picture_names(report)]
    for path in paths:
        PICTURES[path.name][1](report, path)
    return paths
