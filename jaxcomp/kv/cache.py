"""The KV cache: every key and value, in the compute dtype or as packed codes.

Layout `[batch, kv_head, time, …]`. Slots are filled in order; `positions` and `valid` are shared by
all blocks and say which token sits in which slot, so padding on either side works.

Who stores, quantizes: where a block's site `k_cache` or `v_cache` has a quantizer, the codes that
the site gives are what is kept, and attention reads `(q − z)·s`, the number that simulation rounds
to. K and V may differ in form and width.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int8, UInt8

from jaxcomp.core.activation import QActivation, as_float
from jaxcomp.core.quantize import QuantSpec
from jaxcomp.core.struct import node, static
from pallas_kernels.packing import pack_rows, packed_rows, unpack_rows


@node
class PackedRows:
    """Keys or values of one block as codes; a row is what one head has of one token.

    A row takes ceil(head_dim · bits / 8) bytes, and on a dynamic grid 4 for its scale and 1 for its
    zero point. A static grid is the site's; nothing of it is kept here.

    Attributes:
      packed: codes, each row a little-endian bit stream (`pallas_kernels.packing.pack_rows`).
      scale, zero_point: the grid of each row, float32 and int8; None when static or symmetric.
    """

    packed: UInt8[Array, "batch kv_head capacity bytes"]
    scale: Float[Array, "batch kv_head capacity 1"] | None = None
    zero_point: Int8[Array, "batch kv_head capacity 1"] | None = None
    bits: int = static(default=8)
    head_dim: int = static(default=64)


@node
class LayerCache:
    """Keys (after RoPE) and values of one block."""

    k: Float[Array, "batch kv_head capacity head_dim"] | PackedRows
    v: Float[Array, "batch kv_head capacity head_dim"] | PackedRows


@node
class Cache:
    """All blocks' caches and the book-keeping they share.

    Attributes:
      layers: one cache a block.
      positions: RoPE position of the token in each slot.
      valid: True where the slot holds a real token.
      length: slots filled so far.
      horizon: positions that the sequences may have in the end; a rotary embedding that depends on
        the length goes by it, so that all keys of a cache agree whenever they came.
    """

    layers: tuple[LayerCache, ...]
    positions: Int[Array, "batch capacity"]
    valid: Bool[Array, "batch capacity"]
    length: Int[Array, ""]
    horizon: Int[Array, ""]


def init_cache(
    layers: tuple[LayerCache, ...], batch: int, capacity: int, horizon: int | None = None
) -> Cache:
    """A cache of empty layers in which no slot is filled; without a horizon it is the capacity."""
    return Cache(
        layers,
        jnp.zeros((batch, capacity), jnp.int32),
        jnp.zeros((batch, capacity), bool),
        jnp.zeros((), jnp.int32),
        jnp.asarray(capacity if horizon is None else horizon, jnp.int32),
    )


def empty_rows(
    spec: QuantSpec | None, shape: tuple[int, int, int, int], dtype: Any
) -> Float[Array, "batch kv_head capacity head_dim"] | PackedRows:
    """Room for rows of `shape` in `dtype`, or on the grid `spec` where it is given.

    Raises:
      ValueError: the grid's range would be that of all tokens of a call.
    """
    if spec is None:
        return jnp.zeros(shape, dtype)
    if spec.dynamic and spec.granularity == "tensor":
        raise ValueError(
            f"{spec} at a cache is dynamic over all tokens, but a cache grows call by call; "
            "use granularity='head' for a range per token and head, or a static range"
        )
    *rows, head_dim = shape
    grid = lambda wanted, dtype: jnp.zeros((*rows, 1), dtype) if wanted else None  # noqa: E731
    return PackedRows(
        jnp.zeros((*rows, packed_rows(head_dim, spec.bits)), jnp.uint8),
        grid(spec.dynamic, jnp.float32),
        grid(spec.dynamic and not spec.symmetric, jnp.int8),
        spec.bits,
        head_dim,
    )


def resized(cache: Cache, capacity: int) -> Cache:
    """The cache with room for `capacity` tokens, no fewer than it has; the new slots are empty."""
    more = capacity - cache.valid.shape[1]
    add = lambda a, axis: jnp.pad(a, [(0, more * (i == axis)) for i in range(a.ndim)])  # noqa: E731
    return cache.replace(
        layers=jax.tree.map(lambda a: add(a, 2), cache.layers),
        positions=add(cache.positions, 1),
        valid=add(cache.valid, 1),
    )


def rewound(cache: Cache, length: Int[Array, ""]) -> Cache:
    """The cache as it was when `length` of its slots were filled."""
    kept = jnp.arange(cache.valid.shape[1]) < length
    return cache.replace(valid=cache.valid & kept, length=length)


def packed_sites(cache: LayerCache | None) -> tuple[str, ...]:
    """The sites whose codes the cache keeps."""
    kept = () if cache is None else (("k_cache", cache.k), ("v_cache", cache.v))
    return tuple(site for site, rows in kept if isinstance(rows, PackedRows))


def append(
    cache: LayerCache,
    k: Float[Array, "batch time kv_head head_dim"] | QActivation,
    v: Float[Array, "batch time kv_head head_dim"] | QActivation,
    slot: Int[Array, ""],
) -> LayerCache:
    """Writes new keys and values into the slots from `slot` on; codes where `packed_sites` says."""

    def put(old: Array, new: Array) -> Array:
        new = new.transpose(0, 2, 1, 3).astype(old.dtype)
        return jax.lax.dynamic_update_slice_in_dim(old, new, slot, axis=2)

    new = LayerCache(_as_stored(cache.k, k), _as_stored(cache.v, v))
    return jax.tree.map(put, cache, new)


class GridRows(NamedTuple):
    """Rows as `pallas_kernels.quant_decode_attention` takes them; floats have no scale."""

    rows: Float[Array, "batch kv_head capacity head_dim"] | UInt8[Array, "batch kv_head capacity _"]
    scale: Float[Array, "batch kv_head capacity"] | None = None
    zero_point: Int8[Array, "batch kv_head capacity"] | None = None
    bits: int = 8


def grid_rows(
    rows: Float[Array, "batch kv_head capacity head_dim"] | PackedRows,
) -> GridRows | None:
    """The rows for that kernel; None where their grid is static, which is the site's to apply."""
    if not isinstance(rows, PackedRows):
        return GridRows(rows)
    if rows.scale is None:
        return None
    zero = None if rows.zero_point is None else rows.zero_point[..., 0]
    return GridRows(rows.packed, rows.scale[..., 0], zero, rows.bits)


def read_rows(
    rows: Float[Array, "batch kv_head capacity head_dim"] | PackedRows,
    like: Float[Array, "batch time kv_head head_dim"] | QActivation,
) -> Float[Array, "batch kv_head capacity head_dim"]:
    """All rows as floats; `like` is what the site gave last, and has its static grid and dtype."""
    if not isinstance(rows, PackedRows):
        return rows
    codes = unpack_rows(rows.packed, rows.bits, rows.head_dim)
    if rows.scale is not None:
        return as_float(like.replace(codes=codes, scale=rows.scale, zero_point=rows.zero_point))
    # A static grid has at most [kv_head, head_dim], and time stands between the two here.
    between = lambda a: a[:, None] if a.ndim > 1 else a  # noqa: E731
    scale, zero_point = jax.tree.map(between, (like.scale, like.zero_point))
    return as_float(like.replace(codes=codes, scale=scale, zero_point=zero_point))


def _as_stored(rows: Any, new: Any) -> Any:
    """The leaves of `new` that belong into `rows`, `[batch, time, kv_head, …]` each."""
    if not isinstance(rows, PackedRows):
        return new
    grid = (None, None) if rows.scale is None else (new.scale, new.zero_point)
    return PackedRows(pack_rows(new.codes, rows.bits), *grid, rows.bits, rows.head_dim)
