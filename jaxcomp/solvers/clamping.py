"""Search for a symmetric clamp of each group of a weight, by the error of the group's own output.

For m = 1 − i/20, i = 0 … 9, the weights of a group are clamped to ± m·max|w|, a grid is fitted to
what is left, and the m with the least
    Σ_t (x_t · (w − ŵ))²  =  dᵀ G d,    d = w − ŵ,  G = Σ_t x_t x_tᵀ
wins, where x_t are the group's input channels alone: unlike `solvers.clipping` this sees how
channels of a group go together. G costs less than the outputs of all tokens as soon as a group has
fewer channels than there are tokens.

Source: Lin et al., arXiv 2306.00978, Section 3.2, and the authors' `auto_clip`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcomp.core.quantize import QuantSpec, fake_quantize, n_groups, weight_range

STEPS = 10
STEP = 0.05


def group_gram(
    x: Float[Array, "tokens in_ch"], spec: QuantSpec
) -> Float[Array, "groups group group"]:
    """G of each group of input channels, float32.

    Raises:
      ValueError: `in_ch` is not a whole number of groups.
    """
    groups = n_groups(x.shape[-1], spec)
    grouped = x.astype(jnp.float32).reshape(len(x), groups, -1)
    return jnp.einsum("tgi,tgj->gij", grouped, grouped)


def search_clamp(
    w: Float[Array, "in_ch out_ch"], gram: Float[Array, "groups group group"], spec: QuantSpec
) -> Float[Array, "in_ch out_ch"]:
    """`w` clamped, float32; rounding it with `core.quantize.quantize` is AWQ's rounding.

    The result rounds to no greater output error in any group than `w` itself, because m = 1 is
    among the candidates.

    Args:
      w: weight applied as ``x @ w``.
      gram: from `group_gram`, or any positive multiple.
      spec: the grid.
    """
    low, high = weight_range(w, spec)
    amax = jnp.maximum(jnp.abs(low), jnp.abs(high))[:, None]
    grouped = w.astype(jnp.float32).reshape(len(low), -1, w.shape[-1])

    def clamp(m: Array) -> Array:
        return jnp.clip(grouped, -m * amax, m * amax)

    def try_clamp(i: Array, best: tuple) -> tuple:
        best_error, best_m = best
        m = 1.0 - STEP * i
        d = fake_quantize(clamp(m).reshape(w.shape), spec).reshape(grouped.shape) - grouped
        error = jnp.sum(d * (gram @ d), axis=1, keepdims=True)
        error = jnp.sum(error, axis=-1, keepdims=True) if amax.shape[-1] == 1 else error
        better = error < best_error
        return jnp.where(better, error, best_error), jnp.where(better, m, best_m)

    start = jnp.full(amax.shape, jnp.inf), jnp.ones(amax.shape)
    return clamp(jax.lax.fori_loop(0, STEPS, try_clamp, start)[1]).reshape(w.shape)
