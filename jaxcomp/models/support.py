"""The logits of a few words a token, and the softmax's logarithm over all, with their gradients.

This is what a loss on a teacher's top words needs of a student. Full-vocabulary logits never exist:

    word_logits     gathers the output rows of the words                     K·d a token
    log_normaliser  walks the vocabulary in chunks (`models.head`)           V·d a token

The gradient of log Σ exp(h·W[v]) in h is Σ p(v) W[v], the mean output row under the softmax. The
same walk sums it up, as an attention over the vocabulary would, so the way back costs nothing where
the output layer is frozen, and one more walk where it learns.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxcomp.core.linear import transposed
from jaxcomp.models.head import Head, vocab_chunk, vocab_chunks

ROW_TILE = 64  # tokens whose gathered output rows exist at once; few enough to stay in the cache


def word_logits(
    head: Head, rows: Float[Array, "rows d_model"], words: Int[Array, "rows words"]
) -> Float[Array, "rows words"]:
    """The logits of `words`, float32; `rows` are normalised hidden states in the compute dtype."""
    n, width = rows.shape
    tile = min(ROW_TILE, n)
    spare = -n % tile
    rows, words = (jnp.pad(a, ((0, spare), (0, 0))) for a in (rows, words))
    tiles = rows.reshape(-1, tile, width), words.reshape(-1, tile, words.shape[1])

    @jax.checkpoint  # gathered again on the way back, instead of kept for all tokens
    def one(tile: tuple[Array, Array]) -> Array:
        h, ids = tile
        picked = head.w[ids].astype(h.dtype)
        logits = jnp.einsum("td,tkd->tk", h, picked, preferred_element_type=jnp.float32)
        return logits if head.b is None else logits + head.b[ids]

    return jax.lax.map(one, tiles).reshape(n + spare, -1)[:n]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def log_normaliser(
    head: Head, rows: Float[Array, "rows d_model"], learn: bool
) -> Float[Array, " rows"]:
    """log Σ exp(logit) over the vocabulary, float32.

    Args:
      rows: normalised hidden states in the compute dtype.
      learn: whether the output layer wants a gradient; without it that gradient is zero.
    """
    return _walk(head, rows, False)[0]


def _forward(head: Head, rows: Array, learn: bool) -> tuple[Array, tuple]:
    value, mean = _walk(head, rows, True)
    return value, (head, rows, value, mean)


def _backward(learn: bool, saved: tuple, g: Array) -> tuple[Head, Array]:
    head, rows, value, mean = saved
    d_rows = (g[:, None] * mean).astype(rows.dtype)
    if not learn:
        return jax.tree.map(jnp.zeros_like, head), d_rows
    turned = transposed(rows)

    def visit(i: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        logits, words, new = vocab_chunk(head, rows, i)
        p = jnp.where(new, jnp.exp(logits - value[:, None]), 0.0) * g[:, None]
        part = jnp.matmul(turned, p.astype(rows.dtype), preferred_element_type=jnp.float32)
        return tuple(map(_add_at, sums, (part, jnp.sum(p, axis=0)), (words[0],) * 2))

    vocab, width = head.w.shape
    zero = jnp.zeros((width, vocab), jnp.float32), jnp.zeros(vocab, jnp.float32)
    dw, db = jax.lax.fori_loop(0, vocab_chunks(head), visit, zero)
    d_head = jax.tree.map(jnp.zeros_like, head)._replace(w=dw.T.astype(head.w.dtype))
    return d_head if head.b is None else d_head._replace(b=db.astype(head.b.dtype)), d_rows


log_normaliser.defvjp(_forward, _backward)


def _walk(head: Head, rows: Array, with_mean: bool) -> tuple[Array, Array | None]:
    """log Σ exp(logit), and Σ p(word) W[word] where it is wanted."""
    n, width = rows.shape

    def visit(i: Array, state: tuple) -> tuple:
        highest, total, mean = state
        logits, words, new = vocab_chunk(head, rows, i)
        logits = logits + jnp.where(new, 0.0, -jnp.inf)
        higher = jnp.maximum(highest, jnp.max(logits, axis=1))
        shrink, weights = jnp.exp(highest - higher), jnp.exp(logits - higher[:, None])
        total = total * shrink + jnp.sum(weights, axis=1)
        if with_mean:
            part = jax.lax.dynamic_slice_in_dim(head.w, words[0], len(words))
            part = jnp.matmul(weights.astype(part.dtype), part, preferred_element_type=jnp.float32)
            mean = mean * shrink[:, None] + part
        return higher, total, mean

    mean = jnp.zeros((n, width)) if with_mean else None
    start = jnp.full(n, -1e30), jnp.zeros(n), mean
    highest, total, mean = jax.lax.fori_loop(0, vocab_chunks(head), visit, start)
    return jnp.log(total) + highest, None if mean is None else mean / total[:, None]


def _add_at(total: Array, part: Array, at: Array) -> Array:
    """`total` with `part` added to its last axis from `at` on."""
    here = jax.lax.dynamic_slice_in_dim(total, at, part.shape[-1], axis=-1)
    return jax.lax.dynamic_update_slice_in_dim(total, here + part, at, axis=-1)
