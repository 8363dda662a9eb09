"""Sites: the named activations of a block, and what may happen there.

A block calls `x = tap("ffn_in", x)` at each site. The default tap enters the block's `Site`;
calibration uses another tap that also records. There are no hooks and nothing is patched.
"""

from collections.abc import Callable, Mapping

from jaxtyping import Array, Float

from jaxcomp.core.quantize import QuantSpec, fake_quantize, fake_quantize_with
from jaxcomp.core.struct import node, static
from jaxcomp.core.transforms import Transform, transform

SITES = ("attn_in", "query", "k_cache", "v_cache", "attn_out", "ffn_in", "ffn_mid")
# What a single consumer of a shared activation sees of it, after the site itself.
CONSUMER_SITES = {
    "attn.q": "q_in",
    "attn.k": "k_in",
    "attn.v": "v_in",
    "ffn.gate": "gate_in",
    "ffn.up": "up_in",
}

Tap = Callable[[str, Array], Array]


@node
class ActQuantizer:
    """Quantizes an activation in simulation: rounds to the grid, stays in the float dtype.

    Attributes:
      scale, zero_point: the calibrated grid of a static spec, broadcasting against the activation;
        None when `spec.dynamic`.
      clip: factors in (0, 1] of the least and the greatest value of a dynamic range, float32 `[2]`;
        None for the whole range.
    """

    spec: QuantSpec = static()
    scale: Array | None = None
    zero_point: Array | None = None
    clip: Float[Array, "2"] | None = None


@node
class Site:
    """What happens to one named activation on its way to its consumers: transforms, then grid."""

    quantizer: ActQuantizer | None = None
    transforms: tuple[Transform, ...] = ()


def enter_site(site: Site, x: Float[Array, "*dims"]) -> Float[Array, "*dims"]:
    """The activation as its consumers see it; same shape and dtype."""
    return quantize_site(site, transform_site(site, x))


def transform_site(site: Site, x: Float[Array, "*dims"]) -> Float[Array, "*dims"]:
    """`x` after the site's transforms."""
    for t in site.transforms:
        x = transform(t, x)
    return x


def quantize_site(site: Site, x: Float[Array, "*dims"]) -> Float[Array, "*dims"]:
    """The transformed `x` after the site's quantizer."""
    q = site.quantizer
    if q is None:
        return x
    if q.spec.dynamic:
        return fake_quantize(x, q.spec, q.clip)
    return fake_quantize_with(x, q.scale, q.zero_point, q.spec)


def site_tap(sites: Mapping[str, Site]) -> Tap:
    """The default tap of a block: enters the block's own sites."""
    return lambda name, x: enter_site(sites[name], x) if name in sites else x
