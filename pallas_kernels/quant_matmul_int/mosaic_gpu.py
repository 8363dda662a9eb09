"""`quant_matmul_int` on Hopper: 8-bit products of the tensor core, also for weights of 4 bits.

int8 weights are read from on-chip memory; those of 4 bits are widened to int8 in registers, by a
few logic operations for eight of them, and are the left operand from there. There are no 4-bit
products on Hopper: W4A4 saves bytes and not multiplications.

With p = Σ qx·qw over a group, in int32, what is added up is

    s · (p − zx·Σ qw − zw·t),   t = Σ qx − |G|·zx,

for which the sums of the weight come prepared and `t` is made by XLA. Where all input channels
share a scale, p stays in the tensor core to the end. The scale of a token comes last.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int8, Int32

from pallas_kernels import hopper
from pallas_kernels.chips import CHIPS, Chip
from pallas_kernels.hopper import Layout, Place
from pallas_kernels.quant_matmul.prepare_gpu import example_weight, padded, prepare
from pallas_kernels.trial import Example
from pallas_kernels.tuning_hopper import Matmul, matmul_int
from pallas_kernels.weight import Weight


def quant_matmul_int(
    codes: Int8[Array, "*tokens in_ch"],
    code_scale: Float[Array, "*#tokens 1"],
    code_zero: Int8[Array, "*#tokens 1"] | None,
    w: Weight,
    out_dtype: DTypeLike,
    *,
    chip: Chip,
    interpret: Any = False,
    tile: Matmul | None = None,
) -> Float[Array, "*tokens out_ch"]:
    """See `pallas_kernels.quant_matmul_int.quant_matmul_int`; `tile` None is that of the rule."""
    if w.layout not in ("canonical", "rows"):
        raise NotImplementedError(f"the weight is in its {w.layout} form")
    w = prepare(w, chip, sums=code_zero is not None)
    lead, (n, k) = codes.shape[:-1], w.codes.shape
    tokens = codes.size // w.in_ch
    tile = tile or tile_of(w, (n, k), tokens)

    def of_token(a: Array) -> Array:  # padded to whole tiles, and to what a copy has at least
        a = jnp.broadcast_to(a, (*lead, 1)).reshape(tokens)
        return jnp.pad(a, (0, -tokens % max(tile.tokens, hopper.LEAST // 4)))

    x = hopper.pad_to(codes.reshape(tokens, w.in_ch), tile.tokens, k)
    scale = of_token(code_scale.astype(jnp.float32))
    zero = None if code_zero is None else of_token(code_zero).astype(jnp.int32)
    shifted = None if w.zero_point is None else _shifted_sums(x, zero, w, len(scale))
    y = _call(x, w, scale, zero, shifted, jnp.dtype(out_dtype), tile, interpret)
    return y[:tokens, : w.out_ch].reshape(*lead, w.out_ch).astype(out_dtype)


def tile_of(w: Weight, shape: tuple[int, int], tokens: int) -> Matmul:
    """The tile for so many tokens and a weight of `shape` output and input channels, prepared."""
    n, k = shape
    return matmul_int(tokens, k, n, k if w.groups == 1 else w.group_size, 4 if w.bits <= 4 else 8)


def _shifted_sums(
    x: Int8[Array, "tokens k"], zero: Int32[Array, " more"] | None, w: Weight, length: int
) -> Int32[Array, "groups more"]:
    """``t`` of every group and token."""
    sums = jnp.sum(x.reshape(len(x), w.groups, -1), axis=-1, dtype=jnp.int32).T
    sums = jnp.pad(sums, [(0, 0), (0, length - len(x))])
    return sums if zero is None else sums - w.group_size * zero


def _call(
    x: Int8[Array, "tokens k"],
    w: Weight,
    scale: Float[Array, " more"],
    zero: Int32[Array, " more"] | None,
    shifted: Int32[Array, "groups more"] | None,
    dtype: Any,
    tile: Matmul,
    interpret: Any,
) -> Float[Array, "tokens out"]:
    """Runs the kernel, and what is left to do where it splits the input channels."""
    n, split, one_group = w.codes.shape[0], tile.split > 1, w.groups == 1
    if split:
        dtype = jnp.dtype(jnp.int32 if one_group else jnp.float32)
    operands = {"scale": w.scale, "token_scale": scale}
    if zero is not None:
        operands |= {"sums": w.sums, "zero": zero}
    if shifted is not None:
        operands |= {"w_zero": w.zero_point, "shifted": shifted}
    kernel = plgpu.kernel(
        functools.partial(
            _kernel, names=tuple(operands), tile=tile, groups=w.groups, interpret=interpret
        ),
        out_type=jax.ShapeDtypeStruct((tile.split, len(x), n), dtype),
        scratch_types=[hopper.buffer((tile.tokens, tile.out), dtype)],
        grid=(n // tile.out, len(x) // tile.tokens, tile.split),
        grid_names=("out", "tokens", "split"),
        kernel_name="quant_matmul_int",
        interpret=interpret,
    )
    parts = kernel(x, w.codes, *operands.values())
    if not split:
        return parts[0]
    y, tokens = jnp.sum(parts, axis=0), len(x)
    if one_group:
        if zero is not None:
            y = y - zero[:tokens, None] * w.sums
        if shifted is not None:
            y = y - shifted[0, :tokens, None] * w.zero_point.astype(jnp.int32)
        y = y.astype(jnp.float32) * w.scale
    return y * scale[:tokens, None]


def _kernel(x_ref, w_ref, *refs, names, tile, groups, interpret):
    *refs, y_ref, y_buffer = refs
    refs = dict(zip(names, refs, strict=True))
    place = Place(*(jax.lax.axis_index(name) for name in ("out", "tokens", "split")))
    shape, one_group, i32 = (tile.out, tile.tokens), groups == 1, jnp.int32
    channels = pl.ds(place.out * tile.out, tile.out)
    tokens = pl.ds(place.tokens * tile.tokens, tile.tokens)

    def of_token(ref):
        line = hopper.load_line(ref.at[tokens], 1, interpret)
        return jax.lax.broadcast_in_dim(line, shape, [1])

    def of_channel(name):
        line = hopper.load_line(refs[name].at[0, channels], 0, interpret)
        return jax.lax.broadcast_in_dim(line, shape, [0])

    def add_products(total, x_tile, w_tile):
        if hopper.width(w_ref) == 4:
            w = hopper.load(w_tile, Layout.WGMMA_8BIT, interpret).astype(jnp.int8)
        else:
            w = w_tile
        return hopper.product(total, w, x_tile, i32, interpret)

    def without_zeros(p, sums, token_zero, w_zero, shifted):
        if token_zero is not None:
            p = p - token_zero * sums
        return p if w_zero is None else p - shifted * w_zero.astype(i32)

    def finish(y):
        if tile.split == 1:
            y = y * of_token(refs["token_scale"])
        hopper.store_transposed(y_buffer, y_ref.at[place.split, tokens, channels], y, interpret)

    token_zero = of_token(refs["zero"]) if "zero" in names else None
    walk = functools.partial(hopper.walk, place=place, tile=tile, groups=groups, x=x_ref, w=w_ref)
    if one_group:
        add = lambda total, x_tile, w_tile, *_: add_products(total, x_tile, w_tile)  # noqa: E731
        p = walk(add, hopper.zeros(shape, i32, interpret))
        if tile.split > 1:
            hopper.store_transposed(y_buffer, y_ref.at[place.split, tokens, channels], p, interpret)
            return
        p = without_zeros(
            p,
            of_channel("sums") if "sums" in names else None,
            token_zero,
            of_channel("w_zero") if "w_zero" in names else None,
            of_token(refs["shifted"].at[0]) if "shifted" in names else None,
        )
        finish(p.astype(jnp.float32) * of_channel("scale"))
        return

    row_names = [name for name in ("scale", "sums", "w_zero") if name in names]
    col_names = [name for name in ("shifted",) if name in names]

    def add(total, x_tile, w_tile, rows, cols):
        rows, cols = (
            dict(zip(row_names, rows, strict=True)),
            dict(zip(col_names, cols, strict=True)),
        )
        p = add_products(None, x_tile, w_tile)
        line = lambda lines, name, axis: (  # noqa: E731
            hopper.spread(lines[name], shape, axis, interpret) if name in lines else None
        )
        sums, w_zero = line(rows, "sums", 0), line(rows, "w_zero", 0)
        p = without_zeros(p, sums, token_zero, w_zero, line(cols, "shifted", 1))
        return total + p.astype(jnp.float32) * line(rows, "scale", 0)

    rows, cols = [refs[name] for name in row_names], [refs[name] for name in col_names]
    finish(walk(add, hopper.zeros(shape, jnp.float32, interpret), rows=rows, cols=cols))


def example(
    codes: Array, code_scale: Array, code_zero: Array | None, w: Weight, out_dtype: DTypeLike
) -> Example:
    """Operands of a call like this one, for `pallas_kernels.trial`."""
    tile = tile_of(w, padded(w), codes.size // w.in_ch)
    tile = tile._replace(split=min(tile.split, 2))
    rng = np.random.default_rng(0)
    small = example_weight(rng, w, tile)
    tokens, draw = tile.tokens + 1, lambda *shape: rng.integers(-128, 128, shape).astype(np.int8)
    return Example(
        (w.bits <= 4, w.groups == 1, w.zero_point is None, code_zero is None, tile),
        (
            draw(tokens, small.in_ch),
            rng.uniform(0.5, 1.5, (tokens, 1)).astype(np.float32),
            None if code_zero is None else draw(tokens, 1),
            prepare(small, CHIPS["h100"], sums=code_zero is not None),
        ),
        tile,
    )


EXAMPLES = {"quant_matmul_int": example}
