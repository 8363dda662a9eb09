"""`export`: a model in a format that other programs load.

    source ─job.load─▶ Decoder (blocks behind handles), config, tokenizer, companions
    format.check  ─▶ refuses what the format cannot say, before a block is read
    format.write  ─▶ a temporary sibling of OUT, one block in memory at a time
    model card, checksums ─▶ synced, renamed to OUT

A format is a module with
    LOAD: str                              how to load the result, with `{out}` for the place
    check(model, hf_config) -> None        raises ValueError with the reason
    write(source, out, **options)          fills the existing directory `out`; its options are
                                           keyword-only; gives back what the user should know, as
                                           sentences, or None
"""

import dataclasses
import inspect
import json
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import rich.console

import jaxcomp
from jaxcomp import artefact, job
from jaxcomp.core.files import new_directory
from jaxcomp.hub import ascend, compressed_tensors, dense, gguf_write
from jaxcomp.hub.card import Origin, find_origin, model_card
from jaxcomp.hub.directory import COMPANIONS
from jaxcomp.hub.locate import locate
from jaxcomp.hub.write import CARD, ExportSource, check_output, write_checksums
from jaxcomp.models.decoder import Decoder
from jaxcomp.progress import ConsoleProgress

OTHER_COMPANIONS = ("generation_config.json", "preprocessor_config.json")
TOKENIZER_FILES = tuple(name for name in COMPANIONS if name not in OTHER_COMPANIONS)

FORMATS: dict[str, ModuleType] = {
    "hf": dense,
    "compressed-tensors": compressed_tensors,
    "gguf": gguf_write,
    "ascend": ascend,
}


@dataclasses.dataclass(frozen=True)
class Exported:
    """What `export` did: the place, how to load it, and what its user should know."""

    out: Path
    load: str
    notes: tuple[str, ...] = ()


def export(
    source: str | Path,
    format: str,
    out: str | Path,
    *,
    overwrite: bool = False,
    allow_config: Iterable[str] = (),
    console: rich.console.Console | None = None,
    **options: Any,
) -> Exported:
    """Writes the model at `source` as the directory `out` in another format.

    Args:
      source: an artefact, or any checkpoint that `job.load` opens.
      format: a name in FORMATS.
      out: absent, empty, or with `overwrite` an older export.
      overwrite: replace an older export once the new one is complete.
      allow_config: unknown config fields that the caller vouches change nothing.
      console: shows progress; None is silent.
      options: of the format's `write`.

    Raises:
      ValueError: not a model or a damaged one; a format or an option that does not exist; a model
        that the format cannot say, with the formats that can.
      OSError: it cannot be written; nothing is left behind.
    """
    writer = FORMATS.get(format)
    if writer is None:
        raise ValueError(f"there is no format {format!r}; there is {', '.join(FORMATS)}")
    known = inspect.getfullargspec(writer.write).kwonlyargs
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(
            f"{unknown[0]} is no option of {format}; it has {', '.join(known) or 'none'}"
        )
    out, progress = Path(out).absolute(), ConsoleProgress(console)
    check_output(out, overwrite)
    with tempfile.TemporaryDirectory() as scratch:
        opened = open_source(source, Path(scratch), allow_config)
        check(format, opened.model, opened.hf_config)
        origin, recipe, report = history(source)
        total = len(opened.model.blocks)
        each = lambda blocks: progress.each(blocks, f"export {format}", total)  # noqa: E731
        files = {**origin.files, **opened.files}
        with new_directory(out, replace=overwrite) as place:
            opened = dataclasses.replace(opened, each=each, files=files)
            notes = tuple(writer.write(opened, place, **options) or ())
            card = model_card(
                f"{origin.name or Path(source).name}, {format}",
                origin,
                f"jaxcomp {jaxcomp.__version__}",
                writer.LOAD.format(out=out.name),
                notes,
                ("jaxcomp", format),
                recipe,
                report,
            )
            (place / CARD).write_text(card, encoding="utf-8")
            write_checksums(place)
    return Exported(out, writer.LOAD.format(out=out), notes)


def history(source: str | Path) -> tuple[Origin, dict[str, Any] | None, dict[str, Any] | None]:
    """Where a model is from, with the recipe and the report of an artefact."""
    if not artefact.is_artefact(source):
        return find_origin(str(source)), None, None
    there = artefact.read_manifest(source)["files"]
    recipe, report = (
        artefact.read_json(source, name) if name in there else None
        for name in ("recipe.json", "report.json")
    )
    return find_origin((report or {}).get("source", str(source))), recipe, report


def check(format: str, model: Decoder, hf_config: dict[str, Any]) -> None:
    """Refuses a model that `format` cannot say.

    Raises:
      ValueError: the format's reason, and the formats that can.
    """
    try:
        FORMATS[format].check(model, hf_config)
    except ValueError as error:
        others = [name for name in FORMATS if name != format and _can(name, model, hf_config)]
        instead = f"formats that can: {', '.join(others)}" if others else "no other format can"
        raise ValueError(f"{format} cannot hold this model: {error}; {instead}") from error


def _can(format: str, model: Decoder, hf_config: dict[str, Any]) -> bool:
    try:
        FORMATS[format].check(model, hf_config)
    except ValueError:
        return False
    return True


def open_source(
    source: str | Path, scratch: Path, allow_config: Iterable[str] = ()
) -> ExportSource:
    """Opens a model with all that a writer may want beside it; files it makes are in `scratch`.

    Raises:
      ValueError: not a model, a damaged one, or an artefact without a `config.json`.
    """
    loaded = job.load(source, lazy=True, allow_config=allow_config)
    files = _on_disk(loaded.files, scratch / "files")
    if "config.json" not in files:
        raise ValueError(
            f"{source} has no config.json, so nothing says which class of other libraries it is; "
            "make it with `jaxcomp compress`, or put the model's config.json in with "
            "artefact.save(…, files=…)"
        )
    config = json.loads(files.pop("config.json").read_text(encoding="utf-8"))
    tokenizer = scratch / "tokenizer"
    if artefact.is_artefact(source):
        shutil.copytree(Path(source) / "tokenizer", tokenizer)
        _known_to_all(tokenizer / "tokenizer_config.json")
    elif (place := locate(source)).is_dir():
        tokenizer.mkdir()
        for name in TOKENIZER_FILES:
            if (place / name).is_file():
                shutil.copyfile(place / name, tokenizer / name)
    else:
        loaded.tokenizer.save_pretrained(tokenizer)
        _known_to_all(tokenizer / "tokenizer_config.json")
    return ExportSource(loaded.model, config, tokenizer, files)


def _known_to_all(path: Path) -> None:
    """Gives a tokenizer that we saved the class name that transformers before 5 know, too."""
    if path.is_file():
        path.write_text(
            path.read_text().replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"')
        )


def _on_disk(files: dict[str, bytes | Path], scratch: Path) -> dict[str, Path]:
    scratch.mkdir()
    found = {}
    for name, content in files.items():
        if isinstance(content, bytes):
            (scratch / name).write_bytes(content)
        found[name] = scratch / name if isinstance(content, bytes) else Path(content)
    return found
