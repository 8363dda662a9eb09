"""`jaxcomp generate`: continuations of prompts, or a chat."""

import json
import pathlib
import sys
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
    errors,
    plain_errors,
)

EPILOG = (
    "[bold]Examples[/]\n\n"
    "jaxcomp generate out --prompt 'The Atlantic Ocean is'\n\n"
    "jaxcomp generate out --chat --prompt 'Why is the sky blue?' --max-tokens 200\n\n"
    "jaxcomp generate out --chat --system 'Answer in rhymes.'    [dim]# a session[/]\n\n"
    "jaxcomp generate out -p 'Once upon' --temperature 0.8 --top-p 0.95 --seed 7 --stats\n\n"
    "jaxcomp generate out --prompts questions.jsonl --chat --batch 16 --out answers.jsonl\n\n"
    "In a chat, /new forgets what was said, /exit or the end of the input ends it, and Ctrl-C "
    "interrupts an answer. Without a temperature the most likely token is taken."
)
FILTERS = ("top_k", "top_p", "min_p", "seed")  # which change nothing where nothing is drawn


def run(
    model: Model,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="What comes before; may be repeated.")
    ] = None,
    prompts: Annotated[
        pathlib.Path | None,
        typer.Option(
            metavar="FILE",
            help='Prompts, one a line; of a .jsonl file one JSON text or {"prompt": …} a line.',
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(help="Stop after so many tokens. Default: 64; in a session, no limit."),
    ] = None,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat",
            help="Prompts are a user's messages, in the model's chat template; without a prompt, a "
            "session that reads them from the terminal.",
        ),
    ] = False,
    system: Annotated[
        str | None, typer.Option(help="What comes before the first message of a chat.")
    ] = None,
    temperature: Annotated[
        float, typer.Option(help="Draw tokens, from logits divided by this. 0: take the likeliest.")
    ] = 0.0,
    top_k: Annotated[
        int | None, typer.Option(help="Draw from so many of the likeliest tokens.")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Draw from the fewest likeliest tokens whose probabilities reach this."),
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(help="Draw from tokens at least so likely, as a share of the likeliest one."),
    ] = None,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1: prefer tokens that have not been seen.")
    ] = 1.0,
    seed: Annotated[
        int | None, typer.Option(help="Of the random numbers. Default: 0; the same text each time.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Prompts at a time.")] = 8,
    out: Annotated[
        pathlib.Path | None,
        typer.Option(
            metavar="FILE", help="Write JSON lines: prompt, text, ids, stop, prompt_tokens."
        ),
    ] = None,
    stats: Annotated[
        bool, typer.Option("--stats", help="Say at the end how fast it was and what it took.")
    ] = False,
    execution: Executed = Execution.simulated,
    dtype: Dtype = None,
    allow_config: Allow = None,
    traceback: Traceback = False,
) -> None:
    """Continue prompts, or chat: the text appears as it is generated."""
    with plain_errors(traceback):
        filters = dict(zip(FILTERS, (top_k, top_p, min_p, seed), strict=True))
        given = {name: value for name, value in filters.items() if value is not None}
        if given and temperature == 0:
            flag = next(iter(given)).replace("_", "-")
            raise ValueError(
                f"--{flag} is for tokens that are drawn, and at temperature 0 the likeliest is "
                "taken; add --temperature 0.8, for example"
            )
        if not (prompt or prompts or chat):
            raise ValueError("there is no prompt; give --prompt, --prompts FILE or --chat")
        if out is not None and not (prompt or prompts):
            raise ValueError("--out is for prompts that are given, and a session has none")
        if system is not None and not chat:
            raise ValueError("--system is part of a chat; add --chat")

        from jaxcomp import job
        from jaxcomp.data.prompts import read_prompts
        from jaxcomp.models.sampling import Sampling

        sampling = Sampling(temperature, repetition_penalty=repetition_penalty, **given)
        texts = [*(prompt or []), *(read_prompts(prompts) if prompts else [])]
        loaded = job.load(
            model,
            compute_dtype=dtype,
            allow_config=tuple(allow_config or ()),
            integer=execution is Execution.integer,
            lazy=True,  # blocks go from disk into the kernels' form one by one
        )
        options: dict[str, Any] = dict(system=system, sampling=sampling)
        if not texts:
            speed = _session(loaded, max_tokens, options)
        else:
            options |= dict(chat=chat, batch=batch)
            speed = _complete(loaded, texts, max_tokens or 64, options, out)
        if stats and speed is not None:
            console.print(_stats_table(speed))


def _complete(
    loaded: Any, texts: list[str], max_tokens: int, options: dict[str, Any], out: Any
) -> Any:
    """Writes what follows each prompt to the terminal, or to a file; returns the speed."""
    import dataclasses

    from jaxcomp.completion import complete
    from jaxcomp.models.generate import Speed

    single = len(texts) == 1 and out is None
    if single and not options["chat"]:
        typer.echo(texts[0], nl=False)
    show = (lambda piece: typer.echo(piece, nl=False)) if single else None
    done = complete(loaded, texts, max_tokens, **options, on_text=show)
    total, count = Speed(), 0
    with open(out, "w", encoding="utf-8") if out else _nothing() as file:
        for completions, speed in done:
            total, count = total + speed, count + len(completions)
            for found in completions:
                if file is not None:
                    line = json.dumps(dataclasses.asdict(found), ensure_ascii=False)
                    file.write(line + "\n")
                elif not single:
                    _show(found, options["chat"])
            if file is not None:
                file.flush()
                errors.print(f"{count} of {len(texts)} prompts", highlight=False)
    if single:
        typer.echo()
    return total


def _nothing() -> Any:
    import contextlib

    return contextlib.nullcontext()


def _show(found: Any, chat: bool) -> None:
    """One of several completions, under its prompt."""
    if chat:
        console.rule(found.prompt.splitlines()[0], align="left", style="dim")
        typer.echo(found.text)
    else:
        console.rule(style="dim")
        typer.echo(found.prompt + found.text)


def _session(loaded: Any, max_tokens: int | None, options: dict[str, Any]) -> Any:
    """Reads messages from the terminal and answers them until there are none; returns the speed."""
    from jaxcomp.completion import Chat
    from jaxcomp.models.generate import Speed

    talk, total = Chat(loaded, **options), Speed()
    terminal = sys.stdin.isatty()
    while True:
        if terminal:
            console.print("[bold]>[/] ", end="")
        line = sys.stdin.readline()
        said = line.strip()
        if not line or said == "/exit":
            return total
        if said == "/new":
            talk.forget()
        elif said:
            total += _answer(talk, said, max_tokens)


def _answer(talk: Any, said: str, max_tokens: int | None) -> Any:
    """Shows the answer to a message; one that fails or is interrupted is not kept."""
    from jaxcomp.models.generate import Speed

    speed = Speed()
    try:
        _, speed = talk.say(said, max_tokens, lambda piece: typer.echo(piece, nl=False))
    except KeyboardInterrupt:
        errors.print("\ninterrupted; this message is forgotten", style="yellow")
    except ValueError as error:
        hint = "; /new forgets what was said" if "context" in str(error) else ""
        errors.print(f"error: {error}{hint}", style="red", markup=False, soft_wrap=True)
    typer.echo()
    return speed


def _stats_table(speed: Any) -> Any:
    from jaxcomp.models.sizes import peak_rss
    from jaxcomp.report.table import plain_table

    table = plain_table("", "", "")
    table.show_header = False
    rate = f"{speed.decode_tokens / speed.decode_seconds:.1f}" if speed.decode_tokens else "-"
    table.add_row("prompt tokens", f"{speed.prompt_tokens:,}")
    table.add_row("new tokens", f"{speed.new_tokens:,}")
    table.add_row("time to the first token, s", f"{speed.first_token_seconds:.2f}")
    table.add_row("decode tokens/s, all sequences", rate)
    table.add_row("compilations", f"{speed.compilations}")
    table.add_row("time they took, s", f"{speed.compile_seconds:.1f}")
    table.add_row("peak memory, MB", f"{peak_rss() / 1e6:,.0f}")
    return table
