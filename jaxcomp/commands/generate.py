"""`jaxcomp generate`: the continuation of a prompt."""

from typing import Annotated

import typer

from jaxcomp.commands.common import (
    Allow,
    Dtype,
    Executed,
    Execution,
    Model,
    Traceback,
    plain_errors,
)

EPILOG = (
    "[bold]Examples[/]\n\n"
    "jaxcomp generate out --prompt 'The Atlantic Ocean is'\n\n"
    "jaxcomp generate out --chat --prompt 'Why is the sky blue?' --max-tokens 200"
)


def run(
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
    with plain_errors(traceback):
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
