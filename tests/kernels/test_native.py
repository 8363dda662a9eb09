import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import DenseWeight, dense_matmul, quant_matmul, quant_matmul_int
from pallas_kernels.chips import CHIPS
from pallas_kernels.native import library, panels
from pallas_kernels.quant_matmul import native as float_native
from pallas_kernels.quant_matmul_int import native as int_native
from pallas_kernels.weight import codes_of, dequantize, to_canonical
from tests.kernels import cases

pytestmark = pytest.mark.skipif(not library.available(), reason=library._unavailable() or "there")
ON = dict(chip=CHIPS["cpu"], interpret=False)


@pytest.mark.parametrize("name", [n for n in cases.names("quant_matmul") if n != "m130"])
def test_the_product_of_floats_is_that_of_the_definition(name):
    case = cases.build("quant_matmul", name)
    x, w = case.args
    case.check(float_native.quant_matmul(x, panels.prepare(w), **case.static, **ON))


@pytest.mark.parametrize("name", cases.names("quant_matmul_int"))
def test_the_product_of_codes_is_that_of_the_definition(name):
    case = cases.build("quant_matmul_int", name)
    *x, w = case.args
    prepared = panels.prepare(w, sums=True)
    case.check(int_native.quant_matmul_int(*x, prepared, **case.static, **ON))


@pytest.mark.parametrize("rows", [*range(1, 8), 11, 128])
def test_every_number_of_rows(rows):
    for build in (cases.matmul, cases.matmul_int):
        case = build(tokens=(rows,), k=72, n=70, group=24)
        op = quant_matmul if build is cases.matmul else quant_matmul_int
        *x, w = case.args
        case.check(op(*x, panels.prepare(w, sums=True), **case.static))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 4, 5, 8])
@pytest.mark.parametrize(("k", "group"), [(24, 8), (23, None), (1, None)])
def test_panels_give_back_the_weight(bits, k, group, symmetric):
    w, dense = cases.weight(np.random.default_rng(0), k, 67, bits, group, symmetric)
    prepared = panels.prepare(w, sums=True)
    np.testing.assert_array_equal(codes_of(prepared), codes_of(w))
    np.testing.assert_allclose(dequantize(prepared), dense, rtol=1e-6, atol=1e-6)
    back = to_canonical(prepared)
    assert jax.tree.structure(back) == jax.tree.structure(w)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(w), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_word_holds_the_codes_of_neighbours_from_its_low_end_on():
    codes = jnp.broadcast_to(jnp.arange(-8, 0, dtype=jnp.int8)[:, None], (8, 64))
    assert hex(int(panels.to_panels(codes, 4)[0, 0, 5])) == "0x76543210"
    codes = jnp.broadcast_to(jnp.array([-128, 0, 1, 127], jnp.int8)[:, None], (4, 64))
    assert hex(int(panels.to_panels(codes, 8)[0, 0, 5])) == "0xff818000"


def test_many_rows_are_left_to_the_reference():
    case = cases.build("quant_matmul", "m130")
    x, w = case.args
    w = panels.prepare(w)
    with pytest.raises(NotImplementedError, match="130 rows, above 128"):
        float_native.quant_matmul(x, w, **case.static, **ON)
    case.check(quant_matmul(x, w, **case.static))


def test_what_has_no_panels_is_refused_and_the_reference_takes_it():
    w, _ = cases.weight(np.random.default_rng(0), 36, 8, 4, group=12)
    with pytest.raises(NotImplementedError, match="groups of 12 input channels, no multiple of 8"):
        panels.prepare(w)
    experts, _ = cases.weight(np.random.default_rng(0), 16, 8, 4, None, experts=(2,))
    with pytest.raises(NotImplementedError, match="experts"):
        panels.prepare(experts)
    with pytest.raises(NotImplementedError, match="canonical form; prepare it once"):
        float_native.quant_matmul(jnp.ones((1, 36)), w, jnp.float32, **ON)
    case = cases.matmul_int(x_symmetric=False)
    *x, w = case.args
    with pytest.raises(NotImplementedError, match="no sums"):
        int_native.quant_matmul_int(*x, panels.prepare(w), **case.static, **ON)
    case.check(quant_matmul_int(*x, panels.prepare(w), **case.static))  # by the reference


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5])
def test_a_dense_weight_is_multiplied_in_float32(rows, transposed, dtype):
    rng = np.random.default_rng(0)
    for k, n in ((100, 333), (257, 128), (576, 64)):
        w = jnp.asarray(rng.standard_normal((n, k) if transposed else (k, n)), dtype)
        x = rng.standard_normal((1, rows, k)).astype(np.float32)
        weight = DenseWeight(w, transposed)
        exact = (
            x @ np.asarray(w, np.float64).reshape(w.shape).T
            if transposed
            else x @ np.asarray(w, np.float64)
        )
        y = dense_matmul(jnp.asarray(x), weight)
        assert y.shape == (1, rows, n) and weight.shape == (k, n)
        np.testing.assert_allclose(y, exact, atol=1e-5 * np.abs(exact).max())


def test_a_mapped_axis_a_gradient_and_one_compilation():
    case = cases.matmul(tokens=(3, 2), k=64, n=40, group=32, dtype="float32")
    x, w = case.args
    w = panels.prepare(w)
    case.check(jax.vmap(lambda x: quant_matmul(x, w))(x))
    f = lambda x: jnp.sum(jnp.sin(quant_matmul(x, w)))  # noqa: E731
    dense = lambda x: jnp.sum(jnp.sin(x @ dequantize(w)))  # noqa: E731
    np.testing.assert_allclose(jax.grad(f)(x), jax.grad(dense)(x), rtol=1e-4, atol=1e-4)
    jitted = jax.jit(functools.partial(quant_matmul, out_dtype=jnp.float32))
    jitted(x, w), jitted(x, w)
    assert jitted._cache_size() == 1


def test_calls_at_the_same_time_do_not_disturb_each_other():
    """Independent products of one program run concurrently; the second finds the workers busy."""
    case = cases.matmul(tokens=(2,), k=512, n=512, dtype="float32")
    x, w = case.args
    w = panels.prepare(w)
    f = jax.jit(lambda xs: [quant_matmul(x, w) for x in xs])
    for _ in range(20):
        for y in f([x] * 8):
            case.check(y)
