"""The table of results, for a terminal and as Markdown: the same cells in both."""

import re
from collections.abc import Iterable
from typing import Any

from rich.markup import escape
from rich.table import Table

from jaxcomp.report.table import duration, four_digits, number_text, plain_table
from jaxcomp.studies.results import Line, Number, spread


def result_table(lines: list[Line], numbers: list[Number], title: str = "") -> Table:
    """The lines as a table for a terminal."""
    columns, rows = _cells(lines, numbers)
    table = plain_table(escape(title), *map(escape, columns))
    for column, name, cells in zip(table.columns, columns, zip(*rows, strict=True), strict=True):
        whole = cells if name else " ".join(cells).split()
        widest = max(map(len, (*name.split(), *whole)))
        column.no_wrap, column.overflow = False, "fold"
        column.min_width = widest if name else min(widest, 20)  # names break where they must
        column.justify = "left" if name in ("", *_label_names(lines)) else "right"
    for i, (line, cells) in enumerate(zip(lines, rows, strict=True)):
        if i and line.group != lines[i - 1].group:
            table.add_section()
        table.add_row(*map(escape, cells), style="yellow" if line.note else "")
    return table


def markdown(lines: list[Line], numbers: list[Number]) -> str:
    """The lines as a Markdown table, its columns aligned in the source too."""
    columns, rows = _cells(lines, numbers)
    grid = [[cell.replace("|", "\\|") for cell in row] for row in (columns, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*grid, strict=True)]
    left = [name in ("", *_label_names(lines)) for name in columns]

    def row(cells: list[str]) -> str:
        padded = (
            cell.ljust(width) if at_left else cell.rjust(width)
            for cell, width, at_left in zip(cells, widths, left, strict=True)
        )
        return f"| {' | '.join(padded)} |"

    rule = [
        "-" * w if at_left else "-" * (w - 1) + ":" for w, at_left in zip(widths, left, strict=True)
    ]
    return "\n".join([row(grid[0]), row(rule), *map(row, grid[1:])])


def notes_of(lines: Iterable[Line], numbers: Iterable[Number]) -> list[str]:
    """What the cells have no room for: why a line failed, and every value of several runs."""
    notes = []
    for line in lines:
        if line.failed:
            notes.append(f"{line.name} failed: {line.note}")
        if len(line.settings) > 1:
            shown = [
                f"{n.heading} {', '.join(map(number_text, line.values[n]))}"
                for n in numbers
                if n in line.values
            ]
            notes.append(f"{line.name}, {_settings_text(line.settings)}: {'; '.join(shown)}")
    return notes


def plan_table(plans: Iterable[dict[str, Any]], title: str = "") -> Table:
    """What `plan_study` found, for a terminal."""
    table = plain_table(escape(title), "row", "runs", "state", "time to do", "peak memory")
    for plan in plans:
        if "error" in plan:
            cells = [f"[red]fails: {escape(plan['error'])}[/]", "", ""]
        else:
            seconds, peak = plan["seconds"], plan["peak_bytes"]
            cells = [
                escape(plan["state"]),
                duration(seconds),
                f"{peak / 1e9:.2f} GB" if peak else "",
            ]
        table.add_row(escape(plan["name"]), str(plan["runs"]), *cells)
    table.columns[2].no_wrap, table.columns[2].justify = False, "left"
    return table


def value_text(values: Iterable[float]) -> str:
    """One value, or mean ± standard deviation of several."""
    mean, deviation = spread(values)
    shown = four_digits(mean)
    if deviation is None:
        return shown
    deviation = float(f"{deviation:.2g}")
    return f"{shown} ± {deviation:,.0f}" if deviation >= 10 else f"{shown} ± {deviation:.2g}"


def _cells(lines: list[Line], numbers: list[Number]) -> tuple[list[str], list[list[str]]]:
    labels = _label_names(lines)
    rows = []
    for line in lines:
        shown = [value_text(line.values[n]) if line.values.get(n) else "–" for n in numbers]
        if shown and not line.values:
            shown[0] = "failed" if line.failed else line.note or "–"
        rows.append(
            [
                line.name,
                *(str(line.labels.get(label, "")) for label in labels),
                *shown,
                "" if line.bits is None else f"{line.bits:.2f}",
                duration(line.seconds),
                "" if line.peak_bytes is None else f"{line.peak_bytes / 1e9:.2f} GB",
            ]
        )
    columns = ["", *labels, *(n.heading for n in numbers), "bits per weight", "time", "memory"]
    empty = {
        i for i, name in enumerate(columns) if i > len(labels) and not any(row[i] for row in rows)
    }
    keep = [i for i in range(len(columns)) if i not in empty]
    return [columns[i] for i in keep], [[row[i] for i in keep] for row in rows]


def _label_names(lines: Iterable[Line]) -> list[str]:
    return list(dict.fromkeys(label for line in lines for label in line.labels))


def _settings_text(settings: tuple[str, ...]) -> str:
    parts = [re.split("=", setting, maxsplit=1) for setting in settings]
    if len({key for key, _ in parts}) == 1:
        return f"{parts[0][0]} = {', '.join(value for _, value in parts)}"
    return ", ".join(settings)
