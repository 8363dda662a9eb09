import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.core.quantize import QuantSpec, dequantize, quantize
from jaxcomp.solvers.gptq import MAX_DAMP, TILE, gptq

IN, OUT = 72, 12  # one whole tile of columns and a part of one
assert IN % TILE

INT3 = QuantSpec(bits=3)
INT3_GROUPS = QuantSpec(bits=3, group_size=24, symmetric=False)
SPECS = [
    INT3,
    INT3_GROUPS,
    QuantSpec(bits=2, symmetric=False),
    QuantSpec(bits=4, group_size=9),
    QuantSpec(bits=8),
    QuantSpec(bits=4, granularity="tensor"),
]
solve = jax.jit(gptq, static_argnames=("spec", "act_order", "clip"))


def problem(seed=0, in_ch=IN, tokens=200):
    """A weight and the second moment of correlated inputs with a few large channels."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((in_ch, in_ch)) / in_ch**0.5 + np.eye(in_ch)
    x = rng.standard_normal((tokens, in_ch)) @ mix * np.exp(rng.standard_normal(in_ch))
    w = rng.standard_normal((in_ch, OUT)) / in_ch**0.5
    return w.astype(np.float32), (x.T @ x / tokens).astype(np.float32)


def objective(quantized, w, h):
    error = np.asarray(dequantize(quantized), np.float64) - w
    return np.sum(error * (h.astype(np.float64) @ error))


def reference(w, h, spec, act_order, damp=0.01):
    """Frantar et al., Eq. 2 and 3, in float64: codes by removing one channel of H⁻¹ at a time."""
    w, h = np.array(w, np.float64), np.array(h, np.float64)
    in_ch = len(w)
    h += damp * np.mean(np.diag(h)) * np.eye(in_ch)
    order = np.argsort(-np.diag(h), kind="stable") if act_order else np.arange(in_ch)
    group = spec.group_size or in_ch
    grids = [grid(w[g : g + group], spec) for g in range(0, in_ch, group)]
    w, inverse = w[order], np.linalg.inv(h)[order][:, order]
    codes = np.zeros(w.shape, int)
    for j in range(in_ch):
        if not act_order and spec.group_size and j % group == 0:
            grids[j // group] = grid(w[j : j + group], spec)
        scale, zero = grids[order[j] // group]
        codes[order[j]] = np.clip(np.round(w[j] / scale) + zero, spec.qmin, spec.qmax)
        error = (w[j] - (codes[order[j]] - zero) * scale) / inverse[j, j]
        w[j + 1 :] -= np.outer(inverse[j + 1 :, j], error)
        inverse = inverse - np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return (
        codes,
        np.repeat([s for s, _ in grids], group, 0),
        np.repeat([z for _, z in grids], group, 0),
    )


def grid(rows, spec):
    if spec.symmetric:
        return np.abs(rows).max(0) / spec.qmax, np.zeros(rows.shape[1])
    low, high = np.minimum(rows.min(0), 0), np.maximum(rows.max(0), 0)
    scale = (high - low) / (2**spec.bits - 1)
    return scale, np.round(-low / scale) + spec.qmin


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("spec", [INT3, INT3_GROUPS], ids=str)
def test_the_column_loop_follows_the_papers_equations(spec, act_order):
    w, h = problem()
    found = solve(w, h, spec, act_order=act_order)
    codes, scale, zero = reference(w, h, spec, act_order)
    assert np.mean(np.asarray(found.weight.codes) == codes) >= 0.99
    error = (codes - zero) * scale - w
    expected = np.sum(error * (h @ error))
    assert objective(found.weight, w, h) == pytest.approx(expected, rel=0.01)
    assert float(found.damp) == pytest.approx(0.01)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_output_error_is_below_that_of_rounding(spec, act_order):
    w, h = problem(1)
    found, rounded = solve(w, h, spec, act_order=act_order), quantize(w, spec)
    before, after = objective(rounded, w, h), objective(found.weight, w, h)
    assert after < before
    assert float(found.error_before.sum()) == pytest.approx(before, rel=1e-3)
    assert float(found.error_after.sum()) == pytest.approx(after, rel=1e-3)
    assert float(found.energy.sum()) == pytest.approx(np.sum(w * (h @ w)), rel=1e-3)
    if spec.bits < 8:  # the output gains what the weight gives up
        assert np.sum((dequantize(found.weight) - w) ** 2) > np.sum((dequantize(rounded) - w) ** 2)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("spec", [INT3, INT3_GROUPS], ids=str)
def test_uncorrelated_inputs_give_plain_rounding_bit_for_bit(spec, act_order):
    w, _ = problem(2)
    found = solve(w, 3.0 * np.eye(IN, dtype=np.float32), spec, act_order=act_order).weight
    assert jax.tree.all(jax.tree.map(np.array_equal, found, quantize(w, spec)))


def test_all_outputs_at_once_equal_one_at_a_time():
    w, h = problem(3)
    together = solve(w, h, INT3, act_order=True).weight
    alone = [solve(w[:, i : i + 1], h, INT3, act_order=True).weight for i in range(OUT)]
    codes = np.concatenate([a.codes for a in alone], axis=1)
    assert np.mean(codes == together.codes) >= 0.999  # a tie may fall either way
    np.testing.assert_array_equal(np.concatenate([a.scale for a in alone], 1), together.scale)


def test_the_order_in_which_channels_are_stored_does_not_matter_with_act_order():
    w, h = problem(4)
    p = np.random.default_rng(4).permutation(IN)
    plain = solve(w, h, INT3, act_order=True).weight
    moved = solve(w[p], h[p][:, p], INT3, act_order=True).weight
    assert np.mean(np.asarray(moved.codes) == np.asarray(plain.codes)[p]) >= 0.999
    assert objective(moved, w[p], h[p][:, p]) == pytest.approx(objective(plain, w, h), rel=1e-3)


def test_the_scale_of_the_second_moment_does_not_matter():
    w, h = problem(5)
    one, other = (solve(w, c * h, INT3, act_order=True).weight for c in (1.0, 1024.0))
    np.testing.assert_array_equal(one.codes, other.codes)


def test_dead_channels_become_zero_and_do_not_disturb_the_others():
    w, h = problem(6)
    dead = np.arange(IN) % 8 == 0
    h[dead], h[:, dead], w[dead] = 0, 0, 100.0
    found = solve(w, h, INT3, act_order=True)
    assert not np.asarray(found.weight.codes)[dead].any()
    assert np.asarray(found.weight.scale).max() < 1  # the grid is that of the living channels
    assert np.isfinite(found.error_after).all()
    assert objective(found.weight, w, h) < objective(
        quantize(np.where(dead[:, None], 0, w), INT3), w, h
    )


def singular(kind):
    w, h = problem(7)
    x = np.random.default_rng(7).standard_normal((IN // 3, IN)).astype(np.float32)
    if kind == "fewer tokens than channels":
        return w, x.T @ x
    if kind == "every channel three times":
        h[24:] = h[:24].repeat(2, 0)
        h[:, 24:] = h[:, :24].repeat(2, 1)
        return w, h
    return w, np.ones((IN, IN), np.float32)


@pytest.mark.parametrize(
    "kind", ["fewer tokens than channels", "every channel three times", "one channel repeated"]
)
def test_a_singular_second_moment_recovers_and_says_how(kind):
    w, h = singular(kind)
    found = solve(w, h, INT3, act_order=True, damp=1e-9)
    assert 1e-9 <= float(found.damp) <= MAX_DAMP
    if kind == "one channel repeated":  # zero pivots for certain: more damping was needed
        assert float(found.damp) > 1e-9
    assert np.isfinite(found.error_after).all()
    assert objective(found.weight, w, h) <= objective(quantize(w, INT3), w, h)


def test_no_input_at_all_still_gives_a_weight_on_the_grid():
    w, h = problem(8)
    found = solve(w, 0 * h, INT3, act_order=True)
    assert not np.asarray(found.weight.codes).any() and not np.asarray(found.error_after).any()
    assert np.isfinite(found.weight.scale).all() and float(found.damp) == pytest.approx(0.01)


def test_a_hopeless_second_moment_is_reported_as_nan_damping():
    w, h = problem(9)
    h[0, 1] = h[1, 0] = 1e4 * h.max()  # not positive definite, whatever is added
    assert np.isnan(solve(w, h, INT3, act_order=True).damp)


def test_channels_that_are_no_whole_number_of_groups_are_refused():
    w, h = problem()
    with pytest.raises(ValueError, match=r"in_ch=72 .*group_size=16.*divisor of 72 such as.*18"):
        gptq(jnp.asarray(w), jnp.asarray(h), QuantSpec(bits=4, group_size=16))


def test_clipped_grids_help_a_heavy_tailed_weight():
    w, h = problem(10)
    w[::9] *= 6
    grids = {c: solve(w, h, INT3, act_order=True, clip=c) for c in ("none", "weight", "output")}
    error = {c: float(s.error_after.sum()) for c, s in grids.items()}
    assert error["output"] < error["weight"] < error["none"]
