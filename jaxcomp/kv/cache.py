"""The plain KV cache: every key and value, in the compute dtype.

Layout `[batch, kv_head, time, head_dim]`. Slots are filled in order; `positions` and `valid` are
shared by all blocks and say which token sits in which slot, so padding on either side works.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxcomp.core.struct import node


@node
class LayerCache:
    """Keys (after RoPE) and values of one block."""

    k: Float[Array, "batch kv_head capacity head_dim"]
    v: Float[Array, "batch kv_head capacity head_dim"]


@node
class Cache:
    """All blocks' caches and the book-keeping they share.

    Attributes:
      layers: one cache a block.
      positions: RoPE position of the token in each slot.
      valid: True where the slot holds a real token.
      length: slots filled so far.
    """

    layers: tuple[LayerCache, ...]
    positions: Int[Array, "batch capacity"]
    valid: Bool[Array, "batch capacity"]
    length: Int[Array, ""]


def init_cache(shapes: tuple[tuple[int, int], ...], batch: int, capacity: int, dtype: Any) -> Cache:
    """An empty cache; `shapes` gives (n_kv_heads, head_dim) of each block."""
    layers = tuple(
        LayerCache(*(jnp.zeros((batch, heads, capacity, dim), dtype) for _ in "kv"))
        for heads, dim in shapes
    )
    return Cache(
        layers,
        jnp.zeros((batch, capacity), jnp.int32),
        jnp.zeros((batch, capacity), bool),
        jnp.zeros((), jnp.int32),
    )


def append(
    cache: LayerCache,
    k: Float[Array, "batch time kv_head head_dim"],
    v: Float[Array, "batch time kv_head head_dim"],
    slot: Int[Array, ""],
) -> LayerCache:
    """Writes new keys and values into the slots from `slot` on."""

    def put(old: Array, new: Array) -> Array:
        new = new.transpose(0, 2, 1, 3).astype(old.dtype)
        return jax.lax.dynamic_update_slice_in_dim(old, new, slot, axis=2)

    return LayerCache(put(cache.k, k), put(cache.v, v))
