"""`grouped_quant_matmul` in plain jnp: `jax.lax.ragged_dot` on dequantized weights."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.weight import Weight, dequantize


def grouped_quant_matmul(
    x: Float[Array, "tokens in_ch"],
    w: Weight,
    group_sizes: Int[Array, " experts"],
    out_dtype: DTypeLike,
) -> Float[Array, "tokens out_ch"]:
    """See `pallas_kernels.grouped_quant_matmul.grouped_quant_matmul`."""
    dense = dequantize(w).astype(x.dtype)
    y = jax.lax.ragged_dot(x, dense, group_sizes, preferred_element_type=jnp.float32)
    return y.astype(out_dtype)
