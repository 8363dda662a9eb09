"""The exact properties of the losses on a teacher's top words."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.calibrate.losses import (
    Targets,
    TopKLoss,
    distillation_loss,
    divergence,
    entropy,
    token_weights,
)
from jaxcomp.models.head import Head

VOCAB, K, ROWS = 60, 6, 40


def logits(seed, scale=2.0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(scale * rng.standard_normal((ROWS, VOCAB)), jnp.float32)


def support(a, k=K):
    """Words, log-probabilities and the log of the rest of logits."""
    log_p, words = jax.lax.top_k(jax.nn.log_softmax(a), k)
    return words, log_p, jnp.log(jnp.maximum(1 - jnp.sum(jnp.exp(log_p), 1), 1e-7))


def compared(kind, teacher, student, k=K):
    words, log_p, log_rest = support(teacher, k)
    picked = jnp.take_along_axis(student, words, 1)
    return divergence(kind, log_p, log_rest, picked, jax.nn.logsumexp(student, 1))


def full_kl(a, b):
    p, q = jax.nn.log_softmax(a), jax.nn.log_softmax(b)
    return jnp.sum(jnp.exp(p) * (p - q), axis=1)


@pytest.mark.parametrize("kind", ["renorm", "full"])
def test_equal_models_lose_nothing_and_different_ones_something(kind):
    np.testing.assert_allclose(compared(kind, logits(0), logits(0)), 0, atol=1e-5)
    assert (compared(kind, logits(0), logits(1)) > 1e-2).all()


@pytest.mark.parametrize("kind", ["renorm", "full"])
def test_on_all_words_either_loss_is_the_full_divergence(kind):
    found = compared(kind, logits(0), logits(1), k=VOCAB)
    np.testing.assert_allclose(found, full_kl(logits(0), logits(1)), rtol=1e-4, atol=1e-5)


def test_more_outcomes_never_hide_what_fewer_show():
    few, many = (compared("full", logits(0), logits(1), k) for k in (K, 3 * K))
    assert (few <= many + 1e-5).all() and (many <= full_kl(logits(0), logits(1)) + 1e-5).all()


def test_only_full_minds_mass_outside_the_support():
    teacher = logits(0)
    words, _, _ = support(teacher)
    inside = jax.nn.one_hot(words, VOCAB).sum(1)
    astray = jnp.where(inside > 0, teacher, teacher + 5.0)  # the support's proportions are kept
    np.testing.assert_allclose(compared("renorm", teacher, astray), 0, atol=1e-5)
    assert (compared("full", teacher, astray) > 0.1).all()


def test_gradients_are_finite_where_nothing_is_left_outside():
    sharp = logits(0, scale=40.0)
    slope = jax.grad(lambda b: jnp.sum(compared("full", sharp, b)))(logits(1, scale=40.0))
    assert np.isfinite(slope).all()


def test_entropy_is_one_of_equal_words_and_zero_of_a_certain_one():
    even, certain = jnp.full((1, K), -2.0), jnp.array([[0.0] + [-200.0] * (K - 1)])
    np.testing.assert_allclose(entropy(even), 1, atol=1e-6)
    np.testing.assert_allclose(entropy(certain), 0, atol=1e-6)


@pytest.mark.parametrize("direction", ["up", "down"])
def test_weights_follow_the_entropy_and_have_mean_one_where_tokens_count(direction):
    _, log_p, _ = support(logits(0))
    counts = jnp.arange(ROWS) % 3 > 0
    w = token_weights(TopKLoss(entropy=direction), log_p, counts)
    np.testing.assert_allclose(jnp.mean(w[counts]), 1, atol=1e-6)
    sign = np.corrcoef(w, entropy(log_p))[0, 1]
    assert sign > 0.99 if direction == "up" else sign < -0.99


def batch(counts=None):
    """A head, hidden states `[2, 5, 8]` and what they are compared with."""
    rng = np.random.default_rng(2)
    head = Head(None, jnp.asarray(rng.standard_normal((VOCAB, 8)), jnp.float32), None)
    x = jnp.asarray(rng.standard_normal((2, 5, 8)), jnp.float32)
    words, log_p, rest = (a[:10].reshape(2, 5, *a.shape[1:]) for a in support(logits(0)))
    counts = jnp.ones((2, 5), bool) if counts is None else counts
    following = jnp.asarray(rng.integers(0, VOCAB, (2, 5)))
    return head, x, Targets(words, log_p, rest, following, counts)


def by_hand(cfg, head, x, targets):
    """The loss from full logits, token by token."""
    student, total = np.asarray(x @ head.w.T, np.float64).reshape(10, VOCAB), 0.0
    q = student - np.log(np.exp(student).sum(1, keepdims=True))
    words, log_p, rest, following, counts = (np.asarray(a).reshape(10, -1) for a in targets)
    w = token_weights(cfg, log_p, counts[:, 0])
    for i in np.flatnonzero(counts):
        picked = student[i, words[i]]
        kl = divergence(
            cfg.support,
            log_p[i : i + 1],
            rest[i],
            picked[None],
            np.log(np.exp(student[i : i + 1]).sum(1)),
        )
        cross = 0.0 if i % 5 == 4 else -q[i, following[i, 0]]
        share = 1 - entropy(log_p[i : i + 1])[0] if cfg.entropy == "mix" else 0.0
        total += float(w[i] * kl[0] + (share + cfg.text) * cross)
    return total / counts.sum()


@pytest.mark.parametrize(
    "cfg",
    [
        TopKLoss("renorm"),
        TopKLoss("full", entropy="up"),
        TopKLoss("full", entropy="down", text=0.5),
        TopKLoss("renorm", entropy="mix"),
    ],
)
def test_the_loss_is_the_mean_over_the_tokens_that_count(cfg):
    counts = jnp.array([[True, True, False, True, True], [False, False, True, True, True]])
    head, x, targets = batch(counts)
    value, n = distillation_loss(cfg, head, x, targets)
    assert n == 7
    np.testing.assert_allclose(value, by_hand(cfg, head, x, targets), rtol=1e-5)


def test_tokens_that_do_not_count_have_no_gradient_whatever_stands_there():
    counts = jnp.array([[True, True, True, False, False], [True, True, True, True, True]])
    cfg = TopKLoss("full", entropy="up", text=0.1)

    def slope(targets):
        head, x, _ = batch()
        return jax.grad(lambda x: distillation_loss(cfg, head, x, targets)[0])(x)

    targets = batch(counts)[2]
    padded = targets._replace(log_p=targets.log_p.at[0, 3:].set(-3.0))
    assert (slope(targets)[0, 3:] == 0).all()
    np.testing.assert_array_equal(slope(padded), slope(targets))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"support": "half"}, "renorm, full"),
        ({"entropy": "sideways"}, "none, up, down, mix"),
        ({"text": -1.0}, "below 0"),
        ({"alpha": 0.0, "entropy": "up"}, "without any weight"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        TopKLoss(**settings)
