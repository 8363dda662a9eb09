import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import canonical_weight, quant_matmul
from pallas_kernels.packing import pack

IN, OUT = 24, 7
GRIDS = {"tensor": (1, 1), "channel": (1, OUT), "group": (3, OUT)}


def operands(bits, grid, symmetric, lead=(5,), dtype="float32", seed=0):
    """Activations and a weight, and the codes, scale and zero point it was made of."""
    rng = np.random.default_rng(seed)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    codes = rng.integers(low, high, (IN, OUT), np.int8, endpoint=True)
    zero = None if symmetric else rng.integers(low, high, GRIDS[grid], np.int8, endpoint=True)
    scale = rng.uniform(0.01, 0.1, GRIDS[grid]).astype(np.float32)
    x = jnp.asarray(rng.standard_normal((*lead, IN)), dtype)
    w = canonical_weight(pack(codes, bits), scale, zero, bits, IN)
    return (x, w), (codes, scale, zero)


def oracle(x, codes, scale, zero):
    """Entry by entry of the definition, float64."""
    group = IN // len(scale)
    scale = np.repeat(np.asarray(scale, np.float64), group, 0)
    zero = 0 if zero is None else np.repeat(zero.astype(np.float64), group, 0)
    return np.asarray(x, np.float64) @ ((codes - zero) * scale)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("bits", range(2, 9))
def test_the_product_is_that_of_the_dequantized_weight(bits, grid, symmetric):
    args, stored = operands(bits, grid, symmetric)
    expected = oracle(args[0], *stored)
    np.testing.assert_allclose(quant_matmul(*args), expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (2, 1, 3)])
def test_any_number_of_leading_axes(lead):
    args, stored = operands(3, "group", False, lead)
    y = quant_matmul(*args)
    assert y.shape == (*lead, OUT)
    np.testing.assert_allclose(y, oracle(args[0], *stored), rtol=1e-4, atol=1e-4)


def test_bfloat16_activations_give_bfloat16_accumulated_in_float32():
    args, stored = operands(4, "channel", True, (64,), "bfloat16")
    y, expected = quant_matmul(*args), oracle(args[0], *stored)
    assert y.dtype == jnp.bfloat16
    # One rounding of each weight, one of the result: 2^-9 each.
    codes, scale, _ = stored
    bound = 2**-8 * (np.abs(np.asarray(args[0], np.float64)) @ np.abs(codes * scale.astype(float)))
    assert np.all(np.abs(np.asarray(y, np.float64) - expected) <= bound)


def test_many_terms_are_summed_in_float32_and_not_in_bfloat16():
    x, ones = jnp.ones((1, 1024), jnp.bfloat16), np.ones((1024, 1), np.int8)
    y = quant_matmul(x, canonical_weight(pack(ones, 2), np.ones((1, 1), np.float32), None, 2, 1024))
    assert y[0, 0] == 1024  # a running sum in bfloat16 stops at 256


@pytest.mark.parametrize(
    ("x", "message"), [((5, 23), r"\(5, 23\) do not fit a weight of shape \(24, 7\)")]
)
def test_activations_of_another_width_are_refused(x, message):
    (_, w), _ = operands(4, "group", True)
    with pytest.raises(ValueError, match=message):
        quant_matmul(np.zeros(x, np.float32), w)
