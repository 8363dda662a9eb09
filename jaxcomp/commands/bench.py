"""`jaxcomp bench`: how fast models generate, and what memory they take, side by side."""

import json
import pathlib
from typing import Annotated

import typer

from jaxcomp.commands.common import (
    Allow,
    Dtype,
    Executed,
    Execution,
    Model,
    Traceback,
    console,
    plain_errors,
)

EPILOG = (
    "[bold]Examples[/]\n\n"
    "jaxcomp bench out    [dim]# beside the dense model that it was made from[/]\n\n"
    "jaxcomp bench out --against other --batch 1 --batch 16 --prompt 1024 --new 128\n\n"
    "jaxcomp bench out --no-dense --json speed.json --png speed.png\n\n"
    "Each model runs in a process of its own, and they take turns. The share of bandwidth is the "
    "bytes that a decoding step must read (weights and caches as they are held), over its time, "
    "over what the memory of this machine was measured to give in the same run."
)


def run(
    model: Model,
    against: Annotated[
        list[str] | None,
        typer.Option(metavar="MODEL", help="Another model to measure; may be repeated."),
    ] = None,
    dense: Annotated[
        bool,
        typer.Option(help="Measure the model that an artefact was made from, where it is found."),
    ] = True,
    batch: Annotated[
        list[int] | None,
        typer.Option(help="Sequences at a time; may be repeated. Default: 1, 8 and 32."),
    ] = None,
    prompt: Annotated[int, typer.Option(help="Tokens of each prompt.")] = 512,
    new: Annotated[int, typer.Option(help="Tokens to generate after it.")] = 64,
    repeats: Annotated[int, typer.Option(help="Timed runs, after one that compiles.")] = 3,
    execution: Executed = Execution.simulated,
    json_file: Annotated[
        pathlib.Path | None, typer.Option("--json", metavar="FILE", help="Also write the numbers.")
    ] = None,
    png: Annotated[
        pathlib.Path | None, typer.Option(metavar="FILE", help="Also draw a picture.")
    ] = None,
    dtype: Dtype = None,
    allow_config: Allow = None,
    traceback: Traceback = False,
) -> None:
    """Time prefill and decoding, beside the memory that bounds them."""
    with plain_errors(traceback):
        from jaxcomp.bench import Contender, bench, dense_source
        from jaxcomp.evals.speed import Workload
        from jaxcomp.hub.locate import locate
        from jaxcomp.report.speed import plot_speed, speed_tables

        batches = batch or [1, 8, 32]
        for size in batches:
            Workload(size, prompt, new)  # refuses what cannot be timed before a model is loaded
        common = dict(compute_dtype=dtype, allow_config=tuple(allow_config or ()))
        integer = execution is Execution.integer
        sources = list(dict.fromkeys([model, *(against or [])]))
        contenders = [Contender(s, _name(s), integer=integer, **common) for s in sources]
        source = dense_source(model) if dense else None
        if source is not None and source not in sources:
            try:
                locate(source)
            except (ValueError, OSError, ModuleNotFoundError) as error:
                console.print(f"without the dense model: {error}", style="yellow", markup=False)
            else:
                contenders.append(Contender(source, f"{_name(source)} (source)", **common))
        with console.status("") as status:
            found = bench(contenders, batches, prompt, new, repeats, status.update)
        for table in speed_tables(found):
            console.print(table)
        if json_file:
            json_file.write_text(json.dumps(found, indent=1) + "\n")
        if png:
            plot_speed(found, png)


def _name(source: str) -> str:
    return pathlib.PurePath(source).name or source
