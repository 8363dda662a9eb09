"""What a run found, as plain data: rows, evaluations before and after, sizes, environment."""

import dataclasses
import importlib.metadata
import os
import platform
from typing import Any

import jax
import numpy as np

from jaxcomp.core.metrics import Row

GRIDS = {"W": "weight", "A": "act", "KV": "kv", "K": "k", "V": "v", "E": "ends"}  # letter → setting
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "orbax-checkpoint", "transformers")


@dataclasses.dataclass(frozen=True)
class Report:
    """Everything measured by one run.

    Attributes:
      source: the model as the caller named it.
      recipe: `recipe_to_json` of the recipe.
      rows: what the methods reported, in order.
      evals_before, evals_after: name of the evaluation → name of the number → number.
      sizes: `sizes` of the compressed model.
      calibration: facts about the calibration text, such as its hash.
      source_sha256: digest of the source's weights and config; "" in reports of older versions.
      environment: `environment()` of the run, with the dtype that it computed in.
      started: ISO 8601 time with zone.
      seconds: wall time, per step and for what else took time.
      peak_rss_bytes: largest resident memory of the process.
      baseline_rss_bytes: the same after the imports, before the model was read.
      comparison: the original and the compressed model side by side, errors along depth and
        flatness, see `jaxcomp.calibrate.comparison.Comparison`; empty where it was not made.
    """

    source: str
    recipe: dict[str, Any]
    rows: tuple[Row, ...] = ()
    evals_before: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    evals_after: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    sizes: dict[str, Any] = dataclasses.field(default_factory=dict)
    calibration: dict[str, Any] = dataclasses.field(default_factory=dict)
    environment: dict[str, Any] = dataclasses.field(default_factory=dict)
    started: str = ""
    source_sha256: str = ""
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    peak_rss_bytes: int = 0
    baseline_rss_bytes: int = 0
    comparison: dict[str, Any] = dataclasses.field(default_factory=dict)


def to_json(report: Report) -> dict[str, Any]:
    """The report as JSON values; a number that is not finite becomes its name as a string."""
    return _finite(dataclasses.asdict(report))


def from_json(data: dict[str, Any]) -> Report:
    """The inverse of `to_json`.

    Raises:
      ValueError: a field that no report has, or one missing; the message lists the fields.
    """
    names = [f.name for f in dataclasses.fields(Report)]
    if unknown := sorted(set(data) - set(names)):
        raise ValueError(f"a report has no field {unknown[0]!r}; its fields are {', '.join(names)}")
    if absent := {"source", "recipe"} - set(data):
        raise ValueError(f"the report lacks {', '.join(sorted(absent))}")
    rows = tuple(Row(**row) for row in data.get("rows", ()))
    return Report(**{**data, "rows": rows})


def environment() -> dict[str, Any]:
    """Versions, device and host of this process."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    devices = jax.devices()
    return {
        "python": platform.python_version(),
        **versions,
        "device": f"{len(devices)} x {devices[0].device_kind}",
        "cpu_count": os.cpu_count(),
        "platform": platform.platform(),
    }


def linear_error(row: Row) -> float | None:
    """The error a linear ends with: of its output if measured, else of its weight."""
    if row.linear is None:
        return None
    value = row.metrics.get("error_after", row.metrics.get("weight_error"))
    return value if isinstance(value, int | float) else None


def step_seconds(report: Report) -> float:
    """Wall time of the steps, together with what runs did that were killed before this one."""
    steps = sum(s for name, s in report.seconds.items() if name[:1].isdigit())  # "0: GPTQ"
    return max(steps, sum(row.seconds for row in report.rows))


def recipe_text(recipe: dict[str, Any]) -> str:
    """The steps of a recipe in few words: "SmoothQuant + RTN W4g64 A8 KV8"."""
    return " + ".join(map(_step_text, recipe.get("steps", ()))) or "nothing"


def _step_text(step: dict[str, Any]) -> str:
    parts = [step["class"]]
    for letter, key in GRIDS.items():
        grid = step.get(key)
        if isinstance(grid, dict) and "bits" in grid:
            size = f"g{grid['group_size']}" if grid.get("group_size") else ""
            parts.append(f"{letter}{grid['bits']}{size}")
    if isinstance(inner := step.get("method"), dict):  # of a step that chooses for another method
        parts.append(_step_text(inner))
    return " ".join(parts)


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    if isinstance(data, float) and not np.isfinite(data):
        return str(data)
    return data
