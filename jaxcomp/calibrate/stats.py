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


class Magnitude(NamedTuple):
    """Running magnitudes of each channel of a site.

    Attributes:
      amax: largest |x|, float32.
      total: Σ|x|; over `count` tokens it gives the mean.
      count: tokens seen.
    """

    amax: Float[Array, " channels"]
    total: Float[Array, " channels"]
    count: Float[Array, ""]


def magnitude_init(channels: int) -> Magnitude:
    """Nothing seen yet."""
    return Magnitude(jnp.zeros(channels), jnp.zeros(channels), jnp.zeros(()))


def magnitude_update(state: Magnitude, x: Float[Array, "*tokens channels"]) -> Magnitude:
    """Adds the tokens of `x`."""
    rows = jnp.abs(x.astype(jnp.float32)).reshape(-1, x.shape[-1])
    return Magnitude(
        jnp.maximum(state.amax, jnp.max(rows, axis=0)),
        state.total + jnp.sum(rows, axis=0),
        state.count + len(rows),
    )


class Range(NamedTuple):
    """Running least and greatest value of each channel of a site, `[…, channels]`, float32."""

    low: Float[Array, "*heads channels"]
    high: Float[Array, "*heads channels"]


def range_init(*channels: int) -> Range:
    """Nothing seen yet; the range holds 0."""
    return Range(jnp.zeros(channels), jnp.zeros(channels))


def range_update(state: Range, x: Float[Array, "batch time *heads channels"]) -> Range:
    """Widens the range by the tokens of `x`."""
    x = x.astype(jnp.float32)
    return Range(
        jnp.minimum(state.low, jnp.min(x, axis=(0, 1))),
        jnp.maximum(state.high, jnp.max(x, axis=(0, 1))),
    )
