"""What the matrix products for Hopper are made of: a walk along the input channels, and its parts.

A program is one warpgroup, which makes a tile `[out, tokens]` of yᵀ from its share of the input
channels; several programs live on a multiprocessor and cover each other's waits.

           k                         w      [out, k]      codes; parts of them in a step
        ┌─────┐                      x      [tokens, k]   floats or codes
    out │  w  │ ▸ registers          rows   [1, out]      grids of the group, and sums of codes
        └─────┘                      cols   [1, tokens]   what a group knows of a token
     tokens ┌─────┐                  total  [out, tokens] float32 or int32, in registers
            │  x  │ ▸ tensor core
            └─────┘

All products are transposed, `yᵀ = wᵀ xᵀ`: the tensor core (wgmma) takes 64 rows of its left operand
at a time, but as few as 8 columns of its right one. Output channels are therefore the rows, and one
token costs a tile of 8. The left operand may come from registers, where 4-bit weights are widened;
the right one is read from on-chip memory, transposed by its address.

The interpreter of JAX 0.10 knows neither layouts nor products of transposed operands, none knows a
left operand in registers. Interpreted, the functions here therefore compute the same values by
other means; copies, pipelines, indices and arithmetic of a kernel stay as they are.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array

from pallas_kernels.compat import load_with_layout
from pallas_kernels.tuning_hopper import Matmul

Layout = plgpu.Layout
LEAST = 128  # bytes of a copy
# Registers of a loaded tile of codes, by width: what each thread reads is contiguous in memory, and
# becomes the layout of a product's left operand of 16-bit floats for nothing.
UPCAST = {4: Layout.WGMMA_UPCAST_4X, 8: Layout.WGMMA_UPCAST_2X}


def width(x: Any) -> int:
    """Bits of an element."""
    return 4 if x.dtype in (jnp.int4, jnp.uint4) else jnp.dtype(x.dtype).itemsize * 8


def pad_to(x: Array, multiple: int, cols: int) -> Array:
    """Rows up to a multiple, columns up to `cols`, with zeros."""
    rows, present = x.shape
    return jnp.pad(x, [(0, -rows % multiple), (0, cols - present)])


def transforms(cols: int, bits: int, most: int = 128) -> tuple:
    """How rows of `cols` elements lie in on-chip memory, so that the tensor core can read them.

    Rows of 16 bytes lie as they are: the tensor core cannot read them, registers can. Both operands
    of a product lie alike, in runs of at most `most` bytes.
    """
    if cols * bits == 128:
        return ()
    swizzle = min(plgpu.find_swizzle(cols * bits), most)
    return plgpu.TilingTransform((8, swizzle * 8 // bits)), plgpu.SwizzleTransform(swizzle)


def tiled(w: Array, k: int) -> Array:
    """A weight `[out, in]` as `walk` takes it in tiles of `k` channels: `[out, in]`, or of 16 bytes
    `[out, in / k, k]`.

    A copy takes an index of the last axis for one of bytes, also where a byte has two codes. In
    tiles that are transformed that index is always 0, and here so it is in all others.
    """
    return w if transforms(k, width(w)) else w.reshape(len(w), -1, k)


class Place(NamedTuple):
    """Which part of the product a program makes.

    Attributes:
      out, tokens, split: indices of its tile, and of its share of the input channels.
      first_row, first_group: of its expert, in tiles of output channels and in groups.
    """

    out: Any
    tokens: Any
    split: Any
    first_row: Any = 0
    first_group: Any = 0


def walk(
    add: Callable[..., Array],
    total: Array,
    place: Place,
    tile: Matmul,
    groups: int,
    x: Any,
    w: Any,
    rows: Sequence[Any] = (),
    cols: Sequence[Any] = (),
) -> Array:
    """Adds up a program's share of the input channels.

    Args:
      add: ``(total, x_tile, w_tile, rows_tiles, cols_tiles) → total``.
      total: what to begin with.
      groups: of input channels that share a grid.
      x: `[tokens, k]` in the card's memory.
      w: `[out, k]` there, as `tiled` gives it.
      rows: `[groups, out]`, of 4 bytes or 1, of which `add` gets the group's line.
      cols: `[groups, tokens]`, of 4 bytes, in whole copies.
    """
    tiles = x.shape[1] // tile.k
    steps, per_group = tiles // (tile.parts * tile.split), tiles // groups
    wide = [max(tile.out, LEAST // row.dtype.itemsize) for row in rows]
    long = max(tile.tokens, LEAST // 4)

    def specs(part):
        k = lambda i: (place.split * steps + i) * tile.parts + part  # noqa: E731
        group = lambda i: place.first_group + k(i) // per_group  # noqa: E731
        row = place.first_row + place.out
        lies = transforms(tile.k, width(w))
        yield plgpu.BlockSpec(
            (tile.tokens, tile.k),
            lambda i: (place.tokens, k(i)),
            transforms=transforms(tile.k, width(x)),
        )
        if lies:
            yield plgpu.BlockSpec((tile.out, tile.k), lambda i: (row, k(i)), transforms=lies)
        else:
            yield plgpu.BlockSpec((tile.out, None, tile.k), lambda i: (row, k(i), 0))
        for size in wide:
            at = lambda i, size=size: (group(i), place.out * tile.out // size)  # noqa: E731
            yield plgpu.BlockSpec((1, size), at)
        for _ in cols:
            first = place.tokens * tile.tokens // long
            yield plgpu.BlockSpec((1, long), lambda i, first=first: (group(i), first))

    def step(_, *tiles_and_total):
        *tiles, total = tiles_and_total
        each = 2 + len(rows) + len(cols)
        for i in range(0, len(tiles), each):
            x_tile, w_tile, *lines = tiles[i : i + each]
            row_lines = [
                line.at[0, pl.ds(place.out * tile.out % size, tile.out)]
                for line, size in zip(lines, wide, strict=False)
            ]
            tokens = pl.ds(place.tokens * tile.tokens % long, tile.tokens)
            col_lines = [line.at[0, tokens] for line in lines[len(rows) :]]
            total = add(total, x_tile, w_tile, row_lines, col_lines)
        plgpu.commit_smem()  # all have read, before a copy writes
        return total

    return plgpu.emit_pipeline(
        step,
        grid=(steps,),
        in_specs=[spec for part in range(tile.parts) for spec in specs(part)],
        max_concurrent_steps=tile.stages,
        init_carry=total,
    )(*(x, w, *rows, *cols) * tile.parts)


def buffer(shape: tuple[int, ...], dtype: DTypeLike, most: int = 128) -> Any:
    """On-chip memory that products can read; `most` as in `transforms`."""
    bits = jnp.dtype(dtype).itemsize * 8
    return plgpu.SMEM(shape, dtype, transforms=transforms(shape[-1], bits, most))


def load(ref: Any, layout: Any, interpret: Any = False) -> Array:
    """A tile of on-chip memory in registers."""
    return ref[...] if interpret else load_with_layout(ref, layout)


def load_line(ref: Any, axis: int, interpret: Any = False) -> Array:
    """One value for each row (`axis` 0) or column (1) of a product, from the card's memory."""
    if interpret:
        return ref[...]
    return load_with_layout(ref, Layout.WGMMA.reduce(1 - axis), optimized=False)


def spread(line: Any, shape: tuple[int, int], axis: int, interpret: Any = False) -> Array:
    """One value for each row (`axis` 0) or column (1), from on-chip memory, beside all others."""
    values = load(line, Layout.WGMMA.reduce(1 - axis), interpret)
    return jax.lax.broadcast_in_dim(values, shape, [axis])


def lay(x: Array, layout: Any, interpret: Any = False) -> Array:
    """The same values, in registers of another layout."""
    return x if interpret else plgpu.layout_cast(x, layout)


def zeros(shape: tuple[int, int], dtype: DTypeLike, interpret: Any = False) -> Array:
    """An empty sum of products."""
    return lay(jnp.zeros(shape, dtype), Layout.WGMMA, interpret)


def product(
    total: Array | None,
    a: Any,
    b: Any,
    dtype: DTypeLike,
    interpret: Any = False,
    transposed: bool = True,
    left_transposed: bool = False,
) -> Array:
    """``total + a @ bᵀ``; with ``transposed=False`` ``total + a @ b``, of 16-bit floats.

    Args:
      total: `[m, n]` of `dtype`; None for zeros.
      a: `[m, k]`, registers or on-chip memory; where `left_transposed` `[k, m]` of 16-bit floats,
        on-chip memory.
      b: `[n, k]`, or where not transposed `[k, n]`, on-chip memory.
      dtype: float32 or int32.
    """
    if interpret:
        contracted = ((int(not left_transposed),), (int(transposed),))
        y = jax.lax.dot_general(
            a[...], b[...], (contracted, ((), ())), preferred_element_type=dtype
        )
        return y if total is None else total + y

    def add(sums):
        plgpu.wgmma(sums, a.T if left_transposed else a, b.T if transposed else b)
        return None if total is not None else sums[...]

    if total is None:
        m, n = a.shape[int(left_transposed)], b.shape[1 - int(transposed)]
        return pl.run_scoped(add, plgpu.ACC((m, n), dtype))

    def add_and_wait(sums):
        add(sums)
        plgpu.wgmma_wait(0)

    return pl.run_state(add_and_wait)(plgpu.ACC.init(total))


def put_transposed(buffer: Any, y: Array, interpret: Any = False) -> None:
    """Writes what is laid like a sum of products, `[m, n]`, to on-chip memory `[n, m]`."""
    if interpret:
        buffer[...] = y.T
    else:
        buffer.T[...] = plgpu.layout_cast(y, Layout.WGMMA_TRANSPOSED)


def store_transposed(buffer: Any, target: Any, y: Array, interpret: Any = False) -> None:
    """Writes a sum of products `[out, tokens]` to the card's memory `[tokens, out]`.

    Args:
      buffer: on-chip memory `[tokens, out]`.
    """
    put_transposed(buffer, y.astype(buffer.dtype), interpret)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(buffer, target)
    plgpu.wait_smem_to_gmem(0)
