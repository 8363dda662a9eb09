"""What a study leaves: study.json with everything, a Markdown table, pictures."""

import json
import pathlib
from typing import Any

import rich.console

from jaxcomp.calibrate.stream import write_whole
from jaxcomp.report.depth import has_depth, plot_depths
from jaxcomp.studies.curves import plot_curves
from jaxcomp.studies.plot import plot_study
from jaxcomp.studies.results import Line, Number, choose_numbers, make_line, with_retained
from jaxcomp.studies.table import markdown, notes_of, result_table, value_text


def lines_of(result: dict[str, Any]) -> tuple[list[Line], list[Number]]:
    """The lines of a study's table, the model itself first, and the numbers that it shows."""
    itself = result["model_itself"]
    base = itself["evals"]
    numbers = choose_numbers(result["show"], with_retained(base, base))
    name = "quantized model" if itself["sizes"]["quantized_weights"] else "dense"
    first = make_line(name, [{"evals": with_retained(base, base), "sizes": itself["sizes"]}])

    def runs(row: dict[str, Any]) -> list[dict[str, Any]]:
        whole = lambda run: run | {"evals": with_retained(run["evals"], base)}  # noqa: E731
        return [whole(run) if "evals" in run else run for run in row["runs"]]

    rows = [
        make_line(row["name"], runs(row), group=row["group"], labels=row["labels"])
        for row in result["rows"]
    ]
    return [first, *rows], numbers


def print_study(result: dict[str, Any], console: rich.console.Console) -> None:
    """Prints the table of `run_study`'s result."""
    lines, numbers = lines_of(result)
    console.print()
    console.print(result_table(lines, numbers, _title(result)))
    for note in (*notes_of(lines, numbers), _circumstances(result)):
        console.print(note, style="dim", markup=False, highlight=False)


def headline(run: dict[str, Any], result: dict[str, Any]) -> str:
    """The chosen numbers of a finished run, on one line."""
    base = result["model_itself"]["evals"]
    line = make_line("", [run | {"evals": with_retained(run["evals"], base)}])
    numbers = choose_numbers(result["show"], with_retained(base, base))
    return ", ".join(
        f"{n.heading} {value_text(line.values[n])}" for n in numbers if n in line.values
    )


def write_study(out: pathlib.Path, result: dict[str, Any]) -> None:
    """Writes study.json, study.md and study.png; depth.png where errors along depth are known, and
    curves.png where the study goes along a label."""
    lines, numbers = lines_of(result)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "study.json", json.dumps(result, indent=1) + "\n")
    notes = [f"- {note}" for note in notes_of(lines, numbers)]
    parts = [f"### {_title(result)}", markdown(lines, numbers), "\n".join(notes)]
    parts += [_circumstances(result)]
    write_text(out / "study.md", "\n\n".join(filter(None, parts)) + "\n")
    plot_study(lines, numbers, out / "study.png", _title(result))
    if along := result.get("along"):
        plot_curves(lines, numbers, along, out / "curves.png", _title(result))
    depths = {row["name"]: row["runs"][0].get("depth", {}) for row in result["rows"]}
    if any(map(has_depth, depths.values())):
        plot_depths(depths, out / "depth.png")


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a file that appears complete or not at all."""
    write_whole(path, lambda f: f.write(text.encode()))


def _title(result: dict[str, Any]) -> str:
    return result["title"] or f"A study of {result['model']}"


def _circumstances(result: dict[str, Any]) -> str:
    """Model, texts, machines and days, as the small print under the table."""
    runs = [run for row in result["rows"] for run in row["runs"] if "started" in run]
    days = sorted({run["started"][:10] for run in runs}) or [result["started"][:10]]
    machines = {
        f"{e['device']}, {e['cpu_count']} CPU cores, jax {e['jax']}"
        for e in (run["environment"] for run in runs or [result])
    }
    tokens = {
        f"{name}: {numbers['tokens']:,} tokens scored"
        for name, numbers in result["model_itself"]["evals"].items()
        if "tokens" in numbers
    }
    when = days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}"
    parts = [result["model"], result["compute_dtype"], *sorted(tokens), *sorted(machines), when]
    shown = f" · `{result['command']}`" if result["command"] else ""
    return " · ".join(parts) + shown
