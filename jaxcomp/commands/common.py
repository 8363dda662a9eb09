"""What the commands share: consoles, options that recur, and errors as one line."""

import contextlib
import enum
from collections.abc import Iterator
from typing import Annotated

import rich.console
import typer

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


@contextlib.contextmanager
def plain_errors(traceback: bool) -> Iterator[None]:
    """What the user can mend is one line, without a traceback unless it is asked for."""
    try:
        yield
    except (ValueError, OSError, ModuleNotFoundError) as error:
        if traceback:
            raise
        errors.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from error
