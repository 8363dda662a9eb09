"""Weights in the form that the kernels of a chip read; made once, when a model is loaded."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.chips import Chip
from pallas_kernels.packing import pack
from pallas_kernels.weight import Weight, codes_of

LANES = 128  # channels of a TPU's vector register, and the least that a tile is made of


def prepare(w: Weight, chip: Chip) -> Weight:
    """The weight for the kernels of `chip`; `weight.to_canonical` is the inverse.

    Raises:
      NotImplementedError: there is no kernel for such a chip or weight.
    """
    if chip.platform == "tpu":
        return tiled(w)
    if chip.platform == "gpu":
        from pallas_kernels.quant_matmul import prepare_gpu

        return prepare_gpu.prepare(w, chip)
    raise NotImplementedError(f"no kernel for {chip.name}")


def tiled(w: Weight) -> Weight:
    """For TPUs: codes of a nibble or a byte, padded to whole groups and whole registers.

    The bytes of 4-bit canonical codes are already those that a register's bitcast unpacks. Codes of
    2 and 3 bits take a nibble, those of 5 to 7 a byte.

    Raises:
      NotImplementedError: groups that are not whole packed registers.
    """
    group = w.group_size
    if w.groups > 1 and group % 32:
        raise NotImplementedError(f"groups of {group} input channels are no multiple of 32")
    rows = -w.in_ch % (LANES if w.groups == 1 else math.lcm(LANES, group))
    cols = -w.out_ch % LANES
    return w.replace(
        codes=_codes(w, rows, cols),
        scale=_padded_grid(w.scale, w, rows, cols),
        zero_point=None if w.zero_point is None else _padded_grid(w.zero_point, w, rows, cols),
        layout="nibbles" if w.bits <= 4 else "int8",
    )


def _codes(w: Weight, rows: int, cols: int) -> Array:
    if w.layout == "canonical" and w.bits == 8:
        return _padded(jax.lax.bitcast_convert_type(w.codes, jnp.int8), rows, cols)
    if w.layout == "canonical" and w.bits == 4 and rows % 2 == 0:
        return _padded(w.codes, rows // 2, cols)
    codes = _padded(codes_of(w), rows, cols)
    return pack(codes, 4) if w.bits <= 4 else codes


def _padded_grid(a: Array, w: Weight, rows: int, cols: int) -> Array:
    return _padded(a, 0 if w.groups == 1 else rows // w.group_size, cols if a.shape[-1] > 1 else 0)


def _padded(a: Array, rows: int, cols: int) -> Array:
    """Zeros after the last two axes."""
    if not rows and not cols:
        return a
    return jnp.pad(a, [(0, 0)] * (a.ndim - 2) + [(0, rows), (0, cols)])
