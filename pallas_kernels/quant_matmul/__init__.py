"""`quant_matmul`: activations times a packed, group-quantized weight."""

from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int8, UInt8

from pallas_kernels.dispatch import first_supported
from pallas_kernels.quant_matmul import reference

IMPLEMENTATIONS = (reference.quant_matmul,)  # fastest first, the reference last


def quant_matmul(
    x: Float[Array, "*tokens in_ch"],
    packed: UInt8[Array, "bytes out_ch"],
    scale: Float[Array, "groups cols"],
    zero_point: Int8[Array, "groups cols"] | None,
    bits: int,
    out_dtype: DTypeLike | None = None,
) -> Float[Array, "*tokens out_ch"]:
    """``x @ ((q − z) · s)`` with `q` unpacked from `packed` (see `pallas_kernels.packing`).

    Args:
      x: activations, any float dtype.
      packed: codes of 2..8 bits, a little-endian bit stream along `in_ch`.
      scale: step size; `groups` divides `in_ch` and `cols` is `out_ch` or 1.
      zero_point: code of 0.0 with the shape of `scale`; None when symmetric.
      bits: width of a code.
      out_dtype: dtype of the product; None for that of `x`.

    Returns:
      The product, accumulated in float32.
    """
    return first_supported(IMPLEMENTATIONS, x, packed, scale, zero_point, bits, out_dtype)
