"""One safetensors file: a header that is checked as a whole, tensors that are read one at a time.

    0..7      N, unsigned 64-bit little endian
    8..8+N    JSON {"__metadata__": {str: str}, name: {"dtype", "shape", "data_offsets": [b, e]}, …}
    8+N..     the bytes of the tensors, row-major, little endian, without gaps or overlap

Tensors come by `pread` into arrays of their own and never by mmap: pages touched through a map
count as memory, and a file that shrinks under a map kills the process.

Source: the format description of the safetensors package; what it refuses is refused here, with
the file, the tensor, what was expected and what was found. A flipped bit in the data is seen by
neither: a manifest with hashes is for that.
"""

import json
import math
import os
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

MAX_HEADER = 100_000_000  # bytes; the limit of the reference reader
DTYPES: dict[str, tuple[np.dtype, int]] = {  # name in the header → (type, bits an element)
    "BOOL": (np.dtype(bool), 8),
    "F4": (np.dtype(ml_dtypes.float4_e2m1fn), 4),
    "F6_E2M3": (np.dtype(ml_dtypes.float6_e2m3fn), 6),
    "F6_E3M2": (np.dtype(ml_dtypes.float6_e3m2fn), 6),
    "U8": (np.dtype(np.uint8), 8),
    "I8": (np.dtype(np.int8), 8),
    "F8_E5M2": (np.dtype(ml_dtypes.float8_e5m2), 8),
    "F8_E4M3": (np.dtype(ml_dtypes.float8_e4m3fn), 8),
    "F8_E8M0": (np.dtype(ml_dtypes.float8_e8m0fnu), 8),
    "F8_E4M3FNUZ": (np.dtype(ml_dtypes.float8_e4m3fnuz), 8),
    "F8_E5M2FNUZ": (np.dtype(ml_dtypes.float8_e5m2fnuz), 8),
    "I16": (np.dtype(np.int16), 16),
    "U16": (np.dtype(np.uint16), 16),
    "F16": (np.dtype(np.float16), 16),
    "BF16": (np.dtype(ml_dtypes.bfloat16), 16),
    "I32": (np.dtype(np.int32), 32),
    "U32": (np.dtype(np.uint32), 32),
    "F32": (np.dtype(np.float32), 32),
    "C64": (np.dtype(np.complex64), 64),
    "F64": (np.dtype(np.float64), 64),
    "I64": (np.dtype(np.int64), 64),
    "U64": (np.dtype(np.uint64), 64),
}
WRITTEN = {dtype: name for name, (dtype, bits) in DTYPES.items() if bits % 8 == 0}
COPY_AGAIN = "copy or download the file again"


class TensorSpec(NamedTuple):
    """What a tensor is before it is read."""

    shape: tuple[int, ...]
    dtype: np.dtype


class TensorFile:
    """An open safetensors file.

    Attributes:
      path: where it is.
      specs: shape and dtype of every tensor, in the order of their bytes.
      metadata: the file's own strings.

    The file stays open for the life of the object, so a file put in its place does not mix with it.
    """

    path: Path
    specs: dict[str, TensorSpec]
    metadata: dict[str, str]

    def __init__(self, path: str | Path):
        """Reads and checks the header.

        Raises:
          OSError: the file cannot be opened.
          ValueError: it is not a whole safetensors file; the message says where and what to do.
        """
        self.path = Path(path)
        self._fd = os.open(self.path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._fd)
        header, self._data = _read_header(self._fd, self.path)
        self.metadata = _metadata(header.pop("__metadata__", None), self.path)
        size = os.fstat(self._fd).st_size - self._data
        spans = _spans(header, size, self.path)
        self.specs = {name: spec for name, (spec, _) in spans.items()}
        self._begin = {name: begin for name, (_, begin) in spans.items()}

    def read(self, name: str) -> np.ndarray:
        """The tensor `name`.

        Raises:
          KeyError: no such tensor.
          ValueError: its elements are narrower than a byte, or the file has shrunk.
        """
        return self._read(name, self._spec(name).shape, 0)

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """`read(name)[start:stop]` along the first axis, reading no more than that."""
        shape = self._spec(name).shape
        start, stop, _ = slice(start, stop).indices(shape[0])
        rest = shape[1:]
        return self._read(name, (max(0, stop - start), *rest), start * math.prod(rest))

    def _spec(self, name: str) -> TensorSpec:
        if name not in self.specs:
            raise KeyError(f"{self.path} has no tensor {name!r}; it has {_some(self.specs)}")
        return self.specs[name]

    def _read(self, name: str, shape: tuple[int, ...], skip: int) -> np.ndarray:
        dtype = self.specs[name].dtype
        if dtype not in WRITTEN:
            raise ValueError(
                f"{self.path}: tensor {name!r} has dtype {dtype}, whose elements are narrower than "
                "a byte; no reader here unpacks it, so store it as U8 or in a wider type"
            )
        out = np.empty(shape, dtype)
        what = f"{self.path}: tensor {name!r}"
        read_into(self._fd, out, self._data + self._begin[name] + skip * dtype.itemsize, what)
        return out


def read_into(fd: int, out: np.ndarray, offset: int, what: str) -> None:
    """Fills the contiguous array `out` with the bytes of file `fd` from `offset` on.

    Raises:
      ValueError: the file ends before; `what` opens the message.
    """
    view = memoryview(out.reshape(-1).view(np.uint8))
    wanted = len(view)
    while len(view):
        got = os.preadv(fd, [view[: 1 << 30]], offset)  # the system takes at most 2 GiB a call
        if not got:
            raise ValueError(
                f"{what}: {wanted} bytes were expected and the file ends {len(view)} bytes early: "
                f"it was cut while open; {COPY_AGAIN}"
            )
        view, offset = view[got:], offset + got


class TensorWriter:
    """A safetensors file that is filled one tensor after another, in any order.

    The header is sorted by name. The data starts at a multiple of 8 and is sorted by the width of
    an element, widest first, then by name, so that every tensor is aligned although the format
    has no gaps. The same tensors give the same bytes, in whichever order they come.
    """

    def __init__(
        self,
        path: str | Path,
        specs: Mapping[str, TensorSpec],
        metadata: Mapping[str, str] | None = None,
    ):
        """Creates the file with its header.

        Args:
          path: a new file.
          specs: every tensor that will come.
          metadata: strings kept in the header.

        Raises:
          ValueError: a dtype that the format has no name for.
        """
        entries, end = {}, 0
        for name in sorted(specs, key=lambda name: (-np.dtype(specs[name].dtype).itemsize, name)):
            shape, dtype = tuple(specs[name].shape), np.dtype(specs[name].dtype)
            if dtype not in WRITTEN:
                raise ValueError(
                    f"tensor {name!r} has dtype {dtype}, which safetensors has no byte-wide type "
                    f"for; convert it to one of {', '.join(sorted(map(str, WRITTEN)))}"
                )
            begin, end = end, end + math.prod(shape) * dtype.itemsize
            offsets = [begin, end]
            entries[name] = dict(dtype=WRITTEN[dtype], shape=list(shape), data_offsets=offsets)
        head = {"__metadata__": dict(metadata)} if metadata else {}
        header = json.dumps(head | dict(sorted(entries.items())), separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        self._waiting = {
            name: (TensorSpec(tuple(e["shape"]), DTYPES[e["dtype"]][0]), e["data_offsets"][0])
            for name, e in entries.items()
        }
        self._data = 8 + len(header)
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        self._close = weakref.finalize(self, os.close, self._fd)
        _write_at(self._fd, len(header).to_bytes(8, "little") + header, 0)

    def write(self, name: str, array: np.ndarray) -> None:
        """Puts one tensor in its place, once; it must be what was announced."""
        spec, begin = self._waiting.pop(name)
        assert (array.shape, array.dtype) == spec, f"{name}: {array.dtype} {array.shape}, {spec}"
        raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        _write_at(self._fd, memoryview(raw), self._data + begin)

    def finish(self) -> None:
        """Syncs and closes the file, which must be complete."""
        assert not self._waiting, f"tensors never written: {_some(self._waiting)}"
        os.fsync(self._fd)
        self._close()


def write_tensors(
    path: str | Path, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a safetensors file; the same tensors give the same bytes.

    A temporary sibling is written, synced and renamed: the file is whole or absent.

    Args:
      path: replaced if it exists.
      tensors: numpy or JAX arrays; converted one at a time.
      metadata: strings kept in the header.

    Raises:
      ValueError: a dtype that the format has no name for.
    """
    path = Path(path)
    specs = {name: TensorSpec(x.shape, np.dtype(x.dtype)) for name, x in tensors.items()}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        file = TensorWriter(temporary, specs, metadata)
        for name in tensors:
            file.write(name, np.asarray(tensors[name]))
        file.finish()
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_directory(path.parent)


def _write_at(fd: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while len(view):
        done = os.pwrite(fd, view[: 1 << 30], offset)  # the system takes at most 2 GiB a call
        view, offset = view[done:], offset + done


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _read_header(fd: int, path: Path) -> tuple[dict[str, Any], int]:
    """The parsed header and the offset of the data."""
    size = os.fstat(fd).st_size
    if size < 8:
        raise ValueError(
            f"{path}: {size} bytes, and a safetensors file starts with 8 that give the length of "
            f"its header; {COPY_AGAIN}"
        )
    n = int.from_bytes(os.pread(fd, 8, 0), "little")
    if n > MAX_HEADER:
        raise ValueError(
            f"{path}: the first 8 bytes announce a header of {n} bytes and the limit is "
            f"{MAX_HEADER}; this is not a safetensors file or it is damaged: {COPY_AGAIN}"
        )
    if 8 + n > size:
        raise ValueError(
            f"{path}: a header of {n} bytes was expected and {size - 8} bytes follow; "
            f"the file is cut: {COPY_AGAIN}"
        )
    raw = os.pread(fd, n, 8)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}: the header (bytes 8 to {8 + n}) is not valid JSON: {error}; {COPY_AGAIN}"
        ) from error
    if not isinstance(header, dict) or raw[:1] != b"{":
        raise ValueError(f"{path}: the header is not a JSON object; {COPY_AGAIN}")
    return header, 8 + n


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} appears twice")
    return table


def _metadata(found: Any, path: Path) -> dict[str, str]:
    found = {} if found is None else found
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        raise ValueError(
            f"{path}: __metadata__ must map strings to strings, found {str(found)[:200]}; "
            "write the file again with string values"
        )
    return found


def _spans(header: dict[str, Any], size: int, path: Path) -> dict[str, tuple[TensorSpec, int]]:
    """Every tensor's spec and first byte, in the order of the bytes; they tile `size` bytes."""
    spans = []
    for name, entry in header.items():
        spec, begin, end = _entry(name, entry, path)
        spans.append((begin, end, name, spec))
    spans.sort(key=lambda span: span[:2])
    at, before = 0, "the start of the data"
    for begin, end, name, _ in spans:
        if begin != at:
            what = "overlaps" if begin < at else f"leaves {begin - at} bytes unused after"
            raise ValueError(
                f"{path}: tensor {name!r} should start at byte {at} of the data and starts at "
                f"{begin}: it {what} {before}; the header is damaged: {COPY_AGAIN}"
            )
        at, before = end, f"tensor {name!r}"
    if at != size:
        how = f"cut by {at - size} bytes" if size < at else f"followed by {size - at} stray bytes"
        raise ValueError(
            f"{path}: {before} should end the file with byte {at} of the data and the file holds "
            f"{size}: it is {how}; {COPY_AGAIN}"
        )
    return {name: (spec, begin) for begin, _, name, spec in spans}


def _entry(name: str, entry: Any, path: Path) -> tuple[TensorSpec, int, int]:
    where = f"{path}: tensor {name!r}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(
            f"{where}: dtype, shape and data_offsets were expected, found {str(entry)[:200]}; "
            f"{COPY_AGAIN}"
        )
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        raise ValueError(
            f"{where}: dtype {entry['dtype']!r} is unknown; the format has {', '.join(DTYPES)}; "
            "write the tensor in one of them"
        )
    dtype, bits = DTYPES[entry["dtype"]]
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise ValueError(
            f"{where}: shape and data_offsets must be lists of whole numbers, two of them in "
            f"data_offsets; found {str(shape)[:100]} and {str(offsets)[:100]}; {COPY_AGAIN}"
        )
    begin, end = offsets
    if (end - begin) * 8 != math.prod(shape) * bits:
        raise ValueError(
            f"{where}: {entry['dtype']} of shape {shape} takes {math.prod(shape) * bits / 8:g} "
            f"bytes and data_offsets {offsets} give it {end - begin}; {COPY_AGAIN}"
        )
    return TensorSpec(tuple(shape), dtype), begin, end


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)


def _some(names: Mapping[str, Any], limit: int = 6) -> str:
    shown = ", ".join(list(names)[:limit]) or "none"
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")
