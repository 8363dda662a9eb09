"""The properties that a differentiable choice of K among n must have."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.solvers import subset

SURROGATES = ("sigmoid", "subset", "softmax")
everywhere = pytest.mark.parametrize("surrogate", SURROGATES)


@pytest.fixture(scope="module")
def z():
    return jax.random.normal(jax.random.key(0), (10,)) + subset.gumbel(jax.random.key(1), 10)


@functools.partial(jax.jit, static_argnames="surrogate")
def soft(z, keep, tau, surrogate):
    return subset.soft_mask(z, keep, tau, surrogate=surrogate, most=len(z) - 1)


jacobian = jax.jit(jax.jacobian(soft), static_argnames="surrogate")


def test_every_mask_has_exactly_k_ones_for_every_k_and_ten_thousand_keys():
    scores, keys = jnp.zeros(6), jax.random.split(jax.random.key(0), 10_000)
    masks = jax.jit(
        jax.vmap(
            jax.vmap(
                lambda key, keep: subset.hard_mask(scores + subset.gumbel(key, 6), keep), (0, None)
            ),
            (None, 0),
        )
    )(keys, jnp.arange(1, 6))
    assert set(np.unique(masks)) == {0.0, 1.0}
    np.testing.assert_array_equal(masks.sum(-1), np.repeat(np.arange(1, 6)[:, None], 10_000, 1))
    np.testing.assert_array_equal(subset.hard_mask(jnp.zeros(4), 2), [1, 1, 0, 0])  # equals


def test_blocks_are_kept_as_often_as_the_law_of_plackett_and_luce_says():
    """The frequencies are sums of products over all ordered pairs, by hand."""
    s = np.array([2.0, 1.0, 0.0, -1.0])
    weight = np.exp(s)
    expected = np.zeros(4)
    for i in range(4):
        for j in set(range(4)) - {i}:
            p = weight[i] / weight.sum() * weight[j] / (weight.sum() - weight[i])
            expected[[i, j]] += p
    keys = jax.random.split(jax.random.key(3), 400_000)
    one = lambda key: subset.hard_mask(jnp.asarray(s, jnp.float32) + subset.gumbel(key, 4), 2)  # noqa: E731
    found = jax.jit(lambda keys: jax.vmap(one)(keys).mean(0))(keys)
    np.testing.assert_allclose(expected, [0.9266, 0.6957, 0.2747, 0.1030], atol=5e-5)
    np.testing.assert_allclose(found, expected, atol=3e-3)


def test_noise_is_finite_for_the_largest_and_the_smallest_numbers(monkeypatch):
    for u in (0.0, 1.0):
        monkeypatch.setattr(jax.random, "uniform", lambda *_, u=u: jnp.full(3, u))
        assert jnp.isfinite(subset.gumbel(jax.random.key(0), 3)).all()


@everywhere
@pytest.mark.parametrize("tau", [0.05, 0.3, 1.0, 5.0])
def test_soft_masks_sum_to_k_and_their_gradients_are_finite_and_blind_to_a_constant(
    z, tau, surrogate
):
    for keep in (1, 4, 7, 9):
        rho, j = soft(z, keep, tau, surrogate), jacobian(z, keep, tau, surrogate)
        assert float(rho.sum()) == pytest.approx(keep, abs=1e-5)
        assert jnp.isfinite(j).all()
        size = float(jnp.abs(j).max())
        np.testing.assert_allclose(j.sum(1), 0, atol=1e-4 * max(size, 1))
        np.testing.assert_allclose(soft(z + 3, keep, tau, surrogate), rho, atol=5e-5 / tau)


@pytest.mark.parametrize("tau", [0.02, 0.3, 5.0])
@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_the_sigmoid_mask_lies_strictly_within_0_and_1(z, tau, scale):
    for keep in (1, 5, 9):
        rho = soft(scale * z, keep, tau, "sigmoid")
        assert float(rho.min()) > 0 and float(rho.max()) < 1
        assert float(rho.sum()) == pytest.approx(keep, abs=1e-5)
        assert jnp.isfinite(jacobian(scale * z, keep, tau, "sigmoid")).all()


def test_the_gradient_of_the_sigmoid_mask_is_that_of_finite_differences(z):
    with jax.enable_x64(True):
        wide, tau = jnp.asarray(z, jnp.float64), jnp.float64(0.7)
        run = jax.jit(lambda z, tau: subset.sigmoid_mask(z, 4, tau))
        direction = jax.random.normal(jax.random.key(5), z.shape, jnp.float64)
        for dz, dtau in ((direction, 0.0), (0 * direction, 1.0), (direction, -0.5)):
            _, found = jax.jvp(run, (wide, tau), (dz, jnp.float64(dtau)))
            ahead, behind = (run(wide + e * dz, tau + e * dtau) for e in (1e-5, -1e-5))
            expected = (ahead - behind) / 2e-5
            np.testing.assert_allclose(found, expected, atol=1e-8)


@pytest.mark.parametrize("surrogate", ["sigmoid", "subset"])
def test_a_cold_soft_mask_is_the_hard_one(z, surrogate):
    for keep in (1, 4, 8):
        cold = soft(z, keep, 0.002, surrogate)
        np.testing.assert_allclose(cold, subset.hard_mask(z, keep), atol=1e-4)


@everywhere
@pytest.mark.parametrize("tau", [0.05, 0.5, 5.0])
def test_a_drawn_mask_is_exactly_binary_and_its_gradient_lives(tau, surrogate):
    scores, weights = jnp.linspace(-1, 1, 8), jax.random.normal(jax.random.key(2), (8,))
    drawn = lambda s, key: subset.draw(s, key, 6, tau, 1.0, surrogate=surrogate, most=3)  # noqa: E731
    slope_of = jax.jit(jax.grad(lambda s, key: jnp.sum(weights * drawn(s, key))))
    for i in range(10):
        key = jax.random.key(i)
        mask, slope = drawn(scores, key), slope_of(scores, key)
        assert set(np.asarray(mask).tolist()) == {0.0, 1.0} and mask.sum() == 6
        assert jnp.isfinite(slope).all() and jnp.abs(slope).max() > 0
        np.testing.assert_array_equal(mask, drawn(scores, key))
        np.testing.assert_array_equal(mask, drawn(scores + 2.0, key))  # only differences matter


def test_one_compilation_serves_all_numbers_of_ones_and_temperatures():
    scores = jnp.linspace(0, 1, 9)
    before = subset.draw._cache_size()
    for keep, tau, gamma in ((8, 1.0, 1.0), (5, 0.3, 0.5), (2, 0.1, 0.0)):
        mask = subset.draw(scores, jax.random.key(0), keep, tau, gamma, surrogate="subset", most=7)
        assert mask.sum() == keep
    assert subset.draw._cache_size() == before + 1


def test_schedules_begin_and_end_where_they_say():
    assert subset.temperature(0, 100, 1.0, 0.1) == 1.0
    assert subset.temperature(100, 100, 1.0, 0.1) == pytest.approx(0.1)
    assert [subset.noise(t, 100, 0.6) for t in (0, 60, 80, 100)] == pytest.approx([1, 1, 0.5, 0])
    for shape in ("linear", "cubic"):
        counts = [subset.zeros_of(t, 100, 5, 0.6, shape) for t in range(100)]
        assert counts == sorted(counts) and counts[0] == 1 and set(counts[60:]) == {5}
    assert subset.zeros_of(10, 100, 5, 0.6, "cubic") > subset.zeros_of(10, 100, 5, 0.6, "linear")
    assert subset.zeros_of(0, 100, 5, 0.0, "linear") == 5
