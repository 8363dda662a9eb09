"""`hadamard` in plain jnp: one product for each small factor of the matrix.

A butterfly has fewer operations, but at these sizes XLA's CPU backend multiplies faster than it
shuffles.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.kron_matmul import reference

DENSE = 7  # doublings up to which Sylvester's matrix is one product


def hadamard(
    x: Float[Array, "*tokens channels"], base: np.ndarray | None, doublings: int, inner: int
) -> Float[Array, "*tokens channels"]:
    """See `pallas_kernels.hadamard.hadamard`."""
    # In bfloat16 the entries 1/√order are off by up to 0.2 %, and every factor would round again.
    y = x.astype(jnp.float32)
    matrices = factors(base, doublings)
    inner *= int(np.prod([len(m) for m in matrices], dtype=int))
    for matrix in matrices:
        # The factor's axis stands before `inner` channels, whatever stands before it.
        inner //= len(matrix)
        part = jnp.asarray(matrix / np.sqrt(len(matrix)), jnp.float32)
        rows = y.reshape(*x.shape[:-1], -1, len(matrix) * inner)
        y = reference.kron_matmul(rows, *((part, None) if inner > 1 else (None, part)))
        y = y.reshape(x.shape)
    return y.astype(x.dtype)


def factors(base: np.ndarray | None, doublings: int) -> list[np.ndarray]:
    """Small matrices of ±1 whose Kronecker product is the whole one."""
    found = [] if base is None or len(base) == 1 else [np.asarray(base)]
    while doublings:
        part = min(doublings, DENSE)
        found.append(sylvester(part))
        doublings -= part
    return found


def sylvester(doublings: int) -> np.ndarray:
    """Sylvester's Hadamard matrix of order 2^doublings, int8."""
    matrix = np.ones((1, 1), np.int8)
    for _ in range(doublings):
        matrix = np.kron(matrix, np.array([[1, 1], [1, -1]], np.int8))
    return matrix
