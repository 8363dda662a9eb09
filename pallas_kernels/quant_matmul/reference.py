"""`quant_matmul` in plain jnp: dequantize to the dtype of `x`, then one product.

The dequantized weight lives only inside the call. For many tokens that costs one pass over the
weight beside `tokens` passes over the activations; at one token it is bound by writing the copy.
"""

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.weight import Weight, dequantize


def quant_matmul(
    x: Float[Array, "*tokens in_ch"], w: Weight, out_dtype: DTypeLike
) -> Float[Array, "*tokens out_ch"]:
    """See `pallas_kernels.quant_matmul.quant_matmul`."""
    return jnp.matmul(x, dequantize(w).astype(x.dtype), preferred_element_type=jnp.float32).astype(
        out_dtype
    )
