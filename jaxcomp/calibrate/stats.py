"""Statistics of activations, each an init/update pair over arrays, for use inside a jitted pass."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float


class Hessian(NamedTuple):
    """Running second moment of a site.

    Attributes:
      total: Σ w·xᵀx over the tokens seen, float32.
      weight: Σ w.
      first: w of the first token of each window; every other token has weight 1.
    """

    total: Float[Array, "channels channels"]
    weight: Float[Array, ""]
    first: Float[Array, ""]


def hessian_init(channels: int, first: float = 1.0) -> Hessian:
    """Nothing seen yet; `first` is the weight of the first token of each window."""
    return Hessian(jnp.zeros((channels, channels)), jnp.zeros(()), jnp.asarray(first, jnp.float32))


def hessian_update(state: Hessian, x: Float[Array, "batch time channels"]) -> Hessian:
    """Adds the tokens of `x`; products in float32 whatever the dtype of `x`."""
    batch, time, channels = x.shape
    x = x.astype(jnp.float32).at[:, 0].multiply(jnp.sqrt(state.first))
    rows = x.reshape(-1, channels)
    weight = state.weight + batch * (time - 1 + state.first)
    return Hessian(state.total + rows.T @ rows, weight, state.first)


def hessian_finish(state: Hessian) -> Float[Array, "channels channels"]:
    """H = (2/Σw) Σ w·xᵀx, the Hessian of the weighted mean squared output error."""
    return 2.0 * state.total / jnp.maximum(state.weight, 1.0)
