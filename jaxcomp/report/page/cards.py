"""The cards at the head of the page: the numbers that one looks for first."""

import datetime
from collections.abc import Iterable
from typing import Any

from jaxcomp.report.page.markup import Html, el, join
from jaxcomp.report.page.tables import text_of
from jaxcomp.report.record import Report, step_seconds
from jaxcomp.report.style import number
from jaxcomp.report.table import change, duration, four_digits


def cards(report: Report) -> Html:
    """The numbers that one looks for first; each with its full value in a `data` element."""
    shown = [_card(*card) for card in _card_list(report)]
    fits = [n for n in (4, 3) if len(shown) % n in (0, n - 1)]  # with no gap at the end, or one
    return el("dl", shown, class_="cards", style=f"--columns:{fits[0] if fits else 4}")


def _card_list(report: Report) -> Iterable[tuple[str, Any, Any]]:
    """(name, number, note) each."""
    size, environment = report.sizes, report.environment
    if total := size.get("total_bytes"):
        note = _times_smaller(size["dense16_bytes"], total) if "dense16_bytes" in size else ""
        yield "size of all weights", _value(total, f"{total / 1e6:,.1f} MB"), note
    if (bits := size.get("bits_per_weight")) is not None:
        note = ["in the linears of the blocks"]
        if overall := size.get("total_bits_per_weight"):
            note = ["in the blocks; ", _value(overall, f"{overall:.2f}"), " over everything"]
        yield "bits per weight", _value(bits, f"{bits:.2f}"), note
    for name in dict.fromkeys([*report.evals_before, *report.evals_after]):
        old, new = report.evals_before.get(name, {}), report.evals_after.get(name, {})
        key = next(iter({**old, **new}), None)
        if key is None:
            continue
        a, b = old.get(key), new.get(key)
        shown = [_value(v, text_of(v)) for v in (a, b) if v is not None]
        arrow = el("span", " → ", class_="quiet")
        heading = name if key in name else f"{name} {key}"
        yield heading, join(shown[0], arrow, shown[1]) if len(shown) > 1 else shown, _ratio(a, b)
    if output := report.comparison.get("output"):
        same, kl = number(output["top1"]), number(output["kl"])
        note = ("of next tokens; KL ", _value(kl, f"{kl:.3g}"), " nats")
        yield "same first choice", _value(same, f"{same:.1%}"), note
    steps = step_seconds(report)
    if seconds := steps + sum(s for name, s in report.seconds.items() if not name[:1].isdigit()):
        note = f"{duration(steps)} of it in the steps" if steps else ""
        yield "wall time", _value(seconds, duration(seconds)), note
    if peak := report.peak_rss_bytes:
        above = peak - report.baseline_rss_bytes
        note = ("above the imports; ", _value(peak, f"{peak / 1e9:.2f} GB"), " in all")
        yield "peak memory", _value(above, f"{above / 1e9:.2f} GB"), note
    if report.started:
        cores = f", {environment['cpu_count']} cores" if environment.get("cpu_count") else ""
        device = f"{environment.get('device', 'device unknown')}{cores}"
        yield "made", el("time", _day(report.started), datetime=report.started), device


def _card(name: str, value: Any, note: Any) -> Html:
    return el("div", el("dt", name), el("dd", value), el("dd", note, class_="note"))


def _value(value: Any, shown: str) -> Html:
    return el("data", shown, value=repr(value) if isinstance(value, float) else str(value))


def _times_smaller(dense: int, total: int) -> Any:
    """How a size compares with that at 16 bits."""
    if dense >= total:
        return _value(dense / total, f"{dense / total:.2f}×"), " smaller than at 16 bit"
    return _value(total / dense, f"{total / dense:.2f}×"), " larger than at 16 bit"


def _ratio(before: Any, after: Any) -> str:
    if not (percent := change(before, after)):
        return "as before" if before == after else ""
    return f"×{four_digits(after / before)} ({percent})"


def _day(started: str) -> str:
    try:
        return datetime.datetime.fromisoformat(started).date().isoformat()
    except ValueError:
        return started
