"""The affine integer grid: a range becomes a scale and a zero point, numbers become codes.

With b bits, qmax = 2^(b−1) − 1 and signed codes −qmax − 1 … qmax:
    symmetric:   s = max(|low|, |high|) / qmax,                       x ≈ q·s
    asymmetric:  range widened to contain 0, s = (high − low)/(2^b − 1),
                 z = round(−low/s) − 2^(b−1),                         x ≈ (q − z)·s
"""

import jax.numpy as jnp
from jaxtyping import Array

MIN_SCALE = 1e-12  # a range of zeros gets this step; its codes are 0 all the same


def range_to_grid(
    low: Array, high: Array, bits: int, symmetric: bool
) -> tuple[Array, Array | None]:
    """The grid that just covers [low, high]; float32 scale, int8 zero point or None."""
    low, high = low.astype(jnp.float32), high.astype(jnp.float32)
    qmax = 2 ** (bits - 1) - 1
    if symmetric:
        amax = jnp.maximum(jnp.abs(low), jnp.abs(high))
        return jnp.maximum(amax / qmax, MIN_SCALE), None
    low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
    scale = jnp.maximum((high - low) / (2**bits - 1), MIN_SCALE)
    zero_point = jnp.clip(jnp.round(-low / scale) - qmax - 1, -qmax - 1, qmax)
    return scale, zero_point.astype(jnp.int8)


def round_to_codes(x: Array, scale: Array, zero_point: Array | None, bits: int) -> Array:
    """Nearest code of each entry, int8; `scale` and `zero_point` broadcast against `x`."""
    qmax = 2 ** (bits - 1) - 1
    q = jnp.round(x.astype(jnp.float32) / scale)
    if zero_point is not None:
        q = q + zero_point.astype(jnp.float32)
    return jnp.clip(q, -qmax - 1, qmax).astype(jnp.int8)
