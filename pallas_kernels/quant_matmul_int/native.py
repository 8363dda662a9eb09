"""`quant_matmul_int` on a CPU: `vpdpbusd` on the weight in panels, which are read once."""

from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int8

from pallas_kernels.chips import Chip
from pallas_kernels.native.products import integer_product
from pallas_kernels.weight import Weight


def quant_matmul_int(
    codes: Int8[Array, "*tokens in_ch"],
    code_scale: Float[Array, "*#tokens 1"],
    code_zero: Int8[Array, "*#tokens 1"] | None,
    weight: Weight,
    out_dtype: DTypeLike,
    *,
    chip: Chip,
    interpret: Any,
) -> Float[Array, "*tokens out_ch"]:
    """See `pallas_kernels.quant_matmul_int.quant_matmul_int`."""
    if weight.layout != "native":
        raise NotImplementedError(f"the weight is in its {weight.layout} form; prepare it once")
    if code_zero is not None and weight.sums is None:
        raise NotImplementedError("activations with a zero point, and no sums were prepared")
    *tokens, in_ch = codes.shape
    each = lambda a: jnp.broadcast_to(a, (*tokens, 1)).reshape(-1, 1)  # noqa: E731
    zero = None if code_zero is None else each(code_zero)
    y = integer_product(codes.reshape(-1, in_ch), each(code_scale), zero, weight)
    return y.reshape(*tokens, weight.out_ch).astype(out_dtype)
