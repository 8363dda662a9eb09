"""The model: a tuple of blocks between an embedding and a head. Read this file to know it.

Everything a block is made of is said by its own nodes. `Decoder.blocks` may hold handles (into a
checkpoint or a work store) instead of arrays; `load_block` and `map_blocks` are the only ways to
reach them, one at a time, so a model larger than memory goes through every method.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxcomp.core.linear import Linear, linear
from jaxcomp.core.quantize import QTensor
from jaxcomp.core.site import Site, Tap, site_tap
from jaxcomp.core.struct import node, static
from jaxcomp.kv.cache import Cache, LayerCache, empty_rows, init_cache, packed_sites
from jaxcomp.models.attention import GQA, Context, attention, masked_context, plain_context
from jaxcomp.models.config import ModelConfig
from jaxcomp.models.ffn import DenseFFN, ffn
from jaxcomp.models.layers import Embed, RMSNorm, embed_tokens, rms_norm
from jaxcomp.models.patch import Patch, apply_patch


@node
class Block:
    """One decoder block, pre-norm, with optional norms after each unit.

    Attributes:
      sites: what happens at the block's named activations; a site not named is left alone.
      gate: `x + gate · (block(x) − x)`; None for an ordinary block.
      patch: maps the block's input, x in all of the above, where blocks before it were removed.
    """

    attn_norm: RMSNorm | None
    attn: GQA
    ffn_norm: RMSNorm | None
    ffn: DenseFFN
    attn_post_norm: RMSNorm | None = None
    ffn_post_norm: RMSNorm | None = None
    sites: dict[str, Site] = dataclasses.field(default_factory=dict)
    gate: Float[Array, ""] | None = None
    patch: Patch | None = None


@runtime_checkable
class BlockHandle(Protocol):
    """A block that is not in memory."""

    def load(self) -> Block:
        """The block with its arrays, in their stored dtypes, on the host."""
        ...

    def struct(self) -> Block:
        """The block with `jax.ShapeDtypeStruct` leaves."""
        ...


@node
class Decoder:
    """A causal language model.

    Attributes:
      lm_head: None means that the embedding is tied to the head.
      kept: of a model that lost blocks, the places its blocks had before; None where none did.
      stream: of a model in whose weights maps of the residual stream are folded, how large the
        stream in every block is beside the one it stands for; None where none are.
    """

    embed: Embed
    blocks: tuple[Any, ...]  # Block or BlockHandle
    norm: RMSNorm | None
    lm_head: Linear | None = None
    config: ModelConfig = static(default=None)
    kept: tuple[int, ...] | None = static(default=None)
    stream: tuple[float, ...] | None = static(default=None)


def forward(
    model: Decoder,
    tokens: Int[Array, "batch time"],
    valid: Bool[Array, "batch time"] | None = None,
) -> Float[Array, "batch time vocab"]:
    """Logits of whole sequences, float32.

    Args:
      model: any decoder; blocks behind handles are loaded one after another.
      tokens: token ids below the vocabulary size.
      valid: False for padding, on either side; the logits at padding are meaningless.
    """
    ctx = plain_context(*tokens.shape) if valid is None else masked_context(valid)
    x = embed_tokens(model.embed, tokens, model.config.compute_dtype)
    for block in iter_blocks(model):
        x = block_forward(block, x, ctx)
    return head_logits(model, x)


def extend(
    model: Decoder,
    tokens: Int[Array, "batch time"],
    cache: Cache,
    valid: Bool[Array, "batch time"] | None = None,
    last_only: bool = False,
    left_padded: bool = False,
    fresh: bool = False,
) -> tuple[Float[Array, "batch scored vocab"], Cache]:
    """Logits of tokens that follow what the cache holds, and the longer cache.

    One call with the whole prompt is a prefill, one with a single token a decoding step. The
    caller keeps `cache.length + time` within the capacity: JAX clamps writes past the end. With
    `last_only` the logits are `[batch, 1, vocab]`, those of the last token. `left_padded` vouches
    that no padding stands after a token of its sequence, here or in the cache; a decoding step then
    attends by a kernel. `fresh` vouches that the cache is empty; its slots are then not read.
    """
    valid = jnp.ones(tokens.shape, bool) if valid is None else valid
    ctx = cache_context(cache, valid, left_padded, fresh)
    x = embed_tokens(model.embed, tokens, model.config.compute_dtype)
    layers = []
    for block, layer in zip(iter_blocks(model), cache.layers, strict=True):
        x, layer = block_apply(block, x, ctx, cache=layer)
        layers.append(layer)
    logits = head_logits(model, x[:, -1:] if last_only else x)
    return logits, advanced(cache, tuple(layers), ctx)


def cache_context(
    cache: Cache, valid: Bool[Array, "batch time"], left_padded: bool = False, fresh: bool = False
) -> Context:
    """Where tokens stand that follow what the cache holds; the layers are not looked at."""
    seen = jnp.sum(cache.valid, axis=-1, dtype=jnp.int32, keepdims=True)
    positions = jnp.maximum(seen + jnp.cumsum(valid, axis=-1, dtype=jnp.int32) - 1, 0)
    slots = cache.length + jnp.arange(valid.shape[1])
    key_positions = cache.positions.at[:, slots].set(positions)
    key_valid = cache.valid.at[:, slots].set(valid)
    starts = jnp.argmax(key_valid, axis=-1).astype(jnp.int32) if left_padded else None
    return Context(
        positions, valid, cache.length, key_positions, key_valid, cache.horizon, starts, fresh
    )


def advanced(cache: Cache, layers: tuple[LayerCache, ...], ctx: Context) -> Cache:
    """The cache behind the tokens of `ctx`, whose keys and values are in `layers`."""
    length = ctx.slot + ctx.positions.shape[1]
    return Cache(layers, ctx.key_positions, ctx.key_valid, length, cache.horizon)


def empty_cache(model: Decoder, batch: int, capacity: int, horizon: int | None = None) -> Cache:
    """A cache for `capacity` tokens of each of `batch` sequences; see `empty_layer`.

    `horizon` is the length that the sequences will have, by default the capacity; only rotary
    embeddings that depend on the length ask for it.
    """
    dtype = model.config.compute_dtype
    structs = map(block_struct, model.blocks)
    layers = tuple(empty_layer(b, batch, capacity, dtype) for b in structs)
    return init_cache(layers, batch, capacity, horizon)


def empty_layer(block: Block, batch: int, capacity: int, dtype: Any) -> LayerCache:
    """One block's cache: codes where its site quantizes keys or values, else rows in `dtype`."""
    shape = (batch, block.attn.n_kv_heads, capacity, block.attn.head_dim)

    def rows(name: str) -> Any:
        quantizer = block.sites.get(name, Site()).quantizer
        return empty_rows(None if quantizer is None else quantizer.spec, shape, dtype)

    return LayerCache(rows("k_cache"), rows("v_cache"))


def block_forward(
    block: Block, x: Float[Array, "batch time d_model"], ctx: Context, tap: Tap | None = None
) -> Float[Array, "batch time d_model"]:
    """One block on whole sequences; `tap` replaces the default that enters the block's sites."""
    return block_apply(block, x, ctx, tap)[0]


def block_apply(
    block: Block,
    x: Float[Array, "batch time d_model"],
    ctx: Context,
    tap: Tap | None = None,
    cache: LayerCache | None = None,
) -> tuple[Float[Array, "batch time d_model"], LayerCache | None]:
    """One block, with or without a cache; a packed cache wants codes from the sites it keeps."""
    tap = tap or site_tap(block.sites, packed_sites(cache))
    x = apply_patch(block.patch, x, ctx.positions)
    h = tap("attn_in", rms_norm(block.attn_norm, x))
    h, cache = attention(block.attn, h, ctx, tap, cache)
    y = x + rms_norm(block.attn_post_norm, h)
    h = ffn(block.ffn, tap("ffn_in", rms_norm(block.ffn_norm, y)), tap)
    y = y + rms_norm(block.ffn_post_norm, h)
    if block.gate is not None:
        y = x + block.gate.astype(x.dtype) * (y - x)
    return y, cache


def head_logits(
    model: Decoder, x: Float[Array, "*tokens d_model"]
) -> Float[Array, "*tokens vocab"]:
    """Final norm and head, float32."""
    x = rms_norm(model.norm, x)
    w = model.embed.weight
    if model.lm_head is not None:
        return linear(model.lm_head, x, jnp.float32)
    if isinstance(w, QTensor):
        return linear(Linear(w), x, jnp.float32)
    w = w.astype(x.dtype)
    return jnp.einsum("...d,vd->...v", x, w, preferred_element_type=jnp.float32)


def load_block(block: Block | BlockHandle) -> Block:
    """The block itself, read from its handle if it is behind one."""
    return block.load() if isinstance(block, BlockHandle) else block


def block_struct(block: Block | BlockHandle) -> Block:
    """The block's structure; leaves have `shape` and `dtype`, nothing is read."""
    return block.struct() if isinstance(block, BlockHandle) else block


def iter_blocks(model: Decoder) -> Iterator[Block]:
    """The blocks in order, each in memory only while it is looked at."""
    return map(load_block, model.blocks)


def map_blocks(
    model: Decoder,
    f: Callable[[int, Block], Block],
    keep: Callable[[int, Block], Block | BlockHandle] = lambda _, block: block,
) -> Decoder:
    """The model with every block replaced by `f(index, block)`, one block in memory at a time.

    `keep` decides where a result lives: by default in memory, in a work store when it returns a
    handle.
    """
    done = tuple(keep(i, f(i, load_block(block))) for i, block in enumerate(model.blocks))
    return model.replace(blocks=done)
