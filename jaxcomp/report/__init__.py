"""What a run found: plain data with a JSON form, tables for a terminal, pictures."""

from jaxcomp.core.metrics import Row
from jaxcomp.report.depth import plot_depth, plot_depths
from jaxcomp.report.fit import plot_fit
from jaxcomp.report.flatness import plot_flatness
from jaxcomp.report.html import render_html, write_html
from jaxcomp.report.pictures import draw_pictures, picture_names
from jaxcomp.report.plot import plot_report
from jaxcomp.report.record import (
    Report,
    environment,
    from_json,
    linear_error,
    recipe_text,
    step_seconds,
    to_json,
)
from jaxcomp.report.size import sizes
from jaxcomp.report.structure import structure_tree
from jaxcomp.report.table import eval_table, print_report, size_table

__all__ = [
    "Report",
    "Row",
    "draw_pictures",
    "environment",
    "eval_table",
    "from_json",
    "linear_error",
    "picture_names",
    "plot_depth",
    "plot_depths",
    "plot_fit",
    "plot_flatness",
    "plot_report",
    "print_report",
    "recipe_text",
    "render_html",
    "size_table",
    "sizes",
    "step_seconds",
    "structure_tree",
    "to_json",
    "write_html",
]
