"""Search for the range of a weight grid: shrinking it costs the tails and refines the rest.

For p = 1 − i/100, i = 0 … 79, the range (min, max) of each group is multiplied by p, and the p with
the least error in the group wins. Two errors:
    Σ |w − ŵ|^2.4                       knows the weights alone
    Σ_j H_jj · (w_j − ŵ_j)²             with the second moment H_jj of input channel j

Source: the first is the clip search of the GPTQ and QuaRot code bases, as configured in
"Quantization Hurts Reasoning?" (arXiv 2504.04823). The second is the diagonal of GPTQ's objective;
the first clips just those large weights on which an outlier activation relies.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from jaxcomp.core.quantize import QuantSpec, range_to_grid, round_to_codes, weight_range

NORM = 2.4
STEPS = 80
STEP = 0.01
TINY = 1e-30  # keeps the logarithm finite; adds 1e-36 to an error of zero


def search_range(
    w: Float[Array, "in_ch out_ch"],
    spec: QuantSpec,
    importance: Float[Array, " in_ch"] | None = None,
) -> tuple[Float[Array, "groups cols"], Int8[Array, "groups cols"] | None]:
    """Scale and zero point of the clipped range with the least error in each group.

    Never worse than `core.quantize.fit_range` in the searched error, because p = 1 is among the
    candidates.

    Args:
      w: weight applied as ``x @ w``.
      spec: the grid.
      importance: H_jj, any positive multiple; None for the error that knows the weights alone.
    """
    low, high = weight_range(w, spec)
    groups = low.shape[0]
    grouped = w.astype(jnp.float32).reshape(groups, -1, w.shape[-1])
    weight = None if importance is None else importance.reshape(groups, -1, 1)

    def try_shrink(i, best):
        best_error, best_p = best
        p = 1.0 - STEP * i
        scale, zero = range_to_grid(low * p, high * p, spec)
        s, z = scale[:, None], None if zero is None else zero[:, None]
        codes = round_to_codes(grouped, s, z, spec).astype(jnp.float32)
        squared = ((codes if z is None else codes - z) * s - grouped) ** 2
        # exp and log take a quarter of a power's time.
        power = jnp.exp(NORM / 2 * jnp.log(squared + TINY)) if weight is None else weight * squared
        error = jnp.sum(power, axis=1)
        error = jnp.sum(error, axis=-1, keepdims=True) if low.shape[-1] == 1 else error
        better = error < best_error
        return jnp.where(better, error, best_error), jnp.where(better, p, best_p)

    start = jnp.full(low.shape, jnp.inf), jnp.ones(low.shape)
    _, p = jax.lax.fori_loop(0, STEPS, try_shrink, start)
    return range_to_grid(low * p, high * p, spec)
