import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.solvers.orthogonal import cayley, random_orthogonal

KEYS = jax.random.split(jax.random.key(0), 400)


@pytest.mark.parametrize("n", [1, 2, 9, 64])
def test_both_give_orthogonal_matrices(n):
    for u in (random_orthogonal(KEYS[0], n), cayley(3 * jax.random.normal(KEYS[1], (n, n)))):
        assert u.shape == (n, n) and u.dtype == jnp.float32
        np.testing.assert_allclose(u @ u.T, np.eye(n), atol=2e-5)


def test_the_key_decides_the_matrix():
    first, again, other = (random_orthogonal(KEYS[i], 8) for i in (0, 0, 1))
    assert np.array_equal(first, again) and not np.allclose(first, other, atol=0.1)


def test_draws_prefer_no_direction():
    # Without the choice of signs the mean diagonal is about -0.3 in two dimensions.
    draws = jax.vmap(lambda key: random_orthogonal(key, 2))(KEYS)
    np.testing.assert_allclose(jnp.mean(draws, axis=0), np.zeros((2, 2)), atol=0.12)
    assert 0.4 < float(jnp.mean(jnp.linalg.det(draws) > 0)) < 0.6


def test_the_cayley_transform_starts_at_the_identity_and_follows_the_skew_part():
    np.testing.assert_array_equal(cayley(jnp.zeros((5, 5))), np.eye(5))
    z = 1e-3 * jax.random.normal(KEYS[2], (5, 5))
    skew = np.tril(z) - np.tril(z).T
    np.testing.assert_allclose(cayley(z), np.eye(5) + skew, atol=1e-5)
    np.testing.assert_array_equal(cayley(z + jnp.triu(jnp.ones((5, 5)))), cayley(z))


def test_a_random_parameter_is_a_rotation_biased_towards_the_identity():
    z = random_orthogonal(KEYS[3], 64)  # what FlatQuant starts from
    u = cayley(z)
    assert float(jnp.linalg.det(u)) == pytest.approx(1.0, abs=1e-3)
    assert 0.5 < float(jnp.trace(u)) / 64 < 0.8
    gradient = jax.grad(lambda z: jnp.sum(cayley(z)[0] * jnp.arange(64.0)))(z)
    assert np.isfinite(gradient).all() and not np.triu(gradient).any()
