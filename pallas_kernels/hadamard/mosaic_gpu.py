"""`hadamard` on Hopper: the kernel of `kron_matmul` with factors of ±1, which 16 bits hold exactly.

The right factor is Sylvester's matrix of order 64 or 128, or the identity over `inner` channels;
the left one is what remains. The norm is one multiplication of float32 sums at the end.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.chips import CHIPS, Chip
from pallas_kernels.hadamard.reference import sylvester
from pallas_kernels.kron_matmul import mosaic_gpu as kron
from pallas_kernels.trial import Example


def hadamard(
    x: Float[Array, "*tokens channels"],
    base: np.ndarray | None,
    doublings: int,
    inner: int,
    *,
    chip: Chip,
    interpret: Any = False,
    tile: kron.Form | None = None,
) -> Float[Array, "*tokens channels"]:
    """See `pallas_kernels.hadamard.hadamard`; `tile` None follows from the shapes."""
    left, right = factors(base, doublings, inner)
    n1, n2 = (1 if m is None else len(m) for m in (left, right))
    run = n1 * (inner if right is None else n2)
    rows = x.reshape(-1, run) if left is not None else x
    left, right = (None if m is None else jnp.asarray(m, x.dtype) for m in (left, right))
    gain = float((n1 * n2) ** -0.5)
    form = tile or kron.form_of(rows, left, right, chip)._replace(gain=gain)
    return kron.kron_matmul(rows, left, right, chip=chip, interpret=interpret, tile=form).reshape(
        x.shape
    )


def factors(
    base: np.ndarray | None, doublings: int, inner: int
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Left and right matrices of ±1; None is an identity.

    Raises:
      NotImplementedError: an order without a factor of 64.
    """
    whole = np.ones((1, 1), np.int8) if base is None else np.asarray(base)
    if inner > 1:
        return np.kron(whole, sylvester(doublings)), None
    if doublings < 6:
        raise NotImplementedError(f"an order of {len(whole)} · 2^{doublings}")
    order = lambda right: len(whole) << (doublings - right)  # noqa: E731
    padded = lambda right: (order(right) > 1) * -(-order(right) // kron.ROWS) << right  # noqa: E731
    right = min((right for right in (7, 6) if right <= doublings), key=padded)
    left = np.kron(whole, sylvester(doublings - right))
    return None if len(left) == 1 else left, sylvester(right)


def example(x: Array, base: np.ndarray | None, doublings: int, inner: int) -> Example:
    """Operands of a call like this one, for `pallas_kernels.trial`."""
    left, right = factors(base, doublings, inner)
    n1, n2 = (1 if m is None else len(m) for m in (left, right))
    run = n1 * (inner if right is None else n2)
    rows = np.random.default_rng(0).standard_normal((3, run if left is not None else x.shape[-1]))
    form = kron.form_of(rows.astype(x.dtype), left, right, CHIPS["h100"])
    form = form._replace(gain=float((n1 * n2) ** -0.5))
    return Example((form, x.dtype.name, rows.shape[-1]), (rows.astype(x.dtype),), form)


EXAMPLES = {"hadamard": example}
