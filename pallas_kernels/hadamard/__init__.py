"""`hadamard`: activations times a normalised Hadamard matrix."""

import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.dispatch import first_supported
from pallas_kernels.hadamard import reference

IMPLEMENTATIONS: dict[str, tuple[str, ...]] = {  # platform → modules, fastest first
    "tpu": ("tpu",),
    "gpu": ("mosaic_gpu",),
}


def hadamard(
    x: Float[Array, "*tokens channels"],
    base: np.ndarray | None,
    doublings: int,
    inner: int = 1,
) -> Float[Array, "*tokens channels"]:
    """``x (I ⊗ H/√n ⊗ I_inner)`` with ``H = base ⊗ S``, S Sylvester's matrix of order 2^doublings.

    Channels are `[runs, n, inner]` with n = len(base)·2^doublings: `inner` 1 rotates runs of n
    neighbouring channels, `inner` head_dim mixes heads.

    Args:
      x: activations, any float dtype.
      base: a Hadamard matrix `[b, b]` of entries ±1, a constant; None for order 1.

    Returns:
      The product in the dtype of `x`, computed in float32.

    Raises:
      ValueError: channels that are no whole runs of n·inner.
    """
    order = (1 if base is None else len(base)) << doublings
    if x.shape[-1] % (order * inner):
        raise ValueError(f"{x.shape[-1]} channels are not whole runs of {order}·{inner}")
    return first_supported(
        __name__,
        IMPLEMENTATIONS,
        reference.hadamard,
        x,
        base=base,
        doublings=doublings,
        inner=inner,
    )
