import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxcomp.solvers.invertible import Direct, condition, init_matrix, materialize

FORMS, INITS = ("svd", "direct"), ("cayley", "haar", "hadamard", "identity")


def moved(m, key):
    """The parameters after a step of gradient descent, say: no longer a rotation."""
    leaves, tree = jax.tree.flatten(m)
    keys = jax.random.split(key, len(leaves))
    noise = [0.1 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, [a + b for a, b in zip(leaves, noise, strict=True)])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("n", [9, 12, 24])
def test_every_first_matrix_is_orthogonal(form, init, n):
    p, inverse = materialize(init_matrix(n, jax.random.key(n), form, init))
    np.testing.assert_allclose(p @ p.T, np.eye(n), atol=2e-5)
    np.testing.assert_allclose(inverse, p, atol=2e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("n", [5, 24, 64])
def test_the_inverse_holds_wherever_the_parameters_move(form, n):
    m = moved(init_matrix(n, jax.random.key(0), form, "cayley"), jax.random.key(1))
    p, inverse = materialize(m)
    np.testing.assert_allclose(p @ inverse.T, np.eye(n), atol=2e-4)
    values = np.linalg.svd(np.asarray(p, np.float64), compute_uv=False)
    assert float(condition(m)) == pytest.approx(values[0] / values[-1], rel=1e-3)


def test_the_authors_start_is_a_rotation_biased_towards_the_identity():
    def diagonal(init, form):
        draw = lambda i: materialize(init_matrix(24, jax.random.key(i), form, init))[0]  # noqa: E731
        return np.mean([float(jnp.mean(jnp.diagonal(draw(i)))) for i in range(20)])

    assert diagonal("cayley", "svd") == pytest.approx(0.41, abs=0.06)
    assert abs(diagonal("haar", "svd")) < 0.06 and abs(diagonal("cayley", "direct")) < 0.06


def test_seeds_give_different_matrices_and_the_same_seed_the_same():
    draw = lambda seed: materialize(init_matrix(12, jax.random.key(seed), "svd", "hadamard"))[0]  # noqa: E731
    assert np.array_equal(draw(0), draw(0)) and not np.array_equal(draw(0), draw(1))
    np.testing.assert_allclose(np.abs(draw(0)), 12**-0.5, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_agree_with_finite_differences(form):
    m = moved(init_matrix(4, jax.random.key(2), form, "haar"), jax.random.key(3))
    weight = jax.random.normal(jax.random.key(4), (2, 4, 4))

    def value(m):
        p, inverse = materialize(m)
        return jnp.sum(weight[0] * p) + jnp.sum(weight[1] * inverse)

    trained = Direct(m.p) if form == "direct" else m.replace(base=None)
    check_grads(value, (trained,), order=1, modes=["rev"], atol=2e-2, rtol=2e-2)
