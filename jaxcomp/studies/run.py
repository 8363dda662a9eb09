"""Running a study: every row is a run of the main job, done once and kept under its fingerprint.

    OUT/before/<fingerprint>.json     the model itself, evaluated once
    OUT/rows/<fingerprint>/           report.json of a run; the artefact too if the study keeps it
    OUT/rows/<fingerprint>.partial/   unfinished work, continued at the block where it stopped
    OUT/study.json, .md, .png         all that is known, written anew after every run
    OUT/depth.png                     error along depth, of all rows in one plot

A fingerprint is that of `job.run_identity`: model, recipe, texts, dtype, version. So a changed row
is computed and an unchanged one is read, whatever else has changed in the study file. What it does
not see is a change in the code of the same version; `again` is for that.
"""

import contextlib
import ctypes
import datetime
import gc
import json
import pathlib
import shutil
import time
from collections.abc import Iterable
from typing import Any

import jax
import rich.console

from jaxcomp import artefact, job
from jaxcomp.progress import ConsoleProgress
from jaxcomp.recipe import Recipe, fingerprint, recipe_to_json
from jaxcomp.report import environment, from_json, sizes
from jaxcomp.studies.grid import PlannedRun, check_place, one_line, open_model, planned_runs
from jaxcomp.studies.output import headline, print_study, write_study, write_text
from jaxcomp.studies.results import choose_numbers, facts_of, named_now, with_retained
from jaxcomp.studies.study import Study, chosen

KEPT = ("report.json", "report.html", "recipe.json")  # of a dropped artefact; pictures as well


def run_study(
    study: Study,
    out: str | pathlib.Path,
    *,
    only: Iterable[str] = (),
    again: bool = False,
    allow_config: Iterable[str] = (),
    console: rich.console.Console | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Computes what is missing and writes the table of everything that is known.

    Args:
      out: directory of the study, new or of an earlier run of it.
      only: names of the rows to compute; the others show what is known of them already.
      again: discard what is known of the chosen rows first.
      console: shows progress and the table; None is silent.
      command: what the user typed, for the record.

    Returns:
      The content of `out/study.json`.

    Raises:
      ValueError: a row that does not exist, or a model or an evaluation that cannot be read. A row
        that fails is no error: the table says why, and the same call tries it again.
    """
    out = pathlib.Path(out).absolute()
    check_place(out)
    rows, allow_config = chosen(study, only), tuple(allow_config)
    clock = time.perf_counter()
    loaded = open_model(study, allow_config)
    runs = list(planned_runs(study, loaded, out))
    mine = [run for run in runs if run.row in rows]
    record = _record(study, loaded, out, console, command)
    del loaded  # each run opens the model for itself
    errors = _earlier_errors(out) | {_key(run): run.error for run in runs if run.error}
    if again:
        for place in (place for run in mine if run.place for place in (run.place, run.partial)):
            shutil.rmtree(place, ignore_errors=True)

    def write() -> dict[str, Any]:
        found = [
            {
                "name": row.name,
                "group": row.group,
                "labels": dict(row.labels),
                "runs": [_found(run, errors, out) for run in runs if run.row is row],
            }
            for row in study.rows
        ]
        result = record | {"seconds": time.perf_counter() - clock, "rows": found}
        write_study(out, result)
        return result

    result = write()
    for i, run in enumerate(mine):
        say(console, f"{i + 1}/{len(mine)}  {run.name}", "bold")
        if not (run.is_done or run.error):
            before = record["model_itself"]["evals"]
            errors[_key(run)] = _compute(study, run, before, allow_config, console)
            result = write()
        if run.is_done:
            _drop_remains(run.place)
            say(console, headline(_found(run, errors, out), result))
        else:
            say(console, f"failed: {errors[_key(run)]}", "red")
    if console:
        print_study(result, console)
    return result


def say(console: rich.console.Console | None, text: str, style: str = "") -> None:
    """A line of plain text on the console, if there is one."""
    if console:
        console.print(text, style=style, markup=False, highlight=False)


def _compute(
    study: Study,
    run: PlannedRun,
    before: dict[str, Any],
    allow_config: tuple[str, ...],
    console: rich.console.Console | None,
) -> str:
    """Runs the main job; returns why it failed, or ""."""
    _start_afresh()
    try:
        job.compress(
            study.model,
            run.recipe,
            run.place,
            compute_dtype=study.compute_dtype,
            allow_config=allow_config,
            before=before,
            console=console,
        )
    except ValueError as error:
        return one_line(error)
    if not study.keep_artefacts:
        (run.place / artefact.MANIFEST).unlink()
    return ""


def _record(
    study: Study,
    loaded: job.Loaded,
    out: pathlib.Path,
    console: rich.console.Console | None,
    command: str,
) -> dict[str, Any]:
    """The part of study.json that does not depend on the rows."""
    started = datetime.datetime.now().astimezone()
    before = _before(study, loaded, out, console)
    numbers = choose_numbers(study.show, with_retained(before["evals"], before["evals"]))
    return {
        "title": study.title,
        "model": study.model,
        "fingerprint": loaded.fingerprint(),
        "command": command,
        "started": started.isoformat(timespec="seconds"),
        "environment": environment(),
        "compute_dtype": study.compute_dtype,
        "evals": recipe_to_json(Recipe(evals=study.evals))["evals"],
        "show": [f"{n.evaluation}: {n.key}" for n in numbers],
        "along": study.along,
        "model_itself": before,
    }


def _before(
    study: Study, loaded: job.Loaded, out: pathlib.Path, console: rich.console.Console | None
) -> dict[str, Any]:
    """Evaluations and sizes of the model itself, from an earlier run where there was one."""
    recipe = Recipe(evals=study.evals)
    identity = job.run_identity(loaded, recipe, None, study.compute_dtype)
    place = out / "before" / f"{fingerprint(identity)[:16]}.json"
    if not place.exists():
        say(console, f"{study.model} itself", "bold")
        start, progress = time.perf_counter(), ConsoleProgress(console)
        found = {"evals": job.evaluate(loaded, study.evals, progress), "sizes": sizes(loaded.model)}
        found["evaluation_seconds"] = time.perf_counter() - start
        place.parent.mkdir(parents=True, exist_ok=True)
        write_text(place, json.dumps(found))
    found = json.loads(place.read_text())
    return found | {"evals": named_now(found["evals"], recipe_to_json(recipe))}


def _found(run: PlannedRun, errors: dict[tuple, str], out: pathlib.Path) -> dict[str, Any]:
    """What is known of a run, as JSON values."""
    found: dict[str, Any] = {"setting": run.setting}
    if run.place:
        found["place"] = str(run.place.relative_to(out))
    if run.is_done:
        report = json.loads((run.place / "report.json").read_text())
        return found | {"recipe": report["recipe"]} | facts_of(from_json(report))
    if error := errors.get(_key(run)):
        return found | {"error": error}
    return found | {"state": "not finished" if run.partial.exists() else "not run"}


def _earlier_errors(out: pathlib.Path) -> dict[tuple, str]:
    """Why runs failed when the study was run before."""
    if not (out / "study.json").exists():
        return {}
    rows = json.loads((out / "study.json").read_text())["rows"]
    runs = [run for row in rows for run in row["runs"] if "place" in run]
    return {(out / run["place"],): run["error"] for run in runs if "error" in run}


def _key(run: PlannedRun) -> tuple:
    """What errors are filed under: the place, or the row where there is none."""
    return (run.place,) if run.place else (run.row.name, run.setting)


def _drop_remains(place: pathlib.Path) -> None:
    """What is left of an artefact without its manifest goes, its reports stay."""
    if artefact.is_artefact(place):
        return
    for path in place.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in KEPT and path.suffix != ".png":
            path.unlink()


def _start_afresh() -> None:
    """Lets the next run have a peak memory of its own, without the programs of the run before.

    What cannot be done on this system is left out; peaks then grow from run to run.
    """
    jax.clear_caches()
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        pathlib.Path("/proc/self/clear_refs").write_text("5")
