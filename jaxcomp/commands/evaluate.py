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
    "Perplexities compare only at the same text, context, stride and tokens."
)


def run(
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
    with plain_errors(traceback):
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
