"""`quant_matmul` in plain jnp: dequantize to the dtype of `x`, then one product.

The dequantized weight lives only inside the call. For many tokens that costs one pass over the
weight beside `tokens` passes over the activations; at one token it is bound by writing the copy.
"""

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int8, UInt8

from pallas_kernels.packing import unpack


def quant_matmul(
    x: Float[Array, "*tokens in_ch"],
    packed: UInt8[Array, "bytes out_ch"],
    scale: Float[Array, "groups cols"],
    zero_point: Int8[Array, "groups cols"] | None,
    bits: int,
    out_dtype: DTypeLike | None = None,
) -> Float[Array, "*tokens out_ch"]:
    """See `pallas_kernels.quant_matmul.quant_matmul`."""
    w = dequantize(unpack(packed, bits, x.shape[-1]), scale, zero_point).astype(x.dtype)
    return jnp.matmul(x, w, preferred_element_type=jnp.float32).astype(out_dtype or x.dtype)


def dequantize(
    codes: Int8[Array, "*batch in_ch out_ch"],
    scale: Float[Array, "*batch groups cols"],
    zero_point: Int8[Array, "*batch groups cols"] | None,
) -> Float[Array, "*batch in_ch out_ch"]:
    """`(q − z) · s` in float32, group by group along `in_ch`."""
    *batch, in_ch, out_ch = codes.shape
    groups = scale.shape[-2]
    q = codes.reshape(*batch, groups, in_ch // groups, out_ch).astype(jnp.float32)
    if zero_point is not None:
        q = q - zero_point[..., :, None, :].astype(jnp.float32)
    return (q * scale[..., :, None, :].astype(jnp.float32)).reshape(codes.shape)
