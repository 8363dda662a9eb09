"""The report as one HTML page that holds everything and asks the network for nothing.

    what was done to which model, cards, evaluations, sizes
    depth → linears → flatness → fit → sensitivity         what a report lacks, its page lacks
    recipe → run → structure

All text goes through `page.markup.el`, which escapes it, and the page carries a policy by which no
script runs but its own and nothing loads. The same report gives the same bytes.
"""

import base64
import hashlib
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from jaxcomp.core.files import canonical
from jaxcomp.models.decoder import Decoder
from jaxcomp.report.depth import depth_text, has_depth
from jaxcomp.report.fit import fits, whole_model
from jaxcomp.report.page import charts, tables
from jaxcomp.report.page.cards import cards
from jaxcomp.report.page.markup import Html, el
from jaxcomp.report.page.recipe import recipe_section
from jaxcomp.report.page.sensitivity import sensitivity_section
from jaxcomp.report.page.structure import structure_list
from jaxcomp.report.plot import error_rows, error_unit
from jaxcomp.report.record import Report, from_json, recipe_text, to_json
from jaxcomp.report.style import short_name
from jaxcomp.report.table import duration

HERE = pathlib.Path(__file__).parent / "page"
GENERATOR = "jaxcomp report"  # by which an earlier page is known
ICON = (
    "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'%3E"
    "%3Crect y='2' width='16' height='3' fill='%23a9b1bb'/%3E"
    "%3Crect y='7' width='9' height='3' fill='%231f6fb4'/%3E"
    "%3Crect y='12' width='4' height='3' fill='%231f6fb4'/%3E%3C/svg%3E"
)


class Section(NamedTuple):
    """A part of the page: anchor, heading, what there is to see, and how to read it."""

    anchor: str
    heading: str
    content: list[Any]
    reading: Any = None


def render_html(
    report: Report,
    model: Decoder | None = None,
    artefact: Mapping[str, Any] | None = None,
) -> str:
    """The page of a report.

    Args:
      report: of any version that `from_json` reads; parts may be empty.
      model: the compressed model, blocks behind handles or not, for its structure; only shapes are
        read.
      artefact: further facts about the artefact, name → value.
    """
    report = from_json(to_json(report))  # so that a page does not depend on where it comes from
    sections = [section for section in _sections(report, model, artefact) if section.content]
    title = f"{short_name(report.source)} · {recipe_text(report.recipe)}"
    style, script = ((HERE / name).read_text("utf-8") for name in ("style.css", "script.js"))
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{allowed}'; style-src 'unsafe-inline'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    head = (
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=policy),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="generator", content=GENERATOR),
        el("meta", name="color-scheme", content="light dark"),
        el("title", title),
        el("link", rel="icon", href=ICON),
        el("style", Html(style)),
    )
    links = (el("a", s.heading, href=f"#{s.anchor}") for s in sections)
    body = (
        el("a", "Skip to the numbers", href="#numbers", class_="skip"),
        el(
            "nav",
            el("div", links, class_="links"),
            el("button", "Dark", type="button", id="theme", hidden=True),
            aria_label="Sections",
        ),
        el("main", _header(report), cards(report), map(_section, sections)),
        el("footer", el("p", "Written by jaxcomp; everything on this page is inside this file.")),
        el("div", id="tip", role="status", hidden=True),
        el("script", Html(script)),
    )
    page = el("html", el("head", head), el("body", body), lang="en")
    return f"<!DOCTYPE html>\n{page}\n"


def write_html(path: str | os.PathLike, page: str) -> None:
    """Writes a page to a file that is new or holds an earlier page.

    Raises:
      ValueError: something else is there, or no directory for it.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a directory; name a file, such as {path / 'report.html'}")
    if not path.parent.is_dir():
        raise ValueError(f"there is no directory {path.parent}; make it first")
    if path.exists() and GENERATOR not in path.read_text("utf-8", errors="replace")[:4096]:
        raise ValueError(f"{path} is there and is no page of ours; choose another file or move it")
    path.write_text(page, "utf-8")


def _sections(
    report: Report, model: Decoder | None, artefact: Mapping[str, Any] | None
) -> Iterable[Section]:
    comparison = report.comparison
    evals = report.evals_before or report.evals_after
    yield Section("evaluations", "Evaluations", [tables.eval_table(report)] if evals else [])
    yield Section("size", "Size", _sizes(report))
    yield Section("depth", "Depth", *_depth(comparison))
    yield _linears(report)
    flatness = comparison.get("flatness")
    yield Section(
        "flatness",
        "Flatness",
        [charts.flatness_charts(flatness)] if flatness else [],
        "Norm of each channel over the root mean square of all, on logarithmic scales. A grid is "
        "as coarse as its largest channel needs; on the dashed line all would be alike. "
        "f is the channels' distance from that line over their norm, mean of the blocks.",
    )
    found = fits(report)
    told = (
        f"{name}, {'on the whole model' if whole_model(rows) else 'block by block'}"
        for name, rows in found.items()
    )
    yield Section(
        "fit",
        "Fit",
        [charts.fit_charts(rows, name if len(found) > 1 else "") for name, rows in found.items()],
        f"What gradient descent did in {'; in '.join(told)}." if found else None,
    )
    yield Section("sensitivity", "Sensitivity", sensitivity_section(report))
    yield Section("recipe", "Recipe", recipe_section(report) if report.recipe else [])
    yield Section("run", "Run", _run(report, artefact))
    yield Section(
        "structure",
        "Structure",
        [el("details", el("summary", "Nodes of the model"), structure_list(model))]
        if model is not None
        else [],
        "What the compressed model is made of; equal neighbouring blocks are one entry.",
    )


def _section(section: Section) -> Html:
    reading = el("p", section.reading, class_="reading") if section.reading else None
    return el(
        "section",
        el("h2", section.heading, id=f"{section.anchor}-heading"),
        reading,
        section.content,
        id=section.anchor,
        aria_labelledby=f"{section.anchor}-heading",
    )


def _header(report: Report) -> Html:
    return el(
        "header",
        el("p", "Compression report", class_="eyebrow"),
        el("h1", short_name(report.source)),
        el("p", recipe_text(report.recipe), class_="lead"),
        id="numbers",
    )


def _sizes(report: Report) -> list[Html]:
    size, bits = report.sizes, report.sizes.get("block_bits", ())
    parts = [charts.size_chart(size)] if "codes_bytes" in size else []
    if len({round(b, 3) for b in bits}) > 1:
        parts.append(charts.bits_chart(bits))
    return parts


def _depth(comparison: Mapping[str, Any]) -> tuple[list[Html], Any]:
    found = comparison.get("depth", {})
    if has_depth(found):
        curves, _, output = depth_text(comparison).partition("\n")
        reading = (
            f"{curves}. All blocks so far: each model on its own hidden states. This block alone: "
            "the compressed block on those of the original."
        )
        reading += f" {output[0].upper()}{output[1:]}." if output else ""
        return [charts.depth_chart(comparison)], reading
    if "skipped" in found:
        return [el("p", f"No errors along depth: {found['skipped']}.")], None
    return [], None


def _linears(report: Report) -> Section:
    """Errors of every linear, and what steps say of whole blocks."""
    rows, blocks = error_rows(report), tables.block_tables(report)
    if not any(row.linear is not None for row in report.rows):
        return Section("linears", "Blocks", blocks)
    table = [tables.filter_box(), tables.linear_table(report), *blocks]
    if not rows:  # all were left alone
        return Section("linears", "Linears", table)
    what = f"Relative squared error of each linear's {error_unit(rows)}"
    reading = f"{what}, 0 is equal and 1 no better than zeros."
    return Section("linears", "Linears", [charts.linear_charts(rows), *table], reading)


def _run(report: Report, artefact: Mapping[str, Any] | None) -> list[Html]:
    """Time, memory, calibration, fingerprints, environment."""
    times = [(name, duration(s) or "0 s") for name, s in report.seconds.items()]
    memory = [
        (name, f"{size / 1e9:.2f} GB")
        for name, size in (
            ("peak memory", report.peak_rss_bytes),
            ("of it the imports", report.baseline_rss_bytes),
        )
        if size
    ]
    origin = [("source", report.source)]
    origin += [("source_sha256", report.source_sha256)] if report.source_sha256 else []
    recipe_hash = hashlib.sha256(canonical(report.recipe)).hexdigest()
    lists = [
        ("Time and memory", [*times, *memory]),
        ("Fingerprints", [*origin, *report.calibration.items(), ("recipe_sha256", recipe_hash)]),
        ("Artefact", [*(artefact or {}).items()]),
        ("Environment", [("started", report.started), *report.environment.items()]),
    ]
    parts = [
        el("section", el("h3", name), tables.facts((k.replace("_", " "), v) for k, v in pairs))
        for name, pairs in lists
        if pairs
    ]
    return [el("div", parts, class_="run")]
