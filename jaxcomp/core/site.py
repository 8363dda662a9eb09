"""Sites: the named activations of a block, and what may happen there.

A block calls `x = tap("ffn_in", x)` at each site. The default tap enters the block's `Site`;
calibration uses another tap that also records. There are no hooks and nothing is patched.

A quantized activation is a float on its grid (simulation) or, where the quantizer says `integer`,
a `QActivation` of codes; both stand for the same numbers.
"""

from collections.abc import Callable, Collection, Mapping

from jaxtyping import Array, Float

from jaxcomp.core.activation import QActivation, as_float, quantize_activation, quantize_dynamic
from jaxcomp.core.quantize import QuantSpec, fake_quantize, fake_quantize_with
from jaxcomp.core.struct import node, static
from jaxcomp.core.transforms import Kron, Transform, transform
from pallas_kernels import kron_quantize

SITES = ("attn_in", "query", "k_cache", "v_cache", "attn_out", "ffn_in", "ffn_mid")
# What a single consumer of a shared activation sees of it, after the site itself.
CONSUMER_SITES = {
    "attn.q": "q_in",
    "attn.k": "k_in",
    "attn.v": "v_in",
    "ffn.gate": "gate_in",
    "ffn.up": "up_in",
}

Tap = Callable[[str, Array | QActivation], Array | QActivation]


@node
class ActQuantizer:
    """Quantizes an activation.

    Attributes:
      scale, zero_point: the calibrated grid of a static spec, broadcasting against the activation;
        None when `spec.dynamic`.
      clip: factors in (0, 1] of the least and the greatest value of a dynamic range, float32 `[2]`;
        None for the whole range.
      integer: give codes (a `QActivation`) to the linears behind the site, which then sum in
        integers; by default the activation is rounded to the grid and stays in its float dtype.
    """

    spec: QuantSpec = static()
    scale: Array | None = None
    zero_point: Array | None = None
    clip: Float[Array, "2"] | None = None
    integer: bool = static(default=False)


@node
class Site:
    """What happens to one named activation on its way to its consumers: transforms, then grid."""

    quantizer: ActQuantizer | None = None
    transforms: tuple[Transform, ...] = ()


def enter_site(
    site: Site, x: Float[Array, "*dims"] | QActivation
) -> Float[Array, "*dims"] | QActivation:
    """The activation as its consumers see it; same shape and dtype."""
    if _is_kron_then_codes(site):
        *before, last = site.transforms
        return kron_codes(
            site.quantizer, last, transform_site(site.replace(transforms=tuple(before)), x)
        )
    return quantize_site(site, transform_site(site, x))


def transform_site(
    site: Site, x: Float[Array, "*dims"] | QActivation
) -> Float[Array, "*dims"] | QActivation:
    """`x` after the site's transforms."""
    for t in site.transforms:
        x = transform(t, as_float(x))
    return x


def quantize_site(
    site: Site, x: Float[Array, "*dims"] | QActivation
) -> Float[Array, "*dims"] | QActivation:
    """The transformed `x` after the site's quantizer."""
    q = site.quantizer
    if q is None:
        return x
    if q.integer:
        return codes_of(q, x)
    x = as_float(x)
    if q.spec.dynamic:
        return fake_quantize(x, q.spec, q.clip)
    return fake_quantize_with(x, q.scale, q.zero_point, q.spec)


def codes_of(q: ActQuantizer, x: Float[Array, "*dims"] | QActivation) -> QActivation:
    """The codes of `x`, whatever the execution; `as_float` of them is the simulated activation."""
    x = as_float(x)
    if not q.spec.dynamic:
        return quantize_activation(x, q.scale, q.zero_point, q.spec)
    return quantize_dynamic(x, q.spec, q.clip)


def kron_codes(q: ActQuantizer, t: Kron, x: Float[Array, "*dims"] | QActivation) -> QActivation:
    """`codes_of(q, transform(t, x))` in one kernel, quantized before it is rounded to a dtype."""
    x = as_float(x)
    codes = kron_quantize(x, t.left, t.right, q.clip, bits=q.spec.bits)
    return QActivation(codes.codes, codes.scale, None, q.spec.bits, x.dtype)


def _is_kron_then_codes(site: Site) -> bool:
    q = site.quantizer
    if q is None or not q.integer or not site.transforms:
        return False
    spec = q.spec
    per_token = spec.dynamic and spec.symmetric and spec.granularity == "token"
    return per_token and isinstance(site.transforms[-1], Kron)


def site_tap(sites: Mapping[str, Site], as_codes: Collection[str] = ()) -> Tap:
    """The default tap of a block: enters the block's own sites.

    Args:
      as_codes: sites with a quantizer whose codes are wanted in any execution, to be stored.
    """

    def tap(name: str, x: Array | QActivation) -> Array | QActivation:
        if name not in sites:
            return x
        if name in as_codes:
            return codes_of(sites[name].quantizer, transform_site(sites[name], x))
        return enter_site(sites[name], x)

    return tap
