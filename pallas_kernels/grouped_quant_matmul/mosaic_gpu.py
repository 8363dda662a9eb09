"""`grouped_quant_matmul` on Hopper: the kernel of `quant_matmul`, with an expert for each tile.

The tokens of an expert are padded to whole tiles, by XLA, so that a tile has one expert and its
weight is found by adding to the index of a copy. An expert without tokens has no tile. How many
tiles there are is known on the device alone: programs beyond them end at once.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Int32

from pallas_kernels import hopper
from pallas_kernels.chips import CHIPS, Chip
from pallas_kernels.quant_matmul.mosaic_gpu import check, product
from pallas_kernels.quant_matmul.prepare_gpu import example_weight, padded, prepare
from pallas_kernels.trial import Example
from pallas_kernels.tuning_hopper import MAX_TOKENS, Matmul, matmul
from pallas_kernels.weight import Weight


def grouped_quant_matmul(
    x: Float[Array, "tokens in_ch"],
    w: Weight,
    group_sizes: Int[Array, " experts"],
    out_dtype: DTypeLike,
    *,
    chip: Chip,
    interpret: Any = False,
    tile: Matmul | None = None,
) -> Float[Array, "tokens out_ch"]:
    """See `pallas_kernels.grouped_quant_matmul.grouped_quant_matmul`."""
    check(x, w)
    tile = tile or tile_of(w, len(x))
    w = prepare(w, chip)
    plan = tiles_of(jnp.asarray(group_sizes), len(x), tile.tokens)
    rows = jnp.take(x, plan.token, axis=0, mode="fill", fill_value=0)
    rows = hopper.pad_to(rows, tile.tokens, w.codes.shape[-1])
    y = product(rows, w, jnp.dtype(out_dtype), tile, interpret, plan.expert)[0]
    return jnp.take(y[:, : w.out_ch], plan.row, axis=0, mode="fill", fill_value=0)


def tile_of(w: Weight, tokens: int) -> Matmul:
    """The tile for so many tokens, were they shared out evenly."""
    (n, k), experts = padded(w), w.shape[0]
    group = k if w.groups == 1 else w.group_size
    each = min(-(-tokens // experts), MAX_TOKENS)
    return matmul(each, k, n, group, 4 if w.bits <= 4 else 8)._replace(split=1)


class Tiles(NamedTuple):
    """Tokens in tiles of one expert each.

    Attributes:
      expert: of every tile; −1 for tiles that nobody needs.
      token: of every row of the tiles; as many as there are tokens for a row of padding.
      row: of every token; as many as there are rows for a token of nobody.
    """

    expert: Int32[Array, " tiles"]
    token: Int32[Array, " rows"]
    row: Int32[Array, " tokens"]


def tiles_of(group_sizes: Int[Array, " experts"], tokens: int, size: int) -> Tiles:
    """Tiles of `size` rows for experts of so many tokens."""
    sizes = group_sizes.astype(jnp.int32)
    count = (tokens + min(len(sizes), tokens) * (size - 1)) // size  # no sizes make more
    tiles = -(-sizes // size)
    token_end, tile_end = jnp.cumsum(sizes), jnp.cumsum(tiles)
    index = jnp.arange(count, dtype=jnp.int32)
    expert = jnp.searchsorted(tile_end, index, side="right").astype(jnp.int32)
    expert = jnp.where(index < tile_end[-1], expert, -1)
    token = jnp.arange(tokens, dtype=jnp.int32)
    owner = jnp.minimum(jnp.searchsorted(token_end, token, side="right"), len(sizes) - 1)
    row = (tile_end - tiles)[owner] * size + token - (token_end - sizes)[owner]
    row = jnp.where(token < token_end[-1], row, count * size).astype(jnp.int32)
    source = jnp.full(count * size, tokens, jnp.int32).at[row].set(token, mode="drop")
    return Tiles(expert, source, row)


def example(x: Array, w: Weight, group_sizes: Array, out_dtype: DTypeLike) -> Example:
    """Operands of a call like this one, for `pallas_kernels.trial`."""
    check(x, w)
    tile = tile_of(w, len(x))
    rng = np.random.default_rng(0)
    small = example_weight(rng, w, tile, (3,))
    sizes = np.array([tile.tokens + 1, 0, 2], np.int32)
    rows = rng.standard_normal((int(sizes.sum()) + 1, small.in_ch))
    bits = 4 if w.bits <= 4 else 8
    return Example(
        (x.dtype.name, bits, w.groups == 1, w.zero_point is None, tile),
        (rows.astype(x.dtype), prepare(small, CHIPS["h100"]), sizes),
        tile,
    )


EXAMPLES = {"grouped_quant_matmul": example}
