import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.core.quantize import (
    QTensor,
    QuantSpec,
    dequantize,
    fake_quantize,
    fake_quantize_with,
    fit_range,
    quantize,
    quantize_with,
    range_to_grid,
)

IN, OUT = 24, 6
GRIDS = [dict(granularity="tensor"), dict(), dict(group_size=8)]
SPECS = [
    QuantSpec(bits=bits, symmetric=symmetric, **grid)
    for bits in (2, 3, 4, 8)
    for symmetric in (True, False)
    for grid in GRIDS
]
every_spec = pytest.mark.parametrize("spec", SPECS, ids=str)


def weight(shape=(IN, OUT), seed=0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) + 0.3).astype(np.float32)


def spread(values, rows=IN):
    """One value a group → one value a row."""
    return np.repeat(np.asarray(values, np.float64), rows // values.shape[-2], -2)


@every_spec
def test_the_error_is_at_most_half_a_step(spec):
    w = weight()
    q = quantize(w, spec)
    error = np.abs(np.asarray(dequantize(q), np.float64) - w)
    # An asymmetric grid puts 0 on a code, which moves its ends by up to half a step more.
    limit = 0.5 if spec.symmetric else 1.0
    assert np.all(error <= spread(q.scale) * (limit + 1e-4))
    inside = np.abs(np.asarray(q.codes) - (spec.qmin + spec.qmax) / 2) < 2 ** (spec.bits - 1) - 1
    assert np.all((error <= spread(q.scale) * (0.5 + 1e-4)) | ~inside)


@every_spec
def test_codes_are_the_nearest_of_all_codes(spec):
    w, q = weight(), quantize(weight(), spec)
    zero = 0 if q.zero_point is None else spread(q.zero_point)
    codes = np.arange(spec.qmin, spec.qmax + 1)[:, None, None]
    distances = np.abs((codes - zero) * spread(q.scale) - w)
    chosen = np.abs((np.asarray(q.codes, np.float64) - zero) * spread(q.scale) - w)
    assert np.all(chosen <= distances.min(0) + 1e-6)
    assert np.asarray(q.codes).min() >= spec.qmin and np.asarray(q.codes).max() <= spec.qmax


@every_spec
def test_scales_have_the_shape_of_the_granularity_and_cover_the_range(spec):
    w, q = weight(), quantize(weight(), spec)
    groups, cols = {None: 1, 8: 3}[spec.group_size], 1 if spec.granularity == "tensor" else OUT
    assert q.scale.shape == (groups, cols) and q.scale.dtype == jnp.float32
    assert q.packed.dtype == jnp.uint8 and q.shape == w.shape
    rows = w.reshape(groups, -1, OUT) if cols > 1 else w.reshape(1, -1, 1)
    low, high = rows.min(1).astype(np.float64), rows.max(1).astype(np.float64)
    if spec.symmetric:
        assert q.zero_point is None
        expected = np.maximum(-low, high) / spec.qmax
    else:
        assert q.zero_point.dtype == jnp.int8 and q.zero_point.shape == q.scale.shape
        expected = (np.maximum(high, 0) - np.minimum(low, 0)) / (2**spec.bits - 1)
    np.testing.assert_allclose(q.scale, expected, rtol=1e-6)


@every_spec
def test_zero_stays_exactly_zero(spec):
    w = weight()
    w[::3] = 0
    assert not np.asarray(dequantize(quantize(w, spec)))[::3].any()


@pytest.mark.parametrize("value", [0.0, 0.7, -0.7, 1e-30])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_constant_group_keeps_its_value(symmetric, value):
    w = weight()
    w[:, 2] = value
    found = np.asarray(dequantize(quantize(w, QuantSpec(bits=4, symmetric=symmetric))))
    np.testing.assert_allclose(found[:, 2], value, rtol=1e-6, atol=1e-20)
    assert np.isfinite(found).all()


@every_spec
def test_values_on_the_grid_are_kept(spec):
    once = quantize(weight(), spec)
    again = quantize_with(dequantize(once), once.scale, once.zero_point, spec)
    np.testing.assert_array_equal(again.codes, once.codes)


@pytest.mark.parametrize("spec", SPECS[-6:], ids=str)
def test_leading_axes_are_independent(spec):
    w = weight((2, 3, IN, OUT))
    w[1] *= 10
    whole, part = quantize(w, spec), quantize(w[1, 2], spec)
    assert whole.shape == w.shape
    mine = jax.tree.map(lambda a: a[1, 2], whole)
    np.testing.assert_array_equal(mine.codes, part.codes)
    np.testing.assert_allclose(mine.scale, part.scale, rtol=1e-6)


def test_a_bfloat16_weight_is_quantized_by_its_values_and_gives_its_dtype_back():
    w = jnp.asarray(weight(), jnp.bfloat16)
    a, b = quantize(w, QuantSpec()), quantize(w.astype(jnp.float32), QuantSpec())
    assert jax.tree.all(jax.tree.map(np.array_equal, a, b))
    assert dequantize(a, jnp.bfloat16).dtype == fake_quantize(w, QuantSpec()).dtype == jnp.bfloat16


# Activations


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", ["tensor", "token", "head"])
def test_dynamic_ranges_are_those_of_the_activation(granularity, symmetric):
    spec = QuantSpec(bits=6, granularity=granularity, symmetric=symmetric, dynamic=True)
    x = weight((2, 5, 3, 8))  # batch, time, heads, head_dim
    axes = None if granularity == "tensor" else -1
    low, high = (f(axis=axes, keepdims=True).astype(np.float64) for f in (x.min, x.max))
    if symmetric:
        step = np.maximum(-low, high) / 31
    else:
        step = (np.maximum(high, 0) - np.minimum(low, 0)) / 63
    error = np.abs(np.asarray(fake_quantize(x, spec), np.float64) - x)
    assert np.all(error <= step * (0.5 if symmetric else 1.0) * (1 + 1e-3))
    assert error.max() > 0.3 * np.min(step)


def test_tokens_do_not_see_each_other():
    spec = QuantSpec(bits=4, granularity="token", dynamic=True)
    x = weight((5, 16))
    louder = x.copy()
    louder[0] *= 1000
    np.testing.assert_array_equal(fake_quantize(x, spec)[1:], fake_quantize(louder, spec)[1:])
    assert not np.array_equal(
        *(
            fake_quantize(a, dataclasses.replace(spec, granularity="tensor"))[1:]
            for a in (x, louder)
        )
    )


def test_a_static_range_saturates():
    spec = QuantSpec(bits=4, granularity="tensor", symmetric=False)
    scale, zero = range_to_grid(jnp.float32(-1.0), jnp.float32(2.0), spec)
    x = jnp.array([-5.0, -1.0, 0.0, 0.4, 2.0, 9.0])
    found = np.asarray(fake_quantize_with(x, scale, zero, spec))
    np.testing.assert_allclose(found, [-1, -1, 0, 0.4, 2, 2], atol=0.1 + 1e-6)
    assert found[2] == 0 and found[0] == found[1] and found[4] == found[5]


def test_the_gradient_passes_straight_through_inside_the_range_and_not_outside():
    spec = QuantSpec(bits=4, granularity="tensor", symmetric=False)
    scale, zero = range_to_grid(jnp.float32(-1.0), jnp.float32(2.0), spec)
    x = jnp.array([-5.0, -0.9, 0.0, 0.33, 1.9, 9.0])
    grad = jax.grad(lambda x: jnp.sum(fake_quantize_with(x, scale, zero, spec)))(x)
    np.testing.assert_allclose(grad, [0, 1, 1, 1, 1, 0], atol=1e-6)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", ["channel", "token"])
def test_the_gradient_reaches_what_made_the_range(granularity, symmetric):
    spec = QuantSpec(
        3, granularity=granularity, symmetric=symmetric, dynamic=granularity != "channel"
    )
    x = jnp.asarray(weight())
    value, grad = jax.value_and_grad(lambda x: jnp.sum(fake_quantize(x, spec) ** 2))(x)
    # Twice the input is twice the output, so by Euler the gradient along x is twice the value.
    np.testing.assert_allclose(jnp.sum(grad * x), 2 * value, rtol=1e-4)
    assert value == pytest.approx(float(jnp.sum(fake_quantize(x, spec) ** 2)))


def test_clip_factors_shrink_the_range_and_get_a_gradient():
    spec = QuantSpec(3, granularity="token", symmetric=False, dynamic=True)
    x = jax.random.normal(jax.random.key(3), (4, 64))
    clip = jnp.array([0.5, 0.8])
    found = fake_quantize(x, spec, clip)
    step = (0.8 * jnp.max(x, -1) - 0.5 * jnp.min(x, -1)) / 7
    assert (jnp.max(found, -1) <= 0.8 * jnp.max(x, -1) + step).all()
    assert (jnp.min(found, -1) >= 0.5 * jnp.min(x, -1) - step).all()
    loss = lambda c: jnp.sum((fake_quantize(x, spec, c) - x) ** 2)  # noqa: E731
    assert (jnp.abs(jax.grad(loss)(clip)) > 0).all()
    np.testing.assert_array_equal(fake_quantize(x, spec, jnp.ones(2)), fake_quantize(x, spec))


def test_simulated_weights_equal_quantized_ones():
    for spec in SPECS[6:12]:
        np.testing.assert_allclose(
            fake_quantize(weight(), spec),
            dequantize(quantize(weight(), spec)),
            rtol=1e-6,
            atol=1e-7,
        )


# The leaf and the spec


def test_a_qtensor_is_a_pytree_under_every_transformation():
    spec = QuantSpec(bits=3, group_size=8, symmetric=False)
    q = quantize(weight((2, IN, OUT)), spec)
    by_expert = jax.vmap(dequantize)(q)
    np.testing.assert_array_equal(by_expert, dequantize(q))
    np.testing.assert_array_equal(jax.jit(dequantize)(q), dequantize(q))
    shapes = jax.eval_shape(lambda w: quantize(w, spec), jnp.zeros((2, IN, OUT)))
    assert shapes.shape == q.shape and shapes.packed.shape == q.packed.shape
    doubled = jax.tree.map(lambda a: a * 2 if a.dtype == jnp.float32 else a, q)
    np.testing.assert_allclose(dequantize(doubled), 2 * dequantize(q), rtol=1e-6)
    assert isinstance(doubled, QTensor) and (doubled.bits, doubled.in_ch) == (3, IN)
    assert len(jax.tree.leaves(quantize(weight(), QuantSpec()))) == 2  # no zero point


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(bits=1), r"bits=1 is outside 2\.\.8"),
        (dict(bits=16), "bits=16 .*for 16 leave the tensor alone"),
        (dict(bits="4"), "bits='4' is outside"),
        (dict(bits=True), "bits=True is outside"),
        (dict(dtype="fp8"), "dtype='fp8' is not .*use 'int'"),
        (dict(granularity="row"), "granularity='row' .*use tensor, channel, token or head"),
        (dict(group_size=0), "group_size=0 is below 1; use None"),
        (dict(group_size=8, granularity="tensor"), "group_size=8 needs granularity='channel'"),
        (dict(dynamic=True), "dynamic=True needs granularity 'tensor', 'token' or 'head'"),
    ],
)
def test_a_grid_that_does_not_exist_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        QuantSpec(**settings)


def test_a_group_size_that_does_not_divide_names_divisors_near_it():
    with pytest.raises(ValueError) as caught:
        quantize(weight(), QuantSpec(bits=4, group_size=10))
    text = str(caught.value)
    assert "in_ch=24" in text and "group_size=10" in text and "group_size=None" in text
    named = [int(n) for n in text.rpartition("such as ")[2].split(", ")]
    assert named and all(IN % n == 0 for n in named) and {8, 12} <= set(named)


@pytest.mark.parametrize("granularity", ["token", "head"])
def test_a_grid_for_activations_does_not_fit_a_weight(granularity):
    spec = QuantSpec(bits=4, granularity=granularity)
    with pytest.raises(ValueError, match=f"'{granularity}' is for activations.*'channel'"):
        fit_range(weight(), spec)
