"""`quant_matmul` for TPUs: codes become floats in registers, on their way to the matrix unit.

    grid (M/bm, N/bn, K/bk), the last one sequential; on chip at a step:

              bn                       x  [bm, bk]       bfloat16 or float32
           ┌──────┐                    w  [bk/2, bn]     a byte is two rows; or int8 [bk, bn]
        bk │  w   │  groups of g rows  s  [K/g, bn]      all groups of these columns, read once
           └──────┘                    z  [K/g, bn]      int8, float32 from the first step on
      bk   ┌──────┐                    acc [bm, bn]      float32
    bm □   │ acc  │
           └──────┘

A register of bytes is a register of twice as many nibbles, rows 2i and 2i+1 in byte i: to unpack
costs nothing. The scale of a group multiplies the group's sum ("post"), which for few rows is next
to nothing, or its weights ("pre"), which is less where rows are many and the vector unit has
bfloat16. A group narrower than the matrix unit is deep would waste it; "post" therefore takes
`span` channels in one dot, with the rows of `x` once for each group of them, zeros elsewhere.

With few rows, reading w is the bound; a chip whose vector unit is too slow at making floats of
codes (v5e) stays above it, and `quant_matmul_int` does not. With many, the matrix unit is.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.chips import Chip
from pallas_kernels.quant_matmul.prepare import tiled
from pallas_kernels.tuning import MatmulTile, tile_for
from pallas_kernels.weight import Weight

F32 = jnp.float32
VMEM = 100 << 20  # bytes of the 128 MiB that a program may ask for


class Form(NamedTuple):
    """What is fixed when a kernel is compiled."""

    tile: MatmulTile
    group: int  # input channels that share a scale; 0 where all do
    nibbles: bool
    asymmetric: bool


def quant_matmul(
    x: Float[Array, "*tokens in_ch"],
    w: Weight,
    out_dtype: DTypeLike,
    *,
    chip: Chip,
    interpret: Any = False,
    tile: MatmulTile | None = None,
) -> Float[Array, "*tokens out_ch"]:
    """See `pallas_kernels.quant_matmul.quant_matmul`.

    Raises:
      NotImplementedError: activations that are neither bfloat16 nor float32; a weight of 2, 3, 5,
        6 or 7 bits that is not prepared; groups that fit no tile; a chip without tiles.
    """
    if x.dtype not in (jnp.bfloat16, F32):
        raise NotImplementedError(f"activations are {x.dtype}, not bfloat16 or float32")
    w = chip_form(w)
    *tokens, in_ch = x.shape
    rows = x.reshape(-1, in_ch)
    m, (k, _) = len(rows), padded_shape(w)
    if not m:
        return jnp.zeros((*tokens, w.out_ch), out_dtype)
    tile = tile or tile_for("quant_matmul", chip, m=m, **sizes_of(w))
    form = form_of(w, tile)
    rows = jnp.pad(rows, ((0, -m % tile.m), (0, k - in_ch)))
    y = _product(rows, w, form, jnp.dtype(out_dtype), interpret)
    return y[:m, : w.out_ch].reshape(*tokens, w.out_ch)


def chip_form(w: Weight) -> Weight:
    """A prepared weight as it is; a canonical one of 4 or 8 bits prepared in the traced call."""
    if w.layout in ("nibbles", "int8"):
        return w
    if w.layout != "canonical":
        raise NotImplementedError(f"weights are in the layout {w.layout}")
    if w.bits not in (4, 8):
        raise NotImplementedError(f"canonical codes have {w.bits} bits; prepare the weight")
    return tiled(w)


def padded_shape(w: Weight) -> tuple[int, int]:
    """Input and output channels of a prepared weight with its padding."""
    rows, cols = w.codes.shape[-2:]
    return rows * (2 if w.layout == "nibbles" else 1), cols


def sizes_of(w: Weight) -> dict[str, int]:
    """What a rule for tiles wants to know of a prepared weight."""
    k, n = padded_shape(w)
    return {"k": k, "n": n, "group": k if w.groups == 1 else w.group_size, "bits": w.bits}


def grid_spec(grid: Array, bn: int) -> pl.BlockSpec:
    """All groups of a tile's columns, of scales, zero points or sums."""
    rows, cols = grid.shape
    if cols == 1:
        return pl.BlockSpec((rows, 1), lambda i, j, step: (0, 0))
    return pl.BlockSpec((rows, bn), lambda i, j, step: (0, j))


def form_of(w: Weight, tile: MatmulTile) -> Form:
    """What the kernel of a prepared weight is compiled for.

    Raises:
      ValueError: the tile does not divide the weight or its groups.
    """
    (k, n), group = padded_shape(w), 0 if w.groups == 1 else w.group_size
    if k % tile.k or n % tile.n:
        raise ValueError(f"tile {tile} does not divide a weight of {k} × {n}")
    if group and tile.k % group and group % tile.k:
        raise ValueError(f"tile of {tile.k} input channels holds no whole groups of {group}")
    return Form(tile, group, w.layout == "nibbles", w.zero_point is not None)


def _product(x: Array, w: Weight, form: Form, out_dtype: Any, interpret: Any) -> Array:
    (m, k), (_, n) = x.shape, padded_shape(w)
    bm, bk, bn = form.tile[:3]
    packing = 2 if form.nibbles else 1
    grid_block = grid_spec(w.scale, bn)
    scratch = [pltpu.VMEM((bm, bn), F32)]
    if form.asymmetric:
        scratch.append(pltpu.VMEM(grid_block.block_shape, F32))
    grids = [w.scale.astype(F32)] + ([w.zero_point] if form.asymmetric else [])
    return pl.pallas_call(
        functools.partial(_body, form),
        jax.ShapeDtypeStruct((m, n), out_dtype),
        grid=(m // bm, n // bn, k // bk),
        in_specs=[
            pl.BlockSpec((bm, bk), lambda i, j, step: (i, step)),
            pl.BlockSpec((bk // packing, bn), lambda i, j, step: (step, j)),
            *([grid_block] * len(grids)),
        ],
        out_specs=pl.BlockSpec((bm, bn), lambda i, j, step: (i, j)),
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * m * n * k,
            transcendentals=0,
            bytes_accessed=x.nbytes * (n // bn)
            + (w.codes.nbytes + w.scale.nbytes) * (m // bm)
            + m * n * out_dtype.itemsize,
        ),
        interpret=interpret,
        name="quant_matmul",
    )(x, w.codes, *grids)


def _body(form: Form, x_ref, w_ref, s_ref, *refs) -> None:
    z_ref, o_ref, acc, zeros = refs if form.asymmetric else (None, *refs, None)
    step, steps = pl.program_id(2), pl.num_programs(2)

    @pl.when(step == 0)
    def _():
        begin(z_ref, acc, zeros)

    add_tile(form, x_ref[...], w_ref[...], s_ref, zeros, acc, step)

    @pl.when(step == steps - 1)
    def _():
        o_ref[...] = finished(form, s_ref, acc).astype(o_ref.dtype)


def begin(z_ref, acc, zeros) -> None:
    """Before the first tile of a sum."""
    acc[...] = jnp.zeros_like(acc)
    if z_ref is not None:
        zeros[...] = z_ref[...].astype(jnp.int32).astype(F32)


def add_tile(form: Form, x: Array, codes: Array, s_ref, zeros, acc, step: Array) -> None:
    """Adds the product of one tile, the weight's `step`-th along the input channels."""
    w = floats(codes, form.nibbles, x.dtype)
    if not form.group:
        acc[...] += _dot(x, w)
        if form.asymmetric:
            acc[...] -= jnp.sum(x.astype(F32), axis=1, keepdims=True) * zeros[...]
        return
    row = grid_row(form, step)
    scale = lambda i: s_ref[row(i), :]  # noqa: E731
    zero = (lambda i: zeros[row(i), :]) if form.asymmetric else None
    add = _pre if form.tile.scale == "pre" else _post
    add(form, x, w, scale, zero, acc)


def finished(form: Form, s_ref, acc) -> Array:
    """The sum after the last tile."""
    return acc[...] if form.group else acc[...] * s_ref[...]


def floats(codes: Array, nibbles: bool, dtype: Any) -> Array:
    """Stored codes as floats, `[bk, bn]`."""
    return (pltpu.bitcast(codes, jnp.int4) if nibbles else codes).astype(dtype)


def grid_row(form: Form, step: Array):
    """Where the scale of the tile's group `i` stands at a step."""
    groups = form.tile.k // form.group
    if groups:
        return lambda i: pl.ds(step * groups + i, 1)
    return lambda i: pl.ds(step // (form.group // form.tile.k), 1)


def _dot(x: Array, w: Array) -> Array:
    precision = jax.lax.Precision.HIGHEST if x.dtype == F32 else None
    return jnp.dot(x, w, preferred_element_type=F32, precision=precision)


def _pre(form: Form, x: Array, w: Array, scale, zero, acc) -> None:
    size = min(form.group, form.tile.k)
    parts = []
    for i in range(form.tile.k // size):
        part = w[i * size : (i + 1) * size]
        if zero is not None:
            part = part - zero(i).astype(x.dtype)
        parts.append(part * scale(i).astype(x.dtype))
    acc[...] += _dot(x, jnp.concatenate(parts))


def _post(form: Form, x: Array, w: Array, scale, zero, acc) -> None:
    size = min(form.group, form.tile.k)
    span = max(size, math.gcd(form.tile.k, form.tile.span))
    sharing, bm = span // size, len(x)
    for j in range(form.tile.k // span):
        here = x[:, j * span : (j + 1) * span]
        if sharing > 1:
            here = apart(here, sharing)
        sums = _dot(here, w[j * span : (j + 1) * span])
        for i in range(sharing):
            part = slice(i * bm, (i + 1) * bm)
            g, y = j * sharing + i, sums[part]
            if zero is not None:
                y = y - jnp.sum(here[part].astype(F32), axis=1, keepdims=True) * zero(g)
            acc[...] += y * scale(g)


def apart(x: Array, groups: int) -> Array:
    """The rows of `x` once for each of the groups of its channels, zero outside of the group."""
    size = x.shape[1] // groups
    channel = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    inside = [(channel >= i * size) & (channel < (i + 1) * size) for i in range(groups)]
    # Registers of narrow values are awkward to select in, and to join in parts.
    wide = x.astype(jnp.int32 if jnp.issubdtype(x.dtype, jnp.integer) else F32)
    zero = jnp.zeros_like(wide)
    return jnp.concatenate([jnp.where(i, wide, zero) for i in inside]).astype(x.dtype)
