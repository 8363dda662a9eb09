"""What the output layer says about hidden states, without the logits ever existing as a whole.

The vocabulary is walked in chunks with a running maximum and sum. The logits of a chunk stay in the
processor's cache, and what is kept is a few numbers a token.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxcomp.core.linear import dense_of
from jaxcomp.models.decoder import Decoder
from jaxcomp.models.layers import RMSNorm, rms_norm, table_of

VOCAB_CHUNK = 512  # words whose logits exist at once; small enough to stay in the cache


class Head(NamedTuple):
    """The final norm and the output layer: `w` in the compute dtype, `b` float32 or None."""

    norm: RMSNorm | None
    w: Float[Array, "vocab d_model"]
    b: Float[Array, " vocab"] | None


class TokenScores(NamedTuple):
    """What a model says about given tokens.

    Attributes:
      nll: −log p(token) in nats.
      greedy: whether no other token has a higher logit.
    """

    nll: Float[Array, "*tokens"]
    greedy: Bool[Array, "*tokens"]


class NextTokenGap(NamedTuple):
    """How far two models are apart on the next token.

    Attributes:
      kl: KL(teacher ‖ student) in nats, not below 0.
      agree: whether both give the same token the highest logit.
      teacher_nll, student_nll: −log p of the token that follows, in nats.
    """

    kl: Float[Array, "*tokens"]
    agree: Bool[Array, "*tokens"]
    teacher_nll: Float[Array, "*tokens"]
    student_nll: Float[Array, "*tokens"]


class _Softmax(NamedTuple):
    """What is known of a softmax after some words: `total` is the sum of exp(logit − highest)."""

    highest: Float[Array, " rows"]
    total: Float[Array, " rows"]
    gold: Float[Array, " rows"]  # the logit of the wanted word, once it has been met


def open_head(model: Decoder) -> Head:
    """The head of a model, whose blocks may be handles; a quantized head is dequantized."""
    return _open(model.replace(blocks=()), model.config.compute_dtype)


@functools.partial(jax.jit, static_argnames="dtype")
def _open(model: Decoder, dtype: str) -> Head:
    if model.lm_head is None:
        return Head(model.norm, table_of(model.embed).astype(dtype), None)
    w, b = model.lm_head.w, model.lm_head.b
    return Head(
        model.norm, dense_of(w).astype(dtype).T, None if b is None else b.astype(jnp.float32)
    )


@jax.jit
def token_scores(
    head: Head, x: Float[Array, "*tokens d_model"], targets: Int[Array, "*tokens"]
) -> TokenScores:
    """The scores of `targets` where `x` are the hidden states after the last block."""
    rows, wanted = _rows(head, x), targets.reshape(-1)

    def visit(i: Array, state: _Softmax) -> _Softmax:
        return _meet(state, *vocab_chunk(head, rows, i), wanted)

    end = jax.lax.fori_loop(0, vocab_chunks(head), visit, _unmet(rows))
    return TokenScores(
        _nll(end).reshape(targets.shape), (end.gold >= end.highest).reshape(targets.shape)
    )


@jax.jit
def next_token_gap(
    teacher: Head,
    student: Head,
    x: Float[Array, "*tokens d_teacher"],
    y: Float[Array, "*tokens d_student"],
    targets: Int[Array, "*tokens"],
) -> NextTokenGap:
    """Two models compared where `x` and `y` are their hidden states after the last block.

    With logits a and b, KL = Σ p(w) (a(w) − b(w)) − log Σ exp a + log Σ exp b, all in one walk.
    """
    wanted = targets.reshape(-1)
    rows, others = _rows(teacher, x), _rows(student, y)

    def visit(i: Array, state: tuple) -> tuple:
        p, q, weighted, best, other_best = state
        a, words, new = vocab_chunk(teacher, rows, i)
        b, _, _ = vocab_chunk(student, others, i)
        after = _meet(p, a, words, new, wanted)
        weights = jnp.where(new, jnp.exp(a - after.highest[:, None]), 0.0)
        weighted = weighted * jnp.exp(p.highest - after.highest)
        weighted = weighted + jnp.sum(weights * (a - b), axis=1)
        best = _best(p, after, a, words, new, best)
        after_other = _meet(q, b, words, new, wanted)
        other_best = _best(q, after_other, b, words, new, other_best)
        return after, after_other, weighted, best, other_best

    none = jnp.zeros(len(rows), jnp.int32)
    start = _unmet(rows), _unmet(others), jnp.zeros(len(rows)), none, none
    p, q, weighted, best, other_best = jax.lax.fori_loop(0, vocab_chunks(teacher), visit, start)
    kl = jnp.maximum(weighted / p.total - _log_sum(p) + _log_sum(q), 0.0)
    gap = NextTokenGap(kl, best == other_best, _nll(p), _nll(q))
    return jax.tree.map(lambda a: a.reshape(targets.shape), gap)


def _rows(head: Head, x: Array) -> Float[Array, "rows d_model"]:
    return rms_norm(head.norm, x).reshape(-1, x.shape[-1])


def vocab_chunks(head: Head) -> int:
    """How many chunks the vocabulary has."""
    return -(-head.w.shape[0] // VOCAB_CHUNK)


def vocab_chunk(
    head: Head, rows: Float[Array, "rows d_model"], i: Array
) -> tuple[Float[Array, "rows words"], Int[Array, " words"], Bool[Array, " words"]]:
    """Logits of the i-th chunk, its words, and which of them no earlier chunk held."""
    vocab = head.w.shape[0]
    size = min(VOCAB_CHUNK, vocab)
    start = jnp.minimum(i * size, vocab - size)  # the last chunk overlaps the one before it
    part = jax.lax.dynamic_slice_in_dim(head.w, start, size)
    # Written as `rows @ part.T` XLA's CPU backend would leave the bfloat16 matrix unit.
    axes = ((1,), (1,)), ((), ())
    logits = jax.lax.dot_general(rows, part, axes, preferred_element_type=jnp.float32)
    if head.b is not None:
        logits = logits + jax.lax.dynamic_slice_in_dim(head.b, start, size)
    words = start + jnp.arange(size, dtype=jnp.int32)
    return logits, words, words >= i * size


def _unmet(rows: Array) -> _Softmax:
    zero = jnp.zeros(len(rows))
    return _Softmax(jnp.full(len(rows), -1e30), zero, zero)


def _meet(state: _Softmax, logits: Array, words: Array, new: Array, wanted: Array) -> _Softmax:
    """The softmax with the new words of a chunk."""
    at = wanted - words[0]
    here = (at >= 0) & (at < len(words)) & new[jnp.clip(at, 0, len(words) - 1)]
    hit = jnp.take_along_axis(logits, jnp.clip(at, 0, len(words) - 1)[:, None], axis=1)[:, 0]
    logits = logits + jnp.where(new, 0.0, -jnp.inf)
    highest = jnp.maximum(state.highest, jnp.max(logits, axis=1))
    total = state.total * jnp.exp(state.highest - highest)
    total = total + jnp.sum(jnp.exp(logits - highest[:, None]), axis=1)
    return _Softmax(highest, total, jnp.where(here, hit, state.gold))


def _best(
    before: _Softmax, after: _Softmax, logits: Array, words: Array, new: Array, best: Array
) -> Int[Array, " rows"]:
    """The word with the highest logit so far; the first of equals."""
    place = words[jnp.argmax(jnp.where(new, logits, -jnp.inf), axis=1)]
    return jnp.where(after.highest > before.highest, place, best)


def _log_sum(state: _Softmax) -> Array:
    return jnp.log(state.total) + state.highest


def _nll(state: _Softmax) -> Array:
    return _log_sum(state) - state.gold
