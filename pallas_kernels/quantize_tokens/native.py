"""`quantize_tokens` of a few rows on a CPU: one call where XLA starts nine small loops."""

from typing import Any

from jaxtyping import Array, Float

from pallas_kernels.chips import Chip
from pallas_kernels.native.products import quantize

MAX_ROWS = 64  # more of them are better shared among threads


def quantize_tokens(
    x: Float[Array, "*tokens channels"],
    clip: Float[Array, "2"] | None,
    *,
    bits: int,
    symmetric: bool,
    chip: Chip,
    interpret: Any,
) -> tuple[Array, Array, Array | None]:
    """See `pallas_kernels.quantize_tokens.quantize_tokens`."""
    rows = x.reshape(-1, x.shape[-1])
    if not 0 < len(rows) <= MAX_ROWS or not x.shape[-1]:
        raise NotImplementedError(f"{len(rows)} rows; 1 to {MAX_ROWS}")
    codes, scale, zero = quantize(rows, clip, bits, symmetric)
    each = (*x.shape[:-1], 1)
    return codes.reshape(x.shape), scale.reshape(each), None if symmetric else zero.reshape(each)
