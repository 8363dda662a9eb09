"""`quant_matmul_int`: quantized activations times a packed weight, summed in integers."""

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int8, UInt8

from pallas_kernels.dispatch import first_supported
from pallas_kernels.quant_matmul_int import reference

IMPLEMENTATIONS = (reference.quant_matmul_int,)  # fastest first, the reference last


def quant_matmul_int(
    codes: Int8[Array, "*tokens in_ch"],
    code_scale: Float[Array, "*#tokens 1"],
    code_zero: Int8[Array, "*#tokens 1"] | None,
    packed: UInt8[Array, "bytes out_ch"],
    scale: Float[Array, "groups cols"],
    zero_point: Int8[Array, "groups cols"] | None,
    bits: int,
    out_dtype: DTypeLike = jnp.float32,
) -> Float[Array, "*tokens out_ch"]:
    """``((codes − code_zero) · code_scale) @ ((q − z) · s)``, each group's sum exact in int32.

    Args:
      codes: activations on a grid of at most 8 bits.
      code_scale, code_zero: the grid of each token, or one for all; no zero when symmetric.
      packed, scale, zero_point, bits: the weight, as in `pallas_kernels.quant_matmul`.
      out_dtype: dtype of the product.

    Returns:
      The product; the groups' sums are scaled and added in float32.

    Raises:
      ValueError: a group has so many channels that its sum might not fit int32 (33,025 where
        both are asymmetric with 8 bits, 131,071 where both are symmetric).
    """
    group = codes.shape[-1] // scale.shape[-2]
    largest = (128 if code_zero is None else 255) * (
        2 ** (bits - 1) if zero_point is None else 2**bits - 1
    )
    if group * largest >= 2**31:
        raise ValueError(
            f"a sum of {group} products of up to {largest} does not fit int32; "
            f"use weight groups of at most {(2**31 - 1) // largest} input channels"
        )
    return first_supported(
        IMPLEMENTATIONS, codes, code_scale, code_zero, packed, scale, zero_point, bits, out_dtype
    )
