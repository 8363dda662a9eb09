import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxcomp.solvers.inverse import invert


def matrix(n, condition, seed=0):
    rng = np.random.default_rng(seed)
    u, _, v = np.linalg.svd(rng.standard_normal((n, n)))
    return (u * np.geomspace(1, 1 / condition, n)) @ v


@pytest.mark.parametrize("condition", [1.0, 10.0, 1e3])
@pytest.mark.parametrize("n", [1, 9, 64])
def test_it_agrees_with_float64_as_far_as_float32_can(n, condition):
    m = matrix(n, condition)
    found = np.asarray(invert(jnp.asarray(m, jnp.float32)))
    expected = np.linalg.inv(m)
    assert np.abs(found - expected).max() < 2e-6 * condition * np.abs(expected).max()


def test_a_stack_is_inverted_matrix_by_matrix():
    stack = np.stack([matrix(12, 5.0, seed) for seed in range(3)]).astype(np.float32)
    np.testing.assert_allclose(invert(stack), [invert(m) for m in stack], atol=1e-5)


def test_its_gradient_agrees_with_finite_differences():
    m = jnp.asarray(matrix(5, 3.0), jnp.float32)
    check_grads(lambda m: jnp.sum(invert(m) ** 2), (m,), order=1, modes=["rev"], rtol=1e-2)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_what_is_not_finite_ends_and_shows(bad):
    m = jnp.eye(4).at[1, 2].set(bad)
    assert not bool(jnp.isfinite(invert(m)).all())
