"""Statistics of activations, each an init/update pair over arrays, for use inside a jitted pass."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float


class Hessian(NamedTuple):
    """Running second moment of a site.

    Attributes:
      total: Σ xᵀx over the tokens seen, float32.
      tokens: how many tokens that is.
    """

    total: Float[Array, "channels channels"]
    tokens: Float[Array, ""]


def hessian_init(channels: int) -> Hessian:
    """Nothing seen yet."""
    return Hessian(jnp.zeros((channels, channels)), jnp.zeros(()))


def hessian_update(state: Hessian, x: Float[Array, "*tokens channels"]) -> Hessian:
    """Adds the tokens of `x`; products in float32 whatever the dtype of `x`."""
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    return Hessian(state.total + rows.T @ rows, state.tokens + rows.shape[0])


def hessian_finish(state: Hessian) -> Float[Array, "channels channels"]:
    """H = (2/N) Σ xᵀx, the Hessian of the mean squared output error."""
    return 2.0 * state.total / jnp.maximum(state.tokens, 1.0)
