"""`quant_decode_attention` for TPUs: one pass over the slots that a sequence sees.

    grid (batch, tiles of slots)      all kv heads of a tile in one step, for a step has a price
    k, v   [heads, slots, head_dim]   the tiles from `starts` to `stops`; beyond, the last tile,
                                      which is not fetched again
    q      [heads, group, head_dim]

Codes are cast and multiplied as they are: the step of a key multiplies its score, the step of a
value its weight, and a zero point is one product with Σ q or one term in the sum of weights. The
nibbles of a 4-bit row are its even and its odd channels, so queries come with their channels sorted
that way, and so do the results, until XLA sorts them back. A nibble counts from −8, which is 8 more
of a zero point.

What bounds the speed is the memory. Of 4-bit rows of 128 channels TPUs store 64 lanes of 128: in
this layout they take the time of 8-bit ones.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.chips import Chip
from pallas_kernels.tuning import tile_for

LANES = 128
FAR = -1e30  # the score of a slot that is not seen: finite, for −inf − (−inf) is none
NIBBLES = 0x0F0F0F0F
SIGNS = -0x77777778  # 0x88888888: flips the sign bits of 8 nibbles, code → code + 8


@dataclasses.dataclass(frozen=True)
class Rows:
    """How keys or values are stored: `bits` 0 for floats."""

    bits: int
    zero: bool

    @property
    def shifted(self) -> bool:
        """Whether products are with a code plus something."""
        return self.zero or self.bits == 4


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
    tile: int | None = None,
) -> Float[Array, "batch kv_head group head_dim"]:
    """See `pallas_kernels.quant_decode_attention.quant_decode_attention`; `tile` counts slots."""
    batch, heads, group, dim = q.shape
    slots = k.shape[2]
    keys = _rows("k", q, k, k_scale, k_zero, k_bits)
    values = _rows("v", q, v, v_scale, v_zero, v_bits)
    width = heads * max(a.shape[-1] * a.dtype.itemsize for a in (k, v))
    tile = tile or tile_for("quant_decode_attention", chip, slots=slots, bytes_of_slot=width)

    at = lambda b, j, starts, stops: tile_of(starts[b], stops[b], j, tile, slots)  # noqa: E731
    of_rows = lambda a: pl.BlockSpec(  # noqa: E731
        (1, heads, tile, a.shape[-1]), lambda b, j, *s: (b, 0, at(b, j, *s), 0)
    )
    of_grid = pl.BlockSpec((1, heads, tile), lambda b, j, *s: (b, 0, at(b, j, *s)))
    of_heads = pl.BlockSpec((1, heads, group, dim), lambda b, j, *s: (b, 0, 0, 0))
    grids = [a for a in (k_scale, k_zero, v_scale, v_zero) if a is not None]
    out = pl.pallas_call(
        functools.partial(_kernel, keys, values, scale, tile),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, -(-slots // tile)),
            in_specs=[of_heads, of_rows(k), of_rows(v), *[of_grid] * len(grids)],
            out_specs=of_heads,
            scratch_shapes=[
                pltpu.VMEM((heads, group, LANES), jnp.float32),
                pltpu.VMEM((heads, group, LANES), jnp.float32),
                pltpu.VMEM((heads, group, dim), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=100 << 20),
        cost_estimate=pl.CostEstimate(
            flops=4 * q.size * slots,
            bytes_accessed=k.nbytes + v.nbytes + sum(a.nbytes for a in grids) + 2 * q.nbytes,
            transcendentals=batch * heads * group * slots,
        ),
        interpret=interpret,
        name="quant_decode_attention",
    )(
        starts.astype(jnp.int32),
        stops.astype(jnp.int32),
        _even_first(q) if keys.bits == 4 else q,
        k,
        v,
        *grids,
    )
    return _interleaved(out) if values.bits == 4 else out


def tile_of(start: Any, stop: Any, j: Any, tile: int, slots: int) -> Array:
    """The j-th tile that a sequence sees, and the last one when it sees fewer."""
    last = jnp.minimum(_tile(jnp.maximum(stop - 1, start), tile), (slots - 1) // tile)
    return jnp.minimum(_tile(start, tile) + j, last)


def _tile(slot: Any, tile: int) -> Array:
    """``slot // tile`` of what is not negative; `//` itself would ask what TPU this is."""
    return jax.lax.div(slot, jnp.int32(tile))


def _rows(
    name: str, q: Array, rows: Array, step: Array | None, zero: Array | None, bits: int
) -> Rows:
    """Raises `NotImplementedError` for what the kernel does not take."""
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"queries of {q.dtype}; bfloat16 or float32")
    if step is None:
        if rows.dtype != q.dtype:
            raise NotImplementedError(f"{name} of {rows.dtype} and queries of {q.dtype}")
        return Rows(0, False)
    if bits not in (4, 8) or q.shape[-1] % 2:
        raise NotImplementedError(f"{bits}-bit {name} of {q.shape[-1]} channels; 4 and 8, even")
    return Rows(bits, zero is not None)


def _even_first(a: Array) -> Array:
    return jnp.concatenate([a[..., ::2], a[..., 1::2]], axis=-1)


def _interleaved(a: Array) -> Array:
    return jnp.stack(jnp.split(a, 2, axis=-1), axis=-1).reshape(a.shape)


def _kernel(keys: Rows, values: Rows, scale: float, tile: int, starts, stops, *refs) -> None:
    refs = list(refs)
    q_ref, k_ref, v_ref = refs[:3]
    *grids, out_ref, top_ref, total_ref, sum_ref = refs[3:]
    take = lambda there: grids.pop(0) if there else None  # noqa: E731
    k_step, k_zero = take(keys.bits), take(keys.zero)
    v_step, v_zero = take(values.bits), take(values.zero)
    b, j = pl.program_id(0), pl.program_id(1)
    start, stop = starts[b], stops[b]
    first_slot = (_tile(start, tile) + j) * tile

    @pl.when(j == 0)
    def _():
        top_ref[...] = jnp.full_like(top_ref, FAR)
        total_ref[...] = jnp.zeros_like(total_ref)
        sum_ref[...] = jnp.zeros_like(sum_ref)

    @pl.when((first_slot < stop) & (start < stop))
    def _():
        sees = lambda at: (at >= start) & (at < stop)  # noqa: E731
        seen = sees(first_slot + jax.lax.broadcasted_iota(jnp.int32, (1, tile), 1))
        for h in range(q_ref.shape[1]):
            q = q_ref[0, h]
            scores = _product(q, _numbers(keys, k_ref[0, h]), 1)
            if keys.shifted:
                shift = _shift(keys, k_zero, h) * jnp.sum(
                    q.astype(jnp.float32), axis=1, keepdims=True
                )
                scores -= shift
            scores *= k_step[0, h : h + 1] * scale if keys.bits else scale
            scores = jnp.where(seen, scores, FAR)
            top = top_ref[h][:, :1]
            new_top = jnp.maximum(top, jnp.max(scores, axis=1, keepdims=True))
            decay = jnp.exp(top - new_top)
            weights = jnp.exp(scores - new_top)
            top_ref[h] = jnp.broadcast_to(new_top, top_ref.shape[1:])
            total = jnp.sum(weights, axis=1, keepdims=True)
            total_ref[h] = total_ref[h] * decay + total
            if values.bits:  # slots that are not seen may have any step
                weights *= jnp.where(seen, v_step[0, h : h + 1], 0.0)
            weights = weights.astype(q.dtype)
            numbers = _numbers(values, v_ref[0, h])
            if not values.bits:  # nor has 0 · NaN any place in the sum
                rows = first_slot + jax.lax.broadcasted_iota(jnp.int32, (tile, 1), 0)
                numbers = jnp.where(sees(rows), numbers, jnp.zeros_like(numbers))
            # Of the rounded weights, or the two sums would not cancel.
            shift = (
                jnp.sum(
                    weights.astype(jnp.float32) * _shift(values, v_zero, h), axis=1, keepdims=True
                )
                if values.shifted
                else 0.0
            )
            sum_ref[h] = sum_ref[h] * decay + _product(weights, numbers, 0) - shift

    @pl.when(j == pl.num_programs(1) - 1)
    def _():
        for h in range(q_ref.shape[1]):
            total = total_ref[h][:, :1]
            total = jnp.where(total > 0, total, 1.0)
            out_ref[0, h] = (sum_ref[h] / total).astype(out_ref.dtype)


def _numbers(rows: Rows, stored: Array) -> Array:
    """Floats or codes of a tile, `[slots, head_dim]`; nibbles as code + 8, even channels first."""
    if not rows.bits:
        return stored
    if rows.bits == 8:
        return pltpu.bitcast(stored, jnp.int8)
    words = pltpu.bitcast(stored, jnp.int32) ^ SIGNS
    halves = [words & NIBBLES, jax.lax.shift_right_logical(words, 4) & NIBBLES]
    return pltpu.bitcast(jnp.concatenate(halves, axis=1), jnp.int8)


def _shift(rows: Rows, zero_ref, h: int) -> Array | float:
    """What the products' codes are too large by, of every slot."""
    shift = 8.0 if rows.bits == 4 else 0.0
    if rows.zero:
        shift += zero_ref[0, h : h + 1].astype(jnp.float32)
    return shift


def _product(a: Array, numbers: Array, contracted: int) -> Array:
    """``a @ numbersᵀ`` (`contracted` 1) or ``a @ numbers`` (0)."""
    return jax.lax.dot_general(
        a,
        numbers.astype(a.dtype),
        (((1,), (contracted,)), ((), ())),
        preferred_element_type=jnp.float32,
        precision=jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
    )
