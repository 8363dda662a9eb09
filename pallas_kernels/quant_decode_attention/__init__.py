"""`quant_decode_attention`: one query a sequence over a cache of floats or of codes."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8, UInt8

from pallas_kernels.dispatch import first_supported
from pallas_kernels.packing import packed_rows
from pallas_kernels.quant_decode_attention import reference

IMPLEMENTATIONS: dict[str, tuple[str, ...]] = {  # fastest first
    "cpu": ("native",),
    "gpu": ("mosaic_gpu",),
    "tpu": ("tpu",),
}

Rows = Float[Array, "batch kv_head slots head_dim"] | UInt8[Array, "batch kv_head slots bytes"]
Steps = Float[Array, "batch kv_head slots"] | None
Zeros = Int8[Array, "batch kv_head slots"] | None


def quant_decode_attention(
    q: Float[Array, "batch kv_head group head_dim"],
    k: Rows,
    v: Rows,
    starts: Int[Array, " batch"],
    stops: Int[Array, " batch"],
    k_scale: Steps = None,
    k_zero: Zeros = None,
    v_scale: Steps = None,
    v_zero: Zeros = None,
    *,
    scale: float,
    k_bits: int = 8,
    v_bits: int = 8,
) -> Float[Array, "batch kv_head group head_dim"]:
    """``softmax(scale · q Kᵀ) V`` over the slots ``starts ≤ j < stops`` of each sequence.

    With codes, ``K_j = (k_j − k_zero_j) · k_scale_j``, and likewise V. A kernel multiplies the
    scores by `k_scale` and the weights by `v_scale`, so that codes are cast and never scaled.

    Args:
      q: the queries of the `group` heads that share a kv head.
      k, v: rows of floats; or where their scale is given, codes packed along the row by
        `pallas_kernels.packing.pack_rows`, `k_bits` and `v_bits` wide, 2..8.
      starts, stops: the slots that a sequence sees; what other slots hold has no influence, even if
        it is not finite. A sequence that sees no slot gets zeros.
      k_scale, k_zero, v_scale, v_zero: grid of each row; no zero where symmetric.
      scale: multiplies the scores, usually head_dim^(−1/2).

    Returns:
      The heads' outputs in the dtype of `q`, accumulated in float32.

    Raises:
      ValueError: shapes or widths outside the above; the message says which.
    """
    batch, heads, _, dim = q.shape
    for name, rows, step, zero, bits in (
        ("k", k, k_scale, k_zero, k_bits),
        ("v", v, v_scale, v_zero, v_bits),
    ):
        if not 2 <= bits <= 8:
            raise ValueError(f"{name}_bits={bits} is outside 2..8")
        width = dim if step is None else packed_rows(dim, bits)
        if rows.shape[:2] != (batch, heads) or rows.shape[-1] != width or rows.ndim != 4:
            raise ValueError(
                f"{name} {rows.shape} does not fit queries {q.shape}: it is "
                f"({batch}, {heads}, slots, {width})"
            )
        if (step is None) != (rows.dtype != jnp.uint8):
            raise ValueError(f"{name} is {rows.dtype}: codes are uint8 and have a scale")
        for what, grid in ((f"{name}_scale", step), (f"{name}_zero", zero)):
            if grid is not None and grid.shape != rows.shape[:3]:
                raise ValueError(f"{what} {grid.shape} has not one value a row of {rows.shape[:3]}")
    if k.shape[2] != v.shape[2]:
        raise ValueError(f"k has {k.shape[2]} slots and v {v.shape[2]}")
    return first_supported(
        __name__,
        IMPLEMENTATIONS,
        reference.quant_decode_attention,
        *(q, k, v, starts, stops, k_scale, k_zero, v_scale, v_zero),
        scale=scale,
        k_bits=k_bits,
        v_bits=v_bits,
    )
