import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.core.quantize import QuantSpec, dequantize, quantize
from jaxcomp.solvers.clamping import STEP, STEPS, group_gram, search_clamp
from jaxcomp.solvers.smoothing import FLOOR, awq_scale, flatquant_scale, smoothing_scale

IN, OUT, TOKENS = 48, 10, 200
SPECS = [
    QuantSpec(bits=3),
    QuantSpec(bits=4, group_size=16),
    QuantSpec(bits=3, group_size=12, symmetric=False),
    QuantSpec(bits=2, symmetric=False),
    QuantSpec(bits=4, granularity="tensor"),
]


def amaxes(seed=0):
    rng = np.random.default_rng(seed)
    return tuple(np.exp(2 * rng.standard_normal(IN)).astype(np.float32) for _ in range(2))


def problem(seed):
    """Heavy-tailed weights, and inputs whose channels go together."""
    rng = np.random.default_rng(seed)
    w = rng.standard_t(3, (IN, OUT)).astype(np.float32)
    x = rng.standard_t(4, (TOKENS, 8)) @ rng.standard_normal((8, IN))
    return (x + 0.1 * rng.standard_normal((TOKENS, IN))).astype(np.float32), w


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_smoothing_divides_the_range_between_activation_and_weight_as_alpha_says(alpha):
    x, w = amaxes()
    s = smoothing_scale(x, w, alpha)
    np.testing.assert_allclose(x / s, (x * w) ** (1 - alpha), rtol=1e-4)
    np.testing.assert_allclose(w * s, (x * w) ** alpha, rtol=1e-4)


def test_flatquants_start_is_the_inverse_of_smoothing():
    x, w = amaxes()
    np.testing.assert_allclose(
        flatquant_scale(x, w, 0.3), 1 / smoothing_scale(x, w, 0.3), rtol=1e-4
    )
    assert flatquant_scale(jnp.ones(3), jnp.zeros(3), 0.3) == pytest.approx(FLOOR)


def test_dead_channels_get_finite_positive_scales():
    zeros, ones = jnp.zeros(4), jnp.ones(4)
    for x, w in [(zeros, ones), (ones, zeros), (zeros, zeros)]:
        for s in (smoothing_scale(x, w, 0.5), flatquant_scale(x, w, 0.3), awq_scale(x, 0.5)):
            assert np.isfinite(s).all() and (np.asarray(s) > 0).all()


def test_awq_has_no_scale_for_ratio_zero_and_is_centred_for_others():
    mean = jnp.asarray([0.0, 0.5, 3.0, 800.0])
    assert np.array_equal(awq_scale(mean, 0.0), np.ones(4))
    for ratio in (0.05, 0.5, 0.95):
        s = np.asarray(jax.jit(awq_scale)(mean, ratio))
        assert s.max() * s.min() == pytest.approx(1, rel=1e-5)
        assert np.all(np.diff(s) > 0)
    assert s[3] / s[2] == pytest.approx((800 / 3) ** 0.95, rel=1e-4)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_no_clamp_is_better_than_the_one_found(spec):
    x, w = problem(0)
    groups = IN // (spec.group_size or IN)
    xg, wg = x.reshape(TOKENS, groups, -1), w.reshape(groups, -1, OUT)
    shared = spec.granularity == "tensor"

    def error(q):
        d = (np.asarray(dequantize(q), np.float64) - w).reshape(wg.shape)
        partial = np.sum(np.einsum("tgi,gio->tgo", xg, d) ** 2, axis=0)
        return partial.sum(keepdims=True) if shared else partial

    amax = np.abs(wg).max((0, 1, 2) if shared else 1, keepdims=True)
    clamped = [
        quantize(np.clip(wg, -m * amax, m * amax).reshape(w.shape), spec)
        for m in np.float32(1 - STEP * np.arange(STEPS))
    ]
    best = np.min([error(q) for q in clamped], axis=0)
    found = error(quantize(search_clamp(w, group_gram(x, spec), spec), spec))
    np.testing.assert_allclose(found, best, rtol=1e-3)
    assert found.sum() < 0.95 * error(quantize(w, spec)).sum()


def test_channels_that_cancel_are_seen_to_cancel():
    # Two channels with opposite inputs: equal errors in both cost nothing, clamping both is free.
    x = np.concatenate([np.ones((TOKENS, 1)), -np.ones((TOKENS, 1))], 1).astype(np.float32)
    x = np.concatenate([x, 1e-3 * np.ones((TOKENS, 6), np.float32)], 1)
    w = np.concatenate([[[8.0], [8.0]], 4.0 * np.ones((6, 1))]).astype(np.float32)
    spec = QuantSpec(bits=3)
    assert np.max(search_clamp(w, group_gram(x, spec), spec)) < 8


def test_a_group_of_zeros_stays_zero():
    x, w = problem(1)
    w[:, 4] = 0
    for spec in SPECS[:3]:
        found = dequantize(quantize(search_clamp(w, group_gram(x, spec), spec), spec))
        assert np.isfinite(found).all() and not np.asarray(found[:, 4]).any()
