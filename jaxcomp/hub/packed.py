"""Weights that a checkpoint holds as codes: how they are described, and how they are read.

A format of packed weights is a module with

    packed_part(config, template, source, allow) -> Packed     how each module's weight is stored

and the `Form`s that this names. The codes are laid anew and never dequantized.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from jaxcomp.core.quantize import QTensor, QuantSpec, n_groups
from jaxcomp.hub.bits import stream_bytes
from jaxcomp.hub.leaves import TensorSource, Wanted, leaf_struct, read_leaf, whole

DENSE = "start from the model before it was quantized, or from one that is dequantized"


class Form(NamedTuple):
    """How a format stores the weight of a linear module.

    Attributes:
      tensors: (linear, source) → every tensor it is made of, and what each must be.
      check: (linear, source): raises ValueError for what shapes do not tell; reads little.
      codes: (linear, source, rows) → `packed` of a QTensor with the output channels `rows`.
      grid: (linear, source) → scale float32 `[groups, out_ch]`, or `[1, 1]` per tensor, and the
        zero point int8 of the same shape, None where symmetric.
    """

    tensors: Callable[["PackedLinear", TensorSource], dict[str, Wanted]]
    check: Callable[["PackedLinear", TensorSource], None]
    codes: Callable[["PackedLinear", TensorSource, tuple[int, int]], np.ndarray]
    grid: Callable[["PackedLinear", TensorSource], tuple[np.ndarray, np.ndarray | None]]


@dataclasses.dataclass(frozen=True)
class PackedLinear:
    """A linear module whose weight is stored as codes.

    Attributes:
      name: of the module; its tensors begin with it and a dot.
      in_ch, out_ch: its channels, of all leaves together where a family fuses several.
      spec: the grid of its weight.
      form: how the file stores it.
      act: the grid of its input, None for none.
    """

    name: str
    in_ch: int
    out_ch: int
    spec: QuantSpec
    form: Form
    act: QuantSpec | None = None

    @property
    def groups(self) -> int:
        """Groups of input channels.

        Raises:
          ValueError: they are not whole.
        """
        try:
            return n_groups(self.in_ch, self.spec)
        except ValueError as error:
            raise ValueError(f"module {self.name!r}: {error}") from None


class Packed(NamedTuple):
    """The packed part of a checkpoint.

    Attributes:
      linears: every quantized module by name.
      kv_cache: the static grid of all keys and values, None for none: "tensor" is one for all,
        "channel" one for each head, which the format spreads over the channels of the head.
      unused: tensors that are there and change nothing.
    """

    linears: dict[str, PackedLinear]
    kv_cache: QuantSpec | None = None
    unused: tuple[str, ...] = ()


NOTHING = Packed({})


@dataclasses.dataclass(frozen=True)
class PackedWeight:
    """A leaf of a template that becomes a `QTensor`: the output channels `rows` of a module."""

    linear: PackedLinear
    rows: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class PackedGrid:
    """A leaf of a template: a static scale or zero point, `shape` in our tree."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@read_leaf.register
def _(leaf: PackedWeight, source: TensorSource) -> QTensor:
    linear, (start, stop) = leaf.linear, leaf.rows
    scale, zero = linear.form.grid(linear, source)
    _check_scale(scale, linear.name, source)
    if zero is not None:
        _check_zero(zero, linear, source)
    if linear.spec.granularity != "tensor":
        part = lambda a: None if a is None else np.ascontiguousarray(a[:, start:stop])  # noqa: E731
        scale, zero = part(scale), part(zero)
    packed = linear.form.codes(linear, source, leaf.rows)
    return QTensor(packed, scale, zero, linear.spec.bits, linear.in_ch)


@leaf_struct.register
def _(leaf: PackedWeight, source: TensorSource) -> QTensor:
    linear, out_ch = leaf.linear, leaf.rows[1] - leaf.rows[0]
    spec, struct = linear.spec, jax.ShapeDtypeStruct
    grid = (linear.groups, 1 if spec.granularity == "tensor" else out_ch)
    return QTensor(
        struct((stream_bytes(linear.in_ch, spec.bits), out_ch), np.uint8),
        struct(grid, np.float32),
        None if spec.symmetric else struct(grid, np.int8),
        spec.bits,
        linear.in_ch,
    )


@read_leaf.register
def _(leaf: PackedGrid, source: TensorSource) -> np.ndarray:
    value = whole(source, leaf.name).astype(leaf.dtype)
    if leaf.dtype == "float32":
        _check_scale(value, leaf.name, source)
    own = value.reshape(-1, 1) if leaf.shape else value[0]
    return np.array(np.broadcast_to(own, leaf.shape))


@leaf_struct.register
def _(leaf: PackedGrid, source: TensorSource) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, np.dtype(leaf.dtype))


def _check_scale(scale: np.ndarray, what: str, source: TensorSource) -> None:
    bad = int(np.count_nonzero(~np.isfinite(scale) | (scale == 0)))
    if bad:
        raise ValueError(
            f"{source.where}: {what}: {bad} of {scale.size} scales are 0, NaN or infinite, so the "
            f"checkpoint is damaged or overflowed in its dtype; download it again, or {DENSE}"
        )


def _check_zero(zero: np.ndarray, linear: PackedLinear, source: TensorSource) -> None:
    spec = linear.spec
    if zero.min() < spec.qmin or zero.max() > spec.qmax:
        raise ValueError(
            f"{source.where}: {linear.name}: zero points reach from {zero.min()} to {zero.max()}, "
            f"and codes of {spec.bits} bits from {spec.qmin} to {spec.qmax}; the checkpoint is "
            f"damaged: download it again, or {DENSE}"
        )
