"""`prefill_attention` in plain jnp: some queries at a time, and the scores of all slots."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

HIDDEN = -1e30  # the score of a slot that is not seen
TILE = 128  # queries whose scores exist at once


def prefill_attention(
    q: Float[Array, "batch time heads head_dim"],
    k: Float[Array, "batch kv_head slots head_dim"],
    v: Float[Array, "batch kv_head slots head_dim"],
    starts: Int[Array, " batch"],
    slot: Int[Array, ""],
    scale: float,
    window: int | None,
) -> Float[Array, "batch time heads head_dim"]:
    """See `pallas_kernels.prefill_attention.prefill_attention`."""
    time, slots = q.shape[1], jnp.arange(k.shape[2])
    held = (slots >= starts[:, None]) & (slots < slot + time)
    k, v = (jnp.where(held[:, None, :, None], a, 0).astype(q.dtype) for a in (k, v))
    q = q * jnp.asarray(scale, q.dtype)
    tiles = []
    for i in range(0, time, TILE):
        rows = q[:, i : i + TILE]
        own = slot + i + jnp.arange(rows.shape[1])[:, None]
        seen = (slots <= own) & held[:, None]
        if window is not None:
            seen = seen & (slots > own - window)
        tiles.append(_attend(rows, k, v, seen))
    return jnp.concatenate(tiles, axis=1)


def _attend(
    q: Float[Array, "batch time heads head_dim"],
    k: Float[Array, "batch kv_head slots head_dim"],
    v: Float[Array, "batch kv_head slots head_dim"],
    seen: Bool[Array, "batch time slots"],
) -> Float[Array, "batch time heads head_dim"]:
    seen = seen[:, None, None]
    grouped = q.reshape(*q.shape[:2], k.shape[1], -1, q.shape[-1])
    scores = jnp.einsum("btngd,bnsd->bngts", grouped, k, preferred_element_type=jnp.float32)
    scores = jnp.where(seen, scores, HIDDEN)
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True)) * seen
    total = jnp.sum(weights, axis=-1)[..., None]
    y = jnp.einsum(
        "bngts,bnsd->bngtd", weights.astype(q.dtype), v, preferred_element_type=jnp.float32
    )
    y = y / jnp.where(total > 0, total, 1)  # a query that sees nothing gets zeros
    return y.transpose(0, 3, 1, 2, 4).reshape(q.shape).astype(q.dtype)
