"""Run a decoder block by block: one block in memory, hidden states on the host.

This is how evaluation and calibration see a model. A block is compiled once per structure, and a
model larger than memory streams through.
"""

import concurrent.futures
import functools
from collections.abc import Callable, Iterable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxcomp.core.linear import Linear
from jaxcomp.core.quantize import QTensor
from jaxcomp.kv.cache import LayerCache
from jaxcomp.models.attention import Context, plain_context
from jaxcomp.models.decoder import (
    Block,
    Decoder,
    block_apply,
    block_forward,
    empty_layer,
    iter_blocks,
)
from jaxcomp.models.layers import embed_tokens
from jaxcomp.parallel.mesh import Placement, as_batch

IN_FLIGHT = 2

T = TypeVar("T")
Hidden = list[np.ndarray]  # one [batch, time, d_model] array a batch


@functools.partial(jax.jit, donate_argnums=1)
def block_step(
    block: Block, x: Float[Array, "batch time d_model"]
) -> Float[Array, "batch time d_model"]:
    """One block on whole unpadded sequences."""
    return as_batch(block_forward(block, x, plain_context(*x.shape[:2])), x)


@functools.partial(jax.jit, donate_argnums=1)
def block_step_at(
    block: Block, x: Float[Array, "batch time d_model"], ctx: Context
) -> Float[Array, "batch time d_model"]:
    """One block on sequences that stand where `ctx` says, without a cache."""
    return as_batch(block_forward(block, x, ctx), x)


@functools.partial(jax.jit, static_argnames="chunk", donate_argnums=1)
def cached_block_step(
    block: Block, x: Float[Array, "batch time d_model"], chunk: int
) -> Float[Array, "batch time d_model"]:
    """`block_step` as decoding does it: `chunk` tokens at a time enter the block's cache, and the
    keys and values that attention reads come from there."""
    batch, time, width = x.shape
    steps = -(-time // chunk)
    capacity = steps * chunk  # what fills the last chunk comes after all real tokens
    slots = jnp.broadcast_to(jnp.arange(capacity, dtype=jnp.int32), (batch, capacity))
    ones = jnp.ones((batch, capacity), bool)

    def feed(layer: LayerCache, piece: tuple[Array, Array]) -> tuple[LayerCache, Array]:
        x, slot = piece
        here = jax.lax.dynamic_slice_in_dim(slots, slot, chunk, axis=1)
        ctx = Context(here, None, slot, slots, ones, jnp.int32(time))
        y, layer = block_apply(block, x, ctx, cache=layer)
        return layer, y

    x = jnp.pad(x, ((0, 0), (0, capacity - time), (0, 0)))
    pieces = x.reshape(batch, steps, chunk, width).swapaxes(0, 1)
    layer = empty_layer(block, batch, capacity, x.dtype)
    _, out = jax.lax.scan(feed, layer, (pieces, chunk * jnp.arange(steps, dtype=jnp.int32)))
    return out.swapaxes(0, 1).reshape(x.shape)[:, :time]


@functools.partial(jax.jit, static_argnames="dtype")
def _embed(embed, tokens, dtype):
    return embed_tokens(embed, tokens, dtype)


def embed_batches(model: Decoder, tokens: Int[np.ndarray, "n time"], batch: int) -> Hidden:
    """The hidden states before the first block, `batch` sequences at a time."""
    dtype = model.config.compute_dtype
    return [
        np.asarray(_embed(model.embed, tokens[i : i + batch], dtype))
        for i in range(0, len(tokens), batch)
    ]


def run_blocks(
    model: Decoder,
    hidden: Hidden,
    each: Callable[[Iterable[Block]], Iterable[Block]] = iter,
    step: Callable[..., Array] = block_step,
    contexts: Iterable[Context] | None = None,
) -> Hidden:
    """Hidden states after the last block.

    Args:
      each: may wrap the blocks to show progress.
      step: runs one block on one batch, which it may consume.
      contexts: third argument of `step` for each batch; None for a step that takes two.
    """
    beside = () if contexts is None else (list(contexts),)
    for block in each(iter_blocks(model)):
        block = _cast_weights(jax.device_put(block), model.config.compute_dtype)
        run = functools.partial(step, block)
        hidden = map_batches(lambda *x, run=run: np.asarray(run(*x)), hidden, *beside)
    return hidden


def step_batches(
    block: Block,
    hidden: Hidden,
    step: Callable[[Block, Array], Array] = block_step,
    place: Placement = Placement(),
) -> Hidden:
    """`step` on every batch, back on the host; over the devices of `place` if it has any."""
    if place.mesh is None:
        return map_batches(lambda x: np.asarray(step(block, x)), hidden)
    # One at a time: programs that talk must start in the same order on all devices.
    block = place.replicate(block)
    return [place.get(step(block, place.put(x))) for x in hidden]


def map_batches(f: Callable[..., T], *batches: Iterable) -> list[T]:
    """`[f(*b) for b in zip(*batches)]` with `IN_FLIGHT` calls at a time.

    A compiled program has stretches that one core does alone; the next batch fills them.
    """
    with concurrent.futures.ThreadPoolExecutor(IN_FLIGHT) as pool:
        return list(pool.map(f, *batches))


@functools.partial(jax.jit, static_argnames="dtype")
def _cast_weights(block: Block, dtype: str) -> Block:
    """Dense weights in `dtype`, as `linear` would cast them for every batch anew."""

    def cast(p):
        return p.replace(w=p.w.astype(dtype)) if not isinstance(p.w, QTensor) else p

    is_linear = lambda p: isinstance(p, Linear)  # noqa: E731
    return jax.tree.map(lambda p: cast(p) if is_linear(p) else p, block, is_leaf=is_linear)
