"""The runs of a study: which there are, where each has its place, and what is left to do."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

from jaxcomp import job
from jaxcomp.calibrate.plan import check_steps
from jaxcomp.recipe import Recipe, fingerprint
from jaxcomp.studies.study import Study, StudyRow, chosen

OURS = ("before", "rows", "study.json", "study.md", "study.png", "curves.png", "depth.png")


@dataclasses.dataclass(frozen=True)
class PlannedRun:
    """One run of a row: its recipe and its place, or why it cannot be run."""

    row: StudyRow
    setting: str | None
    recipe: Recipe
    place: pathlib.Path | None = None
    error: str = ""

    @property
    def name(self) -> str:
        """The row, and the setting if it has several runs."""
        return ", ".join(filter(None, (self.row.name, self.setting)))

    @property
    def partial(self) -> pathlib.Path:
        """Where the main job keeps unfinished work."""
        return self.place.with_name(self.place.name + ".partial")

    @property
    def is_done(self) -> bool:
        """Whether its report is there."""
        return self.place is not None and (self.place / "report.json").exists()


def plan_study(
    study: Study,
    out: str | pathlib.Path,
    *,
    only: Iterable[str] = (),
    allow_config: Iterable[str] = (),
) -> list[dict[str, Any]]:
    """What `run_study` would do: dicts with name, runs, and state, seconds, peak_bytes or error.

    The programs of every row that is not done are compiled and timed on zeros (`job.dry_run`);
    evaluations are not planned.
    """
    out, rows, plans = pathlib.Path(out).absolute(), chosen(study, only), []
    check_place(out)
    runs = list(planned_runs(study, open_model(study, allow_config), out))
    for row in rows:
        mine = [run for run in runs if run.row is row]
        plan: dict[str, Any] = {"name": row.name, "runs": len(mine)}
        to_do = [run for run in mine if not run.is_done]
        try:
            for run in mine:
                if run.error:
                    raise ValueError(run.error)
            steps = []
            if to_do:
                steps = job.dry_run(
                    study.model,
                    to_do[0].recipe,
                    compute_dtype=study.compute_dtype,
                    allow_config=allow_config,
                )
        except ValueError as error:
            plans.append(plan | {"error": one_line(error)})
            continue
        plan["state"] = _state(mine)
        plan["seconds"] = len(to_do) * sum(step["seconds"] for step in steps)
        plan["peak_bytes"] = max((step["peak_bytes"] for step in steps), default=0)
        plans.append(plan)
    return plans


def open_model(study: Study, allow_config: Iterable[str]) -> job.Loaded:
    """The model of a study, which remembers its fingerprint."""
    loaded = job.load(
        study.model, compute_dtype=study.compute_dtype, lazy=True, allow_config=allow_config
    )
    return dataclasses.replace(loaded, fingerprint=functools.cache(loaded.fingerprint))


def planned_runs(study: Study, loaded: job.Loaded, out: pathlib.Path) -> Iterator[PlannedRun]:
    """Every run of every row, in order, with the place that belongs to its fingerprint."""
    calibration = functools.cache(functools.partial(job.calibration, loaded))
    for row in study.rows:
        for setting, recipe in row.runs():
            try:
                calib = calibration(recipe.calib) if recipe.calib else None
                check_steps(loaded.model, recipe.steps, calib)
                identity = job.run_identity(loaded, recipe, calib, study.compute_dtype)
            except ValueError as error:
                yield PlannedRun(row, setting, recipe, error=one_line(error))
            else:
                yield PlannedRun(row, setting, recipe, out / "rows" / fingerprint(identity)[:16])


def check_place(out: pathlib.Path) -> None:
    """Refuses a directory that holds anything but a study.

    Raises:
      ValueError: names what is there.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; name a directory that is new, empty or a study's")
    there = {p.name.removesuffix(".tmp") for p in out.iterdir()} if out.exists() else set()
    if foreign := sorted(there - set(OURS)):
        raise ValueError(
            f"{out} holds {', '.join(foreign[:3])} and is no study; nothing there is touched: "
            "choose another directory or empty this one"
        )


def one_line(error: Exception) -> str:
    """The message of an error as one line of a table."""
    return " ".join(str(error).split())


def _state(runs: list[PlannedRun]) -> str:
    done = sum(run.is_done for run in runs)
    if done == len(runs):
        return "done"
    blocks = sum(
        json.loads(state.read_text())["done"]
        for run in runs
        if not run.is_done
        for state in run.partial.glob("step.*/**/state.json")
    )
    parts = [f"{done} of {len(runs)} done"] if done else []
    parts += [f"continues after {blocks} finished blocks"] if blocks else []
    return ", ".join(parts) or "to do"
