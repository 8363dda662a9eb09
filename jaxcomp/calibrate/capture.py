"""Capture: run one block and reduce what passes its sites.

The capturing tap is made inside the jitted function and its records are returned, so a block
compiles once per structure and set of sites, and no activation leaves the device.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxcomp.core.site import site_tap
from jaxcomp.models.attention import plain_context
from jaxcomp.models.decoder import Block, block_forward

Update = Callable[[Any, Array], Any]


def capture(block: Block, hidden: list, init: Mapping[str, Any], update: Update) -> dict[str, Any]:
    """Folds the activations at some sites over all batches.

    Args:
      block: a block with arrays.
      hidden: its inputs, `[batch, time, d_model]` each.
      init: site → initial state (a pytree of arrays); these sites are captured.
      update: (state, activation as it arrives at the site) → state; a module-level function,
        because it is part of the compilation key.

    Returns:
      site → final state.
    """
    states = jax.tree.map(jnp.copy, dict(init))  # donated below; the caller's stay valid
    for x in hidden:
        states = capture_batch(states, block, x, update)
    return states


@functools.partial(jax.jit, static_argnames="update", donate_argnums=0)
def capture_batch(states: dict, block: Block, x: Array, update: Update) -> dict:
    """One batch of `capture`; `states` is donated."""
    records = {}
    enter = site_tap(block.sites)

    def tap(name: str, h: Array) -> Array:
        if name in states:
            records[name] = update(states[name], h)
        return enter(name, h)

    block_forward(
        block, x, plain_context(*x.shape[:2]), tap
    )  # what follows the last site is dead code
    return records
