"""`kron_matmul` in plain jnp: one product over rows of n2 channels, and one over rows of n1."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.packing import pack_rows


def kron_matmul(
    x: Float[Array, "*tokens channels"],
    left: Float[Array, "n1 n1"] | None,
    right: Float[Array, "n2 n2"] | None,
) -> Float[Array, "*tokens channels"]:
    """See `pallas_kernels.kron_matmul.kron_matmul`."""
    return product(x, left, right).astype(x.dtype)


def kron_quantize(
    x: Float[Array, "*tokens channels"],
    left: Float[Array, "n1 n1"] | None,
    right: Float[Array, "n2 n2"] | None,
    clip: Float[Array, "2"] | None,
    bits: int,
    packed: bool,
) -> tuple[Array, Array]:
    """See `pallas_kernels.kron_matmul.kron_quantize`."""
    r, qmax = product(x, left, right), 2 ** (bits - 1) - 1
    low, high = (f(r, axis=-1, keepdims=True) for f in (jnp.min, jnp.max))
    if clip is not None:
        low, high = low * clip[0], high * clip[1]
    scale = jnp.maximum(-low, high) / qmax
    scale = jnp.where(scale > 0, scale, 1.0)
    codes = jnp.clip(jnp.round(r / scale), -qmax - 1, qmax).astype(jnp.int8)
    return pack_rows(codes, 4) if packed else codes, scale


def product(x: Array, left: Array | None, right: Array | None) -> Float[Array, "*tokens channels"]:
    """The product in float32, its middle rounded to the dtype of `x`."""
    shape, channels, dtype = x.shape, x.shape[-1], x.dtype
    if right is not None:
        x = _product(x.reshape(-1, len(right)), right.astype(dtype))
    if left is not None:
        # The axis is brought to the end: a product of many small matrices is slower, and XLA's CPU
        # backend has none for bfloat16.
        rows = x.astype(dtype).reshape(-1, len(left), channels // len(left)).swapaxes(1, 2)
        x = _product(rows.reshape(-1, len(left)), left.astype(dtype))
        x = x.reshape(rows.shape).swapaxes(1, 2)
    return x.reshape(shape).astype(jnp.float32)


def _product(rows: Array, factor: Array) -> Array:
    return jnp.matmul(rows, factor, preferred_element_type=jnp.float32)
