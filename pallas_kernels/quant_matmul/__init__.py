"""`quant_matmul`: activations times a packed, group-quantized weight."""

from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.dispatch import first_supported
from pallas_kernels.quant_matmul import reference
from pallas_kernels.weight import Weight

# Platform → modules, fastest first.
IMPLEMENTATIONS: dict[str, tuple[str, ...]] = {
    "cpu": ("native",),
    "tpu": ("tpu",),
    "gpu": ("mosaic_gpu",),
}


def quant_matmul(
    x: Float[Array, "*tokens in_ch"], w: Weight, out_dtype: DTypeLike | None = None
) -> Float[Array, "*tokens out_ch"]:
    """``x @ ((q − z) · s)``.

    Args:
      x: activations, any float dtype.
      w: a weight without experts, in the canonical form or the one that `prepare` gave.
      out_dtype: dtype of the product; None for that of `x`.

    Returns:
      The product, accumulated in float32. The reference rounds `w` to the dtype of `x` first; a
      kernel may instead scale the sums of the groups.

    Raises:
      ValueError: `x` has not the weight's input channels, or the weight has experts.
    """
    if len(w.shape) != 2 or x.shape[-1] != w.in_ch:
        raise ValueError(f"activations {x.shape} do not fit a weight of shape {w.shape}")
    return first_supported(
        __name__, IMPLEMENTATIONS, reference.quant_matmul, x, w, out_dtype=out_dtype or x.dtype
    )
