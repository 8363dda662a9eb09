"""`kron_matmul` in plain jnp: the right factor as one product over rows of n2, then the left."""

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
        rows = x.reshape(-1, right.shape[0])
        x = _product("nj,jk->nk", rows, right)
    if left is not None:
        rows = x.reshape(-1, left.shape[0], channels // left.shape[0])
        x = _product("nij,ik->nkj", rows, left)
    return x.reshape(shape)


def _product(formula: str, x: Array, factor: Array) -> Array:
    factor = factor.astype(x.dtype)
    return jnp.einsum(formula, x, factor, preferred_element_type=jnp.float32).astype(x.dtype)
