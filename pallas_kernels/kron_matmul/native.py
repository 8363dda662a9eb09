"""`kron_quantize` of a few tokens on a CPU: XLA's products, then one call that quantizes.

The products themselves are small and float32, which XLA multiplies well.
"""

from typing import Any

from jaxtyping import Array, Float

from pallas_kernels.chips import Chip
from pallas_kernels.kron_matmul.reference import product
from pallas_kernels.packing import pack_rows
from pallas_kernels.quantize_tokens import native


def kron_quantize(
    x: Float[Array, "*tokens channels"],
    left: Float[Array, "n1 n1"] | None,
    right: Float[Array, "n2 n2"] | None,
    clip: Float[Array, "2"] | None,
    *,
    bits: int,
    packed: bool,
    chip: Chip,
    interpret: Any,
) -> tuple[Array, Array]:
    """See `pallas_kernels.kron_matmul.kron_quantize`."""
    codes, scale, _ = native.quantize_tokens(
        product(x, left, right), clip, bits=bits, symmetric=True, chip=chip, interpret=interpret
    )
    return pack_rows(codes, 4) if packed else codes, scale
