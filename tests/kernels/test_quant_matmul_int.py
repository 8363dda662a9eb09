import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import canonical_weight, quant_matmul_int
from pallas_kernels.packing import pack
from pallas_kernels.quant_matmul_int.reference import integer_product

IN, OUT = 24, 7
GRIDS = {"tensor": (1, 1), "channel": (1, OUT), "group": (3, OUT)}
product = jax.jit(integer_product)


def codes(rng, shape, bits=8):
    return rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), shape).astype(np.int8)


def operands(grid="channel", symmetric=(True, True), bits=4, lead=(5,), shared=False):
    """Packed arguments and the weight codes they were made of; `symmetric` of x and of w."""
    rng = np.random.default_rng(0)
    w, x = codes(rng, (IN, OUT), bits), codes(rng, (*lead, IN))
    tokens = (1,) if shared else (*lead, 1)
    x_zero = None if symmetric[0] else codes(rng, tokens)
    w_zero = None if symmetric[1] else codes(rng, GRIDS[grid], bits)
    x_scale, w_scale = (rng.uniform(0.01, 0.1, s).astype(np.float32) for s in (tokens, GRIDS[grid]))
    return (x, x_scale, x_zero, canonical_weight(pack(w, bits), w_scale, w_zero, bits, IN)), w


def oracle(args, w):
    """Entry by entry of the definition, float64."""
    x, x_scale, x_zero, weight = args
    w_scale, w_zero = weight.scale, weight.zero_point
    each = lambda a: np.repeat(np.asarray(a, np.float64), IN // len(a), 0)  # noqa: E731
    w = (w - (0 if w_zero is None else each(w_zero))) * each(w_scale)
    return ((x - (0 if x_zero is None else x_zero.astype(float))) * x_scale) @ w


@pytest.mark.parametrize("rows", [1, 2, 7, 130])
@pytest.mark.parametrize("w_zero", [True, False])
@pytest.mark.parametrize("x_zero", [True, False])
def test_the_sum_is_exact(rows, x_zero, w_zero):
    rng = np.random.default_rng(rows)
    x, w = codes(rng, (rows, 3000)), codes(rng, (3000, 5))
    x[0], w[:, 0] = -128, -128  # one entry far above what float32 counts exactly
    zx = np.full((rows, 1), 127, np.int8) if x_zero else None
    zw = np.full(5, 127, np.int8) if w_zero else None
    wide = [np.asarray(0 if a is None else a, np.int64) for a in (x, zx, w, zw)]
    found = product(x, zx, w, zw)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, (wide[0] - wide[1]) @ (wide[2] - wide[3]))


@pytest.mark.parametrize("symmetric", [(a, b) for a in (True, False) for b in (True, False)])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("bits", range(2, 9))
def test_the_product_is_that_of_the_dequantized_operands(bits, grid, symmetric):
    args, w = operands(grid, symmetric, bits)
    expected = oracle(args, w)
    np.testing.assert_allclose(
        quant_matmul_int(*args), expected, atol=1e-6 * np.abs(expected).max()
    )


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (2, 1, 3)])
def test_any_number_of_leading_axes_and_one_grid_for_all_tokens(lead, shared):
    args, w = operands("group", (False, False), lead=lead, shared=shared)
    y = quant_matmul_int(*args)
    assert y.shape == (*lead, OUT)
    np.testing.assert_allclose(y, oracle(args, w), rtol=1e-5, atol=1e-4)


def test_a_sum_that_might_not_fit_int32_is_refused():
    x, packed = np.zeros((1, 40_000), np.int8), np.zeros((40_000, 1), np.uint8)
    one, zero = np.ones((1, 1), np.float32), np.zeros((1, 1), np.int8)
    weight = lambda z: canonical_weight(packed, one, z, 8, 40_000)  # noqa: E731
    assert quant_matmul_int(x, one, None, weight(None)).shape == (1, 1)
    with pytest.raises(ValueError, match=r"40000 products.*at most 33025 input channels"):
        quant_matmul_int(x, one, zero, weight(zero))


def test_the_result_has_the_dtype_asked_for():
    args, _ = operands()
    y = quant_matmul_int(*args, jnp.bfloat16)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, quant_matmul_int(*args).astype(jnp.bfloat16))
