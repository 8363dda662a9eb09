import importlib

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import quant_matmul
from pallas_kernels.dispatch import first_supported
from pallas_kernels.packing import pack

op = importlib.import_module("pallas_kernels.quant_matmul")  # the name is also the function
IN, OUT = 24, 7
GRIDS = {"tensor": (1, 1), "channel": (1, OUT), "group": (3, OUT)}


def operands(bits, grid, symmetric, lead=(5,), dtype="float32", seed=0):
    """Packed arguments, and the activations and codes they were made of."""
    rng = np.random.default_rng(seed)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    codes = rng.integers(low, high, (IN, OUT), np.int8, endpoint=True)
    zero = None if symmetric else rng.integers(low, high, GRIDS[grid], np.int8, endpoint=True)
    scale = rng.uniform(0.01, 0.1, GRIDS[grid]).astype(np.float32)
    x = jnp.asarray(rng.standard_normal((*lead, IN)), dtype)
    return (x, pack(codes, bits), scale, zero, bits), codes


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
    args, codes = operands(bits, grid, symmetric)
    x, _, scale, zero, _ = args
    expected = oracle(x, codes, scale, zero)
    np.testing.assert_allclose(quant_matmul(*args), expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (2, 1, 3)])
def test_any_number_of_leading_axes(lead):
    args, codes = operands(3, "group", False, lead)
    y = quant_matmul(*args)
    assert y.shape == (*lead, OUT)
    np.testing.assert_allclose(y, oracle(args[0], codes, *args[2:4]), rtol=1e-4, atol=1e-4)


def test_bfloat16_activations_give_bfloat16_accumulated_in_float32():
    args, codes = operands(4, "channel", True, (64,), "bfloat16")
    y, expected = quant_matmul(*args), oracle(args[0], codes, *args[2:4])
    assert y.dtype == jnp.bfloat16
    # One rounding of each weight, one of the result: 2^-9 each.
    bound = 2**-8 * (
        np.abs(np.asarray(args[0], np.float64)) @ np.abs(codes * args[2].astype(float))
    )
    assert np.all(np.abs(np.asarray(y, np.float64) - expected) <= bound)


def test_many_terms_are_summed_in_float32_and_not_in_bfloat16():
    x, ones = jnp.ones((1, 1024), jnp.bfloat16), np.ones((1024, 1), np.int8)
    y = quant_matmul(x, pack(ones, 2), np.ones((1, 1), np.float32), None, 2)
    assert y[0, 0] == 1024  # a running sum in bfloat16 stops at 256


def implementation(name, log, refuses=False, error=NotImplementedError):
    def run(*args, **kwargs):
        log.append(name)
        if refuses:
            raise error(f"{name} takes no such shape")
        return name, args, kwargs

    return run


def test_the_first_implementation_that_does_not_refuse_is_used():
    log = []
    order = [implementation("a", log, True), implementation("b", log), implementation("c", log)]
    assert first_supported(order, 1, k=2) == ("b", (1,), {"k": 2}) and log == ["a", "b"]


def test_when_all_refuse_every_reason_is_told():
    log = []
    with pytest.raises(NotImplementedError, match=r"(?s)no implementation.*a takes.*b takes"):
        first_supported([implementation(name, log, True) for name in "ab"])


def test_other_errors_are_not_taken_for_a_refusal():
    log = []
    order = [implementation("a", log, True, ValueError), implementation("b", log)]
    with pytest.raises(ValueError, match="a takes"):
        first_supported(order)
    assert log == ["a"]


def test_the_operation_asks_its_list_in_order_and_the_reference_is_last(monkeypatch):
    assert op.IMPLEMENTATIONS[-1] is op.reference.quant_matmul
    args, _ = operands(4, "channel", True)
    log = []
    fast = (implementation("fast", log, True), *op.IMPLEMENTATIONS)
    monkeypatch.setattr(op, "IMPLEMENTATIONS", fast)
    np.testing.assert_array_equal(quant_matmul(*args), op.reference.quant_matmul(*args))
    assert log == ["fast"]
