"""`kron_matmul`: activations times a Kronecker product, quantized on the way out if wanted.

Two public functions, because one gives floats and the other codes.
"""

from typing import NamedTuple

from jaxtyping import Array, Float, Int8, UInt8

from pallas_kernels.dispatch import first_supported
from pallas_kernels.kron_matmul import reference

IMPLEMENTATIONS: dict[str, tuple[str, ...]] = {  # platform → modules, fastest first
    "cpu": ("native",),
    "tpu": ("tpu",),
    "gpu": ("mosaic_gpu",),
}


class TokenCodes(NamedTuple):
    """Activations on a symmetric grid of each token: `x = codes · scale`.

    Attributes:
      codes: int8, or where packed uint8 with code 2i in the low nibble of byte i.
      scale: float32; positive, whatever it is for a token of zeros.
    """

    codes: Int8[Array, "*tokens channels"] | UInt8[Array, "*tokens bytes"]
    scale: Float[Array, "*tokens 1"]


def kron_matmul(
    x: Float[Array, "*tokens channels"],
    left: Float[Array, "n1 n1"] | None,
    right: Float[Array, "n2 n2"] | None,
) -> Float[Array, "*tokens channels"]:
    """``x @ (left ⊗ right)``, which is ``vec(leftᵀ V right)`` with `V` `[n1, n2]` of a row of `x`.

    Args:
      x: activations, any float dtype; `channels` is n1·n2, row-major.
      left, right: the factors; None is the identity that fills up to `channels`, so that
        ``left=None`` transforms every run of n2 channels alike and ``right=None`` mixes the runs.

    Returns:
      The product in the dtype of `x`; each factor's product is accumulated in float32, and what
      the right one gives is rounded to the dtype of `x`.

    Raises:
      ValueError: the factors do not multiply to `channels`.
    """
    _check(x, left, right)
    return first_supported(__name__, IMPLEMENTATIONS, reference.kron_matmul, x, left, right)


def kron_quantize(
    x: Float[Array, "*tokens channels"],
    left: Float[Array, "n1 n1"] | None,
    right: Float[Array, "n2 n2"] | None,
    clip: Float[Array, "2"] | None = None,
    *,
    bits: int = 8,
    packed: bool = False,
) -> TokenCodes:
    """The codes of `kron_matmul(x, left, right)`, quantized before it is rounded to a dtype.

    With r the float32 product of a token, ``scale = max(−c₋·min r, c₊·max r) / qmax`` and
    ``codes = clip(round(r / scale), −qmax − 1, qmax)``, ties to even, qmax = 2^(bits−1) − 1. A
    kernel multiplies by the reciprocal of the scale, so a code may differ by one at a tie.

    Args:
      clip: c₋ and c₊ in (0, 1]; None for the whole range.
      bits: width of a code, 2..8.
      packed: two codes a byte; `bits` at most 4 and an even number of channels.

    Raises:
      ValueError: factors that do not multiply to `channels`, or a width that cannot be.
    """
    _check(x, left, right)
    if not 2 <= bits <= 8:
        raise ValueError(f"bits={bits} is outside 2..8")
    if packed and (bits > 4 or x.shape[-1] % 2):
        raise ValueError(
            f"packed=True wants at most 4 bits and an even number of channels, not bits={bits} and "
            f"{x.shape[-1]} channels"
        )
    return TokenCodes(
        *first_supported(
            __name__,
            IMPLEMENTATIONS,
            reference.kron_quantize,
            x,
            left,
            right,
            clip,
            function="kron_quantize",
            bits=bits,
            packed=packed,
        )
    )


def _check(x: Array, left: Array | None, right: Array | None) -> None:
    channels = x.shape[-1]
    n1, n2 = (1 if m is None else m.shape[0] for m in (left, right))
    fits = channels % (n1 * n2) == 0 if left is None or right is None else channels == n1 * n2
    if not fits:
        raise ValueError(f"factors of orders {n1} and {n2} do not make {channels} channels")
