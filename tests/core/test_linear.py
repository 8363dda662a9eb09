import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.core.activation import as_float
from jaxcomp.core.linear import Linear, LowRank, folded, linear
from jaxcomp.core.quantize import QuantSpec, dequantize, quantize
from jaxcomp.core.site import ActQuantizer, codes_of

IN, OUT = 24, 6


def arrays(dtype="float32"):
    rng = np.random.default_rng(0)
    w, b, x = (rng.standard_normal(shape) for shape in ((IN, OUT), (OUT,), (2, 5, IN)))
    return jnp.asarray(w, dtype), jnp.asarray(b, dtype), jnp.asarray(x, dtype)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "int4", "int3 groups"])
def test_the_product_agrees_with_float64_whatever_leaf_holds_the_weight(stored, bias):
    w, b, x = arrays()
    if stored.startswith("int"):
        spec = QuantSpec(
            int(stored[3]), group_size=8 if "groups" in stored else None, symmetric=False
        )
        leaf = quantize(w, spec)
        values = dequantize(leaf)
    else:
        leaf = values = w.astype(stored)
    expected = np.asarray(x, np.float64) @ np.asarray(values, np.float64)
    expected += np.asarray(b, np.float64) if bias else 0
    y = linear(Linear(leaf, b if bias else None), x)
    assert y.dtype == x.dtype
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("quantized", [True, False])
def test_bfloat16_activations_stay_bfloat16_and_are_summed_in_float32(quantized):
    x = jnp.ones((1, 1024), jnp.bfloat16)
    w = jnp.ones((1024, 1))
    p = Linear(quantize(w, QuantSpec(bits=8)) if quantized else w, jnp.array([0.5]))
    y = linear(p, x)
    assert y.dtype == jnp.bfloat16 and y[0, 0] == 1024  # 1024.5 rounded once


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_and_simulated_products_agree(bits):
    w, b, x = arrays()
    q = quantize(w, QuantSpec(bits=bits, group_size=12))
    simulated = linear(Linear(dequantize(q), b), x)
    np.testing.assert_allclose(linear(Linear(q, b), x), simulated, rtol=1e-6, atol=1e-6)


def test_the_weight_keeps_its_stored_dtype_and_gradients_reach_the_input():
    w, _, x = arrays()
    p = Linear(quantize(w, QuantSpec(bits=8)))
    grad = jax.grad(lambda x: linear(p, x).sum())(x)
    expected = np.broadcast_to(np.asarray(dequantize(p.w)).sum(1), x.shape)
    np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("group", [None, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_times_codes_are_the_product_of_the_simulated_activation(symmetric, group, dtype):
    w, b, x = arrays()
    p = Linear(quantize(w, QuantSpec(4, group_size=group, symmetric=symmetric)), b)
    spec = QuantSpec(8, granularity="token", symmetric=symmetric, dynamic=True)
    codes = codes_of(ActQuantizer(spec), x.astype(dtype))
    y = linear(p, codes)
    expected = linear(p, as_float(codes.replace(dtype=jnp.dtype("float32"))))
    assert y.dtype == dtype
    tolerance = 1e-5 if dtype == "float32" else 2**-8
    np.testing.assert_allclose(
        y.astype("float32"), expected, atol=tolerance * np.abs(expected).max()
    )
    assert linear(p, codes, jnp.float32).dtype == jnp.float32


def test_codes_times_a_dense_weight_are_refused():
    w, b, x = arrays()
    codes = codes_of(ActQuantizer(QuantSpec(8, granularity="token", dynamic=True)), x)
    with pytest.raises(ValueError, match=r"\(24, 6\) is dense; quantize it"):
        linear(Linear(w, b), codes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_of_a_product_are_the_definition_in_its_dtype(dtype):
    w, _, x = arrays()
    x, g = x.astype(dtype), jnp.cos(jnp.arange(2 * 5 * OUT, dtype=jnp.float32)).reshape(2, 5, OUT)
    value = lambda w, x: jnp.sum(linear(Linear(w), x, jnp.float32) * g)  # noqa: E731
    dw, dx = jax.grad(value, argnums=(0, 1))(w, x)
    assert dw.dtype == jnp.float32 and dx.dtype == x.dtype
    wide = np.asarray(x, np.float64)
    atol = 1e-4 if dtype == "float32" else 0.1  # 24 to 60 terms, each rounded to 1/256
    np.testing.assert_allclose(dw, np.einsum("bti,bto->io", wide, g), atol=atol)
    np.testing.assert_allclose(np.asarray(dx, np.float64), g @ np.asarray(w).T, atol=atol)


def test_a_low_rank_addition_computes_what_the_folded_weight_does():
    w, b, x = arrays()
    rng = np.random.default_rng(1)
    a, b2 = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((IN, 3), (3, OUT)))
    unfused, fused = LowRank(w, a, b2), folded(LowRank(w, a, b2))
    np.testing.assert_allclose(fused, np.asarray(w) + np.asarray(a) @ np.asarray(b2), atol=1e-5)
    expected = linear(Linear(fused, b), x)
    np.testing.assert_allclose(linear(Linear(unfused, b), x), expected, rtol=1e-5, atol=1e-5)
    nothing = LowRank(w.astype(jnp.bfloat16), a, jnp.zeros_like(b2))
    assert (folded(nothing) == nothing.w).all() and folded(nothing).dtype == jnp.bfloat16
