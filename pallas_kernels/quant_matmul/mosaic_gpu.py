"""`quant_matmul` on Hopper: codes widened in registers, products of the tensor core.

Codes minus zero points become 16-bit floats in registers, exactly, and are the left operand
(`pallas_kernels.hopper` has the picture). The sums of a group are scaled, not its weights: it is
exact, and up to 64 tokens it is fewer multiplications. Where all input channels share a scale, the
sums stay in the tensor core to the end.

Few tokens are bound by the bytes of the weight. Input channels are then split over programs, so
that all multiprocessors copy, and XLA adds the parts. Many tokens are bound by the tensor core;
from some number on, to dequantize once and multiply in bfloat16 takes less time and the call is
left to the reference.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from pallas_kernels import hopper
from pallas_kernels.chips import CHIPS, Chip
from pallas_kernels.hopper import Layout, Place
from pallas_kernels.quant_matmul.prepare_gpu import example_weight, padded, prepare
from pallas_kernels.trial import Example
from pallas_kernels.tuning_hopper import Matmul, matmul
from pallas_kernels.weight import Weight


def quant_matmul(
    x: Float[Array, "*tokens in_ch"],
    w: Weight,
    out_dtype: DTypeLike,
    *,
    chip: Chip,
    interpret: Any = False,
    tile: Matmul | None = None,
) -> Float[Array, "*tokens out_ch"]:
    """See `pallas_kernels.quant_matmul.quant_matmul`; `tile` None is that of the rule."""
    check(x, w)
    w, tokens = prepare(w, chip), x.size // w.in_ch
    tile = tile or tile_of(w, tokens)
    rows = hopper.pad_to(x.reshape(tokens, w.in_ch), tile.tokens, w.codes.shape[-1])
    parts = product(rows, w, jnp.dtype(out_dtype), tile, interpret)
    y = parts[0] if tile.split == 1 else jnp.sum(parts, axis=0)
    return y[:tokens, : w.out_ch].reshape(*x.shape[:-1], w.out_ch).astype(out_dtype)


def check(x: Array, w: Weight) -> None:
    """Refuses what the kernel does not take.

    Raises:
      NotImplementedError: activations of 32 bits, or a weight prepared for another chip.
    """
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"activations of {x.dtype}; the tensor core takes 16-bit floats")
    if w.layout not in ("canonical", "rows"):
        raise NotImplementedError(f"the weight is in its {w.layout} form")


def tile_of(w: Weight, tokens: int) -> Matmul:
    """The tile for so many tokens and a prepared weight."""
    n, k = w.codes.shape[-2:]
    group = k if w.groups == 1 else w.group_size
    return matmul(tokens, k, n, group, hopper.width(w.codes))


def product(
    x: Float[Array, "tokens k"],
    w: Weight,
    dtype: jnp.dtype,
    tile: Matmul,
    interpret: Any,
    expert: Int32[Array, " tiles"] | None = None,
) -> Float[Array, "split tokens out"]:
    """Runs the kernel.

    Args:
      x: padded to whole tiles.
      w: prepared, with experts if `expert` is given.
      dtype: of the result; float32 where the tile splits the input channels.
      expert: whose weight each tile of tokens is multiplied by; what −1 gives is undefined.
    """
    n = w.codes.shape[-2]
    dtype = jnp.dtype(jnp.float32) if tile.split > 1 else dtype
    flat = lambda a: a.reshape(-1, a.shape[-1])  # noqa: E731
    zero = () if w.zero_point is None else (flat(w.zero_point),)
    kernel = plgpu.kernel(
        functools.partial(
            _kernel,
            tile=tile,
            groups=w.groups,
            grouped=expert is not None,
            interpret=interpret,
        ),
        out_type=jax.ShapeDtypeStruct((tile.split, len(x), n), dtype),
        scratch_types=[hopper.buffer((tile.tokens, tile.out), dtype)],
        grid=(n // tile.out, len(x) // tile.tokens, tile.split),
        grid_names=("out", "tokens", "split"),
        kernel_name="quant_matmul" if expert is None else "grouped_quant_matmul",
        interpret=interpret,
    )
    more = () if expert is None else (expert,)
    return kernel(x, hopper.tiled(flat(w.codes), tile.k), flat(w.scale), *zero, *more)


def _kernel(x_ref, w_ref, scale_ref, *refs, tile, groups, grouped, interpret):
    *refs, y_ref, y_buffer = refs
    at = [jax.lax.axis_index(name) for name in ("out", "tokens", "split")]
    if not grouped:
        _program(
            x_ref, w_ref, scale_ref, refs, y_ref, y_buffer, Place(*at), tile, groups, interpret
        )
        return
    *refs, expert_ref = refs
    expert = expert_ref[at[1]]

    @pl.when(expert >= 0)
    def _():
        place = Place(*at, expert * (y_ref.shape[-1] // tile.out), expert * groups)
        _program(x_ref, w_ref, scale_ref, refs, y_ref, y_buffer, place, tile, groups, interpret)


def _program(x_ref, w_ref, scale_ref, zero_refs, y_ref, y_buffer, place, tile, groups, interpret):
    bits, shape = hopper.width(w_ref), (tile.out, tile.tokens)
    columns = pl.ds(place.out * tile.out, tile.out)
    channel = lambda ref: hopper.load_line(ref.at[place.first_group, columns], 0, interpret)  # noqa: E731
    one_group = groups == 1
    fixed = [channel(ref) for ref in zero_refs] if one_group else []

    def add(total, x_tile, w_tile, rows, _):
        q = hopper.load(w_tile, hopper.UPCAST[bits], interpret)
        w = hopper.lay(q, Layout.WGMMA, interpret).astype(x_tile.dtype)
        if one_group:
            for z in fixed:
                w = w - jax.lax.broadcast_in_dim(z.astype(w.dtype), w.shape, [0])
            return hopper.product(total, w, x_tile, jnp.float32, interpret)
        scale, *zeros = rows
        for z in zeros:
            w = w - hopper.spread(z, w.shape, 0, interpret).astype(w.dtype)
        part = hopper.product(None, w, x_tile, jnp.float32, interpret)
        return total + part * hopper.spread(scale, shape, 0, interpret)

    rows = () if one_group else (scale_ref, *zero_refs)
    total = hopper.zeros(shape, jnp.float32, interpret)
    y = hopper.walk(add, total, place, tile, groups, x_ref, w_ref, rows)
    if one_group:
        y = y * jax.lax.broadcast_in_dim(channel(scale_ref), shape, [0])
    tokens = pl.ds(place.tokens * tile.tokens, tile.tokens)
    hopper.store_transposed(y_buffer, y_ref.at[place.split, tokens, columns], y, interpret)


def example(x: Array, w: Weight, out_dtype: DTypeLike) -> Example:
    """Operands of a call like this one, for `pallas_kernels.trial`."""
    check(x, w)
    (n, k), group = padded(w), w.group_size
    bits = 4 if w.bits <= 4 else 8
    tile = matmul(x.size // w.in_ch, k, n, k if w.groups == 1 else group, bits)
    tile = tile._replace(split=min(tile.split, 2))
    rng = np.random.default_rng(0)
    small = example_weight(rng, w, tile)
    rows = rng.standard_normal((tile.tokens + 1, small.in_ch))
    return Example(
        (x.dtype.name, bits, w.groups == 1, w.zero_point is None, tile),
        (rows.astype(x.dtype), prepare(small, CHIPS["h100"])),
        tile,
    )


EXAMPLES = {"quant_matmul": example}
