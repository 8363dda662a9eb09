"""`quant_matmul` on a CPU: the weight in panels is read once, its codes looked up in registers.

Beyond `MAX_ROWS` rows XLA's float product, which is bound by arithmetic, repays the pass that
dequantizes the weight, so the call is left to the reference.
"""

from typing import Any

from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.chips import Chip
from pallas_kernels.native.products import float_product
from pallas_kernels.weight import Weight

MAX_ROWS = 128


def quant_matmul(
    x: Float[Array, "*tokens in_ch"], w: Weight, out_dtype: DTypeLike, *, chip: Chip, interpret: Any
) -> Float[Array, "*tokens out_ch"]:
    """See `pallas_kernels.quant_matmul.quant_matmul`; the weight is used in float32."""
    if w.layout != "native":
        raise NotImplementedError(f"the weight is in its {w.layout} form; prepare it once")
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) > MAX_ROWS:
        raise NotImplementedError(f"{len(rows)} rows, above {MAX_ROWS}")
    return float_product(rows, w).reshape(*x.shape[:-1], w.out_ch).astype(out_dtype)
