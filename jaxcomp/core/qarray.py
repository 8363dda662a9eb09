"""`QTensor` to and from the quantized array of qwix, without rounding anything again.

    QTensor  packed bytes, scale `[*batch, groups, out_ch]`,  w = (q − z)·s
    QArray   one code an element in int4 or int8, scale of any shape that divides the weight's

qwix has integers of 2 to 8 bits, those of 4 and 8 as types of their own and the others by name; all
are signed, as here. It measures asymmetric ranges for 4 and 8 bits alone, but holds any.

Source: qwix 0.1.8, `QArray`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxcomp.core.quantize import QTensor
from pallas_kernels.packing import pack

INSTALL = "pip install --no-deps qwix==0.1.8"
WIDTHS = {f"int{bits}": bits for bits in range(2, 9)}  # name of a qtype → bits


def to_qarray(q: QTensor) -> Any:
    """The same weight as a `qwix.QArray` `[*batch, in_ch, out_ch]`; its scale stays float32.

    Raises:
      ModuleNotFoundError: qwix is not installed; the message names the command.
      ValueError: a zero point that is no code, which qwix has no type for.
    """
    try:
        from qwix import QArray
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"qwix is not installed; install it with: {INSTALL}") from error
    held = jnp.int4 if q.bits <= 4 else jnp.int8
    qtype = held if q.bits in (4, 8) else f"int{q.bits}"
    zero = None
    if q.zero_point is not None:
        _check_range(q.zero_point, q.bits, "zero points")
        zero = jnp.asarray(q.zero_point).astype(held)
    return QArray(jnp.asarray(q.codes).astype(held), jnp.asarray(q.scale), zero, qtype)


def from_qarray(a: Any) -> QTensor:
    """A `qwix.QArray` of integers as a QTensor; `from_qarray(to_qarray(q))` is `q`, bit for bit.

    Args:
      a: a weight `[*batch, in_ch, out_ch]`, so that `in_ch` is what a product sums over. Its scale
        may be shared in tiles along any axis; tiles of output channels and of leading axes are
        written out. Scales of another dtype become float32, which holds them exactly.

    Raises:
      ValueError: not integers of 2 to 8 bits, codes outside their width, less than two axes, or a
        zero point that has another shape than the scale.
    """
    name = a.qtype if isinstance(a.qtype, str) else jnp.dtype(a.qtype).name
    if name not in WIDTHS:
        raise ValueError(
            f"qtype={name!r} is no grid of a QTensor; there is {', '.join(WIDTHS)}: quantize the "
            "weight to one of them"
        )
    if a.qvalue.ndim < 2 or (a.zero_point is not None and a.zero_point.shape != a.scale.shape):
        zero = None if a.zero_point is None else a.zero_point.shape
        raise ValueError(
            f"a QArray of shape {a.qvalue.shape} with scales {a.scale.shape} and zero points "
            f"{zero} is no QTensor: it has [*batch, in_ch, out_ch], and both grids of one shape"
        )
    bits, codes = WIDTHS[name], jnp.asarray(a.qvalue).astype(jnp.int8)
    _check_range(codes, bits, "codes")
    scale = _spread(a.scale.astype(jnp.float32), codes.shape)
    zero = None if a.zero_point is None else _spread(a.zero_point.astype(jnp.int8), codes.shape)
    return QTensor(pack(codes, bits), scale, zero, bits, codes.shape[-2])


def _spread(grid: Array, shape: tuple[int, ...]) -> Array:
    """A grid in the shape that a QTensor of `shape` has: one number, or all output channels."""
    *batch, _, out_ch = shape
    groups, cols = grid.shape[-2:]
    wanted = (*batch, groups, 1 if groups == cols == 1 else out_ch)
    for axis, (there, n) in enumerate(zip(grid.shape, wanted, strict=True)):
        grid = grid if there == n else jnp.repeat(grid, n // there, axis)
    return grid


def _check_range(codes: Array, bits: int, what: str) -> None:
    if isinstance(codes, jax.core.Tracer):
        return  # no values to look at
    low, high, limit = int(np.min(codes)), int(np.max(codes)), 2 ** (bits - 1)
    if low < -limit or high >= limit:
        raise ValueError(
            f"the {what} reach from {low} to {high}, and {bits} bits from {-limit} to {limit - 1}; "
            "give them more bits"
        )
