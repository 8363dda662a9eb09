"""The tables of a report, for a terminal."""

import statistics
from collections.abc import Iterable
from typing import Any

import rich.box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jaxcomp.core.metrics import Row
from jaxcomp.report.pictures import picture_names
from jaxcomp.report.record import Report, linear_error

WORST = 3  # linears that the table points out

Numbers = dict[str, dict[str, Any]]  # name of the evaluation → name of the number → number


def print_report(report: Report, console: Console | None = None) -> None:
    """Prints what every step did, evaluations, sizes, time and memory."""
    console = console or Console()
    when = f" · {report.started}" if report.started else ""
    console.print(f"[bold]{escape(report.source)}[/]{when}\n", highlight=False)
    for step in dict.fromkeys(row.step for row in report.rows):
        rows = [row for row in report.rows if row.step == step]
        _print_step(console, step, rows)
    if report.evals_before or report.evals_after:
        console.print(eval_table(report.evals_before, report.evals_after))
    if report.sizes:
        console.print(size_table(report.sizes))
    console.print(_cost_line(report), highlight=False)
    if names := picture_names(report):
        console.print(f"[dim]pictures: {', '.join(names)}[/]", highlight=False)


def eval_table(before: Numbers, after: Numbers) -> Table:
    """Evaluations before and after, or the only ones there are."""
    both = bool(before and after)
    table = plain_table("evaluation", "", *(("before", "after", "change") if both else ("",)))
    for name in dict.fromkeys([*before, *after]):
        old, new = before.get(name, {}), after.get(name, {})
        for key in dict.fromkeys([*old, *new]):
            a, b = old.get(key), new.get(key)
            cells = (
                [number_text(a), number_text(b), change(a, b)]
                if both
                else [number_text(b if a is None else a)]
            )
            table.add_row(f"{escape(name)} {escape(key)}", *cells)
    return table


def size_table(size: dict[str, Any]) -> Table:
    """The sizes of a model as a table."""
    table = plain_table("size", "", "MB", "of 16 bit", "bits per weight")
    dense = max(size["dense16_bytes"], 1)

    def add(name: str, stored: int, bits: float | None = None) -> None:
        shown = "" if bits is None else f"{bits:.2f}"
        table.add_row(name, f"{stored / 1e6:,.2f}", f"{stored / dense:.1%}", shown)

    if size["quantized_weights"]:
        scales = size["scales_bytes"] + size["zero_points_bytes"]
        add("codes", size["codes_bytes"])
        add("scales and zero points", scales)
        add("quantized weights", size["codes_bytes"] + scales, size["quantized_bits"])
        table.add_section()
    add("embedding", size["embed_bytes"])
    add("blocks", size["blocks_bytes"])
    add("final norm and head", size["head_bytes"])
    add("[bold]all[/]", size["total_bytes"], size["total_bits_per_weight"])
    add("the same at 16 bit", size["dense16_bytes"], 16)
    return table


def plain_table(title: str, *columns: str) -> Table:
    """An empty table in the style of all of ours: the first column to the left, numbers right."""
    style = dict(title_justify="left", title_style="bold", pad_edge=False, padding=(0, 0, 0, 1))
    table = Table(title=title, box=rich.box.SIMPLE_HEAD, **style)
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    return table


def _print_step(console: Console, step: str, rows: list[Row]) -> None:
    """The errors of a step's linears, or the numbers of its blocks; then of the whole model."""
    errors = {(r.block, r.linear): linear_error(r) for r in rows if linear_error(r) is not None}
    whole = {
        k: v for r in rows if r.block is None and r.linear is None for k, v in r.metrics.items()
    }
    if errors:
        console.print(_error_table(step, rows, errors))
    elif (table := _number_table(step, rows, console.width)).row_count:
        console.print(table)
    elif _by_block(rows) or not whole:
        blocks, seconds = len(_by_block(rows)), sum(row.seconds for row in rows)
        told = [f"{blocks} block{'s' * (blocks != 1)}" if blocks else "", duration(seconds)]
        console.print(f"[bold]{escape(step)}[/] {' in '.join(filter(None, told))}", highlight=False)
    facts = {k: v for k, v in whole.items() if not isinstance(v, list) and not _is_warning(k)}
    if facts:
        told = (f"{escape(k.replace('_', ' '))} {number_text(v)}" for k, v in facts.items())
        console.print(f"[dim]{escape(step)}:[/] {' · '.join(told)}", highlight=False)
    for text in (v for k, v in whole.items() if _is_warning(k)):
        console.print(f"[yellow]{escape(step)}, warning: {escape(str(text))}[/]", highlight=False)
    console.print()


def _error_table(step: str, rows: list[Row], errors: dict[tuple, float]) -> Table:
    """A line per block, a column per kind of linear; the worst linears stand out."""
    kinds = list(dict.fromkeys(linear for _, linear in errors))
    worst = set(sorted(errors, key=errors.get, reverse=True)[:WORST])
    unit = "output" if any("error_after" in r.metrics for r in rows) else "weight"
    names = (kind.rpartition(".")[2] for kind in kinds)
    table = plain_table(f"{escape(step)}: relative {unit} error", "block", *names, "bits", "s")
    for block, own in _by_block(rows).items():
        bits = [r.metrics["bits"] for r in own if "bits" in r.metrics]
        cells = []
        for kind in kinds:
            value = errors.get((block, kind))
            text = "" if value is None else _short(value)
            cells.append(f"[bold red]{text}[/]" if (block, kind) in worst else text)
        mean_bits = f"{statistics.fmean(bits):.3g}" if bits else ""
        name = "model" if block is None else str(block)
        table.add_row(name, *cells, mean_bits, f"{sum(r.seconds for r in own):.1f}")
    table.add_section()
    for name, key in (("mean", None), ("before", "error_before")):
        means = [_mean(_pick(rows, kind, key)) for kind in kinds]
        if any(means):
            table.add_row(f"[bold]{name}[/]", *means, "", "")
    return table


def _number_table(step: str, rows: list[Row], width: int) -> Table:
    """A line per block that has something to say, a column per number; removed blocks stand out.

    Errors come first; what does not fit the width of the terminal is counted below.
    """
    found = {block: _numbers(own) for block, own in _by_block(rows).items()}
    keys = list(dict.fromkeys(key for numbers in found.values() for key in numbers))
    keys.sort(key=lambda key: not key.endswith(("removed", "_before", "_after")))
    columns, room = {}, width - 6
    for key in keys:
        cells = [number_text(numbers.get(key)) for numbers in found.values()]
        room -= 2 + max(len(key), *map(len, cells))
        if room >= 0:
            columns[key] = cells
    table = plain_table(escape(step), "block", *(escape(key.replace("_", " ")) for key in columns))
    for i, (block, numbers) in enumerate(found.items()):
        cells = [cells[i] for cells in columns.values()]
        if any(cells):
            table.add_row(str(block), *cells, style="bold red" if numbers.get("removed") else None)
    if left := len(keys) - len(columns):
        table.caption = f"{left} more numbers of every block are in report.json"
    return table


def _by_block(rows: list[Row]) -> dict[int | None, list[Row]]:
    """The rows of every block; under None those of linears outside the blocks, if there are any."""
    found: dict[int | None, list[Row]] = {}
    for row in rows:
        if row.block is not None or row.linear is not None:
            found.setdefault(row.block, []).append(row)
    return found


def _numbers(rows: list[Row]) -> dict[str, Any]:
    """What the rows of a block itself say, but curves."""
    values = {k: v for r in rows if r.linear is None for k, v in r.metrics.items()}
    return {
        k: ("yes" if v else "") if k == "removed" else v
        for k, v in values.items()
        if not isinstance(v, list)
    }


def _is_warning(key: str) -> bool:
    return key.startswith("warning ")


def _pick(rows: list[Row], kind: str, key: str | None) -> Iterable[float]:
    values = (r.metrics.get(key) if key else linear_error(r) for r in rows if r.linear == kind)
    return [v for v in values if isinstance(v, int | float)]


def _mean(values: Iterable[float]) -> str:
    return _short(statistics.fmean(values)) if values else ""


def _short(value: float) -> str:
    return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e+")


def change(before: Any, after: Any) -> str:
    """From one number to another in percent; "" where they are equal or no numbers."""
    numbers = isinstance(before, int | float) and isinstance(after, int | float) and before
    return f"{(after - before) / before:+.1%}" if numbers and before != after else ""


def number_text(value: Any) -> str:
    """A number as the tables show it: four digits of a float, "" for None."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else escape(str(value))


def four_digits(value: float) -> str:
    """A float with four digits, zeros at the end among them: 31.40 under 24.31."""
    small = 1e-3 <= abs(value) < 1e4
    return f"{value:#,.4g}".rstrip(".") if small else number_text(value)


def duration(seconds: float | None) -> str:
    """Seconds for a reader: "35 s", "2.4 min", "1.3 h"; "" for none."""
    if not seconds:
        return ""
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _cost_line(report: Report) -> str:
    parts = [f"{escape(name)} {seconds:.1f} s" for name, seconds in report.seconds.items()]
    if report.peak_rss_bytes:
        above = report.peak_rss_bytes - report.baseline_rss_bytes
        parts.append(
            f"peak memory {report.peak_rss_bytes / 1e9:.2f} GB ({above / 1e9:.2f} GB above the "
            "imports)"
        )
    if "device" in report.environment:
        parts.append(
            f"{escape(str(report.environment['device']))}, jax {report.environment['jax']}"
        )
    return "[dim]" + " · ".join(parts) + "[/]"
