"""`hadamard` for TPUs: the kernel of `kron_matmul` with factors of ±1, scaled on the way out.

The matrix unit does it in two products, with 128 lanes on the right; a butterfly would have fewer
operations and spend them on moving lanes. ±1 is exact in bfloat16. What lies between the products
is rounded to the dtype of `x`, as in `kron_matmul`.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.chips import Chip
from pallas_kernels.hadamard.reference import sylvester
from pallas_kernels.kron_matmul.tpu import kron_matmul
from pallas_kernels.tuning import KronTile

WIDE, NARROW = 7, 6  # doublings of a right factor of 128 lanes, and of one that shares them


def hadamard(
    x: Float[Array, "*tokens channels"],
    *,
    base: np.ndarray | None,
    doublings: int,
    inner: int,
    chip: Chip,
    interpret: Any = False,
    tile: KronTile | None = None,
) -> Float[Array, "*tokens channels"]:
    """See `pallas_kernels.hadamard.hadamard`."""
    base = np.ones((1, 1), np.int8) if base is None else np.asarray(base)
    order = len(base) << doublings
    if inner > 1:
        left, right = np.kron(base, sylvester(doublings)), None
    else:
        of_right = min(doublings, WIDE)
        left = np.kron(base, sylvester(doublings - of_right))
        if len(left) > 1 and of_right < NARROW:
            raise NotImplementedError(f"order {order} = {len(base)}·2^{doublings}; at least 2^6")
        left, right = (None if len(left) == 1 else left), sylvester(of_right)
    rows = x.reshape(*x.shape[:-1], -1, order * inner) if left is not None else x
    factors = [None if m is None else jnp.asarray(m, x.dtype) for m in (left, right)]
    y = kron_matmul(rows, *factors, gain=order**-0.5, chip=chip, interpret=interpret, tile=tile)
    return y.reshape(x.shape)
