"""`dense_matmul` in plain jnp: one product.

`preferred_element_type` is not only for accuracy: with it XLA's CPU backend uses the processor's
bfloat16 matrix units, without it the product is computed in float32 after all.
"""

from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float


def dense_matmul(
    x: Float[Array, "*tokens in_ch"], w: Any, out_dtype: DTypeLike
) -> Float[Array, "*tokens out_ch"]:
    """See `pallas_kernels.dense_matmul.dense_matmul`."""
    rows = x.reshape(-1, x.shape[-1])
    y = jnp.matmul(rows, w.dense.astype(x.dtype), preferred_element_type=jnp.float32)
    return y.reshape(*x.shape[:-1], y.shape[-1]).astype(out_dtype)
