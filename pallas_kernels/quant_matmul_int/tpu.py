"""`quant_matmul_int` for TPUs: int8 products on the matrix unit, scaled once a group is summed.

The tiles are those of `quant_matmul.tpu`, with x in int8; codes of 4 bits become int8 in registers,
because the matrix unit multiplies no two widths with each other. Per group, in int32:

    Σ (qx − zx)(qw − zw)  =  Σ qx·qw  −  zx·Σ qw  −  zw·(Σ qx − |G|·zx)

Σ qw comes with a prepared weight, or is one more product, with ones. Weights with one group are
summed in int32 to the end, others in float32 from group to group. A token's scale multiplies the
finished tile; it comes as 128 equal columns, which saves the copy into that layout.

For few rows, reading w is the bound on both chips: to make int8 of 4 bits costs less than reading
them. For many it is the matrix unit.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int8

from pallas_kernels.chips import Chip
from pallas_kernels.quant_matmul.tpu import (
    F32,
    VMEM,
    apart,
    chip_form,
    grid_spec,
    padded_shape,
    sizes_of,
)
from pallas_kernels.tuning import LANES, MatmulTile, tile_for
from pallas_kernels.weight import Weight

I32 = jnp.int32


class Form(NamedTuple):
    """What is fixed when a kernel is compiled."""

    tile: MatmulTile
    group: int  # input channels that share a scale
    grouped: bool  # more than one group
    nibbles: bool
    four: bool  # multiply int4 by int4
    shifted: bool  # activations have a zero point
    sums: bool  # the weight has the sums of its columns
    asymmetric: bool  # the weight has a zero point


def quant_matmul_int(
    codes: Int8[Array, "*tokens in_ch"],
    code_scale: Float[Array, "*#tokens 1"],
    code_zero: Int8[Array, "*#tokens 1"] | None,
    w: Weight,
    out_dtype: DTypeLike,
    *,
    chip: Chip,
    interpret: Any = False,
    tile: MatmulTile | None = None,
    four: bool = False,
) -> Float[Array, "*tokens out_ch"]:
    """See `pallas_kernels.quant_matmul_int.quant_matmul_int`.

    Args:
      four: the codes, too, have at most 4 bits: multiply int4 by int4, at twice the speed of int8.
        Not for interpreters, as a CPU has no such product.

    Raises:
      NotImplementedError: a weight of 2, 3, 5, 6 or 7 bits that is not prepared; groups that fit no
        tile; a chip without tiles.
    """
    w = chip_form(w)
    *tokens, in_ch = codes.shape
    x = codes.reshape(-1, in_ch)
    m, (k, n) = len(x), padded_shape(w)
    if not m:
        return jnp.zeros((*tokens, w.out_ch), out_dtype)
    tile = tile or tile_for("quant_matmul_int", chip, m=m, **sizes_of(w))
    form = Form(
        tile,
        w.group_size,
        w.groups > 1,
        w.layout == "nibbles",
        four,
        code_zero is not None,
        w.sums is not None,
        w.zero_point is not None,
    )
    _check(form, k, n)
    more = -m % tile.m
    x = jnp.pad(x, ((0, more), (0, k - in_ch)))
    columns = lambda a: jnp.pad(  # noqa: E731
        jnp.broadcast_to(jnp.broadcast_to(a, (*tokens, 1)).reshape(-1, 1), (m, LANES)),
        ((0, more), (0, 0)),
    )
    scale = columns(code_scale.astype(F32))
    zero = columns(code_zero.astype(I32)) if form.shifted else None
    y = _product(x, scale, zero, w, form, jnp.dtype(out_dtype), interpret)
    return y[:m, : w.out_ch].reshape(*tokens, w.out_ch)


def _check(form: Form, k: int, n: int) -> None:
    tile = form.tile
    if k % tile.k or n % tile.n:
        raise ValueError(f"tile {tile} does not divide a weight of {k} × {n}")
    if form.grouped and tile.k % form.group:
        raise NotImplementedError(f"{tile.k} input channels are no whole groups of {form.group}")
    if form.four and not form.nibbles:
        raise NotImplementedError("int4 × int4 takes a weight of at most 4 bits")


def _product(
    x: Array,
    scale: Array,
    zero: Array | None,
    w: Weight,
    form: Form,
    out_dtype: Any,
    interpret: Any,
) -> Array:
    (m, k), (_, n) = x.shape, padded_shape(w)
    bm, bk, bn = form.tile[:3]
    packing = 2 if form.nibbles else 1
    rows = pl.BlockSpec((bm, LANES), lambda i, j, step: (i, 0))
    operands = {
        "x": (x.astype(jnp.int4) if form.four else x, pl.BlockSpec((bm, bk), _at("i", "step"))),
        "w": (w.codes, pl.BlockSpec((bk // packing, bn), _at("step", "j"))),
        "token_scale": (scale, rows),
        "token_zero": (zero, rows),
        "scale": (w.scale.astype(F32), grid_spec(w.scale, bn)),
        "zero": (w.zero_point, w.zero_point is not None and grid_spec(w.zero_point, bn)),
        "sums": (w.sums, w.sums is not None and grid_spec(w.sums, bn)),
    }
    if not form.shifted:
        operands["sums"] = (None, None)
    given = {name: pair for name, pair in operands.items() if pair[0] is not None}
    scratch = {"acc": pltpu.VMEM((bm, bn), F32 if form.grouped else I32)}
    if form.asymmetric:
        block = given["zero"][1].block_shape
        scratch["zeros"] = pltpu.VMEM(block, I32)
        if not form.grouped:
            scratch["total"] = pltpu.VMEM((bm, 1), I32)
    if form.shifted and not form.sums and not form.grouped:
        scratch["columns"] = pltpu.VMEM((8, bn), I32)

    def body(*refs):
        names = (*given, "o", *scratch)
        _body(form, dict(zip(names, refs, strict=True)))

    return pl.pallas_call(
        body,
        jax.ShapeDtypeStruct((m, n), out_dtype),
        grid=(m // bm, n // bn, k // bk),
        in_specs=[spec for _, spec in given.values()],
        out_specs=pl.BlockSpec((bm, bn), _at("i", "j")),
        scratch_shapes=list(scratch.values()),
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
        name="quant_matmul_int",
    )(*(array for array, _ in given.values()))


def _at(*axes: str):
    return lambda i, j, step: tuple({"i": i, "j": j, "step": step}[axis] for axis in axes)


def _body(form: Form, ref: dict[str, Any]) -> None:
    step, steps = pl.program_id(2), pl.num_programs(2)

    @pl.when(step == 0)
    def _():
        for name in {"acc", "total", "columns"} & ref.keys():
            ref[name][...] = jnp.zeros_like(ref[name])
        if form.asymmetric:
            ref["zeros"][...] = ref["zero"][...].astype(I32)

    x = ref["x"][...]
    w = ref["w"][...]
    if form.nibbles:
        w = pltpu.bitcast(w, jnp.int4)
        w = w if form.four else w.astype(jnp.int8)
    if form.grouped:
        _add_groups(form, ref, x, w, step)
    else:
        ref["acc"][...] += _dot(x, w)
        if form.asymmetric:
            ref["total"][...] += _total(x)
        if "columns" in ref:
            ref["columns"][...] += _columns(w)

    @pl.when(step == steps - 1)
    def _():
        y = ref["acc"][...]
        if not form.grouped:
            columns = ref["sums"][...] if form.sums and form.shifted else None
            if "columns" in ref:
                columns = ref["columns"][:1]
            zero = ref["zeros"][...] if form.asymmetric else None
            total = ref["total"][...] if form.asymmetric else None
            y = _shift(form, y, _token_zero(ref), columns, total, zero)
            y = y.astype(F32) * ref["scale"][...]
        ref["o"][...] = (y * ref["token_scale"][:, :1]).astype(ref["o"].dtype)


def _add_groups(form: Form, ref: dict[str, Any], x: Array, w: Array, step: Array) -> None:
    size, bm = form.group, len(x)
    span = max(size, math.gcd(form.tile.k, form.tile.span))
    sharing, groups = span // size, form.tile.k // size
    for j in range(form.tile.k // span):
        here, weights = (a for a in (x[:, j * span : (j + 1) * span], w[j * span : (j + 1) * span]))
        if sharing > 1:
            here = apart(here, sharing)
        sums = _dot(here, weights)
        for i in range(sharing):
            part = slice(i * bm, (i + 1) * bm)
            row = pl.ds(step * groups + j * sharing + i, 1)
            columns = None
            if form.shifted:
                rows = slice(i * size, (i + 1) * size)
                columns = ref["sums"][row, :] if form.sums else _columns(weights[rows])[:1]
            zero = ref["zeros"][row, :] if form.asymmetric else None
            total = _total(here[part]) if form.asymmetric else None
            y = _shift(form, sums[part], _token_zero(ref), columns, total, zero)
            ref["acc"][...] += y.astype(F32) * ref["scale"][row, :]


def _shift(form: Form, y, token_zero, columns, total, zero) -> Array:
    """Σ (qx − zx)(qw − zw) of a group from `y` Σ qx·qw, `columns` Σ qw and `total` Σ qx."""
    if form.shifted:
        y = y - token_zero * columns
    if form.asymmetric:
        if form.shifted:
            total = total - form.group * token_zero
        y = y - total * zero
    return y


def _token_zero(ref: dict[str, Any]) -> Array | None:
    return ref["token_zero"][:, :1] if "token_zero" in ref else None


def _total(x: Array) -> Array:
    return jnp.sum(x.astype(I32), axis=1, keepdims=True)


def _columns(w: Array) -> Array:
    """Σ over input channels, in each of 8 equal rows."""
    return _dot(jnp.ones((8, len(w)), w.dtype), w)


def _dot(x: Array, w: Array) -> Array:
    return jax.lax.dot_general(x, w, (((1,), (0,)), ((), ())), preferred_element_type=I32)
