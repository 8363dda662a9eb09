"""The tables of a report's page: evaluations, every linear, every block, and lists of facts."""

import math
from collections.abc import Iterable
from typing import Any

from jaxcomp.core.metrics import Row
from jaxcomp.report.page.markup import Html, el
from jaxcomp.report.record import Report, linear_error
from jaxcomp.report.table import change, duration, four_digits

IN_CHARTS = (
    "loss_curve",
    "held_out_curve",
    "held_out_steps",
    "removed_curve",
    "clip_low",
    "clip_high",
    "kl",
    "bits",
)  # metrics that are drawn


def text_of(value: Any) -> str:
    """A value of a report for a reader."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    return four_digits(value) if isinstance(value, float) else str(value)


def eval_table(report: Report) -> Html:
    """Every number of every evaluation."""
    before, after = report.evals_before, report.evals_after
    rows = []
    for name in dict.fromkeys([*before, *after]):
        old, new = before.get(name, {}), after.get(name, {})
        for key in dict.fromkeys([*old, *new]):
            a, b = old.get(key), new.get(key)
            cells = (el("td", _data(v), class_="n") for v in (a, b))
            rows.append(
                el(
                    "tr",
                    el("th", f"{name} ", el("span", key, class_="quiet"), scope="row"),
                    cells,
                    el("td", change(a, b), class_="n"),
                )
            )
    head = el("tr", _head("evaluation"), (_head(h, "n") for h in ("before", "after", "change")))
    return _table("Evaluations", head, rows)


def filter_box() -> Html:
    """The field over `linear_table`, and the count of rows that the script keeps up to date."""
    return el(
        "p",
        el("label", "Filter ", for_="filter"),
        el("input", type="search", id="filter", placeholder="down, block 11, GPTQ"),
        el("span", id="count", role="status"),
        class_="filter",
        hidden=True,
    )


def linear_table(report: Report) -> Html:
    """A row for each linear of each step, the worst first; the script sorts and filters it."""
    rows = [row for row in report.rows if row.linear is not None]
    rows = sorted(rows, key=lambda row: -(linear_error(row) or -1.0))
    errors = [e for row in rows for e in (linear_error(row), _float(row, "error_before")) if e]
    span = (math.log(min(errors)), math.log(max(errors))) if errors else (0.0, 0.0)
    body = [_linear_row(row, span) for row in rows]
    names = ("block", "linear", "bits", "error before", "error after", "after ÷ before", "method")
    kinds = ("n", "", "n", "n", "n", "n", "")
    sorts = ("none", "none", "none", "none", "descending", "none", "none")
    head = el(
        "tr",
        (
            el("th", el("button", name, type="button"), scope="col", aria_sort=sort, class_=kind)
            for name, kind, sort in zip(names, kinds, sorts, strict=True)
        ),
    )
    return _table("Every linear", head, body, id="linear-table")


def _linear_row(row: Row, span: tuple[float, float]) -> Html:
    error, before = linear_error(row), _float(row, "error_before")
    skipped = row.metrics.get("skipped")
    unit = "" if "error_after" in row.metrics or error is None else " (weight)"
    method = f"{row.step}: left alone, {skipped}" if skipped else f"{row.step}{unit}"
    ratio = error / before if error is not None and before else None
    block = "–" if row.block is None else row.block
    return el(
        "tr",
        el("td", block, class_="n"),
        el("td", row.linear, class_="path"),
        el("td", text_of(row.metrics.get("bits")), class_="n"),
        _error_cell(before, span, "before"),
        _error_cell(error, span, "after"),
        el("td", "–" if ratio is None else f"{ratio:.2f}", class_="n"),
        el("td", method),
        data_key=f"block {block} {row.linear} {method}".lower(),
    )


def _error_cell(value: float | None, span: tuple[float, float], colour: str) -> Html:
    """An error, with a bar behind it as long as its place between all errors, in logarithms."""
    if value is None:
        return el("td", "–", class_="n")
    low, high = span
    share = (math.log(value) - low) / (high - low) if value > 0 and high > low else 0.0
    return el(
        "td",
        exponent_text(value),
        class_=f"n bar {colour}",
        style=f"--v:{100 * share:.0f}%",
        data_v=f"{value:.6g}",
    )


def exponent_text(value: float) -> str:
    """Three digits and a power of ten: "8.96e-3"."""
    mantissa, _, power = f"{value:.2e}".partition("e")
    return f"{mantissa}e{int(power)}" if power else mantissa


def block_tables(report: Report) -> list[Html]:
    """For each step, what it reported of its blocks as numbers, folded up."""
    found = []
    for step in dict.fromkeys(row.step for row in report.rows):
        rows = [row for row in report.rows if row.step == step and row.linear is None]
        keys = list(dict.fromkeys(key for row in rows for key in row.metrics if _shown(key)))
        if not rows or not (keys or any(row.seconds for row in rows)):
            continue
        body = [
            el(
                "tr",
                el("th", "model" if row.block is None else row.block, scope="row", class_="n"),
                (el("td", text_of(row.metrics.get(key)), class_="n") for key in keys),
                el("td", duration(row.seconds), class_="n"),
            )
            for row in rows
        ]
        names = [key.replace("_", " ") for key in keys]
        head = el("tr", _head("block", "n"), (_head(n, "n") for n in names), _head("time", "n"))
        table = _table(f"{step}: numbers of every block", head, body)
        found.append(el("details", el("summary", f"{step}: numbers of every block"), table))
    return found


def facts(pairs: Iterable[tuple[str, Any]]) -> Html:
    """Names and values."""
    lines = (el("div", el("dt", name), el("dd", _fact(name, value))) for name, value in pairs)
    return el("dl", lines, class_="facts")


def _fact(name: str, value: Any) -> Any:
    text = text_of(value)
    if name.endswith("sha256"):
        return el("code", text)
    return el("span", text, class_="quiet") if text in ("none", "–") else text


def _data(value: Any) -> Any:
    """A number with its full value behind it."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return el("data", text_of(value), value=repr(value)) if number else text_of(value)


def _table(name: str, head: Html, rows: list[Html], **attributes: Any) -> Html:
    """A table that scrolls in a box of its own, by touch and by keyboard."""
    table = el("table", el("thead", head), el("tbody", rows), **attributes)
    return el("div", table, class_="scroll", role="region", aria_label=name, tabindex=0)


def _head(name: str, kind: str = "") -> Html:
    return el("th", name, scope="col", class_=kind or None)


def _shown(key: str) -> bool:
    return key.partition(":")[0] not in IN_CHARTS


def _float(row: Row, key: str) -> float | None:
    value = row.metrics.get(key)
    return value if isinstance(value, int | float) and math.isfinite(value) else None
