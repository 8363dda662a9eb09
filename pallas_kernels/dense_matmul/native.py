"""`dense_matmul` of a few rows on a CPU, by all of its threads."""

from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.chips import Chip
from pallas_kernels.native.products import dense_product

MAX_ROWS = 4
MIN_SIZE = 1 << 14  # of a weight; the call costs more than a smaller product


def dense_matmul(
    x: Float[Array, "*tokens in_ch"],
    w: Any,
    out_dtype: DTypeLike,
    *,
    chip: Chip,
    interpret: Any,
) -> Float[Array, "*tokens out_ch"]:
    """See `pallas_kernels.dense_matmul.dense_matmul`; products are exact in float32."""
    rows = x.reshape(-1, x.shape[-1])
    if not 0 < len(rows) <= MAX_ROWS:
        raise NotImplementedError(f"{len(rows)} rows, above {MAX_ROWS}")
    if w.array.size < MIN_SIZE or w.array.dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(f"a weight of {w.shape} in {w.array.dtype}")
    y = dense_product(rows, w.array, w.transposed)
    return y.reshape(*x.shape[:-1], y.shape[-1]).astype(out_dtype)
