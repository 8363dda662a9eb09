"""Leaves of a template, and how each comes out of a checkpoint.

A leaf of a template describes one leaf of the model: a `Param` is a tensor as it is stored, other
kinds are made of several tensors and register here. Nothing is read before `read_leaf`.
"""

import functools
import math
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from jaxcomp.core.tensorfile import TensorSpec
from jaxcomp.models.families import Param

FLOATS = ("float32", "bfloat16", "float16")  # dtypes that weights and scales may be stored in
CHUNK = 2**20  # elements read at a time: a transposed tensor is never in memory twice


class TensorSource(Protocol):
    """Named tensors of a checkpoint, in Hugging Face's names and orientation."""

    specs: dict[str, TensorSpec]
    files: tuple[Path, ...]
    where: str

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` of the tensor `name`."""
        ...


class Wanted(NamedTuple):
    """What a tensor of a checkpoint must be; `dtypes` are names, any of which will do."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...] = FLOATS


@functools.singledispatch
def read_leaf(leaf: Any, source: TensorSource) -> Any:
    """The leaf of the model: host arrays, contiguous."""
    raise TypeError(f"no reader for a leaf of type {type(leaf).__name__}; register one here")


@functools.singledispatch
def leaf_struct(leaf: Any, source: TensorSource) -> Any:
    """The same with `jax.ShapeDtypeStruct` for arrays; reads nothing."""
    raise TypeError(f"no structure for a leaf of type {type(leaf).__name__}; register one here")


@read_leaf.register
def _(leaf: Param, source: TensorSource) -> np.ndarray:
    out = aligned(leaf.shape, source.specs[leaf.name].dtype)
    view = out.T if leaf.transpose else out
    step, first = rows_a_time(view.shape), leaf.first_row
    for start in range(0, len(view), step):
        stop = min(start + step, len(view))
        view[start:stop] = source.rows(leaf.name, first + start, first + stop)
    return out


@leaf_struct.register
def _(leaf: Param, source: TensorSource) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, source.specs[leaf.name].dtype)


def whole(source: TensorSource, name: str) -> np.ndarray:
    """All of a tensor, for small ones."""
    return source.rows(name, 0, source.specs[name].shape[0])


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array at a multiple of 64 bytes: JAX on CPU takes it over without a copy."""
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def rows_a_time(shape: tuple[int, ...]) -> int:
    """How many rows of a tensor make a chunk, at least one."""
    return max(1, CHUNK * shape[0] // max(1, math.prod(shape)))
