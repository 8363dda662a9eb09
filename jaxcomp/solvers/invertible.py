"""Invertible matrices as free parameters, so that gradient descent cannot leave them.

    SVD      P = U diag(s) Vᵀ,  P⁻ᵀ = U diag(1/s) Vᵀ,   U = cayley(u), V = cayley(v)
    Direct   P is free,         P⁻ᵀ by inversion at every step

Initial values (both start with s = 1 where there is one):
    cayley     u and v are random orthogonal matrices used as *parameters* of Cayley's map, as the
               authors' code ends up doing: a rotation biased towards the identity (Direct: Haar)
    haar       P is a random rotation
    hadamard   P is a normalised Hadamard matrix with random signs; a random rotation where there is
               none of that order
    identity   P = I

Source: FlatQuant, arXiv 2410.09426, §3.1, and its code; Cayley's map as in Lezcano-Casado,
arXiv 1909.09501. Departure: the direct inverse is float32 by Newton's iteration, not float64 by LU.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxcomp.core.hadamard import hadamard_base, hadamard_matrix
from jaxcomp.core.struct import node
from jaxcomp.solvers.inverse import invert
from jaxcomp.solvers.orthogonal import cayley, random_orthogonal

Form = Literal["svd", "direct"]
Init = Literal["cayley", "haar", "hadamard", "identity"]


@node
class SVD:
    """`base · cayley(u) diag(s) cayley(v)ᵀ`; `base` is a fixed rotation, None for the identity."""

    u: Float[Array, "n n"]
    s: Float[Array, " n"]
    v: Float[Array, "n n"]
    base: Float[Array, "n n"] | None = None


@node
class Direct:
    """The matrix itself."""

    p: Float[Array, "n n"]


def init_matrix(n: int, key: PRNGKeyArray, form: Form, init: Init) -> SVD | Direct:
    """Parameters of an invertible n × n matrix at its initial value; see the module docstring."""
    if form == "direct":
        return Direct(_rotation(n, key, "haar" if init == "cayley" else init))
    if init == "cayley":
        u, v = (random_orthogonal(k, n) for k in jax.random.split(key))
        return SVD(u, jnp.ones(n), v)
    zero = jnp.zeros((n, n))
    return SVD(zero, jnp.ones(n), zero, None if init == "identity" else _rotation(n, key, init))


def materialize(m: SVD | Direct) -> tuple[Float[Array, "n n"], Float[Array, "n n"]]:
    """P and P⁻ᵀ, float32."""
    if isinstance(m, Direct):
        return m.p, invert(m.p).T
    u, v = cayley(jnp.stack([m.u, m.v]))
    u = u if m.base is None else jax.lax.stop_gradient(m.base) @ u
    return (u * m.s) @ v.T, (u / m.s) @ v.T


def condition(m: SVD | Direct) -> Float[Array, ""]:
    """Ratio of the largest to the smallest singular value of P."""
    s = jnp.abs(m.s) if isinstance(m, SVD) else jnp.linalg.svd(m.p, compute_uv=False)
    return jnp.max(s) / jnp.min(s)


def _rotation(n: int, key: PRNGKeyArray, init: Init) -> Array:
    if init == "identity":
        return jnp.eye(n)
    if init == "hadamard" and hadamard_base(n):
        signs = jax.random.rademacher(key, (n,), jnp.float32)
        return signs[:, None] * jnp.asarray(hadamard_matrix(n), jnp.float32) / jnp.sqrt(n)
    return random_orthogonal(key, n)
