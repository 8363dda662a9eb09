"""One GGUF file: metadata and tensor table parsed with bounds, tensors read and dequantized.

    magic "GGUF", u32 version, u64 tensor count, u64 key count
    key/values, tensor infos (name, dims fastest first, type, offset)
    padding to the alignment, then the data

Every count, length and range is checked against the file before it is used, so that a damaged file
gives a message and not an allocation. Tensors come by `pread`, a few rows at a time. The `gguf`
package is asked for block sizes and for the arithmetic of dequantization, never for the file.

Source: the GGUF description in ggml's repository; versions 2 and 3, little endian.
"""

import itertools
import math
import os
import struct
import weakref
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from jaxcomp.core.tensorfile import COPY_AGAIN, read_into

SCALARS = {  # value type → struct format
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
STRING, ARRAY = 8, 9
PLAIN = {  # tensor types that are read as they are
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
MAX_NAME, MAX_DIMS = 64, 4
SMALLEST_KEY, SMALLEST_INFO = 8 + 4 + 1, 8 + 4 + 8 + 4 + 8  # bytes


class GGUFTensor(NamedTuple):
    """An entry of the tensor table.

    Attributes:
      shape: slowest axis first, `[out_ch, in_ch]` for a weight.
      type: name of the storage type, such as "Q4_1".
      offset, nbytes: where in the file the data lies.
    """

    shape: tuple[int, ...]
    type: str
    offset: int
    nbytes: int


class GGUFFile:
    """An open GGUF file.

    Attributes:
      path: where it is.
      metadata: key → number, bool, string or list; float32 values as the shortest decimal.
      tensors: name in the file → its entry.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]

    def __init__(self, path: str | Path):
        """Parses everything but the data.

        Raises:
          OSError: the file cannot be opened.
          ValueError: it is not a whole GGUF file, or holds a type nobody here can read.
        """
        self.path = Path(path)
        self._fd = os.open(self.path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._fd)
        with open(self._fd, "rb", closefd=False) as file:
            cursor = _Cursor(file, os.fstat(self._fd).st_size, self.path)
            n_tensors, n_keys = _read_start(cursor)
            self.metadata = _read_metadata(cursor, n_keys)
            self.tensors = _read_table(cursor, n_tensors, self.metadata)

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` of a tensor along its first axis.

        Returns:
          float16 or bfloat16 if stored so, else float32. A vector is one row to GGUF: it is read
          whole and cut.
        """
        tensor = self.tensors[name]
        if len(tensor.shape) == 1:
            return self._read(name, tensor, (1, *tensor.shape), 0)[0, start:stop]
        start, stop, _ = slice(start, stop).indices(tensor.shape[0])
        shape = (max(0, stop - start), *tensor.shape[1:])
        return self._read(name, tensor, shape, start * tensor.nbytes // tensor.shape[0])

    def _read(self, name: str, tensor: GGUFTensor, shape: tuple[int, ...], skip: int) -> np.ndarray:
        what = f"{self.path}: tensor {name!r}"
        if tensor.type in PLAIN:
            out = np.empty(shape, PLAIN[tensor.type])
            read_into(self._fd, out, tensor.offset + skip, what)
            return out
        from gguf import quants

        kind, (block, block_bytes) = _storage(tensor.type)
        raw = np.empty((*shape[:-1], shape[-1] // block * block_bytes), np.uint8)
        read_into(self._fd, raw, tensor.offset + skip, what)
        return quants.dequantize(raw, kind)


class _Cursor:
    """Reads forward through the head of a file and never past its end."""

    def __init__(self, file: BinaryIO, size: int, path: Path):
        self.file, self.size, self.path, self.at = file, size, path, 0

    def take(self, n: int, what: str) -> bytes:
        self.need(n, what)
        self.at += n
        return self.file.read(n)

    def need(self, n: int, what: str) -> None:
        if n > self.size - self.at:
            raise ValueError(
                f"{self.path}: {what} needs {n} bytes from byte {self.at} on and the file has "
                f"{self.size - self.at} left; it is cut or damaged: {COPY_AGAIN}"
            )

    def number(self, layout: str, what: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout), what))[0]

    def string(self, what: str, limit: int | None = None) -> str:
        length = self.number("<Q", f"the length of {what}")
        if limit is not None and length > limit:
            raise ValueError(
                f"{self.path}: {what} before byte {self.at} is {length} bytes long and the limit "
                f"is {limit}; the file is damaged: {COPY_AGAIN}"
            )
        raw = self.take(length, what)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path}: {what} is not UTF-8: {error}; {COPY_AGAIN}") from error

    def value(self, kind: int, what: str) -> Any:
        if kind == STRING:
            return self.string(what)
        if kind == ARRAY:
            return self.array(what)
        if kind not in SCALARS:
            raise ValueError(f"{self.path}: {what} has unknown value type {kind}; {COPY_AGAIN}")
        value = self.number(SCALARS[kind], what)
        return float(str(np.float32(value))) if kind == 6 else value  # 1e-05, not 9.9999997e-06

    def array(self, what: str) -> list[Any]:
        kind = self.number("<I", f"the element type of {what}")
        count = self.number("<Q", f"the length of {what}")
        if kind == STRING:
            self.need(8 * count, f"{what}, {count} strings,")
            return [self.string(what) for _ in range(count)]
        if kind not in SCALARS:
            raise ValueError(
                f"{self.path}: {what} is an array of value type {kind}, which is not supported; "
                f"if the file should not hold one, {COPY_AGAIN}"
            )
        item = np.dtype(SCALARS[kind])
        return np.frombuffer(self.take(item.itemsize * count, what), item).tolist()


def _read_start(cursor: _Cursor) -> tuple[int, int]:
    magic = cursor.take(4, "the magic")
    if magic != b"GGUF":
        raise ValueError(
            f"{cursor.path}: the file starts with {magic!r} and a GGUF file with b'GGUF'; "
            f"{COPY_AGAIN}, or give another file"
        )
    version = cursor.number("<I", "the version")
    if version not in (2, 3):
        why = "it is big endian" if version & 0xFFFF == 0 else f"version {version} is unknown"
        raise ValueError(
            f"{cursor.path}: {why}; versions 2 and 3, little endian, are read here: convert the "
            "model again with a current llama.cpp"
        )
    n_tensors = cursor.number("<Q", "the tensor count")
    n_keys = cursor.number("<Q", "the key count")
    cursor.need(n_tensors * SMALLEST_INFO, f"a table of {n_tensors} tensors")
    cursor.need(n_keys * SMALLEST_KEY, f"metadata of {n_keys} keys")
    return n_tensors, n_keys


def _read_metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for i in range(count):
        key = cursor.string(f"metadata key {i} of {count}", limit=2**16)
        if key in metadata:
            raise ValueError(f"{cursor.path}: metadata key {key!r} appears twice; {COPY_AGAIN}")
        kind = cursor.number("<I", f"the type of {key!r}")
        metadata[key] = cursor.value(kind, f"metadata {key!r}")
    return metadata


def _read_table(cursor: _Cursor, count: int, metadata: dict[str, Any]) -> dict[str, GGUFTensor]:
    found = [_read_info(cursor, f"tensor {i} of {count}") for i in range(count)]
    align = metadata.get("general.alignment", 32)
    if type(align) is not int or align < 1 or align & (align - 1):
        raise ValueError(
            f"{cursor.path}: general.alignment={align!r} must be a power of two; {COPY_AGAIN}"
        )
    data = -(-cursor.at // align) * align
    tensors: dict[str, GGUFTensor] = {}
    for name, shape, kind, offset in found:
        if name in tensors:
            raise ValueError(f"{cursor.path}: tensor {name!r} appears twice; {COPY_AGAIN}")
        if offset % align:
            raise ValueError(
                f"{cursor.path}: tensor {name!r} starts at byte {offset} of the data, which is no "
                f"multiple of the alignment {align}; {COPY_AGAIN}"
            )
        block, block_bytes = _check_type(cursor.path, name, kind)
        if shape[-1] % block:
            raise ValueError(
                f"{cursor.path}: tensor {name!r} of shape {list(shape)} is stored as {kind}, whose "
                f"blocks of {block} do not divide its rows of {shape[-1]}; {COPY_AGAIN}"
            )
        nbytes = math.prod(shape) // block * block_bytes
        begin, end = data + offset, data + offset + nbytes
        if end > cursor.size:
            raise ValueError(
                f"{cursor.path}: tensor {name!r} ({kind}, shape {list(shape)}) takes bytes {begin} "
                f"to {end} and the file ends at {cursor.size}; it is cut: {COPY_AGAIN}"
            )
        tensors[name] = GGUFTensor(shape, kind, begin, nbytes)
    _check_overlap(cursor.path, tensors)
    return tensors


def _read_info(cursor: _Cursor, what: str) -> tuple[str, tuple[int, ...], str, int]:
    name = cursor.string(f"the name of {what}", limit=MAX_NAME)
    n_dims = cursor.number("<I", f"the axes of {name!r}")
    if not 1 <= n_dims <= MAX_DIMS:
        raise ValueError(
            f"{cursor.path}: tensor {name!r} has {n_dims} axes and 1 to {MAX_DIMS} are possible; "
            f"{COPY_AGAIN}"
        )
    dims = [cursor.number("<Q", f"the shape of {name!r}") for _ in range(n_dims)]
    kind = cursor.number("<I", f"the type of {name!r}")
    offset = cursor.number("<Q", f"the offset of {name!r}")
    if not all(dims):
        raise ValueError(f"{cursor.path}: tensor {name!r} has an axis of length 0; {COPY_AGAIN}")
    return name, tuple(reversed(dims)), _type_name(cursor.path, name, kind), offset


def _check_overlap(path: Path, tensors: dict[str, GGUFTensor]) -> None:
    order = sorted(tensors, key=lambda name: tensors[name].offset)
    for a, b in itertools.pairwise(order):
        end = tensors[a].offset + tensors[a].nbytes
        if tensors[b].offset < end:
            raise ValueError(
                f"{path}: tensors {a!r} and {b!r} overlap: the first ends at byte {end} and the "
                f"second starts at {tensors[b].offset}; {COPY_AGAIN}"
            )


def _type_name(path: Path, name: str, kind: int) -> str:
    from gguf import GGMLQuantizationType

    try:
        return GGMLQuantizationType(kind).name
    except ValueError as error:
        raise ValueError(
            f"{path}: tensor {name!r} has storage type {kind}, which the installed gguf package "
            "does not know; upgrade it (pip install -U gguf), or copy the file again"
        ) from error


def _storage(kind: str) -> tuple[Any, tuple[int, int]]:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    member = GGMLQuantizationType[kind]
    return member, GGML_QUANT_SIZES[member]


def _check_type(path: Path, name: str, kind: str) -> tuple[int, int]:
    """Elements and bytes of a block of a type that can be dequantized."""
    from gguf import quants

    member, (block, block_bytes) = _storage(kind)
    if kind not in PLAIN:
        try:
            quants.dequantize(np.zeros((1, block_bytes), np.uint8), member)
        except NotImplementedError as error:
            raise ValueError(
                f"{path}: tensor {name!r} is stored as {kind}, which the installed gguf package "
                "cannot dequantize; upgrade it (pip install -U gguf), or take another file"
            ) from error
    return block, block_bytes
