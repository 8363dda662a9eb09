"""Capture: run one block and reduce what passes its sites.

The capturing tap is made inside the jitted function and its records are returned, so a block
compiles once per structure and set of sites, and no activation leaves the device. Over a mesh the
states are sums, or extremes, over all devices.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxcomp.core.site import Site, quantize_site, transform_site
from jaxcomp.models.attention import plain_context
from jaxcomp.models.decoder import Block, block_forward
from jaxcomp.parallel.mesh import Placement, as_replicated

Update = Callable[[Any, Array], Any]
Stage = Literal["raw", "transformed", "quantized"]


def capture(
    block: Block,
    hidden: list,
    init: Mapping[str, Any],
    update: Update,
    stage: Stage = "transformed",
    place: Placement = Placement(),
) -> dict[str, Any]:
    """Folds the activations at some sites over all batches.

    Args:
      block: a block with arrays.
      hidden: its inputs on the host, `[batch, time, d_model]` each.
      init: site → initial state (a pytree of arrays); these sites are captured.
      update: (state, activation) → state; a module-level function, because it is part of the
        compilation key.
      stage: the activation "raw" as its producer made it, "transformed" by the site, or as the
        consumers get it, "quantized".
      place: the devices that share a batch.

    Returns:
      site → final state.
    """
    states = jax.tree.map(jnp.copy, dict(init))  # donated below; the caller's stay valid
    states, block = place.replicate(states), place.replicate(block)
    for x in hidden:
        states = capture_batch(states, block, place.put(x), update, stage)
    return place.local(states)


@functools.partial(jax.jit, static_argnames=("update", "stage"), donate_argnums=0)
def capture_batch(
    states: dict, block: Block, x: Array, update: Update, stage: Stage = "transformed"
) -> dict:
    """One batch of `capture`; `states` is donated."""
    records = {}

    def tap(name: str, h: Array) -> Array:
        site = block.sites.get(name, Site())
        transformed = transform_site(site, h)
        quantized = quantize_site(site, transformed)
        if name in states:
            seen = {"raw": h, "transformed": transformed, "quantized": quantized}[stage]
            records[name] = update(states[name], seen)
        return quantized

    block_forward(
        block, x, plain_context(*x.shape[:2]), tap
    )  # what follows the last site is dead code
    return as_replicated(records, x)
