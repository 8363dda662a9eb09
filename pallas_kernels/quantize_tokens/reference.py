"""`quantize_tokens` in plain jnp."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.grid import range_to_grid, round_to_codes


def quantize_tokens(
    x: Float[Array, "*tokens channels"],
    clip: Float[Array, "2"] | None,
    *,
    bits: int,
    symmetric: bool,
) -> tuple[Array, Array, Array | None]:
    """See `pallas_kernels.quantize_tokens.quantize_tokens`."""
    low, high = (f(x, axis=-1, keepdims=True).astype(jnp.float32) for f in (jnp.min, jnp.max))
    if clip is not None:
        low, high = low * clip[0], high * clip[1]
    scale, zero = range_to_grid(low, high, bits, symmetric)
    return round_to_codes(x, scale, zero, bits), scale, zero
