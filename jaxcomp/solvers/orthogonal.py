"""Orthogonal matrices: drawn uniformly, or parametrised by a free square matrix.

    Haar    G = Q R of a Gaussian G, with the sign of each column of Q chosen so that diag(R) > 0
    Cayley  A = tril(Z) − tril(Z)ᵀ,   U = (I − A/2)⁻¹ (I + A/2)

Source: Mezzadri, arXiv math-ph/0609050 (without the signs QR is not uniform); Cayley as in the
parametrisation that FlatQuant (arXiv 2410.09426) fits. I − A/2 with A skew is never singular, so a
result that is not finite means that Z was not. U has no eigenvalue −1: a rotation by exactly half
a turn is out of reach.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxcomp.solvers.inverse import invert


def random_orthogonal(key: PRNGKeyArray, n: int) -> Float[Array, "n n"]:
    """A uniformly distributed orthogonal matrix, float32; the same key gives the same matrix."""
    q, r = jnp.linalg.qr(jax.random.normal(key, (n, n), jnp.float32))
    return q * jnp.where(jnp.diagonal(r) < 0, -1.0, 1.0)


def cayley(z: Float[Array, "*batch n n"]) -> Float[Array, "*batch n n"]:
    """The orthogonal matrix of a free `z`, differentiable; only what is below the diagonal counts.

    Zeros give the identity.
    """
    lower = jnp.tril(z, -1)  # the diagonal cancels in A
    half = (lower - jnp.swapaxes(lower, -1, -2)) / 2
    eye = jnp.eye(z.shape[-1], dtype=z.dtype)
    return 2 * invert(eye - half) - eye  # (I − H)⁻¹ (I + H)
