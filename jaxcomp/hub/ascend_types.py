"""Which type of the Ascend layout a linear has: the one that computes what the model computes.

    type                     codes of the weight   its input
    FLOAT                    none: dense           floats; transforms are multiplied into the weight
    W8A16                    int8                  floats
    W8A8_DYNAMIC             int8                  int8 per token, scale max|x| / 127
    W4A4_FLATQUANT_DYNAMIC   4 bits                int4 per token of y = leftᵀ X right, the token
                                                   as X [L, R]; scale clip_ratio · max|y| / 7

Weights are symmetric, with a scale a channel.

The layout's W4A8_DYNAMIC packs codes and a correction in ways on which its descriptions do not
agree; 4-bit codes before 8-bit inputs are W8A8_DYNAMIC here, exactly and in 8 bits. For caches it
has static int8 grids alone, which no method here makes.

Source: msModelSlim's description of AscendV1, the loaders of vllm-ascend.
"""

from jaxcomp.core.quantize import QTensor
from jaxcomp.core.site import CONSUMER_SITES, Site
from jaxcomp.core.tree import get_at
from jaxcomp.hub.ascend_factors import find_factors, runtime_pair
from jaxcomp.models.anatomy import anatomy, channels
from jaxcomp.models.decoder import Block

TYPES = ("FLOAT", "W8A16", "W8A8_DYNAMIC", "W4A4_FLATQUANT_DYNAMIC")  # least quantized first
FLOAT, W8A16, W8A8, W4A4 = TYPES


def site_types(block: Block) -> dict[str, str]:
    """Every site with linears → the type of all of them; `block` may be of structs.

    Raises:
      ValueError: the site, and why no type is what it computes.
    """
    for name in ("query", "k_cache", "v_cache"):
        site = block.sites.get(name, Site())
        if site.quantizer is not None:
            raise ValueError(
                f"{name} is quantized ({site.quantizer.spec}), and the layout has no dynamic "
                "cache; leave the cache out of the recipe (kv=None)"
            )
    if block.sites.get("v_cache", Site()).transforms:
        raise ValueError("v_cache has a transform, and the layout has no place for it")
    found = {}
    for site, part in anatomy(block).sites.items():
        try:
            kinds = {path: _type(block, site, path) for path in part.consumers}
        except ValueError as error:
            raise ValueError(f"{site}: {error}") from None
        if len(set(kinds.values())) > 1:
            told = ", ".join(f"{path} {kind}" for path, kind in kinds.items())
            raise ValueError(
                f"{site}: its linears differ ({told}), and the runtime holds them as one matrix; "
                "give them one grid"
            )
        found[site] = next(iter(kinds.values()))
    return found


def _type(block: Block, site: str, path: str) -> str:
    """The type of the linear at `path`, which reads `site`."""
    w, here = get_at(block, path).w, block.sites.get(site, Site())
    own = block.sites.get(CONSUMER_SITES.get(path, ""), Site())
    if own.quantizer is not None or own.transforms:
        raise ValueError(
            f"{path} has a quantizer of its own, and the runtime has one for all that read a site; "
            "fit with FlatQuant(shared_quantizer=True)"
        )
    act = here.quantizer
    if not isinstance(w, QTensor):
        if act is not None:
            raise ValueError(
                f"the input of {path} is quantized and its weight is not, which no type says"
            )
        return FLOAT
    if w.zero_point is not None or w.scale.shape[-2] > 1:
        raise ValueError(
            f"{path} is {'asymmetric' if w.zero_point is not None else 'in groups'}, and the "
            "runtime has one scale a channel and no zero point: "
            f"QuantSpec(bits={w.bits}) for the weight"
        )
    if act is None and not here.transforms:
        return W8A16
    if act is None:
        raise ValueError(
            f"the input of {path} is transformed and not quantized, and only 4-bit inputs have a "
            "place for a transform; quantize it to 4 bits, or leave the weight in floats, into "
            f"which the transform is then multiplied: Override(sites=({site!r},), weight_bits=16)"
        )
    spec = act.spec
    if not (spec.symmetric and spec.dynamic and spec.granularity == "token"):
        raise ValueError(
            f"the input of {path} is on the grid {spec}, "
            f"{'dynamic' if spec.dynamic else 'static'}; the runtime measures a symmetric range of "
            "every token: QuantSpec(bits, granularity='token', dynamic=True)"
        )
    if spec.bits == 8 and not here.transforms and act.clip is None:
        return W8A8
    if spec.bits == 8:
        what = "a transform" if here.transforms else "clip factors"
        raise ValueError(
            f"the 8-bit input of {path} has {what}, for which the runtime has no place at 8 bits; "
            "quantize by a method without (SmoothQuant, then GPTQ or RTN)"
        )
    if spec.bits != 4 or w.bits > 4:
        raise ValueError(
            f"{path} has {w.bits} bits and its input {spec.bits}; the runtime has 4 and 4, or up "
            "to 8 and 8"
        )
    _check_factors(block, site)
    return W4A4


def _check_factors(block: Block, site: str) -> None:
    n, transforms = channels(block, site), block.sites.get(site, Site()).transforms
    floats = f"Override(sites=({site!r},), weight_bits=16, act_bits=16) in all steps"
    try:
        left, right = runtime_pair(n)
    except ValueError as error:
        raise ValueError(f"{error}; leave the site in floats: {floats}") from None
    if find_factors(transforms, n) is not None:
        return
    kinds = " and ".join(type(t).__name__ for t in transforms)
    if site == "attn_out":
        way = (
            f"the mix of heads fits where their number ({block.attn.n_heads}) divides {left}; "
            f"leave the site in floats: {floats}; or mix none: QuaRot(head_mix='none')"
        )
    else:
        way = f"fit with FlatQuant(factors=(({site!r}, ({left}, {right})),))"
        way += "; or rotate nothing there: QuaRot(ffn=False)" * (site == "ffn_mid")
    raise ValueError(
        f"its transform ({kinds}) is no left ⊗ right of the orders {left} and {right}, which the "
        f"runtime derives from {n} channels; {way}"
    )
