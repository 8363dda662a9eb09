"""Weights for Hopper: rows of output channels, as its tensor core reads them.

Codes of up to 4 bits lie two a byte (`jnp.int4`), wider ones one a byte. Output channels are padded
to multiples of 128, as are input channels where all share one scale.
"""

import math

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array

from pallas_kernels.chips import Chip
from pallas_kernels.packing import pack
from pallas_kernels.tuning_hopper import Matmul
from pallas_kernels.weight import Weight, canonical_weight, codes_of, grid_of

ALIGN = 128


def prepare(w: Weight, chip: Chip, sums: bool = False) -> Weight:
    """The weight in layout "rows" with axes of experts before it; one that is so already, as it is.

    A scale for all channels becomes one for each, so that `to_canonical` gives back an equal weight
    with a scale a channel.

    Args:
      sums: also store the sums of codes, for activations with a zero point.

    Raises:
      NotImplementedError: another chip, or groups that no tile of the kernels fits into.
    """
    if chip.name not in ("h100", "h200"):
        raise NotImplementedError(f"{chip.name} is no Hopper GPU")
    if w.groups > 1 and w.group_size % 32:
        raise NotImplementedError(f"groups of {w.group_size} input channels, no multiple of 32")
    if w.layout == "rows" and (w.sums is not None or not sums):
        return w
    codes = codes_of(w)
    scale, zero_point = grid_of(w)
    *experts, in_ch, out_ch = codes.shape
    n, k = padded(w)
    lead = [(0, 0)] * len(experts)
    grouped = codes.reshape(*experts, w.groups, w.group_size, out_ch)

    def pad(a: Array, dtype: DTypeLike, rows: int = 0) -> Array:
        a = jnp.broadcast_to(a, (*a.shape[:-1], out_ch)).astype(dtype)
        return jnp.pad(a, [*lead, (0, rows), (0, n - out_ch)])

    return w.replace(
        codes=pad(codes, jnp.int8, k - in_ch)
        .swapaxes(-1, -2)
        .astype(jnp.int4 if w.bits <= 4 else jnp.int8),
        scale=pad(scale, jnp.float32),
        zero_point=None if zero_point is None else pad(zero_point, jnp.int8),
        sums=pad(jnp.sum(grouped, axis=-2, dtype=jnp.int32), jnp.int32) if sums else None,
        layout="rows",
    )


def padded(w: Weight) -> tuple[int, int]:
    """Output and input channels of the prepared weight."""
    up = lambda channels: -(-channels // ALIGN) * ALIGN  # noqa: E731
    return up(w.out_ch), up(w.in_ch) if w.groups == 1 else w.in_ch


def example_weight(
    rng: np.random.Generator, w: Weight, tile: Matmul, experts: tuple[int, ...] = ()
) -> Weight:
    """A small canonical weight of the same kind, which fills a tile's pipeline more than once."""
    whole = tile.k * tile.parts * tile.split
    in_ch = whole * (tile.stages + 2)
    if w.groups > 1:
        in_ch = math.lcm(whole, w.group_size) * -(-in_ch // math.lcm(whole, w.group_size))
    group, out_ch = in_ch if w.groups == 1 else w.group_size, ALIGN
    grid = (*experts, in_ch // group, out_ch)
    draw = lambda *shape: rng.integers(-(2 ** (w.bits - 1)), 2 ** (w.bits - 1), shape)  # noqa: E731
    return canonical_weight(
        pack(jnp.asarray(draw(*experts, in_ch, out_ch), jnp.int8), w.bits),
        jnp.asarray(rng.uniform(0.5, 1.5, grid), jnp.float32),
        None if w.zero_point is None else jnp.asarray(draw(*grid), jnp.int8),
        w.bits,
        in_ch,
    )
