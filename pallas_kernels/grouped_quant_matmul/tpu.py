"""`grouped_quant_matmul` for TPUs: the tiles of `quant_matmul.tpu`, visited expert by expert.

Rows are sorted by expert, and experts end anywhere. A visit is one tile of rows with one expert
that has rows in it; a tile with rows of two experts is visited twice, in turn:

    rows     0 0 0 0 │ 0 1 1 3 │ 3 3 3 3 │ 3 · · ·       · rows of nobody, which give zeros
    tiles       0    │    1    │    2    │    3
    visits   (0, 0)  (1, 0) (1, 1) (1, 3)  (2, 3)  (3, 3) (3, ·)

    grid (N/bn, visits, K/bk), the last two sequential

Which tile and expert a visit has is data, known before the kernel starts, and decides what the
pipeline reads. Each visit multiplies the whole tile and keeps its own rows; the result's tile stays
on chip between visits. There are at most tiles + experts with rows − 1 visits. The grid has as many
as there might be; those left over, and those of nobody, read nothing and multiply nothing.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Int32

from pallas_kernels.chips import Chip
from pallas_kernels.quant_matmul.tpu import (
    F32,
    VMEM,
    Form,
    add_tile,
    begin,
    chip_form,
    finished,
    form_of,
    padded_shape,
    sizes_of,
)
from pallas_kernels.tuning import MatmulTile, tile_for
from pallas_kernels.weight import Weight


class Visits(NamedTuple):
    """What each visit does, in order; scalars that the pipeline reads ahead.

    Attributes:
      tile: of rows.
      expert: whose weight is on chip; for a visit without rows the one that is there already.
      start, stop: the expert's rows in the tile, counted in the tile; none where they are equal.
      first: 1 where the tile was not visited before.
    """

    tile: Int32[Array, " visits"]
    expert: Int32[Array, " visits"]
    start: Int32[Array, " visits"]
    stop: Int32[Array, " visits"]
    first: Int32[Array, " visits"]


def grouped_quant_matmul(
    x: Float[Array, "tokens in_ch"],
    w: Weight,
    group_sizes: Int[Array, " experts"],
    out_dtype: DTypeLike,
    *,
    chip: Chip,
    interpret: Any = False,
    tile: MatmulTile | None = None,
) -> Float[Array, "tokens out_ch"]:
    """See `pallas_kernels.grouped_quant_matmul.grouped_quant_matmul`.

    Raises:
      NotImplementedError: as `quant_matmul.tpu`.
    """
    if x.dtype not in (jnp.bfloat16, F32):
        raise NotImplementedError(f"activations are {x.dtype}, not bfloat16 or float32")
    w = chip_form(w)
    (m, in_ch), (k, _) = x.shape, padded_shape(w)
    if not m:
        return jnp.zeros((0, w.out_ch), out_dtype)
    sizes = {"experts": len(w.codes), **sizes_of(w)}
    form = form_of(w, tile or tile_for("grouped_quant_matmul", chip, m=m, **sizes))
    rows = -m % form.tile.m
    x = jnp.pad(x, ((0, rows), (0, k - in_ch)))
    visits = visits_of(group_sizes, m, m + rows, form.tile.m)
    y = _product(x, w, visits, form, jnp.dtype(out_dtype), interpret)
    return y[:m, : w.out_ch]


def visits_of(group_sizes: Array, rows: int, padded_rows: int, size: int) -> Visits:
    """The visits to tiles of `size` rows; those past the last repeat its tile without rows."""
    tiles = padded_rows // size
    experts = len(group_sizes)
    ends = jnp.minimum(jnp.cumsum(group_sizes.astype(jnp.int32)), rows)
    ends = jnp.append(ends, padded_rows)  # one more expert: nobody
    starts = jnp.append(0, ends[:-1])
    first_tile = starts // size
    counts = jnp.where(ends > starts, (ends - 1) // size - first_tile + 1, 0)
    until = jnp.cumsum(counts)
    v = jnp.arange(tiles + min(experts + 1, padded_rows) - 1, dtype=jnp.int32)
    past = v >= until[-1]
    owner = jnp.minimum(jnp.searchsorted(until, v, side="right"), experts).astype(jnp.int32)
    tile = jnp.where(past, tiles - 1, first_tile[owner] + v - (until - counts)[owner])
    nobody = past | (owner == experts)
    start = jnp.clip(starts[owner] - tile * size, 0, size)
    stop = jnp.clip(ends[owner] - tile * size, 0, size)
    last = jnp.max(jnp.where(nobody, 0, owner))
    before = jnp.append(-1, tile[:-1])
    return Visits(
        tile.astype(jnp.int32),
        jnp.where(nobody, last, owner).astype(jnp.int32),
        jnp.where(nobody, 0, start).astype(jnp.int32),
        jnp.where(nobody, 0, stop).astype(jnp.int32),
        (tile != before).astype(jnp.int32),
    )


def _product(
    x: Array, w: Weight, visits: Visits, form: Form, out_dtype: Any, interpret: Any
) -> Array:
    (m, k), (_, n) = x.shape, padded_shape(w)
    bm, bk, bn = form.tile[:3]
    packing = 2 if form.nibbles else 1
    cols = w.scale.shape[-1]
    last = k // bk - 1

    def weight_step(visit, step, of: Visits):
        # A visit without rows asks for what the visit before it asked for last.
        return jnp.where(of.stop[visit] > of.start[visit], step, last)

    def rows(j, visit, step, *refs):
        of = Visits(*refs)
        return of.tile[visit], weight_step(visit, step, of)

    def codes(j, visit, step, *refs):
        of = Visits(*refs)
        return of.expert[visit], weight_step(visit, step, of), j

    def grid(j, visit, step, *refs):
        return Visits(*refs).expert[visit], 0, j if cols > 1 else 0

    def result(j, visit, step, *refs):
        return Visits(*refs).tile[visit], j

    block = (w.scale.shape[-2], bn if cols > 1 else 1)
    grids = [w.scale.astype(F32)] + ([w.zero_point] if form.asymmetric else [])
    scratch = [pltpu.VMEM((bm, bn), F32)]
    if form.asymmetric:
        scratch.append(pltpu.VMEM(block, F32))
    return pl.pallas_call(
        functools.partial(_body, form),
        jax.ShapeDtypeStruct((m, n), out_dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(visits),
            grid=(n // bn, len(visits.tile), k // bk),
            in_specs=[
                pl.BlockSpec((bm, bk), rows),
                pl.BlockSpec((None, bk // packing, bn), codes),
                *([pl.BlockSpec((None, *block), grid)] * len(grids)),
            ],
            out_specs=pl.BlockSpec((bm, bn), result),
            scratch_shapes=scratch,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * m * n * k,
            transcendentals=0,
            # At most: every expert read once, the rows once for each tile of columns.
            bytes_accessed=x.nbytes * (n // bn)
            + w.codes.nbytes
            + w.scale.nbytes
            + m * n * out_dtype.itemsize,
        ),
        interpret=interpret,
        name="grouped_quant_matmul",
    )(*visits, x, w.codes, *grids)


def _body(form: Form, *refs) -> None:
    of, refs = Visits(*refs[:5]), refs[5:]
    x_ref, w_ref, s_ref, z_ref, o_ref, acc, zeros = (
        refs if form.asymmetric else (*refs[:3], None, *refs[3:], None)
    )
    visit, step, steps = pl.program_id(1), pl.program_id(2), pl.num_programs(2)
    start, stop = of.start[visit], of.stop[visit]

    @pl.when((of.first[visit] > 0) & (step == 0))
    def _():
        o_ref[...] = jnp.zeros_like(o_ref)

    @pl.when(stop > start)
    def _():
        @pl.when(step == 0)
        def _():
            begin(z_ref, acc, zeros)

        add_tile(form, x_ref[...], w_ref[...], s_ref, zeros, acc, step)

        @pl.when(step == steps - 1)
        def _():
            y = finished(form, s_ref, acc).astype(o_ref.dtype)
            row = jax.lax.broadcasted_iota(jnp.int32, y.shape, 0)
            o_ref[...] = jnp.where((row >= start) & (row < stop), y, o_ref[...])
