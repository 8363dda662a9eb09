"""Scales per channel at a site, for methods that choose them: where they fit, and how to put them.

A scale at a site is absorbed by the site's producer and undone in its consumers, so only the
channels as the producer made them can be scaled, and only if nothing in between was fitted to them.
"""

from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcomp.core.linear import Linear
from jaxcomp.core.quantize import QTensor
from jaxcomp.core.site import CONSUMER_SITES
from jaxcomp.core.tree import get_at
from jaxcomp.models.anatomy import SitePart, anatomy
from jaxcomp.models.decoder import Block, Decoder, block_struct
from jaxcomp.models.fold import fold_scale

BETWEEN = {"attn_out": ("v_cache",)}  # sites that the producer's channels pass before this one


def check_scalable(model: Decoder, sites: Iterable[str]) -> None:
    """Refuses sites that cannot take a scale; reads no block.

    Raises:
      ValueError: names the block, the site and the reason.
    """
    sites = tuple(sites)
    for i, block in enumerate(map(block_struct, model.blocks)):
        for site in sites:
            if reason := unscalable(block, site):
                raise ValueError(f"block {i}: {site} cannot be scaled: {reason}")


def unscalable(block: Block, site: str) -> str | None:
    """Why the block's site cannot take a scale per channel; None if it can."""
    parts = anatomy(block).sites
    if site not in parts:
        return f"the anatomy has linears at {', '.join(parts)} only"
    part = parts[site]
    if part.producer is None:
        return "the anatomy has nothing before it that could absorb a scale"
    for path in (*part.consumers, part.producer):
        p = get_at(block, path)
        if isinstance(p, Linear) and isinstance(p.w, QTensor):
            return (
                f"{path} is already quantized to {p.w.bits} bits; "
                "put the step that scales before the one that quantizes"
            )
    on_the_way = (*BETWEEN.get(site, ()), site, *(CONSUMER_SITES.get(p) for p in part.consumers))
    for name in on_the_way:
        there = block.sites.get(name)
        if there is None:
            continue
        if there.transforms:
            kinds = ", ".join(type(t).__name__ for t in there.transforms)
            return f"{name} has transforms already ({kinds}); put the step that scales before them"
        if there.quantizer is not None and not there.quantizer.spec.dynamic:
            return f"{name} has a static grid already; put the step that scales before it"
    return None


def divide_sites(block: Block, scales: Mapping[str, Float[Array, " channels"]]) -> Block:
    """The same function with the activation at each site divided by its scale.

    Float32 in between, and rounded to the stored dtypes once. Under grouped heads a scale must be
    equal over the repeats of a value head (`even_repeats`).
    """
    folded = as_float32(block)
    for site, scale in scales.items():
        folded = fold_scale(folded, site, 1.0 / scale)
    return jax.tree.map(lambda new, old: new.astype(old.dtype), folded, block)


def consumer_amax(block: Block, site: str) -> Float[Array, " channels"]:
    """Largest |W| of each of the site's channels, over all linears that read it, float32."""
    weights = (get_at(block, path).w for path in anatomy(block)[site].consumers)
    tops = [jnp.max(jnp.abs(w.astype(jnp.float32)), axis=(*range(w.ndim - 2), -1)) for w in weights]
    return jnp.max(jnp.stack(tops), axis=0)


def even_repeats(
    block: Block, part: SitePart, values: Float[Array, " channels"]
) -> Float[Array, " channels"]:
    """`values` with the largest over the repeats of a value head in the place of each."""
    if part.repeats == 1:
        return values
    heads = values.reshape(-1, part.repeats, block.attn.head_dim)
    return jnp.broadcast_to(jnp.max(heads, axis=1, keepdims=True), heads.shape).reshape(-1)


def as_float32(tree: Block) -> Block:
    """Every floating leaf in float32; codes stay codes."""
    return jax.tree.map(
        lambda a: a.astype(jnp.float32) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree
    )
