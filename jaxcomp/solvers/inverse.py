"""Inverses of small, well-conditioned matrices inside a step that is run thousands of times.

    X ← X + X (I − M X),    X₀ = Mᵀ / (‖M‖₁ ‖M‖∞)

Newton's iteration squares the residual and needs products alone, so it runs where factorisations
are slow: on accelerators, and on a CPU whose LAPACK brings threads of its own, which fight for the
cores with those of the rest of the step (measured there: 0.3 ms, against 0.1 to 55 ms of LU, for
two matrices of order 64). Converges for every non-singular M, in about 2·log₂(cond M) + 7 rounds.

Source: Schulz 1933; the first X of Pan and Reif 1985. The gradient is −Xᵀ G Xᵀ.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

MAX_ROUNDS = 64
NEAR = 1e-2  # a residual below this halves at least, until rounding stops it


@jax.custom_vjp
def invert(m: Float[Array, "*batch n n"]) -> Float[Array, "*batch n n"]:
    """M⁻¹ in the dtype of M; not finite or useless where M is singular, as with any inverse.

    Accuracy is that of `jnp.linalg.inv`: about cond(M) roundings.
    """
    eye = jnp.eye(m.shape[-1], dtype=m.dtype)
    norms = [jnp.max(jnp.sum(jnp.abs(m), axis), -1)[..., None, None] for axis in (-1, -2)]
    first = jnp.swapaxes(m, -1, -2) / (norms[0] * norms[1])

    def unfinished(state: tuple) -> Array:
        rounds, _, _, last, now = state
        # The first comparison also ends the loop when the residual is NaN.
        return (rounds < MAX_ROUNDS) & (now < jnp.inf) & ~((now < NEAR) & (now >= 0.5 * last))

    def improve(state: tuple) -> tuple:
        rounds, x, residual, _, now = state
        x = x + x @ residual
        residual = eye - m @ x
        return rounds + 1, x, residual, now, jnp.max(jnp.abs(residual))

    residual = eye - m @ first
    start = jnp.max(jnp.abs(residual))
    return jax.lax.while_loop(unfinished, improve, (0, first, residual, jnp.inf, start))[1]


def _forward(m: Array) -> tuple[Array, Array]:
    x = invert(m)
    return x, x


def _backward(x: Array, g: Array) -> tuple[Array]:
    t = jnp.swapaxes(x, -1, -2)
    return (-(t @ g @ t),)


invert.defvjp(_forward, _backward)
