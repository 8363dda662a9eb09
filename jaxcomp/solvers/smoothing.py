"""Scales that move magnitude between an activation and the weights that read it, by channel.

    x W = (x / s)(s W),    s one positive number for each input channel of W
    SmoothQuant            s = amax|x|^α / amax|W|^(1−α),   at least 1e-5
    AWQ                    s = mean|x|^r, at least 1e-4, then divided by √(max s · min s)
    FlatQuant's start      c = amax|W|^(1−α) / amax|x|^α, at least 1e-5, and x is multiplied by it

Source: Xiao et al., arXiv 2211.10438, Eq. 4; Lin et al., arXiv 2306.00978, Section 3.2, with the
normalisation of the authors' code and, as there, without the exponent on the weights; Sun et al.,
arXiv 2410.09426, the authors' code. Left open for SmoothQuant: a channel whose activations are all
0 counts as 1e-5, as in FlatQuant's code; the authors' code gives it s = 1e-5, a factor of 1e5 for
whoever puts it out.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

FLOOR = 1e-5
AWQ_FLOOR = 1e-4


def smoothing_scale(
    x_amax: Float[Array, " channels"], w_amax: Float[Array, " channels"], alpha: float
) -> Float[Array, " channels"]:
    """SmoothQuant's s: what the activation is divided by and the weight multiplied by.

    Args:
      x_amax: largest |x| of each channel.
      w_amax: largest |W| of each input channel, over all weights that read it.
      alpha: share of the difficulty moved to the weights, in [0, 1].
    """
    x_amax, w_amax = jnp.maximum(x_amax, FLOOR), jnp.maximum(w_amax, FLOOR)
    return jnp.maximum(x_amax**alpha / w_amax ** (1 - alpha), FLOOR)


def flatquant_scale(
    x_amax: Float[Array, " channels"],
    w_amax: Float[Array, " channels"],
    alpha: float,
) -> Float[Array, " channels"]:
    """FlatQuant's first c: what the activation is *multiplied* by and the weight divided by."""
    return jnp.maximum(w_amax ** (1 - alpha) / jnp.maximum(x_amax, FLOOR) ** alpha, FLOOR)


def awq_scale(
    x_mean: Float[Array, " channels"], ratio: float | Float[Array, ""]
) -> Float[Array, " channels"]:
    """AWQ's s for one exponent: what the activation is divided by and the weight multiplied by.

    All ones for ratio 0. The geometric mean of the greatest and the least is 1.

    Args:
      x_mean: mean |x| of each channel.
      ratio: r in [0, 1).
    """
    s = jnp.maximum(x_mean**ratio, AWQ_FLOOR)
    return s / jnp.sqrt(jnp.max(s) * jnp.min(s))
