"""`quant_matmul` on a CPU: the weight in panels is read once, its codes looked up in registers.

For many rows a panel at a time becomes floats in the cache, so a dequantized weight never exists.
"""

from typing import Any

from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.chips import Chip
from pallas_kernels.native.products import float_product
from pallas_kernels.weight import Weight


def quant_matmul(
    x: Float[Array, "*tokens in_ch"], w: Weight, out_dtype: DTypeLike, *, chip: Chip, interpret: Any
) -> Float[Array, "*tokens out_ch"]:
    """See `pallas_kernels.quant_matmul.quant_matmul`; the weight is used in float32."""
    if w.layout != "native":
        raise NotImplementedError(f"the weight is in its {w.layout} form; prepare it once")
    rows = x.reshape(-1, x.shape[-1])
    return float_product(rows, w).reshape(*x.shape[:-1], w.out_ch).astype(out_dtype)
