"""`grouped_quant_matmul`: every token times the quantized weight of its expert."""

from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import first_supported
from pallas_kernels.grouped_quant_matmul import reference
from pallas_kernels.weight import Weight

# Platform → modules, fastest first.
IMPLEMENTATIONS: dict[str, tuple[str, ...]] = {"tpu": ("tpu",), "gpu": ("mosaic_gpu",)}


def grouped_quant_matmul(
    x: Float[Array, "tokens in_ch"],
    w: Weight,
    group_sizes: Int[Array, " experts"],
    out_dtype: DTypeLike | None = None,
) -> Float[Array, "tokens out_ch"]:
    """`quant_matmul` of each run of tokens with its own expert's weight.

    Args:
      x: activations sorted by expert: first those of expert 0, `group_sizes[0]` of them.
      w: a weight with one axis of experts, in the canonical form or the one that `prepare` gave.
      group_sizes: tokens of each expert, 0 among them; tokens beyond their sum give zeros. An
        expert without tokens costs nothing in a kernel.
      out_dtype: dtype of the product; None for that of `x`.

    Raises:
      ValueError: shapes that do not fit each other.
    """
    if len(w.shape) != 3 or x.ndim != 2 or x.shape[-1] != w.in_ch:
        raise ValueError(f"activations {x.shape} do not fit experts of shape {w.shape}")
    if group_sizes.shape != w.shape[:1]:
        raise ValueError(f"{group_sizes.shape} group sizes for {w.shape[0]} experts")
    return first_supported(
        __name__,
        IMPLEMENTATIONS,
        reference.grouped_quant_matmul,
        x,
        w,
        group_sizes,
        out_dtype=out_dtype or x.dtype,
    )
