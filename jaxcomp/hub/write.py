"""What every writer needs: what it is given, and the files beside the weights.

    OUT/  weights and config.json         by the writer of the format
          tokenizer, generation config    carried over unchanged
          README.md                       the model card
          checksums.json                  every file's size and SHA-256, every tensor's CRC-32

No format finds a flipped bit in a tensor by itself, so the side file is part of every export.
"""

import dataclasses
import json
import math
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxcomp.core.files import read_sealed, sha256_file, write_sealed
from jaxcomp.core.tensorfile import TensorFile
from jaxcomp.models.decoder import Block, Decoder, load_block

CHECKSUMS = "checksums.json"
FORMAT, VERSION = "jaxcomp-export", 1
CARD = "README.md"
STEP = 2**24  # bytes of a tensor read at a time


@dataclasses.dataclass(frozen=True, eq=False)
class ExportSource:
    """A model on its way into another format.

    Attributes:
      model: blocks may be behind handles.
      hf_config: the `config.json` it came from.
      tokenizer: a directory with the tokenizer's files and nothing else.
      files: what else a Hugging Face directory has beside the weights, terms of use among it.
      each: what the blocks or their handles are drawn through, for a progress bar.
    """

    model: Decoder
    hf_config: dict[str, Any]
    tokenizer: Path
    files: dict[str, Path]
    each: Callable[[Iterable[Any]], Iterator[Any]] = iter

    def blocks(self) -> Iterator[Block]:
        """The blocks in order, each in memory only while its user holds it."""
        return map(load_block, self.each(self.model.blocks))


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes an object the way Hugging Face's libraries do."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_companions(source: ExportSource, out: Path) -> None:
    """Copies the tokenizer and the other companions into a Hugging Face directory."""
    for file in source.tokenizer.rglob("*"):
        if file.is_file():
            target = out / file.relative_to(source.tokenizer)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    for name, file in source.files.items():
        shutil.copyfile(file, out / name)


def write_checksums(directory: Path) -> None:
    """Describes the finished files of an export in `checksums.json`, as they lie on disk."""
    names = sorted(_files_in(directory))
    files = {
        name: {"bytes": (directory / name).stat().st_size, "sha256": sha256_file(directory / name)}
        for name in names
    }
    tensors = {}
    for name in names:
        if name.endswith(".safetensors"):
            tensors |= _tensor_checks(directory / name)
    head = {"format": FORMAT, "version": VERSION}
    write_sealed(directory / CHECKSUMS, head | {"files": files, "tensors": tensors})


def verify_checksums(directory: Path) -> int:
    """Reads an export and compares it with its `checksums.json`; returns the number of files.

    Raises:
      ValueError: something is missing or has changed; the message names the file, and the tensor
        where there is one.
    """
    known, again = read_checksums(directory), "copy the directory again or export again"
    if missing := [name for name in known["files"] if not (directory / name).is_file()]:
        raise ValueError(f"{directory} lacks {', '.join(missing[:3])}; {again}")
    for name, wanted in known["files"].items():
        path = directory / name
        if path.stat().st_size != wanted["bytes"]:
            found = path.stat().st_size
            raise ValueError(f"{path} has {found} bytes instead of {wanted['bytes']}; {again}")
        if sha256_file(path) == wanted["sha256"]:
            continue
        where = ""
        if name.endswith(".safetensors"):
            found = _tensor_checks(path)
            changed = [n for n, check in found.items() if known["tensors"].get(n) != check]
            where = f" in tensor {changed[0]!r}" if changed else " in its header"
        raise ValueError(f"{path} has changed{where}: its sha256 is not the one stored; {again}")
    return len(known["files"])


def read_checksums(directory: Path) -> dict[str, Any]:
    """The side file of an export.

    Raises:
      ValueError: there is none, it is damaged, or a later version wrote it.
    """
    path = Path(directory) / CHECKSUMS
    if not path.is_file():
        raise ValueError(f"{directory} is no export: it has no {CHECKSUMS}")
    known = read_sealed(path)
    if (known.get("format"), known.get("version")) != (FORMAT, VERSION):
        found = f"{known.get('format')!r} {known.get('version')!r}"
        raise ValueError(f"{path} is {found}; known is {FORMAT!r} {VERSION}: export again")
    return known


def check_output(path: Path, overwrite: bool = False) -> None:
    """Refuses a place where an export would destroy something else.

    Raises:
      ValueError: `path` is a file; or holds something that is not an export; or an export and
        `overwrite` is False.
    """
    if not path.exists():
        return
    if not path.is_dir():
        raise ValueError(f"{path} is a file; name a directory that is new, empty or an export")
    names = sorted(_files_in(path))
    if not names:
        return
    try:
        foreign = set(names) - set(read_checksums(path)["files"])
    except ValueError:
        foreign = set(names)
    if foreign:
        shown = ", ".join(sorted(foreign)[:3]) + (", …" if len(foreign) > 3 else "")
        raise ValueError(
            f"{path} holds {shown}, which no export put there; nothing is touched: choose another "
            "directory or empty this one"
        )
    if not overwrite:
        raise ValueError(
            f"{path} holds an export already; use overwrite=True (--overwrite) to replace it, or "
            "choose another directory"
        )


def _files_in(directory: Path) -> list[str]:
    files = (p.relative_to(directory).as_posix() for p in directory.rglob("*") if not p.is_dir())
    return [name for name in files if name != CHECKSUMS]


def _tensor_checks(path: Path) -> dict[str, dict[str, Any]]:
    """Name → file, dtype, shape and CRC-32 of the bytes, for every tensor of a file."""
    file, found = TensorFile(path), {}
    for name, spec in file.specs.items():
        crc = 0
        for rows in _rows(file, name):
            crc = zlib.crc32(np.ascontiguousarray(rows).reshape(-1).view(np.uint8), crc)
        shape = list(spec.shape)
        found[name] = dict(file=path.name, dtype=str(spec.dtype), shape=shape, crc32=f"{crc:08x}")
    return found


def _rows(file: TensorFile, name: str) -> Iterator[np.ndarray]:
    shape, dtype = file.specs[name]
    if not shape:
        yield file.read(name)
        return
    step = max(1, STEP // max(1, math.prod(shape[1:]) * dtype.itemsize))
    for start in range(0, shape[0], step):
        yield file.rows(name, start, start + step)
