"""`kron_matmul` in plain jnp: one product over rows of n2 channels, and one over rows of n1."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def kron_matmul(
    x: Float[Array, "*tokens channels"],
    left: Float[Array, "n1 n1"] | None,
    right: Float[Array, "n2 n2"] | None,
) -> Float[Array, "*tokens channels"]:
    """See `pallas_kernels.kron_matmul.kron_matmul`."""
    shape, channels = x.shape, x.shape[-1]
    if right is not None:
        x = _product(x.reshape(-1, len(right)), right)
    if left is not None:
        # The axis is brought to the end: a product of many small matrices is slower, and XLA's CPU
        # backend has none for bfloat16.
        rows = x.reshape(-1, len(left), channels // len(left)).swapaxes(1, 2)
        x = _product(rows.reshape(-1, len(left)), left).reshape(rows.shape).swapaxes(1, 2)
    return x.reshape(shape)


def _product(rows: Array, factor: Array) -> Array:
    y = jnp.matmul(rows, factor.astype(rows.dtype), preferred_element_type=jnp.float32)
    return y.astype(rows.dtype)
