"""`quant_decode_attention` in plain jnp: codes become floats on their grid, then softmax."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.packing import unpack_rows


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
) -> Float[Array, "batch kv_head group head_dim"]:
    """See `pallas_kernels.quant_decode_attention.quant_decode_attention`."""
    slots = jnp.arange(k.shape[2])
    seen = (slots >= starts[:, None]) & (slots < stops[:, None])  # [batch, slots]
    dim = q.shape[-1]
    k = _floats(k, k_scale, k_zero, k_bits, dim, q.dtype)
    v = _floats(v, v_scale, v_zero, v_bits, dim, q.dtype)
    v = jnp.where(seen[:, None, :, None], v, 0)  # 0 · NaN would be NaN
    scores = jnp.einsum("bhgd,bhsd->bhgs", q, k, preferred_element_type=jnp.float32) * scale
    scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
    top = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - jnp.where(jnp.isfinite(top), top, 0.0))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = (weights / jnp.where(total > 0, total, 1.0)).astype(q.dtype)
    y = jnp.einsum("bhgs,bhsd->bhgd", weights, v, preferred_element_type=jnp.float32)
    return y.astype(q.dtype)


def _floats(
    rows: Array, scale: Array | None, zero: Array | None, bits: int, dim: int, dtype
) -> Float[Array, "batch kv_head slots head_dim"]:
    if scale is None:
        return rows.astype(dtype)
    codes = unpack_rows(rows, bits, dim).astype(jnp.float32)
    if zero is not None:
        codes = codes - zero[..., None].astype(jnp.float32)
    return (codes * scale[..., None]).astype(dtype)
