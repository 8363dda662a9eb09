"""`jaxcomp inspect`: what is inside a checkpoint or an artefact."""

import json
from typing import Annotated, Any

import typer

from jaxcomp.commands.common import Allow, Model, Traceback, console, plain_errors

EPILOG = (
    "[bold]Examples[/]\n\n"
    "jaxcomp inspect out\n\n"
    "jaxcomp inspect demo:smollm2 --blocks\n\n"
    "jaxcomp inspect out --check    [dim]# read everything: hashes, NaN, infinity[/]"
)


def run(
    model: Model,
    blocks: Annotated[
        bool, typer.Option("--blocks", help="Show every block, equal ones too.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Read and check every file and every weight.")
    ] = False,
    allow_config: Allow = None,
    traceback: Traceback = False,
) -> None:
    """Show what is inside a checkpoint or an artefact: nodes, bits, sizes, recipe, report."""
    with plain_errors(traceback):
        from jaxcomp import artefact
        from jaxcomp.hub.read import open_checkpoint
        from jaxcomp.report import from_json, print_report, size_table, sizes, structure_tree

        ours = artefact.is_artefact(model)
        if ours:
            opened = artefact.load(model, lazy=True, verify=check)
        else:
            opened = open_checkpoint(model, allow_config=tuple(allow_config or ())).model
        console.print(structure_tree(opened, every_block=blocks), highlight=False)
        files = artefact.read_manifest(model)["files"] if ours else {}
        if "recipe.json" in files:
            console.print("\n[bold]recipe[/]")
            console.print_json(json.dumps(artefact.read_json(model, "recipe.json")))
        if "report.json" in files:
            console.print()
            print_report(from_json(artefact.read_json(model, "report.json")), console)
        else:
            console.print()
            console.print(size_table(sizes(opened)))
        if check:
            _check_finite(opened)
            console.print(f"[green]intact[/]: {len(files) or 'all'} files and every weight read")


def _check_finite(model: Any) -> None:
    from jaxcomp.calibrate.stream import check_finite
    from jaxcomp.models.decoder import iter_blocks

    check_finite(model.replace(blocks=()), "outside the blocks")
    for i, block in enumerate(iter_blocks(model)):
        check_finite(block, f"block {i}")
