"""`dense_matmul` on a CPU, by all of its threads, for a weight in panels."""

from typing import Any

from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.chips import Chip
from pallas_kernels.native.products import dense_product


def dense_matmul(
    x: Float[Array, "*tokens in_ch"], w: Any, out_dtype: DTypeLike, *, chip: Chip, interpret: Any
) -> Float[Array, "*tokens out_ch"]:
    """See `pallas_kernels.dense_matmul.dense_matmul`; products are exact in float32."""
    if not w.out_ch:
        raise NotImplementedError(f"a weight of {w.shape} that is not in panels; prepare it once")
    rows = x.reshape(-1, x.shape[-1])
    return dense_product(rows, w.array, w.out_ch).reshape(*x.shape[:-1], -1).astype(out_dtype)
