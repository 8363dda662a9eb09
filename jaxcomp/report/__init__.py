"""What a run found: plain data with a JSON form, tables for a terminal, a picture."""

from jaxcomp.core.metrics import Row
from jaxcomp.report.plot import plot_report
from jaxcomp.report.record import (
    Report,
    environment,
    from_json,
    linear_error,
    to_json,
)
from jaxcomp.report.size import sizes
from jaxcomp.report.structure import structure_tree
from jaxcomp.report.table import eval_table, print_report, size_table

__all__ = [
    "Report",
    "Row",
    "environment",
    "eval_table",
    "from_json",
    "linear_error",
    "plot_report",
    "print_report",
    "size_table",
    "sizes",
    "structure_tree",
    "to_json",
]
