"""A weight goes to qwix and back without a bit changed, and stands for the same numbers there."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.core.qarray import from_qarray, to_qarray
from jaxcomp.core.quantize import QuantSpec, dequantize, quantize

SHAPE = (48, 20)
GRIDS = {
    "tensor": dict(granularity="tensor"),
    "channel": dict(),
    "groups": dict(group_size=16),
}


@pytest.fixture
def qwix():
    return pytest.importorskip("qwix", reason="pip install --no-deps qwix==0.1.8")


def values(shape=SHAPE):
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def weight(spec, shape=SHAPE):
    return jax.jit(quantize, static_argnames="spec")(values(shape), spec=spec)


def by_qwix(qwix, w, qtype, **how):
    """Its own quantization, compiled at once."""
    return jax.jit(lambda w: qwix.quantize(w, qtype, **how))(w)


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("bits", "grid"), [(4, "tensor"), (8, "channel"), *((b, "groups") for b in range(2, 9))]
)
def test_there_and_back_is_the_same_weight(bits, grid, symmetric, qwix):
    q = weight(QuantSpec(bits, symmetric=symmetric, **GRIDS[grid]))
    there = to_qarray(q)
    assert there.shape == SHAPE and there.qvalue.dtype == ("int4" if bits <= 4 else "int8")
    assert_equal(from_qarray(there), q)
    np.testing.assert_array_equal(qwix.dequantize(there), dequantize(q))


@pytest.mark.parametrize("qtype", ["int2", "int3", "int8", jnp.int4])
def test_what_qwix_quantized_comes_back_as_it_was(qtype, qwix):
    theirs = by_qwix(qwix, values(), qtype, channelwise_axes=[1], tiled_axes={0: 16})
    ours = from_qarray(theirs)
    np.testing.assert_array_equal(dequantize(ours), qwix.dequantize(theirs))
    again = to_qarray(ours)
    np.testing.assert_array_equal(again.qvalue, theirs.qvalue)
    np.testing.assert_array_equal(again.scale, theirs.scale)
    assert jnp.dtype(again.qvalue.dtype) == theirs.qvalue.dtype


@pytest.mark.parametrize("tiles", [{0: 16, 1: 5}, {0: 12}, {}])
def test_scales_shared_by_output_channels_are_written_out(tiles, qwix):
    theirs = by_qwix(qwix, values(), jnp.int8, tiled_axes=tiles, calibration_method="minmax")
    ours = from_qarray(theirs)
    assert ours.scale.shape[-1] == (SHAPE[1] if tiles else 1) == ours.zero_point.shape[-1]
    np.testing.assert_array_equal(dequantize(ours), qwix.dequantize(theirs))


def test_experts_share_a_scale_or_have_their_own(qwix):
    q = weight(QuantSpec(3, group_size=16, symmetric=False), (2, *SHAPE))
    assert_equal(from_qarray(to_qarray(q)), q)
    theirs = by_qwix(qwix, values((2, *SHAPE)), jnp.int4, channelwise_axes=[2])
    ours = from_qarray(theirs)
    assert theirs.scale.shape[0] == 1 and ours.scale.shape == (2, 1, SHAPE[1])
    np.testing.assert_array_equal(dequantize(ours), qwix.dequantize(theirs))


def test_a_scale_in_bfloat16_is_held_exactly(qwix):
    theirs = by_qwix(qwix, values(), jnp.int8, scale_dtype=jnp.bfloat16)
    scale = from_qarray(theirs).scale
    assert scale.dtype == jnp.float32
    np.testing.assert_array_equal(scale, theirs.scale.astype(jnp.float32))


@pytest.mark.parametrize(
    ("qtype", "message"),
    [
        ("nf4", "qtype='nf4' is no grid of a QTensor; there is int2, int3"),
        (jnp.float8_e4m3fn, "qtype='float8_e4m3fn' is no grid"),
    ],
)
def test_other_number_formats_are_refused(qtype, message, qwix):
    theirs = by_qwix(qwix, values(), qtype)
    with pytest.raises(ValueError, match=message):
        from_qarray(theirs)


def test_what_is_no_weight_or_does_not_fit_its_width_is_refused(qwix):
    q = to_qarray(weight(QuantSpec(4, symmetric=False)))
    with pytest.raises(ValueError, match=r"zero points \(1, 1\) is no QTensor"):
        from_qarray(q.replace(zero_point=q.zero_point[:, :1]))
    with pytest.raises(ValueError, match=r"shape \(20,\) .* is no QTensor"):
        from_qarray(q[0])
    with pytest.raises(ValueError, match=r"the codes reach from -8 to 7, and 3 bits from -4 to 3"):
        from_qarray(q.replace(qtype="int3"))
    ours = weight(QuantSpec(4, symmetric=False))
    with pytest.raises(ValueError, match="the zero points reach from 8 to 8, and 4 bits from -8"):
        to_qarray(ours.replace(zero_point=jnp.full_like(ours.zero_point, 8)))


def test_without_qwix_the_command_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install --no-deps qwix==0.1.8"):
        to_qarray(weight(QuantSpec(4)))
