"""Writes the bytes of a GGUF file: keys, the table of tensors, then tensor after tensor.

Shapes and types are known before any data, so the head is written once and tensors stream behind
it. A Python value says its own type in the file: `np.uint32`, `np.float32`, `bool`, `str`, a list
of `str`, or an int32 array.

Source: the GGUF description in ggml's repository; version 3, little endian.
"""

import math
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxcomp.hub.gguf import ARRAY, MAX_NAME, STRING
from jaxcomp.hub.gguf_blocks import TYPES

ALIGNMENT = 32
UINT32, INT32, FLOAT32, BOOL = 4, 5, 6, 7  # value types
Value = np.uint32 | np.float32 | bool | str | list[str] | np.ndarray


class Entry(NamedTuple):
    """A tensor to come.

    Attributes:
      name: in the file.
      shape: slowest axis first, `[out_ch, in_ch]` for a weight.
      type: storage type, a key of `gguf_blocks.TYPES`.
    """

    name: str
    shape: tuple[int, ...]
    type: str

    @property
    def nbytes(self) -> int:
        """Bytes of its data, without padding."""
        _, block, block_bytes = TYPES[self.type]
        return math.prod(self.shape) // block * block_bytes


def write_gguf(
    path: Path,
    metadata: Mapping[str, Value],
    entries: Sequence[Entry],
    data: Iterable[tuple[str, Iterable[np.ndarray]]],
) -> None:
    """Writes a whole file and syncs it.

    Args:
      path: a new file.
      metadata: keys in the order they are to have.
      entries: the table, in the order of the data.
      data: name of each tensor and its bytes, in pieces, in the order of `entries`.

    Raises:
      ValueError: a name longer than the format allows.
      OSError: it cannot be written.
    """
    with path.open("xb") as file:
        file.write(_head(metadata, entries))
        for entry, (name, pieces) in zip(entries, data, strict=True):
            assert entry.name == name, f"{name} came where {entry.name} was due"
            _pad(file)
            start = file.tell()
            for piece in pieces:
                file.write(memoryview(np.ascontiguousarray(piece).reshape(-1).view(np.uint8)))
            assert file.tell() - start == entry.nbytes, f"{name} is not of {entry.nbytes} bytes"
        _pad(file)
        file.flush()
        os.fsync(file.fileno())


def _head(metadata: Mapping[str, Value], entries: Sequence[Entry]) -> bytes:
    """Everything before the data, whose start is padded to the alignment."""
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(entries), len(metadata))]
    for key, value in metadata.items():
        parts += [_string(key), _value(value)]
    offset = 0
    for name, shape, kind in entries:
        if len(name.encode()) > MAX_NAME:
            raise ValueError(f"tensor name {name!r} is longer than GGUF's {MAX_NAME} bytes")
        dims = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        parts += [_string(name), dims, struct.pack("<IQ", TYPES[kind][0], offset)]
        nbytes = Entry(name, shape, kind).nbytes
        offset += nbytes + -nbytes % ALIGNMENT
    return b"".join(parts)


def _pad(file) -> None:
    file.write(bytes(-file.tell() % ALIGNMENT))


def _string(text: str) -> bytes:
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Value) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<I?", BOOL, value)
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _string(value)
    if isinstance(value, np.uint32):
        return struct.pack("<II", UINT32, value)
    if isinstance(value, np.float32):
        return struct.pack("<If", FLOAT32, value)
    if isinstance(value, list):
        head = struct.pack("<IIQ", ARRAY, STRING, len(value))
        return head + b"".join(map(_string, value))
    assert value.dtype == np.int32, f"no value type for {value.dtype}"
    return struct.pack("<IIQ", ARRAY, INT32, len(value)) + value.astype("<i4").tobytes()
