"""`jaxcomp study`: many recipes on one model."""

import pathlib
import shlex
from typing import Annotated

import typer

from jaxcomp.commands.common import Allow, Dtype, Traceback, console, errors, plain_errors

EPILOG = (
    "[bold]Examples[/]\n\n"
    "jaxcomp study configs/studies/flatquant_ablation.py --out ablation\n\n"
    "jaxcomp study grid.py --out grid --only GPTQ --only RTN calib.samples=8\n\n"
    "jaxcomp study grid.py --out grid --dry-run    [dim]# what is left, how long it takes[/]\n\n"
    "A study is a Python file with a function study() that returns a jaxcomp.Study: a model, rows "
    "of recipes, and the evaluations for all of them.\n\n"
    "DIR/study.md is the table, study.png the picture, study.json every number; they are written "
    "after every row. Rows are kept under a fingerprint of model, recipe, texts, dtype and "
    "version: the same command continues a killed study inside the row where it was, a changed "
    "row is computed, an unchanged one is not. A setting goes to every recipe that has it."
)


def run(
    file: Annotated[pathlib.Path, typer.Argument(help="A .py file with a function study().")],
    out: Annotated[
        pathlib.Path, typer.Option("--out", "-o", help="Directory of the study, new or its own.")
    ],
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Settings to replace in every recipe."),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A row to compute; may be repeated. Default: all."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print rows and times, run nothing.")
    ] = False,
    again: Annotated[
        bool, typer.Option("--again", help="Discard what is known of the rows and compute them.")
    ] = False,
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep the compressed models of the rows computed now.")
    ] = False,
    dtype: Dtype = None,
    allow_config: Allow = None,
    traceback: Traceback = False,
) -> None:
    """Run many recipes on one model: one table, one picture, resumable."""
    with plain_errors(traceback):
        import dataclasses

        from jaxcomp import studies
        from jaxcomp.studies.table import plan_table

        chosen, notes = studies.with_settings(studies.load_study(file), settings or [])
        changed = {"compute_dtype": dtype, "keep_artefacts": keep or None}
        chosen = dataclasses.replace(chosen, **{k: v for k, v in changed.items() if v})
        for note in notes:
            errors.print(f"note: {note}", style="yellow", markup=False, highlight=False)
        common = dict(only=only or (), allow_config=tuple(allow_config or ()))
        if dry_run:
            plans = studies.plan_study(chosen, out, **common)
            console.print(plan_table(plans, f"plan of {file}"))
            console.print(
                "a dry run: programs were compiled and timed on zeros, nothing is written; "
                "evaluations and file access come on top"
            )
            return
        words = ["jaxcomp", "study", str(file), "--out", str(out), *(settings or [])]
        words += [word for name in only or [] for word in ("--only", name)]
        words += ["--dtype", dtype] if dtype else []
        studies.run_study(
            chosen, out, again=again, console=console, command=shlex.join(words), **common
        )
        console.print(f"\nwritten to [bold]{out}[/]: study.md, study.png, study.json")
