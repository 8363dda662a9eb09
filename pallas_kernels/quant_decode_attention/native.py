"""`quant_decode_attention` on a CPU: a head's slots in chunks, shared among the threads.

Codes become floats in registers, so that a packed cache is read as it is. XLA would first unpack
all of it, and copy a cache that the same step has appended to.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.chips import Chip
from pallas_kernels.native.products import decode_attention

MAX_DIM = 256


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
    chip: Chip,
    interpret: Any,
) -> Float[Array, "batch kv_head group head_dim"]:
    """See `pallas_kernels.quant_decode_attention.quant_decode_attention`."""
    dim = q.shape[-1]
    multiple = 32 if 4 in (k_scale is not None and k_bits, v_scale is not None and v_bits) else 16
    if dim % multiple or dim > MAX_DIM:
        raise NotImplementedError(f"head_dim={dim}; a multiple of {multiple} up to {MAX_DIM}")
    for rows, step, bits in ((k, k_scale, k_bits), (v, v_scale, v_bits)):
        if step is not None and bits not in (4, 8):
            raise NotImplementedError(f"codes of {bits} bits; 4 or 8")
        if step is None and rows.dtype not in (jnp.float32, jnp.bfloat16):
            raise NotImplementedError(f"rows in {rows.dtype}")
    y = decode_attention(
        q, k, v, starts, stops, k_scale, k_zero, v_scale, v_zero, scale, k_bits, v_bits
    )
    return y.astype(q.dtype)
