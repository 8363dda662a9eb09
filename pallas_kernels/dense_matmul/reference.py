"""`dense_matmul` in plain jnp: one product.

`preferred_element_type` is not only for accuracy: with it XLA's CPU backend uses the processor's
bfloat16 matrix units, without it the product is computed in float32 after all.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float


def dense_matmul(
    x: Float[Array, "*tokens in_ch"], w: Any, out_dtype: DTypeLike
) -> Float[Array, "*tokens out_ch"]:
    """See `pallas_kernels.dense_matmul.dense_matmul`."""
    rows = x.reshape(-1, x.shape[-1])
    contract = (((1,), (1 if w.transposed else 0,)), ((), ()))
    y = jax.lax.dot_general(
        rows, w.array.astype(x.dtype), contract, preferred_element_type=jnp.float32
    )
    return y.reshape(*x.shape[:-1], y.shape[-1]).astype(out_dtype)
