import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    DenseWeight,
    dense_matmul,
    prepare_dense,
    quant_matmul,
    quant_matmul_int,
    quantize_tokens,
)
from pallas_kernels.chips import CHIPS
from pallas_kernels.native import library, panels
from pallas_kernels.quant_decode_attention import native as attention_native
from pallas_kernels.quant_decode_attention.reference import _floats
from pallas_kernels.quant_matmul import native as float_native
from pallas_kernels.quant_matmul_int import native as int_native
from pallas_kernels.quantize_tokens import native as quantize_native
from pallas_kernels.quantize_tokens import reference as quantize_reference
from pallas_kernels.weight import codes_of, dequantize, to_canonical
from tests.kernels import cases

pytestmark = pytest.mark.skipif(not library.available(), reason=library._unavailable() or "there")
ON = dict(chip=CHIPS["cpu"], interpret=False)


@pytest.mark.parametrize("name", cases.names("quant_matmul"))
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


@pytest.mark.parametrize("rows", [*range(1, 8), 11, 31, 32, 37])
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
    word = lambda codes, bits: hex(panels.to_panels(panels.to_bytes(codes, bits), bits)[0, 0, 5])  # noqa: E731
    column = lambda codes: np.repeat(np.array(codes, np.int8)[:, None], 64, axis=1)  # noqa: E731
    assert word(column(range(-8, 0)), 4) == "0x76543210"
    assert word(column([-128, 0, 1, 127]), 8) == "0xff818000"


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
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 37, 300])
def test_a_dense_weight_is_multiplied_in_float32(rows, transposed, dtype):
    rng = np.random.default_rng(0)
    for k, n in ((100, 333), (257, 128), (576, 64)):
        w = jnp.asarray(rng.standard_normal((n, k) if transposed else (k, n)), dtype)
        x = rng.standard_normal((1, rows, k)).astype(np.float32)
        weight = prepare_dense(DenseWeight(w, transposed), CHIPS["cpu"])
        assert weight.out_ch == n and weight.shape == (k, n)
        np.testing.assert_array_equal(weight.dense, w.T if transposed else w)
        ids = jnp.array([[0, n - 1], [5, 5]])
        np.testing.assert_array_equal(weight.columns(ids), weight.dense.T[ids])
        exact = (
            x @ np.asarray(w, np.float64).reshape(w.shape).T
            if transposed
            else x @ np.asarray(w, np.float64)
        )
        y = dense_matmul(jnp.asarray(x), weight)
        assert y.shape == (1, rows, n)
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


TAKEN = [
    n
    for n in cases.names("quant_decode_attention")
    if cases.build("quant_decode_attention", n).static["k_bits"] in (4, 8)
]


@pytest.mark.parametrize("name", TAKEN)
def test_attention_over_a_cache_is_that_of_the_definition(name):
    case = cases.build("quant_decode_attention", name)
    args = [None if a is None else jnp.asarray(a) for a in case.args]
    case.check(attention_native.quant_decode_attention(*args, **case.static, **ON))


@pytest.mark.parametrize("bits", [(None, 8), (8, 4), (4, None), (4, 8)])
@pytest.mark.parametrize(("group", "slots"), [(1, 5), (3, 300), (7, 257)])
def test_keys_and_values_of_different_widths_any_group_and_any_number_of_chunks(bits, group, slots):
    of = dict(heads=(2, group), slots=slots, dim=64, starts=(0, 2), stops=(slots, slots - 1))
    k, v = (cases.attention(bits=b, dtype="float32", **of) for b in bits)
    q, starts, stops = k.args[0], *k.args[3:5]
    args = (q, k.args[1], v.args[2], starts, stops, *k.args[5:7], *v.args[7:9])
    args = [None if a is None else jnp.asarray(a) for a in args]
    static = dict(k.static, k_bits=bits[0] or 8, v_bits=bits[1] or 8)
    found = attention_native.quant_decode_attention(*args, **static, **ON)
    floats = []
    for rows, (scale, zero), b in (
        (k.args[1], k.args[5:7], bits[0]),
        (v.args[2], v.args[7:9], bits[1]),
    ):
        floats.append(np.asarray(rows if b is None else _floats(rows, scale, zero, b, 64, q.dtype)))
    expected = cases.oracles.attention(q, *floats, starts, stops, static["scale"])
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("clip", [None, (0.9, 0.8)])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_of_tokens_are_those_of_the_reference_but_for_ties(bits, symmetric, clip):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((7, 3, 77)).astype(np.float32)
    x[0, 0], x[1, 1], x[2, 2, 5], x[3] = 0, np.abs(x[1, 1]), 1e6, np.round(x[3] * 4) / 8
    static = dict(bits=bits, symmetric=symmetric)
    clip = None if clip is None else jnp.asarray(clip, jnp.float32)
    for dtype in (jnp.float32, jnp.bfloat16):
        a = jnp.asarray(x, dtype)
        found = quantize_native.quantize_tokens(a, clip, **static, **ON)
        expected = jax.jit(functools.partial(quantize_reference.quantize_tokens, **static))(a, clip)
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        np.testing.assert_allclose(found[1], expected[1], rtol=2e-7)
        off = np.abs(found[0].astype(int) - expected[0].astype(int))
        assert off.max() <= 1 and off.mean() < 2e-3
        if not symmetric:
            assert np.abs(found[2].astype(int) - expected[2].astype(int)).max() <= 1
    assert quantize_tokens(jnp.zeros((0, 4)), **static)[0].shape == (0, 4)
