import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.solvers.fusion import (
    coefficient,
    fused,
    group_loss,
    init_coefficient,
    init_lora,
    neighbourhood,
)

LOSSES = ("mse", "cosine", "batch_kl")


def states(seed, shape=(3, 5, 8)):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize(
    ("block", "n_blocks", "size", "first"),
    [
        # The authors' rule for a size of 8: four before, three behind, shifted at the ends.
        (0, 32, 8, 0),
        (3, 32, 8, 0),
        (4, 32, 8, 0),
        (5, 32, 8, 1),
        (10, 32, 8, 6),
        (28, 32, 8, 24),
        (29, 32, 8, 24),
        (31, 32, 8, 24),
        (3, 8, 8, 0),
        (7, 8, 8, 0),
        # Odd sizes: as many before as behind.
        (10, 32, 7, 7),
        (1, 32, 3, 0),
        (31, 32, 3, 29),
        (2, 5, 2, 1),
        (0, 5, 2, 0),
    ],
)
def test_a_neighbourhood_is_half_before_and_shifted_at_the_ends(block, n_blocks, size, first):
    assert neighbourhood(block, n_blocks, size) == tuple(range(first, first + size))


@pytest.mark.parametrize("block", [0, 2, 4])
def test_of_a_model_with_fewer_blocks_all_are_neighbours(block):
    assert neighbourhood(block, 5, 8) == (0, 1, 2, 3, 4)


@pytest.mark.parametrize("kind", ["low_rank", "row", "full"])
def test_additions_are_nothing_at_first_and_each_kind_has_its_numbers(kind):
    draw, w, donor = np.random.default_rng(0), states(1, (6, 4)), states(2, (6, 4))
    parts, lora = init_coefficient(kind, draw, w.shape, 2), init_lora(draw, w.shape, 3)
    np.testing.assert_array_equal(fused(w, donor, parts, lora), w)
    sizes = {"low_rank": 2 * 6 + 2 * 4, "row": 4, "full": 24}
    assert sum(a.size for a in parts.values()) == sizes[kind]


def test_the_donor_enters_entry_by_entry_so_that_a_coefficient_of_rank_one_adds_full_rank():
    draw, w, donor = np.random.default_rng(0), jnp.zeros((6, 6)), states(2, (6, 6))
    parts = {"down": draw.standard_normal((6, 1)), "up": draw.standard_normal((1, 6))}
    parts = jax.tree.map(jnp.float32, parts)
    found = fused(w, donor, parts, None)
    np.testing.assert_allclose(found, coefficient(parts) * donor)
    assert np.linalg.matrix_rank(coefficient(parts)) == 1 and np.linalg.matrix_rank(found) == 6


@pytest.mark.parametrize("kind", LOSSES)
def test_a_loss_is_0_for_equal_states_and_above_otherwise(kind):
    x, y = states(0), states(1)
    assert abs(float(group_loss(kind, x, x))) < 1e-6 < float(group_loss(kind, y, x))


def test_batch_kl_sees_only_how_windows_differ():
    x, y, constant = states(0), states(1), states(2, (1, 5, 8))
    assert abs(float(group_loss("batch_kl", x + constant, x))) < 1e-5
    shifted = group_loss("batch_kl", y + constant, x)
    np.testing.assert_allclose(shifted, group_loss("batch_kl", y, x), rtol=1e-4)
    alone = jax.value_and_grad(lambda y: group_loss("batch_kl", y, x[:1]))(y[:1])
    assert float(alone[0]) == 0 and not np.any(alone[1])  # why a batch of one is refused


def test_cosine_ignores_the_length_of_states_and_mse_their_unit():
    x, y = states(0), states(1)
    np.testing.assert_allclose(
        group_loss("cosine", 3 * y, x), group_loss("cosine", y, x), rtol=1e-4
    )
    np.testing.assert_allclose(group_loss("mse", 3 * y, 3 * x), group_loss("mse", y, x), rtol=1e-4)


def test_a_massive_token_decides_the_loss_only_without_a_limit():
    target = states(0).at[:, 0].multiply(1e3)
    wrong_there = target.at[:, 0].multiply(1.1)
    wrong_elsewhere = target.at[:, 1:].multiply(1.1)
    loss = lambda found, limit: float(group_loss("mse", found, target, limit))  # noqa: E731
    assert loss(wrong_there, None) > 1e3 * loss(wrong_elsewhere, None)
    assert loss(wrong_elsewhere, 2.0) > loss(wrong_there, 2.0) / 2 > 0
