import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.core.hadamard import hadamard_matrix
from jaxcomp.core.transforms import (
    Diag,
    Hadamard,
    Kron,
    inverse_transpose,
    transform,
    transform_columns,
)

RNG = np.random.default_rng(0)
# Width → factor pair of the published FlatQuant matrices.
PAIRS = [(28, 32), (32, 48), (64, 64), (64, 76), (64, 80), (86, 128), (112, 128), (128, 148)]


def matrix(n, seed=0):
    """Invertible and neither symmetric nor orthogonal."""
    return jnp.asarray(
        np.eye(n) + np.random.default_rng(seed).normal(size=(n, n)) / (3 * n**0.5), jnp.float32
    )


TRANSFORMS = {
    "diag": Diag(jnp.asarray(RNG.uniform(0.5, 2, 24), jnp.float32)),
    "kron": Kron(matrix(4), matrix(6, 1)),
    "left alone": Kron(left=matrix(4)),
    "right alone": Kron(right=matrix(6)),
    "a full matrix": Kron(right=matrix(24)),
    "neither": Kron(),
    "hadamard": Hadamard(24),
    "runs": Hadamard(8),
    "across heads": Hadamard(4, inner=6),
    "runs across": Hadamard(4, inner=2),
}
every = pytest.mark.parametrize("t", TRANSFORMS.values(), ids=TRANSFORMS)


def data(rows=7, seed=3):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(rows, 24)), jnp.float32)


@every
def test_a_transform_and_its_inverse_leave_every_product(t):
    x, w = data(), data(5, 4)
    product = transform(t, x) @ transform(inverse_transpose(t), w).T
    np.testing.assert_allclose(product, x @ w.T, rtol=1e-4, atol=1e-4)


@every
def test_the_columns_of_a_producer_and_its_bias_are_transformed_alike(t):
    h, w, bias = data(4), data(4, 4), data(1, 5)[0]
    made = transform_columns(t, w), transform_columns(t, bias)
    found = h[:, :4] @ made[0] + made[1]
    np.testing.assert_allclose(found, transform(t, h[:, :4] @ w + bias), rtol=1e-4, atol=1e-4)


@every
def test_the_gradient_is_that_of_the_dense_product(t):
    x = data()
    grad = jax.grad(lambda x: jnp.sum(transform(t, x) * data(seed=5)))(x)
    dense = transform(t, jnp.eye(24))
    np.testing.assert_allclose(grad, data(seed=5) @ dense.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_bfloat16_activation_stays_one(name):
    x, t = data(), TRANSFORMS[name]
    y = transform(t, x.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), transform(t, x), atol=0.1)


def test_a_hadamard_rotation_keeps_lengths_in_bfloat16():
    x = jnp.asarray(RNG.normal(size=(64, 1536)), jnp.bfloat16)
    y = transform(Hadamard(1536), x).astype(jnp.float32)
    ratio = jnp.linalg.norm(y) / jnp.linalg.norm(x.astype(jnp.float32))
    np.testing.assert_allclose(ratio, 1.0, atol=2e-4)


@pytest.mark.parametrize(("n1", "n2"), PAIRS)
def test_a_kronecker_product_is_never_formed_and_gives_the_same(n1, n2):
    left, right = matrix(n1), matrix(n2, 1)
    x = jnp.asarray(RNG.normal(size=(2, n1 * n2)), jnp.float32)
    v = np.asarray(x, np.float64).reshape(2, n1, n2)
    expected = np.einsum("ji,bjk,kl->bil", left, v, right).reshape(2, -1)  # vec(P1ᵀ V P2)
    np.testing.assert_allclose(transform(Kron(left, right), x), expected, rtol=1e-3, atol=1e-4)
    if n1 * n2 < 2000:
        np.testing.assert_allclose(expected, x @ np.kron(left, right), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("order", [1, 2, 12, 20, 48, 128, 256, 576, 896, 1536])
def test_the_fast_hadamard_is_the_dense_one(order):
    x = jnp.asarray(RNG.normal(size=(3, order)), jnp.float32)
    dense = hadamard_matrix(order) / np.sqrt(order)
    np.testing.assert_allclose(transform(Hadamard(order), x), x @ dense, atol=2e-5)


@pytest.mark.parametrize(("order", "inner"), [(4, 6), (12, 2), (8, 3), (20, 16)])
def test_heads_are_mixed_channel_by_channel(order, inner):
    x = jnp.asarray(RNG.normal(size=(3, 2 * order * inner)), jnp.float32)
    mix = np.kron(hadamard_matrix(order) / np.sqrt(order), np.eye(inner))
    found = transform(Hadamard(order, inner), x)
    np.testing.assert_allclose(found, x @ np.kron(np.eye(2), mix), atol=2e-5)


def test_a_transform_for_another_width_is_refused():
    with pytest.raises(ValueError, match="24 channels are not whole runs of 16·1"):
        transform(Hadamard(16), data())
    with pytest.raises(ValueError, match="factors of orders 4 and 5 do not make 24 channels"):
        transform(Kron(matrix(4), matrix(5)), data())
    with pytest.raises(ValueError, match=r"no Hadamard matrix of order 6 .*multiple of 4"):
        Hadamard(6)
