import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.core.metrics import Row, cosine, relative_error, sqnr, told_apart


@pytest.fixture
def pair():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((7, 5))
    return x.astype(np.float32), (x + 0.1 * rng.standard_normal(x.shape)).astype(np.float32)


def test_numbers_agree_with_their_formulas_in_float64(pair):
    ref, x = (a.astype(np.float64) for a in pair)
    error = np.sum((x - ref) ** 2) / np.sum(ref**2)
    assert float(relative_error(pair[1], pair[0])) == pytest.approx(error, rel=1e-5)
    assert float(sqnr(pair[1], pair[0])) == pytest.approx(-10 * np.log10(error), rel=1e-5)
    angle = np.sum(x * ref) / np.sqrt(np.sum(x**2) * np.sum(ref**2))
    assert float(cosine(pair[1], pair[0])) == pytest.approx(angle, rel=1e-5)


def test_equal_zero_and_opposite_arrays(pair):
    x = pair[0]
    assert relative_error(x, x) == 0 and float(cosine(x, x)) == pytest.approx(1)
    assert float(relative_error(0 * x, x)) == pytest.approx(1)
    assert float(cosine(-x, x)) == pytest.approx(-1) and sqnr(x, x) > 200
    assert all(np.isfinite(f(0 * x, 0 * x)) for f in (relative_error, sqnr, cosine))


def test_errors_do_not_depend_on_a_common_scale_but_the_cosine_not_even_on_one_sides(pair):
    ref, x = pair
    assert float(relative_error(8 * x, 8 * ref)) == pytest.approx(float(relative_error(x, ref)))
    assert float(cosine(3 * x, ref)) == pytest.approx(float(cosine(x, ref)))
    assert relative_error(3 * x, ref) > 10 * relative_error(x, ref)


def test_bfloat16_arrays_are_compared_in_float32(pair):
    x = jnp.full(1000, 1.0, jnp.bfloat16)
    assert float(relative_error(2 * x, x)) == 1 and relative_error(x, x).dtype == jnp.float32


def test_steps_of_one_name_are_told_apart():
    rows = []
    for names in (["A", "A choice", "A"], ["B"], ["A"], ["A", "B"]):
        rows += told_apart([Row(name, None, None, {}) for name in names], rows)
    assert [r.step for r in rows] == ["A", "A choice", "A", "B", "A 2", "A 3", "B 2"]
