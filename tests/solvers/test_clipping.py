import jax
import numpy as np
import pytest

from jaxcomp.core.quantize import QuantSpec, dequantize, quantize, quantize_with
from jaxcomp.solvers.clipping import NORM, STEP, STEPS, search_range

IN, OUT = 48, 10
SPECS = [
    QuantSpec(bits=3),
    QuantSpec(bits=2, symmetric=False),
    QuantSpec(bits=4, group_size=16),
    QuantSpec(bits=3, group_size=12, symmetric=False),
    QuantSpec(bits=4, granularity="tensor"),
]
search = jax.jit(search_range, static_argnames="spec")


def heavy_tailed(seed):
    return np.random.default_rng(seed).standard_t(3, (IN, OUT)).astype(np.float32)


def group_error(q, w, spec):
    """Σ|w − ŵ|^2.4 of each group that shares a range, float64."""
    error = np.abs(np.asarray(dequantize(q), np.float64) - w) ** NORM
    if spec.granularity == "tensor":
        return error.sum(keepdims=True)
    return error.reshape(-1, spec.group_size or IN, OUT).sum(1)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_searched_range_is_never_worse_in_its_norm(spec):
    w = heavy_tailed(0)
    clipped = group_error(quantize_with(w, *search(w, spec), spec), w, spec)
    plain = group_error(quantize(w, spec), w, spec)
    assert np.all(clipped <= plain * (1 + 1e-5))
    assert clipped.sum() < 0.95 * plain.sum()  # tails this heavy are worth cutting


@pytest.mark.parametrize("spec", SPECS[:4], ids=str)
def test_no_candidate_is_better_than_the_one_found(spec):
    w = heavy_tailed(1).astype(np.float64)
    rows = w.reshape(-1, spec.group_size or IN, OUT)
    best = np.full((len(rows), OUT), np.inf)
    for p in 1 - STEP * np.arange(STEPS):
        low, high = p * rows.min(1, keepdims=True), p * rows.max(1, keepdims=True)
        if spec.symmetric:
            scale, zero = np.maximum(-low, high) / spec.qmax, 0
        else:
            low, high = np.minimum(low, 0), np.maximum(high, 0)
            scale = (high - low) / (2**spec.bits - 1)
            zero = np.round(-low / scale) + spec.qmin
        codes = np.clip(np.round(rows / scale) + zero, spec.qmin, spec.qmax)
        best = np.minimum(best, (np.abs((codes - zero) * scale - rows) ** NORM).sum(1))
    found = quantize_with(w.astype(np.float32), *search(w.astype(np.float32), spec), spec)
    np.testing.assert_allclose(group_error(found, w, spec), best, rtol=1e-3)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_with_importance_the_weighted_squares_are_never_worse(spec):
    w, importance = heavy_tailed(4), np.exp(np.random.default_rng(4).standard_normal(IN))
    found = quantize_with(w, *search_range(w, spec, importance.astype(np.float32)), spec)

    def error(q):
        squared = (np.asarray(dequantize(q), np.float64) - w) ** 2 * importance[:, None]
        return squared.reshape(-1, spec.group_size or IN, OUT).sum(1)

    found, plain = error(found), error(quantize(w, spec))
    shared = spec.granularity == "tensor"  # one range: only the sum is promised
    assert np.all(
        (found.sum() if shared else found) <= (plain.sum() if shared else plain) * 1.00001
    )
    assert found.sum() < 0.95 * plain.sum()


def test_a_channel_that_matters_is_not_clipped():
    w, importance = heavy_tailed(5), np.ones(IN, np.float32)
    w[7], importance[7] = 40.0, 1e6
    found = dequantize(quantize_with(w, *search_range(w, QuantSpec(4), importance), QuantSpec(4)))
    np.testing.assert_allclose(found[7], 40.0, rtol=1e-5)
    blind = dequantize(quantize_with(w, *search(w, QuantSpec(4)), QuantSpec(4)))
    assert np.all(np.asarray(blind[7]) < 39.9)


def test_a_weight_on_the_grid_keeps_its_range():
    spec = QuantSpec(bits=4)
    codes = np.random.default_rng(2).integers(-6, 7, (IN, OUT))
    codes[0] = 7
    w = codes.astype(np.float32) / 8
    assert np.array_equal(search(w, spec)[0], quantize(w, spec).scale)
    assert np.array_equal(dequantize(quantize_with(w, *search(w, spec), spec)), w)


@pytest.mark.parametrize("spec", SPECS[:2], ids=str)
def test_a_group_of_zeros_stays_zero(spec):
    w = heavy_tailed(3)
    w[:, 4] = 0
    found = dequantize(quantize_with(w, *search(w, spec), spec))
    assert np.isfinite(found).all() and not np.asarray(found[:, 4]).any()
