"""Grouped-query attention: projections, RoPE, causal softmax over a prefix or a cache.

The prefix form walks over tiles of queries and reads, for each, only the keys that its last query
may see: half of the masked square is never computed, and no `[time, time]` array exists.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxcomp.core.activation import QActivation, as_float
from jaxcomp.core.linear import Linear, linear
from jaxcomp.core.site import Tap
from jaxcomp.core.struct import node, static
from jaxcomp.kv.cache import GridRows, LayerCache, append, grid_rows, read_rows
from jaxcomp.models.layers import JointNorm, RMSNorm, head_norm
from jaxcomp.models.rope import Rope, rope_tables, rotate
from pallas_kernels import prefill_attention, quant_decode_attention

QUERY_TILE = 128  # queries a tile; see the module docstring
MAX_TILES = 32  # longer sequences get larger tiles, which bounds the compiled program
ONES = 16  # a vector register's worth; one column would make the product's width odd
MASKED = -1e30  # finite, so that a row with nothing to see gives numbers and not NaN


@node
class GQA:
    """Grouped-query attention.

    Attributes:
      q, k, v, o: projections; `q` makes `n_heads · head_dim` channels, k and v
        `n_kv_heads · head_dim`.
      q_norm, k_norm: normalisation before RoPE, of each head or of all together; or None.
      window: a query sees the last `window` positions, its own included; None for all.
      scale: multiplies the scores, usually head_dim^(−1/2).
      qkv: one projection in place of q, k and v, which are then None; made by `models.prepare`.
    """

    q: Linear | None
    k: Linear | None
    v: Linear | None
    o: Linear
    q_norm: RMSNorm | JointNorm | None = None
    k_norm: RMSNorm | JointNorm | None = None
    n_heads: int = static(default=1)
    n_kv_heads: int = static(default=1)
    head_dim: int = static(default=64)
    rope: Rope = static(default=Rope(theta=10000.0))
    window: int | None = static(default=None)
    scale: float = static(default=0.125)
    qkv: Linear | None = None


@node
class Context:
    """Where the tokens of a call stand.

    Attributes:
      positions: RoPE position of each token of the call.
      valid: True for real tokens; None when all are.
      slot: first cache slot the call writes; None without a cache.
      key_positions, key_valid: the same facts for every slot of the cache, or None.
      horizon: positions that the sequences will have in the end, for a rotary embedding that
        depends on it; None for as many as the call shows.
      starts: the first slot of each sequence that holds a token, where all after it do; else None.
      fresh: nothing stands in the cache before this call.
      ends: without a cache, the first later token of the call that does not see each token; None
        where all do. So texts that begin alike are one sequence (`models.shared`).
    """

    positions: Int[Array, "batch time"]
    valid: Bool[Array, "batch time"] | None = None
    slot: Int[Array, ""] | None = None
    key_positions: Int[Array, "batch capacity"] | None = None
    key_valid: Bool[Array, "batch capacity"] | None = None
    horizon: Int[Array, ""] | None = None
    starts: Int[Array, " batch"] | None = None
    fresh: bool = static(default=False)
    ends: Int[Array, "batch time"] | None = None


def plain_context(batch: int, time: int) -> Context:
    """Whole sequences from position 0, without padding."""
    return Context(jnp.broadcast_to(jnp.arange(time, dtype=jnp.int32), (batch, time)))


def masked_context(valid: Bool[Array, "batch time"]) -> Context:
    """Sequences padded on either side; positions count real tokens."""
    positions = jnp.maximum(jnp.cumsum(valid, axis=-1, dtype=jnp.int32) - 1, 0)
    return Context(positions, valid)


def attention(
    p: GQA,
    x: Float[Array, "batch time d_model"] | QActivation,
    ctx: Context,
    tap: Tap,
    cache: LayerCache | None = None,
) -> tuple[Float[Array, "batch time d_model"], LayerCache | None]:
    """Attention of one block; with a cache the call's keys are appended to it first."""
    q, k, v = (_heads(y, p.head_dim) for y in _project(p, x, tap))
    q, k = head_norm(p.q_norm, q), head_norm(p.k_norm, k)
    cos, sin = rope_tables(p.rope, p.head_dim, ctx.positions, ctx.horizon)
    q = tap("query", rotate(q, cos, sin))
    k = tap("k_cache", rotate(k, cos, sin))
    v = tap("v_cache", v)
    if cache is None:
        y = _attend_prefix(p, q, k, v, ctx)
    else:
        cache = append(cache, k, v, ctx.slot)
        rows = grid_rows(cache.k), grid_rows(cache.v)
        if ctx.starts is not None and q.shape[1] == 1 and None not in rows:
            y = _attend_newest(p, q, *rows, ctx)
        elif ctx.starts is not None:
            y = _attend_chunk(p, q, k, v, cache, ctx)
        elif ctx.fresh:
            y = _attend_prefix(p, q, as_float(k), as_float(v), ctx)
        else:
            y = _attend_cache(p, q, read_rows(cache.k, k), read_rows(cache.v, v), ctx)
    y = y.reshape(*x.shape[:2], p.n_heads * p.head_dim)
    return linear(p.o, tap("attn_out", y)), cache


def _project(p: GQA, x: Array | QActivation, tap: Tap) -> tuple[Array, Array, Array]:
    if p.qkv is None:
        return tuple(
            linear(w, tap(site, x)) for w, site in ((p.q, "q_in"), (p.k, "k_in"), (p.v, "v_in"))
        )
    q, kv = p.n_heads * p.head_dim, p.n_kv_heads * p.head_dim
    return tuple(jnp.split(linear(p.qkv, x), (q, q + kv), axis=-1))


def _heads(x: Array, head_dim: int) -> Array:
    return x.reshape(*x.shape[:2], -1, head_dim)


def _attend_prefix(p: GQA, q: Array, k: Array, v: Array, ctx: Context) -> Array:
    batch, time = q.shape[:2]
    group = p.n_heads // p.n_kv_heads
    q = q.reshape(batch, time, p.n_kv_heads, group, p.head_dim).transpose(0, 2, 3, 1, 4)
    k, v = (a.transpose(0, 2, 1, 3) for a in (k, v))
    tile = max(QUERY_TILE, -(-time // MAX_TILES))
    out = []
    for start in range(0, time, tile):
        stop = min(start + tile, time)
        # Where a position is a slot, keys before the window need not be read.
        is_slot = ctx.valid is None and ctx.ends is None
        first = max(0, start - p.window + 1) if p.window is not None and is_slot else 0
        queries, keys = jnp.arange(start, stop), jnp.arange(first, stop)
        seen = keys[None, :] <= queries[:, None]
        if p.window is not None:
            pos_q, pos_k = ctx.positions[:, start:stop], ctx.positions[:, first:stop]
            seen = seen & (pos_q[:, :, None] - pos_k[:, None, :] < p.window)
        if ctx.valid is not None:
            seen = seen & ctx.valid[:, None, first:stop]
        if ctx.ends is not None:
            seen = seen & (queries[:, None] < ctx.ends[:, None, first:stop])
        rows, prefix = q[..., start:stop, :], (k[:, :, first:stop], v[:, :, first:stop])
        out.append(
            _softmax_attend(p, rows, *prefix, jnp.broadcast_to(seen, (batch, *seen.shape[-2:])))
        )
    return jnp.concatenate(out, axis=1)


def _attend_cache(p: GQA, q: Array, k: Array, v: Array, ctx: Context) -> Array:
    batch, time = q.shape[:2]
    group = p.n_heads // p.n_kv_heads
    q = q.reshape(batch, time, p.n_kv_heads, group, p.head_dim).transpose(0, 2, 3, 1, 4)
    slots = jnp.arange(k.shape[2])
    seen = slots[None, :] <= (ctx.slot + jnp.arange(time))[:, None]
    seen = seen & ctx.key_valid[:, None, :]
    if p.window is not None:
        distance = ctx.positions[:, :, None] - ctx.key_positions[:, None, :]
        seen = seen & (distance < p.window)
    return _softmax_attend(p, q, k, v, seen)


def _attend_chunk(
    p: GQA,
    q: Array,
    k: Array | QActivation,
    v: Array | QActivation,
    cache: LayerCache,
    ctx: Context,
) -> Array:
    """Queries over slots without gaps: their own tokens' alone where nothing came before."""
    if ctx.fresh:
        slot, rows = 0, [as_float(a).transpose(0, 2, 1, 3) for a in (k, v)]
    else:
        slot, rows = ctx.slot, [read_rows(cache.k, k), read_rows(cache.v, v)]
    return prefill_attention(q, *rows, ctx.starts, slot, scale=p.scale, window=p.window)


def _attend_newest(p: GQA, q: Array, k: GridRows, v: GridRows, ctx: Context) -> Array:
    """One query a sequence over slots without gaps, by a kernel that reads codes as they are."""
    stops = jnp.broadcast_to(ctx.slot + 1, ctx.starts.shape)
    starts = ctx.starts if p.window is None else jnp.maximum(ctx.starts, stops - p.window)
    y = quant_decode_attention(
        q.reshape(len(q), p.n_kv_heads, -1, p.head_dim),
        *(k.rows, v.rows, starts, stops, k.scale, k.zero_point, v.scale, v.zero_point),
        scale=p.scale,
        k_bits=k.bits,
        v_bits=v.bits,
    )
    return y.astype(q.dtype)


def _softmax_attend(
    p: GQA,
    q: Float[Array, "batch kv_head group time head_dim"],
    k: Float[Array, "batch kv_head keys head_dim"],
    v: Float[Array, "batch kv_head keys head_dim"],
    seen: Bool[Array, "batch time keys"],
) -> Float[Array, "batch time heads_x_dim"]:
    batch, kv_heads, group, time, dim = q.shape
    dots: Any = dict(preferred_element_type=jnp.float32)
    rows = (q * jnp.asarray(p.scale, q.dtype)).reshape(batch, kv_heads, group * time, dim)
    scores = jnp.einsum("bhqd,bhkd->bhqk", rows, k.astype(q.dtype), **dots)
    # Adding a bias costs a third of a `where` over the scores on XLA's CPU backend.
    bias = jnp.where(seen, 0.0, MASKED)[:, None, None]
    scores = scores.reshape(batch, kv_heads, group, time, -1) + bias
    # The quotient below does not depend on the shift, so neither does any gradient.
    shift = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - shift)
    weights = weights.reshape(batch, kv_heads, group * time, -1).astype(q.dtype)
    # Columns of ones make the product sum the weights too: one pass over them less.
    ones = jnp.ones((*v.shape[:-1], ONES), q.dtype)
    y = jnp.einsum(
        "bhqk,bhkd->bhqd", weights, jnp.concatenate([v.astype(q.dtype), ones], -1), **dots
    )
    y = (y[..., :dim] / y[..., dim : dim + 1]).reshape(batch, kv_heads, group, time, dim)
    return y.astype(q.dtype).transpose(0, 3, 1, 2, 4).reshape(batch, time, -1)
