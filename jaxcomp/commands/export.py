"""`jaxcomp export`: a model in a format that other programs load."""

import pathlib
import re
from typing import Annotated

import typer

from jaxcomp.commands.common import Allow, Model, Traceback, console, plain_errors

EPILOG = (
    "[bold]Examples[/]\n\n"
    "jaxcomp export out --format compressed-tensors --out out-ct  [dim]# vLLM[/]\n\n"
    "jaxcomp export out --format gguf --out out-gguf  [dim]# llama.cpp[/]\n\n"
    "jaxcomp export out --format hf --dtype bfloat16 --out out-hf  [dim]# dense[/]\n\n"
    "jaxcomp export demo:smollm2 --format hf --out smollm2\n\n"
    "hf dequantizes, and multiplies online transforms back into the weights. compressed-tensors "
    "and gguf move the codes as they are. ascend is what vllm-ascend runs, Kronecker transforms "
    "included. A model that a format cannot say is refused, with the reason and the formats that "
    "can.\n\n"
    "DIR gets the weights, the tokenizer, a model card with what was measured, and checksums.json "
    "with the SHA-256 of every file."
)
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def run(
    model: Model,
    format: Annotated[
        str, typer.Option("--format", "-f", help="hf, compressed-tensors, gguf or ascend.")
    ],
    out: Annotated[
        pathlib.Path, typer.Option("--out", "-o", metavar="DIR", help="To write; new or empty.")
    ],
    dtype: Annotated[
        str | None,
        typer.Option(
            help="hf, compressed-tensors, ascend: float32, bfloat16 or float16 for all that is "
            "stored in floats. Default: what it has; scales float32."
        ),
    ] = None,
    dense: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            help="gguf: F32, F16, BF16 or Q8_0 for what is not quantized. Default: what it has.",
        ),
    ] = None,
    clip_ratio: Annotated[
        str | None,
        typer.Option(
            metavar="HOW",
            help="ascend: 'mean' writes one clip factor where two were fitted. Default: refuse.",
        ),
    ] = None,
    shard_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Largest weight file, such as 500MB. Default: 5GB; ascend 4GB."
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an older export once this one is whole.")
    ] = False,
    allow_config: Allow = None,
    traceback: Traceback = False,
) -> None:
    """Write a model in a format that other programs load."""
    with plain_errors(traceback):
        options = {"dtype": dtype, "dense": dense, "clip_ratio": clip_ratio, "shard_size": None}
        if shard_size is not None:
            options["shard_size"] = parse_size(shard_size)

        from jaxcomp.export import export

        done = export(
            model,
            format,
            out,
            overwrite=overwrite,
            allow_config=tuple(allow_config or ()),
            console=console,
            **{name: value for name, value in options.items() if value is not None},
        )
        sizes = [path.stat().st_size for path in done.out.rglob("*") if path.is_file()]
        plain = dict(markup=False, highlight=False, soft_wrap=True)
        console.print(f"wrote {out}: {len(sizes)} files, {sum(sizes) / 1e6:,.1f} MB", **plain)
        for note in done.notes:
            console.print(f"note: {note}", style="yellow", **plain)
        console.print(f"load it with: {done.load}", **plain)


def parse_size(text: str) -> int:
    """Bytes of a size such as 5GB, 500MB or 1000000.

    Raises:
      ValueError: it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]B)?", text.strip().upper())
    if not found:
        raise ValueError(f"--shard-size {text!r} is no size; give one such as 5GB, 500MB or 100000")
    return int(float(found[1]) * UNITS[found[2] or ""])
