"""The command line: arguments only. What is done with them is in `jaxcomp.job`.

Heavy imports are inside the commands, so that `--help` answers at once.
"""

import contextlib
import enum
import json
import logging
import os
import pathlib
import shlex
from collections.abc import Iterator
from typing import Annotated, Any

import rich.console
import typer

app = typer.Typer(
    name="jaxcomp",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
console = rich.console.Console()
errors = rich.console.Console(stderr=True)

MODEL_HELP = (
    "An artefact, a Hugging Face directory, a .gguf file, owner/name on the hub, or demo:smollm2."
)
Model = Annotated[str, typer.Argument(help=MODEL_HELP)]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="float32 or bfloat16, for activations and products; weights keep theirs. "
        "Default: the artefact's own, or float32."
    ),
]
Allow = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FIELD",
        help="A field of config.json that this version does not know and that, you vouch, changes "
        "nothing. May be repeated.",
    ),
]


class Execution(enum.StrEnum):
    """How quantized activations are computed with."""

    simulated = "simulated"
    integer = "integer"


Executed = Annotated[
    Execution,
    typer.Option(
        help="Quantized activations as rounded floats, or as integers summed in int32; the latter "
        "needs quantized weights behind every quantized activation."
    ),
]
Traceback = Annotated[bool, typer.Option("--traceback", help="Show where an error came from.")]


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="jaxcomp")


def _version(wanted: bool) -> None:
    if wanted:
        import jaxcomp

        console.print(f"jaxcomp {jaxcomp.__version__}", highlight=False)
        raise typer.Exit


@app.callback(
    epilog="[bold]Start here[/]\n\n"
    "jaxcomp compress demo:smollm2 configs/smollm2_gptq_w4g64_demo.py --out out\n\n"
    "jaxcomp generate out --prompt 'The Atlantic Ocean is'\n\n"
    "jaxcomp inspect out"
)
def _start(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what is done.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Compress large language models, and know what it cost."""
    level = logging.INFO if verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s", force=True)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # else: torch is absent
    logging.getLogger("jax").setLevel(logging.WARNING)
    logging.getLogger("absl").setLevel(logging.WARNING)


@app.command(
    epilog="[bold]Examples[/]\n\n"
    "jaxcomp compress demo:smollm2 configs/smollm2_gptq_w4g64_demo.py --out out\n\n"
    "jaxcomp compress DIR recipe.py --out out steps.0.weight.bits=3 calib.samples=16\n\n"
    "jaxcomp compress DIR out/recipe.json --out again    [dim]# the very same run[/]\n\n"
    "A recipe is a Python file with a function recipe() that returns a jaxcomp.Recipe, or the "
    "recipe.json of an earlier run. A run that was killed continues at the next block when the "
    "same command is given again."
)
def compress(
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
    with _plain_errors(traceback):
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


@app.command(
    name="eval",
    epilog="[bold]Examples[/]\n\n"
    "jaxcomp eval demo:smollm2 --tokens 8184\n\n"
    "jaxcomp eval out --text my.txt --context 2048 --stride 512 --json numbers.json\n\n"
    "jaxcomp eval out --eval perplexity --eval cost\n\n"
    "Perplexities compare only at the same text, context, stride and tokens.",
)
def evaluate(
    model: Model,
    evals: Annotated[
        list[str] | None,
        typer.Option("--eval", metavar="NAME", help="perplexity or cost; may be repeated."),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            help="Text for perplexity: a .txt or .jsonl file, wiki_eval (default), wikitext2, c4, "
            "or hf:OWNER/NAME."
        ),
    ] = None,
    context: Annotated[int | None, typer.Option(help="Tokens a window. Default: 1024.")] = None,
    stride: Annotated[
        int | None, typer.Option(help="Tokens between windows. Default: windows do not overlap.")
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Predictions to score. Default: all.")] = None,
    batch: Annotated[int | None, typer.Option(help="Windows at a time. Default: 1.")] = None,
    through_cache: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Feed each window into the KV cache N tokens at a time, as decoding does. "
            "Default: whole windows.",
        ),
    ] = None,
    execution: Executed = Execution.simulated,
    json_file: Annotated[
        pathlib.Path | None, typer.Option("--json", metavar="FILE", help="Also write the numbers.")
    ] = None,
    dtype: Dtype = None,
    allow_config: Allow = None,
    traceback: Traceback = False,
) -> None:
    """Measure a model, compressed or not."""
    with _plain_errors(traceback):
        settings = dict(
            text=text,
            context=context,
            stride=stride,
            tokens=tokens,
            batch=batch,
            through_cache=through_cache,
        )
        chosen = _evaluations(evals or ["perplexity"], settings)

        from jaxcomp import job
        from jaxcomp.progress import ConsoleProgress
        from jaxcomp.report import environment, eval_table

        loaded = job.load(
            model,
            compute_dtype=dtype,
            lazy=True,
            allow_config=tuple(allow_config or ()),
            integer=execution is Execution.integer,
        )
        numbers = job.evaluate(loaded, chosen, ConsoleProgress(console))
        console.print(eval_table({}, numbers))
        if json_file:
            result = {
                "source": model,
                "execution": execution.value,
                "evals": numbers,
                "environment": environment(),
            }
            json_file.write_text(json.dumps(result, indent=2) + "\n")


@app.command(
    epilog="[bold]Examples[/]\n\n"
    "jaxcomp inspect out\n\n"
    "jaxcomp inspect demo:smollm2 --blocks\n\n"
    "jaxcomp inspect out --check    [dim]# read everything: hashes, NaN, infinity[/]"
)
def inspect(
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
    with _plain_errors(traceback):
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


@app.command(
    epilog="[bold]Examples[/]\n\n"
    "jaxcomp generate out --prompt 'The Atlantic Ocean is'\n\n"
    "jaxcomp generate out --chat --prompt 'Why is the sky blue?' --max-tokens 200"
)
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What comes before.")],
    max_tokens: Annotated[int, typer.Option(help="Stop after so many tokens.")] = 64,
    chat: Annotated[
        bool, typer.Option("--chat", help="Wrap the prompt in the model's chat template.")
    ] = False,
    execution: Executed = Execution.simulated,
    dtype: Dtype = None,
    allow_config: Allow = None,
    traceback: Traceback = False,
) -> None:
    """Continue a prompt with the most likely tokens, as they come."""
    with _plain_errors(traceback):
        from jaxcomp import job

        loaded = job.load(
            model,
            compute_dtype=dtype,
            allow_config=tuple(allow_config or ()),
            integer=execution is Execution.integer,
        )
        if not chat:
            typer.echo(prompt, nl=False)
        job.generate(
            loaded, prompt, max_tokens, chat=chat, on_text=lambda piece: typer.echo(piece, nl=False)
        )
        typer.echo()


@app.command(
    epilog="[bold]Examples[/]\n\n"
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
def study(
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
    with _plain_errors(traceback):
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


@app.command(
    epilog="[bold]Examples[/]\n\n"
    "jaxcomp compare out again/report.json\n\n"
    "jaxcomp compare grid/rows/*    [dim]# the rows of a study[/]"
)
def compare(
    reports: Annotated[
        list[str], typer.Argument(metavar="REPORT", help="Artefacts, or report.json files.")
    ],
    traceback: Traceback = False,
) -> None:
    """Show finished artefacts side by side: method, evaluations, bits, time, memory."""
    with _plain_errors(traceback):
        from jaxcomp.studies import compare_reports
        from jaxcomp.studies.table import result_table

        lines, numbers, notes = compare_reports(reports)
        console.print(result_table(lines, numbers), highlight=False)
        for note in notes:
            console.print(f"note: {note}", style="yellow", markup=False, highlight=False)


@app.command()
def info(traceback: Traceback = False) -> None:
    """Show versions, devices, the cache directory, and the names in the registries."""
    with _plain_errors(traceback):
        import jax

        import jaxcomp
        from jaxcomp.data import CORPORA
        from jaxcomp.evals import EVALS
        from jaxcomp.methods import METHODS
        from jaxcomp.models.families import FAMILIES
        from jaxcomp.report import environment

        facts = {"jaxcomp": jaxcomp.__version__} | environment()
        facts["compilation cache"] = jax.config.jax_compilation_cache_dir or "off"
        tables = {"methods": METHODS, "families": FAMILIES, "evaluations": EVALS, "texts": CORPORA}
        for name, value in [*facts.items(), *((k, ", ".join(v)) for k, v in tables.items())]:
            console.print(f"{name:<18} {value}", highlight=False, markup=False, soft_wrap=True)


@contextlib.contextmanager
def _plain_errors(traceback: bool) -> Iterator[None]:
    """What the user can mend is one line, without a traceback unless it is asked for."""
    try:
        yield
    except (ValueError, OSError, ModuleNotFoundError) as error:
        if traceback:
            raise
        errors.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from error


def _evaluations(names: list[str], settings: dict[str, Any]) -> tuple[Any, ...]:
    """Evaluations by name, each with those of the settings that it has."""
    import dataclasses

    from jaxcomp.evals import EVALS

    classes = {name.lower(): cls for name, cls in EVALS.items()}
    given, chosen, used = {k: v for k, v in settings.items() if v is not None}, [], set()
    for name in names:
        if name.lower() not in classes:
            raise ValueError(f"there is no evaluation {name!r}; there is: {', '.join(classes)}")
        cls = classes[name.lower()]
        own = {f.name for f in dataclasses.fields(cls)} & set(given)
        used |= own
        chosen.append(cls(**{key: given[key] for key in own}))
    if unused := sorted(set(given) - used):
        flag = unused[0].replace("_", "-")
        raise ValueError(f"--{flag} is no setting of {', '.join(names)}; leave it out")
    return tuple(chosen)


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


def _check_finite(model: Any) -> None:
    from jaxcomp.calibrate.stream import check_finite
    from jaxcomp.models.decoder import iter_blocks

    check_finite(model.replace(blocks=()), "outside the blocks")
    for i, block in enumerate(iter_blocks(model)):
        check_finite(block, f"block {i}")


if __name__ == "__main__":
    main()
