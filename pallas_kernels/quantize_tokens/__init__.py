"""`quantize_tokens`: activations to codes, each token on a grid of its own range."""

from jaxtyping import Array, Float, Int8

from pallas_kernels.dispatch import first_supported
from pallas_kernels.quantize_tokens import reference

# Platform → modules, fastest first. XLA fuses the reference well where a launch is cheap.
IMPLEMENTATIONS: dict[str, tuple[str, ...]] = {"cpu": ("native",)}


def quantize_tokens(
    x: Float[Array, "*tokens channels"],
    clip: Float[Array, "2"] | None = None,
    *,
    bits: int = 8,
    symmetric: bool = True,
) -> tuple[
    Int8[Array, "*tokens channels"], Float[Array, "*tokens 1"], Int8[Array, "*tokens 1"] | None
]:
    """Codes, scales and zero points of the grids that `pallas_kernels.grid` makes of each row.

    Implementations differ in the last bit of a scale at most, and so in codes at a tie, by one.

    Args:
      clip: factors in (0, 1] of the least and the greatest value; None for the whole range.
      bits: width of a code, 2..8.
    """
    return first_supported(
        __name__,
        IMPLEMENTATIONS,
        reference.quantize_tokens,
        x,
        clip,
        bits=bits,
        symmetric=symmetric,
    )
