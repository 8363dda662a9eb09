"""`quant_decode_attention` on Hopper: slots are the rows of the tensor core, queries its columns.

    grid (sequence and kv head, split)    a program walks over its share of the slots that are seen

    k  [slots, dim]  ──· qᵀ──▸  scores [slots, queries]  ──▸  weights, in on-chip memory, transposed
    v  [slots, dim], in on-chip memory as floats         ──▸  vᵀ · weights  [dim, queries]

The tensor core takes 64 rows of its left operand but as few as 8 columns of its right one, so the
queries of a kv head are padded to 8s and not to 64s. Codes are cast and multiplied as they are: of
keys in registers, which are the left operand; of values on the way to on-chip memory, from where
the tensor core reads its left operand transposed. The step of a key multiplies its score, the step
of a value its weight; a zero point is one product with Σ q, or a sum of weights that is kept beside
theirs. Both sums are added up over tiles slot by slot and over slots at the end, so that only the
maximum of the scores crosses the warps in each tile.

What bounds the speed is the memory: rows are read once, packed, two codes a byte being an int4
array without a copy. Programs that share a sequence leave their results and the logarithms of their
sums, which XLA puts together.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels import hopper
from pallas_kernels.chips import CHIPS, Chip
from pallas_kernels.compat import store_line
from pallas_kernels.hopper import Layout
from pallas_kernels.packing import pack_rows
from pallas_kernels.trial import Example
from pallas_kernels.tuning_hopper import Attention, attention

FAR = -1e30  # the score of a slot that is not seen: finite, for −inf − (−inf) is none
LOG2E = 1.4426950408889634


class Rows(NamedTuple):
    """How keys or values are stored: `bits` 0 for floats."""

    bits: int
    zero: bool


class Form(NamedTuple):
    """What is fixed when the kernel is compiled.

    Attributes:
      scale: of the scores, for exponents of 2.
      heads: kv heads of a sequence.
      slots: of the cache, padding not included.
    """

    keys: Rows
    values: Rows
    scale: float
    heads: int
    slots: int
    tile: Attention


def quant_decode_attention(
    q: Float[Array, "batch kv_head group head_dim"],
    k: Array,
    v: Array,
    starts: Array,
    stops: Array,
    k_scale: Array | None,
    k_zero: Array | None,
    v_scale: Array | None,
    v_zero: Array | None,
    *,
    scale: float,
    k_bits: int,
    v_bits: int,
    chip: Chip,
    interpret: Any = False,
    tile: Attention | None = None,
) -> Float[Array, "batch kv_head group head_dim"]:
    """See `pallas_kernels.quant_decode_attention.quant_decode_attention`.

    A cache whose slots are no multiple of a tile's is copied into one whose are; those of a
    generation here are multiples of 128.
    """
    keys, values = check(q, k, v, k_scale, k_zero, v_scale, v_zero, k_bits, v_bits, chip)
    (batch, heads, group, dim), slots = q.shape, k.shape[2]
    pairs, queries = batch * heads, -(-group // 8) * 8
    tile = tile or tile_of(q, k, keys, values)

    def rows(a: Array, of: Rows) -> Array:  # [pairs · slots, dim], codes as signed integers
        a = jnp.pad(a, [(0, 0), (0, 0), (0, -slots % tile.slots), (0, 0)])
        if of.bits:
            a = jax.lax.bitcast_convert_type(a, jnp.int4 if of.bits == 4 else jnp.int8)
        return a.reshape(-1, dim)

    def grid(a: Array) -> Array:  # [pairs, slots], in whole copies
        return jnp.pad(a.reshape(pairs, slots), [(0, 0), (0, -slots % max(tile.slots, 128))])

    columns = jnp.pad(q.reshape(pairs, group, dim), [(0, 0), (0, queries - group), (0, 0)])
    operands = {"starts": starts.astype(jnp.int32), "stops": stops.astype(jnp.int32)}
    operands |= {"q": columns, "k": rows(k, keys), "v": rows(v, values)}
    if keys.bits:
        operands["k_scale"] = grid(k_scale.astype(jnp.float32))
    if keys.zero:
        operands["k_zero"] = grid(k_zero)
        operands["q_sums"] = jnp.sum(columns, axis=-1, dtype=jnp.float32)
    if values.bits:
        operands["v_scale"] = grid(v_scale.astype(jnp.float32))
    if values.zero:
        operands["v_zero"] = grid(v_zero)
    form = Form(keys, values, scale * LOG2E, heads, slots, tile)
    return _call(operands, form, q.dtype, interpret)[:, :group].reshape(q.shape)


def check(
    q: Array,
    k: Array,
    v: Array,
    k_scale: Array | None,
    k_zero: Array | None,
    v_scale: Array | None,
    v_zero: Array | None,
    k_bits: int,
    v_bits: int,
    chip: Chip,
) -> tuple[Rows, Rows]:
    """How keys and values are stored.

    Raises:
      NotImplementedError: queries of 32 bits, rows in another dtype or width, heads that are no
        multiple of 64, more kv heads than a grid has programs, nothing to attend to, another chip.
    """
    if chip.name not in ("h100", "h200"):
        raise NotImplementedError(f"{chip.name} is no Hopper GPU")
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"queries of {q.dtype}; the tensor core takes 16-bit floats")
    group, dim = q.shape[2:]
    most = 65_535  # programs along an axis of the grid that is not the first
    if dim % 64 or dim > 256 or not (k.size and q.size) or q.shape[0] * q.shape[1] > most:
        raise NotImplementedError(f"{group} queries of {dim} channels, keys {k.shape}")
    for rows, step, bits in ((k, k_scale, k_bits), (v, v_scale, v_bits)):
        if step is not None and bits not in (4, 8):
            raise NotImplementedError(f"codes of {bits} bits; 4 or 8")
        if step is None and rows.dtype != q.dtype:
            raise NotImplementedError(f"rows in {rows.dtype} for queries in {q.dtype}")
    return (
        Rows(0 if k_scale is None else k_bits, k_zero is not None),
        Rows(0 if v_scale is None else v_bits, v_zero is not None),
    )


def tile_of(q: Array, k: Array, keys: Rows, values: Rows) -> Attention:
    """The tile of a call."""
    batch, heads, group, dim = q.shape
    return attention(batch * heads, group, k.shape[2], dim, keys.bits or 16, values.bits or 16)


def _call(
    operands: dict[str, Array], form: Form, dtype: Any, interpret: Any
) -> Float[Array, "pairs queries dim"]:
    """Runs the kernel, and what is left to do where programs share a sequence."""
    tile, (pairs, queries, dim) = form.tile, operands["q"].shape
    part_dtype = jnp.dtype(jnp.float32 if tile.split > 1 else dtype)
    out = [jax.ShapeDtypeStruct((pairs, tile.split, queries, dim), part_dtype)]
    scratch = {
        "q_tile": hopper.buffer((queries, dim), dtype),
        "weights": hopper.buffer((queries, tile.slots), dtype),
        "y_tile": hopper.buffer((queries, dim), part_dtype),
        "barrier": plgpu.Barrier(num_barriers=1),
    }
    if tile.split > 1:
        out.append(jax.ShapeDtypeStruct((pairs, tile.split, queries), jnp.float32))
    if form.values.bits:
        scratch["numbers"] = hopper.buffer((tile.slots, dim), dtype)
    kernel = plgpu.kernel(
        functools.partial(_kernel, names=tuple(operands), form=form, interpret=interpret),
        out_type=out,
        scratch_types=scratch,
        grid=(pairs, tile.split),
        grid_names=("pair", "split"),
        kernel_name="quant_decode_attention",
        interpret=interpret,
    )
    y, *logs = kernel(*operands.values())
    if not logs:
        return y[:, 0]
    share = jnp.exp2(logs[0] - jnp.max(logs[0], axis=1, keepdims=True))[..., None]
    return (jnp.sum(y * share, axis=1) / jnp.sum(share, axis=1)).astype(dtype)


def _kernel(*refs, names, form, interpret, q_tile, weights, y_tile, barrier, numbers=None):
    y_ref, *log_ref = refs[len(names) :]
    refs = dict(zip(names, refs, strict=False))
    keys, values, scale, heads, slots, tile = form
    pairs, queries, dim = refs["q"].shape
    pair, split = jax.lax.axis_index("pair"), jax.lax.axis_index("split")
    dtype, f32, i32 = q_tile.dtype, jnp.float32, jnp.int32
    size, shape = tile.slots, (tile.slots, queries)

    plgpu.copy_gmem_to_smem(refs["q"].at[pair], q_tile, barrier.at[0])
    sequence = jax.lax.div(pair, i32(heads))
    start = jnp.maximum(refs["starts"][sequence], 0)
    stop = jnp.minimum(refs["stops"][sequence], slots)
    # The tiles with a slot that is seen are shared out evenly; a program may have none.
    first = jax.lax.div(start, i32(size))
    tiles = jnp.where(start < stop, jax.lax.div(stop + (size - 1), i32(size)) - first, 0)
    each = jax.lax.div(tiles + (tile.split - 1), i32(tile.split))
    first = first + split * each
    count = jnp.maximum(jnp.minimum(tiles - split * each, each), 0)
    q_sums = hopper.load_line(refs["q_sums"].at[pair], 1, interpret) if keys.zero else None
    plgpu.barrier_wait(barrier.at[0])

    def of_query(line, shape):
        return jax.lax.broadcast_in_dim(line, shape, [1])

    def sees(slot, shape):
        at = jax.lax.broadcasted_iota(i32, shape, 0)
        at = hopper.lay(at, Layout.WGMMA, interpret) + slot
        return (at >= start) & (at < stop)

    def step(index, k_tile, v_tile, *lines_and_sums):
        *lines, (top, total, shift, sums) = lines_and_sums
        slot = (first + index[0]) * size
        grid = {
            name: line.at[0, pl.ds(jax.lax.rem(slot, i32(line.shape[1])), size)]
            for name, line in zip(grids, lines, strict=True)
        }
        of_slot = lambda name: hopper.spread(grid[name], shape, 0, interpret)  # noqa: E731
        k = k_tile
        if keys.bits:
            k = hopper.load(k_tile, hopper.UPCAST[keys.bits], interpret)
            k = hopper.lay(k, Layout.WGMMA, interpret).astype(dtype)
        scores = hopper.product(None, k, q_tile, f32, interpret)
        if keys.zero:
            scores = scores - of_slot("k_zero").astype(f32) * of_query(q_sums, shape)
        scores = scores * (of_slot("k_scale") * scale if keys.bits else scale)
        seen = sees(slot, shape)
        scores = jnp.where(seen, scores, FAR)
        new_top = jnp.maximum(top, jnp.max(scores, axis=0))
        decay = jnp.exp2(top - new_top)
        weight = jnp.exp2(scores - of_query(new_top, shape))
        total = total * of_query(decay, shape) + weight
        if values.bits:  # slots that are not seen may have any step
            weight = weight * jnp.where(seen, of_slot("v_scale"), 0.0)
        weight = weight.astype(dtype)
        if values.zero:  # of the rounded weights, or the two sums would not cancel
            more = weight.astype(f32) * of_slot("v_zero").astype(f32)
            shift = shift * of_query(decay, shape) + more
        hopper.put_transposed(weights, weight, interpret)
        v = v_tile
        if values.bits:
            v, codes = numbers, hopper.load(v_tile, hopper.UPCAST[values.bits], interpret)
            numbers[...] = codes.astype(dtype)
        else:
            forget_unseen(v_tile, slot)
        plgpu.commit_smem()
        sums = sums * of_query(decay, sums.shape)
        sums = hopper.product(sums, v, weights, f32, interpret, left_transposed=True)
        plgpu.commit_smem()  # all have read, before a copy or the next step writes
        return new_top, total, shift, sums

    def forget_unseen(v_tile, slot):
        @pl.when((slot < start) | (slot + size > stop))
        def _():  # 0 · NaN would be NaN
            rows = hopper.load(v_tile, Layout.WGMMA, interpret)
            v_tile[...] = jnp.where(sees(slot, rows.shape), rows, jnp.zeros_like(rows))

    tiles_of_pair = refs["k"].shape[0] // pairs // size
    specs = [
        plgpu.BlockSpec(
            (size, dim),
            lambda i: (pair * tiles_of_pair + first + i, 0),
            transforms=hopper.transforms(dim, hopper.width(refs[name])),
        )
        for name in ("k", "v")
    ]
    grids = [name for name in ("k_scale", "k_zero", "v_scale", "v_zero") if name in names]
    for name in grids:
        wide = max(size, hopper.LEAST // refs[name].dtype.itemsize)
        at = lambda i, wide=wide: (pair, jax.lax.div((first + i) * size, i32(wide)))  # noqa: E731
        specs.append(plgpu.BlockSpec((1, wide), at))
    zeros = lambda *shape: hopper.zeros(shape, f32, interpret)  # noqa: E731
    top = hopper.lay(jnp.full((queries,), FAR, f32), Layout.WGMMA.reduce(0), interpret)
    top, total, shift, sums = plgpu.emit_pipeline(
        step,
        grid=(count,),
        in_specs=specs,
        max_concurrent_steps=tile.stages,
        init_carry=(top, zeros(*shape), zeros(*shape), zeros(dim, queries)),
    )(*(refs[name] for name in ("k", "v", *grids)))
    total = jnp.sum(total, axis=0)
    total = jnp.where(total > 0, total, 1.0)
    if values.zero:
        sums = sums - of_query(jnp.sum(shift, axis=0), sums.shape)
    for ref in log_ref:
        line = top + jnp.log2(total)
        if interpret:
            ref[pair, split] = line
        else:
            store_line(ref.at[pair, split], line)
    y = sums * of_query(1.0 / total, sums.shape)
    hopper.store_transposed(y_tile, y_ref.at[pair, split], y, interpret)


def example(
    q: Array,
    k: Array,
    v: Array,
    starts: Array,
    stops: Array,
    k_scale: Array | None,
    k_zero: Array | None,
    v_scale: Array | None,
    v_zero: Array | None,
    *,
    scale: float,
    k_bits: int,
    v_bits: int,
) -> Example:
    """Operands of a call like this one, for `pallas_kernels.trial`."""
    keys, values = check(q, k, v, k_scale, k_zero, v_scale, v_zero, k_bits, v_bits, CHIPS["h100"])
    tile = tile_of(q, k, keys, values)
    tile = tile._replace(split=min(tile.split, 2))
    rng, (group, dim) = np.random.default_rng(0), q.shape[2:]
    starts, stops = np.array([[3, 70, 5], [200, 131, 5]], np.int32)
    index = np.arange(3 * tile.slots + 8)
    seen = ((index >= starts[:, None]) & (index < stops[:, None]))[:, None]

    def stored(rows: Rows, like: Array) -> tuple[Any, Any, Any]:
        shape = (3, 1, len(index), dim)
        if not rows.bits:
            floats = np.where(seen[..., None], rng.standard_normal(shape), np.nan)
            return floats.astype(like.dtype), None, None
        most = 2 ** (rows.bits - 1)
        codes = lambda *shape: rng.integers(-most, most, shape).astype(np.int8)  # noqa: E731
        steps = np.where(seen, rng.uniform(0.5, 1.5, shape[:3]) / most, np.nan).astype(np.float32)
        return (
            np.asarray(pack_rows(codes(*shape), rows.bits)),
            steps,
            codes(*shape[:3]) if rows.zero else None,
        )

    (k, *k_grid), (v, *v_grid) = stored(keys, k), stored(values, v)
    queries = rng.standard_normal((3, 1, group, dim)).astype(q.dtype)
    return Example(
        (q.dtype.name, group, dim, keys, values, tile),
        (queries, k, v, starts, stops, *k_grid, *v_grid),
        tile,
    )


EXAMPLES = {"quant_decode_attention": example}
