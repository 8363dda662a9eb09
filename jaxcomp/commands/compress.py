"""`jaxcomp compress`: a recipe applied to a model, or the plan of it."""

import json
import pathlib
from typing import Annotated, Any

import typer

from jaxcomp.commands.common import Allow, Dtype, Model, Traceback, console, plain_errors

EPILOG = (
    "[bold]Examples[/]\n\n"
    "jaxcomp compress demo:smollm2 configs/smollm2_gptq_w4g64_demo.py --out out\n\n"
    "jaxcomp compress DIR recipe.py --out out steps.0.weight.bits=3 calib.samples=16\n\n"
    "jaxcomp compress DIR out/recipe.json --out again    [dim]# the very same run[/]\n\n"
    "A recipe is a Python file with a function recipe() that returns a jaxcomp.Recipe, or the "
    "recipe.json of an earlier run. A run that was killed continues at the next block when the "
    "same command is given again."
)


def run(
    model: Model,
    recipe: Annotated[pathlib.Path, typer.Argument(help="A .py or .json file.")],
    out: Annotated[
        pathlib.Path, typer.Option("--out", "-o", help="Directory to write; new or empty.")
    ],
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Settings of the recipe to replace."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the plan, compute nothing.")
    ] = False,
    no_resume: Annotated[
        bool, typer.Option("--no-resume", help="Discard the unfinished work of a killed run.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an older artefact once this one is whole.")
    ] = False,
    data_parallel: Annotated[
        bool,
        typer.Option(
            "--data-parallel",
            help="Share every batch of calibration text among all devices of this process; "
            "calib.batch must be a multiple of their number.",
        ),
    ] = False,
    dtype: Dtype = None,
    allow_config: Allow = None,
    traceback: Traceback = False,
) -> None:
    """Apply a recipe to a model and write the result with its report."""
    with plain_errors(traceback):
        from jaxcomp import job
        from jaxcomp.recipe import load_recipe, override
        from jaxcomp.report import print_report

        chosen = override(load_recipe(recipe), settings or [])
        common = dict(
            compute_dtype=dtype or "float32",
            allow_config=tuple(allow_config or ()),
            data_parallel=data_parallel,
        )
        if dry_run:
            _print_plan(model, chosen, out, overwrite, common)
            return
        report = job.compress(
            model,
            chosen,
            out,
            resume=not no_resume,
            overwrite=overwrite,
            **common,
            console=console,
        )
        print_report(report, console)
        console.print(f"\nwritten to [bold]{out}[/]; try: jaxcomp generate {out} --prompt 'Once'")


def _print_plan(
    model: str, recipe: Any, out: pathlib.Path, overwrite: bool, common: dict[str, Any]
) -> None:
    """Reads the structure, the tokenizer and the calibration text, and says what would be done."""
    import rich.table

    from jaxcomp import artefact, job
    from jaxcomp.recipe import recipe_to_json

    artefact.check_output(out, overwrite)
    console.print(f"[bold]{model}[/] → [bold]{out}[/]", highlight=False)
    console.print_json(json.dumps(recipe_to_json(recipe)))
    table = rich.table.Table("step", "time", "peak memory", title="plan", title_justify="left")
    steps = job.dry_run(model, recipe, **common)
    for step in steps:
        seconds, peak = step["seconds"], step["peak_bytes"]
        shown = f"{seconds / 60:.1f} min" if seconds else ""
        table.add_row(step["step"], shown, f"{peak / 1e9:.2f} GB")
    console.print(table)
    console.print(
        "a dry run: every program was compiled and timed on zeros, no block was read and nothing "
        "written; evaluations and file access come on top"
        + ("; times are those of one device" if common["data_parallel"] else "")
    )
