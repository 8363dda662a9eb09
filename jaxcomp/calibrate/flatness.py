"""How evenly the channels of a site share the load, before and after compression.

A grid is as coarse as its largest value, so a few large channels cost all the others their
precision; transforms are there to even them out. For an activation, or for the input channels of
the weights behind it:
    d = Frobenius norm of each channel,  d' = all alike, with the same norm,
    flatness = ‖d − d'‖ / ‖d‖ in [0, √2), 0 when all channels are alike.

Source: FlatQuant, Sun et al., arXiv 2410.09426, §4.3; the division by ‖d‖ is ours, because a
transform may change the norm of everything.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxcomp.calibrate.capture import capture
from jaxcomp.core.quantize import QTensor, dequantize
from jaxcomp.core.tree import get_at
from jaxcomp.models.anatomy import anatomy
from jaxcomp.models.decoder import Block
from jaxcomp.models.stream import Hidden

CURVE = 64  # points of a curve


def compare_flatness(
    before: Block, after: Block, hidden_before: Hidden, hidden_after: Hidden
) -> list[dict[str, Any]]:
    """The channels of every site that both blocks have.

    Returns:
      for each its `site`, the `consumers` behind it, and under `activation` (transformed, not
      rounded) and `weight` (multiplied out, all consumers together) the `channel_curve` `before`
      and `after`.
    """
    old, new = site_energy(before, hidden_before), site_energy(after, hidden_after)
    parts = anatomy(before).sites
    return [
        {"site": site, "consumers": list(parts[site].consumers)}
        | {
            kind: {
                "before": channel_curve(old[site][kind]),
                "after": channel_curve(new[site][kind]),
            }
            for kind in old[site]
        }
        for site in parts
        if site in new
    ]


def site_energy(block: Block, hidden: Hidden) -> dict[str, dict[str, Array]]:
    """Site → squared norm of each channel of its `activation` and of the `weight`s behind it."""
    weights = {
        site: [get_at(block, path).w for path in part.consumers]
        for site, part in anatomy(block).sites.items()
    }
    zeros = {site: jnp.zeros(ws[0].shape[-2]) for site, ws in weights.items()}
    activations, rows = capture(block, hidden, zeros, _add_energy), _weight_energy(weights)
    return {site: {"activation": activations[site], "weight": rows[site]} for site in weights}


def channel_curve(energy: Float[Array, " channels"]) -> dict[str, Any]:
    """Channels from their squared norms, as a curve to draw; numbers have four digits.

    Returns:
      `flatness`; `rms` of the norms; `channels`, the norms over that rms, largest first, at the
      ranks (n − 1)·u² for `CURVE` even steps of u from 0 to 1, densest among the largest and
      interpolated between neighbours.
    """
    norms = np.sqrt(np.asarray(energy, np.float64))
    rms = max(float(np.sqrt(np.mean(norms**2))), 1e-30)
    relative = np.sort(norms / rms)[::-1]
    ranks = (len(norms) - 1) * np.linspace(0, 1, CURVE) ** 2
    curve = np.interp(ranks, np.arange(len(norms)), relative)
    return {
        "flatness": _short(np.sqrt(np.mean((relative - 1) ** 2))),
        "rms": _short(rms),
        "channels": [_short(value) for value in curve],
    }


def _add_energy(total: Array, x: Array) -> Array:
    return total + jnp.sum(jnp.square(x.astype(jnp.float32)), axis=tuple(range(x.ndim - 1)))


@jax.jit
def _weight_energy(weights: dict[str, list[Array | QTensor]]) -> dict[str, Array]:
    def energy(w: Array | QTensor) -> Array:
        dense = dequantize(w) if isinstance(w, QTensor) else w.astype(jnp.float32)
        return jnp.sum(dense**2, axis=(*range(dense.ndim - 2), -1))

    return {site: sum(map(energy, ws)) for site, ws in weights.items()}


def _short(value: float) -> float:
    return float(f"{value:.4g}")
