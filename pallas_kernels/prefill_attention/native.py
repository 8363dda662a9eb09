"""`prefill_attention` on a CPU: scores of some queries at a time, by all of its threads."""

from typing import Any

from jaxtyping import Array, Float, Int

from pallas_kernels.chips import Chip
from pallas_kernels.native import products


def prefill_attention(
    q: Float[Array, "batch time heads head_dim"],
    k: Float[Array, "batch kv_head slots head_dim"],
    v: Float[Array, "batch kv_head slots head_dim"],
    starts: Int[Array, " batch"],
    slot: Int[Array, ""],
    *,
    scale: float,
    window: int | None,
    chip: Chip,
    interpret: Any,
) -> Float[Array, "batch time heads head_dim"]:
    """See `pallas_kernels.prefill_attention.prefill_attention`; computed in float32."""
    y = products.prefill_attention(q, k, v, starts, slot, scale, window)
    return y.astype(q.dtype)
