"""`quant_matmul_int`: quantized activations times a quantized weight, summed in integers."""

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int8

from pallas_kernels.dispatch import first_supported
from pallas_kernels.quant_matmul_int import reference
from pallas_kernels.weight import Weight

# Platform → modules, fastest first.
IMPLEMENTATIONS: dict[str, tuple[str, ...]] = {
    "cpu": ("native",),
    "tpu": ("tpu",),
    "gpu": ("mosaic_gpu",),
}


def quant_matmul_int(
    codes: Int8[Array, "*tokens in_ch"],
    code_scale: Float[Array, "*#tokens 1"],
    code_zero: Int8[Array, "*#tokens 1"] | None,
    w: Weight,
    out_dtype: DTypeLike = jnp.float32,
) -> Float[Array, "*tokens out_ch"]:
    """``((codes − code_zero) · code_scale) @ ((q − z) · s)``, each group's sum exact in int32.

    Args:
      codes: activations on a grid of at most 8 bits.
      code_scale, code_zero: the grid of each token, or one for all; no zero when symmetric.
      w: a weight without experts, in the canonical form or the one that `prepare` gave.
      out_dtype: dtype of the product.

    Returns:
      The product; the groups' sums are scaled and added in float32.

    Raises:
      ValueError: `codes` has not the weight's input channels; or a group has so many channels that
        its sum might not fit int32 (33,025 where both are asymmetric with 8 bits, 131,071 where
        both are symmetric).
    """
    if len(w.shape) != 2 or codes.shape[-1] != w.in_ch:
        raise ValueError(f"activations {codes.shape} do not fit a weight of shape {w.shape}")
    largest = (128 if code_zero is None else 255) * (
        2 ** (w.bits - 1) if w.zero_point is None else 2**w.bits - 1
    )
    if w.group_size * largest >= 2**31:
        raise ValueError(
            f"a sum of {w.group_size} products of up to {largest} does not fit int32; "
            f"use weight groups of at most {(2**31 - 1) // largest} input channels"
        )
    return first_supported(
        __name__,
        IMPLEMENTATIONS,
        reference.quant_matmul_int,
        codes,
        code_scale,
        code_zero,
        w,
        out_dtype=out_dtype,
    )
