"""The gather and the walk give what full-vocabulary logits would, gradients included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.models.head import VOCAB_CHUNK, Head
from jaxcomp.models.support import ROW_TILE, log_normaliser, word_logits

ROWS, WIDTH = ROW_TILE + 7, 8  # two tiles, of which the second is not full


def parts(vocab, bias=True, dtype="float32"):
    rng = np.random.default_rng(0)
    w, b, rows = (rng.standard_normal(s) for s in ((vocab, WIDTH), (vocab,), (ROWS, WIDTH)))
    head = Head(None, jnp.asarray(w, dtype), jnp.asarray(b, jnp.float32) if bias else None)
    return head, jnp.asarray(rows, dtype), jnp.asarray(rng.integers(0, vocab, (ROWS, 5)))


def full_logits(head, rows):
    logits = rows.astype(jnp.float32) @ head.w.T.astype(jnp.float32)
    return logits if head.b is None else logits + head.b


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("vocab", [40, VOCAB_CHUNK, VOCAB_CHUNK + 100])
def test_logits_and_normaliser_are_those_of_the_whole_vocabulary(vocab, bias):
    head, rows, words = parts(vocab, bias)
    logits = full_logits(head, rows)
    expected = jnp.take_along_axis(logits, words, axis=1)
    np.testing.assert_allclose(word_logits(head, rows, words), expected, atol=1e-5)
    total = jax.nn.logsumexp(logits, axis=1)
    np.testing.assert_allclose(log_normaliser(head, rows, False), total, atol=1e-5)


@pytest.mark.parametrize("learn", [True, False])
def test_gradients_are_those_of_the_whole_vocabulary(learn):
    head, rows, words = parts(VOCAB_CHUNK + 100)
    weights = jnp.sin(jnp.arange(ROWS, dtype=jnp.float32))  # of either sign

    def walked(head, rows):
        picked = word_logits(head if learn else jax.lax.stop_gradient(head), rows, words)
        return jnp.sum(weights * (log_normaliser(head, rows, learn) - picked[:, 0]))

    def whole(head, rows):
        logits = full_logits(head, rows)
        picked = jnp.take_along_axis(logits, words, axis=1)
        return jnp.sum(weights * (jax.nn.logsumexp(logits, axis=1) - picked[:, 0]))

    (d_head, d_rows), (e_head, e_rows) = (
        jax.grad(f, argnums=(0, 1))(head, rows) for f in (walked, whole)
    )
    np.testing.assert_allclose(d_rows, e_rows, atol=1e-5)
    e_head = e_head if learn else jax.tree.map(jnp.zeros_like, e_head)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), d_head, e_head)


def test_bfloat16_rows_are_summed_in_float32():
    head, rows, words = parts(2000, bias=False, dtype="bfloat16")
    logits = full_logits(head, rows)
    found = log_normaliser(head, rows, False)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, jax.nn.logsumexp(logits, axis=1), atol=1e-4)
    slope = jax.grad(lambda rows: jnp.sum(log_normaliser(head, rows, False)))(rows)
    expected = jax.nn.softmax(logits) @ head.w.astype(jnp.float32)
    assert slope.dtype == jnp.bfloat16
    np.testing.assert_allclose(slope.astype(jnp.float32), expected, atol=0.02)
    assert word_logits(head, rows, words).dtype == jnp.float32


def test_no_array_of_all_logits_of_a_window_exists():
    head, rows, words = parts(4 * VOCAB_CHUNK, bias=False)

    def loss(head, rows):
        return jnp.sum(log_normaliser(head, rows, True) - word_logits(head, rows, words)[:, 0])

    program = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(head, rows).compile().as_text()
    assert f"[{ROWS},{VOCAB_CHUNK}]" in program
    assert f"[{ROWS},{4 * VOCAB_CHUNK}]" not in program
