"""Finished artefacts and reports side by side."""

import json
import pathlib
from collections.abc import Iterable
from typing import Any

from jaxcomp import artefact
from jaxcomp.report import Report, from_json, recipe_text
from jaxcomp.studies.results import (
    Line,
    Number,
    choose_numbers,
    facts_of,
    make_line,
    named_now,
)


def compare_reports(
    paths: Iterable[str | pathlib.Path],
) -> tuple[list[Line], list[Number], list[str]]:
    """The lines of a table, the first number of each evaluation, and what to beware of.

    Args:
      paths: artefacts, directories that hold a report.json (such as a study's rows), or files.

    Raises:
      ValueError: there is no report at one of the places.
    """
    named = [(str(path), read_report(path)) for path in paths]
    models = {report.source for _, report in named}
    evaluations = {json.dumps(report.recipe.get("evals")) for _, report in named}
    evals: dict[str, dict[str, Any]] = {}
    lines, known = [], []
    for path, report in named:
        evals |= named_now(report.evals_after, report.recipe)
        labels = {"method": recipe_text(report.recipe)}
        if len(models) > 1:
            labels = {"model": report.source} | labels
        before = named_now(report.evals_before, report.recipe)
        if before and (key := (report.source, before)) not in known:
            known.append(key)
            itself = {"evals": before, "sizes": {}}
            lines.insert(len(known) - 1, make_line(f"{report.source} itself", [itself]))
        lines.append(make_line(path, [facts_of(report)], labels=labels))
    notes = []
    if len(evaluations) > 1:
        notes.append(
            "the evaluations of these reports differ in their settings; numbers compare only at "
            "the same text, context, stride and tokens"
        )
    return lines, choose_numbers((), evals), notes


def read_report(path: str | pathlib.Path) -> Report:
    """The report of an artefact, in a directory, or in a file.

    Raises:
      ValueError: there is none, or it is damaged.
    """
    path = pathlib.Path(path)
    if artefact.is_artefact(path):
        return from_json(artefact.read_json(path, "report.json"))
    file = path / "report.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"there is no report at {path}; give an artefact or a report.json")
    try:
        return from_json(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is no report: {error}") from error
