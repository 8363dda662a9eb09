"""`prefill_attention`: the tokens of a prompt, or of a part of it, over a cache of floats."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import first_supported
from pallas_kernels.prefill_attention import reference

# XLA's own products are what a TPU and a GPU want.
IMPLEMENTATIONS: dict[str, tuple[str, ...]] = {"cpu": ("native",)}


def prefill_attention(
    q: Float[Array, "batch time heads head_dim"],
    k: Float[Array, "batch kv_head slots head_dim"],
    v: Float[Array, "batch kv_head slots head_dim"],
    starts: Int[Array, " batch"],
    slot: Int[Array, ""] | int,
    *,
    scale: float,
    window: int | None = None,
) -> Float[Array, "batch time heads head_dim"]:
    """``softmax(scale · q Kᵀ) V``, where query i stands in slot ``slot + i`` of the cache.

    It sees the slots ``starts ≤ j ≤ slot + i``, and no more than the last `window` of them.

    Args:
      q: queries of neighbouring tokens; consecutive heads share a kv head.
      k, v: the rows of all slots, those of the queries' own tokens among them.
      starts: the first slot that each sequence sees; what lies before it, or behind the last query,
        has no influence, even if it is not finite. A query before it gets zeros.
      scale: multiplies the scores, usually head_dim^(−1/2).
      window: slots, the query's own included.

    Returns:
      The heads' outputs in the dtype of `q`, accumulated in float32.

    Raises:
      ValueError: shapes that do not fit each other, or a window below 1.
    """
    batch, time, heads, dim = q.shape
    if k.shape != v.shape or k.shape[0] != batch or k.shape[-1] != dim or heads % k.shape[1]:
        raise ValueError(
            f"keys {k.shape} and values {v.shape} do not fit queries {q.shape}: they are "
            f"({batch}, kv heads that divide {heads}, slots, {dim})"
        )
    if time > k.shape[2]:
        raise ValueError(f"{time} queries have no room in {k.shape[2]} slots")
    if starts.shape != (batch,):
        raise ValueError(f"starts {starts.shape} is not one number for each of {batch} sequences")
    if window is not None and window < 1:
        raise ValueError(f"window={window} is below 1; None sees all slots")
    return first_supported(
        __name__,
        IMPLEMENTATIONS,
        reference.prefill_attention,
        *(q, k, v, starts, jnp.asarray(slot, jnp.int32)),
        scale=scale,
        window=window,
    )
