"""Sites: the named activations of a block, and what may happen there.

A block calls `x = tap("ffn_in", x)` at each site. The default tap enters the block's `Site`;
calibration uses another tap that also records. There are no hooks and nothing is patched.
"""

from collections.abc import Callable, Mapping

from jaxtyping import Array, Float

from jaxcomp.core.quantize import QuantSpec, fake_quantize, fake_quantize_with
from jaxcomp.core.struct import node, static

SITES = ("attn_in", "query", "k_cache", "v_cache", "attn_out", "ffn_in", "ffn_mid")

Tap = Callable[[str, Array], Array]


@node
class ActQuantizer:
    """Quantizes an activation in simulation: rounds to the grid, stays in the float dtype.

    Attributes:
      scale, zero_point: the calibrated grid of a static spec; None when `spec.dynamic`.
    """

    spec: QuantSpec = static()
    scale: Array | None = None
    zero_point: Array | None = None


@node
class Site:
    """What happens to one named activation on its way to its consumers."""

    quantizer: ActQuantizer | None = None


def enter_site(site: Site, x: Float[Array, "*dims"]) -> Float[Array, "*dims"]:
    """The activation as its consumers see it; same shape and dtype."""
    if site.quantizer is None:
        return x
    q = site.quantizer
    if q.spec.dynamic:
        return fake_quantize(x, q.spec)
    return fake_quantize_with(x, q.scale, q.zero_point, q.spec)


def site_tap(sites: Mapping[str, Site]) -> Tap:
    """The default tap of a block: enters the block's own sites."""
    return lambda name, x: enter_site(sites[name], x) if name in sites else x
