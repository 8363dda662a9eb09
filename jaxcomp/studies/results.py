"""The lines of a table of results, from the runs of a study or from any reports."""

import dataclasses
import statistics
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from jaxcomp.recipe import recipe_from_json
from jaxcomp.report import Report, step_seconds

Evals = Mapping[str, Mapping[str, Any]]  # name of the evaluation → name of the number → number


RETAINED = "retained"  # what the share of the tasks' accuracies is called


class Number(NamedTuple):
    """Which number of which evaluation."""

    evaluation: str
    key: str

    @property
    def heading(self) -> str:
        """What its column is called."""
        return self.evaluation if self.key in self.evaluation else f"{self.evaluation} {self.key}"


@dataclasses.dataclass(frozen=True)
class Line:
    """A row of the table with what was found.

    Attributes:
      values: one for each run that ended well, in the order of `settings`.
      settings: what tells the runs apart; () for a single run.
      bits: stored bits per weight of the blocks' linears.
      seconds: of the compression, evaluations aside; the mean of the runs.
      peak_bytes: largest resident memory of the runs.
      note: why there is nothing, or less than all.
      failed: some run ended with an error.
    """

    name: str
    group: str = ""
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    values: Mapping[Number, tuple[float, ...]] = dataclasses.field(default_factory=dict)
    settings: tuple[str, ...] = ()
    bits: float | None = None
    seconds: float | None = None
    peak_bytes: int | None = None
    note: str = ""
    failed: bool = False


def with_retained(evals: Evals, itself: Evals) -> Evals:
    """The numbers and, where there are multiple-choice tasks, what is retained of them.

    That is the mean over tasks of accuracy over the accuracy of the model itself, and not the ratio
    of the means, in which easy tasks would weigh more.
    """
    ratios = [
        float(numbers["accuracy"]) / float(itself[name]["accuracy"])
        for name, numbers in evals.items()
        if "accuracy" in numbers and itself.get(name, {}).get("accuracy")
    ]
    return dict(evals) | ({RETAINED: {RETAINED: statistics.fmean(ratios)}} if ratios else {})


def choose_numbers(show: Iterable[str], evals: Evals) -> list[Number]:
    """The numbers that `show` names (see `Study.show`).

    Raises:
      ValueError: the evaluations give no such number; the message lists theirs.
    """
    there = [Number(name, key) for name, numbers in evals.items() for key in numbers]
    if not (show := tuple(show)):
        return list({number.evaluation: number for number in reversed(there)}.values())[::-1]
    found: list[Number] = []
    for wanted in show:
        name, _, key = wanted.rpartition(": ")
        fits = [n for n in there if n.key == key and name in ("", n.evaluation)]
        if not fits:
            known = ", ".join(f"{n.evaluation}: {n.key}" for n in there)
            raise ValueError(f"show names {wanted!r}, which no evaluation gives; there is: {known}")
        found += [n for n in fits if n not in found]
    return found


def named_now(evals: Evals, recipe: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Numbers of an older report under the names that the evaluations of its recipe have now.

    Names used to leave out settings that now stand at their end. Of evaluations that had one name,
    the last overwrote the others. What this version cannot read keeps its name.
    """
    try:
        evaluations = {"class": "Recipe", "evals": recipe.get("evals", [])}
        names = [evaluation.name for evaluation in recipe_from_json(evaluations).evals]
    except (ValueError, TypeError):
        return dict(evals)

    now = {}
    for name in (name for name in names if name not in evals):
        starts = [old for old in evals if name.startswith(f"{old} ") and old not in names]
        if starts:
            now[max(starts, key=len)] = name
    return {now.get(name, name): numbers for name, numbers in evals.items()}


def facts_of(report: Report) -> dict[str, Any]:
    """What a table shows of a report, as JSON values."""
    return {
        "evals": named_now(report.evals_after, report.recipe),
        "sizes": report.sizes,
        "seconds": report.seconds,
        "compression_seconds": step_seconds(report),
        "peak_rss_bytes": report.peak_rss_bytes,
        "started": report.started,
        "environment": report.environment,
        "depth": report.comparison.get("depth", {}),
    }


def make_line(
    name: str,
    runs: Iterable[Mapping[str, Any]],
    *,
    group: str = "",
    labels: Mapping[str, str] = {},
) -> Line:
    """The line of some runs: each has the facts of a report, or `error` or `state`; `setting`."""
    runs = list(runs)
    ended = [run for run in runs if "evals" in run]
    values: dict[Number, tuple[float, ...]] = {}
    for run in ended:
        for evaluation, numbers in run["evals"].items():
            for key, value in numbers.items():
                number = Number(evaluation, key)
                values[number] = (*values.get(number, ()), float(value))  # "inf" is a word in JSON
    missing = [run for run in runs if "evals" not in run]
    reasons = [run.get("error") or run.get("state", "") for run in missing]
    if ended or len(set(reasons)) > 1:  # else one reason for all
        settings = [run.get("setting") for run in missing]
        reasons = [": ".join(filter(None, pair)) for pair in zip(settings, reasons, strict=True)]
    seconds = [run["compression_seconds"] for run in ended if run.get("compression_seconds")]
    peaks = [run["peak_rss_bytes"] for run in ended if run.get("peak_rss_bytes")]
    return Line(
        name=name,
        group=group,
        labels=dict(labels),
        values=values,
        settings=tuple(run["setting"] for run in ended if run.get("setting")),
        bits=ended[0]["sizes"].get("bits_per_weight") if ended else None,
        seconds=statistics.fmean(seconds) if seconds else None,
        peak_bytes=max(peaks, default=None),
        note="; ".join(dict.fromkeys(reasons)),
        failed=any("error" in run for run in runs),
    )


def spread(values: Iterable[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation; None for the latter of fewer than two values."""
    values = list(values)
    mean = statistics.fmean(values)
    return mean, statistics.stdev(values) if len(values) > 1 else None
