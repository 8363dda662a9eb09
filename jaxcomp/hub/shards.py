"""Safetensors in shards, filled while the parts of a model come by.

What will be written is known from shapes alone, so every shard is laid out before the first block
is read, and no more than one block is ever in memory. Tensors go to shards in the order of their
names: the same model gives the same files.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxcomp.core.tensorfile import TensorSpec, TensorWriter
from jaxcomp.hub.write import write_json

SHARD_BYTES = 5 * 10**9
METADATA = {"format": "pt"}  # older versions of transformers refuse a file without it


class Entry(NamedTuple):
    """A tensor to be written: what it will be, and how it comes from its part of the model."""

    spec: TensorSpec
    make: Callable[[Any], np.ndarray]


Layout = Mapping[str, Entry]  # the tensors of one part by name


def write_shards(
    directory: Path,
    layouts: Sequence[Layout],
    parts: Iterable[Any],
    limit: int = SHARD_BYTES,
    stem: str = "model",
) -> None:
    """Writes `STEM.safetensors`, or `STEM-0000i-of-0000n.safetensors` with an index.

    Args:
      directory: exists.
      layouts: one for each part.
      parts: of the model, with arrays; each is taken once and let go.
      limit: bytes of tensors in a shard; a larger tensor has a shard of its own.

    Raises:
      ValueError: a limit below one byte.
      OSError: it cannot be written.
    """
    specs = {name: entry.spec for layout in layouts for name, entry in layout.items()}
    homes = shard_names(specs, limit, stem)
    files = {
        file: TensorWriter(
            directory / file, {n: specs[n] for n in specs if homes[n] == file}, METADATA
        )
        for file in dict.fromkeys(homes.values())
    }
    parts = iter(parts)
    for layout in layouts:
        part = next(parts)
        for name, entry in layout.items():
            files[homes[name]].write(name, entry.make(part))
        del part  # before the next one is read
    for file in files.values():
        file.finish()
    if len(files) > 1:
        total = sum(map(nbytes, specs.values()))
        index = {"metadata": {"total_size": total}, "weight_map": homes}
        write_json(directory / f"{stem}.safetensors.index.json", index)


def shard_names(specs: Mapping[str, TensorSpec], limit: int, stem: str) -> dict[str, str]:
    """Tensor name, sorted → the file it goes to."""
    if limit < 1:
        raise ValueError(f"a shard of {limit} bytes holds nothing; use at least 1")
    shard, size, number = {}, 0, 1
    for name in sorted(specs):
        wanted = nbytes(specs[name])
        if size and size + wanted > limit:
            size, number = 0, number + 1
        shard[name], size = number, size + wanted
    if number == 1:
        return dict.fromkeys(shard, f"{stem}.safetensors")
    return {name: f"{stem}-{i:05d}-of-{number:05d}.safetensors" for name, i in shard.items()}


def nbytes(spec: TensorSpec) -> int:
    """Bytes of a tensor."""
    return int(np.prod(spec.shape, dtype=np.int64)) * np.dtype(spec.dtype).itemsize
