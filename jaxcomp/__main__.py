"""The command line: its commands, each a file in `jaxcomp.commands`."""

import logging
import os
from typing import Annotated

import typer

from jaxcomp.commands import (
    bench,
    compare,
    compress,
    evaluate,
    export,
    generate,
    info,
    inspect,
    lm_eval,
    report,
    study,
)
from jaxcomp.commands.common import console

app = typer.Typer(
    name="jaxcomp",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

COMMANDS = {
    "compress": compress,
    "eval": evaluate,
    "lm-eval": lm_eval,
    "inspect": inspect,
    "generate": generate,
    "bench": bench,
    "export": export,
    "study": study,
    "compare": compare,
    "report": report,
    "info": info,
}
for name, module in COMMANDS.items():
    app.command(name, epilog=getattr(module, "EPILOG", None))(module.run)


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


if __name__ == "__main__":
    main()
