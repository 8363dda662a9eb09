"""Safetensors in shards, filled while the blocks of a model come by.

What will be written is known from shapes alone, so every shard is laid out before the first block
is read and no more than one block is ever in memory. Tensors go to shards in the order of their
names: the same model gives the same files.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from jaxcomp.core.tensorfile import TensorSpec, TensorWriter
from jaxcomp.hub.write import write_json

SHARD_BYTES = 5 * 10**9
METADATA = {"format": "pt"}  # older versions of transformers refuse a file without it


def write_shards(
    directory: Path,
    specs: Mapping[str, TensorSpec],
    tensors: Iterable[tuple[str, np.ndarray]],
    limit: int = SHARD_BYTES,
    stem: str = "model",
) -> None:
    """Writes `STEM.safetensors`, or `STEM-0000i-of-0000n.safetensors` with an index.

    Args:
      directory: exists.
      specs: every tensor.
      tensors: each of them once, in any order.
      limit: bytes of tensors in a shard; a larger tensor has a shard of its own.

    Raises:
      OSError: it cannot be written.
    """
    homes = shard_names(specs, limit, stem)
    parts: dict[str, dict[str, TensorSpec]] = {}
    for name, file in homes.items():
        parts.setdefault(file, {})[name] = specs[name]
    files = {file: TensorWriter(directory / file, part, METADATA) for file, part in parts.items()}
    for name, array in tensors:
        files[homes[name]].write(name, array)
    for file in files.values():
        file.finish()
    if len(files) > 1:
        total = sum(map(nbytes, specs.values()))
        index = {"metadata": {"total_size": total}, "weight_map": homes}
        write_json(directory / f"{stem}.safetensors.index.json", index)


def shard_names(specs: Mapping[str, TensorSpec], limit: int, stem: str = "model") -> dict[str, str]:
    """Tensor name, sorted → the file it goes to.

    Raises:
      ValueError: a limit below one byte.
    """
    if limit < 1:
        raise ValueError(f"a shard of {limit} bytes holds nothing; use at least 1")
    shard, size, number = {}, 0, 1
    for name in sorted(specs):
        bytes_here = nbytes(specs[name])
        if size and size + bytes_here > limit:
            size, number = 0, number + 1
        shard[name], size = number, size + bytes_here
    if number == 1:
        return dict.fromkeys(shard, f"{stem}.safetensors")
    return {name: f"{stem}-{i:05d}-of-{number:05d}.safetensors" for name, i in shard.items()}


def nbytes(spec: TensorSpec) -> int:
    """Bytes of a tensor."""
    return int(np.prod(spec.shape, dtype=np.int64)) * np.dtype(spec.dtype).itemsize
